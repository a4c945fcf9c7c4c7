"""Vectors of codes, by the name of the code: read from what others trained, made first rows of the code
embedding, and written from what was learnt here.

Files that are read: word2vec's text and binary forms (Mikolov et al. 2013, arXiv 1301.3781; as gensim writes
them), Parquet and CSV (a column ``code`` beside a column ``vector`` of lists, or beside columns of numbers),
and npz (arrays ``codes`` and ``vectors``). Pickles are never loaded.
"""

import gzip
import hashlib
import io
import re
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pyarrow.types as pt

from behrt_jax.config.training import PretrainConfig
from behrt_jax.data.parquet import readable, sound
from behrt_jax.data.vocabulary import SPECIAL_TOKENS, Vocabulary
from behrt_jax.errors import InputError
from behrt_jax.files import JsonObject
from behrt_jax.models.behrt import EMBEDDING_STDDEV
from behrt_jax.models.stacked_layers import Tree
from behrt_jax.records.sources.files import csv_columns, csv_separator, is_csv, read_csv

VECTORS_FILE, VECTORS_TEXT_FILE = "vectors.parquet", "vectors.txt"
"""Files of learnt vectors, see :func:`vector_files`."""

_PICKLES = (".kv", ".model", ".pkl", ".pickle", ".npy", ".joblib", ".pt", ".pth")
_INSTEAD = "write them with gensim's save_word2vec_format, as Parquet (code, vector) or with numpy's savez"


class CodeVectors(NamedTuple):
    """Codes, each with a vector."""

    codes: tuple[str, ...]
    """None twice."""
    vectors: np.ndarray
    """Finite, float32 ``[codes, dimension]``."""


def read_vectors(path: Path) -> CodeVectors:
    """Read vectors of codes from a file, whose form the name tells, or else the first bytes.

    Raises:
        InputError: the file cannot be read, is a pickle, or is of none of the forms; a code that comes twice
            or is empty, a vector of another length, numbers that are not finite, no vectors at all. The
            message names the file, and the row (counted from 1, without a header).
    """
    name = path.name.lower()
    if name.endswith(_PICKLES):
        raise InputError(
            f"{path} is of a form that may be a pickle, which can run any program when it is loaded: "
            f"{_INSTEAD}."
        )
    if not path.is_file():
        raise InputError(f"init.vectors: there is no file {path}: give one with vectors of codes.")
    if name.endswith((".parquet", ".pq")):
        codes, vectors = _read_parquet(path)
    elif is_csv(path) or name.endswith((".tsv", ".tsv.gz")):
        codes, vectors = _read_csv(path)
    elif name.endswith(".npz"):
        codes, vectors = _read_npz(path)
    else:
        codes, vectors = _read_word2vec(path)
    return _sound(path, codes, vectors)


def _sound(path: Path, codes: Sequence[str], vectors: np.ndarray) -> CodeVectors:
    """Codes and vectors, float32, once they were looked at."""
    if not len(codes) or not vectors.shape[1]:
        raise InputError(f"{path} holds no vectors: give a file with a code and its numbers in each row.")
    rows: dict[str, int] = {}
    for row, code in enumerate(codes, start=1):
        if not code:
            raise InputError(f"{path} has no code in row {row}: fill it in or leave the row out.")
        if (first := rows.setdefault(code, row)) != row:
            raise InputError(f"{path} has the code of row {first} again in row {row}: leave one of them out.")
    with np.errstate(over="ignore"):
        vectors = np.ascontiguousarray(vectors, np.float32)
    finite = np.isfinite(vectors).all(axis=1)
    if not finite.all():
        row = int(np.argmin(finite)) + 1
        raise InputError(
            f"{path} has a number that is missing or not finite in row {row}: leave the row out."
        )
    return CodeVectors(tuple(codes), vectors)


