"""Events from whichever source the configuration names."""

from behrt_jax.config import DataConfig
from behrt_jax.data.events import EventSet
from behrt_jax.data.sources.meds import read_meds
from behrt_jax.data.synthetic.clinical import generate_clinical
from behrt_jax.data.synthetic.uniform import generate_uniform
from behrt_jax.data.vocabulary import SPECIAL_TOKENS
from behrt_jax.errors import InputError

GENERATED_VOCABULARY_SIZE = 1000


def load_events(config: DataConfig) -> EventSet:
    """Read or generate the events.

    Raises:
        InputError: options that do not fit the source, or a source that cannot be read.
    """
    if config.source == "meds":
        if config.path is None:
            raise InputError("data.path is missing: give the folder of the MEDS data set.")
        return read_meds(config.path, config.visit_column)
    if config.path is not None:
        raise InputError(
            f"data.path is given but data.source is {config.source}, which is generated: "
            "add --data.source meds."
        )
    generate = {"clinical": generate_clinical, "uniform": generate_uniform}[config.source]
    rows = config.vocabulary_size or GENERATED_VOCABULARY_SIZE
    return generate(
        config.subjects, rows - len(SPECIAL_TOKENS), config.events_mean, config.events_spread, config.seed
    )
