"""What the commands of :mod:`miniquant.cli` do. Results go to standard output, all else to standard error."""

import dataclasses
import importlib.metadata
import json
import logging
import math
import platform
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import typer
from rich.console import Console
from rich.text import Text
from torch import nn

import miniquant
from miniquant import units
from miniquant.architecture import transformers_package
from miniquant.bits import curve, measure_units, recipe_of, uniform_cost
from miniquant.calibration import Calibration, load_calibration, needs_tokenizer
from miniquant.convert import convert_folder
from miniquant.errors import line_of
from miniquant.evaluate import Estimate, compare_embeddings
from miniquant.evaluate import evaluate as evaluate_language
from miniquant.float_models import (
    gguf_of,
    load_gguf,
    load_tokenizer,
    longest_window,
    quiet,
    speaks,
    vocabulary_of,
)
from miniquant.layer_file import replacing
from miniquant.modules import find_sites
from miniquant.output import GgufOptions
from miniquant.ranks import Ranks
from miniquant.recipe import Recipe, Rule
from miniquant.report import HTML_NAME, read_report
from miniquant.report_plots import write_bits_plot
from miniquant.results import Stopped
from miniquant.rotation import rotate_model
from miniquant.run import available_device, quantize_folder
from miniquant.state import kept_layers, state_folder
from miniquant.stopping import stop_when_asked
from miniquant.terminal import Progress, console_of, contents_tables, report_tables, table
from miniquant.walk import to_device

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}


def print_versions() -> None:
    """Versions of what decides results."""
    packages = {distribution.name.lower() for distribution in importlib.metadata.distributions()}
    print(f"miniquant {miniquant.__version__}")
    print(
        f"torch {torch.__version__}, kernels {miniquant.instruction_set()}, bfloat16 unit {miniquant.bfloat16_unit()}"
    )
    for package in ("transformers", "compressed-tensors", "gguf", "matplotlib"):
        print(package, importlib.metadata.version(package) if package in packages else "not installed")
    print(f"Python {platform.python_version()}")


# Quantizing


@dataclasses.dataclass(frozen=True)
class Asked:
    """What the command line says of a recipe.

    Attributes:
        file: of a recipe; None is the default one.
        stated: options of :class:`miniquant.LayerOptions`; None of those that were not stated.
        skip: patterns of layers to leave alone.
        rules: as :func:`parse_rule` takes them.
        rotation: whether the model is turned first; None where that was not stated.
    """

    file: Path | None
    stated: Mapping[str, Any]
    skip: Sequence[str]
    rules: Sequence[str]
    rotation: bool | None = None

    def recipe(self) -> Recipe:
        """The file's recipe with what the command line says instead, and its rules after those of the command line.

        Raises:
            OSError, ValueError: for a bad file, option or rule.
        """
        base = Recipe() if self.file is None else Recipe.load(self.file)
        stated = {name: value for name, value in self.stated.items() if value is not None}
        if "ridge" in stated:
            stated["ridge"] = _value(stated["ridge"])
        rules = [*(Rule(pattern, {"skip": True}) for pattern in self.skip), *map(parse_rule, self.rules), *base.rules]
        rotation = base.rotation if self.rotation is None else self.rotation
        return Recipe(base.defaults.with_stated(stated), rules, base.format, rotation)


def parse_rule(text: str) -> Rule:
    """A rule from "PATTERN KEY=VALUE KEY=VALUE"; values are JSON, or words.

    Raises:
        ValueError: for anything else.
    """
    pattern, *pairs = text.split()
    options = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not equals:
            raise ValueError(f"--rule {text!r}: expected a pattern and KEY=VALUE pairs after it, but got {pair!r}")
        options[key] = _value(value)
    if not options:
        raise ValueError(f"--rule {text!r}: expected a pattern and KEY=VALUE pairs after it, but got no pair")
    try:
        return Rule(pattern, options)
    except ValueError as error:
        raise ValueError(f"--rule {text!r}: {str(error).removeprefix('Rule: ')}") from error


def _value(text: str) -> Any:
    """A value as JSON has it, otherwise the text itself."""
    try:
        return json.loads(text)
    except ValueError:
        return text


