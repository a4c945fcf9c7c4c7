"""Questions about the future: which are asked, their answers, and that drawing them biases nothing."""

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest

from behrt_jax.config.training import QueriesConfig
from behrt_jax.data import questions as questions_module
from behrt_jax.data.batches import RowShape
from behrt_jax.data.events import DAY, SubjectTimes
from behrt_jax.data.questions import (
    FIRST_CODE,
    Catalogue,
    QuestionSampler,
    known_until,
    prediction_times,
    prevalences,
    question_batches,
    uniforms,
)
from behrt_jax.data.sequences import with_separators
from behrt_jax.data.vocabulary import UNK
from behrt_jax.errors import InputError
from tests.data.histories import CODES, Event, sequence_set

CONFIG = QueriesConfig(times=2, questions=6, horizon_days=(10.0, 40.0, 90.0), groups=("A//",))
SHAPE = RowShape(12)


def random_set(seed=0, subjects=40):
    """Visits of one to three codes, some of which go on after the next one has begun; some subjects die."""
    rng = np.random.default_rng(seed)
    histories, deaths = {}, {}
    for subject in range(subjects):
        days = np.cumsum(rng.integers(1, 40, rng.integers(1, 9)))
        histories[subject] = [
            Event(int(day) * DAY + number * 1000, str(rng.choice(CODES)), visit - int(rng.random() < 0.1))
            for visit, day in enumerate(days)
            for number in range(rng.integers(1, 4))
        ]
        if rng.random() < 0.3:
            deaths[subject] = (int(days[-1]) + int(rng.integers(0, 60))) * DAY
    data = sequence_set({"train": histories, "tuning": histories})
    died = SubjectTimes(np.array([*deaths], np.int64), np.array([*deaths.values()], np.int64))
    counts = np.bincount(data.splits["train"].codes, minlength=len(data.vocabulary)).astype(np.int64)
    vocabulary = replace(data.vocabulary, counts=counts)
    return replace(data, vocabulary=vocabulary, deaths=dict.fromkeys(data.splits, died))


DATA = random_set()
PART = DATA.splits["train"]
CATALOGUE = Catalogue.of(DATA.vocabulary, CONFIG)
SAMPLER = QuestionSampler.of(PART, CATALOGUE, CONFIG)
TIMES = prediction_times(DATA, "train", 10.0)
UNTIL = known_until(PART, DATA.deaths["train"])


def members(identity):
    """Codes of an id of the catalogue."""
    size = len(DATA.vocabulary)
    return {identity} if identity < size else set(np.flatnonzero(CATALOGUE.groups[identity - size]))


def comes(subject, time, codes, days):
    """By a slow loop: one of the codes comes after the time and within so many days."""
    return any(
        PART.codes[place] in codes and time < PART.times[place] <= time + days * DAY
        for place in range(PART.offsets[subject], PART.offsets[subject + 1])
    )


def draw(times=TIMES, seed=0, epoch=0, sampler=SAMPLER):
    return sampler.draw(times, uniforms(seed, epoch, np.arange(len(times)), 4 * sampler.questions))


def test_prediction_times_are_ends_of_visits_that_are_followed_up():
    found = set(zip(TIMES.subjects.tolist(), TIMES.up_to.tolist(), strict=True))
    expected = {
        (subject, place + 1)
        for subject in range(len(PART))
        for place in range(PART.offsets[subject], PART.offsets[subject + 1])
        if PART.visits[place] not in PART.visits[place + 1 : PART.offsets[subject + 1]]
        and UNTIL[subject] >= PART.times[place] + 10 * DAY
    }
    assert found == expected
    ends = sum(PART.visits_per_subject)
    assert sum(TIMES.left_out.values()) == ends - len(expected)
    runs = sum(np.count_nonzero(np.diff(PART.visits[a:b])) + 1 for a, b in pairwise(PART.offsets))
    assert runs > ends  # some visits are interrupted
    last = PART.times[PART.offsets[1:] - 1]
    assert (last <= UNTIL).all() and (last < UNTIL).any()  # some die later


