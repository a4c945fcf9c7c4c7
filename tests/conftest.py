"""Strict flags for every test, and eight devices on one CPU."""

import os

import jax
import pytest
from hypothesis import settings

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_debug_key_reuse", True)

# The first example of a property pays for a compilation; its time says nothing.
settings.register_profile("default", deadline=None, max_examples=25, derandomize=bool(os.environ.get("CI")))
settings.load_profile("default")


@pytest.fixture(scope="session")
def one_device():
    """The first device alone."""
    return [jax.devices()[0]]
