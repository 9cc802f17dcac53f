"""`python -m avlm_jax <verb>`: the same as the console script `avlm`."""

import sys

from avlm_jax.cli import main

if __name__ == "__main__":
    sys.exit(main())