def quantize(
    model_dir: Path,
    output_dir: Path,
    *,
    recipe: Recipe,
    form: Any,
    calibration: Sequence[Path] | None,
    tokens: int,
    sequence_length: int,
    dtype: str,
    threads: int | None,
    gguf: Mapping[str, Any],
    dry_run: bool,
    device: str,
    **options: Any,
) -> None:
    """Quantizes a folder, and shows how that goes and what came of it; `options` are those of quantize_folder."""
    console = _start(threads, device)
    stated = {name: value for name, value in gguf.items() if value is not None}
    name = form or recipe.format or "compressed-tensors"
    if stated and name != "gguf":
        raise ValueError(
            f"quantize: expected --gguf-{next(iter(stated))} with --format gguf only, but got format {name}"
        )
    arguments = {
        "recipe": recipe,
        "format": name,
        "calibration": list(calibration) if calibration else None,
        "tokens": tokens,
        "sequence_length": sequence_length,
        "dtype": _DTYPES.get(dtype, "auto"),
        "device": device,
        "gguf": GgufOptions(**stated) if stated else None,
        **options,
    }
    naming = _naming("quantize", model_dir, output_dir, *(calibration or ()))
    with naming, _ranks() as ranks:
        is_first = ranks is None or ranks.rank == 0
        if not dry_run:
            arguments["ranks"] = ranks
        if is_first:
            _quantize_and_show(model_dir, output_dir, console, arguments, dry_run=dry_run)
        elif not dry_run:
            quantize_folder(model_dir, output_dir, **arguments)


@contextmanager
def _ranks() -> Iterator[Ranks | None]:
    """The processes that torchrun started, where it did; the others end with this one where it fails."""
    ranks = Ranks.joined()
    if ranks is None:
        yield None
        return
    try:
        yield ranks
    except BaseException as error:
        ranks.close("stopped" if isinstance(error, (typer.Exit, KeyboardInterrupt)) else line_of(error))
        raise
    ranks.close()


def _quantize_and_show(
    model_dir: Path, output_dir: Path, console: Console, arguments: dict[str, Any], *, dry_run: bool
) -> None:
    """Quantizes a folder with arguments of quantize_folder, and shows how that goes and what came of it."""
    if dry_run:
        from miniquant.preflight import preflight, preflight_tables  # noqa: PLC0415  (for this option only)

        plan = preflight(model_dir, output_dir, **arguments)
        _out(preflight_tables(plan, width=console_of(sys.stdout).width))
        return
    quietly = quiet(transformers_package())
    stopping = stop_when_asked(console, lambda: _kept(output_dir))
    with stopping as stop, quietly, Progress(tokens=arguments["tokens"], console=console) as progress:
        progress.stage(f"reads {model_dir}")
        try:
            result = quantize_folder(model_dir, output_dir, progress=progress.layer, stop=stop, **arguments)
        except Stopped as error:
            print(line_of(error), file=sys.stderr)
            raise typer.Exit(stop.code) from None
    report = read_report(result.folder)
    _out(report_tables(report, width=console_of(sys.stdout).width))
    where = result.folder / HTML_NAME
    print(f"written: {result.folder} ({result.format}, {units.size(result.bytes_after)}); {where} has the report")
    if result.format != "gguf":
        print(f"next: miniquant evaluate {result.folder} --against {model_dir} --text FILE")


def _kept(output: Path) -> str:
    """What a run that was ended left, and how to go on."""
    folder = state_folder(output)
    layers = len(kept_layers(folder))
    return f"{layers} layers are kept in {folder}: go on with --resume" if layers else "no layer was finished"


# Evaluating


