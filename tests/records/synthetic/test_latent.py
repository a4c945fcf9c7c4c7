"""The latent generator: valid events that follow its model, the same for the same seed."""

from dataclasses import replace

import numpy as np
import pytest

from behrt_jax.config.data import DataConfig
from behrt_jax.config.training import PretrainConfig
from behrt_jax.data.events import BIRTH_CODE, EVENT_SCHEMA
from behrt_jax.errors import InputError
from behrt_jax.records.load import load_events, load_sequences
from behrt_jax.records.synthetic.histories import YEAR_DAYS
from behrt_jax.records.synthetic.latent import (
    AGE_BANDS,
    BAND_YEARS,
    COVARIATES,
    LEAST_CODES,
    SEXES,
    LatentModel,
    code_texts,
    draw_codes,
    draw_course,
    draw_latent_histories,
    generate_latent,
    latent_model,
)
from behrt_jax.workflows.checks import check
from experiments.studies.latent_course import NEVER, latent_paths, onset_labels

OPTIONS = (3000, 200, 15.0, 0.9, 2)


@pytest.fixture(scope="module")
def sequences():
    data = DataConfig(source="latent", subjects=3000, vocabulary_size=205, seed=2)
    loaded = load_sequences(replace(data, tuning_fraction=0.8), sep_token=False)
    return loaded, loaded.splits["tuning"]


