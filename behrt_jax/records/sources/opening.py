"""Open the source that a configuration names."""

from pathlib import Path

from behrt_jax.config import PrepareConfig
from behrt_jax.errors import InputError
from behrt_jax.records.sources import meds, omop, synthea, table
from behrt_jax.records.sources.source import Source

DEFAULT_CODES = {
    "meds": meds.DEFAULT_CODES,
    "omop": omop.DEFAULT_CODES,
    "synthea": synthea.DEFAULT_CODES,
    "table": table.DEFAULT_CODES,
}
"""Patterns of the codes that are selected where the user gives none: diagnoses, medications and
procedures as each source names them; of a table, all."""


def open_source(config: PrepareConfig) -> Source:
    """Open a source: its files are found and their heads are checked, no event is read yet.

    Raises:
        InputError: there is no input, or it is not of that source.
    """
    if config.input is None:
        raise InputError("--input is missing: give the folder (or, for a table, the file) to read.")
    path = Path(config.input).expanduser()
    if not path.exists():
        raise InputError(f"--input: {path} does not exist.")
    if config.source == "meds":
        return meds.open_meds(path, config.visit_column)
    if config.source == "omop":
        return omop.open_omop(path, config.ancestors)
    if config.source == "synthea":
        return synthea.open_synthea(path)
    return table.open_table(path, config.table)
