"""The command line: help, options, exit codes, errors of one line for whatever is wrong."""

from __future__ import annotations

import io
import json
import logging
import os
import re
import shlex
import shutil
import signal
import stat
import struct
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import pytest
import torch
import typer
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

import miniquant
from miniquant import LayerOptions, QuantizationError, Recipe, Rule, cli, errors, lab, load_calibration
from miniquant.commands import Asked, parse_rule
from miniquant.formats import gguf_file
from miniquant.recipe import FormatName, Unseen
from miniquant.report import read_report
from miniquant.token_weights import TokenWeights
from model_folder import QUICK, VOCABULARY, make_folder
from small_models import bert, decoder

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

transformers: Any = pytest.importorskip("transformers")

COMMANDS = ("quantize", "evaluate", "bits", "inspect", "convert", "generate", "lab")
TEXT = "the quick brown fox jumps over the lazy dog. " * 12 + "\n"


@pytest.fixture(autouse=True)
def no_width(monkeypatch: pytest.MonkeyPatch) -> None:
    """pytest's processes set COLUMNS, which cuts tables as on a terminal of that width."""
    monkeypatch.delenv("COLUMNS", raising=False)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a small Llama ("llama"), a text, and the Llama quantized ("quantized")."""
    base = tmp_path_factory.mktemp("cli")
    make_folder(base / "llama", decoder("Llama", vocab_size=VOCABULARY, max_position_embeddings=128))
    (base / "text.txt").write_text(TEXT * 20)
    assert cli.main(["quantize", str(base / "llama"), str(base / "quantized"), *QUICK]) == 0
    return base


@pytest.fixture
def at(base: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A folder to work in, with links to what `base` has."""
    for path in base.iterdir():
        (tmp_path / path.name).symlink_to(path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(autouse=True)
def logging_restored() -> Iterator[None]:
    logger = logging.getLogger("miniquant")
    before = logger.level, list(logger.handlers)
    yield
    logger.setLevel(before[0])
    logger.handlers[:] = before[1]


# Help


def help_of(*command: str) -> str:
    result = CliRunner().invoke(cli.app, [*command, "--help"], env={"COLUMNS": "200", "NO_COLOR": "1"})
    assert result.exit_code == 0
    return result.output


def test_help_lists_commands_and_exit_codes() -> None:
    text = help_of()
    for command in COMMANDS:
        assert re.search(rf"│ {command} +\w", text)
    for code in (errors.DONE, errors.FAILED, errors.BAD_INPUT, errors.INTERRUPTED):
        assert re.search(rf"^ +{code}  ", text, re.MULTILINE)
    assert str(errors.TERMINATED) in text


@pytest.mark.parametrize("command", COMMANDS)
def test_examples_of_help_parse(command: str) -> None:
    examples = re.findall(r"^ +(?:cat \S+ \| )?miniquant (.+?)(?:   .*)?$", help_of(command), re.MULTILINE)
    assert len(examples) >= 2
    group: Any = typer.main.get_command(cli.app)
    for example in examples:
        words = shlex.split(re.split(r" [|>] ", example)[0])
        assert words[0] == command
        group.commands[command].make_context(command, words[1:])


@pytest.mark.parametrize("width", [40, 80])
def test_help_fits(width: int) -> None:
    for command in ((), *((command,) for command in COMMANDS)):
        result = CliRunner().invoke(
            cli.app, [*command, "--help"], env={"COLUMNS": str(width), "TERMINAL_WIDTH": str(width)}
        )
        assert result.exit_code == 0
        assert max(map(len, result.output.splitlines())) <= width


def test_choices_and_defaults_are_the_librarys() -> None:
    assert set(get_args(cli.Preset)) == set(get_args(miniquant.presets.Preset))
    assert get_args(cli.Format) == get_args(FormatName)
    assert get_args(cli.TokenWeights) == get_args(TokenWeights)
    assert get_args(cli.Unseen) == get_args(Unseen)
    assert set(get_args(cli.OtherType)) == set(get_args(gguf_file.OtherType))
    text, options = help_of("quantize"), LayerOptions()
    for name in ("bits", "group_size", "preset", "ridge", "token_weights", "unseen"):
        shown = re.search(rf"│ --{name.replace('_', '-')} .*?default: \((\S+)\)", text, re.DOTALL)
        assert shown is not None
        assert shown[1] == str(getattr(options, name))
    assert options.symmetric


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--version"]) == 0
    output = capsys.readouterr().out
    assert f"miniquant {miniquant.__version__}\n" in output
    assert f"torch {torch.__version__}" in output


@pytest.mark.parametrize("arguments", [["--help"], ["quantize", "--help"], ["quantise"]])
@pytest.mark.parametrize("module", [True, False])
def test_torch_is_not_loaded_for_help(arguments: list[str], module: bool) -> None:
    script = Path(sys.executable).with_name("miniquant")
    if not module and not script.is_file():
        pytest.skip("the package was installed before it had a console script")
    program = ["-m", "miniquant"] if module else [str(script)]
    run = subprocess.run(
        [sys.executable, "-X", "importtime", *program, *arguments], capture_output=True, text=True, check=False
    )
    assert run.returncode == (2 if arguments == ["quantise"] else 0)
    assert "miniquant.cli" in run.stderr
    assert not re.search(r"\| +(torch|transformers|matplotlib)$", run.stderr, re.MULTILINE)


def test_package_has_all_names_when_the_command_loads_it() -> None:
    code = (
        "import sys; sys.argv = ['-m']; sys.orig_argv = [sys.executable, '-m', 'miniquant']; import miniquant\n"
        "assert 'torch' not in sys.modules\n"
        "print(all(hasattr(miniquant, name) for name in miniquant.__all__), miniquant.__version__)"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.split() == ["True", miniquant.__version__]


# Usage


def failed(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> tuple[int, str]:
    """The exit code, and the line of the error."""
    capsys.readouterr()
    code = cli.main([str(argument) for argument in arguments])
    lines = capsys.readouterr().err.splitlines()
    told = [line for line in lines if line.startswith("error: ")]
    assert len(told) == 1, lines
    assert lines[-1] == told[0]
    assert not any("Traceback" in line for line in lines)
    return code, told[0].removeprefix("error: ")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("quantize", "Missing argument 'MODEL_DIR'"),
        ("quantise a b", "Did you mean 'quantize'?"),
        ("quantize a b --bits 9", "--bits"),
        ("quantize a b --bits four", "--bits"),
        ("quantize a b --format awq", "--format"),
        ("quantize a b --held-out 0.5", "--held-out"),
        ("quantize a b --tokens 0", "--tokens"),
        ("quantize a b --nope", "No such option: --nope"),
        ("quantize a b --group-size 0", "group_size"),
        ("quantize a b --ridge -1", "ridge"),
        ("quantize a b --ridge big", "ridge"),
        ("quantize a b --skip re:(", "pattern"),
        ("quantize a b --rule *.fc", "--rule"),
        ("quantize a b --rule '*.fc bits'", "--rule"),
        ("quantize a b --rule '*.fc bits=9'", "--rule '*.fc bits=9'"),
        ("quantize a b --rule '*.fc bitts=4'", "did you mean 'bits'"),
        ("quantize a b --gguf-pre llama", "--format gguf only"),
        ("quantize a b", "'a', which does not exist"),
        ("evaluate a", "Missing option '--text'"),
        ("evaluate a --text text.txt", "'a', which is neither"),
        ("evaluate llama --text none.txt", "none.txt"),
        ("evaluate llama --text text.txt --device warp", "device"),
        ("inspect a", "a"),
        ("convert a b --format gptq", "a"),
        ("convert llama b --format gptq", "quantization_config"),
        ("convert llama b", "Missing option '--format'"),
        ("generate a hello", "'a', which is neither"),
        ("generate llama ' '", "prompt"),
        ("generate llama hello --chat", "chat template"),
        ("generate llama hello --system x --no-chat", "--system"),
        ("generate llama hello --top-p 2", "--top-p"),
        ("generate llama '" + "hello " * 200 + "'", "fewer than 128 tokens"),
    ],
)
@pytest.mark.usefixtures("at")
def test_bad_usage(arguments: str, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, line = failed(capsys, *shlex.split(arguments))
    assert code == errors.BAD_INPUT
    assert said in line


@pytest.mark.usefixtures("at")
def test_debug_prints_the_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in (["--debug", "quantize", "a", "b"], ["quantize", "a", "b", "--debug"]):
        assert cli.main(arguments) == errors.BAD_INPUT
        assert "Traceback (most recent call last)" in capsys.readouterr().err


def test_without_arguments_there_is_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([]) == errors.BAD_INPUT
    captured = capsys.readouterr()
    assert "quantize" in captured.out + captured.err
    assert "error" not in captured.err


# Errors


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (ValueError("Recipe.load: a.toml: expected TOML, but got: x"), 2, "a.toml: expected TOML, but got: x"),
        (ValueError("gptq: expected bits of layer 'a' to be 2"), 2, "gptq: expected bits of layer 'a' to be 2"),
        (
            FileExistsError("quantize_folder: expected b (go on with resume=True)"),
            2,
            "expected b (go on with --resume)",
        ),
        (
            RuntimeError('a: saw 1 (unseen="rtn" rounds) (go on with resume=True and another unseen)'),
            1,
            "saw 1 (--unseen rtn rounds) (go on with --resume and another --unseen)",
        ),
        (ValueError("a: b, which trust_remote_code=True would run"), 2, "b, which --trust-remote-code would run"),
        (ValueError("c (quantize_folder makes one)"), 2, "c (miniquant quantize makes one)"),
        (FileNotFoundError(2, "No such file or directory", "a/b"), 2, "a/b: No such file or directory"),
        (OSError(28, "No space left on device (3 of 7 layers are kept)", "a"), 1, "a: No space left on device (3 of 7"),
        (QuantizationError("quantize_model: layer 'a': b", ["a"], miniquant.ModelResult()), 1, "layer 'a': b"),
        (KeyError("Checkpoint: a: b"), 1, "KeyError: a: b"),
        (MemoryError(), 1, "out of memory"),
        (ZeroDivisionError("x"), 1, "ZeroDivisionError: x"),
        (ValueError("a.toml: 2 errors:\n  rule 1: b\n  rule 2: c"), 2, "a.toml: 2 errors: rule 1: b; rule 2: c"),
        (ValueError("a/b: expected c, but got:\n\nd\n    e"), 2, "a/b: expected c, but got: d e"),
        (ImportError("plots: expected the package x"), 2, "expected the package x"),
        (ValueError("x" * 5000), 2, "x" * 1996 + " ..."),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else None,
)
def test_errors_in_words_of_the_command_line(error: Exception, code: int, line: str) -> None:
    assert errors.code_of(error) == code
    assert errors.line_of(error).startswith(line)


# Recipes


def asked(file: Path | None = None, skip: tuple[str, ...] = (), rules: tuple[str, ...] = (), **stated: Any) -> Recipe:
    return Asked(file, stated, skip, rules).recipe()


def test_recipe_without_options_is_the_default() -> None:
    assert asked(bits=None, ridge=None) == Recipe()


def test_recipe_of_the_command_line(tmp_path: Path) -> None:
    file = tmp_path / "recipe.toml"
    file.write_text('format = "gptq"\n[defaults]\nbits = 3\ngroup_size = 32\n[[rules]]\npattern = "*.a"\nbits = 8\n')
    assert asked(file) == Recipe.load(file)
    made = asked(file, ("*.b",), ("re:.*c bits=2 ridge=0.5 unseen=rtn symmetric=false",), bits=4, ridge="0.25")
    assert made == Recipe(
        LayerOptions(bits=4, group_size=32, ridge=0.25),
        [
            Rule("*.b", {"skip": True}),
            Rule("re:.*c", {"bits": 2, "ridge": 0.5, "unseen": "rtn", "symmetric": False}),
            Rule("*.a", {"bits": 8}),
        ],
        "gptq",
    )
    assert asked(ridge="auto", min_tokens=7).defaults == LayerOptions(min_tokens=7)


def test_rule() -> None:
    assert parse_rule("*.x bits=8 group_size=-1") == Rule("*.x", {"bits": 8, "group_size": -1})


# Quantizing


def test_quantize_writes_what_is_asked(at: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ("--bits", "3", "--rule", "*.down_proj bits=8", "--skip", "*.0.self_attn.*", "--asymmetric")
    more = ("--calibration", "text.txt", "--format", "miniquant", "--held-out", "0.1", "--threads", "1")
    assert cli.main(["quantize", "llama", "out", *QUICK, *options, *more]) == 0
    captured = capsys.readouterr()
    report = read_report(at / "out")
    assert [layer["name"] for layer in report["layers"]][:2] == [
        "model.layers.0.mlp.gate_proj",
        "model.layers.0.mlp.up_proj",
    ]
    assert len(report["layers"]) == 10
    assert {layer["bits"] for layer in report["layers"]} == {3, 8}
    assert all(layer["symmetric"] is False and layer["preset"] == "fast" for layer in report["layers"])
    assert report["calibration"]["sources"][0]["name"] == "text.txt"
    assert report["format"] == "miniquant"
    assert report["peak_memory"] > 1e7
    assert (at / "out" / "report.html").is_file()
    assert not (at / "out.partial").exists()
    assert "mlp.down_proj" in captured.out
    assert "written: out (miniquant, " in captured.out
    assert re.search(r"^10/10  model\.layers\.1\.mlp\.down_proj  loss ", captured.err, re.MULTILINE)


@pytest.mark.usefixtures("at")
def test_quantize_refuses_what_is_there(capsys: pytest.CaptureFixture[str]) -> None:
    code, line = failed(capsys, "quantize", "llama", "quantized", *QUICK)
    assert code == errors.BAD_INPUT
    assert "quantized" in line


@pytest.mark.usefixtures("at")
def test_layers_that_see_too_few_tokens_end_in_1(capsys: pytest.CaptureFixture[str]) -> None:
    code, line = failed(capsys, "quantize", "llama", "out", *QUICK, "--min-tokens", "100000")
    assert code == errors.FAILED
    assert "model.layers.0.self_attn.q_proj saw " in line


@pytest.mark.usefixtures("at")
def test_verbose_prints_what_is_logged(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["quantize", "llama", "out", *QUICK, "-v"]) == 0
    logged = [line for line in capsys.readouterr().err.splitlines() if line.startswith("info: layer ")]
    assert len(logged) == 14


@pytest.fixture(scope="module")
def slow(base: Path) -> Path:
    """A model of six blocks: it takes some seconds."""
    sizes = {"hidden_size": 128, "intermediate_size": 256, "head_dim": 32, "num_hidden_layers": 6}
    return make_folder(base / "slow", decoder("Llama", vocab_size=VOCABULARY, max_position_embeddings=128, **sizes))


def started(*arguments: str, cwd: Path, program: Sequence[str] = ("-m", "miniquant")) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, *program, *arguments],
        cwd=cwd,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def signalled(at: Path, number: signal.Signals, code: int, line: str, kept: str, **options: Any) -> tuple[int, float]:
    """Sends a signal to a run over the slow model when it prints a line that a pattern matches, and resumes it.

    Returns:
        How many layers it says are kept, and seconds from the signal to its end, with this exit code.
    """
    arguments = ("quantize", str(at.joinpath("text.txt").resolve().parent / "slow"), "out", *QUICK, "--tokens", "2048")
    process = started(*arguments, cwd=at, **options)
    assert process.stderr is not None
    for printed in process.stderr:
        if re.match(line, printed):
            break
    start = time.perf_counter()
    process.send_signal(number)
    rest = process.stderr.read()
    assert process.wait() == code, rest
    seconds = time.perf_counter() - start
    said = re.search(rf"{kept} layers are kept in out\.partial: go on with --resume", rest)
    assert said is not None, rest
    assert "Traceback" not in rest
    assert not (at / "out").exists()
    assert cli.main([*arguments, "--resume"]) == 0
    assert len(read_report(at / "out")["layers"]) == 42
    return int(said[1]), seconds


SIGNALS = pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGINT, errors.INTERRUPTED), (signal.SIGTERM, errors.TERMINATED)]
)


