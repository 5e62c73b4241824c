"""The presets: their names, their options and their gains."""

from __future__ import annotations

from typing import get_args

import pytest
import torch

import miniquant
from miniquant.presets import Preset


def test_each_preset_has_a_lower_loss_than_the_one_before() -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(64, 256, generator=generator)
    inputs = torch.randn(512, 256, generator=generator).cumsum(1) / 8 + torch.randn(512, 256, generator=generator)
    hessian = inputs.T @ inputs / len(inputs)
    names: tuple[Preset, ...] = ("plain", "fast", "best")
    losses = [float(miniquant.gptq(weight, hessian, **miniquant.preset(name)).row_loss.sum()) for name in names]
    assert losses[1] < 0.9 * losses[0]
    assert losses[2] < 0.95 * losses[1]


def test_a_preset_is_a_copy() -> None:
    miniquant.preset("best")["refine"] = 7
    assert miniquant.preset("best")["refine"] != 7


def test_another_name_is_refused() -> None:
    with pytest.raises(ValueError, match="preset: expected name to be one of plain, fast, best, but got 'good'"):
        miniquant.preset("good")  # type: ignore[arg-type]


@pytest.mark.parametrize("name", get_args(Preset))
def test_presets_of_an_asymmetric_grid_work(name: Preset) -> None:
    generator = torch.Generator().manual_seed(0)
    weight, inputs = torch.rand(16, 128, generator=generator), torch.randn(300, 128, generator=generator).cumsum(1)
    hessian = inputs.T @ inputs / len(inputs)
    result = miniquant.gptq(weight, hessian, **miniquant.preset(name, symmetric=False))
    assert not result.symmetric
    assert result.zero_points.any(), "weights of one sign, so zero points that are not 0"
    symmetric = miniquant.gptq(weight, hessian, **miniquant.preset(name))
    assert result.row_loss.sum() < 0.5 * symmetric.row_loss.sum()


def test_a_preset_of_the_other_grid_is_refused_with_the_remedy() -> None:
    with pytest.raises(ValueError, match=r'gptq: expected full_range to be False .* preset\("best", symmetric=False\)'):
        miniquant.gptq(torch.ones(2, 4), torch.eye(4), symmetric=False, **miniquant.preset("best"))
