"""``python -m miniquant`` is the command ``miniquant``."""

import sys

from miniquant.cli import main

if __name__ == "__main__":
    sys.exit(main())
