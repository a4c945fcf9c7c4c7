"""Predict with a fine-tuned model: ``python experiments/predict.py --model RUN --data DIR --labels FILE``."""

import sys

from behrt_jax.cli import predict_command

if __name__ == "__main__":
    sys.exit(predict_command(sys.argv[1:]))
