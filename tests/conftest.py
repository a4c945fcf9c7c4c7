"""Strict flags for every test, and eight devices on one CPU."""

import atexit
import os
import shutil
import tempfile

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
from hypothesis import settings

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_debug_key_reuse", True)

# The first example of a property pays for a compilation; its time says nothing.
settings.register_profile("default", deadline=None, max_examples=25, derandomize=bool(os.environ.get("CI")))
settings.load_profile("default")
