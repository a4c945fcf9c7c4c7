"""Fine-tune a pretrained BEHRT: ``finetune.py --data DIR --labels FILE --init RUN --output OUT``."""

import sys

from behrt_jax.cli import COMMANDS, run_command

if __name__ == "__main__":
    sys.exit(run_command(COMMANDS["finetune"], sys.argv[1:], prog="finetune.py"))