def evaluate(
    model_dir: Path,
    text: Sequence[Path],
    *,
    against: Path | None,
    tokens: int,
    sequence_length: int,
    dtype: str,
    device: str,
    threads: int | None,
    trust_remote_code: bool,
    as_json: bool,
) -> None:
    """Prints scores of a model."""
    console = _start(threads, device)
    loading: dict[str, Any] = {"dtype": _DTYPES.get(dtype), "device": device, "trust_remote_code": trust_remote_code}
    models = (model_dir, *([] if against is None else [against]))
    tokenizer = load_tokenizer(models, trust_remote_code=trust_remote_code) if needs_tokenizer(list(text)) else None
    naming = _naming("evaluate", model_dir, *text, *([] if against is None else [against]))
    with naming, Progress(console=console) as progress:
        progress.stage(f"reads {model_dir}")
        model = _loaded(model_dir, **loading)
        data = _windows(text, tokenizer, model, tokens, sequence_length)
        reference = None
        if against is not None:
            progress.stage(f"reads {against}")
            reference = _loaded(against, **loading)
        progress.stage(f"evaluates {data.tokens:,} tokens")
        start = time.perf_counter()
        scores = _scores(model, data, reference, model_dir)
        seconds = time.perf_counter() - start
    if as_json:
        sources = [source.name for source in data.sources]
        about = {"model": str(model_dir), "against": None if against is None else str(against), "text": sources}
        print(json.dumps(_finite({**about, "tokens": data.tokens, "seconds": seconds, **scores}), indent=1))
        return
    made = table(None, [("", False), ("", True), ("± standard error", True)])
    for name, value in _score_rows(scores):
        estimate = Estimate(**value) if isinstance(value, Mapping) else Estimate(value, None)
        error = "" if estimate.standard_error is None else f"{estimate.standard_error:.2g}"
        made.add_row(name, f"{estimate.value:.6g}", error)
    _out(made)
    print(f"{data.tokens:,} tokens in {scores['windows']} windows, {units.duration(seconds)}")


def _loaded(path: Path, *, dtype: torch.dtype | None, device: str, trust_remote_code: bool) -> nn.Module:
    """A model, quantized or not, in evaluation mode."""
    gguf = gguf_of(path)
    if gguf is not None:
        return load_gguf(gguf, dtype=dtype, device=device)
    from miniquant.loading import load  # noqa: PLC0415  (as in inspect)

    model: nn.Module = load(path, dtype=dtype, device=device, trust_remote_code=trust_remote_code)
    return model


def _windows(
    text: Sequence[Path] | None,
    tokenizer: Any,
    model: nn.Module,
    tokens: int,
    sequence_length: int,
    batch_tokens: int | None = None,
) -> Calibration:
    """Batches of tokens as long as the model takes, which notes say."""
    longest = longest_window(model)
    if longest is not None and longest < sequence_length:
        logging.getLogger(__name__).info("windows have %d tokens, as many as the model takes", longest)
        sequence_length = longest
    vocabulary = vocabulary_of(model)
    return load_calibration(
        None if text is None else list(text),
        tokenizer,
        tokens=tokens,
        sequence_length=sequence_length,
        batch_tokens=batch_tokens,
        vocabulary=vocabulary,
    )


def _scores(model: nn.Module, data: Calibration, reference: nn.Module | None, path: Path) -> dict[str, Any]:
    """Scores of a language model, or of an encoder."""
    if speaks(model):
        return evaluate_language(model, data.batches, reference=reference).to_dict()
    if reference is None:
        raise ValueError(
            f"evaluate: expected --against for {path}, a {type(model).__name__}: it predicts no token, so there is "
            "nothing to measure but how near its embeddings are to another model's"
        )
    bases = [getattr(one, "base_model", one) for one in (model, reference)]
    return compare_embeddings(bases[0], data.batches, reference=bases[1]).to_dict()


def _finite(value: Any) -> Any:
    """The same without numbers that JSON does not have: a perplexity may be infinite."""
    if isinstance(value, Mapping):
        return {name: _finite(one) for name, one in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


_SCORES = {
    "perplexity": "perplexity",
    "reference_perplexity": "perplexity of the other",
    "loss": "loss, nats",
    "kl_divergence": "KL divergence, nats",
    "same_top": "same likeliest token",
    "cosine": "cosine of embeddings",
    "least_cosine": "least cosine",
}


def _score_rows(scores: Mapping[str, Any]) -> list[tuple[str, Any]]:
    return [(text, scores[name]) for name, text in _SCORES.items() if scores.get(name) is not None]


# Choosing bits


def parse_widths(text: str) -> list[int]:
    """Bits from "3,4,8".

    Raises:
        ValueError: for anything else than numbers from 2 to 8.
    """
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() and 2 <= int(part) <= 8 for part in parts):
        raise ValueError(f"bits: expected --widths to be numbers from 2 to 8 with commas between, but got {text!r}")
    return sorted({int(part) for part in parts})


