"""Compare freezing regimes: ``python experiments/freezing_study.py --quick``."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # of the package `experiments`

from experiments.studies.freezing import freezing_study_command

if __name__ == "__main__":
    sys.exit(freezing_study_command(sys.argv[1:]))
