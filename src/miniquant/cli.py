"""The command line: ``miniquant`` and ``python -m miniquant``.

This module has the commands' options and help, and turns errors into one line and an exit code. What commands do is in
:mod:`miniquant.commands`, which is imported when one runs: it loads torch, which takes seconds.
"""

import inspect as inspection
import logging
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from miniquant.errors import BAD_INPUT, DONE, FAILED, INTERRUPTED, code_of, line_of

Preset = Literal["best", "fast", "plain"]
Format = Literal["compressed-tensors", "gptq", "gptq_v2", "gguf", "miniquant"]
TokenWeights = Literal["uniform", "norm", "position", "norm+position", "gradient"]
SuperblockKind = Literal["Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K"]
Unseen = Literal["error", "siblings", "rtn"]
OtherType = Literal["F16", "F32", "BF16", "Q8_0"]
Dtype = Literal["auto", "float32", "bfloat16", "float16", "float64"]

# Options of the program that may stand anywhere, as people add them to a line that failed.
_ANYWHERE = ("--debug", "--verbose", "-v")

EXIT_CODES = """\
[bold]Exit codes[/bold]
  0    done
  1    failed while working: a layer, the disk, memory
  2    nothing was done: bad usage, or input that is missing or damaged
  130  stopped by Ctrl-C (143: SIGTERM); quantize keeps finished layers"""

_PURPOSE = """\
Quantizes language models and other networks to 2 to 8 bits with GPTQ.

miniquant COMMAND --help has examples. --debug and --verbose may stand anywhere."""

