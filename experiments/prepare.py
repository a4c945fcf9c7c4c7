"""Prepare records: ``python experiments/prepare.py --source meds --input DIR --output DIR``."""

import sys

from behrt_jax.cli import prepare_command

if __name__ == "__main__":
    sys.exit(prepare_command(sys.argv[1:]))
