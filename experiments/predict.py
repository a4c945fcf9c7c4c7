"""Predict with a fine-tuned model: ``python experiments/predict.py --model RUN --data DIR --labels FILE``."""

import sys

from behrt_jax.cli import COMMANDS, run_command

if __name__ == "__main__":
    sys.exit(run_command(COMMANDS["predict"], sys.argv[1:], prog="predict.py"))
