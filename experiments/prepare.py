"""Prepare records: ``python experiments/prepare.py --source meds --input DIR --output DIR``."""

import sys

from behrt_jax.cli import COMMANDS, run_command

if __name__ == "__main__":
    sys.exit(run_command(COMMANDS["prepare"], sys.argv[1:], prog="prepare.py"))
