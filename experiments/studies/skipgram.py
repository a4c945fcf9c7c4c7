"""Skip-gram vectors of the codes of prepared data (Mikolov et al. 2013, arXiv 1310.4546), trained by gensim.

A sentence is what a subject has, or a visit. Sentences are read one at a time from memory-mapped files, and
only of the train split.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Literal

import numpy as np

from behrt_jax.cli import Command, run_command
from behrt_jax.data.prepared import read_prepared
from behrt_jax.data.sequences import Sequences, SequenceSet
from behrt_jax.data.vocabulary import SPECIAL_TOKENS
from behrt_jax.errors import InputError
from behrt_jax.files import check_new_folder, replace_folder
from behrt_jax.tracking.console import open_console
from behrt_jax.weights.code_vectors import CodeVectors, vector_files

LONGEST = 10_000
"""Words of a sentence that gensim reads; it leaves out what comes after them."""


@dataclass(frozen=True)
class SkipGramConfig:
    """Train skip-gram vectors of the codes of prepared data, on its train split alone."""

    data: Path | None = None
    """Folder of the prepared data."""
    output: Path | None = None
    """Folder to write, for --init.vectors: vectors.parquet, and the same as vectors.txt."""
    dimension: int = 64
    """Numbers of a vector."""
    sentence: Literal["subject", "visit"] = "subject"
    """Whose codes are a sentence."""
    window: int = 10
    """Codes before and after each that are its context."""
    min_count: int = 5
    """Codes seen fewer times get no vector."""
    negative: int = 10
    """Codes drawn at random beside each of the context (negative sampling)."""
    epochs: int = 20
    """Passes over the sentences."""
    workers: int = 1
    """Threads; with more than one no two trainings are the same."""
    seed: int = 0
    """Seed of first values and draws."""


@dataclass(frozen=True, eq=False)
class Sentences:
    """The sentences of a split, from the first, each time that they are gone through."""

    sequences: Sequences
    codes: Sequence[str]
    """Of the vocabulary."""
    by_visit: bool = False

    def __iter__(self) -> Iterator[list[str]]:
        """Lists of codes; special tokens are left out."""
        for start, stop in pairwise(self.sequences.offsets):
            ids, visits = self.sequences.codes[start:stop], self.sequences.visits[start:stop]
            cuts = np.flatnonzero(np.diff(visits)) + 1 if self.by_visit else []
            for part in np.split(ids, cuts):
                words = [self.codes[int(one)] for one in part if one >= len(SPECIAL_TOKENS)]
                for first in range(0, len(words), LONGEST):
                    yield words[first : first + LONGEST]


def skipgram_vectors(data: SequenceSet, config: SkipGramConfig) -> CodeVectors:
    """Vectors of the codes of the train split.

    Raises:
        InputError: gensim is not installed, or no code is frequent enough.
    """
    try:
        from gensim.models import Word2Vec
    except ModuleNotFoundError as error:
        raise InputError(f"{error}: pip install 'behrt-jax[vectors]' adds what vectors need.") from error
    if data.vocabulary.counts[len(SPECIAL_TOKENS) :].max(initial=0) < config.min_count:
        raise InputError(f"min_count is {config.min_count}, but no code is so frequent: lower it.")
    model = Word2Vec(
        Sentences(data.splits["train"], data.vocabulary.codes, config.sentence == "visit"),
        vector_size=config.dimension,
        window=config.window,
        min_count=config.min_count,
        negative=config.negative,
        epochs=config.epochs,
        workers=config.workers,
        seed=config.seed,
        sg=1,
        sample=0,  # a vocabulary of codes has no words that mean nothing
    )
    return CodeVectors(tuple(map(str, model.wv.index_to_key)), np.asarray(model.wv.vectors, np.float32))


def skipgram(config: SkipGramConfig) -> CodeVectors:
    """Train vectors and write them.

    Raises:
        InputError: a wrong option, or data that cannot be read.
    """
    if config.data is None or config.output is None:
        raise InputError("--data and --output are needed: the prepared data, and a folder to write to.")
    check_new_folder(config.output, "--output")
    data = read_prepared(config.data)
    vectors = skipgram_vectors(data, config)
    replace_folder(config.output, files := vector_files(vectors))
    with open_console() as console:
        subjects = len(data.splits["train"])
        console.log(
            f"{len(vectors.codes):,} vectors of {config.dimension} numbers, from {subjects:,} subjects."
        )
        console.log(f"Written to {config.output}: {', '.join(files)}")
    return vectors


def skipgram_command(arguments: Sequence[str]) -> int:
    """Train vectors; returns the exit status of :func:`behrt_jax.cli.run_command`."""
    return run_command(Command(SkipGramConfig, f"{__name__}:skipgram"), arguments, prog="skipgram.py")
