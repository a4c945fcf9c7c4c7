"""Make a report again, or compare runs: ``python experiments/report.py RUN [RUN ...]``."""

import sys

from behrt_jax.cli import COMMANDS, run_command

if __name__ == "__main__":
    sys.exit(run_command(COMMANDS["report"], sys.argv[1:], prog="report.py"))
