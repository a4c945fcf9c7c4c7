"""What a step frees stays with the process: no page is faulted in anew at each step."""

import resource
import sys

import numpy as np
import pytest

from behrt_jax.training.runtime import keep_freed_memory


def faults_of_using(megabytes: int, times: int) -> int:
    """Page faults of asking for memory, writing to it and freeing it again."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(times):
        np.ones(megabytes * 2**20, np.uint8)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="mallopt is of glibc")
def test_freed_memory_is_used_again_without_page_faults():
    if not keep_freed_memory():
        pytest.skip("the C library is not glibc")
    faults_of_using(100, times=1)  # the heap grows to it once
    assert faults_of_using(100, times=10) < 100  # otherwise 25,600 pages a time, or 500 huge ones


def test_elsewhere_nothing_is_done(monkeypatch):
    monkeypatch.setattr(sys, "platform", "darwin")
    assert not keep_freed_memory()
