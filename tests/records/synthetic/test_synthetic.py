"""The generators: valid MEDS events with the structure they promise, and none that they do not."""

from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from behrt_jax.data.events import BIRTH_CODE, DEATH_CODE, EVENT_SCHEMA, EventSet
from behrt_jax.errors import InputError
from behrt_jax.records.synthetic.clinical import LEAST_CODES, generate_clinical
from behrt_jax.records.synthetic.conditions import CONDITIONS, code_of, themes, unspecific_codes
from behrt_jax.records.synthetic.histories import VISIT_SIZES, generate_uniform, history_lengths

GENERATORS = {"clinical": generate_clinical, "uniform": generate_uniform}


@dataclass
class Records:
    """The histories of an event set as arrays, one row an event, in order of subject and time."""

    codes: np.ndarray
    """Names."""
    subjects: np.ndarray
    """Index of the subject, in order of id."""
    times: np.ndarray
    """datetime64[us]."""
    births: np.ndarray
    """datetime64[us] by subject."""
    deaths: np.ndarray
    """datetime64[us] by subject, NaT where there is none."""
    female: np.ndarray
    """bool by subject."""

    @property
    def days(self) -> np.ndarray:
        return self.times.astype("datetime64[D]")

    @property
    def ages(self) -> np.ndarray:
        return (self.times - self.births[self.subjects]) / np.timedelta64(1, "D") / 365.25

    def having(self, code: str) -> np.ndarray:
        """By subject."""
        return np.bincount(self.subjects[self.codes == code], minlength=len(self.births)) > 0


def names(table: pa.Table) -> np.ndarray:
    codes = table["code"].combine_chunks()
    return np.array(codes.dictionary.to_pylist())[np.asarray(codes.indices)]


def read(event_set: EventSet) -> Records:
    assert event_set.declared_codes is not None
    table = event_set.events.sort_by([("subject_id", "ascending"), ("time", "ascending")])
    codes = names(table)
    ids, subjects = np.unique(table["subject_id"].to_numpy(), return_inverse=True)
    times = table["time"].to_numpy()

    def when(code: str) -> np.ndarray:
        rows = codes == code
        found = np.full(len(ids), np.datetime64("NaT", "us"), times.dtype)
        found[subjects[rows]] = times[rows]
        return found

    female = np.bincount(subjects[codes == "SEX//F"], minlength=len(ids)) > 0
    history = np.isin(codes, list(event_set.declared_codes))
    return Records(
        codes[history], subjects[history], times[history], when(BIRTH_CODE), when(DEATH_CODE), female
    )


@pytest.fixture(scope="module")
def clinical() -> Records:
    return read(generate_clinical(8000, 300, 20.0, 0.9, seed=5))


@pytest.mark.parametrize("name", GENERATORS)
def test_events_are_valid(name):
    event_set = GENERATORS[name](700, 250, 8.0, 0.9, seed=1)
    table = event_set.events
    assert table.schema.equals(EVENT_SCHEMA)
    table.validate(full=True)
    assert [table[column].null_count for column in ("subject_id", "code")] == [0, 0]
    assert event_set.source == name
    assert event_set.splits == {}
    assert event_set.counts.read == table.num_rows == event_set.counts.kept
    assert event_set.declared_codes is not None
    assert len(event_set.declared_codes) == len(set(event_set.declared_codes)) == 250
    facts = {BIRTH_CODE, DEATH_CODE, "SEX//F", "SEX//M"} if name == "clinical" else {BIRTH_CODE}
    assert set(table["code"].to_pylist()) - set(event_set.declared_codes) == facts
    assert set(event_set.descriptions) == set(event_set.declared_codes)
    assert all(event_set.descriptions.values())


@pytest.mark.parametrize("name", GENERATORS)
def test_subject_ids_use_all_64_bits(name):
    table = GENERATORS[name](500, 250, 3.0, 0.5, seed=2).events
    ids = np.unique(table["subject_id"].to_numpy())
    assert len(ids) == 500
    assert (ids < -(2**53)).sum() > 100
    assert (ids > 2**53).sum() > 100
    assert (ids.astype(np.float64).astype(object) != ids.astype(object)).mean() > 0.9
    in_row_order = table["subject_id"].to_numpy()[:500]
    assert 0.3 < (np.diff(in_row_order.astype(np.float64)) > 0).mean() < 0.95


