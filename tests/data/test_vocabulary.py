from collections import Counter

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from behrt_jax.data.vocabulary import SPECIAL_TOKENS, UNK, Vocabulary, fit_vocabulary
from behrt_jax.errors import InputError

CODES = st.sampled_from(["DX//A", "DX//B", "LAB//C", "Ä//é", "a b,c", "Z"])


def fit(codes, min_count=1, max_rows=None, declared_codes=None, descriptions=None):
    return fit_vocabulary(Counter(codes), min_count, max_rows, declared_codes, descriptions)


def test_rows_are_sorted_by_count_then_code():
    vocabulary = fit(["B", "A", "C", "C", "D", "B", "C"], descriptions={"B": "bee", "X": "none"})
    assert vocabulary.codes == ("[PAD]", "[MASK]", "[UNK]", "[CLS]", "[SEP]", "C", "B", "A", "D")
    assert vocabulary.counts.tolist() == [0, 0, 0, 0, 0, 3, 2, 1, 1]
    assert vocabulary.counts.dtype == np.int64
    assert vocabulary.descriptions == (None,) * 6 + ("bee", None, None)
    assert len(vocabulary) == 9


def test_rare_codes_become_unk_and_are_counted_there():
    vocabulary = fit(["A"] * 3 + ["B"] * 2 + ["C"], min_count=2)
    assert vocabulary.codes[5:] == ("A", "B")
    assert vocabulary.counts[UNK] == 1
    assert vocabulary.encode(["B", "C", "A", "new"]).tolist() == [6, UNK, 5, UNK]
    assert vocabulary.encode(["A"]).dtype == np.int32
    assert vocabulary.encode([]).tolist() == []


def test_max_rows_counts_the_special_tokens():
    vocabulary = fit(["A"] * 3 + ["B"] * 2 + ["C"], max_rows=7)
    assert len(vocabulary) == 7
    assert vocabulary.codes[5:] == ("A", "B")
    assert vocabulary.counts[UNK] == 1


def test_declared_codes_have_a_row_whatever_their_count():
    vocabulary = fit(["A"] * 3 + ["B"] * 2 + ["C"] * 4, 3, 8, declared_codes=("Y", "B", "X"))
    assert vocabulary.codes[5:] == ("B", "X", "Y")
    assert vocabulary.counts.tolist() == [0, 0, 7, 0, 0, 2, 0, 0]
    vocabulary = fit(["A"] * 3 + ["B"] * 2 + ["C"] * 4, 3, 9, declared_codes=("Y", "B", "X"))
    assert vocabulary.codes[5:] == ("C", "B", "X", "Y")


@given(
    codes=st.lists(CODES, min_size=1, max_size=40),
    min_count=st.integers(0, 3),
    max_rows=st.none() | st.integers(8, 12),
    declared=st.none() | st.lists(CODES, min_size=1, max_size=3, unique=True).map(tuple),
)
def test_counts_cover_every_train_event(codes, min_count, max_rows, declared):
    counter = Counter(codes)
    try:
        vocabulary = fit(codes, min_count, max_rows, declared)
    except InputError as error:
        assert declared is None
        assert max(counter.values()) < min_count
        assert "lower data.min_count" in str(error)
        return
    assert vocabulary.counts.sum() == len(codes)
    assert max_rows is None or len(vocabulary) <= max_rows
    ids = vocabulary.encode(codes)
    assert np.array_equal(np.bincount(ids, minlength=len(vocabulary)), vocabulary.counts)
    for code in declared or ():
        assert code in vocabulary.codes
    full = len(vocabulary) == max_rows
    for code, count in counter.items():
        assert (code in vocabulary.codes) >= (count >= min_count and not full)
        assert (code in vocabulary.codes) <= (count >= min_count or code in (declared or ()))
    order = [(-count, code) for code, count in zip(vocabulary.codes[5:], vocabulary.counts[5:], strict=True)]
    assert order == sorted(order)
    assert fit(codes[::-1], min_count, max_rows, declared).fingerprint() == vocabulary.fingerprint()


def test_special_names_are_not_codes():
    with pytest.raises(InputError, match=r"code \[SEP\] is named like a special token"):
        fit(["A", "[SEP]"])
    with pytest.raises(InputError, match=r"code \[PAD\] is named like a special token"):
        fit(["A"], declared_codes=("[PAD]",))
    assert fit(["A"]).encode(list(SPECIAL_TOKENS)).tolist() == [UNK] * 5


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"codes": ["A", "A"], "min_count": 3}, r"No code occurs 3 times .*one occurs 2 times.*min_count"),
        ({"codes": []}, "No code occurs 1 times"),
        ({"codes": ["A"], "max_rows": 5}, r"data\.vocabulary_size is 5.*give at least 6"),
        ({"codes": ["A"], "max_rows": 7, "declared_codes": ("A", "B", "C")}, r"is 7.*give at least 8"),
    ],
)
def test_no_vocabulary(arguments, message):
    with pytest.raises(InputError, match=message):
        fit(**arguments)


def test_written_and_read_it_is_the_same(tmp_path):
    vocabulary = fit(["A", "A", "Ä//b c,d"], descriptions={"A": "aye"})
    vocabulary.write(tmp_path / "vocabulary.parquet")
    table = pq.read_table(tmp_path / "vocabulary.parquet")
    assert table.column_names == ["code", "id", "count", "description"]
    assert table.to_pylist()[5] == {"code": "A", "id": 5, "count": 2, "description": "aye"}
    again = Vocabulary.read(tmp_path / "vocabulary.parquet")
    assert again.codes == vocabulary.codes
    assert np.array_equal(again.counts, vocabulary.counts)
    assert again.descriptions == vocabulary.descriptions
    assert again.fingerprint() == vocabulary.fingerprint()


def test_the_fingerprint_tells_ids_apart():
    one, two = fit(["A", "A", "B"]), fit(["A", "B", "B"])
    assert one.fingerprint() != two.fingerprint()
    assert one.fingerprint() == fit(["A", "A", "A", "B"]).fingerprint()
    assert len(one.fingerprint()) == 64


def test_other_files_are_refused(tmp_path):
    file = tmp_path / "vocabulary.parquet"
    with pytest.raises(InputError, match=r"vocabulary\.parquet cannot be read"):
        Vocabulary.read(file)
    file.write_bytes(b"PAR1 and no more")
    with pytest.raises(InputError, match=r"vocabulary\.parquet cannot be read"):
        Vocabulary.read(file)
    pq.write_table(pa.table({"code": ["A"], "id": [0]}), file)
    with pytest.raises(InputError, match="columns code, id, count, description"):
        Vocabulary.read(file)
    fit(["A", "B"]).write(file)
    table = pq.read_table(file)
    pq.write_table(table.take([0, 1, 2, 3, 4, 6, 5]), file)
    with pytest.raises(InputError, match="order of their ids"):
        Vocabulary.read(file)
    pq.write_table(table.slice(5).drop(["id"]).append_column("id", pa.array([0, 1], pa.int32())), file)
    with pytest.raises(InputError, match="start with"):
        Vocabulary.read(file)
