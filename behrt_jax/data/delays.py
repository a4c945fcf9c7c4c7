"""When events are known: some codes only days after their time, or at the end of their visit."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from behrt_jax.data.event_rules import DAY, matches
from behrt_jax.data.ragged import ragged_indices
from behrt_jax.data.sequences import Sequences
from behrt_jax.data.vocabulary import SPECIAL_TOKENS, UNK, Vocabulary
from behrt_jax.errors import InputError


def parse_delay(option: str) -> tuple[str, float | None]:
    """Pattern and days of ``REGEX=DAYS``; None for ``REGEX=visit``.

    Raises:
        InputError: it has another form, or the days are negative or no number.
    """
    pattern, _, delay = option.rpartition("=")
    try:
        days = None if delay == "visit" else float(delay)
    except ValueError:
        days = -1.0
    if not pattern or (days is not None and not 0 <= days < 1e6):
        raise InputError(f"--delays has {option!r}: write REGEX=DAYS, such as DIAGNOSIS//=2, or REGEX=visit.")
    return pattern, days


@dataclass(frozen=True, eq=False)
class CodeDelays:
    """The delays of every row of a vocabulary."""

    micros: np.ndarray
    """int64 ``[V]``: how long after its time a token is known."""
    by_visit: np.ndarray
    """bool ``[V]``: it is not known before its visit has ended either."""

    @property
    def delayed(self) -> np.ndarray:
        """Bool ``[V]``: known later than at its time."""
        return self.by_visit | (self.micros > 0)

    def known_at(self, part: Sequences, subjects: np.ndarray) -> np.ndarray:
        """When each token of some subjects is known.

        Args:
            part: the histories.
            subjects: int64 ``[subjects]``, places in ``part``, distinct.

        Returns:
            int64 ``[tokens of these subjects, one after the other]``, microseconds since 1970.
        """
        lengths = part.lengths[subjects]
        tokens = ragged_indices(part.offsets[subjects], lengths)
        times, codes = part.times[tokens], part.codes[tokens]
        known_at = times + self.micros[codes]
        waits = self.by_visit[codes]
        if not waits.any():
            return known_at
        # Visits are numbered from 0 for each subject, so that a subject has no more of them than tokens.
        visit = np.repeat(np.cumsum(lengths) - lengths, lengths) + part.visits[tokens]
        ends = np.full(len(tokens), np.iinfo(np.int64).min)
        np.maximum.at(ends, visit, times)
        return np.where(waits, np.maximum(known_at, ends[visit]), known_at)


def code_delays(vocabulary: Vocabulary, options: Sequence[str]) -> CodeDelays:
    """What delays given as ``REGEX=DAYS`` or ``REGEX=visit`` mean for each code.

    A pattern matches at the start of a code. Where several match, the latest counts. [UNK] may stand for
    any code, so that it waits for all of them.

    Raises:
        InputError: an option has another form.
    """
    micros, by_visit = np.zeros(len(vocabulary), np.int64), np.zeros(len(vocabulary), bool)
    for option in options:
        pattern, days = parse_delay(option)
        chosen = matching_codes(vocabulary, (pattern,), "--delays")
        chosen[UNK] = True
        if days is None:
            by_visit |= chosen
        else:
            micros[chosen] = np.maximum(micros[chosen], int(days * DAY))
    return CodeDelays(micros, by_visit)


def matching_codes(vocabulary: Vocabulary, patterns: tuple[str, ...], option: str) -> np.ndarray:
    """Rows of the vocabulary, special tokens aside, that a pattern matches: bool ``[V]``.

    Raises:
        InputError: a pattern is no regular expression.
    """
    found = matches(vocabulary.codes, patterns, option)
    found[: len(SPECIAL_TOKENS)] = False
    return found