app = typer.Typer(
    name="miniquant",
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

_MODEL, _RECIPE, _TOKENS, _RUN, _OUTPUT = "Model", "What is done to layers", "Calibration", "The run", "Output"

ModelDir = Annotated[
    Path, typer.Argument(metavar="MODEL_DIR", show_default=False, help="Folder of a model as transformers saves it.")
]
GroupSize = Annotated[
    int | None,
    typer.Option(rich_help_panel=_RECIPE, show_default="64", help="Columns that share a scale; -1: one per row."),
]
Skip = Annotated[
    list[str] | None,
    typer.Option(
        metavar="PATTERN",
        rich_help_panel=_RECIPE,
        show_default=False,
        help="Leave layers alone: a glob over their names, or re: and a regular expression. May be repeated.",
    ),
]
CalibrationFiles = Annotated[
    list[Path] | None,
    typer.Option(
        metavar="FILE|DIR",
        rich_help_panel=_TOKENS,
        show_default="a text that ships with miniquant",
        help="Text (.txt, .md), JSONL or Parquet with text or messages, a data set's folder, token ids (.safetensors, "
        ".npy). May be repeated.",
    ),
]
Device = Annotated[
    str,
    typer.Option("--device", metavar="DEVICE", rich_help_panel=_RUN, help="Where the model runs: cpu, cuda, cuda:1."),
]
Threads = Annotated[
    int | None,
    typer.Option("--threads", min=1, metavar="N", rich_help_panel=_RUN, show_default="torch's", help="Threads to use."),
]
Trust = Annotated[
    bool,
    typer.Option(
        "--trust-remote-code",
        rich_help_panel=_RUN,
        help="Run the Python code that some model folders bring along. Without it none is run.",
    ),
]
Overwrite = Annotated[
    bool, typer.Option("--overwrite", rich_help_panel=_OUTPUT, help="Replace a model that is there already.")
]
ShardSize = Annotated[
    float,
    typer.Option("--max-shard-size", min=0.001, metavar="GB", rich_help_panel=_OUTPUT, help="Of a file of weights."),
]
Pre = Annotated[
    str | None,
    typer.Option(
        "--gguf-pre",
        metavar="NAME",
        rich_help_panel=_OUTPUT,
        show_default=False,
        help="GGUF: llama.cpp's name for how the tokenizer splits texts, where it cannot be told.",
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def _flowing(text: str) -> str:
    """Help whose paragraphs have no line breaks of their own, but for examples, whose lines are indented."""
    paragraphs = inspection.cleandoc(text).split("\n\n")
    return "\n\n".join(one if "\n  " in one else one.replace("\n", " ") for one in paragraphs)


def _command(**settings: Any) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Makes a command of a function, with its docstring as help."""
    return lambda function: app.command(help=_flowing(function.__doc__ or ""), **settings)(function)


def _commands() -> Any:
    """What commands do."""
    from miniquant._library import load_library  # noqa: PLC0415  (loads torch)

    load_library()
    from miniquant import commands  # noqa: PLC0415

    return commands


def _version(wanted: bool) -> None:  # noqa: FBT001  (typer's way)
    """Prints versions and ends."""
    if wanted:
        _commands().print_versions()
        raise typer.Exit


@app.callback(help=f"{_PURPOSE}\n\n{EXIT_CODES}")
def program(
    *,
    version: Annotated[  # noqa: ARG001  (its callback does all)
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print versions and exit.")
    ] = False,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Also print what is logged.")] = False,
    debug: Annotated[  # noqa: ARG001  (main looks at it)
        bool, typer.Option("--debug", help="Print the traceback of an error.")
    ] = False,
) -> None:
    """What all commands have in common."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # folders and files are all that is read
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    logging.getLogger("miniquant").setLevel(logging.INFO if verbose else logging.WARNING)


@_command()
def quantize(
    model_dir: ModelDir,
    output_dir: Annotated[
        Path, typer.Argument(metavar="OUTPUT_DIR", show_default=False, help="Folder to write; new or empty.")
    ],
    *,
    bits: Annotated[
        int | None, typer.Option(min=2, max=8, rich_help_panel=_RECIPE, show_default="4", help="Of a weight.")
    ] = None,
    group_size: GroupSize = None,
    symmetric: Annotated[
        bool | None,
        typer.Option(
            "--symmetric/--asymmetric",
            rich_help_panel=_RECIPE,
            show_default="symmetric",
            help="Whether the grid has no zero points. Asymmetric loses less at 4 bits.",
        ),
    ] = None,
    superblocks: Annotated[
        SuperblockKind | None,
        typer.Option(
            rich_help_panel=_RECIPE,
            show_default=False,
            help="A type of llama.cpp with two levels of scales, in place of bits and group size; with --format gguf, "
            "for columns in multiples of 256.",
        ),
    ] = None,
    preset: Annotated[
        Preset | None,
        typer.Option(
            rich_help_panel=_RECIPE,
            show_default="best",
            help="best: least loss; fast: half way there in a third of the time; plain: the solver as published.",
        ),
    ] = None,
    ridge: Annotated[
        str | None,
        typer.Option(
            metavar="auto|NUMBER",
            rich_help_panel=_RECIPE,
            show_default="auto",
            help="Added to the Hessian's diagonal, relative to its mean; auto finds it in the tokens.",
        ),
    ] = None,
    token_weights: Annotated[
        TokenWeights | None,
        typer.Option(
            rich_help_panel=_RECIPE,
            show_default="norm+position",
            help="How much a token counts: norm: by 1 / |x|^2 of a layer's input x; position: the first of a text "
            "more, because all later ones attend to it; gradient: both, and by what the model's predictions depend on, "
            "with a backward pass.",
        ),
    ] = None,
    correction: Annotated[
        float | None,
        typer.Option(
            min=0,
            max=1,
            rich_help_panel=_RECIPE,
            show_default="0.5 with best, else 0",
            help="Which part of the errors that earlier layers leave in a layer's inputs it makes up for; above 0 it "
            "takes a second forward pass.",
        ),
    ] = None,
    stream_correction: Annotated[
        float | None,
        typer.Option(
            min=0,
            max=1,
            rich_help_panel=_RECIPE,
            show_default="0.4 with best and a correction, else 0",
            help="Which part of the errors of the residual stream a layer that writes to it makes up for; above 0 it "
            "takes a second forward pass.",
        ),
    ] = None,
    rotation: Annotated[
        bool | None,
        typer.Option(
            "--rotation/--no-rotation",
            rich_help_panel=_RECIPE,
            show_default="no",
            help="Turn the residual stream and the heads' values first, which changes no prediction of the model, and "
            "loses less; tied output embeddings become a matrix of their own. For models as Llama and Qwen.",
        ),
    ] = None,
    unseen: Annotated[
        Unseen | None,
        typer.Option(
            rich_help_panel=_RECIPE,
            show_default="error",
            help="What happens to a layer that saw too few tokens, as rare experts do: error stops; siblings takes the "
            "tokens of the other experts; rtn rounds to nearest.",
        ),
    ] = None,
    min_tokens: Annotated[
        int | None,
        typer.Option(
            min=1, rich_help_panel=_RECIPE, show_default="columns / 8", help="How many tokens a layer has to see."
        ),
    ] = None,
    skip: Skip = None,
    rule: Annotated[
        list[str] | None,
        typer.Option(
            metavar="'PATTERN KEY=VALUE...'",
            rich_help_panel=_RECIPE,
            show_default=False,
            help="Options of some layers, as '*.down_proj bits=8 group_size=32'. May be repeated; the first that "
            "matches counts.",
        ),
    ] = None,
    recipe: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            rich_help_panel=_RECIPE,
            show_default=False,
            help="All of this from a TOML or JSON file. Options given here replace the file's defaults; --skip and "
            "--rule come before its rules.",
        ),
    ] = None,
    output_embeddings: Annotated[
        bool, typer.Option("--output-embeddings", rich_help_panel=_RECIPE, help="Also quantize lm_head.")
    ] = False,
    calibration: CalibrationFiles = None,
    tokens: Annotated[int, typer.Option(min=1, rich_help_panel=_TOKENS, help="To calibrate on.")] = 32768,
    sequence_length: Annotated[
        int, typer.Option(min=1, rich_help_panel=_TOKENS, help="Tokens of a window; at most what the model takes.")
    ] = 2048,
    held_out: Annotated[
        float | None,
        typer.Option(
            min=0.0,
            max=0.25,
            rich_help_panel=_TOKENS,
            show_default="0.05",
            help="Part of tokens kept to judge layers by.",
        ),
    ] = None,
    format: Annotated[  # noqa: A002  (the option's name)
        Format | None,
        typer.Option(
            rich_help_panel=_OUTPUT,
            show_default="compressed-tensors",
            help="compressed-tensors: transformers and vLLM; gptq, gptq_v2: GPTQ readers; gguf: llama.cpp; miniquant: "
            "keeps everything.",
        ),
    ] = None,
    max_shard_size: ShardSize = 5.0,
    gguf_other: Annotated[
        OtherType | None,
        typer.Option(
            rich_help_panel=_OUTPUT, show_default="F16", help="GGUF: the type of matrices that are not quantized."
        ),
    ] = None,
    gguf_exact: Annotated[
        bool,
        typer.Option(
            "--gguf-exact", rich_help_panel=_OUTPUT, help="GGUF: wider types where a 4- or 5-bit one would round."
        ),
    ] = False,
    gguf_pre: Pre = None,
    overwrite: Overwrite = False,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run",
            rich_help_panel=_RUN,
            help="Print what would be done, with sizes, and time and memory from a short measurement; leave no file.",
        ),
    ] = False,
    resume: Annotated[
        bool, typer.Option("--resume", rich_help_panel=_RUN, help="Go on from the last finished layer.")
    ] = False,
    dtype: Annotated[
        Dtype, typer.Option(rich_help_panel=_RUN, help="In which the model runs; auto: what is fast here.")
    ] = "auto",
    device: Device = "cpu",
    threads: Threads = None,
    whole_model: Annotated[
        bool,
        typer.Option(
            "--whole-model", rich_help_panel=_RUN, help="Hold all of the model in memory, not a block at a time."
        ),
    ] = False,
    trust_remote_code: Trust = False,
) -> None:
    """Quantize the model of a folder, and write a folder that engines load.

    Every layer is quantized on the inputs that the quantized layers before it give, in one pass over the calibration
    tokens. A block of the model is in memory at a time.

    [bold]Examples[/bold]
      miniquant quantize Llama-3.2-1B Llama-3.2-1B-4bit
      miniquant quantize Llama-3.2-1B out --calibration chats.jsonl --tokens 65536
      miniquant quantize Llama-3.2-1B out --bits 3 --rule '*.down_proj bits=4' --skip '*.layers.0.*'
      miniquant quantize Llama-3.2-1B out --format gguf --superblocks Q4_K --rule '*.down_proj superblocks=Q6_K'
      miniquant quantize Llama-3.2-1B out --dry-run      [dim]what it will do, cost and need[/dim]
      miniquant quantize Llama-3.2-1B out --resume       [dim]after Ctrl-C, kill -9 or a full disk[/dim]
    """
    commands = _commands()
    commands.quantize(
        model_dir,
        output_dir,
        recipe=commands.Asked(
            file=recipe,
            stated={
                "bits": bits,
                "group_size": group_size,
                "symmetric": symmetric,
                "superblocks": superblocks,
                "preset": preset,
                "ridge": ridge,
                "token_weights": token_weights,
                "correction": correction,
                "stream_correction": stream_correction,
                "unseen": unseen,
                "min_tokens": min_tokens,
            },
            skip=skip or [],
            rules=rule or [],
            rotation=rotation,
        ).recipe(),
        form=format,
        calibration=calibration or None,
        tokens=tokens,
        sequence_length=sequence_length,
        held_out=held_out,
        output_embeddings=output_embeddings,
        dtype=dtype,
        device=device,
        threads=threads,
        resume=resume,
        overwrite=overwrite,
        max_shard_bytes=round(1e9 * max_shard_size),
        lazy=not whole_model,
        trust_remote_code=trust_remote_code,
        gguf={"other": gguf_other, "exact": gguf_exact or None, "pre": gguf_pre},
        dry_run=dry_run,
    )