def choose_bits(
    model_dir: Path,
    recipe_file: Path,
    *,
    average: float,
    widths: Sequence[int],
    recipe: Recipe,
    calibration: Sequence[Path] | None,
    tokens: int,
    sequence_length: int,
    dtype: str,
    device: str,
    threads: int | None,
    trust_remote_code: bool,
    plot: Path | None,
) -> None:
    """Writes a recipe with bits for each layer, and prints what other averages would cost."""
    console = _start(threads, device)
    if recipe_file.suffix.lower() != ".json":
        raise ValueError(f"bits: expected a recipe file to write whose name ends in .json, but got {recipe_file}")
    with _naming("bits", model_dir), Progress(console=console) as progress:
        progress.stage(f"reads {model_dir}")
        model = _loaded(model_dir, dtype=_DTYPES.get(dtype), device=device, trust_remote_code=trust_remote_code)
        if not speaks(model):
            raise ValueError(f"expected a language model, but got a {type(model).__name__}")
        if recipe.rotation:
            rotate_model(model)
        needed = needs_tokenizer(calibration)
        tokenizer = load_tokenizer((model_dir,), trust_remote_code=trust_remote_code) if needed else None
        # A batch for each window: activations for a backward pass are kept for one batch at a time.
        data = _windows(calibration, tokenizer, model, tokens, sequence_length, batch_tokens=1)
        progress.stage(f"measures what layers cost, on {data.tokens:,} tokens")
        skipped = [site.name for site in find_sites(model).sites if recipe.options(site.name).skip]
        batches = [to_device(batch, torch.device(device)) for batch in data.batches]
        found = measure_units(model, batches, recipe.defaults, widths=widths, skip=skipped)
    averages = sorted({average, *(step / 2 for step in range(2 * min(widths), 2 * max(widths) + 1))})
    allocations = curve(found, averages)
    chosen = allocations[averages.index(average)]
    made = table("what an average costs", [("bits", True), ("chosen, nats", True), ("uniform, nats", True)])
    for one, wanted in zip(allocations, averages, strict=True):
        uniform = f"{uniform_cost(found, int(wanted)):.4g}" if wanted in widths else ""
        made.add_row(f"{wanted:g}", f"{one.cost:.4g}", uniform)
    _out(made)
    counts = {bits: list(chosen.bits.values()).count(bits) for bits in widths}
    shares = ", ".join(f"{count} of {bits}" for bits, count in counts.items() if count)
    print(f"{chosen.average:.3f} bits on average: layers {shares}")
    for note in data.notes:
        print(f"note: {note}", file=sys.stderr)
    if plot is not None:
        write_bits_plot(plot, found, allocations, chosen)
        print(f"written: {plot}")
    with replacing(recipe_file) as new:
        new.write_text(json.dumps(recipe_of(chosen, recipe).to_dict(), indent=1) + "\n", encoding="utf-8")
    print(f"written: {recipe_file}")
    print(f"next: miniquant quantize {model_dir} OUTPUT_DIR --recipe {recipe_file}")


# Looking and converting


def inspect(path: Path, *, every_layer: bool, as_json: bool) -> None:
    """Prints what a model has."""
    _start(None)
    from miniquant.loading import contents_of  # noqa: PLC0415  (not for commands that load no quantized model)

    with _naming("inspect", path):
        found = contents_of(path)
    if as_json:
        print(json.dumps(found.to_dict(), indent=1, allow_nan=False))
        return
    _out(contents_tables(found, every_layer=every_layer))


def convert(source_dir: Path, output_dir: Path, form: Any, **options: Any) -> None:
    """Takes a model to another format."""
    _start(None)
    with _naming("convert", source_dir, output_dir):
        done = convert_folder(source_dir, output_dir, form, **options)
    for note in done.notes:
        print(f"note: {note}", file=sys.stderr)
    sizes = f"{units.size(done.bytes_before)} before, {units.size(done.bytes_after)} after"
    print(f"written: {done.folder} ({done.before} to {done.after}, {done.layers} layers, {sizes})")


# Speaking


