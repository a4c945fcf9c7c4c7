"""Pretrain BEHRT by masked-code prediction: ``python experiments/pretrain.py --config small_lora``."""

import sys

from configs import PRETRAIN

from behrt_jax.cli import pretrain_command

if __name__ == "__main__":
    sys.exit(pretrain_command(sys.argv[1:], PRETRAIN, default="small_lora"))
