"""Skip-gram vectors of the codes of prepared data: ``python experiments/skipgram.py``."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # of the package `experiments`

from experiments.studies.skipgram import skipgram_command

if __name__ == "__main__":
    sys.exit(skipgram_command(sys.argv[1:]))
