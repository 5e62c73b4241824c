"""Whether this process is the command line: its help needs neither torch nor the library."""

import sys
from pathlib import Path

NAME = "miniquant"


def is_command() -> bool:
    """Whether Python was started with ``-m miniquant``, or runs the script of that name that is installed beside it."""
    program = sys.argv[0] if sys.argv else ""
    if program == "-m":  # while Python looks for the module that it is to run
        module = "".join(sys.orig_argv[-len(sys.argv) :][:1])
        return module.removeprefix("-m") == NAME
    path = Path(program)
    return path.name == NAME and path.parent == Path(sys.executable).parent
