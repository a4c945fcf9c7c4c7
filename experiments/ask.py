"""Ask a pretrained model about the future: ``python experiments/ask.py --model RUN --codes REGEX ...``."""

import sys

from behrt_jax.cli import COMMANDS, run_command

if __name__ == "__main__":
    sys.exit(run_command(COMMANDS["ask"], sys.argv[1:], prog="ask.py"))