@settings(max_examples=25, deadline=None)
@given(
    name=st.sampled_from(sorted(GENERATORS)),
    subjects=st.integers(1, 40),
    more_codes=st.integers(0, 200),
    mean=st.floats(1, 60),
    spread=st.floats(0, 2),
    seed=st.integers(0, 2**32),
)
def test_every_history_is_possible(name, subjects, more_codes, mean, spread, seed):
    event_set = GENERATORS[name](subjects, LEAST_CODES + more_codes, mean, spread, seed)
    codes = names(event_set.events)
    static = np.char.startswith(codes, "SEX//")
    records = read(event_set)

    assert (codes == BIRTH_CODE).sum() == subjects
    assert static.sum() == (subjects if name == "clinical" else 0)
    np.testing.assert_array_equal(event_set.events["time"].is_null().to_numpy(), static)
    assert (np.bincount(records.subjects, minlength=subjects) >= 1).all()
    assert (records.times >= records.births[records.subjects]).all()
    assert not (records.times >= records.deaths[records.subjects]).any()  # NaT compares as false

    # No two events of a subject at the same time; a day is one visit of 6 events at most.
    same_subject = records.subjects[1:] == records.subjects[:-1]
    assert (np.diff(records.times)[same_subject] > np.timedelta64(0, "us")).all()
    visits = np.stack([records.subjects, records.days.astype(np.int64)], axis=1)
    assert np.unique(visits, axis=0, return_counts=True)[1].max() <= VISIT_SIZES.max()
    if name == "clinical":
        in_visit = {(*visit, code) for visit, code in zip(visits.tolist(), records.codes, strict=True)}
        assert len(in_visit) == len(records.codes)


@pytest.mark.parametrize("name", GENERATORS)
def test_the_seed_decides(name):
    first, again, other = (GENERATORS[name](200, 250, 8.0, 0.9, seed).events for seed in (7, 7, 8))
    assert first.equals(again)
    assert not first.equals(other)


@pytest.mark.parametrize("mean", [15.0, 40.0])
def test_lengths_are_long_tailed_with_the_given_mean(mean):
    lengths = history_lengths(np.random.default_rng(0), 200_000, mean, 0.9)
    assert lengths.min() >= 1
    assert lengths.mean() == pytest.approx(mean, rel=0.02)
    assert np.median(lengths) == pytest.approx(mean * 2 / 3, rel=0.03)  # 10 of 15
    assert np.percentile(lengths, 99) == pytest.approx(mean * 16 / 3, rel=0.05)  # 80 of 15


def test_lengths_without_spread_are_equal():
    assert set(history_lengths(np.random.default_rng(0), 100, 15.0, 0.0)) == {15}


def test_histories_have_the_drawn_lengths(clinical):
    lengths = np.bincount(clinical.subjects)
    assert lengths.mean() == pytest.approx(20, rel=0.05)
    assert np.median(lengths) == pytest.approx(13.3, rel=0.08)


def test_visits_are_weeks_to_months_apart(clinical):
    same_subject = clinical.subjects[1:] == clinical.subjects[:-1]
    gaps = np.diff(clinical.days).astype(np.int64)[same_subject]
    gaps = gaps[gaps > 0]
    assert 40 < np.median(gaps) < 100
    assert (gaps > 7).mean() > 0.9


def test_visits_have_one_to_six_events(clinical):
    visits = np.stack([clinical.subjects, clinical.days.astype(np.int64)], axis=1)
    sizes = np.bincount(np.unique(visits, axis=0, return_counts=True)[1])
    assert len(sizes) == 7
    assert (sizes[1:] > 0.03 * sizes.sum()).all()


def test_long_histories_stay_within_a_lifetime():
    records = read(generate_clinical(5, LEAST_CODES, 5000.0, 0.1, seed=0))
    assert len(records.codes) > 10_000
    assert records.ages.max() < 115


def test_subjects_are_of_every_age(clinical):
    first = np.unique(clinical.subjects, return_index=True)[1]
    ages = clinical.ages[first]
    assert (ages < 1).sum() > 50
    assert 0.1 < (ages < 18).mean() < 0.25
    assert (ages > 75).mean() > 0.1
    assert 0.45 < clinical.female.mean() < 0.55
    died = ~np.isnat(clinical.deaths)
    assert 0.01 < died.mean() < 0.2
    assert ages[died].mean() > ages[~died].mean() + 10


