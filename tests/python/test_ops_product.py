"""product_update_: X^T Y of two batches of the same tokens, in place."""

from __future__ import annotations

import threading

import pytest
import torch

import miniquant


def drawn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


@pytest.mark.parametrize("inputs_dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_adds_the_products(dtype: torch.dtype, inputs_dtype: torch.dtype) -> None:
    left, right = drawn(2, 300, 7, dtype=inputs_dtype), drawn(2, 300, 50, seed=1)
    total = drawn(7, 50, seed=2, dtype=dtype)
    x, y = (factor.to(dtype).double().flatten(0, -2) for factor in (left, right))
    expected, magnitude = total.double() + x.mT @ y, total.double().abs() + x.abs().mT @ y.abs()
    assert miniquant.product_update_(total, left, right) is total
    assert bool(((total.double() - expected).abs() <= 602 * torch.finfo(dtype).eps * magnitude).all())


def test_factors_may_share_memory_with_the_sum() -> None:
    total = drawn(8, 8, dtype=torch.float64)
    expected = total + total.T @ total
    miniquant.product_update_(total, total, total)
    torch.testing.assert_close(total, expected, rtol=1e-14, atol=1e-14)


def test_large_values_are_summed_while_they_stay_finite() -> None:
    total = torch.zeros(1, 1)
    miniquant.product_update_(total, torch.full((1, 1), 1e19), torch.full((1, 1), 2.9e19))
    assert total.item() == pytest.approx(2.9e38)
    with pytest.raises(ValueError, match="whose products keep sum finite"):
        miniquant.product_update_(total, torch.full((1, 1), 1e19), torch.full((1, 1), 2.9e19))
    assert total.item() == pytest.approx(2.9e38)


def test_threads_may_share_a_sum() -> None:
    total = torch.zeros(40, 30, dtype=torch.float64)
    left, right = drawn(64, 40).round(), drawn(64, 30, seed=1).round()
    threads = [threading.Thread(target=miniquant.product_update_, args=(total, left, right)) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert torch.equal(total, 8 * left.double().T @ right.double())


def test_a_change_is_seen_by_autograd_and_inference_tensors_are_refused() -> None:
    total = torch.zeros(2, 3)
    version = total._version
    miniquant.product_update_(total, torch.ones(1, 2), torch.ones(1, 3))
    assert total._version > version
    with torch.inference_mode():
        inference = torch.zeros(2, 3)
    with pytest.raises(ValueError, match="expected sum to be a normal tensor outside inference mode"):
        miniquant.product_update_(inference, torch.ones(1, 2), torch.ones(1, 3))
