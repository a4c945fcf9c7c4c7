"""Vectors of codes: every form read, first rows made of them, learnt ones written."""

import gzip
import io
import pickle

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from behrt_jax.config.model import ModelConfig
from behrt_jax.config.training import PretrainConfig, TrainConfig
from behrt_jax.data.vocabulary import SPECIAL_TOKENS, UNK, Vocabulary
from behrt_jax.errors import InputError
from behrt_jax.models.behrt import EMBEDDING_STDDEV
from behrt_jax.weights import code_vectors
from behrt_jax.weights.code_vectors import (
    CodeVectors,
    FirstRows,
    learnt_vectors,
    principal_components,
    read_vectors,
    text_name,
    vector_files,
)

CODES = ("DX//I10", "Sodium chloride 0.9", "MED//ä", "LAB//1")
VECTORS = np.random.default_rng(0).normal(size=(4, 3)).astype(np.float32)
PLAIN = ("DX//I10", "Sodium_chloride_0.9", "MED//ä", "LAB//1")


def text(codes=CODES, vectors=VECTORS, head=None):
    rows = [f"{code} {' '.join(f'{x:.9g}' for x in row)}" for code, row in zip(codes, vectors, strict=True)]
    return "\n".join([head or f"{len(codes)} {len(vectors[0])}", *rows, ""]).encode()


def binary(codes=PLAIN, vectors=VECTORS, end=b"\n"):
    rows = [
        code.encode() + b" " + row.astype("<f4").tobytes() + end
        for code, row in zip(codes, vectors, strict=True)
    ]
    return f"{len(codes)} {vectors.shape[1]}\n".encode() + b"".join(rows)


def csv(vectors=VECTORS, head="code,a,b,c"):
    rows = zip(CODES, vectors.tolist(), strict=True)
    return "\n".join([head, *(",".join([code, *map(str, row)]) for code, row in rows)]).encode()


def parquet(columns):
    file = io.BytesIO()
    pq.write_table(pa.table(columns), file)
    return file.getvalue()


def npz(**arrays_):
    file = io.BytesIO()
    np.savez(file, **arrays_)
    return file.getvalue()


LISTS = {"code": CODES, "vector": VECTORS.tolist()}
ARROW = {name: pa.array(column) for name, column in LISTS.items()}
FORMS = {
    "text.txt": (text(), CODES),
    "packed.txt.gz": (gzip.compress(text()), CODES),
    "windows.vec": (text().replace(b"\n", b"\r\n"), CODES),
    "google.bin": (binary(), PLAIN),
    "gensim.bin": (binary(end=b""), PLAIN),
    "columns.csv": (csv(), CODES),
    "lists.csv": (
        "code,vector\n"
        + "\n".join(f'{code},"{row}"' for code, row in zip(CODES, VECTORS.tolist(), strict=True)),
        CODES,
    ),
    "tabs.tsv": (csv().replace(b",", b"\t"), CODES),
    "lists.parquet": (parquet(LISTS), CODES),
    "fixed.parquet": (
        parquet({**LISTS, "vector": pa.array(VECTORS.tolist(), pa.list_(pa.float64(), 3))}),
        CODES,
    ),
    "dictionary.parquet": (parquet({**LISTS, "code": pa.array(CODES).dictionary_encode()}), CODES),
    "columns.parquet": (parquet({"code": CODES, **{f"v{i}": VECTORS[:, i] for i in range(3)}}), CODES),
    "arrays.npz": (npz(codes=np.array(CODES), vectors=VECTORS), CODES),
}


def written(folder, name, content):
    path = folder / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


@pytest.mark.parametrize("name", FORMS)
def test_every_form_gives_the_same_vectors(tmp_path, name):
    content, codes = FORMS[name]
    found = read_vectors(written(tmp_path, name, content))
    assert found.codes == codes
    assert found.vectors.dtype == np.float32
    np.testing.assert_array_equal(found.vectors, VECTORS)


FINITE = st.floats(width=32, allow_nan=False, allow_infinity=False)


@given(arrays(np.float32, st.tuples(st.integers(1, 6), st.integers(2, 5)), elements=FINITE))
def test_both_forms_of_word2vec_keep_every_number(tmp_path_factory, vectors):
    folder = tmp_path_factory.getbasetemp()
    codes = [f"A//{row}" for row in range(len(vectors))]
    for name, write in (("any.txt", text), ("any.bin", binary)):
        np.testing.assert_array_equal(
            read_vectors(written(folder, name, write(codes, vectors))).vectors, vectors
        )


