"""Optimizations of gptq do not change its results: float32 throughout, threads, little memory."""

from __future__ import annotations

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Literal

import pytest
import torch

import miniquant
import oracle

if TYPE_CHECKING:
    from torch import Tensor

# The share by which the loss of a float32 problem may differ from that of the same problem in float64.
LOSS_SHARE = 1e-3


def assert_loss_is_that_of_float64(weight: Tensor, hessian: Tensor, ridge: float) -> None:
    exact = miniquant.gptq(weight.double(), hessian.double(), ridge=ridge)
    result = miniquant.gptq(weight, hessian, ridge=ridge)
    values = torch.from_numpy(oracle.dequantize(result.codes, result.scales, result.zero_points, 64))
    error = (weight.double() - values).numpy()
    loss = oracle.quadratic_form(error, oracle.damp(hessian, ridge).numpy()).sum()
    assert loss == pytest.approx(float(exact.row_loss.sum()), rel=LOSS_SHARE)
    assert float(result.row_loss.double().sum()) == pytest.approx(loss, rel=1e-4)


@pytest.mark.parametrize("ridge", [1e-1, 1e-2, 1e-3, 1e-4, 1e-5])
@pytest.mark.parametrize("distribution", ["normal", "cauchy"])
def test_float32_loses_nothing_on_the_lab(distribution: Literal["normal", "cauchy"], ridge: float) -> None:
    problem = oracle.lab(distribution)
    assert_loss_is_that_of_float64(problem.weight, problem.hessian, ridge)


@pytest.mark.parametrize("condition", [1e2, 1e4, 1e5, 1e6, 1e7])
def test_float32_loses_nothing_on_ill_conditioned_hessians(condition: float) -> None:
    """If a float32 factorization loses digits that the loss needs, gptq factors in float64."""
    columns = 512
    generator = torch.Generator().manual_seed(3)
    weight = torch.randn(256, columns, generator=generator) * 0.02
    vectors = torch.linalg.qr(torch.randn(columns, columns, generator=generator).double()).Q
    values = torch.logspace(0, -float(torch.log10(torch.tensor(condition))), columns, dtype=torch.float64)
    hessian = ((vectors * values) @ vectors.T).float()
    hessian = (hessian + hessian.T) / 2
    assert float(torch.linalg.cond(hessian.double())) == pytest.approx(condition, rel=0.2)
    assert_loss_is_that_of_float64(weight, hessian, ridge=0.0)


def test_float32_loses_nothing_where_channels_differ_a_thousandfold() -> None:
    columns = 512
    generator = torch.Generator().manual_seed(4)
    weight = torch.randn(256, columns, generator=generator) * 0.02
    energy = torch.logspace(0, -3, columns)[torch.randperm(columns, generator=generator)]
    inputs = torch.randn(2000, columns, generator=generator) * energy
    hessian = inputs.T @ inputs / 2000
    for ridge in (1e-2, 1e-6):
        assert_loss_is_that_of_float64(weight, (hessian + hessian.T) / 2, ridge)


def test_calls_from_several_threads_at_once_give_the_same_bits() -> None:
    problem = oracle.lab("normal")
    expected = miniquant.gptq(problem.weight, problem.hessian)
    hessian = torch.zeros(768, 768)
    inputs = torch.randn(500, 768, generator=torch.Generator().manual_seed(5))
    miniquant.hessian_update_(hessian, inputs)

    def call(_: int) -> tuple[miniquant.GptqResult, Tensor]:
        own = torch.zeros(768, 768)
        miniquant.hessian_update_(own, inputs)
        return miniquant.gptq(problem.weight, problem.hessian), own

    with ThreadPoolExecutor(4) as pool:
        for result, own in pool.map(call, range(12)):
            for got, want in zip(result, expected, strict=True):
                assert torch.equal(got, want)
            assert torch.equal(own, hessian)


MEMORY = """
import torch, miniquant
def high_water():
    with open("/proc/self/status") as status:
        return {line.split(":")[0]: int(line.split()[1]) for line in status if line.startswith(("VmHWM", "VmRSS"))}
torch.set_num_threads(2)
N, K = %d, %d
weight = torch.randn(N, K)
hessian = torch.eye(K) + 0.001
miniquant.gptq(weight[:64, :64], hessian[:64, :64], **%r)
before = high_water()["VmRSS"]
with open("/proc/self/clear_refs", "w") as clear:
    clear.write("5")
result = miniquant.gptq(weight, hessian, **%r)
results = sum(part.numel() * part.element_size() for part in result)
print((high_water()["VmHWM"] - before) * 1024 - results)
"""


@pytest.mark.parametrize("rows", [1024, 3072])
@pytest.mark.parametrize("options", [{}, {"column_order": "activation"}, {"group_scales": "dynamic"}])
def test_extra_memory_is_at_most_a_hessian_and_a_quarter_of_the_weight(rows: int, options: dict[str, str]) -> None:
    """The memory beyond the weight, the Hessian and the results, as the high-water mark of a process of its own."""
    columns = 3072
    script = MEMORY % (rows, columns, options, options)
    output = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True).stdout
    extra = int(output) / 4
    assert extra <= columns**2 + 0.25 * rows * columns
    # The triangle alone takes half of a Hessian: a smaller figure would mean that nothing was measured.
    assert extra >= 0.4 * columns**2
