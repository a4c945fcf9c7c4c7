"""Pitfalls of health records that change data without an error, each with the test that would catch it here.

Where the test stands with the code it is about, it is listed here; the others follow below.

- Splits by visit; one subject in two splits or two files:
  tests/data/test_splits.py::test_each_subject_is_in_one_split_and_stays_there_when_others_join
  tests/data/test_sequences.py::test_splits_that_share_subjects_are_refused
  tests/records/sources/test_meds.py::test_a_subject_in_two_shards_and_unsorted_rows_change_nothing
- Vocabulary, filters and value quantiles fitted on other splits than train:
  tests/data/test_sequences.py::test_the_vocabulary_knows_the_train_split_alone
  tests/records/prepare/test_pipeline.py::test_values_become_bins_fitted_on_train
- Age 0 and visit 0 taken for padding: below, `test_a_newborn_*`, and
  tests/data/test_sequences.py::test_birth_day_has_age_0_and_visit_0
  tests/models/test_behrt.py::test_age_zero_and_visit_zero_are_not_padding
- Static events, events before birth or after death, silently kept or lost:
  tests/data/test_event_rules.py::test_each_event_is_counted_under_the_first_rule_that_drops_it
  tests/data/test_event_rules.py::test_birth_and_death_are_the_earliest_and_no_tokens
- Ids of 64 bits rounded: below, `test_neighbouring_ids_*`, and
  tests/records/sources/test_meds.py::test_large_ids_are_exact
  tests/records/sources/test_omop.py::test_64_bit_ids_come_through_exactly
  tests/records/sources/test_table.py::test_types_of_code_and_ids
- Dates beside timestamps, which put a day in another order: below, `test_dates_and_timestamps_*`, and
  tests/records/sources/test_omop.py::test_events_known_by_the_day_never_precede_their_visit_or_birth
  tests/records/sources/test_synthea.py::test_mixed_clocks
- Events of a subject in the order of the file (the PyTorch original):
  tests/data/test_event_rules.py::test_events_are_sorted_and_days_are_visits
  tests/data/test_sequences.py::test_row_order_does_not_matter
- Months added to ages in years (the PyTorch original): below, `test_ages_*`, and
  tests/data/test_sequences.py::test_sequences_equal_those_of_plain_loops
"""

from datetime import UTC, datetime

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from behrt_jax.config.data import DataConfig, PrepareConfig
from behrt_jax.config.training import MaskingConfig
from behrt_jax.data.batches import RowShape, training_batches
from behrt_jax.data.events import SPLITS
from behrt_jax.data.prepared import read_prepared
from behrt_jax.data.sequences import build_sequences
from behrt_jax.records.prepare.pipeline import prepare
from behrt_jax.records.sources.meds import open_meds
from behrt_jax.training.masking import mask_codes
from tests.records.meds_folder import DAY, HOUR, Row, born, event_set, write_meds

ALSO = [born(2), Row(2, DAY, "A")]
TWO = {"train": [1], "tuning": [2]}
SECOND = 1_000_000


def microseconds(text: str) -> int:
    return int(datetime.fromisoformat(text).replace(tzinfo=UTC).timestamp()) * SECOND


def train_split(rows):
    """Names of the codes, and the sequences, of the train split."""
    built = build_sequences(event_set(rows + ALSO, TWO), DataConfig(min_count=1), False)
    train = built.splits["train"]
    return [built.vocabulary.codes[code] for code in train.codes], train, built.counts


@pytest.mark.parametrize(
    ("birth", "event", "years"),
    [
        ("1950-01-31", "2000-12-31", 50.916),  # with months added: 61
        ("1950-12-01", "2000-01-01", 49.084),  # with years alone: 50
        ("2004-02-29", "2004-02-29T18:00", 0.002),
        ("1899-06-15", "2004-06-15", 104.999),
    ],
)
def test_ages_are_years_between_birth_and_event(birth, event, years):
    """Months added to years (PyTorch original): a known birth and event give the known age."""
    _, train, _ = train_split([born(1, microseconds(birth)), Row(1, microseconds(event), "A")])
    assert train.ages == pytest.approx([years], abs=1e-3)


