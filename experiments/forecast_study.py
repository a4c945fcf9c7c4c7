"""How near fine-tuned forecasts come to the best possible: ``python experiments/forecast_study.py``."""

import sys

from configs import FORECAST_BASE, FORECASTS

from behrt_jax.cli import forecast_study_command

if __name__ == "__main__":
    sys.exit(forecast_study_command(sys.argv[1:], FORECAST_BASE, FORECASTS))
