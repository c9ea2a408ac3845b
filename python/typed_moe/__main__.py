"""`python -m typed_moe`: the command line."""

import sys

from typed_moe.cli import main

if __name__ == "__main__":
    sys.exit(main())
