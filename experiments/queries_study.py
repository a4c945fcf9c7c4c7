"""Questions about the future beside the best possible answers: ``python experiments/queries_study.py``."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # of the package `experiments`

from experiments.studies.queries import queries_study_command

if __name__ == "__main__":
    sys.exit(queries_study_command(sys.argv[1:]))
