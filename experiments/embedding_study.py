"""What vectors of codes are worth as a start: ``python experiments/embedding_study.py``."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # of the package `experiments`

from experiments.studies.embeddings import embedding_study_command

if __name__ == "__main__":
    sys.exit(embedding_study_command(sys.argv[1:]))
