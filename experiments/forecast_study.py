"""How near fine-tuned forecasts come to the best possible: ``python experiments/forecast_study.py``."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # of the package `experiments`

from experiments.studies.forecast import forecast_study_command

if __name__ == "__main__":
    sys.exit(forecast_study_command(sys.argv[1:]))
