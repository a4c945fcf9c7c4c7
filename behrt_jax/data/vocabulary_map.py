"""From the ids of one vocabulary to those of another: data prepared by itself, read by a model."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np

from behrt_jax.data.sequences import Sequences
from behrt_jax.data.vocabulary import SPECIAL_TOKENS, UNK, Vocabulary


@dataclass(frozen=True, eq=False)
class VocabularyMap:
    """How ids of a data set become ids of a model."""

    ids: np.ndarray
    """int32 `[V of the data]`: the new id of each."""
    vocabulary: Vocabulary
    """What the new ids belong to: the base's, with the new codes after it where it is extended."""
    new_codes: tuple[str, ...]
    """Codes of the data that the base has not: added (extended), or read as [UNK]. Most frequent first."""
    new_events: int
    """Events of them in the data's train split."""

    @property
    def identical(self) -> bool:
        """Whether every id stays as it is."""
        return np.array_equal(self.ids, np.arange(len(self.ids)))

    def apply(self, sequences: Sequences) -> Sequences:
        """The same histories in new ids; the very same object where all ids stay as they are.

        Only ``codes``, int32 `[tokens]`, is a new array.
        """
        return sequences if self.identical else replace(sequences, codes=self.ids[sequences.codes])

    def apply_to(self, splits: Mapping[str, Sequences]) -> dict[str, Sequences]:
        """:meth:`apply` for each split."""
        return {name: self.apply(part) for name, part in splits.items()}


def map_vocabulary(of_data: Vocabulary, of_base: Vocabulary, extend: bool) -> VocabularyMap:
    """Map the ids of a data set onto those of a base.

    Args:
        of_data: vocabulary that the data set was prepared with.
        of_base: vocabulary of the model.
        extend: give codes that the base has not ids of their own, after the base's; else they are [UNK].
            A code that no event of the train split has is [UNK] in any case: nothing would train it.
    """
    first = len(SPECIAL_TOKENS)
    ids = np.arange(len(of_data), dtype=np.int32)
    ids[first:] = of_base.encode(of_data.codes[first:])
    new = first + np.flatnonzero(ids[first:] == UNK)  # [n], rows of the data's vocabulary
    new = new[np.argsort(-of_data.counts[new], kind="stable")]
    codes = tuple(of_data.codes[row] for row in new)
    events = int(of_data.counts[new].sum())
    if not extend:
        return VocabularyMap(ids, of_base, codes, events)
    trained = new[of_data.counts[new] > 0]
    ids[trained] = np.arange(len(of_base), len(of_base) + len(trained))
    codes = codes[: len(trained)]
    if not codes:
        return VocabularyMap(ids, of_base, codes, events)
    extended = Vocabulary(
        (*of_base.codes, *codes),
        np.concatenate([of_base.counts, of_data.counts[trained]]),
        (*of_base.descriptions, *(of_data.descriptions[row] for row in trained)),
    )
    return VocabularyMap(ids, extended, codes, events)