@pytest.mark.parametrize(
    ("codes", "content"),
    [
        (("1", "2"), b"\n\0\0?"),  # the first line is a number
        (("A",), b"A\nAA\x01\x02\x03?"),  # the first lines could be text
        (("A",), b"?94\n2AA18A\n14?\n "),  # and so could all
        (("A",), b"AAAA" * 400 + b"\n\0\0?"),  # and so could what is before the first line's end
    ],
)
def test_numbers_that_look_like_text_are_read_as_numbers(tmp_path, codes, content):
    row = np.frombuffer(content, "<f4")
    path = written(tmp_path, "vectors.bin", binary(codes, np.stack([row] * len(codes)), end=b""))
    np.testing.assert_array_equal(read_vectors(path).vectors, np.stack([row] * len(codes)))


NAN = np.where(np.arange(12).reshape(4, 3) == 7, np.nan, VECTORS)
TWICE = ("a", "b", "a", "c")
WRONG = {
    "cut.txt": (text()[:-20], "numbers in row 4|no number in row 4"),
    "rows.txt": (text(head="5 3"), "4 rows where its first line tells 5"),
    "short.txt": (text().replace(b"\nDX//I10 ", b"\nDX"), "2 numbers in row 1, where its first line says 3"),
    "long.txt": (text().replace(b"//I10", b"//I10 0.123456"), "4 numbers in row 1"),
    "word.txt": (text().replace(b"//I10 ", b"//I10 x"), "no number in row 1"),
    "twice.txt": (text(TWICE), "row 1 again in row 3"),
    "nan.txt": (text(vectors=NAN), "not finite in row 3"),
    "encoding.txt": (text().decode().encode("latin-1"), "not UTF-8"),
    "nothing.txt": (b"0 3\n", "holds no vectors"),
    "glove.txt": (text().split(b"\n", 1)[1], "in no form that is read"),
    "empty.txt": (b"", "in no form that is read"),
    "broken.txt.gz": (gzip.compress(text())[:-9], "cannot be read"),
    "cut.bin": (binary()[:-5], "3 rows where its first line tells 4"),
    "more.bin": (binary() + b"x 12", "goes on after the 4 vectors"),
    "nan.bin": (binary(vectors=NAN), "not finite in row 3"),
    "huge.bin": (b"99999999999999 300\n" + bytes(50), "tells 99,999,999,999,999"),
    "nan.csv": (csv(NAN), "not finite in row 3"),
    "gap.csv": (b"code,a,b\nx,1,2\ny,,3\n", "not finite in row 2"),
    "word.csv": (b"code,a,b\nx,1,2\ny,1,z\n", "no number in row 2"),
    "lengths.csv": (b"code,vector\nx,1 2\ny,1 2 3\n", "3 numbers in row 2, where row 1 has 2"),
    "unnamed.csv": (b"name,a\nx,1\n", "0 columns called code.*name, a"),
    "nameless.csv": (b"code,a\nx,1\n,2\n", "no code in row 2"),
    "alone.csv": (b"code\nx\n", "no numbers beside the codes"),
    "ragged.csv": (b"code,a,b\nx,1,2\ny,1\n", "data row 2"),
    "none.csv": (b"code,a\n", "holds no vectors"),
    "none.parquet": (parquet({name: column[:0] for name, column in ARROW.items()}), "holds no vectors"),
    "twice.parquet": (parquet({**LISTS, "code": TWICE}), "row 1 again in row 3"),
    "lengths.parquet": (parquet({"code": ["a", "b"], "vector": [[1.0], [1.0, 2.0]]}), "2 numbers in row 2"),
    "texts.parquet": (parquet({"code": ["a"], "v": ["1"]}), "string in the column v"),
    "lists.parquet": (parquet({"code": ["a"], "v": [[1.0]]}), "in the column v"),
    "null.parquet": (parquet({"code": ["a", "b"], "vector": [[1.0], [None]]}), "not finite in row 2"),
    "cut.parquet": (parquet(LISTS)[:-9], "no readable Parquet"),
    "objects.npz": (npz(codes=np.array(CODES, object), vectors=VECTORS), "without pickle"),
    "names.npz": (npz(words=np.array(CODES), vectors=VECTORS), "no arrays codes and vectors"),
    "shapes.npz": (npz(codes=np.array(CODES[:3]), vectors=VECTORS), r"codes \(3,\) and vectors float32"),
    "bytes.npz": (npz(codes=np.array([b"x"]), vectors=VECTORS[:1]), "write texts"),
    "text.npz": (b"4 3", "without pickle"),
    "model.kv": (pickle.dumps({"a": [1.0]}), "may be a pickle.*save_word2vec_format"),
    "vectors.npy": (b"", "may be a pickle"),
    "pickle.txt": (pickle.dumps({"a": [1.0]}), "is a pickle.*save_word2vec_format"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_what_is_wrong_is_named_with_its_file(tmp_path, name):
    content, message = WRONG[name]
    with pytest.raises(InputError, match=f"{name} .*({message})"):
        read_vectors(written(tmp_path, name, content))


def test_a_file_that_is_not_there_is_named(tmp_path):
    with pytest.raises(InputError, match=r"init\.vectors: there is no file .*x\.txt"):
        read_vectors(tmp_path / "x.txt")


def test_a_full_rotation_keeps_lengths_and_angles():
    vectors = np.random.default_rng(1).normal(size=(30, 5)) * [5, 1, 0.1, 2, 3] + 4
    centred = vectors - vectors.mean(axis=0)
    for size in (5, 8):
        turned, kept = principal_components(vectors, size)
        np.testing.assert_allclose(turned @ turned.T, centred @ centred.T, atol=1e-10)
        assert kept == pytest.approx(1.0)
    np.testing.assert_array_equal(turned[:, 5:], 0.0)
    spreads = turned[:, :5].std(axis=0)
    assert (np.diff(spreads) <= 0).all()


def test_fewer_axes_keep_the_most_variance():
    vectors = np.random.default_rng(2).normal(size=(200, 6)) @ np.random.default_rng(3).normal(size=(6, 6))
    turned, kept = principal_components(vectors, 2)
    values = np.linalg.svd(vectors - vectors.mean(axis=0), compute_uv=False) ** 2
    assert kept == pytest.approx(values[:2].sum() / values.sum())
    assert kept < 0.9
    np.testing.assert_allclose((turned**2).sum(axis=0), values[:2])


def vocabulary(codes, counts, unknown=0):
    first = len(SPECIAL_TOKENS)
    all_counts = np.concatenate([np.zeros(first, np.int64), counts])
    all_counts[UNK] = unknown
    return Vocabulary((*SPECIAL_TOKENS, *codes), all_counts, (None,) * (first + len(codes)))


def first_rows(vectors: CodeVectors, known: Vocabulary, size: int, seed: int) -> FirstRows:
    config = PretrainConfig(model=ModelConfig(embedding_size=size), train=TrainConfig(seed=seed))
    return code_vectors.first_rows(vectors, known, config)


def many(dimension, codes=300):
    rng = np.random.default_rng(4)
    names = tuple(f"A//{row}" for row in range(codes))
    return CodeVectors(names, (3 + rng.normal(size=(codes, dimension)) * 7).astype(np.float32))


def test_coverage_is_counted():
    known = vocabulary(("A//1", "x", "A//0", "y", "z"), [40, 30, 10, 5, 5], unknown=10)
    coverage = first_rows(many(4), known, 4, 0).coverage
    assert coverage["codes"] == 2
    assert coverage["vectors"] == 300
    assert coverage["dimension"] == 4
    assert coverage["vocabulary_share"] == pytest.approx(2 / 5)
    assert coverage["event_share"] == pytest.approx(50 / 100)


@pytest.mark.parametrize("dimension", [3, 8, 20])
def test_rows_are_scaled_like_the_usual_draw_and_matched_by_name(dimension):
    vectors = many(dimension)
    shuffled = np.random.default_rng(5).permutation(300)
    known = vocabulary([vectors.codes[row] for row in shuffled], np.ones(300, np.int64))
    rows, coverage = first_rows(vectors, known, 8, 0)
    assert rows.dtype == np.float32
    assert np.sqrt(np.mean(rows.astype(np.float64) ** 2)) == pytest.approx(EMBEDDING_STDDEV, rel=1e-5)
    assert coverage["projection"] == ("none" if dimension == 8 else "pca")
    assert (coverage["variance_share"] < 0.9) == (dimension == 20)
    if dimension <= 8:
        given = vectors.vectors[shuffled].astype(np.float64)
        given -= given.mean(axis=0)
        cosines = [x @ x.T / np.outer(*[np.linalg.norm(x, axis=1)] * 2) for x in (given, rows)]
        np.testing.assert_allclose(*cosines, atol=1e-4)


def test_other_codes_begin_at_the_mean_with_the_spread_of_the_found():
    vectors = CodeVectors(many(6).codes, many(6).vectors * np.array([9, 1, 1, 1, 1, 1], np.float32))
    others = [f"B//{row}" for row in range(4000)]
    known = vocabulary((*vectors.codes, *others), np.ones(4300, np.int64))
    rows = first_rows(vectors, known, 6, 0).rows
    found, drawn = rows[:300], rows[300:]
    np.testing.assert_allclose(drawn.mean(axis=0), 0.0, atol=0.1 * EMBEDDING_STDDEV)
    np.testing.assert_allclose(drawn.std(axis=0), found.std(axis=0), rtol=0.05)
    assert found[:, 0].std() > 5 * found[:, 1].std()
    assert (first_rows(vectors, known, 6, 1).rows[300:] != drawn).all()
    np.testing.assert_array_equal(first_rows(vectors, known, 6, 0).rows, rows)


def test_vectors_of_other_codes_are_refused():
    with pytest.raises(InputError, match=r"of 300 codes, such as A//0, 1 are in the vocabulary.*such as x"):
        first_rows(many(4), vocabulary(("x", "A//1"), [1, 1]), 4, 0)
    same = CodeVectors(("x", "y"), np.ones((2, 4), np.float32))
    with pytest.raises(InputError, match="the same vector"):
        first_rows(same, vocabulary(("x", "y"), [1, 1]), 4, 0)


def test_learnt_vectors_are_written_and_found_again(tmp_path):
    known = vocabulary(CODES, [4, 3, 2, 1])
    table = np.random.default_rng(6).normal(size=(len(known), 7)).astype(np.float32)
    params = {"behrt": {"embeddings": {"code": {"embedding": table}}}}
    files = vector_files(learnt_vectors(params, known))
    assert set(files) == {"vectors.parquet", "vectors.txt"}
    for name, codes in (("vectors.parquet", CODES), ("vectors.txt", PLAIN)):
        found = read_vectors(written(tmp_path, name, files[name]))
        assert found.codes == codes
        np.testing.assert_array_equal(found.vectors, table[len(SPECIAL_TOKENS) :])
        assert first_rows(found, known, 7, 0).coverage["vocabulary_share"] == 1.0


def test_codes_that_text_cannot_tell_apart_are_written_once(tmp_path):
    vectors = CodeVectors(("a b", "a_b", "c"), np.arange(6, dtype=np.float32).reshape(3, 2))
    found = read_vectors(written(tmp_path, "vectors.txt", vector_files(vectors)["vectors.txt"]))
    assert found.codes == ("a_b", "c")
    assert found.vectors.tolist() == [[0, 1], [4, 5]]
    assert text_name("a \tb") == "a__b"


@pytest.mark.slow
@pytest.mark.parametrize("is_binary", [False, True])
def test_what_gensim_writes_is_read_and_the_other_way_round(tmp_path, is_binary):
    gensim = pytest.importorskip("gensim.models")
    vectors = many(12, codes=40)
    written_by_it = gensim.KeyedVectors(vector_size=12)
    written_by_it.add_vectors(list(vectors.codes), vectors.vectors)
    file = tmp_path / "vectors.w2v"
    written_by_it.save_word2vec_format(str(file), binary=is_binary)
    found = read_vectors(file)
    assert found.codes == vectors.codes
    np.testing.assert_allclose(found.vectors, vectors.vectors, rtol=1e-6)
    ours = written(tmp_path, "vectors.txt", vector_files(CodeVectors(CODES, VECTORS))["vectors.txt"])
    read_by_it = gensim.KeyedVectors.load_word2vec_format(str(ours))
    assert tuple(read_by_it.index_to_key) == PLAIN
    np.testing.assert_array_equal(read_by_it.vectors, VECTORS)