def generate(
    model_dir: Path,
    prompt: str,
    *,
    max_tokens: int,
    temperature: float,
    top_p: float,
    seed: int,
    chat: bool | None,
    system: str | None,
    dtype: str,
    device: str,
    threads: int | None,
    trust_remote_code: bool,
) -> None:
    """Prints what a model goes on with, as it comes."""
    console = _start(threads, device)
    text = sys.stdin.read() if prompt == "-" else prompt
    if not text.strip():
        raise ValueError("generate: expected a prompt, but got no text")
    tokenizer = load_tokenizer((model_dir,), trust_remote_code=trust_remote_code)
    ids = _prompt_ids(tokenizer, text, chat=chat, system=system, path=model_dir)
    with _naming("generate", model_dir):
        model: Any = _loaded(model_dir, dtype=_DTYPES.get(dtype), device=device, trust_remote_code=trust_remote_code)
    if not speaks(model):
        raise ValueError(
            f"generate: {model_dir}: expected a causal language model, but got a {type(model).__name__}, "
            "which gives no text"
        )
    longest = longest_window(model)
    if longest is not None and ids.shape[-1] >= longest:
        raise ValueError(
            f"generate: {model_dir}: expected a prompt of fewer than {longest} tokens, which the model takes, but got "
            f"{ids.shape[-1]}"
        )
    from transformers import TextStreamer  # noqa: PLC0415

    torch.manual_seed(seed)
    draws = {"do_sample": True, "temperature": temperature, "top_p": top_p} if temperature else {"do_sample": False}
    streamer: Any = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    ids = ids.to(device)
    start = time.perf_counter()
    room = max_tokens if longest is None else min(max_tokens, longest - ids.shape[-1])
    with torch.inference_mode():
        output = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=room,
            streamer=streamer,
            pad_token_id=_padding(tokenizer),
            **draws,
        )
    seconds, made = time.perf_counter() - start, output.shape[-1] - ids.shape[-1]
    console.print(Text(f"{made} tokens in {units.duration(seconds)}, {made / seconds:.1f} a second", style="dim"))


def _padding(tokenizer: Any) -> Any:
    return tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id


def _prompt_ids(tokenizer: Any, text: str, *, chat: bool | None, system: str | None, path: Path) -> torch.Tensor:
    """The prompt as tokens [1, L]: as a message where that is asked for or the tokenizer has a chat template."""
    has_template = getattr(tokenizer, "chat_template", None) is not None
    if (chat or (system is not None and chat is None)) and not has_template:
        raise ValueError(
            f"generate: {path}: expected a tokenizer with a chat template, but got one without (--no-chat)"
        )
    if system is not None and chat is False:
        raise ValueError("generate: expected no --system with --no-chat, but got both")
    if chat or (chat is None and has_template):
        messages = [{"role": "user", "content": text}]
        if system is not None:
            messages.insert(0, {"role": "system", "content": system})
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    else:
        ids = tokenizer(text)["input_ids"]
    if not ids:
        raise ValueError(f"generate: {path}: expected a prompt of at least one token, but got none")
    return torch.tensor([ids])


# What all commands do


@contextmanager
def _naming(command: str, *paths: Path) -> Iterator[None]:
    """While entered, an error of bad input that names none of some paths gets the first of them."""
    try:
        yield
    except ValueError as error:
        text = line_of(error)
        if any(str(path) in text for path in paths):
            raise
        raise ValueError(f"{command}: {paths[0]}: {text}") from error


def _start(threads: int | None, device: str = "cpu") -> Any:
    """Sets threads and logging, looks for the device; gives the console for what is no result."""
    if threads is not None:
        torch.set_num_threads(threads)
    available_device(device)
    console = console_of(sys.stderr)
    logging.getLogger("miniquant").handlers[:] = [_ConsoleHandler(console)]
    return console


class _ConsoleHandler(logging.Handler):
    """Prints records above a progress bar."""

    def __init__(self, console: Any) -> None:
        super().__init__()
        self._console = console

    def emit(self, record: logging.LogRecord) -> None:
        """Prints a record."""
        style = "yellow" if record.levelno >= logging.WARNING else "dim"
        self._console.print(Text(f"{record.levelname.lower()}: {record.getMessage()}", style=style), soft_wrap=True)


def _out(renderable: Any) -> None:
    """Prints a result."""
    console_of(sys.stdout).print(renderable)
