"""Compare freezing regimes: ``python experiments/freezing_study.py --quick``."""

import sys

from configs import FREEZING_STUDIES

from behrt_jax.cli import freezing_study_command

if __name__ == "__main__":
    sys.exit(freezing_study_command(sys.argv[1:], FREEZING_STUDIES, default="large"))
