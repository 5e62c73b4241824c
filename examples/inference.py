import torch

import miniquant

torch.manual_seed(0)
layer = torch.nn.Linear(512, 256)
tokens = torch.randn(4096, 512) @ torch.randn(512, 512) / 512**0.5
accumulator = miniquant.HessianAccumulator(layer.in_features, halves=True)
accumulator.update(tokens)
quantized = miniquant.gptq_auto(layer.weight, accumulator, bits=4, group_size=64, **miniquant.preset("best"))

fast = miniquant.QuantizedLinear.from_quantized(quantized, layer.bias)
inputs = tokens[:16].bfloat16()
expected = torch.nn.functional.linear(inputs.float(), miniquant.dequantize(quantized), layer.bias)
error = ((fast(inputs).float() - expected).norm() / expected.norm()).item()
print(f"{fast.codes.nbytes} bytes of codes; relative error of the outputs below 1%: {error < 0.01}")
