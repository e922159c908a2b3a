"""`python -m igpt` is the `igpt` command."""

from __future__ import annotations

import sys

from igpt.cli import main

if __name__ == "__main__":
    sys.exit(main())
