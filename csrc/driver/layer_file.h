#pragma once

#include <miniquant/options.h>

#include <string>

namespace miniquant::driver {

/// The bytes of a safetensors file with a quantized layer; miniquant.load_layer() reads it in Python:
///
///     codes I8 [N, K], scales [N, G], zero_points I8 [N, G], row_loss [N]
///     __metadata__: format "miniquant.layer", version "1", bits, group_size, symmetric, full_range,
///                   options (a JSON object with all options of gptq, including the ridge used), layer
///
/// `layer`: the name of the weight; may be empty.
[[nodiscard]] std::string layer_file(const GptqResult& quantized, const GptqOptions& options, const std::string& layer);

}  // namespace miniquant::driver