def _read_word2vec(path: Path) -> tuple[list[str], np.ndarray]:
    """Either form: a line with the number of vectors and their length, then a row each.

    A row is the code, a space, and the numbers: as text, or as float32 (little-endian).
    """
    try:
        content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (OSError, EOFError, zlib.error) as error:
        raise InputError(f"{path} cannot be read ({error}): write it again.") from error
    if content.startswith(b"\x80"):
        raise InputError(f"{path} is a pickle, which can run any program when it is loaded: {_INSTEAD}.")
    head = re.match(rb"(\d{1,18}) (\d{1,9})[ \r]*\n", content)
    if head is None:
        raise InputError(
            f"{path} is in no form that is read. word2vec's begin with a line of two numbers, how many "
            f"vectors and their length; the other forms end in .parquet, .csv and .npz: {_INSTEAD}."
        )
    count, size, start = int(head[1]), int(head[2]), head.end()
    content = content[start:]
    forms = (_read_text, _read_binary) if _looks_like_text(content, size) else (_read_binary, _read_text)
    try:
        return forms[0](path, content, count, size)
    except InputError as error:
        with suppress(InputError):  # looks are deceptive where vectors are few and short
            return forms[1](path, content, count, size)
        raise error


def _looks_like_text(content: bytes, size: int) -> bool:
    """Whether the first row is a code and numbers, or there is nothing in the beginning that is not text."""
    beginning = content[: 64 * (size + 16)]
    words = beginning.split(b"\n", 1)[0].split()
    if len(words) > size:
        with suppress(ValueError):
            return all(float(number) is not None for number in words[-size:])
    if len(beginning) < len(content):
        beginning = beginning[: beginning.rfind(b"\n") + 1]
    try:
        return b"".join(beginning.splitlines()).decode().isprintable()
    except UnicodeDecodeError:
        return False


def _read_text(path: Path, content: bytes, count: int, size: int) -> tuple[list[str], np.ndarray]:
    try:
        text = content.decode().rstrip("\r\n")
    except UnicodeDecodeError as error:
        raise InputError(f"{path} holds text that is not UTF-8: write it again as UTF-8.") from error
    lines = text.split("\n") if text else []
    _refuse_other_count(path, count, len(lines))
    codes, vectors = [], np.empty((count, size), np.float32)
    for row, line in enumerate(lines):
        code, *numbers = line.rstrip(" \r").rsplit(" ", size)  # a code may hold spaces
        # Numbers written out in the code's place: there are too many.
        more = re.search(r"(?: -?\d\.\d{5,}(?:e[-+]\d+)?)+$", code)
        found = len(numbers) + (len(more[0].split()) if more else 0)
        if found != size:
            raise InputError(
                f"{path} has {found} numbers in row {row + 1}, where its first line says {size}: mend that."
            )
        try:
            vectors[row] = np.array(numbers, np.float64)
        except ValueError as error:
            raise InputError(
                f"{path} has what is no number in row {row + 1}, which needs a code and {size} numbers: mend "
                "the row."
            ) from error
        codes.append(code)
    return codes, vectors


