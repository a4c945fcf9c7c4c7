"""The vocabulary: which codes have a row in the embedding table, fitted on the train split alone."""

import hashlib
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from behrt_jax.data.event_rules import REPEATS, matches
from behrt_jax.data.parquet import readable, sound
from behrt_jax.errors import InputError
from behrt_jax.files import write_bytes

SPECIAL_TOKENS = ("[PAD]", "[MASK]", "[UNK]", "[CLS]", "[SEP]")
PAD, MASK, UNK, CLS, SEP = range(len(SPECIAL_TOKENS))

_SCHEMA = pa.schema(
    [("code", pa.string()), ("id", pa.int32()), ("count", pa.int64()), ("description", pa.string())]
)


@dataclass(frozen=True, eq=False)
class Vocabulary:
    """Codes with their ids, an id being a place in ``codes``; the special tokens come first."""

    codes: tuple[str, ...]
    """All V rows, special tokens included."""
    counts: np.ndarray
    """int64 ``[V]``: events of the train split. 0 for special tokens, but [UNK]'s counts the train
    events whose code got no row."""
    descriptions: tuple[str | None, ...]
    """V texts, None where the source has none."""

    def __len__(self) -> int:
        return len(self.codes)

    def encode(self, codes: Sequence[str]) -> np.ndarray:
        """Ids of codes, int32 ``[n]``; a code without a row, or named like a special token, is [UNK].

        Meant for the distinct codes of a data set, not for its events: index the result by the events.
        """
        first = len(SPECIAL_TOKENS)
        ids = {code: row for row, code in enumerate(self.codes[first:], start=first)}
        return np.fromiter((ids.get(code, UNK) for code in codes), dtype=np.int32, count=len(codes))

    def extended(
        self,
        codes: Sequence[str],
        counts: np.ndarray | None = None,
        descriptions: Sequence[str | None] | None = None,
    ) -> "Vocabulary":
        """The vocabulary with more codes after its own, of unknown counts (0) where none are given."""
        if not codes:
            return self
        counts = np.zeros(len(codes), np.int64) if counts is None else counts
        texts = (None,) * len(codes) if descriptions is None else descriptions
        return Vocabulary(
            (*self.codes, *codes), np.concatenate([self.counts, counts]), (*self.descriptions, *texts)
        )

    def counted(self, counts: Mapping[str, int]) -> "Vocabulary":
        """The same rows with the counts of other events: code -> events."""
        rows = np.array([counts.get(code, 0) for code in self.codes], np.int64)
        rows[: len(SPECIAL_TOKENS)] = 0
        rows[UNK] = sum(counts.values()) - rows.sum()
        return Vocabulary(self.codes, rows, self.descriptions)

    def fingerprint(self) -> str:
        """SHA-256 of the codes in order: vocabularies with the same fingerprint encode alike."""
        return hashlib.sha256(json.dumps(self.codes).encode()).hexdigest()

    def write(self, path: Path) -> None:
        """Write a Parquet table with the columns code, id, count and description."""
        write_bytes(path, self.to_bytes())

    def to_bytes(self) -> bytes:
        """Content of the file that :meth:`write` writes."""
        columns = [self.codes, np.arange(len(self), dtype=np.int32), self.counts, self.descriptions]
        arrays = [pa.array(column, type=field.type) for column, field in zip(columns, _SCHEMA, strict=True)]
        with io.BytesIO() as file:
            pq.write_table(pa.Table.from_arrays(arrays, schema=_SCHEMA), file)
            return file.getvalue()

    @classmethod
    def read(cls, path: Path) -> "Vocabulary":
        """Read what :meth:`write` wrote.

        Raises:
            InputError: no file, not such a table, or rows that are not in the order of their ids.
        """
        problem = (
            f"{path} cannot be read as a vocabulary with the columns {', '.join(_SCHEMA.names)}: "
            "give the vocabulary.parquet of a run or of prepared data."
        )
        with readable(path, problem), pq.ParquetFile(path) as file:
            table = sound(path, file.read(columns=_SCHEMA.names)).cast(_SCHEMA)
        codes = tuple(table["code"].to_pylist())
        in_order = np.array_equal(table["id"].to_numpy(), np.arange(len(codes)))
        if not in_order or codes[: len(SPECIAL_TOKENS)] != SPECIAL_TOKENS:
            raise InputError(
                f"{path} is not a vocabulary of this library: its rows must be in the order of their ids "
                f"and start with {' '.join(SPECIAL_TOKENS)}."
            )
        return cls(codes, table["count"].to_numpy(), tuple(table["description"].to_pylist()))


