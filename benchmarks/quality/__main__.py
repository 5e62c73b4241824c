"""Measures what quantization costs the MiniLM encoder, layer by layer and end to end.

The layers are the Linear layers of the encoder's blocks, with their real inputs (experiments/minilm/layers.py). With
E = W - Q and H = X X^T / n:

    calibration loss    tr(E H E^T), H of the calibration tokens, with the ridge on its diagonal
    held-out loss       tr(E H E^T), H of the fresh tokens, without a ridge
    embedding           the mean of the last hidden states over a text's tokens, normalized to length 1

The figures are written to quality.json; report.py makes docs/quality.md and its plot from that file.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
import time
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from safetensors.torch import load_file, save_file
from tqdm import tqdm

import miniquant
from benchmarks.common.measuring import RESULTS, ROOT, correlated_inputs
from benchmarks.quality import report as quality_report
from experiments.minilm.layers import KINDS, Encoder, passages

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

    from torch import Tensor

    Losses = dict[str, list[float]]

BLOCKS = 6
GROUP_SIZE = 64
RIDGE = 0.01
RTN = "RTN"
PLAIN = "plain GPTQ"
BEST = "best"
BEST_ASYMMETRIC = "best, asymmetric"
BEST_AUTO = "best, ridge from the data"
# Arguments of miniquant.gptq, except for RTN, which is miniquant.rtn.
SCHEMES: dict[str, dict[str, Any]] = {
    RTN: {},
    PLAIN: miniquant.preset("plain"),
    "plain, full range": {"full_range": True},
    "activation order": {"column_order": "activation"},
    "fast": miniquant.preset("fast"),
    BEST: miniquant.preset("best"),
    BEST_ASYMMETRIC: {**miniquant.preset("best"), "full_range": False, "symmetric": False},
    BEST_AUTO: miniquant.preset("best"),
}
RIDGE_SCHEMES = (PLAIN, BEST)
PEERS_PYTHON = ROOT / "build" / "peers-venv" / "bin" / "python"
NO_PEERS = "no peers' environment at {}: the comparison with peers is left out; benchmarks/peers/setup makes it"


class Plan(NamedTuple):
    """How much is measured."""

    layers: tuple[str, ...]
    bits: tuple[int, ...]
    tokens: int
    few_tokens: int
    fresh_tokens: int
    ridge_tokens: tuple[int, ...]
    ridges: tuple[float, ...]
    texts: int
    timed_columns: int
    timed_rounds: int
    peer_grids: tuple[tuple[int, bool], ...]  # bits, symmetric


FULL = Plan(
    layers=tuple(f"encoder.layer.{block}.{kind}" for block in range(BLOCKS) for kind in KINDS),
    bits=(4, 3, 2),
    tokens=11_000,
    few_tokens=128,
    fresh_tokens=11_000,
    ridge_tokens=(32, 128, 512, 2048, 10_000),
    ridges=(0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0),
    texts=300,
    timed_columns=4096,
    timed_rounds=4,
    peer_grids=((4, True), (3, True), (2, True), (4, False)),
)
QUICK = FULL._replace(
    layers=("encoder.layer.0.attention.output.dense", "encoder.layer.0.intermediate.dense"),
    bits=(4, 2),
    tokens=1024,
    fresh_tokens=1024,
    ridge_tokens=(32, 512),
    ridges=(0.01, 0.1, 1.0),
    texts=8,
    timed_columns=512,
    timed_rounds=2,
    peer_grids=((4, True),),
)


class Prefixes:
    """Accumulators of a layer's first n tokens for several n, from one pass over the tokens.

    Args:
        columns: K.
        counts: the numbers of tokens.
    """

    def __init__(self, columns: int, counts: Iterable[int]) -> None:
        self.after: dict[int, miniquant.HessianAccumulator] = {}
        self._running = miniquant.HessianAccumulator(columns, halves=True)
        self._counts = sorted(set(counts))

    def update(self, rows: Tensor) -> None:
        """Adds the next tokens, [n, K]; tokens after the largest count are not used."""
        while rows.shape[0] > 0 and len(self.after) < len(self._counts):
            count = self._counts[len(self.after)]
            missing = count - self._running.tokens
            self._running.update(rows[:missing])
            rows = rows[missing:]
            if self._running.tokens == count:
                self.after[count] = copy.deepcopy(self._running)


class Layer(NamedTuple):
    """A Linear layer, and the Hessians of its inputs."""

    weight: Tensor  # [N, K]
    calibration: Mapping[int, miniquant.HessianAccumulator]  # by tokens
    fresh: Tensor  # [K, K]


def inputs_of(layer: str) -> str:
    """The layer whose inputs stand for those of the named one: query, key and value have the same."""
    return re.sub(r"\.self\.(key|value)$", ".self.query", layer)


def read_layers(encoder: Encoder, plan: Plan) -> tuple[dict[str, Layer], list[str]]:
    """The plan's layers, and texts that no layer was calibrated on."""
    sources = sorted({inputs_of(name) for name in plan.layers})

    def prefixes(*counts: int) -> dict[str, Prefixes]:
        return {name: Prefixes(encoder.linear(name).in_features, counts) for name in sources}

    used: set[str] = set()
    calibration = prefixes(plan.few_tokens, plan.tokens, *plan.ridge_tokens)
    encoder.read(
        passages(0, used),
        max(plan.tokens, *plan.ridge_tokens),
        "calibration",
        {name: prefix.update for name, prefix in calibration.items()},
    )
    # The fresh tokens come from these texts, too: neither is used for quantization.
    texts = list(islice(passages(1, set(used)), plan.texts))
    fresh = prefixes(plan.fresh_tokens)
    encoder.read(
        passages(1, used), plan.fresh_tokens, "fresh inputs", {name: prefix.update for name, prefix in fresh.items()}
    )
    layers = {
        name: Layer(
            encoder.linear(name).weight.detach(),
            calibration[inputs_of(name)].after,
            fresh[inputs_of(name)].after[plan.fresh_tokens].hessian(),
        )
        for name in plan.layers
    }
    return layers, texts