@pytest.mark.parametrize("difficulty", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("codes", [LEAST_CODES, 995])
def test_probabilities_are_probabilities(codes, difficulty):
    model = latent_model(codes, 1, difficulty)
    assert len(set(model.codes)) == len(model.codes) == codes
    assert set(code_texts(model)) == set(model.codes)
    for probabilities in (
        model.initial,
        model.transitions,
        model.starts,
        model.follows,
        model.emissions,
        model.sizes,
    ):
        assert probabilities.min() >= 0
        np.testing.assert_allclose(probabilities.sum(axis=-1), 1.0)
    assert model.transitions.shape == (22, 81, 81)
    assert model.emissions[:, -1].min() > 0  # any code can be noise
    assert (model.states[model.transitions.max(axis=(0, 1)) > 0] >= 0).all()
    absent = model.states == 0
    assert not (model.starts[:, 0:8:2][absent].any() or model.starts[:, 1:8:2][absent].any())


def test_a_condition_never_ends_and_others_hasten_it():
    model = latent_model(100, 0)
    stays = (model.states[:, None] == 0) | (model.states[None] > 0)  # [Z, Z, K]
    assert not model.transitions[:, ~stays.all(axis=2)].any()
    sick = np.flatnonzero((model.states == [0, 2, 2, 2]).all(axis=1))[0]
    onset = model.transitions[:, :, model.states[:, 0] > 0].sum(axis=2)  # [B, Z]
    assert (onset[:, sick] > 1.5 * onset[:, 0]).all()
    assert onset.max() > onset[:, 0].min()


def test_conditions_share_codes_only_where_it_is_difficult():
    def shared(model: LatentModel) -> np.ndarray:
        """Share of each diagnosis and treatment row that goes to codes of all conditions."""
        rows = model.emissions[0, :16].reshape(4, 2, 2, -1)  # condition, kind, stage, code
        common = (rows > 0).all(axis=(0, 2))  # kind, code
        return (rows * common[:, None]).sum(axis=-1)

    easy, middle, hard = (latent_model(500, 3, difficulty) for difficulty in (0.0, 0.5, 1.0))
    for model, share in ((easy, 0.0), (middle, 0.25), (hard, 0.5)):
        np.testing.assert_allclose(shared(model), share, atol=1e-12)
    for row in range(0, 16, 2):  # the stages differ less
        distances = [
            np.abs(model.emissions[0, row] - model.emissions[0, row + 1]).sum() for model in (easy, hard)
        ]
        assert distances[1] < distances[0]
    assert easy.starts[:, -1].max() < middle.starts[:, -1].min() < hard.starts[:, -1].min()


def test_events_are_valid_and_determined_by_the_seed():
    first, again, other = (generate_latent(300, 200, 9.0, 0.9, seed) for seed in (1, 1, 2))
    assert first.events.equals(again.events)
    assert not first.events.equals(other.events)
    first.events.validate(full=True)
    assert first.events.schema.equals(EVENT_SCHEMA)
    assert first.counts.read == first.events.num_rows
    assert first.declared_codes is not None
    assert len(first.declared_codes) == 200
    assert all(first.descriptions[code] for code in first.declared_codes)
    assert set(first.events["code"].to_pylist()) <= {BIRTH_CODE, *first.declared_codes}
    harder = generate_latent(300, 200, 9.0, 0.9, 1, difficulty=0.6)
    assert not harder.events.equals(first.events)
    options = {"subjects": 300, "vocabulary_size": 205, "events_mean": 9.0, "seed": 1, "difficulty": 0.6}
    assert load_events(DataConfig(source="latent", **options)).events.equals(harder.events)


def test_sequences_keep_every_event_in_the_order_drawn(sequences):
    loaded, split = sequences
    assert loaded.counts.dropped == {"birth or death marker": 3000}
    assert len(loaded.vocabulary) == 205
    assert (np.diff(split.times)[np.diff(np.repeat(np.arange(len(split)), split.lengths)) == 0] > 0).all()
    # After a condition's diagnosis comes its treatment more often than in the order reversed.
    kinds = np.array([code.split("//")[0] for code in loaded.vocabulary.codes])[split.codes]
    together = (np.diff(split.visits) == 0) & (np.diff(np.repeat(np.arange(len(split)), split.lengths)) == 0)
    onward = (kinds[:-1] == "DX") & (kinds[1:] == "RX") & together
    backward = (kinds[:-1] == "RX") & (kinds[1:] == "DX") & together
    assert onward.sum() > 2 * backward.sum()


def test_a_visit_shows_the_age_band_that_it_was_drawn_with(sequences):
    _, split = sequences
    model = latent_model(200, 2)
    shown = np.clip(np.floor(split.ages / np.float32(BAND_YEARS)).astype(int), 0, AGE_BANDS - 1)
    days = np.floor(split.ages.astype(np.float64) * YEAR_DAYS).astype(int)
    np.testing.assert_array_equal(model.band_of_day(days), shown)
    # Also on the days around each limit, from the earliest event of a day to the latest.
    limits = model.first_days(np.arange(1, AGE_BANDS))
    for shift in (-1, 0):
        for minutes in (12 * 60 + 10, 17 * 60 + 34):
            ages = np.float32((limits + shift + minutes / 1440) / YEAR_DAYS)
            band = np.floor(ages / np.float32(BAND_YEARS)).astype(int)
            np.testing.assert_array_equal(band, model.band_of_day(limits + shift))
            np.testing.assert_array_equal(band, np.arange(1, AGE_BANDS) + shift)
            np.testing.assert_array_equal(np.floor(ages.astype(np.float64) * YEAR_DAYS), limits + shift)


def test_visits_follow_the_model():
    paths = latent_paths(*OPTIONS)
    histories, model = paths.histories, latent_model(200, 2)
    same = np.diff(histories.visit_subjects) == 0
    gaps = np.diff(histories.visit_days)[same]
    assert gaps.min() >= 1
    assert gaps.mean() == pytest.approx(90, rel=0.05)
    assert np.quantile(gaps, 0.5) == pytest.approx(np.log(2) * 90, rel=0.08)
    sizes = np.bincount(histories.visit_events, minlength=7)[1:] / len(histories.visit_events)
    np.testing.assert_allclose(sizes, model.sizes, atol=0.015)
    # The last visit is as large as others: knowing that it is the last says nothing.
    last = np.append(histories.first_visits[1:], len(paths.states)) - 1
    assert histories.visit_events[last].mean() == pytest.approx(3.0, abs=0.1)
    lengths = np.add.reduceat(histories.visit_events, histories.first_visits)
    assert 14.0 < lengths.mean() < 17.5
    minutes = histories.event_times // 60_000_000 % 1440
    assert minutes.min() >= 12 * 60 + 10
    assert minutes.max() < 17 * 60 + 36


def test_stages_follow_the_model():
    paths = latent_paths(8000, 100, 12.0, 0.7, 5)
    model, histories = latent_model(100, 5), paths.histories
    bands = model.band_of_day(histories.visit_days - histories.birth_days[histories.visit_subjects])
    # Sums over visits of one-hot states less what is expected, for each condition and stage.
    firsts = histories.first_visits
    later = np.setdiff1d(np.arange(len(bands)), firsts)
    for rows, expected in (
        (firsts, model.initial[bands[firsts]]),
        (later, model.transitions[bands[later], paths.states[later - 1]]),
    ):
        for condition in range(4):
            for stage in range(3):
                of_stage = model.states[:, condition] == stage
                chances = expected[:, of_stage].sum(axis=1)
                error = np.sqrt((chances * (1 - chances)).sum())
                assert abs(of_stage[paths.states[rows]].sum() - chances.sum()) < 4 * error


def test_the_band_of_the_later_visit_decides():
    model = latent_model(100, 5)
    always = np.zeros_like(model.transitions)
    always[np.arange(AGE_BANDS), :, np.arange(AGE_BANDS)] = 1.0  # in band b, joint stage b
    model = replace(model, transitions=always, band_years=3.0)
    rng = np.random.default_rng(0)
    histories = draw_latent_histories(rng, model, 300, 30.0, 0.5)
    histories, states = draw_course(rng, model, histories)
    bands = model.band_of_day(histories.visit_days - histories.birth_days[histories.visit_subjects])
    later = np.setdiff1d(np.arange(len(bands)), histories.first_visits)
    assert (bands[later] != bands[later - 1]).sum() > 30
    np.testing.assert_array_equal(states[later], bands[later])


def test_codes_follow_the_model():
    """First codes of visits, by row of emissions: as frequent as promised."""
    event_set = generate_latent(6000, 60, 9.0, 0.5, 7, 0.3)
    paths, model = latent_paths(6000, 60, 9.0, 0.5, 7, 0.3), latent_model(60, 7, 0.3)
    histories = paths.histories
    codes = event_set.events["code"].combine_chunks().indices.to_numpy()[6000:]
    first = codes[histories.event_places == 0]
    bands = model.band_of_day(histories.visit_days - histories.birth_days[histories.visit_subjects])
    expected = np.zeros((len(first), 60))
    for topic in range(10):
        rows = model.rows[paths.states, topic]
        expected += model.starts[paths.states, topic][:, None] * model.emissions[bands, rows]
    error = np.sqrt((expected * (1 - expected)).sum(axis=0))
    assert (np.abs(np.bincount(first, minlength=60) - expected.sum(axis=0)) < 4 * error).all()


def test_onsets_agree_with_the_stages():
    paths, longer = latent_paths(*OPTIONS), latent_paths(*OPTIONS, follow_up_days=400)
    np.testing.assert_array_equal(paths.states, longer.states)
    model, histories = latent_model(200, 2), paths.histories
    onset = paths.onset_days[histories.visit_subjects]
    np.testing.assert_array_equal(model.states[paths.states] > 0, histories.visit_days[:, None] >= onset)
    assert (longer.onset_days <= paths.onset_days).all()
    new = (longer.onset_days < NEVER) & (paths.onset_days == NEVER)
    assert new.sum() > 100
    days = (longer.onset_days - paths.until_days[:, None])[new]
    assert days.min() >= 1
    assert days.max() <= 400

    last = np.append(histories.first_visits[1:], len(paths.states)) - 1
    for condition in range(4):
        np.testing.assert_array_equal(onset_labels(longer, last, condition, 400), new[:, condition])
    with pytest.raises(ValueError, match="follow_up_days"):
        onset_labels(longer, last, 0, 401)


def test_covariates_decide_what_is_drawn():
    options = (1500, 100, 9.0, 0.6, 3)
    table = generate_latent(*options, covariates=COVARIATES).events
    model = latent_model(100, 3, covariates=COVARIATES)
    assert model.covariates is not None
    codes, timeless = np.array(table["code"].to_pylist()), table["time"].is_null().to_numpy()
    assert set(codes[timeless]) == set(SEXES)
    subjects = table["subject_id"].to_numpy()[timeless]
    assert len(np.unique(subjects)) == len(subjects) == 1500
    np.testing.assert_array_equal(np.array(SEXES)[model.covariates.sex_of(subjects)], codes[timeless])
    assert not np.isin(np.array(generate_latent(*options).events["code"].to_pylist()), SEXES).any()

    # Visits follow the sooner the more ill a subject is, at the chance of the stage.
    rng = np.random.default_rng(0)
    histories, states = draw_course(rng, model, draw_latent_histories(rng, model, 1500, 30.0, 0.5))
    same = np.diff(histories.visit_subjects) == 0
    gaps, before = np.diff(histories.visit_days)[same], states[:-1][same]
    rates = model.covariates.daily_visits
    assert rates is not None
    illness = model.states.sum(axis=1)
    for level in range(4):
        of_level = illness[before] == level
        expected = 1 / rates[illness == level][0]
        assert abs(gaps[of_level].mean() - expected) < 4 * expected / np.sqrt(of_level.sum())
    days = np.repeat(histories.visit_days, histories.visit_events)
    np.testing.assert_array_equal(histories.event_times // 86_400_000_000, days)

    # Treatments come and go: those of the first years are rare in the last ones.
    drawn = draw_codes(rng, model, histories, states)
    eras = np.repeat(model.covariates.era_of(histories.visit_days), histories.visit_events)
    treatment = np.array([code.startswith("RX") for code in model.codes])[drawn]
    early, late = (np.bincount(drawn[treatment & (eras == era)], minlength=100) for era in (0, 6))
    assert np.abs(early / early.sum() - late / late.sum()).sum() > 1.0  # of at most 2


def test_each_covariate_changes_its_own_rows():
    """Sex those of diagnoses and routine care, the year those of treatments, gaps those of routine care."""
    model = latent_model(100, 3, covariates=COVARIATES)
    assert model.covariates is not None
    slots = model.covariates.slots.reshape(*model.covariates.shape, -1)  # [S, E, G, R]
    kinds = np.array([*["diagnosis", "diagnosis", "treatment", "treatment"] * 4, "care", "noise"])
    for axis, changed in enumerate((("diagnosis", "care"), ("treatment",), ("care",))):
        first, last = (model.emissions[:, slots.take(place, axis)[0, 0]] for place in (0, -1))  # [B, R, C]
        assert ((first != last).any(axis=(0, 2)) == np.isin(kinds, changed)).all()


def test_options_out_of_range():
    with pytest.raises(InputError, match=r"data.difficulty is 1.5: give a number from 0 to 1"):
        latent_model(200, 0, 1.5)
    with pytest.raises(
        InputError, match=r"leaves 40 codes to the latent source, which needs 60: raise it by 20"
    ):
        generate_latent(10, 40, 9.0, 0.9, 0)
    with pytest.raises(InputError, match=r"data.difficulty is -0.1"):
        check(PretrainConfig(data=DataConfig(difficulty=-0.1)))
    with pytest.raises(InputError, match=r"data.subjects is 0"):
        generate_latent(0, 100, 9.0, 0.9, 0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"codes": ("DX//",)}, r"data.codes does not go with the latent source"),
        ({"exclude_codes": ("DX//",)}, r"data.exclude_codes does not go with the latent source"),
        ({"duplicates": "drop"}, r"data.duplicates is drop"),
    ],
)
def test_nothing_may_be_dropped(options, message):
    with pytest.raises(InputError, match=message):
        load_events(replace(DataConfig(source="latent", subjects=5), **options))


def test_repeats_are_dropped_from_other_sources():
    data = DataConfig(source="uniform", subjects=300, vocabulary_size=12)
    assert "duplicate in visit" in load_sequences(data, sep_token=False).counts.dropped
    kept = load_sequences(replace(data, duplicates="keep"), sep_token=False)
    assert "duplicate in visit" not in kept.counts.dropped
