import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from behrt_jax.data.parquet import open_parquet, open_whole, read_columns, readable, refuse_broken, sound
from behrt_jax.errors import InputError


def test_pages_that_differ_from_their_checksums_are_refused(tmp_path):
    file = tmp_path / "t.parquet"
    numbers = pa.table({"n": pa.array(range(1000))})
    pq.write_table(numbers, file, compression="none", use_dictionary=False, write_page_checksum=True)
    with open_parquet(file) as opened:
        assert read_columns(file, opened, ["n"]).equals(numbers)
    content = bytearray(file.read_bytes())
    content[content.index((500).to_bytes(8, "little"))] ^= 1
    file.write_bytes(content)
    with open_parquet(file) as opened, pytest.raises(InputError, match=r"t\.parquet is no readable Parquet"):
        read_columns(file, opened, ["n"])


def test_counts_of_rows_that_contradict_each_other_are_refused(tmp_path):
    file = tmp_path / "t.parquet"
    pq.write_table(pa.table({"n": pa.array([7] * 120)}), file)
    content, changed = file.read_bytes(), 0
    count = bytes([240, 1])  # 120, as the footer has it
    footer = len(content) - 8 - int.from_bytes(content[-8:-4], "little")
    for place in (place for place in range(footer, len(content)) if content[place : place + 2] == count):
        file.write_bytes(content[:place] + bytes([238, 1]) + content[place + 2 :])
        with readable(file), pytest.raises(ValueError, match="counts of rows that differ"):
            open_whole(file)
        changed += 1
    assert changed >= 3  # of the file, of its row group and of the column in it


def test_what_a_column_cannot_hold_is_named_by_its_row():
    texts = pa.array([b"good", b"caf\xe9", b"good"]).view(pa.string())
    coded = pa.DictionaryArray.from_arrays(pa.array([0, 0, 1], pa.int32()), texts, safe=False)
    for values, row in ((texts, 8), (coded, 9), (pa.chunked_array([texts[:1], texts[1:]]), 8)):
        message = f"a has in the column code, row {row} .* not UTF-8"
        with pytest.raises(InputError, match=message) as error:
            refuse_broken("a", "code", values, first_row=7)
        assert "caf" not in str(error.value)


def test_indices_beyond_a_dictionary_are_refused():
    beyond = pa.DictionaryArray.from_arrays(pa.array([0, 5], pa.int32()), pa.array(["A"]), safe=False)
    with pytest.raises(InputError, match="a is damaged in the column code"):
        sound("a", pa.table({"code": beyond}))
