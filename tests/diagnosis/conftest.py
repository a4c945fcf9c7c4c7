import pytest

from behrt_jax.data.prepared import read_prepared
from tests.diagnosis.audited import OUTCOME, YEAR, first_occurrence, prepare_clinical


@pytest.fixture(scope="session")
def prepared(tmp_path_factory):
    return prepare_clinical(tmp_path_factory.mktemp("clinical"), 3000)


@pytest.fixture(scope="session")
def task(prepared):
    return first_occurrence(read_prepared(prepared), OUTCOME, YEAR)
