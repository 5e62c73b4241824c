"""Quantizes layers with two other GPTQ libraries; benchmarks.quality scores the results beside miniquant's.

Runs in the peers' own environment, without miniquant. For each FOLDER/<layer>.safetensors with

    weight   [N, K]
    hessian  [K, K]    X X^T / n without a ridge

it writes FOLDER/<layer>.peers: a safetensors file with the dequantized weight [N, K] of every variant, under the
variant's name. A variant is a peer with activation order and one of its scale searches, with the same ridge as
miniquant. Prints the peers' versions as JSON.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from compressed_tensors.quantization import QuantizationArgs
from llmcompressor.modifiers.gptq.gptq_quantize import quantize_weight
from llmcompressor.observers import Observer
from neural_compressor.torch.algorithms.weight_only.gptq import GPTQ
from safetensors.torch import load_file, save_file
from tqdm import tqdm

if TYPE_CHECKING:
    from collections.abc import Callable

BLOCK_SIZE = 128
PEERS = ("llmcompressor", "neural-compressor-pt")


def llm_compressor(
    weight: torch.Tensor, hessian: torch.Tensor, grid: argparse.Namespace, observer: str
) -> torch.Tensor:
    """Scales from one of the library's observers of the original weight, columns by descending diag(H)."""
    arguments = QuantizationArgs(
        num_bits=grid.bits,
        symmetric=not grid.asymmetric,
        strategy="group",
        group_size=grid.group_size,
        actorder="weight",
        observer=observer,
    )
    watcher: Any = Observer.load_from_registry(observer, base_name="weight", args=arguments)
    if observer == "imatrix_mse":
        # Its hook collects these while a model runs: the sum of x^2 of every input, and the number of tokens.
        watcher._imatrix_sum = hessian.diagonal().clone()  # noqa: SLF001
        watcher._imatrix_count = torch.tensor(1)  # noqa: SLF001
    parameters = watcher(weight).get_qparams()
    quantized, _, used_rtn = quantize_weight(
        weights=weight.clone()[None],
        hessians=hessian.clone()[None],
        scale=parameters["scale"][None],
        zero_point=parameters["zero_point"][None],
        global_scale=None,
        quant_args=arguments,
        blocksize=BLOCK_SIZE,
        percdamp=grid.ridge,
    )
    if bool(torch.as_tensor(used_rtn).any()):
        raise RuntimeError("llm-compressor fell back to rounding to nearest")
    result: torch.Tensor = quantized[0]
    return result


def neural_compressor(
    weight: torch.Tensor, hessian: torch.Tensor, grid: argparse.Namespace, *, mse: bool, **order: bool
) -> torch.Tensor:
    """One of the library's column orders, with or without its scale search."""
    layer = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    solver: Any = GPTQ(layer, weight.clone(), device="cpu")
    solver.quantizer.configure(
        {
            "dtype": "int",
            "bits": grid.bits,
            "group_size": grid.group_size,
            "sym": not grid.asymmetric,
            "perchannel": True,
            "mse": mse,
            "use_double_quant": False,
            "double_quant_dtype": "int",
            "double_quant_bits": 4,
            "double_quant_group_size": 128,
            "double_quant_sym": False,
        }
    )
    solver.H = hessian.clone()
    result: torch.Tensor = solver.fasterquant(
        weight.clone(), blocksize=BLOCK_SIZE, percdamp=grid.ridge, groupsize=grid.group_size, **order
    )[-1]
    return result


def variants(grid: argparse.Namespace) -> dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]]:
    """What to run, by name."""
    chosen: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {}
    for observer in ("memoryless_minmax", "memoryless_mse", "imatrix_mse"):
        chosen[f"llm-compressor, actorder=weight, observer={observer}"] = lambda weight, hessian, observer=observer: (  # type: ignore[misc]
            llm_compressor(weight, hessian, grid, observer)
        )
    orders = {
        # These groups are not made of columns as stored, so the format needs a group index for every column.
        "act_order, groups of ordered columns": {"act_order": True},
        "act_order, static_groups": {"act_order": True, "static_groups": True},
    }
    for name, order in orders.items():
        for mse in (False, True):
            chosen[f"neural-compressor, {name}{', mse' * mse}"] = lambda weight, hessian, order=order, mse=mse: (  # type: ignore[misc]
                neural_compressor(weight, hessian, grid, mse=mse, **order)
            )
    return chosen


def main() -> None:
    """Quantizes every layer of the folder."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--bits", type=int, required=True)
    parser.add_argument("--group-size", type=int, required=True)
    parser.add_argument("--ridge", type=float, required=True)
    parser.add_argument("--asymmetric", action="store_true")
    grid = parser.parse_args()
    logging.disable(logging.INFO)
    with torch.no_grad():
        for path in tqdm(sorted(grid.folder.glob("*.safetensors")), unit="layer", disable=None, leave=False):
            tensors = load_file(path)
            weights = {
                name: quantize(tensors["weight"], tensors["hessian"]).contiguous()
                for name, quantize in variants(grid).items()
            }
            save_file(weights, path.with_suffix(".peers"))
    print(json.dumps({name: importlib.metadata.version(name) for name in PEERS}))


if __name__ == "__main__":
    main()