@_command()
def evaluate(
    model_dir: Annotated[
        Path,
        typer.Argument(
            metavar="MODEL_DIR", show_default=False, help="Folder of a model, quantized or not; or a GGUF file."
        ),
    ],
    *,
    text: Annotated[
        list[Path],
        typer.Option(
            "--text",
            metavar="FILE",
            show_default=False,
            help="What to measure on, of the kinds that quantize --calibration takes. May be repeated.",
        ),
    ],
    against: Annotated[
        Path | None,
        typer.Option(metavar="FLOAT_DIR", show_default=False, help="The model that it was made from; or a GGUF file."),
    ] = None,
    tokens: Annotated[int, typer.Option(min=1, help="To measure on.")] = 32768,
    sequence_length: Annotated[
        int, typer.Option(min=2, help="Tokens of a window; at most what the model takes.")
    ] = 2048,
    dtype: Annotated[Dtype, typer.Option(help="In which models compute; auto: as they are stored.")] = "auto",
    json: Json = False,
    device: Device = "cpu",
    threads: Threads = None,
    trust_remote_code: Trust = False,
) -> None:
    """Measure a model on a text: perplexity, and how near it is to the model that it was made from.

    Against the float model: the KL divergence of its predictions, and the share of tokens of which both find the same
    likeliest. Models without a language model's head are compared by the cosine of their embeddings. All with standard
    errors over windows.

    [bold]Examples[/bold]
      miniquant evaluate Llama-3.2-1B-4bit --text wikitext.txt
      miniquant evaluate Llama-3.2-1B-4bit --against Llama-3.2-1B --text wikitext.txt --tokens 16384
      miniquant evaluate Llama-3.2-1B-4bit --against Llama-3.2-1B --text chats.jsonl --json > scores.json
    """
    _commands().evaluate(
        model_dir,
        text,
        against=against,
        tokens=tokens,
        sequence_length=sequence_length,
        dtype=dtype,
        device=device,
        threads=threads,
        trust_remote_code=trust_remote_code,
        as_json=json,
    )


