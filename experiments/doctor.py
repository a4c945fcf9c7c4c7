"""Find mistakes in a run or in data: ``python experiments/doctor.py --run RUN`` or ``--data DIR``."""

import sys

from behrt_jax.cli import COMMANDS, run_command

if __name__ == "__main__":
    sys.exit(run_command(COMMANDS["doctor"], sys.argv[1:], prog="doctor.py"))
