"""Make labels: ``python experiments/make_labels.py --task death --data DIR --output FILE``."""

import sys

from behrt_jax.cli import COMMANDS, run_command

if __name__ == "__main__":
    sys.exit(run_command(COMMANDS["make-labels"], sys.argv[1:], prog="make_labels.py"))