def test_events_and_follow_up_at_the_very_end_of_a_horizon_count():
    """An end of a visit is not asked about where another event has its time."""
    end = 10 * DAY
    visits = {
        1: [Event(0, "A//1", 0), Event(end, "B//1", 1)],  # comes, and is followed up, to the microsecond
        2: [Event(0, "A//1", 0), Event(end + 1, "B//1", 1)],
        3: [Event(0, "A//1", 0), Event(end - 1, "B//1", 1)],  # not followed up
        4: [Event(0, "A//1", 0)],  # dies at the end
        5: [Event(0, "A//1", 0)],
        6: [Event(0, "A//1", 0), Event(0, "B//1", 1), Event(end, "B//1", 2)],
        7: [Event(0, "A//1", 0), Event(1, "B//1", 1), Event(end + 1, "A//1", 2)],  # of the same day
    }
    data = sequence_set({"train": visits})
    died = SubjectTimes(np.array([4, 5]), np.array([end, end - 1]))
    counts = np.ones(len(data.vocabulary), np.int64)
    data = replace(data, deaths={"train": died}, vocabulary=replace(data.vocabulary, counts=counts))
    part, config = data.splits["train"], replace(CONFIG, horizon_days=(10.0,), groups=(), questions=50)
    times = prediction_times(data, "train", 10.0)
    asked = list(zip(part.subject_ids[times.subjects].tolist(), times.times.tolist(), strict=True))
    assert asked == [(1, 0), (2, 0), (4, 0), (6, 0), (7, 0), (7, 1)]
    assert times.left_out["another event at the same time"] == 1
    known = times.up_to - part.offsets[times.subjects]
    assert known.tolist() == [1, 1, 1, 2, 1, 2]  # tokens of the history
    sampler = QuestionSampler.of(part, Catalogue.of(data.vocabulary, config), config)
    questions = draw(times, sampler=sampler)
    assert sampler.known(times).all()
    late = questions.codes == data.vocabulary.codes.index("B//1")
    answers = [set(questions.answers[n][late[n]].tolist()) for n in range(len(times))]
    assert answers == [{1.0}, {0.0}, {0.0}, {1.0}, {1.0}, {0.0}]


def test_answers_are_those_of_a_slow_loop_and_no_horizon_ends_after_follow_up():
    questions = draw()
    positive = 0
    for n in range(len(TIMES)):
        for q in range(CONFIG.questions):
            days, code = float(questions.horizons[n, q]), int(questions.codes[n, q])
            assert TIMES.times[n] + days * DAY <= TIMES.known_until[n]
            answer = comes(TIMES.subjects[n], TIMES.times[n], members(code), days)
            assert questions.answers[n, q] == answer
            positive += answer
    assert 0.2 < positive / questions.answers.size < 0.9
    assert set(np.unique(questions.horizons)) == set(CONFIG.horizon_days)
    assert questions.codes.min() >= FIRST_CODE and questions.codes.max() == len(DATA.vocabulary)  # the group


@pytest.mark.parametrize("share", [0.0, 0.5, 0.9])
def test_weights_take_back_how_codes_were_drawn(share):
    """The weighted mean of a function of question and answer is that over the catalogue."""
    sampler = replace(SAMPLER, positive_share=share, questions=3000)
    chosen = TIMES.take(np.flatnonzero(SAMPLER.known(TIMES).all(axis=1))[:4])
    questions = draw(chosen, sampler=sampler)
    ids = np.arange(len(CATALOGUE.shares))
    value = 1.0 + ids % 3  # differs between codes
    for n in range(len(chosen)):
        for days in CONFIG.horizon_days:
            truth = np.array([comes(chosen.subjects[n], chosen.times[n], members(c), days) for c in ids])
            own = questions.horizons[n] == days
            weighted = questions.weights[n, own] * value[questions.codes[n, own]]
            for answer in (0, 1):
                terms = weighted * (questions.answers[n, own] == answer)
                expected = (CATALOGUE.shares * value * (truth == answer)).sum()
                error = terms.std() / np.sqrt(own.sum())
                assert abs(terms.mean() - expected) <= 4.5 * error + 1e-6
    if share:
        drawn = questions.answers.mean()
        assert drawn > draw(chosen, sampler=replace(sampler, positive_share=0.0)).answers.mean() + 0.05


