"""What a pretrained model makes of codes: which it takes for which, and which lie near one another.

Both are for people to read, so codes that hardly any subject has are left out.
"""

import numpy as np

from behrt_jax.data.vocabulary import SPECIAL_TOKENS, Vocabulary
from behrt_jax.evaluation.masked_codes import MaskedCodeResults
from behrt_jax.files import JsonObject

LEAST = 10
"""Subjects, and events, that a code must have to be named."""


def confusions(vocabulary: Vocabulary, results: MaskedCodeResults, most: int = 15) -> list[JsonObject]:
    """Masked codes that a model misses most often, each with the code that it most often predicts instead.

    Args:
        vocabulary: of the model.
        results: with its guesses.
        most: codes to name.

    Returns:
        By falling number of misses, of codes masked in `LEAST` subjects or more: ``code`` and
        ``description``, ``masked`` (how often), ``subjects``, ``found`` (share of hits), ``instead_code`` and
        ``instead_description`` (with `LEAST` train events or more), and ``instead_share`` of ``masked``.
    """
    assert results.guesses is not None
    codes, guesses = results.codes.astype(np.int64), results.guesses.astype(np.int64)
    size = len(vocabulary)
    masked = np.bincount(codes, minlength=size)
    missed = np.bincount(codes[codes != guesses], minlength=size)
    # Distinct pairs of a code and a subject.
    pairs = np.unique(np.stack([codes, results.subjects.astype(np.int64)]), axis=1)
    subjects = np.bincount(pairs[0], minlength=size)
    often = vocabulary.counts >= LEAST
    often[: len(SPECIAL_TOKENS)] = False
    named = np.flatnonzero((subjects >= LEAST) & (missed > 0) & often)
    found = []
    for code in named[np.argsort(-missed[named], kind="stable")][:most].tolist():
        instead = np.bincount(guesses[(codes == code) & (guesses != code)], minlength=size)
        instead[~often] = 0
        taken = int(np.argmax(instead))
        if not instead[taken]:
            continue
        found.append(
            {
                **_named(vocabulary, code),
                "masked": int(masked[code]),
                "subjects": int(subjects[code]),
                "found": 1 - float(missed[code] / masked[code]),
                **{f"instead_{name}": value for name, value in _named(vocabulary, taken).items()},
                "instead_share": float(instead[taken] / masked[code]),
            }
        )
    return found


def neighbours(
    vocabulary: Vocabulary, embeddings: np.ndarray, most: int = 12, near: int = 4
) -> list[JsonObject]:
    """The most frequent codes, each with those whose embeddings point the most in its direction.

    Args:
        vocabulary: of the model.
        embeddings: of its codes, float ``[V, E]``.
        most: codes to name.
        near: neighbours of each.

    Returns:
        By falling frequency: ``code``, ``description``, ``events`` (of the train split), and ``near``, a list
        of ``code``, ``description`` and ``cosine``; all of codes with `LEAST` train events or more.
    """
    first = len(SPECIAL_TOKENS)
    known = first + np.flatnonzero(vocabulary.counts[first:] >= LEAST)
    frequent = known[np.argsort(-vocabulary.counts[known], kind="stable")][:most]
    vectors = np.asarray(embeddings, np.float32)[known]  # [K, E]
    vectors = vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
    found = []
    for code in frequent.tolist():
        cosines = vectors @ vectors[np.searchsorted(known, code)]  # [K]
        order = [place for place in np.argsort(-cosines, kind="stable")[: near + 1] if known[place] != code]
        alike = [
            {**_named(vocabulary, int(known[place])), "cosine": float(cosines[place])}
            for place in order[:near]
        ]
        found.append({**_named(vocabulary, code), "events": int(vocabulary.counts[code]), "near": alike})
    return found


def _named(vocabulary: Vocabulary, code: int) -> JsonObject:
    return {"code": vocabulary.codes[code], "description": vocabulary.descriptions[code]}
