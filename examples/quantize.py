import torch

import miniquant

torch.manual_seed(0)
layer = torch.nn.Linear(512, 256)
inputs = torch.randn(4096, 512) @ torch.randn(512, 512) / 512**0.5  # what enters the layer: 4096 tokens

accumulator = miniquant.HessianAccumulator(layer.in_features, halves=True)
accumulator.update(inputs)  # again for every batch
hessian = accumulator.hessian()

nearest = miniquant.rtn(layer.weight, bits=4, group_size=64)
plain = miniquant.gptq(layer.weight, hessian, bits=4, group_size=64)
best = miniquant.gptq_auto(layer.weight, accumulator, bits=4, group_size=64, **miniquant.preset("best"))
for name, quantized in {"round to nearest": nearest, "plain GPTQ": plain, "gptq_auto, best": best}.items():
    loss = miniquant.quantization_loss(layer.weight, quantized, hessian).sum()
    print(f"{name:16}  loss {loss:.4f}")
print(f"ridge {best.ridge:.2g}, {miniquant.pack(best).nbytes} bytes of codes")

layer.weight.data = miniquant.dequantize(best)  # the layer now computes with the quantized weight
