"""Read BEHRT in PyTorch: ``python experiments/import_weights.py --weights FILE --vocabulary FILE ...``."""

import sys

from behrt_jax.cli import COMMANDS, run_command

if __name__ == "__main__":
    sys.exit(run_command(COMMANDS["import-weights"], sys.argv[1:], prog="import_weights.py"))