def test_diseases_have_their_age(clinical):
    def mean_age(code: str) -> float:
        return clinical.ages[clinical.codes == code].mean()

    assert mean_age("DX//G30") > mean_age("DX//I10") + 5 > mean_age("DX//J45") + 30  # dementia, asthma
    assert clinical.ages[clinical.codes == "PX//WELL_CHILD"].max() < 12
    assert clinical.ages[clinical.codes == "RX//J07BB02"].min() >= 60


@pytest.mark.parametrize(
    ("code", "season"),
    [("DX//J10", (12, 1, 2)), ("DX//J30", (4, 5, 6)), ("DX//A09", (7, 8, 9)), ("RX//J07BB02", (9, 10, 11))],
)
def test_seasonal_codes_have_their_season(clinical, code, season):
    months = clinical.times[clinical.codes == code].astype("datetime64[M]").astype(np.int64) % 12 + 1
    assert len(months) > 100
    assert np.isin(months, season).mean() > 0.6
    everything = clinical.times.astype("datetime64[M]").astype(np.int64) % 12 + 1
    assert np.isin(everything, season).mean() < 0.35


COMORBID = [
    ("DX//E66", "DX//E11"),  # obesity, type 2 diabetes
    ("DX//E11", "DX//N18"),  # type 2 diabetes, chronic kidney disease
    ("DX//I25", "DX//I50"),  # coronary disease, heart failure
    ("DX//I48", "DX//I63"),  # atrial fibrillation, stroke
    ("DX//F32", "DX//F41"),  # depression, anxiety
]


@pytest.mark.parametrize(("condition", "other"), COMORBID)
def test_a_condition_makes_others_likelier(clinical, condition, other):
    one, two = clinical.having(condition), clinical.having(other)
    assert (one & two).mean() / (one.mean() * two.mean()) > 1.5


def test_comorbidity_is_more_than_like_age(clinical):
    first = np.unique(clinical.subjects, return_index=True)[1]
    decades = clinical.ages[first] // 10
    seen = expected = 0.0
    for condition, other in COMORBID:
        one, two = clinical.having(condition), clinical.having(other)
        for decade in range(2, 10):
            peers = decades == decade
            seen += (one & two)[peers].sum()
            expected += one[peers].mean() * two[peers].sum()
    assert seen / expected > 1.5


def test_unlinked_conditions_are_not_comorbid(clinical):
    one, two = clinical.having("DX//E03"), clinical.having("DX//K21")  # hypothyroidism, reflux
    assert (one & two).mean() / (one.mean() * two.mean()) < 1.5


def mean_days(records: Records, code: str) -> np.ndarray:
    """Mean day since 1970 of a code by subject; NaN where it never occurs."""
    rows = records.codes == code
    events = np.bincount(records.subjects[rows], minlength=len(records.births))
    days = np.bincount(
        records.subjects[rows], records.days[rows].astype(np.float64), minlength=len(records.births)
    )
    return np.where(events > 0, days / np.maximum(events, 1), np.nan)


@pytest.mark.parametrize("early", ["diagnosis", "first_line"])
@pytest.mark.parametrize("late", ["second_line", "complication"])
def test_conditions_progress(clinical, early, late):
    # Means, not first times: a rare code comes late first even where there is no order.
    waits = []  # days, of subjects with both codes
    for condition in CONDITIONS:
        first, then = (mean_days(clinical, code_of(getattr(condition, part))) for part in (early, late))
        waits.append((then - first)[np.isfinite(then - first)])
    assert min(len(wait) for wait in waits) > 5
    wait = np.concatenate(waits)
    assert len(wait) > 2000
    assert wait.mean() > 60
    assert (wait > 0).mean() > 1.5 * (wait < 0).mean()
    assert np.mean([wait.mean() > 0 for wait in waits]) > 0.9


def test_some_codes_are_for_one_sex(clinical):
    female = clinical.female[clinical.subjects]
    for code in ("DX//C50", "DX//Z34", "PX//PAP_SMEAR"):
        assert female[clinical.codes == code].all()
        assert (clinical.codes == code).sum() > 50
    for code in ("DX//C61", "LAB//PSA"):
        assert not female[clinical.codes == code].any()
        assert (clinical.codes == code).sum() > 50


