#include "driver/layer_file.h"

#include <miniquant/names.h>

#include <nlohmann/json.hpp>

#include "driver/safetensors.h"

namespace miniquant::driver {
namespace {

constexpr const char* kVersion = "1";

const char* text_of(bool value) { return value ? "true" : "false"; }

std::string options_text(const GptqOptions& options) {
  const nlohmann::ordered_json document = {{"bits", options.bits},
                                           {"group_size", options.group_size},
                                           {"symmetric", options.symmetric},
                                           {"ridge", options.ridge},
                                           {"block_size", options.block_size},
                                           {"group_scales", name_of(options.group_scales)},
                                           {"column_order", name_of(options.column_order)},
                                           {"scale_method", name_of(options.scale_method)},
                                           {"full_range", options.full_range},
                                           {"refine", options.refine},
                                           {"beam_scales", options.beam_scales}};
  return document.dump();
}

}  // namespace

std::string layer_file(const GptqResult& quantized, const GptqOptions& options, const std::string& layer) {
  return safetensors_text({{"codes", quantized.codes},
                           {"scales", quantized.scales},
                           {"zero_points", quantized.zero_points},
                           {"row_loss", quantized.row_loss}},
                          {{"format", "miniquant.layer"},
                           {"version", kVersion},
                           {"bits", std::to_string(options.bits)},
                           {"group_size", std::to_string(options.group_size)},
                           {"symmetric", text_of(options.symmetric)},
                           {"full_range", text_of(options.full_range)},
                           {"options", options_text(options)},
                           {"layer", layer}});
}

}  // namespace miniquant::driver
