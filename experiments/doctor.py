"""Find mistakes in a run or in data: ``python experiments/doctor.py --run RUN`` or ``--data DIR``."""

import sys

from behrt_jax.cli import doctor_command

if __name__ == "__main__":
    sys.exit(doctor_command(sys.argv[1:]))