def _read_binary(path: Path, content: bytes, count: int, size: int) -> tuple[list[str], np.ndarray]:
    if count * (4 * size + 2) > len(content):
        _refuse_other_count(path, count, len(content) // (4 * size + 2))
    codes, vectors, place = [], np.empty((count, size), np.float32), 0
    for row in range(count):
        space = content.find(b" ", place)
        after = space + 1 + 4 * size
        if space < 0 or after > len(content):
            _refuse_other_count(path, count, row)
        try:
            codes.append(content[place:space].lstrip(b"\n").decode())
        except UnicodeDecodeError as error:
            raise InputError(
                f"{path} has a code in row {row + 1} that is not UTF-8: the file is damaged, or a code "
                "before it holds a space, for which this form has no room; write it as text."
            ) from error
        vectors[row] = np.frombuffer(content, "<f4", size, space + 1)
        place = after
    if content[place:].strip():
        raise InputError(
            f"{path} goes on after the {count:,} vectors that its first line tells: write it again."
        )
    return codes, vectors


def _refuse_other_count(path: Path, told: int, found: int) -> None:
    if told != found:
        raise InputError(
            f"{path} has {found:,} rows where its first line tells {told:,}: it is cut short or damaged, "
            "write it again."
        )


def _number_columns(path: Path, columns: Sequence[str]) -> list[str]:
    """Names of the columns that hold the numbers; one of them, ``vector``, may hold lists."""
    if columns.count("code") != 1:
        raise InputError(
            f"{path} has {columns.count('code')} columns called code: name the column of codes so (the "
            f"columns are {', '.join(columns)})."
        )
    found = ["vector"] if "vector" in columns else [name for name in columns if name != "code"]
    if not found:
        raise InputError(f"{path} has no numbers beside the codes: add a column vector, or one a dimension.")
    return found


def _read_csv(path: Path) -> tuple[list[str], np.ndarray]:
    """Numbers in columns of their own, or in ``vector`` behind each other: ``[0.5, 1]``, ``0.5 1``."""
    separator = csv_separator(path)
    names = _number_columns(path, csv_columns(path, separator))
    codes: list[str] = []
    vectors: list[list[float]] = []
    for piece in read_csv(path, ["code", *names], separator=separator):
        columns = [piece.table[name].to_pylist() for name in ("code", *names)]
        for row, (code, *texts) in enumerate(zip(*columns, strict=True), start=piece.first_row):
            texts = re.split(r"[\s,;]+", (texts[0] or "").strip("[]() ")) if names == ["vector"] else texts
            try:
                vectors.append([float("nan" if text is None else text) for text in texts])
            except ValueError as error:
                raise InputError(f"{path} has what is no number in row {row}: mend the row.") from error
            codes.append(code)
    return codes, _stacked(path, vectors)


def _read_parquet(path: Path) -> tuple[list[str], np.ndarray]:
    with readable(path), pq.ParquetFile(path, page_checksum_verification=True) as file:
        names = _number_columns(path, file.schema_arrow.names)
        table = sound(path, file.read(columns=["code", *names]))
    kinds = {name: table[name].type for name in table.column_names}
    listed = [kind.value_type for kind in kinds.values() if _is_list(kind)]
    wrong = next((name for name in names if not (_is_number(kinds[name]) or _is_list(kinds[name]))), None)
    if wrong or any(not _is_number(kind) for kind in listed) or (listed and names != ["vector"]):
        name = wrong or next(name for name in names if _is_list(kinds[name]))
        raise InputError(
            f"{path} has {kinds[name]} in the column {name}: write numbers, or one column vector of lists of "
            "numbers."
        )
    if not listed:
        columns = [table[name].cast(pa.float64()).to_numpy() for name in names]  # null becomes NaN
        return table["code"].cast(pa.string()).to_pylist(), np.stack(columns, axis=1)
    lists = table["vector"].combine_chunks().cast(pa.large_list(pa.float64()))
    lengths = lists.value_lengths().fill_null(0).to_numpy(zero_copy_only=False)
    _refuse_other_lengths(path, lengths)
    values = lists.flatten().to_numpy(zero_copy_only=False)
    vectors = values.reshape(len(lengths), lengths[0] if len(lengths) else 0)
    return table["code"].cast(pa.string()).to_pylist(), vectors


def _is_number(kind: pa.DataType) -> bool:
    return pt.is_floating(kind) or pt.is_integer(kind)


def _is_list(kind: pa.DataType) -> bool:
    return pt.is_list(kind) or pt.is_large_list(kind) or pt.is_fixed_size_list(kind)


def _read_npz(path: Path) -> tuple[list[str], np.ndarray]:
    try:
        with np.load(path, allow_pickle=False) as file:
            codes, vectors = file["codes"], file["vectors"]
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise InputError(
            f"{path} holds no arrays codes and vectors that can be read without pickle: write it with "
            "numpy.savez(FILE, codes=numpy.array(codes, str), vectors=vectors)."
        ) from error
    if vectors.ndim != 2 or vectors.dtype.kind not in "fiu" or codes.shape != vectors.shape[:1]:
        raise InputError(
            f"{path} has codes {codes.shape} and vectors {vectors.dtype} {vectors.shape}: write texts "
            "[codes] and numbers [codes, dimension]."
        )
    if codes.dtype.kind != "U":
        raise InputError(f"{path} has {codes.dtype} as codes: write texts, numpy.array(codes, str).")
    return codes.tolist(), vectors


def _stacked(path: Path, vectors: Sequence[Sequence[float]]) -> np.ndarray:
    _refuse_other_lengths(path, np.array([len(vector) for vector in vectors], np.int64))
    return np.array(vectors, np.float64).reshape(len(vectors), len(vectors[0]) if vectors else 0)


def _refuse_other_lengths(path: Path, lengths: np.ndarray) -> None:
    """Refuse vectors of more than one length, int64 ``[rows]``."""
    other = lengths != lengths[:1]
    if other.any():
        row = int(np.argmax(other))
        raise InputError(
            f"{path} has {lengths[row]} numbers in row {row + 1}, where row 1 has {lengths[0]}: mend the row."
        )


# First rows of the code embedding.


class FirstRows(NamedTuple):
    """What the code embedding starts from."""

    rows: np.ndarray
    """float32 ``[codes, embedding]``, of the vocabulary without its special tokens, in its order."""
    coverage: JsonObject
    """What was found: ``vectors`` in the file, their ``dimension``, ``codes`` that have one, as
    ``vocabulary_share`` and ``event_share`` (of the train split's events, those of [UNK] among them);
    ``projection`` (pca or none), ``variance_share`` that it keeps; ``sha256`` of codes and vectors."""


def first_rows(given: CodeVectors, vocabulary: Vocabulary, config: PretrainConfig) -> FirstRows:
    """Rows of the code embedding that start from vectors, matched by the name of the code.

    The vectors that are found are moved to have a mean of zero, projected on their principal axes where
    they have another dimension than the embedding, and scaled so that the root mean square of their numbers
    is `EMBEDDING_STDDEV`, that of the usual draw. Other codes get that mean plus noise with the spread of
    the found rows in each dimension.

    Args:
        given: vectors of any dimension.
        vocabulary: of the data.
        config: its ``model.embedding_size``, and ``train.seed`` for the noise.

    Raises:
        InputError: fewer than two of the codes are in the vocabulary, or all of those have the same vector.
    """
    codes = vocabulary.codes[len(SPECIAL_TOKENS) :]
    places = {code: row for row, code in enumerate(given.codes)}
    found = np.array([places.get(code, places.get(text_name(code), -1)) for code in codes])  # [C]
    has = found >= 0
    if np.count_nonzero(has) < 2:
        raise InputError(
            f"init.vectors: of {len(given.codes):,} codes, such as {given.codes[0]}, {np.count_nonzero(has)} "
            f"are in the vocabulary, which has codes such as {codes[0]}: give vectors of the same codes, "
            "written alike."
        )
    size = config.model.embedding_size
    vectors = given.vectors[found[has]].astype(np.float64)
    projected, kept = principal_components(vectors, size)
    if vectors.shape[1] == size:
        projected, kept = vectors - vectors.mean(axis=0), 1.0
    spread = np.sqrt(np.mean(projected**2))
    if not spread > 0:
        raise InputError("init.vectors: all codes of the vocabulary have the same vector there: give others.")
    projected *= EMBEDDING_STDDEV / spread
    rows = np.random.default_rng(config.train.seed).normal(size=(len(codes), size)) * projected.std(axis=0)
    rows[has] = projected
    counts = vocabulary.counts[len(SPECIAL_TOKENS) :]
    digest = hashlib.sha256("\n".join(given.codes).encode() + given.vectors.tobytes())
    coverage = {
        "vectors": len(given.codes),
        "dimension": vectors.shape[1],
        "codes": int(np.count_nonzero(has)),
        "vocabulary_share": float(has.mean()),
        "event_share": int(counts[has].sum()) / max(int(vocabulary.counts.sum()), 1),
        "projection": "none" if vectors.shape[1] == size else "pca",
        "variance_share": kept,
        "sha256": digest.hexdigest(),
    }
    return FirstRows(rows.astype(np.float32), coverage)


def principal_components(vectors: np.ndarray, size: int) -> tuple[np.ndarray, float]:
    """Vectors less their mean, in the axes of their largest spread (PCA: Pearson 1901).

    Args:
        vectors: float64 ``[n, dimension]``.
        size: number of axes; those beyond the dimension are zero.

    Returns:
        float64 ``[n, size]``, and the share of the variance that it has. Where ``size`` is the dimension or
        more, lengths and angles stay as they are.
    """
    centred = vectors - vectors.mean(axis=0)
    variances, axes = np.linalg.eigh(centred.T @ centred)  # ascending
    variances, axes = variances[::-1][:size], axes[:, ::-1][:, :size]
    axes = axes * np.where(axes[np.abs(axes).argmax(axis=0), np.arange(axes.shape[1])] < 0, -1.0, 1.0)
    projected = np.zeros((len(vectors), size))
    projected[:, : axes.shape[1]] = centred @ axes
    total = np.sum(centred**2)
    return projected, float(min(np.sum(projected**2) / total, 1.0)) if total else 1.0


# Learnt vectors, out.


def learnt_vectors(params: Tree, vocabulary: Vocabulary) -> CodeVectors:
    """The code embedding in the parameters of a model, `[vocabulary, embedding]`, without special tokens."""
    first = len(SPECIAL_TOKENS)
    table = np.asarray(params["behrt"]["embeddings"]["code"]["embedding"], np.float32)
    return CodeVectors(vocabulary.codes[first:], table[first:])


def vector_files(given: CodeVectors) -> dict[str, bytes]:
    """Name -> content of the files that hold vectors.

    ``vectors.parquet`` has the columns code (string) and vector (list of float32); ``vectors.txt`` is
    word2vec's text form, which gensim reads, with nine digits, so that both hold the same numbers. That form
    parts by spaces: there they are written as ``_`` in codes (:func:`text_name`), and of codes that become
    the same by that the first alone is written.
    """
    codes, vectors = given
    flat = pa.array(vectors.ravel(), pa.float32())
    offsets = pa.array(np.arange(len(codes) + 1, dtype=np.int64) * vectors.shape[1])
    lists = pa.LargeListArray.from_arrays(offsets, flat).cast(pa.list_(pa.float32()))
    with io.BytesIO() as file:
        pq.write_table(pa.table({"code": pa.array(codes, pa.string()), "vector": lists}), file)
        return {VECTORS_FILE: file.getvalue(), VECTORS_TEXT_FILE: "".join(_text(codes, vectors)).encode()}


def _text(codes: Sequence[str], vectors: np.ndarray) -> Iterator[str]:
    rows: dict[str, Any] = {}
    for code, vector in zip(codes, vectors, strict=True):
        rows.setdefault(text_name(code), vector)
    numbers = " %.9g" * vectors.shape[1]
    yield f"{len(rows)} {vectors.shape[1]}\n"
    for name, vector in rows.items():
        yield f"{name}{numbers % tuple(vector.tolist())}\n"


def text_name(code: str) -> str:
    """A code as word2vec's text form can hold it: white space becomes ``_``."""
    return re.sub(r"\s", "_", code)
