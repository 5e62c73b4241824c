#include <miniquant/miniquant.h>
#include <torch/torch.h>

#include <cmath>
#include <iostream>

int main() {
  torch::manual_seed(0);
  const torch::Tensor weight = torch::randn({256, 512}) * 0.02;
  miniquant::HessianAccumulator accumulator(/*in_features=*/512);
  accumulator.update(torch::randn({4096, 512}).matmul(torch::randn({512, 512})) / std::sqrt(512));

  miniquant::GptqOptions options;
  options.column_order = miniquant::ColumnOrder::kActivation;
  const miniquant::GptqResult result = miniquant::gptq(weight, accumulator.hessian(), options);
  std::cout << "codes " << result.codes.sizes() << ", scales " << result.scales.sizes() << ", loss "
            << result.row_loss.sum().item<float>() << "\n";
}
