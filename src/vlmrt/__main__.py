"""`python -m vlmrt`: the command line."""

from __future__ import annotations

import sys

from vlmrt.tools.cli import main

if __name__ == "__main__":
    sys.exit(main())
