"""`python -m subquad`: the same command as the `subquad` console script."""

import sys

from subquad.cli import main

if __name__ == "__main__":
    sys.exit(main())
