import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from behrt_jax.data.parquet import open_parquet, read_columns, read_tables, refuse_broken, sound
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
    numbers = pa.table({"n": pa.array([7] * 120)})
    pq.write_table(numbers, file)
    content, refused = file.read_bytes(), []
    count, other = bytes([240, 1]), bytes([238, 1])  # 120 and 119, as headers have them
    for place in (place for place in range(len(content)) if content[place : place + 2] == count):
        file.write_bytes(content[:place] + other + content[place + 2 :])
        try:
            with open_parquet(file) as opened:
                assert read_columns(file, opened, ["n"]).equals(numbers)
                assert next(read_tables(file, opened, (0,), ["n"])).equals(numbers)
        except InputError:
            refused.append(place)
    assert len(refused) >= 4  # of pages, and of the file and its row group


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