@_command()
def bits(
    model_dir: ModelDir,
    recipe_file: Annotated[
        Path, typer.Argument(metavar="RECIPE.json", show_default=False, help="Recipe to write, for quantize --recipe.")
    ],
    *,
    average: Annotated[
        float, typer.Option(min=2, max=8, help="Bits of a weight on average, without scales.", rich_help_panel=_RECIPE)
    ] = 4.0,
    widths: Annotated[
        str, typer.Option(metavar="BITS,...", rich_help_panel=_RECIPE, help="To choose from.")
    ] = "2,3,4,5,6,8",
    group_size: GroupSize = None,
    recipe: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            rich_help_panel=_RECIPE,
            show_default=False,
            help="TOML or JSON file with all else; bits that its rules state are replaced.",
        ),
    ] = None,
    skip: Skip = None,
    calibration: CalibrationFiles = None,
    tokens: Annotated[int, typer.Option(min=1, rich_help_panel=_TOKENS, help="To measure on.")] = 8192,
    sequence_length: Annotated[int, typer.Option(min=2, rich_help_panel=_TOKENS, help="Tokens of a window.")] = 512,
    plot: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE.png",
            rich_help_panel=_OUTPUT,
            show_default=False,
            help="Also draw what every average costs (needs matplotlib).",
        ),
    ] = None,
    dtype: Annotated[Dtype, typer.Option(help="In which the model computes; auto: as it is stored.")] = "auto",
    device: Device = "cpu",
    threads: Threads = None,
    trust_remote_code: Trust = False,
) -> None:
    """Choose the bits of each layer of a language model, for an average, by what its error does to the predictions.

    Writes a recipe for quantize --recipe, and prints what other averages would cost. One backward pass over a few
    windows says how much each layer matters; the model is in memory whole. Layers that engines fuse (q, k and v; gate
    and up) get the same bits.

    [bold]Examples[/bold]
      miniquant bits Llama-3.2-1B bits.json --average 4 --calibration wikitext.txt --plot bits.png
      miniquant bits Llama-3.2-1B bits.json --average 3.5 --widths 3,4    [dim]for engines that know few widths[/dim]
    """
    commands = _commands()
    commands.choose_bits(
        model_dir,
        recipe_file,
        average=average,
        widths=commands.parse_widths(widths),
        recipe=commands.Asked(file=recipe, stated={"group_size": group_size}, skip=skip or [], rules=[]).recipe(),
        calibration=calibration or None,
        tokens=tokens,
        sequence_length=sequence_length,
        dtype=dtype,
        device=device,
        threads=threads,
        trust_remote_code=trust_remote_code,
        plot=plot,
    )


