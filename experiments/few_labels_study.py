"""Fine-tuning with few labels beside count models: ``python experiments/few_labels_study.py``."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # of the package `experiments`

from experiments.studies.few_labels import few_labels_study_command

if __name__ == "__main__":
    sys.exit(few_labels_study_command(sys.argv[1:]))