def quantized(scheme: str, weight: Tensor, hessian: Tensor, bits: int, ridge: float = RIDGE) -> Tensor:
    """The weight after quantization, [N, K]."""
    if scheme == RTN:
        nearest = miniquant.rtn(weight, bits=bits, group_size=GROUP_SIZE)
        return miniquant.dequantize(nearest)
    codes, scales, zero_points, _ = miniquant.gptq(
        weight, hessian, bits=bits, group_size=GROUP_SIZE, ridge=ridge, **SCHEMES[scheme]
    )
    return miniquant.dequantize(codes, scales, zero_points, GROUP_SIZE)


def loss(weight: Tensor, dequantized: Tensor, hessian: Tensor, ridge: float = 0.0) -> float:
    """tr(E H E^T), with the ridge relative to the mean of H's diagonal; six digits."""
    diagonal = hessian.diagonal()
    damped = hessian + ridge * diagonal.mean() * torch.eye(len(diagonal), dtype=hessian.dtype)
    return float(f"{miniquant.quantization_loss(weight, dequantized, damped).double().sum():.6g}")


def no_losses() -> Losses:
    """Empty lists for the calibration and held-out losses of the layers."""
    return {"calibration": [], "held_out": []}


def add_losses(losses: Losses, layer: Layer, hessian: Tensor, dequantized: Tensor) -> None:
    """Appends the calibration and held-out loss of one layer."""
    losses["calibration"].append(loss(layer.weight, dequantized, hessian, RIDGE))
    losses["held_out"].append(loss(layer.weight, dequantized, layer.fresh))