@_command()
def inspect(
    path: Annotated[
        Path,
        typer.Argument(metavar="DIR|FILE", show_default=False, help="Folder of a quantized model, or a GGUF file."),
    ],
    *,
    layers: Annotated[bool, typer.Option("--layers", help="A row for each layer, not for each kind.")] = False,
    json: Json = False,
) -> None:
    """Show what a quantized model has: bits, groups, bytes and losses of layers, and what is not quantized.

    [bold]Examples[/bold]
      miniquant inspect Llama-3.2-1B-4bit
      miniquant inspect Llama-3.2-1B-4bit --layers | grep down_proj
      miniquant inspect Llama-3.2-1B-Q4_0.gguf --json
    """
    _commands().inspect(path, every_layer=layers, as_json=json)


@_command()
def convert(
    source_dir: Annotated[Path, typer.Argument(metavar="DIR", show_default=False, help="Folder of a quantized model.")],
    output_dir: Annotated[
        Path, typer.Argument(metavar="OUTPUT_DIR", show_default=False, help="Folder to write; new or empty.")
    ],
    *,
    format: Annotated[Format, typer.Option(show_default=False, help="Of the output.")],  # noqa: A002
    max_shard_size: ShardSize = 5.0,
    gguf_pre: Pre = None,
    overwrite: Overwrite = False,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", rich_help_panel=_OUTPUT, help="Also copy the folder's Python files.")
    ] = False,
) -> None:
    """Take a quantized model from one format to another, without changing a weight.

    What the other format cannot hold exactly is refused, with the layer's name.

    [bold]Examples[/bold]
      miniquant convert Llama-3.2-1B-4bit Llama-3.2-1B-gptq --format gptq
      miniquant convert Llama-3.2-1B-4bit Llama-3.2-1B-gguf --format gguf
    """
    _commands().convert(
        source_dir,
        output_dir,
        format,
        overwrite=overwrite,
        max_shard_bytes=round(1e9 * max_shard_size),
        pre=gguf_pre,
        code=trust_remote_code,
    )