@given(st.integers(-30_000, 20_000), st.lists(st.integers(0, 40_000), min_size=1, max_size=9, unique=True))
def test_ages_grow_by_the_time_between_events(birth, days):
    """Months added to years (PyTorch original): ages never jump or fall from event to event."""
    rows = [born(1, birth * DAY), *(Row(1, (birth + day) * DAY, "A") for day in days)]
    _, train, _ = train_split(rows)
    np.testing.assert_allclose(train.ages, np.sort(days) / 365.25, rtol=1e-6)


def test_a_newborn_in_its_first_visit_is_packed_and_masked_like_any_other():
    """Age 0 and visit 0 taken for padding: each code of a birth day has a place and can be a target."""
    names = [f"DX//{place}" for place in range(6)]
    codes, train, _ = train_split([born(1, 5 * DAY), *(Row(1, 5 * DAY, name) for name in names)])
    assert sorted(codes) == names
    assert not train.ages.any()
    assert not train.visits.any()
    batch = training_batches(train, RowShape(8), batch_size=1).batch(0)
    assert np.sort(batch.segment_ids[0]).tolist() == [0, 0, 1, 1, 1, 1, 1, 1]
    config = MaskingConfig(probability=1.0)
    masked = mask_codes(jax.random.key(0), batch.codes, batch.row_ids, config, 20)
    targets = np.asarray(masked.labels[0])[np.asarray(masked.weights[0])]
    assert sorted(targets) == sorted(train.codes)


def test_neighbouring_ids_of_64_bits_stay_apart_up_to_the_prepared_data(tmp_path):
    """Ids rounded by float64 or cut by int32: subjects that a cast makes one keep their own histories."""
    ids = [2**63 - 1, 2**63 - 2, -(2**63), -(2**63) + 1, 2**53 + 1, 2**53, 5, 5 + 2**32, -1]
    rows = [Row(subject, (day + 1) * DAY, "DIAGNOSIS//a") for day, subject in enumerate(ids)]
    rows += [born(subject) for subject in ids]
    splits = {name: ids[place::3] for place, name in enumerate(SPLITS)}
    source = open_meds(write_meds(tmp_path / "meds", rows, splits))
    prepare(source, PrepareConfig(input=tmp_path / "meds", output=tmp_path / "out", min_count=1))
    prepared = read_prepared(tmp_path / "out")
    for name, own in splits.items():
        part = prepared.splits[name]
        assert part.subject_ids.tolist() == sorted(own)
        assert part.lengths.tolist() == [1] * 3
        assert (part.times // DAY - 1).tolist() == [ids.index(subject) for subject in sorted(own)]


def test_dates_and_timestamps_of_a_day_are_one_visit_and_no_other_days():
    """Dates beside timestamps: what is known by the day stays in its day and visit, at their start."""
    rows = [
        born(1, -100 * DAY),
        Row(1, 3 * DAY, "date 3"),
        Row(1, 2 * DAY + 23 * HOUR, "late 2"),
        Row(1, 3 * DAY + HOUR, "early 3"),
        Row(1, 2 * DAY, "date 2"),
        Row(1, 4 * DAY, "date 4"),
    ]
    codes, train, counts = train_split(rows)
    assert codes == ["date 2", "late 2", "date 3", "early 3", "date 4"]
    assert train.visits.tolist() == [0, 0, 1, 1, 2]
    assert counts.dropped == {"birth or death marker": 2}


def test_dates_and_timestamps_about_birth_and_death_are_never_lost_silently():
    """Dates beside timestamps: on the day of a birth or death known by the hour nothing goes uncounted."""
    rows = [
        born(1, 10 * HOUR),
        Row(1, 0, "date of birth"),
        Row(1, 11 * HOUR, "after birth"),
        Row(1, 9 * DAY, "MEDS_DEATH"),
        Row(1, 9 * DAY + 20 * HOUR, "day of death"),
        Row(1, 10 * DAY, "day after"),
    ]
    codes, _, counts = train_split(rows)
    assert codes == ["after birth", "day of death"]
    assert counts.dropped == {"birth or death marker": 3, "before birth": 1, "after death": 1}
    assert counts.read == counts.kept + sum(counts.dropped.values())
