"""Times the path from inputs to codes beside the matrix product of the same machine.

For a weight [N, K] and T tokens the work that cannot be avoided is

    Hessian    T K^2            multiplications and additions, H being symmetric
    gptq       N K^2 + K^3 / 3  the sweep and one Cholesky factorization

and the "limit" is the time that torch.mm, at the same sizes and in the same run, would need for as many. Ratios to it
can be compared between machines; milliseconds cannot.
"""

import argparse
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch.utils.benchmark import Timer
from tqdm import tqdm

import miniquant


class Layer(NamedTuple):
    """The sizes of a problem."""

    rows: int
    columns: int
    tokens: int
    group_size: int


def seconds(run: Callable[[], object], least_seconds: float) -> float:
    """The shortest of the runs that fit into `least_seconds`, after one that is not counted; on torch's threads."""
    timer = Timer("run()", globals={"run": run}, num_threads=torch.get_num_threads())
    return min(timer.blocked_autorange(min_run_time=least_seconds).times)


def correlated_inputs(tokens: int, columns: int) -> torch.Tensor:
    """[tokens, columns]: correlated inputs of uneven channel energy."""
    generator = torch.Generator().manual_seed(0)
    mix = torch.randn(columns, columns, generator=generator) / columns**0.5 + torch.eye(columns)
    energy = torch.exp(torch.randn(columns, generator=generator) * 0.7)
    inputs: torch.Tensor = (torch.randn(tokens, columns, generator=generator) * energy) @ mix
    return inputs


def measure(layer: Layer, least_seconds: float) -> list[str]:
    """The lines of the table for one layer."""
    weight = torch.randn(layer.rows, layer.columns, generator=torch.Generator().manual_seed(1)) * 0.02
    inputs = correlated_inputs(layer.tokens, layer.columns)
    hessian = torch.zeros(layer.columns, layer.columns)
    flops = layer.columns**2

    product = seconds(lambda: torch.mm(inputs.T, inputs), least_seconds) / (2 * layer.tokens * flops)
    limit = product * layer.tokens * flops
    lines = [line(layer, "Hessian", seconds(lambda: miniquant.hessian_update_(hessian, inputs), least_seconds), limit)]

    hessian = inputs.T @ inputs / layer.tokens
    product = seconds(lambda: torch.mm(weight, hessian), least_seconds) / (2 * layer.rows * flops)
    limit = product * (layer.rows * flops + layer.columns**3 / 3)
    options: dict[str, dict[str, str | bool]] = {
        "gptq": {},
        "gptq, activation order": {"column_order": "activation"},
        "gptq, dynamic scales": {"group_scales": "dynamic"},
        "gptq, asymmetric": {"symmetric": False},
    }
    for name, option in options.items():

        def run(option: dict[str, str | bool] = option) -> object:
            return torch.ops.miniquant.gptq(weight, hessian, group_size=layer.group_size, **option)

        lines.append(line(layer, name, seconds(run, least_seconds), limit))
    return lines


def line(layer: Layer, work: str, taken: float, limit: float) -> str:
    """One line of the table."""
    shape = f"{layer.rows} x {layer.columns}, {layer.tokens}, {layer.group_size}"
    return f"{shape:<24}{work:<24}{limit * 1e3:>10.2f}{taken * 1e3:>10.2f}{taken / limit:>10.2f}"


def layer_argument(text: str) -> Layer:
    """N,K,T,group."""
    sizes = [int(part) for part in text.split(",")]
    if len(sizes) != len(Layer._fields) or min(sizes[:3]) < 1:
        raise argparse.ArgumentTypeError(f"expected N,K,T,GROUP, but got {text}")
    return Layer(*sizes)


def main() -> None:
    """Measures and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "layers",
        nargs="*",
        type=layer_argument,
        metavar="N,K,T,GROUP",
        help="default: 768,768,1536,64 2048,2048,4096,128",
    )
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="default: %(default)s")
    parser.add_argument("--seconds", type=float, default=1.0, help="least time for each figure; default: %(default)s")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    layers = arguments.layers or [Layer(768, 768, 1536, 64), Layer(2048, 2048, 4096, 128)]

    lines = []
    for layer in tqdm(layers, unit="layer", disable=None, leave=False):
        lines += measure(layer, arguments.seconds)
    print(f"float32, {arguments.threads} threads")
    print(f"{'N x K, tokens, group':<24}{'work':<24}{'limit ms':>10}{'ms':>10}{'/ limit':>10}")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
