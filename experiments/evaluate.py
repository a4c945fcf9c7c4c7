"""Judge predictions: ``python experiments/evaluate.py --predictions FILE --output DIR``."""

import sys

from behrt_jax.cli import COMMANDS, run_command

if __name__ == "__main__":
    sys.exit(run_command(COMMANDS["evaluate"], sys.argv[1:], prog="evaluate.py"))
