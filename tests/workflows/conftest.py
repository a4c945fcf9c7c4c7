"""Runs that several files of tests look at."""

import pytest

from tests.workflows.finetune_case import FinetuneCase


@pytest.fixture(scope="session")
def case(tmp_path_factory):
    """A base and fine-tuning runs on it."""
    return FinetuneCase(tmp_path_factory.mktemp("finetune"))