def measure_losses(layers: Mapping[str, Layer], tokens: int, all_bits: Iterable[int]) -> dict[str, dict[str, Losses]]:
    """The losses of all layers, in order, by bits and scheme."""
    result = {str(bits): {scheme: no_losses() for scheme in SCHEMES} for bits in all_bits}
    for layer in tqdm(layers.values(), desc=f"losses, {tokens} tokens", unit="layer", disable=None, leave=False):
        hessian = layer.calibration[tokens].hessian()
        for bits, schemes in result.items():
            for scheme, losses in schemes.items():
                ridge = ridge_of(scheme, layer.weight, layer.calibration[tokens], int(bits))
                add_losses(losses, layer, hessian, quantized(scheme, layer.weight, hessian, int(bits), ridge))
    return result


def ridge_of(scheme: str, weight: Tensor, accumulator: miniquant.HessianAccumulator, bits: int) -> float:
    """The ridge that a scheme is quantized with."""
    return chosen_ridge(weight, accumulator, bits) if scheme == BEST_AUTO else RIDGE


def chosen_ridge(weight: Tensor, accumulator: miniquant.HessianAccumulator, bits: int) -> float:
    """The ridge that the library chooses from the data."""
    return miniquant.choose_ridge(weight, accumulator, bits=bits, group_size=GROUP_SIZE).ridge


def measure_ridges(layers: Mapping[str, Layer], plan: Plan) -> dict[str, Any]:
    """The held-out losses of all layers, in order, at 4 bits: of RTN, and by scheme, tokens and ridge.

    The list under "chosen" is that of the ridges in "chosen_ridge", which the library chose from the data.
    """
    nearest: list[float] = []
    schemes: dict[str, dict[str, dict[str, Any]]] = {
        scheme: {str(tokens): {"ridges": {str(ridge): [] for ridge in plan.ridges}} for tokens in plan.ridge_tokens}
        for scheme in RIDGE_SCHEMES
    }
    for layer in tqdm(layers.values(), desc="ridges", unit="layer", disable=None, leave=False):

        def held_out(scheme: str, hessian: Tensor, ridge: float = RIDGE, layer: Layer = layer) -> float:
            return loss(layer.weight, quantized(scheme, layer.weight, hessian, 4, ridge), layer.fresh)

        nearest.append(held_out(RTN, layer.fresh))
        for scheme, by_tokens in schemes.items():
            for tokens, measured in by_tokens.items():
                accumulator = layer.calibration[int(tokens)]
                hessian = accumulator.hessian()
                for ridge, losses in measured["ridges"].items():
                    losses.append(held_out(scheme, hessian, float(ridge)))
                chosen = chosen_ridge(layer.weight, accumulator, 4)
                measured.setdefault("chosen_ridge", []).append(chosen)
                measured.setdefault("chosen", []).append(held_out(scheme, hessian, chosen))
    return {"rtn": nearest, "schemes": schemes}


def embeddings(encoder: Encoder, texts: Sequence[str]) -> Tensor:
    """Sentence embeddings [texts, features], of length 1, as the model card defines them."""
    rows = []
    with torch.inference_mode():
        for text in tqdm(texts, desc="embeddings", unit="text", disable=None, leave=False):
            # One text at a time: no token is padding, so the mean needs no mask.
            hidden = encoder.model(**encoder.encode(text)).last_hidden_state[0]
            rows.append(torch.nn.functional.normalize(hidden.mean(dim=0), dim=0))
    return torch.stack(rows)


def ranks(values: Tensor) -> Tensor:
    """Ranks, 1 for the smallest value; equal values share the mean of their ranks."""
    _, inverse, counts = torch.unique(values, return_inverse=True, return_counts=True)
    last = counts.cumsum(0).double()
    means: Tensor = last - (counts.double() - 1) / 2
    return means[inverse]


def spearman(a: Tensor, b: Tensor) -> float:
    """Spearman's rank correlation of two vectors."""
    return float(torch.corrcoef(torch.stack([ranks(a), ranks(b)]))[0, 1])


