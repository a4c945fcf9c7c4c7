"""Strict flags for every test, and eight devices on one CPU."""

import os
import tempfile

# Most programs of the tests are compiled to run once: compile them quickly. This is about machine code
# alone; the optimised HLO, its FLOPs and its collectives are those of a real run.
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_backend_optimization_level=0".strip()

import jax
from hypothesis import settings

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_debug_key_reuse", True)

# Many tests compile the same programs: once a session is enough. The folder goes with the session.
_COMPILED = tempfile.TemporaryDirectory(prefix="behrt_jax-compiled-")
jax.config.update("jax_compilation_cache_dir", _COMPILED.name)
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)

# The first example of a property pays for a compilation; its time says nothing.
settings.register_profile("default", deadline=None, max_examples=25, derandomize=bool(os.environ.get("CI")))
settings.load_profile("default")