def test_prevalence_is_the_share_of_those_followed_up():
    found = prevalences(SAMPLER, TIMES)
    for h, days in enumerate(CONFIG.horizon_days):
        known = [n for n in range(len(TIMES)) if TIMES.times[n] + days * DAY <= TIMES.known_until[n]]
        for identity in (FIRST_CODE, FIRST_CODE + 3, len(DATA.vocabulary)):
            codes = members(identity)
            count = sum(comes(TIMES.subjects[n], TIMES.times[n], codes, days) for n in known)
            assert found[identity, h] == pytest.approx((count + 0.5) / (len(known) + 1))


def test_prevalence_is_counted_in_parts(monkeypatch):
    whole = prevalences(SAMPLER, TIMES)
    monkeypatch.setattr(questions_module, "_PIECE_TOKENS", 7)
    np.testing.assert_array_equal(prevalences(SAMPLER, TIMES), whole)


def batches(packed=True, cls_token=False, **options):
    shape = RowShape(12, packed, cls_token)
    return question_batches(DATA, "train", CATALOGUE, CONFIG, shape, batch_size=9, **options)


def by_example(one, epoch=0):
    """Example -> codes and visits of its history, and its questions, of all batches of an epoch."""
    found = {}
    for index in range(one.steps_per_epoch):
        batch = one.batch(epoch * one.steps_per_epoch + index)
        for row, slot in zip(*np.nonzero(batch.examples >= 0), strict=True):
            own = batch.rows.segment_ids[row] == slot + 1
            history = batch.rows.codes[row, own].tolist(), batch.rows.visits[row, own].tolist()
            asked = [values[row, slot].tolist() for values in batch.questions]
            assert found.setdefault(int(batch.examples[row, slot]), (history, asked)) == (history, asked)
        empty = batch.examples < 0
        assert not batch.questions.weights[empty].any()
    return found


def test_each_history_ends_with_its_prediction_time_and_is_asked_packed_as_alone():
    endless, alone = batches(), batches(packed=False, endless=False)
    whole = by_example(batches(endless=False))
    assert whole == by_example(alone)
    assert by_example(alone, 1) == by_example(alone)  # the same again
    times = alone.examples
    assert set(whole) == set(range(len(times))) and len(times) > 40
    assert np.bincount(times.subjects).max() == CONFIG.times
    for n, ((codes, _), _) in whole.items():
        first = max(PART.offsets[times.subjects[n]], times.up_to[n] - 12)
        assert codes == PART.codes[first : times.up_to[n]].tolist()
    shown = by_example(endless)
    assert all(whole[n] == shown[n] for n in shown)  # the first epoch is the same one
    assert len(shown) >= 0.8 * len(whole)
    with_cls = by_example(batches(cls_token=True, endless=False))
    assert {n: (codes[1:], asked) for n, ((codes, _), asked) in with_cls.items() if len(codes) < 12} == {
        n: (codes, asked) for n, ((codes, _), asked) in whole.items() if n in with_cls and len(codes) < 11
    }


def test_batches_are_a_function_of_seed_and_step():
    one, other = batches(), batches()
    late = one.steps_per_epoch + 1
    again = other.batch(late)
    for ours, theirs in zip(one.batch(late).questions, again.questions, strict=True):
        np.testing.assert_array_equal(ours, theirs)
    first, second = by_example(one, 0), by_example(one, 1)
    assert any(first[n][0] != second[n][0] for n in first.keys() & second.keys())  # at other times
    draws = {uniforms(*of, np.arange(3), 5).tobytes() for of in ((0, 0), (0, 1), (1, 0), (1, 1))}
    assert len(draws) == 4  # and asked other things
    different = batches(seed=1).batch(late)
    assert not np.array_equal(different.questions.codes, again.questions.codes)
    shapes = {batch.questions.codes.shape for batch in map(one.batch, range(2 * one.steps_per_epoch))}
    assert len(shapes) == 1
    wider = one.with_rows_a_multiple_of(8)
    assert wider.batch(0).questions.codes.shape[0] % 8 == 0