def fit_vocabulary(
    counts: Mapping[str, int],
    min_count: int,
    max_rows: int | None,
    declared_codes: tuple[str, ...] | None = None,
    descriptions: Mapping[str, str] | None = None,
    options: str = "data.",
) -> Vocabulary:
    """Choose the codes that get a row: the frequent ones, most frequent first, ties by code.

    Args:
        counts: code -> events in the train split after filtering, 1 or more.
        min_count: a code with fewer events gets no row, unless it is declared.
        max_rows: largest number of rows, special tokens included; the most frequent codes stay.
        declared_codes: codes that get a row whatever their count (0 included).
        descriptions: code -> text.
        options: goes before the names of options in messages.

    Raises:
        InputError: a code is named like a special token, ``max_rows`` has no room for the declared codes
            or for any code at all, or no code is frequent enough.
    """
    declared = dict.fromkeys(declared_codes or (), 0)
    taken = sorted({*counts, *declared}.intersection(SPECIAL_TOKENS))
    if taken:
        raise InputError(
            f"The code {taken[0]} is named like a special token: rename it in the data, or leave it out "
            f"with {options}exclude_codes."
        )
    least = len(SPECIAL_TOKENS) + max(len(declared), 1)
    if max_rows is not None and max_rows < least:
        raise InputError(
            f"{options}vocabulary_size is {max_rows}, but {len(SPECIAL_TOKENS)} special tokens and "
            f"{least - len(SPECIAL_TOKENS)} codes need a row each: give at least {least}."
        )

    def most_frequent(codes: Sequence[str]) -> list[str]:
        return sorted(codes, key=lambda code: (-counts.get(code, 0), code))

    frequent = [code for code, count in counts.items() if count >= min_count and code not in declared]
    room = None if max_rows is None else max_rows - len(SPECIAL_TOKENS) - len(declared)
    chosen = most_frequent([*declared, *most_frequent(frequent)[:room]])
    if not chosen:
        raise InputError(
            f"No code occurs {min_count} times or more in the train split (the most frequent one occurs "
            f"{max(counts.values(), default=0)} times): lower {options}min_count, select more codes "
            f"with {options}codes, or give more data."
        )
    rows = np.zeros(len(SPECIAL_TOKENS) + len(chosen), dtype=np.int64)  # [V]
    rows[len(SPECIAL_TOKENS) :] = [counts.get(code, 0) for code in chosen]
    rows[UNK] = sum(counts.values()) - rows.sum()
    codes = (*SPECIAL_TOKENS, *chosen)
    texts = descriptions or {}
    return Vocabulary(codes, rows, tuple(texts.get(code) for code in codes))


class Descriptions:
    """Texts of codes, also of those with a quantile or a count behind them."""

    def __init__(self, texts: Mapping[str, str]):
        self._texts = texts

    def of(self, code: str) -> str | None:
        if code in self._texts or not self._texts:
            return self._texts.get(code)
        for count in REPEATS:
            if code.endswith(count) and (text := self.of(code.removesuffix(count))) is not None:
                return f"{text} ({count.removeprefix('//')})"
        base, _, place = code.rpartition("//Q")
        if base in self._texts and place.isdigit():
            return f"{self._texts[base]} (Q{place})"
        return None


def matching_codes(vocabulary: Vocabulary, patterns: tuple[str, ...], option: str) -> np.ndarray:
    """Rows of the vocabulary, special tokens aside, that a pattern matches: bool ``[V]``.

    Raises:
        InputError: a pattern is no regular expression.
    """
    found = matches(vocabulary.codes, patterns, option)
    found[: len(SPECIAL_TOKENS)] = False
    return found
