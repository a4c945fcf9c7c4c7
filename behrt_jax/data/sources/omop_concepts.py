"""Concepts of an OMOP vocabulary: the text of a concept id, its ancestor, and the codes of a table's rows."""

# pyarrow.compute makes its functions on import, where pyright does not see them.
# pyright: reportAttributeAccessIssue=false

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from behrt_jax.data.sources.cdm_files import parts_of, read_chunks
from behrt_jax.data.sources.cdm_values import Kind
from behrt_jax.data.sources.omop_tables import ConceptColumns
from behrt_jax.errors import InputError

MAX_LEVELS = 2
"""How far up an ancestor may be."""


def integers(batch: pa.RecordBatch, column: str) -> np.ndarray:
    """An int64 column ``[rows]`` with 0 for null."""
    return batch.column(column).fill_null(0).to_numpy(zero_copy_only=False)


def places(ids: np.ndarray, wanted: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Where ``wanted`` is in ascending ``ids``: places (valid only where found), and whether it is there."""
    if not len(ids):
        return np.zeros(len(wanted), np.int64), np.zeros(len(wanted), bool)
    # In ascending order the search goes through memory once: several times faster than in random order.
    order = np.argsort(wanted)
    place = np.empty(len(wanted), np.int64)
    place[order] = np.minimum(np.searchsorted(ids, wanted[order]), len(ids) - 1)
    return place, ids[place] == wanted


@dataclass(frozen=True, eq=False)
class Concepts:
    """What is needed of the concept table while events are read; ids ascending, all ``[concepts]``."""

    ids: np.ndarray  # int64
    codes: pa.Array  # string, null where unknown
    vocabularies: pa.DictionaryArray
    domains: np.ndarray  # int32, equal for concepts of the same domain; -1 where unknown

    def texts(self, ids: np.ndarray) -> list[str]:
        """``vocabulary_id/concept_code`` of each id where known, else the id."""
        place, found = places(self.ids, ids)
        take = pa.array(place, mask=~found)
        codes = self.codes.take(take).to_pylist()
        vocabularies = self.vocabularies.take(take).to_pylist()
        rows = zip(ids.tolist(), vocabularies, codes, strict=True)
        return [f"{vocabulary}/{code}" if vocabulary and code else str(id_) for id_, vocabulary, code in rows]

    def domain_of(self, ids: np.ndarray) -> np.ndarray:
        """int32 domain of each id, -1 where unknown."""
        place, found = places(self.ids, ids)
        return np.where(found, self.domains[place] if len(self.ids) else -1, -1)


def load_concepts(files: Sequence[Path]) -> Concepts:
    """Read the concept table, without its names. Of a concept that is there twice the first row counts."""
    kinds: dict[str, Kind] = {
        "concept_id": "integer",
        "concept_code": "text",
        "vocabulary_id": "text",
        "domain_id": "text",
    }
    shared = ("vocabulary_id", "domain_id")  # few distinct texts
    columns: dict[str, list[pa.Array]] = {name: [] for name in kinds}
    for batch in _chunks(files, kinds):
        for name, column in zip(kinds, batch.columns, strict=True):
            columns[name].append(column.dictionary_encode() if name in shared else column)
    types = [pa.int64(), pa.string(), *[pa.dictionary(pa.int32(), pa.string())] * len(shared)]
    chunked = [pa.chunked_array(columns[name], kind) for name, kind in zip(kinds, types, strict=True)]
    rows = pa.table(chunked, names=list(kinds)).unify_dictionaries().combine_chunks()
    ids, first = np.unique(rows["concept_id"].fill_null(0).to_numpy(), return_index=True)
    vocabulary, domain = (rows[name].combine_chunks().take(pa.array(first)) for name in shared)
    codes = pc.utf8_trim_whitespace(rows["concept_code"].combine_chunks().take(pa.array(first)))
    return Concepts(ids, codes, vocabulary, domain.indices.fill_null(-1).to_numpy(zero_copy_only=False))


def load_names(files: Sequence[Path], ids: Iterable[int]) -> dict[int, str]:
    """concept_name of some concepts, read in pieces."""
    wanted = np.unique(np.fromiter(ids, np.int64))
    names: dict[int, str] = {}
    for batch in _chunks(files, {"concept_id": "integer", "concept_name": "text"}):
        batch = batch.filter(pa.array(places(wanted, integers(batch, "concept_id"))[1]))
        for concept, name in zip(*(column.to_pylist() for column in batch.columns), strict=True):
            if name and name.strip():
                names.setdefault(concept, name.strip())
    return names


def load_ancestors(files: Sequence[Path], concepts: Concepts) -> tuple[np.ndarray, np.ndarray]:
    """The concepts that have an ancestor to be replaced by, ascending, and that ancestor; int64 ``[n]``.

    Of a concept's ancestors that are 1 to `MAX_LEVELS` levels up (``min_levels_of_separation``) and in its
    own domain, the one furthest up; of several equally far, the one with the smallest id.

    Raises:
        InputError: there is no table, or it relates no two concepts.
    """
    best = np.empty((0, 3), np.int64)  # descendant, minus levels, ancestor
    rows = 0
    kinds: dict[str, Kind] = {
        "descendant_concept_id": "integer",
        "min_levels_of_separation": "integer",
        "ancestor_concept_id": "integer",
    }
    for batch in _chunks(files, kinds):
        rows += batch.num_rows
        down, levels, up = (integers(batch, column) for column in kinds)
        domain = concepts.domain_of(down)
        keep = (levels >= 1) & (levels <= MAX_LEVELS) & (domain >= 0) & (domain == concepts.domain_of(up))
        best = np.concatenate([best, np.stack([down, -levels, up], axis=1)[keep]])
        best = best[np.lexsort(best.T[::-1])]
        best = best[np.unique(best[:, 0], return_index=True)[1]]
    if not rows:
        raise InputError(
            "ancestors is set, but the table concept_ancestor is missing or empty: add it (OHDSI's "
            "vocabulary download has it) or leave the option out."
        )
    return best[:, 0], best[:, 2]


def _chunks(files: Sequence[Path], kinds: dict[str, Kind]) -> Iterator[pa.RecordBatch]:
    for file in files:
        for part in parts_of(file):
            yield from read_chunks(part, kinds)


@dataclass(frozen=True, eq=False)
class RowConcepts:
    """What the rows of a batch say happened; all ``[rows]``."""

    prefix: str
    ids: np.ndarray  # int64 concept ids, 0 where there is none
    values: pa.Array  # source values, null where a concept id is there or no value is
    from_source: np.ndarray  # bool: the id is that of the source concept
    rolled_up: np.ndarray  # bool: the id is that of an ancestor

    def named(self) -> np.ndarray:
        """Whether a row has a concept or a value to make its code of."""
        return (self.ids != 0) | self.valued()

    def valued(self) -> np.ndarray:
        """Whether a row has nothing but a source value."""
        return self.values.is_valid().to_numpy(zero_copy_only=False)


def row_concepts(
    batch: pa.RecordBatch, columns: ConceptColumns, ancestors: tuple[np.ndarray, np.ndarray] | None
) -> RowConcepts:
    """The concept of each row, else its source concept, else its source value without blanks around it."""
    standard = integers(batch, columns.concept)
    ids = np.where(standard == 0, integers(batch, columns.source_concept), standard)
    rolled_up = np.zeros(len(ids), bool)
    if ancestors is not None:
        place, rolled_up = places(ancestors[0], ids)
        ids = np.where(rolled_up, ancestors[1][place], ids) if len(ancestors[0]) else ids
    values = pa.nulls(len(ids), pa.string())
    if columns.source_value:
        text = pc.utf8_trim_whitespace(batch.column(columns.source_value))
        use = pc.and_(pa.array(ids == 0), pc.fill_null(pc.not_equal(text, ""), False))
        values = pc.if_else(use, text, None)
    return RowConcepts(columns.prefix, ids, values, (standard == 0) & (ids != 0), rolled_up)


def encode_codes(rows: RowConcepts, keep: np.ndarray, concepts: Concepts) -> tuple[pa.Array, np.ndarray]:
    """Codes of the kept rows, as a dictionary array, and the distinct concept ids among them."""
    ids = rows.ids[keep]
    kept = pa.array(ids, mask=ids == 0).dictionary_encode()
    values = rows.values.filter(pa.array(keep)).dictionary_encode()
    used = kept.dictionary.to_numpy()
    texts = [*concepts.texts(used), *(f"SOURCE/{value}" for value in values.dictionary.to_pylist())]
    distinct = pa.array([f"{rows.prefix}//{text}" for text in texts], pa.string()).dictionary_encode()
    place = pc.coalesce(kept.indices, pc.add(values.indices, pa.scalar(len(used), pa.int32())))
    return pa.DictionaryArray.from_arrays(distinct.indices.take(place), distinct.dictionary), used
