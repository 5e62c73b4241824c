"""Exit codes of the command line, and errors as it prints them: one line, in its own words."""

import re

# Bad input, found before work starts: miniquant raises these for nothing else.
_BAD_INPUT = (
    *(ValueError, TypeError, ImportError, FileNotFoundError, FileExistsError, NotADirectoryError),
    *(IsADirectoryError, PermissionError),
)
DONE, FAILED, BAD_INPUT, INTERRUPTED, TERMINATED = 0, 1, 2, 130, 143
# Names of functions and classes before a message's text are for whoever calls them; formats and files are for everyone.
_NO_FUNCTION = r"(?!(?:gptq|gptq_v2|gguf|miniquant|[\w.]*\.(?:toml|json|jsonl|txt|md|gguf|safetensors|npy|parquet)): )"
_FUNCTION = re.compile(_NO_FUNCTION + r"[A-Za-z_]\w*(?:\.\w+)*: (?=\S)")
_OPTIONS = "resume|overwrite|output_embeddings|trust_remote_code"
_COMMANDS = {"quantize_folder": "miniquant quantize", "convert_folder": "miniquant convert"}
_LONGEST = 2000


def code_of(error: BaseException) -> int:
    """The exit code of an error: 2 where nothing was done because of what was asked, otherwise 1."""
    code = getattr(error, "exit_code", None)  # of usage errors
    if isinstance(code, int):
        return code
    return BAD_INPUT if isinstance(error, _BAD_INPUT) else FAILED


def line_of(error: BaseException) -> str:
    """What an error says, in words of the command line; empty where it was said already."""
    usage = getattr(error, "format_message", None)
    if callable(usage):
        command = getattr(getattr(error, "ctx", None), "command_path", "miniquant")
        said = _one_line(str(usage()))
        return f"{said} ({command} --help has the options)" if said else ""
    if isinstance(error, OSError) and error.filename is not None and error.strerror:
        text = f"{error.filename}: {_in_words(error.strerror)}"
    elif isinstance(error, KeyError) and error.args:
        text = _in_words(str(error.args[0]))
    elif isinstance(error, MemoryError):
        text = f"out of memory: {error}" if str(error) else "out of memory"
    else:
        text = _in_words(str(error)) or type(error).__name__
    if not isinstance(error, (*_BAD_INPUT, OSError, RuntimeError, MemoryError)):
        text = f"{type(error).__name__}: {text}"
    text = _one_line(re.sub(r"(?<!:)\n  (?=\S)", "; ", text))  # what is listed
    return text if len(text) <= _LONGEST else f"{text[: _LONGEST - 4]} ..."


def _in_words(text: str) -> str:
    """A message with options and commands instead of arguments and functions."""
    text = _FUNCTION.sub("", text, count=1) if _FUNCTION.match(text) else text
    text = re.sub(rf"\b({_OPTIONS})=True\b", lambda match: f"--{match[1].replace('_', '-')}", text)
    text = re.sub(r'\bunseen="(\w+)"', r"--unseen \1", text)
    text = text.replace("--resume and another unseen", "--resume and another --unseen")
    for function, command in _COMMANDS.items():
        text = re.sub(rf"\b{function}\b", command, text)
    return text


def _one_line(text: str) -> str:
    return " ".join(text.split())


def foreign(error: BaseException) -> str:
    """What an error of another package says: its kind and its text on one line, cut where it is long."""
    text = _one_line(str(error))
    return f"{type(error).__name__}: {text[:300]}{' ...' if len(text) > 300 else ''}" if text else type(error).__name__
