import torch

import miniquant

torch.manual_seed(0)
layer = torch.nn.Linear(512, 256, bias=False)
tokens = torch.randn(4096, 512) @ torch.randn(512, 512) / 512**0.5
accumulator = miniquant.HessianAccumulator(layer.in_features, halves=True)
accumulator.update(tokens)
quantized = miniquant.gptq_auto(layer.weight, accumulator, bits=4, group_size=64, **miniquant.preset("best"))

# PyTorch's own 4-bit product takes codes from 0 to 15 and computes (code - 8) * scale + zero.
packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(quantized.codes.int() + 8, 1)
scales = torch.stack([quantized.scales.t(), torch.zeros_like(quantized.scales.t())], dim=-1)
inputs = tokens[:16].bfloat16()
outputs = torch.ops.aten._weight_int4pack_mm_for_cpu(inputs, packed, 64, scales.bfloat16())

expected = inputs.float() @ miniquant.dequantize(quantized).t()
error = ((outputs.float() - expected).norm() / expected.norm()).item()
print(f"{packed.nbytes} bytes of codes; relative error of the outputs below 1%: {error < 0.01}")
