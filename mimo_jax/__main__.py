"""`python -m mimo_jax`: the command `mimo`."""

import sys

from mimo_jax.cli import main

if __name__ == "__main__":
    sys.exit(main())
