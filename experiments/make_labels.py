"""Make labels: ``python experiments/make_labels.py --task death --data DIR --output FILE``."""

import sys

from behrt_jax.cli import make_labels_command

if __name__ == "__main__":
    sys.exit(make_labels_command(sys.argv[1:]))
