"""Strict flags for every test, and eight devices on one CPU."""

import atexit
import gc
import os
import shutil
import tempfile
from collections import Counter
from pathlib import Path

from tests.commands import QUICK_COMPILATION

# Most programs of the tests are compiled to run once: compile them quickly. This is about machine code
# and the borders of fusions; the operations, their FLOPs (to a thousandth) and their collectives are those
# of a real run.
os.environ["XLA_FLAGS"] = " ".join([os.environ.get("XLA_FLAGS", ""), *QUICK_COMPILATION]).strip()

# Many tests compile the same programs: once a session is enough, or once for several in a folder that is
# given. Each process of a session has its own, since JAX writes programs bit by bit; the folder goes with it.
# The commands that tests start use it too, and never the user's own.
if "JAX_COMPILATION_CACHE_DIR" not in os.environ or "PYTEST_XDIST_WORKER" in os.environ:
    os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="behrt_jax-compiled-")
    atexit.register(shutil.rmtree, os.environ["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True)
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.2"

import jax
import pytest
from hypothesis import settings

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_debug_key_reuse", True)

# Tracing makes objects by the million and few of them in cycles: to look for these less often saves a tenth.
gc.set_threshold(20_000, 10, 50)

# The first example of a property pays for a compilation; its time says nothing.
settings.register_profile("default", deadline=None, max_examples=25, derandomize=bool(os.environ.get("CI")))
settings.load_profile("default")

LONG = (
    "experiments/test_notebooks.py",
    "training/test_step.py",
    "experiments/test_freezing_study.py",
    "workflows/test_pretrain.py",
    "workflows/test_distributed.py",
    "experiments/test_train.py",
    "experiments/test_meds_dev.py",
    "workflows/test_doctor.py",
)
"""Files with tests that take a minute or so, or with many that are slow."""


@pytest.hookimpl(trylast=True)  # of those that are left by -m and -k
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Long files first, then those with many tests: each process takes the next file when it is done, and
    with a long one at the end the other would wait.
    """
    folder = Path(__file__).parent
    place = {folder / name: number for number, name in enumerate(LONG)}
    count = Counter(item.path for item in items)
    items.sort(key=lambda item: (place.get(item.path, len(LONG)), -count[item.path]))
