"""Write a trained model into a folder to pass on: ``python experiments/export.py RUN --output DIR``."""

import sys

from behrt_jax.cli import COMMANDS, run_command

if __name__ == "__main__":
    sys.exit(run_command(COMMANDS["export"], sys.argv[1:], prog="export.py"))