def test_the_table_of_conditions_is_sound():
    names = [condition.name for condition in CONDITIONS]
    assert len(set(names)) == len(names) >= 20
    for place, condition in enumerate(CONDITIONS):
        assert set(dict(condition.raises)) <= set(names[place + 1 :]), condition.name
        assert set(condition.sex) <= {"F", "M"}
        assert all(factor > 1 for _, factor in condition.raises)
    entries = {entry for theme in themes() for entry in theme}
    assert len({code_of(entry) for entry in entries}) == len(entries)  # one text a code
    assert {code_of(entry).split("//")[0] for entry in entries} == {"DX", "RX", "PX", "LAB"}
    assert not {code_of(entry) for entry in entries} & set(unspecific_codes(30_000))


def test_unspecific_codes_fill_a_large_vocabulary():
    event_set = generate_clinical(3000, 20_000, 15.0, 0.9, seed=0)
    assert event_set.declared_codes is not None
    assert len(set(event_set.declared_codes)) == 20_000
    counts = np.bincount(np.asarray(event_set.events["code"].combine_chunks().indices), minlength=20_000)
    head, tail = counts[LEAST_CODES : LEAST_CODES + 1000], counts[10_000:20_000]
    assert head.mean() > 20 * tail.mean() > 0  # long tail, still drawn from


def neighbour_gain(event_set: EventSet) -> tuple[float, float]:
    """Unigram loss in nats, and what the codes beside a code take off it, on unseen subjects.

    The predictor averages P(code | code before) and P(code | code after), counted on every other
    subject and shrunk towards the unigram; the best of a few shrinkages counts.
    """
    assert event_set.declared_codes is not None
    records = read(event_set)
    number = {code: index for index, code in enumerate(event_set.declared_codes)}
    codes = np.array([number[code] for code in records.codes])
    fitted = records.subjects % 2 == 0
    unigram = np.bincount(codes[fitted], minlength=len(number)) + 0.5
    unigram /= unigram.sum()
    before = np.flatnonzero(records.subjects[1:] == records.subjects[:-1])
    after = before + 1

    pairs = np.zeros((len(number), len(number)))
    np.add.at(pairs, (codes[before[fitted[before]]], codes[after[fitted[after]]]), 1)
    pairs += pairs.T
    unigram_loss = -np.log(unigram[codes[~fitted]]).mean()
    losses = []
    for strength in (20.0, 1e3, 1e5):
        given = (pairs + strength * unigram) / (pairs.sum(axis=1, keepdims=True) + strength)
        total, neighbours = np.zeros(len(codes)), np.zeros(len(codes))
        for known, target in ((before, after), (after, before)):
            total[target] += given[codes[known], codes[target]]
            neighbours[target] += 1
        chance = np.where(neighbours > 0, total / np.maximum(neighbours, 1), unigram[codes])
        losses.append(-np.log(chance[~fitted]).mean())
    return unigram_loss, unigram_loss - min(losses)


def test_clinical_codes_tell_their_neighbours():
    unigram_loss, gain = neighbour_gain(generate_clinical(3000, 995, 15.0, 0.9, seed=3))
    assert 5.0 < unigram_loss < 6.0
    assert gain > 1.0


def test_uniform_codes_tell_nothing():
    unigram_loss, gain = neighbour_gain(generate_uniform(3000, 200, 15.0, 0.9, seed=3))
    assert unigram_loss == pytest.approx(np.log(200), abs=0.02)
    assert gain < 0.02


@pytest.mark.parametrize("name", GENERATORS)
@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"subjects": 0}, "data.subjects"),
        ({"events_mean": 0.5}, "data.events_mean"),
        ({"events_mean": float("nan")}, "data.events_mean"),
        ({"events_spread": -0.1}, "data.events_spread"),
        ({"events_spread": float("inf")}, "data.events_spread"),
        ({"seed": -1}, "data.seed"),
        ({"code_count": 1}, "data.vocabulary_size"),
    ],
)
def test_options_out_of_range_are_named(name, change, field):
    options = {"subjects": 10, "code_count": 200, "events_mean": 5.0, "events_spread": 0.5, "seed": 0}
    with pytest.raises(InputError, match=field):
        GENERATORS[name](**(options | change))


def test_too_few_codes_for_the_conditions():
    generate_clinical(10, LEAST_CODES, 5.0, 0.5, 0)
    with pytest.raises(InputError, match=rf"data\.vocabulary_size .* needs {LEAST_CODES}: raise it by 1 "):
        generate_clinical(10, LEAST_CODES - 1, 5.0, 0.5, 0)
