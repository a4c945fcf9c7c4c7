"""Judge predictions: ``python experiments/evaluate.py --predictions FILE --output DIR``."""

import sys

from behrt_jax.cli import evaluate_command

if __name__ == "__main__":
    sys.exit(evaluate_command(sys.argv[1:]))