def pair_similarities(rows: Tensor) -> Tensor:
    """The cosines of all pairs of unit vectors, each pair once."""
    first, second = torch.triu_indices(len(rows), len(rows), offset=1)
    pairs: Tensor = (rows @ rows.T)[first, second]
    return pairs


def measure_embeddings(
    encoder: Encoder, layers: Mapping[str, Layer], texts: Sequence[str], plan: Plan
) -> dict[str, dict[str, dict[str, float]]]:
    """How near the embeddings are to the float model's with all layers quantized, by bits and scheme.

    Each layer is calibrated on the float model's inputs, as elsewhere in this file.
    """
    expected = embeddings(encoder, texts)
    pairs = pair_similarities(expected)
    accumulators = {name: layer.calibration[plan.tokens] for name, layer in layers.items()}
    hessians = {name: accumulator.hessian() for name, accumulator in accumulators.items()}
    originals = {name: layer.weight.clone() for name, layer in layers.items()}
    result: dict[str, dict[str, dict[str, float]]] = {}
    steps = [(bits, scheme) for bits in plan.bits for scheme in SCHEMES]
    for bits, scheme in tqdm(steps, desc="end to end", unit="scheme", disable=None, leave=False):
        for name, original in originals.items():
            ridge = ridge_of(scheme, original, accumulators[name], bits)
            layers[name].weight.copy_(quantized(scheme, original, hessians[name], bits, ridge))
        got = embeddings(encoder, texts)
        cosines = (got * expected).sum(dim=1)
        result.setdefault(str(bits), {})[scheme] = {
            "mean_cosine": round(float(cosines.mean()), 6),
            "least_cosine": round(float(cosines.min()), 6),
            "spearman": round(spearman(pair_similarities(got), pairs), 6),
        }
    for name, original in originals.items():
        layers[name].weight.copy_(original)
    return result


def measure_seconds(plan: Plan) -> dict[str, Any]:
    """The shortest time of each scheme on a square layer; schemes take turns, so a slow phase affects all of them."""
    columns = plan.timed_columns
    weight = torch.randn(columns, columns, generator=torch.Generator().manual_seed(1)) * 0.02
    inputs = correlated_inputs(2 * columns, columns)
    hessian = inputs.T @ inputs / len(inputs)
    schemes = [scheme for scheme in SCHEMES if scheme not in (RTN, BEST_AUTO)]
    seconds = dict.fromkeys(schemes, float("inf"))
    steps = [scheme for _ in range(plan.timed_rounds) for scheme in schemes]
    for scheme in tqdm(steps, desc="times", unit="run", disable=None, leave=False):
        start = time.perf_counter()
        miniquant.gptq(weight, hessian, bits=4, group_size=GROUP_SIZE, **SCHEMES[scheme])
        seconds[scheme] = min(seconds[scheme], round(time.perf_counter() - start, 4))
    return {
        "rows": columns,
        "columns": columns,
        "group_size": GROUP_SIZE,
        "rounds": plan.timed_rounds,
        "threads": torch.get_num_threads(),
        "schemes": seconds,
    }