@SIGNALS
@pytest.mark.usefixtures("slow")
def test_signals_keep_finished_layers(at: Path, number: signal.Signals, code: int) -> None:
    signalled(at, number, code, r"\d+/42 ", r"(\d+) of 42")


# The lock of a mutex that is locked waits for ever, and signals do not interrupt it.
BLOCKED = """
import ctypes, sys
from miniquant import cli, quantizer
solve, solved = quantizer.ridge_by_halves, []
def blocked(*arguments, **options):
    if len(solved) == 3:
        print("blocks", file=sys.stderr, flush=True)
        library, mutex = ctypes.CDLL(None), ctypes.create_string_buffer(64)
        library.pthread_mutex_lock(mutex)
        library.pthread_mutex_lock(mutex)
    solved.append(True)
    return solve(*arguments, **options)
quantizer.ridge_by_halves = blocked
sys.exit(cli.main(sys.argv[1:]))
"""


@SIGNALS
@pytest.mark.usefixtures("slow")
def test_a_signal_ends_a_layer_that_takes_long(at: Path, number: signal.Signals, code: int) -> None:
    kept = r"stopped within a layer; (\d+)"
    layers, seconds = signalled(at, number, code, "blocks\n", kept, program=("-c", BLOCKED))
    assert layers >= 3
    assert seconds < 2  # 0.8, on a busy machine


