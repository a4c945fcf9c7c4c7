"""Pretrain BEHRT by masked-code prediction: ``python experiments/pretrain.py --config small_lora``."""

import sys

from behrt_jax.cli import pretrain_command
from behrt_jax.presets import PRETRAIN

if __name__ == "__main__":
    sys.exit(pretrain_command(sys.argv[1:], PRETRAIN, default="small_lora"))
