"""``python -m behrt_jax COMMAND``, the same as ``behrt-jax COMMAND``."""

import sys

from behrt_jax.cli import main

if __name__ == "__main__":  # not in the processes that a command starts
    sys.exit(main(prog="python -m behrt_jax"))
