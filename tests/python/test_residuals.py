"""What layers' outputs are added to: found in every block, and exact."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import multipass
import small_models
from miniquant import HessianAccumulator
from miniquant.modules import Site, find_sites
from miniquant.walk import Walk

# By architecture: the layers of a block that write to a stream. Those of gemma3 go through a norm first, and from the
# first routed expert on, in block 0, no run goes beside.
WRITERS = {
    "llama": {"self_attn.o_proj", "mlp.down_proj"},
    "qwen2": {"self_attn.o_proj", "mlp.down_proj"},
    "qwen3": {"self_attn.o_proj", "mlp.down_proj"},
    "qwen3-moe": {"self_attn.o_proj"},
    "gemma3": set(),
    "phi3": {"self_attn.o_proj", "mlp.down_proj"},
    "gpt2": {"attn.c_proj", "mlp.c_proj"},
    "opt": {"self_attn.out_proj", "fc2"},
    "bert": {"attention.output.dense", "output.dense"},
    "t5": {"layer.0.SelfAttention.o", "layer.1.DenseReluDense.wo"},  # the decoder's blocks are of the encoder's class
    "mamba": {"mixer.out_proj"},
}


def in_block(site: Site) -> tuple[int, str]:
    """The number of a site's block, and its name there."""
    parts = site.name.split(".")
    number = next(place for place, part in enumerate(parts) if part.isdigit())
    return int(parts[number]), ".".join(parts[number + 1 :])


@pytest.mark.parametrize("kind", WRITERS)
def test_layers_that_write_to_a_stream_are_found(kind: str) -> None:
    build, batches = small_models.MODELS[kind]
    model = build()
    found: set[tuple[int, str]] = set()
    sites = find_sites(model).sites
    with Walk(model, batches(), sites, beside=True, streams=sites) as walk:
        for visit in walk:
            known = {given.stream is not None for given in visit.inputs}
            assert known == {given.original_stream is not None for given in visit.inputs}
            assert len(known) == 1
            if known == {True}:
                found.add(in_block(visit.site))
    blocks = (0,) if kind == "qwen3-moe" else (0, 1)
    assert found == {(block, name) for block in blocks for name in WRITERS[kind]}


class Stream(nn.Module):
    """Blocks h + second(tanh(first(norm(h))))."""

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.LayerNorm(16)
            self.first = nn.Linear(16, 24)
            self.second = nn.Linear(24, 16)

        def forward(self, h: Tensor) -> Tensor:
            return h + self.second(torch.tanh(self.first(self.norm(h))))  # type: ignore[no-any-return]

    def __init__(self, blocks: int = 4) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.blocks = nn.ModuleList(Stream.Block() for _ in range(blocks))

    def forward(self, h: Tensor) -> Tensor:
        for block in self.blocks:
            h = block(h)
        return h


def stream_batches() -> list[Tensor]:
    return [torch.randn(2, 7, 16, generator=torch.Generator().manual_seed(seed)) for seed in range(3)]


def test_streams_are_those_of_the_quantized_and_of_the_float_model() -> None:
    model, original = Stream().eval(), Stream().eval()
    expected: list[list[Tensor]] = []
    for batch in stream_batches():
        h, before = batch, []
        for block in original.blocks:
            before.append(h)
            h = block(h).detach()
        expected.append(before)
    seen = 0
    sites = find_sites(model).sites
    with Walk(model, stream_batches(), sites, beside=True, streams=sites) as walk:
        for visit in walk:
            number, name = in_block(visit.site)
            accumulator = HessianAccumulator(visit.site.columns, halves=True)
            for given in visit.inputs:
                accumulator.update(given.tokens())
                if name == "first":
                    assert given.stream is None
                    assert given.original_stream is None
                    continue
                h = stream_batches()[given.batch]
                with torch.no_grad():
                    for block in model.blocks[:number]:
                        h = block(h)
                assert torch.equal(given.stream, h)  # type: ignore[arg-type]
                assert torch.equal(given.original_stream, expected[given.batch][number])  # type: ignore[arg-type]
                assert torch.equal(given.stream, given.original_stream) == (number == 0)  # type: ignore[arg-type]
                seen += 1
            visit.site.write(multipass.quantized(visit.site.read(), accumulator.hessian()))
    assert seen == 4 * 3


def test_a_layer_that_gives_nothing_is_not_taken_for_one_that_writes_to_a_stream() -> None:
    """Where its output is 0, whatever is given twice is a sum with it."""
    model: Any = Stream().eval()
    with torch.no_grad():
        for block in model.blocks:
            block.first.weight.zero_()
            block.first.bias.zero_()
            block.second.weight.zero_()
            block.second.bias.zero_()
    sites = find_sites(model).sites
    with Walk(model, stream_batches(), sites, beside=True, streams=sites) as walk:
        assert all(given.stream is None for visit in walk for given in visit.inputs)


def test_nothing_is_kept_when_a_block_is_left() -> None:
    model = Stream(blocks=3).eval()
    sites = find_sites(model).sites
    with Walk(model, stream_batches(), sites, beside=True, streams=sites) as walk:
        for visit in walk:
            for run in (*walk._runs, *walk._twins.values()):
                held = run.streams.before
                assert len(held) <= 1
                assert all(tensor.shape == (2, 7, 16) for tensor in held.values())
            del visit
    for module in model.modules():
        assert not module._forward_pre_hooks
        assert not module._forward_hooks


def test_streams_need_a_second_run() -> None:
    model = Stream()
    sites = find_sites(model).sites
    with pytest.raises(ValueError, match="streams to be looked for only with a second run beside"):
        Walk(model, stream_batches(), sites, streams=sites)
    with pytest.raises(ValueError, match="streams to be some of the sites"):
        Walk(model, stream_batches(), sites[1:], beside=True, streams=sites)