def measure_peers(layers: Mapping[str, Layer], plan: Plan, python: Path) -> dict[str, Any] | None:
    """The losses of the peers' weights for all layers, by grid and variant; None without the peers' environment."""
    if not python.is_file():
        print(NO_PEERS.format(python), file=sys.stderr)
        return None
    losses: dict[str, dict[str, Losses]] = {}
    versions: dict[str, str] = {}
    hessians = {name: layer.calibration[plan.tokens].hessian() for name, layer in layers.items()}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for layer, (weight, *_) in layers.items():
            save_file({"weight": weight.contiguous(), "hessian": hessians[layer]}, folder / f"{layer}.safetensors")
        for bits, symmetric in tqdm(plan.peer_grids, desc="peers", unit="grid", disable=None, leave=False):
            command: list[str | Path] = [
                *(python.absolute(), "-m", "benchmarks.peers.score_layers", folder, "--bits", str(bits)),
                *("--group-size", str(GROUP_SIZE), "--ridge", str(RIDGE)),
                *([] if symmetric else ["--asymmetric"]),
            ]
            # The peers' environment has its own packages: no package of this environment may come before them.
            environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
            run = subprocess.run(command, check=False, cwd=ROOT, capture_output=True, text=True, env=environment)
            if run.returncode != 0:
                raise SystemExit(f"quality: the peers ended with exit code {run.returncode}\n{run.stderr}")
            versions = json.loads(run.stdout.splitlines()[-1])
            by_variant = losses.setdefault(quality_report.grid_name(bits, symmetric=symmetric), {})
            for layer, measured in layers.items():
                for variant, weight in load_file(folder / f"{layer}.peers").items():
                    add_losses(by_variant.setdefault(variant, no_losses()), measured, hessians[layer], weight)
    return {"versions": versions, "losses": losses}


def processor() -> str:
    """The processor's name, if the system provides it."""
    try:
        found = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        found = None
    return found[1] if found else platform.machine()


def steps(encoder: Encoder, plan: Plan, peers: Path) -> Iterator[tuple[str, Any]]:
    """Yields the parts of quality.json, each as soon as it is measured."""
    layers, texts = read_layers(encoder, plan)
    if len(texts) < plan.texts:
        raise SystemExit(f"quality: expected {plan.texts} texts to embed, but there are {len(texts)}")
    yield (
        "setup",
        {
            "model": "sentence-transformers/all-MiniLM-L6-v2",
            "layers": list(layers),
            "tokens": plan.tokens,
            "few_tokens": plan.few_tokens,
            "fresh_tokens": plan.fresh_tokens,
            "texts": plan.texts,
            "group_size": GROUP_SIZE,
            "ridge": RIDGE,
            "torch": torch.__version__,
            "miniquant": miniquant.__version__,
            "processor": processor(),
        },
    )
    yield "losses", measure_losses(layers, plan.tokens, plan.bits)
    yield "few_tokens", measure_losses(layers, plan.few_tokens, (4,))["4"]
    yield "ridges", measure_ridges(layers, plan)
    yield "embeddings", measure_embeddings(encoder, layers, texts, plan)
    yield "peers", measure_peers(layers, plan, peers)
    yield "seconds", measure_seconds(plan)


def text_of(results: Mapping[str, Any]) -> str:
    """The results as JSON, with every list on a line of its own."""
    return (
        re.sub(
            r"\[[^\[\]{}]*\]",
            lambda found: " ".join(found[0].split()).replace("[ ", "[").replace(" ]", "]"),
            json.dumps(results, indent=1),
        )
        + "\n"
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Measures and writes the results; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="scripts/benchmark quality", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="two layers and few tokens, into build/quality")
    parser.add_argument(
        "--output",
        type=Path,
        help="folder for quality.json, quality.md and quality.png (default: benchmarks/results and docs)",
    )
    parser.add_argument(
        "--peers",
        type=Path,
        default=PEERS_PYTHON,
        metavar="PYTHON",
        help="the Python of the peers' environment (default: build/peers-venv/bin/python)",
    )
    options = parser.parse_args(arguments)
    output = options.output or (ROOT / "build" / "quality" if options.quick else None)
    results = {}
    start = time.monotonic()
    for name, part in steps(Encoder(), QUICK if options.quick else FULL, options.peers):
        results[name] = part
        print(f"{time.monotonic() - start:4.0f} s  {name}", flush=True)
    source = (output or RESULTS) / "quality.json"
    source.parent.mkdir(parents=True, exist_ok=True)
    source.write_text(text_of(results))
    pages = output or quality_report.DOCS
    quality_report.write(source, pages)
    print(f"wrote {source}, {pages / 'quality.md'} and {pages / 'quality.png'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