def test_output_into_a_pipe_that_closes(at: Path) -> None:
    command = f"{shlex.quote(sys.executable)} -m miniquant inspect quantized --layers | head -1"
    run = subprocess.run(["bash", "-c", command], cwd=at, capture_output=True, text=True, check=True)
    assert "Traceback" not in run.stderr
    assert "Exception" not in run.stderr
    assert run.stdout.count("\n") == 1


# Looking and converting


def test_inspect_has_every_layer(at: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["inspect", "quantized", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    report = read_report(at / "quantized")
    assert {layer["name"]: (layer["bits"], layer["group_size"], layer["shape"]) for layer in found["layers"]} == {
        layer["name"]: (layer["bits"], layer["group_size"], layer["shape"]) for layer in report["layers"]
    }
    assert {one["name"] for one in found["others"]} >= {"model.embed_tokens.weight", "model.norm.weight"}
    assert cli.main(["inspect", "quantized", "--layers"]) == 0
    output = capsys.readouterr().out
    for layer in report["layers"]:
        loss = f"{layer['held_out_loss'] / layer['held_out_rtn_loss']:.3f}"
        n, k = layer["shape"]
        assert re.search(rf"^{re.escape(layer['name'])} +int4 +16 +{n} × {k} .* {loss}$", output, re.MULTILINE)
    assert cli.main(["inspect", "quantized"]) == 0
    output = capsys.readouterr().out
    assert re.search(r"^mlp\.down_proj +2 +int4 +16 +32 × 48 ", output, re.MULTILINE)
    assert re.search(r"^model\.embed_tokens\.weight +1 +float32 +300 × 32 ", output, re.MULTILINE)


@pytest.mark.usefixtures("at")
def test_inspect_of_a_damaged_report_says_so(at: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(at / "quantized", at / "copy")
    (at / "copy" / "report.json").write_text("{")
    assert cli.main(["inspect", "copy"]) == 0
    assert "note: copy/report.json" in capsys.readouterr().out


def test_convert_gives_what_quantize_would_have(at: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["quantize", "llama", "ours", *QUICK, "--format", "miniquant"]) == 0
    capsys.readouterr()
    assert cli.main(["convert", "ours", "back", "--format", "compressed-tensors"]) == 0
    assert "written: back (miniquant to compressed-tensors, 14 layers, " in capsys.readouterr().out
    direct, converted = (load_file(at / name / "model.safetensors") for name in ("quantized", "back"))
    assert direct.keys() == converted.keys()
    assert all(torch.equal(direct[name], converted[name]) for name in direct)
    code, line = failed(capsys, "convert", "ours", "back", "--format", "gptq")
    assert code == errors.BAD_INPUT
    assert "back" in line


# Evaluating


def scores_of(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    capsys.readouterr()
    assert cli.main(["evaluate", *arguments, "--json"]) == 0
    scores: dict[str, Any] = json.loads(capsys.readouterr().out)
    return scores


def test_evaluate_is_the_librarys(at: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ("--text", "text.txt", "--tokens", "500", "--sequence-length", "50", "--dtype", "float32")
    scores = scores_of(capsys, "quantized", "--against", "llama", *options)
    reference = transformers.AutoModelForCausalLM.from_pretrained(at / "llama", dtype=torch.float32)
    tokenizer = transformers.AutoTokenizer.from_pretrained(at / "llama")
    data = load_calibration(at / "text.txt", tokenizer, tokens=500, sequence_length=50)
    of_float = miniquant.evaluate(reference, data.batches)
    assert scores["reference_perplexity"]["value"] == pytest.approx(of_float.perplexity.value, rel=1e-6)
    assert scores["predictions"] == of_float.predictions
    for name, values in load_file(at / "quantized" / "model.safetensors").items():  # the quantized layers, another way
        if name.endswith("weight_packed"):
            layer = name.removesuffix(".weight_packed")
            module = reference.get_submodule(layer)
            assert values.shape[0] == module.weight.shape[0]
    assert scores["kl_divergence"]["value"] > 0
    assert 0 < scores["same_top"]["value"] <= 1
    assert scores["kl_divergence"]["standard_error"] > 0


@pytest.mark.usefixtures("at")
def test_evaluate_against_itself(capsys: pytest.CaptureFixture[str]) -> None:
    scores = scores_of(capsys, "llama", "--against", "llama", "--text", "text.txt", "--tokens", "500")
    assert scores["kl_divergence"]["value"] == pytest.approx(0, abs=1e-6)
    assert scores["same_top"]["value"] == 1
    assert scores["perplexity"] == scores["reference_perplexity"]


@pytest.mark.usefixtures("at")
def test_evaluate_prints_a_table(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["evaluate", "quantized", "--against", "llama", "--text", "text.txt", "--tokens", "500"]) == 0
    output = capsys.readouterr().out
    for name in ("perplexity", "perplexity of the other", "KL divergence, nats", "same likeliest token"):
        assert re.search(rf"^{name} +\d", output, re.MULTILINE)


def test_evaluate_compares_encoders(at: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_folder(at / "bert", bert())
    tokenizer = json.loads((at / "bert" / "tokenizer.json").read_text())
    assert len(tokenizer["model"]["vocab"]) > 96  # more than the model has: token ids are checked
    code, line = failed(capsys, "evaluate", "bert", "--text", "text.txt")
    assert code == errors.BAD_INPUT
    assert "--against" in line
    ids = torch.randint(3, 96, (8, 16))
    save_file({"input_ids": ids}, at / "ids.safetensors")
    scores = scores_of(capsys, "bert", "--against", "bert", "--text", "ids.safetensors")
    assert scores["cosine"]["value"] == pytest.approx(1, abs=1e-6)
    assert scores["windows"] == 8


# Speaking


def test_generate_says_what_transformers_does(at: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["generate", "llama", "the quick brown", "--max-tokens", "9", "--dtype", "float32"]) == 0
    captured = capsys.readouterr()
    model = transformers.AutoModelForCausalLM.from_pretrained(at / "llama", dtype=torch.float32)
    tokenizer = transformers.AutoTokenizer.from_pretrained(at / "llama")
    prompt = tokenizer("the quick brown", return_tensors="pt")
    expected = model.generate(prompt.input_ids, max_new_tokens=9, do_sample=False, pad_token_id=0)
    new = expected[0, prompt.input_ids.shape[1] :]
    assert captured.out == tokenizer.decode(new, skip_special_tokens=True) + "\n"
    assert re.search(r"^\d+ tokens in .*a second$", captured.err, re.MULTILINE)


def test_generate_reads_standard_input_and_draws(at: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    def drawn(seed: int) -> str:
        monkeypatch.setattr(sys, "stdin", io.StringIO("the quick"))
        options = ["--temperature", "2", "--seed", str(seed), "--max-tokens", "12"]
        assert cli.main(["generate", str(at / "quantized"), "-", *options]) == 0
        output: str = capsys.readouterr().out
        return output

    assert drawn(1) == drawn(1) != drawn(2)


def test_generate_uses_the_chat_template(at: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(at / "llama", at / "chat")
    template = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}assistant:"
    (at / "chat" / "chat_template.jinja").write_text(template)
    spoken = []
    for arguments in (
        ["chat", "hello", "--system", "be brief"],
        ["chat", "system: be brief\nuser: hello\nassistant:", "--no-chat"],
    ):
        assert cli.main(["generate", *arguments, "--max-tokens", "8"]) == 0
        spoken.append(capsys.readouterr().out)
    assert spoken[0] == spoken[1]


def test_generate_needs_a_language_model(at: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_folder(at / "bert", bert())
    code, line = failed(capsys, "generate", "bert", "hello")
    assert code == errors.BAD_INPUT
    assert "causal language model, but got a BertForMaskedLM" in line


# The lab


@pytest.fixture
def driver(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A program in the driver's place, that prints its arguments."""
    program = tmp_path / "bin" / "gptq_toy"
    program.parent.mkdir()
    program.write_text(
        '#!/bin/sh\nprintf "%s;" "$@"\n[ "$1" = --fail ] && exit 3\n[ "$1" = --killed ] && kill -9 $$\nexit 0\n'
    )
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", str(program.parent), prepend=os.pathsep)
    monkeypatch.setattr(lab, "_CLONE", tmp_path)
    monkeypatch.setattr(lab.find_driver, "__defaults__", (tmp_path,))
    return program


@pytest.mark.parametrize(
    ("arguments", "given", "code"),
    [
        (["--preset", "best", "--check"], "--preset;best;--check;", 0),
        (["--", "--help"], "--help;", 0),
        (["--fail"], "--fail;", 3),
        (["--killed"], "--killed;", 137),
        (["-x", "a b"], "-x;a b;", 0),
    ],
)
@pytest.mark.usefixtures("driver")
def test_lab_runs_the_driver(arguments: list[str], given: str, code: int, capfd: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["lab", *arguments]) == code
    assert capfd.readouterr().out == given


def test_lab_takes_the_clones_driver_first(driver: Path, tmp_path: Path) -> None:
    assert lab.find_driver(tmp_path) == driver
    built = tmp_path / "build" / "release" / "bin" / "gptq_toy"
    built.parent.mkdir(parents=True)
    shutil.copy(driver, built)
    assert lab.find_driver(tmp_path) == driver  # a folder that happens to have that path is no clone
    (tmp_path / "CMakeLists.txt").touch()
    assert lab.find_driver(tmp_path) == built


def test_lab_without_a_driver(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(lab.find_driver, "__defaults__", (tmp_path,))
    code, line = failed(capsys, "lab")
    assert code == errors.BAD_INPUT
    assert "scripts/setup" in line


# Hostile and damaged files


def changed_config(**changes: Any) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        for key, value in changes.items():
            config[key] = value
        (folder / "config.json").write_text(json.dumps(config))

    return damage


def written(name: str, content: bytes) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        (folder / name).write_bytes(content)

    return damage


def removed(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


def header(entries: object, data: bytes = b"") -> bytes:
    text = json.dumps(entries).encode()
    return struct.pack("<Q", len(text)) + text + data


def changed_tensors(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")

    return damage


def cut(name: str, part: float) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        content = (folder / name).read_bytes()
        (folder / name).write_bytes(content[: int(part * len(content))])

    return damage


def only_a_pickle(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    torch.save({}, folder / "pytorch_model.bin")


ENTRY = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
FLOAT_DAMAGES: dict[str, Callable[[Path], None]] = {
    "config.json: empty": written("config.json", b""),
    "config.json: cut": cut("config.json", 0.5),
    "config.json: a list": written("config.json", b"[]"),
    "config.json: a number": written("config.json", b"1"),
    "config.json: no UTF-8": written("config.json", b"\xff\xfe{}"),
    "config.json: deep": written("config.json", b'{"a":' + b"[" * 50_000 + b"]" * 50_000 + b"}"),
    "config.json: missing": removed("config.json"),
    "config.json: nothing in it": written("config.json", b"{}"),
    "config.json: unknown model": changed_config(model_type="nope", architectures=["NopeForCausalLM"]),
    "config.json: model_type of 5": changed_config(model_type=5, architectures=None),
    "config.json: other width": changed_config(hidden_size=64),
    "config.json: width as text": changed_config(hidden_size="wide"),
    "config.json: negative width": changed_config(hidden_size=-32),
    "config.json: more blocks": changed_config(num_hidden_layers=3),
    "config.json: quantized": changed_config(quantization_config={"quant_method": "awq"}),
    "config.json: quantized by nothing": changed_config(quantization_config=[]),
    "config.json: code": changed_config(model_type="own", architectures=["Own"], auto_map={"AutoModel": "own.Own"}),
    "model.safetensors: empty": written("model.safetensors", b""),
    "model.safetensors: missing": removed("model.safetensors"),
    "model.safetensors: only a pickle": only_a_pickle,
    "model.safetensors: cut header": cut("model.safetensors", 0.001),
    "model.safetensors: cut data": cut("model.safetensors", 0.9),
    "model.safetensors: huge header": written("model.safetensors", struct.pack("<Q", 2**62) + b"{}"),
    "model.safetensors: no JSON": written("model.safetensors", struct.pack("<Q", 4) + b"{{{{"),
    "model.safetensors: a list": written("model.safetensors", header([])),
    "model.safetensors: unknown dtype": written(
        "model.safetensors", header({"a": {**ENTRY, "dtype": "F7"}}, b"\0" * 8)
    ),
    "model.safetensors: past the end": written("model.safetensors", header({"a": ENTRY}, b"\0" * 4)),
    "model.safetensors: overlap": written("model.safetensors", header({"a": ENTRY, "b": ENTRY}, b"\0" * 8)),
    "model.safetensors: negative shape": written(
        "model.safetensors", header({"a": {**ENTRY, "shape": [-2]}}, b"\0" * 8)
    ),
    "model.safetensors: Git LFS": written("model.safetensors", b"version https://git-lfs.github.com/spec/v1\noid x\n"),
    "model.safetensors: a tensor less": changed_tensors(lambda t: t.pop("model.layers.1.mlp.up_proj.weight")),
    "model.safetensors: other shape": changed_tensors(
        lambda t: t.update({"model.layers.1.mlp.up_proj.weight": torch.zeros(3, 3)})
    ),
    "index: no JSON": written("model.safetensors.index.json", b"{"),
    "index: missing shard": written("model.safetensors.index.json", b'{"weight_map": {"a": "model-1.safetensors"}}'),
    "index: outside": written("model.safetensors.index.json", b'{"weight_map": {"a": "../model.safetensors"}}'),
    "tokenizer.json: cut": cut("tokenizer.json", 0.5),
    "tokenizer.json: empty": written("tokenizer.json", b"{}"),
    "tokenizer_config.json: a list": written("tokenizer_config.json", b"[]"),
}


def damaged_copy(folder: Path, copy: Path, damage: Callable[[Path], None]) -> Path:
    shutil.copytree(folder.resolve(), copy)
    damage(copy)
    return copy


@pytest.mark.parametrize("name", FLOAT_DAMAGES)
def test_damaged_model(at: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    folder = damaged_copy(at / "llama", at / "damaged", FLOAT_DAMAGES[name])
    if name.startswith("index"):
        (folder / "model.safetensors").unlink()
    for arguments in (
        ("quantize", folder, "out", *QUICK),
        ("evaluate", folder, "--text", "text.txt", "--tokens", "64"),
    ):
        code, line = failed(capsys, *arguments)
        assert code == errors.BAD_INPUT, (arguments[0], line)
        assert "damaged" in line, (arguments[0], line)
    assert not (at / "out").exists()
    assert not (at / "out.partial").exists()


RECIPES: dict[str, tuple[str, bytes]] = {
    "no TOML": ("recipe.toml", b"[defaults\nbits = 4"),
    "no JSON": ("recipe.json", b'{"defaults": {"bits": 4}'),
    "no recipe": ("recipe.json", b"[4]"),
    "unknown key": ("recipe.toml", b"[defaults]\nbit = 4\n"),
    "9 bits": ("recipe.toml", b"[defaults]\nbits = 9\n"),
    "bits as text": ("recipe.json", b'{"defaults": {"bits": "4"}}'),
    "no pattern": ("recipe.toml", b"[[rules]]\nbits = 4\n"),
    "bad expression": ("recipe.toml", b"[[rules]]\npattern = 're:('\n"),
    "matches nothing": ("recipe.toml", b"[[rules]]\npattern = 'nothing.*'\nbits = 3\n"),
    "twice the same": ("recipe.toml", b"[[rules]]\npattern = '*.q_proj'\n[[rules]]\npattern = '*.q_proj'\nbits = 3\n"),
    "all skipped": ("recipe.toml", b"[[rules]]\npattern = '*'\nskip = true\n"),
    "no UTF-8": ("recipe.toml", b"# \xff\n"),
    "deep": ("recipe.json", b"[" * 50_000),
    "other ending": ("recipe.yaml", b"bits: 4\n"),
    "NaN": ("recipe.json", b'{"defaults": {"ridge": NaN}}'),
    "key twice": ("recipe.json", b'{"defaults": {}, "defaults": {}}'),
}


@pytest.mark.parametrize("name", RECIPES)
def test_damaged_recipe(at: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    file, content = RECIPES[name]
    (at / file).write_bytes(content)
    code, line = failed(capsys, "quantize", "llama", "out", *QUICK[:-2], "--recipe", file)
    assert code == errors.BAD_INPUT
    assert file in line or "rule 1" in line or "rule 2" in line or "skips all" in line
    assert not (at / "out").exists()


CALIBRATIONS: dict[str, tuple[str, bytes]] = {
    "no JSON": ("data.jsonl", b'{"text": "a"}\n{"text": \n'),
    "a list": ("data.jsonl", b"[1]\n"),
    "no text": ("data.jsonl", b'{"content": "a"}\n'),
    "both": ("data.jsonl", b'{"text": "a", "messages": []}\n'),
    "text of 5": ("data.jsonl", b'{"text": 5}\n'),
    "messages without a template": ("data.jsonl", b'{"messages": [{"role": "user", "content": "a"}]}\n'),
    "deep": ("data.jsonl", b'{"text": ' + b"[" * 50_000 + b"]" * 50_000 + b"}\n"),
    "no UTF-8": ("data.jsonl", b'{"text": "\xff"}\n'),
    "empty": ("data.jsonl", b""),
    "surrogate": ("data.jsonl", b'{"text": "\\ud800"}\n'),
    "empty text": ("data.txt", b"  \n"),
    "binary": ("data.txt", b"a\0b"),
    "a pickle": ("data.pt", b"\x80\x04."),
    "unknown kind": ("data.docx", b"a"),
    "no Parquet": ("data.parquet", b"PAR1"),
    "no array": ("data.npy", b"\x93NUMPY"),
    "no safetensors": ("data.safetensors", b"\0" * 4),
    "no ids": ("data.safetensors", header({"a": ENTRY}, b"\0" * 8)),
    "ids of floats": ("data.safetensors", header({"input_ids": ENTRY}, b"\0" * 8)),
    "ids too large": ("data.safetensors", header({"input_ids": {**ENTRY, "dtype": "I32"}}, b"\xff\xff\xff\x7f" * 2)),
}


@pytest.mark.parametrize("name", CALIBRATIONS)
def test_damaged_calibration(at: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    file, content = CALIBRATIONS[name]
    (at / file).write_bytes(content)
    for arguments in (
        ("quantize", "llama", "out", *QUICK, "--calibration", file),
        ("evaluate", "llama", "--text", file),
    ):
        code, line = failed(capsys, *arguments)
        assert code == errors.BAD_INPUT
        assert file in line
    assert not (at / "out").exists()


GGUF_HEADER = b"GGUF" + struct.pack("<IQQ", 3, 0, 0)
GGUFS: dict[str, bytes] = {
    "empty": b"",
    "other magic": b"GGML" + b"\0" * 60,
    "no tensors": GGUF_HEADER,
    "cut": GGUF_HEADER[:10],
    "version 9": b"GGUF" + struct.pack("<IQQ", 9, 0, 0),
    "many tensors": b"GGUF" + struct.pack("<IQQ", 3, 2**60, 0),
    "many entries": b"GGUF" + struct.pack("<IQQ", 3, 0, 2**60),
    "long key": b"GGUF" + struct.pack("<IQQQ", 3, 0, 1, 2**60),
    "unknown type": b"GGUF" + struct.pack("<IQQQ1sI", 3, 0, 1, 1, b"a", 99),
    "long array": b"GGUF" + struct.pack("<IQQQ1sIIQ", 3, 0, 1, 1, b"a", 9, 4, 2**60),
    "no UTF-8": b"GGUF" + struct.pack("<IQQQ1sIB", 3, 0, 1, 1, b"\xff", 0, 1),
}


@pytest.mark.parametrize("name", GGUFS)
def test_damaged_gguf(at: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("gguf")
    (at / "damaged.gguf").write_bytes(GGUFS[name])
    commands = [("evaluate", "damaged.gguf", "--text", "text.txt"), ("generate", "damaged.gguf", "hello")]
    if name != "no tensors":
        commands.append(("inspect", "damaged.gguf"))
    for arguments in commands:
        code, line = failed(capsys, *arguments)
        assert code == errors.BAD_INPUT
        assert "damaged.gguf" in line


QUANTIZED_DAMAGES: dict[str, Callable[[Path], None]] = {
    "unknown method": changed_config(quantization_config={"quant_method": "nope"}),
    "no object": changed_config(quantization_config=5),
    "other method": changed_config(quantization_config={"quant_method": "gptq", "bits": 4, "group_size": 16}),
    "nothing in it": changed_config(quantization_config={}),
    "cut data": cut("model.safetensors", 0.9),
    "a tensor less": changed_tensors(lambda t: t.pop("model.layers.1.mlp.up_proj.weight_scale")),
    "scales of another shape": changed_tensors(
        lambda t: t.update({"model.layers.1.mlp.up_proj.weight_scale": torch.zeros(3, 3)})
    ),
}


@pytest.mark.parametrize("name", QUANTIZED_DAMAGES)
def test_damaged_quantized_model(at: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    folder = damaged_copy(at / "quantized", at / "damaged", QUANTIZED_DAMAGES[name])
    for arguments in (
        ("inspect", folder),
        ("evaluate", folder, "--text", "text.txt"),
        ("convert", folder, "out", "--format", "miniquant"),
    ):
        code, line = failed(capsys, *arguments)
        assert code == errors.BAD_INPUT, (arguments[0], line)
        assert "damaged" in line or "layer" in line, (arguments[0], line)
    assert not (at / "out").exists()


def test_nothing_takes_long_to_refuse(at: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A config that asks for a billion blocks is not built."""
    folder = damaged_copy(at / "llama", at / "damaged", changed_config(num_hidden_layers=10**9))
    start = time.perf_counter()
    code, line = failed(capsys, "quantize", folder, "out", *QUICK)
    assert code == errors.BAD_INPUT
    assert "damaged" in line
    assert time.perf_counter() - start < 30
