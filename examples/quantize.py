import torch

import miniquant

torch.manual_seed(0)
weight = torch.randn(256, 512) * 0.02
inputs = torch.randn(4096, 512) @ torch.randn(512, 512) / 512**0.5  # tokens of a layer with correlated inputs

accumulator = miniquant.HessianAccumulator(512)
accumulator.update(inputs)
hessian = accumulator.hessian()

nearest = torch.ops.miniquant.rtn(weight, bits=4, group_size=64)
gptq = torch.ops.miniquant.gptq(weight, hessian, bits=4, group_size=64)
for name, (codes, scales, zero_points, *_) in {"RTN": nearest, "GPTQ": gptq}.items():
    dequantized = miniquant.dequantize(codes, scales, zero_points, group_size=64)
    loss = miniquant.quantization_loss(weight, dequantized, hessian).sum()
    print(f"{name:4}  loss {loss:.4f}  {tuple(miniquant.pack_int4(codes).shape)} bytes")
