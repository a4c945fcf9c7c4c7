"""Pretrain BEHRT by masked-code prediction: ``python experiments/pretrain.py --config small_lora``."""

import sys

from behrt_jax.cli import COMMANDS, run_command

if __name__ == "__main__":
    sys.exit(run_command(COMMANDS["pretrain"], sys.argv[1:], prog="pretrain.py"))
