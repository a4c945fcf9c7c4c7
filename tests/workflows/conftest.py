"""Runs that several files of tests look at."""

import pytest

from tests.workflows.finetune_case import FinetuneCase


@pytest.fixture(scope="session")
def case(tmp_path_factory):
    """A base and fine-tuning runs on it."""
    return FinetuneCase(tmp_path_factory.mktemp("finetune"))


@pytest.fixture(scope="session")
def newcomers(case):
    """Rows of three held_out subjects."""
    labelled = case.labelled("binary")
    chosen = set(labelled.splits["held_out"][:3].tolist())
    return [row for row in labelled.rows if row.subject in chosen]
