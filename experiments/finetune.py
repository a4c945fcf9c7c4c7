"""Fine-tune a pretrained BEHRT: ``finetune.py --data DIR --labels FILE --init RUN --output OUT``."""

import sys

from behrt_jax.cli import finetune_command
from behrt_jax.presets import FINETUNE

if __name__ == "__main__":
    sys.exit(finetune_command(sys.argv[1:], FINETUNE, default="lora"))