def test_codes_that_can_be_masked_are_counted_without_separators_and_unknown_ones():
    codes = PART.codes.copy()
    codes[::4] = UNK
    part = with_separators(replace(PART, codes=codes))
    data = replace(DATA, splits={**DATA.splits, "train": part})
    for packed in (True, False):
        one = question_batches(
            data, "train", CATALOGUE, CONFIG, RowShape(12, packed, True), batch_size=9, endless=False
        )
        rows = [one.batch(step).rows for step in range(one.steps_per_epoch)]
        assert one.maskable_per_epoch == sum(int((batch.codes >= FIRST_CODE).sum()) for batch in rows)
        assert one.tokens_per_epoch == sum(int((batch.segment_ids > 0).sum()) for batch in rows)


@pytest.mark.parametrize("delay", ["5", "visit"])
def test_a_code_that_is_known_late_keeps_visits_from_being_asked_about(delay):
    late = DATA.vocabulary.codes.index("B//1")

    def known_at(subject, place):
        own = slice(*PART.offsets[subject : subject + 2])
        ended = PART.times[own][PART.visits[own] == PART.visits[place]].max()
        return ended if delay == "visit" else PART.times[place] + int(delay) * DAY

    kept = {
        (n, up)
        for n, up, time in zip(TIMES.subjects, TIMES.up_to, TIMES.times, strict=True)
        if not any(
            PART.codes[place] == late and known_at(n, place) > time for place in range(PART.offsets[n], up)
        )
    }
    delayed = prediction_times(DATA, "train", 10.0, (f"B//1={delay}",))
    assert set(zip(delayed.subjects, delayed.up_to, strict=True)) == kept
    assert len(kept) < len(TIMES)
    assert delayed.left_out["a code of the history is not known yet"] >= len(TIMES) - len(kept)


def test_wrong_questions_are_refused():
    with pytest.raises(InputError, match="'Z' matches no code of the vocabulary"):
        Catalogue.of(DATA.vocabulary, replace(CONFIG, groups=("Z",)))
    with pytest.raises(InputError, match=r"queries.codes: 'Z//' matches no code"):
        Catalogue.of(DATA.vocabulary, replace(CONFIG, codes=("A//", "Z//")))
    with pytest.raises(InputError, match=r"follow-up ends before the shortest horizon does: .*horizon_days"):
        prediction_times(DATA, "train", 1e5)
    unseen = replace(DATA.vocabulary, counts=np.zeros(len(DATA.vocabulary), np.int64))
    with pytest.raises(InputError, match=r"queries\.codes: none of the codes that it matches occurs"):
        Catalogue.of(unseen, CONFIG)
    facts = np.array([code.startswith("A//") for code in DATA.vocabulary.codes])
    never = replace(DATA.vocabulary, counts=np.where(facts, 0, DATA.vocabulary.counts))
    with pytest.raises(InputError, match=r"no code that 'A//' matches occurs .*static facts never do"):
        Catalogue.of(never, CONFIG)


def test_shares_follow_frequency_by_its_power():
    asked = np.arange(len(DATA.vocabulary)) >= FIRST_CODE
    counts = DATA.vocabulary.counts[asked]
    shares = CATALOGUE.shares[: len(DATA.vocabulary)][asked]
    np.testing.assert_allclose(shares / shares.sum(), counts**0.5 / (counts**0.5).sum())
    assert CATALOGUE.shares[len(DATA.vocabulary)] == pytest.approx(CONFIG.group_share)
    assert CATALOGUE.shares.sum() == pytest.approx(1)
    counts = np.where(np.arange(len(DATA.vocabulary)) == FIRST_CODE, 0, DATA.vocabulary.counts)
    unseen = Catalogue.of(replace(DATA.vocabulary, counts=counts), CONFIG)
    assert np.flatnonzero(unseen.shares).tolist() == list(range(FIRST_CODE + 1, len(DATA.vocabulary) + 1))
    only = Catalogue.of(DATA.vocabulary, replace(CONFIG, codes=("B//",), groups=()))
    assert np.count_nonzero(only.shares) == 2