@_command()
def generate(
    model_dir: Annotated[
        Path,
        typer.Argument(
            metavar="MODEL_DIR", show_default=False, help="Folder of a model, quantized or not; or a GGUF file."
        ),
    ],
    prompt: Annotated[
        str, typer.Argument(metavar="PROMPT", show_default=False, help="A text; - reads it from standard input.")
    ],
    *,
    max_tokens: Annotated[int, typer.Option(min=1, help="To generate at most.")] = 128,
    temperature: Annotated[
        float, typer.Option(min=0.0, help="0 takes the likeliest token each time; higher is more varied.")
    ] = 0.0,
    top_p: Annotated[
        float, typer.Option(min=0.0, max=1.0, help="Draw from the likeliest tokens that add up to this probability.")
    ] = 1.0,
    seed: Annotated[int, typer.Option(min=0, help="Of the draws.")] = 0,
    chat: Annotated[
        bool | None,
        typer.Option(
            "--chat/--no-chat",
            show_default="where the tokenizer has a chat template",
            help="Whether the prompt is a message to answer, or a text to go on with.",
        ),
    ] = None,
    system: Annotated[
        str | None, typer.Option(metavar="TEXT", show_default=False, help="A system message before the prompt.")
    ] = None,
    dtype: Annotated[Dtype, typer.Option(help="In which the model computes; auto: as it is stored.")] = "auto",
    device: Device = "cpu",
    threads: Threads = None,
    trust_remote_code: Trust = False,
) -> None:
    """Let a model speak: the text goes to standard output as it comes.

    [bold]Examples[/bold]
      miniquant generate Llama-3.2-1B-4bit "Why is the sky blue?"
      miniquant generate Llama-3.2-1B-4bit "Once upon a time" --no-chat --temperature 0.8
      cat question.txt | miniquant generate Llama-3.2-1B-4bit -
    """
    _commands().generate(
        model_dir,
        prompt,
        max_tokens=max_tokens,
        temperature=temperature,
        top_p=top_p,
        seed=seed,
        chat=chat,
        system=system,
        dtype=dtype,
        device=device,
        threads=threads,
        trust_remote_code=trust_remote_code,
    )


@_command(context_settings={"ignore_unknown_options": True, "allow_extra_args": True})
def lab(context: typer.Context) -> None:
    """Compare RTN and GPTQ on one layer: runs the driver gptq_toy with the arguments that follow.

    The driver is a program of its own, which scripts/setup builds. Its exit code is this command's.

    [bold]Examples[/bold]
      miniquant lab                                  [dim]the lab's layer[/dim]
      miniquant lab --preset best --check
      miniquant lab -- --help                        [dim]the driver's options[/dim]
    """
    from miniquant.lab import run_driver  # noqa: PLC0415

    code = run_driver(context.args)
    if code:
        raise typer.Exit(code)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line and gives its exit code; an error is one line on standard error."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    end = given.index("--") if "--" in given else len(given)
    moved = [argument for argument in given[:end] if argument in _ANYWHERE]
    given = [*moved, *(argument for argument in given[:end] if argument not in _ANYWHERE), *given[end:]]
    command: Any = typer.main.get_command(app)
    log = logging.getLogger("miniquant")
    before = log.level, log.handlers[:]
    try:
        code = command.main(given, prog_name="miniquant", standalone_mode=False)
    except SystemExit as error:  # of completion
        return error.code if isinstance(error.code, int) else FAILED
    except BrokenPipeError:
        # Whoever read the output has enough; what is left in the buffer must not raise again at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAILED
    except (KeyboardInterrupt, typer.Abort):
        print("interrupted", file=sys.stderr)
        return INTERRUPTED
    except Exception as error:  # noqa: BLE001  (whatever it is, a person gets a line)
        if "--debug" in moved:
            traceback.print_exc()
        return _said(error, debug="--debug" in moved)
    finally:
        log.handlers[:] = before[1]
        log.setLevel(before[0])  # whoever calls this in a program of their own keeps their logging
    if code == INTERRUPTED:
        print("interrupted", file=sys.stderr)
    return code if isinstance(code, int) else DONE


def _said(error: Exception, *, debug: bool) -> int:
    """Prints the line of an error, and gives its exit code."""
    code, line = code_of(error), line_of(error)
    if not line:  # a command without arguments has printed its help
        return code
    hint = "" if debug or code == BAD_INPUT else " (--debug prints a traceback)"
    print(f"error: {line}{hint}", file=sys.stderr)
    return code
