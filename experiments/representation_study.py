"""What each part of the representation is worth: ``python experiments/representation_study.py --quick``."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # of the package `experiments`

from experiments.studies.representation import representation_study_command

if __name__ == "__main__":
    sys.exit(representation_study_command(sys.argv[1:]))
