"""What the checkpoint formats share: grids of layers, patterns of names, formats by name, words of 32 bits."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch

from format_layers import KINDS, random_layer
from miniquant.formats import FORMATS, LayerGrid, format_named, format_of, with_scale_dtype
from miniquant.formats.names import name_patterns
from miniquant.packing import pack_words, unpack_words

GRID = {
    "rows": 64,
    "columns": 96,
    "bits": 4,
    "group_size": 32,
    "symmetric": True,
    "full_range": False,
    "scale_dtype": torch.float16,
}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rows": 0}, "rows to be positive, but got 0"),
        ({"columns": -3}, "columns to be positive, but got -3"),
        ({"columns": 4.0}, "columns to be positive, but got 4.0"),
        ({"bits": 1}, "bits to be 2 to 8, but got 1"),
        ({"bits": 9}, "bits to be 2 to 8, but got 9"),
        ({"bits": True}, "bits to be 2 to 8, but got True"),
        ({"bits": "4"}, "bits to be 2 to 8, but got '4'"),
        ({"group_size": 0}, "group_size to be positive, or -1 for one group per row, but got 0"),
        ({"group_size": None}, "group_size to be positive, or -1 for one group per row, but got None"),
        ({"symmetric": 1}, "symmetric to be True or False, but got 1"),
        ({"symmetric": False, "full_range": True}, "full_range to be False where symmetric is False, but got True"),
        (
            {"scale_dtype": torch.int8},
            "scale_dtype to be float32 or float64 or bfloat16 or float16, but got torch.int8",
        ),
    ],
    ids=lambda value: str(value)[:40],
)
def test_grids_that_there_are_not(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError) as caught:  # noqa: PT011  (the message is compared below)
        LayerGrid(**{**GRID, **changes})
    assert str(caught.value) == f"LayerGrid: expected {message}"


@pytest.mark.parametrize(("group_size", "groups"), [(32, 3), (64, 2), (96, 1), (-1, 1), (1, 96)])
def test_groups_of_a_grid(group_size: int, groups: int) -> None:
    assert LayerGrid(**{**GRID, "group_size": group_size}).groups == groups  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", KINDS)
def test_grid_of_a_weight(kind: str) -> None:
    quantized = random_layer(8, 40, bits=3, group_size=16, kind=kind, dtype=torch.bfloat16)
    symmetric = kind != "asymmetric"
    assert LayerGrid.of(quantized) == LayerGrid(8, 40, 3, 16, symmetric, kind == "full range", torch.bfloat16)


def test_formats_by_name() -> None:
    for name in FORMATS:
        assert format_named(name).name == name
    with pytest.raises(ValueError, match=r"format_named: expected name to be one of .*gptq.*, but got 'awq'"):
        format_named("awq")


@pytest.mark.parametrize("name", FORMATS)
def test_a_configuration_says_its_format(name: str) -> None:
    layers = {"fc": LayerGrid(**GRID)}  # type: ignore[arg-type]
    assert format_of(format_named(name).config(layers)).name == name


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (None, "expected quantization_config to be an object, but got None"),
        ([], "expected quantization_config to be an object, but got []"),
        ({}, "expected quant_method of quantization_config to be one of"),
        ({"quant_method": "awq"}, "but got 'awq'"),
        ({"quant_method": ["gptq"]}, "but got ['gptq']"),
        ({"quant_method": "gptq", "checkpoint_format": "marlin"}, "expected checkpoint_format"),
    ],
)
def test_configurations_of_no_format(config: object, message: str) -> None:
    with pytest.raises(ValueError, match=r"^format_of: ") as caught:
        format_of(config)
    assert message in str(caught.value)


NAMES = [
    (["lm_head"], [], ["^lm_head$"]),
    (["h.0.fc"], ["h.1.fc"], [r"^h\.0\.fc$"]),
    (["h.0.fc", "h.1.fc", "h.10.fc"], ["h.0.proj"], [r"^h\.\d+\.fc$"]),
    (["h.0.fc", "h.1.fc", "h.10.fc"], ["h.2.fc"], [r"^h\.(?:0|1|10)\.fc$"]),
    (["h.0.e.1.up", "h.0.e.2.up", "h.3.e.1.up", "h.3.e.2.up"], ["h.1.e.1.up"], [r"^h\.(?:0|3)\.e\.(?:1|2)\.up$"]),
    (["h.0.e.1.up", "h.0.e.2.up", "h.3.e.1.up"], ["h.3.e.2.up"], [r"^h\.0\.e\.(?:1|2)\.up$", r"^h\.3\.e\.1\.up$"]),
    (["h.0", "h.1"], ["h.2"], [r"^h\.(?:0|1)$"]),
    (["0.fc", "1.fc"], [], [r"^\d+\.fc$"]),
    (["w1.fc", "w2.fc"], ["w3.fc"], [r"^w1\.fc$", r"^w2\.fc$"]),
    (["a+b.0", "a+b.1"], ["aab.0"], [r"^a\+b\.\d+$"]),
    ([], ["x"], []),
]


@pytest.mark.parametrize(("wanted", "others", "expressions"), NAMES)
def test_patterns_of_names(wanted: list[str], others: list[str], expressions: list[str]) -> None:
    patterns = name_patterns(wanted, others)
    assert [pattern.expression for pattern in patterns] == expressions
    assert sorted(name for pattern in patterns for name in pattern.names) == sorted(wanted)


@pytest.mark.parametrize("seed", range(20))
def test_patterns_match_what_they_should_and_nothing_else(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    names = [f"m.{block}.e.{expert}.{part}" for block in range(6) for expert in range(5) for part in ("up", "down")]
    chosen = (torch.rand(len(names), generator=generator) < 0.5).tolist()
    wanted = [name for name, yes in zip(names, chosen, strict=True) if yes]
    others = [name for name, yes in zip(names, chosen, strict=True) if not yes]
    patterns = name_patterns(wanted, others)
    for pattern in patterns:
        matched = [name for name in names if re.match(pattern.expression, name)]
        assert sorted(matched) == sorted(pattern.names)
    assert sorted(name for pattern in patterns for name in pattern.names) == sorted(wanted)


@pytest.mark.parametrize("columns", [1, 7, 32, 50])
@pytest.mark.parametrize("bits", range(2, 9))
def test_words_hold_bit_after_bit(bits: int, columns: int) -> None:
    codes = random_layer(3, columns, bits=bits, kind="full range").codes
    words = pack_words(codes, bits)
    assert (words.dtype, tuple(words.shape)) == (torch.int32, (3, -(-columns * bits // 32)))
    for row in range(3):
        stream = sum((int(code) + 2 ** (bits - 1)) << (bits * k) for k, code in enumerate(codes[row]))
        stored = sum((int(word) % 2**32) << (32 * i) for i, word in enumerate(words[row]))
        assert stored == stream
    assert torch.equal(unpack_words(words, bits, columns), codes)


def test_scales_go_to_another_dtype_only_as_they_are() -> None:
    half = random_layer(4, 64, dtype=torch.bfloat16)
    full = with_scale_dtype("fc", half, torch.float32)
    assert full.scales.dtype == torch.float32
    assert torch.equal(full.scales, half.scales.float())
    assert torch.equal(full.codes, half.codes)
    assert torch.equal(with_scale_dtype("fc", full, torch.bfloat16).scales, half.scales)
    third = random_layer(4, 64, dtype=torch.float32)
    third.scales.fill_(1 / 3)
    with pytest.raises(ValueError, match=r"expected scales of layer 'fc' that float16 holds exactly, but got 0\.3333"):
        with_scale_dtype("fc", third, torch.float16)
    third.scales.fill_(1e9)
    with pytest.raises(ValueError, match=r"expected scales of layer 'fc' that float16 holds exactly, but got 10000000"):
        with_scale_dtype("fc", third, torch.float16)
