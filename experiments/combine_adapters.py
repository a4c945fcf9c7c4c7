"""Combine adapters: ``python experiments/combine_adapters.py --adapters A B --output DIR``."""

import sys

from behrt_jax.cli import COMMANDS, run_command

if __name__ == "__main__":
    sys.exit(run_command(COMMANDS["combine-adapters"], sys.argv[1:], prog="combine_adapters.py"))
