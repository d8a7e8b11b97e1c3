import gzip
import json
import os
from pathlib import Path

import pytest

from palate.data import Row, read_rows
from palate.data.rows import scan_rows
from palate.errors import DataError


def lines(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def said(source, **options):
    """The message of the error that reading all rows ends in."""
    with pytest.raises(DataError) as caught:
        list(read_rows(str(source), **options))
    return str(caught.value)


def test_jsonl_counts_blank_lines_and_takes_a_byte_order_mark(tmp_path):
    path = tmp_path / "prefs.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"prompt": "caf\xc3\xa9"}\r\n\n{"prompt": "b"}')
    assert list(read_rows(str(path))) == [
        Row({"prompt": "café"}, f"{path}:1"),
        Row({"prompt": "b"}, f"{path}:3"),
    ]


def test_where_is_the_source_as_it_was_given(tmp_path, monkeypatch):
    lines(tmp_path / "prefs.jsonl", {"prompt": "a"})
    monkeypatch.chdir(tmp_path)
    assert next(read_rows("prefs.jsonl")).where == "prefs.jsonl:1"


@pytest.mark.parametrize("name", ["p.jsonl.gz", "p.json.gz", "P.JSONL.GZ"])
def test_gzip(tmp_path, name):
    path = tmp_path / name
    path.write_bytes(gzip.compress(b'{"prompt": "a"}\n{"prompt": "b"}\n'))
    assert [row.columns["prompt"] for row in read_rows(str(path))] == ["a", "b"]


def test_json_takes_lines_or_one_array(tmp_path):
    path = tmp_path / "alpaca.json"
    path.write_text(json.dumps([{"prompt": "a"}, {"prompt": "b"}], indent=2))
    assert [row.where for row in read_rows(str(path))] == [f"{path} row 1", f"{path} row 2"]
    lines(path, {"prompt": "a"}, {"prompt": "b"})
    assert [row.where for row in read_rows(str(path))] == [f"{path}:1", f"{path}:2"]


def test_limit_leaves_the_rest_unread(tmp_path):
    path = tmp_path / "p.jsonl"
    path.write_text('{"prompt": "a"}\n{"prompt": "b"}\nbroken')
    assert len(list(read_rows(str(path), limit=2))) == 2
    assert f"{path}:3" in said(path, limit=3)


def test_a_file_has_no_splits(tmp_path):
    assert list(read_rows(lines(tmp_path / "p.jsonl", {"prompt": "a"}), split="test"))


def test_parquet(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    path = tmp_path / "p.parquet"
    turns = [[{"role": "user", "content": str(i)}] for i in range(600)]
    pq.write_table(pa.table({"prompt": turns}), path)
    rows = list(read_rows(str(path)))
    assert rows[599] == Row({"prompt": [{"role": "user", "content": "599"}]}, f"{path} row 600")
    assert len(list(read_rows(str(path), limit=3))) == 3


def test_saved_dataset_and_its_splits(tmp_path):
    from datasets import Dataset, DatasetDict, disable_progress_bars

    disable_progress_bars()
    data = Dataset.from_list([{"prompt": "a", "n": 1}, {"prompt": "b", "n": 2}])
    one, two = str(tmp_path / "one"), str(tmp_path / "two")
    data.with_format("numpy").save_to_disk(one)
    DatasetDict(train=data, test=data.select([1])).save_to_disk(two)
    rows = list(read_rows(one, split="whatever"))
    assert rows[1] == Row({"prompt": "b", "n": 2}, f"{one} row 2")
    assert type(rows[1].columns["n"]) is int
    assert list(read_rows(two, split="test")) == [Row({"prompt": "b", "n": 2}, f"{two}[test] row 1")]
    assert said(two, split="validation") == f"{two} has no split 'validation'; it has train, test."
    next((tmp_path / "one").glob("*.arrow")).write_bytes(b"gone")
    assert "damaged saved data set" in said(one)


def test_hub(tmp_path, monkeypatch):
    import datasets

    datasets.disable_progress_bars()
    shard = tmp_path / "hub" / "train.jsonl"
    shard.parent.mkdir()
    lines(shard, {"prompt": "a"}, {"prompt": "b"})
    real = datasets.load_dataset

    def load_dataset(source, *, split):
        assert source == "trl-lib/x"
        return real(str(shard.parent), split=split, cache_dir=str(tmp_path / "cache"))

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert list(read_rows("trl-lib/x", limit=2))[1] == Row({"prompt": "b"}, "trl-lib/x[train] row 2")
    message = said("trl-lib/x", split="dev")
    assert message.startswith("trl-lib/x[dev] cannot be loaded from the hub: Unknown split")
    assert "['train']" in message
    assert "--split" in message


def test_hub_out_of_reach_or_without_the_data_set(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    import datasets
    import huggingface_hub

    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)  # read at import, perhaps before this test
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    (tmp_path / "data").mkdir()
    lines(tmp_path / "data" / "prefs.jsonl", {"prompt": "a"})
    monkeypatch.chdir(tmp_path)
    message = said("data/prefs")
    assert message.startswith("The hub cannot be reached for data/prefs (")
    assert "go online" in message
    assert "not on this disk either. Did you mean prefs.jsonl?" in message

    def unknown(source, *, split):
        raise datasets.exceptions.DatasetNotFoundError("Dataset doesn't exist")

    monkeypatch.setattr(datasets, "load_dataset", unknown)
    assert said("nobody/nothing").startswith("The hub has no data set nobody/nothing, or it is private")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"a": 1}\n{"a": \n{"a": 3}\n', ":2 is not JSON (Expecting value at column"),
        (b'{"a": 1}\n{"a": "tru', ":2 is not JSON (Unterminated string starting at at column 7"),
        (b'{"a": 1}\n["a"]\n', ":2 is an array; expected an object"),
        (b'{"a": 1}\n\n"a"\n', ":3 is a string; expected an object"),
        (b"null\n", ":1 is null; expected an object"),
        (b"3\n", ":1 is a number; expected an object"),
        (b'{"a": 1}\n{"a": "\xe9"}\n', ":2 is not UTF-8 (byte 0xe9); save the file as UTF-8."),
        (b'{"a": "\\ud83d"}\n', ":1 has half a surrogate pair"),
        (b"[" * 100_000 + b"\n", ":1 is not JSON (maximum recursion depth"),
        (b'{"a": ' + b"1" * 5000 + b"}\n", ":1 is not JSON (Exceeds the limit"),
    ],
)
def test_bad_line_is_named(tmp_path, content, message):
    path = tmp_path / "p.jsonl"
    path.write_bytes(content)
    assert said(path).startswith(f"{path}{message}")


def test_a_cut_last_line_is_suspected(tmp_path):
    path = tmp_path / "p.jsonl"
    path.write_bytes(b'{"a": 1}\n{"a": 2')
    assert said(path).endswith("It is the file's last line, so the file may be incomplete.")
    path.write_bytes(b'{"a": 1}\n{"a": 2\n')
    assert "cut off" not in said(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'[\n {"a": 1},\n {"a": }\n]', ":3 is not JSON"),
        (b'[\n {"a": 1},\n 2\n]', " row 2 is a number; expected an object"),
        (b'[\n {"a": "\xff"}\n]', ":2 is not UTF-8"),
        (b"[" * 100_000, " is not JSON (maximum recursion depth"),
    ],
)
def test_bad_array_is_named(tmp_path, content, message):
    path = tmp_path / "p.json"
    path.write_bytes(content)
    assert said(path).startswith(f"{path}{message}")


@pytest.mark.parametrize("content", [b"", b"\n \n"])
def test_empty_file(tmp_path, content):
    path = tmp_path / "p.jsonl"
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"p\.jsonl has no rows; expected at least one\.$"):
        read_rows(str(path))  # at once, not on iterating


def test_broken_gzip(tmp_path):
    path = tmp_path / "p.jsonl.gz"
    whole = gzip.compress(os.urandom(4000).hex().encode())
    for content in (whole[:2000], b'{"a": 1}\n', whole[:200] + b"\0" * 200 + whole[400:]):
        path.write_bytes(content)
        assert said(path).startswith(f"{path} is not a complete gzip file (")


def test_missing_file_hints_at_a_near_one_or_at_what_is_there(tmp_path):
    path = tmp_path / "prefs-train.jsonl"
    assert said(path) == f"{path} does not exist."
    lines(path, {"a": 1})
    near = tmp_path / "prefs-trian.jsonl"
    assert said(near) == f"{near} does not exist. Did you mean prefs-train.jsonl?"
    for name in ("zzz.parquet", "zzz.jsonl"):  # a name is not near because of its suffix
        other = tmp_path / name
        assert said(other) == f"{other} does not exist. Data files in that folder: prefs-train.jsonl."
    astray = tmp_path / "no" / "p.jsonl"
    assert said(astray) == f"{astray} does not exist. The folder {tmp_path / 'no'} does not exist either."


@pytest.mark.parametrize("source", ["evryday", "./somewhere", "/nowhere/at/all", "a/b/c", "~/prefs"])
def test_a_name_that_is_nothing_says_what_can_be_named(source):
    message = said(source)
    assert message.startswith(f"{source} does not exist; expected `everyday`, a file (.jsonl, ")
    assert message.endswith("Did you mean everyday?") == (source == "evryday")


@pytest.mark.parametrize("name", ["p.txt", "p.pkl", "p.arrow", "p.tar.gz"])
def test_kinds_that_are_not_read(tmp_path, name):
    expected = (
        f"{tmp_path / name} has an unsupported file type; expected .jsonl, .json, .jsonl.gz, .json.gz, .par"
    )
    assert said(tmp_path / name).startswith(expected)
    (tmp_path / name).write_bytes(b"a,b\n")
    assert said(tmp_path / name).startswith(expected)


def test_a_file_without_a_suffix_is_not_looked_for_on_the_hub(tmp_path, monkeypatch):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "prefs").write_text("{}")
    monkeypatch.chdir(tmp_path)
    assert said("data/prefs").startswith("data/prefs has an unsupported file type")


def test_a_folder_of_files(tmp_path):
    assert said(tmp_path) == f"{tmp_path} is an empty folder; expected data files in it."
    lines(tmp_path / "a.jsonl", {"prompt": "a"})
    assert [row.columns for row in read_rows(str(tmp_path))] == [{"prompt": "a"}]
    assert "Choose another --split: train." in said(tmp_path, split="test")


def test_a_clone_with_configurations(tmp_path):
    for name in ("short", "long"):
        lines(tmp_path / f"{name}.jsonl", {"prompt": name})
    configs = "".join(f"- config_name: {n}\n  data_files: {n}.jsonl\n" for n in ("short", "long"))
    (tmp_path / "README.md").write_text(f"---\nconfigs:\n{configs}---\n")
    assert [row.columns for row in read_rows(f"{tmp_path}:long")] == [{"prompt": "long"}]
    assert f"name one of them: {tmp_path}:short, {tmp_path}:long." in said(tmp_path)
    assert f"name one of them: {tmp_path}:short, {tmp_path}:long." in said(f"{tmp_path}:middle")


def test_a_configuration_on_the_hub(monkeypatch):
    import datasets

    def load_dataset(path, name=None, **_):
        if name is None:
            listed = (
                "Config name is missing.\nPlease pick one among the available configs: ['main', 'socratic']"
            )
            raise ValueError(listed)
        return datasets.Dataset.from_list([{"prompt": name}])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert [row.columns for row in read_rows("someone/sums:main")] == [{"prompt": "main"}]
    assert "name one of them: someone/sums:main, someone/sums:socratic." in said("someone/sums")
    assert "Write a configuration as someone/sums:main." in said("someone/sums/main")


# ---- Tables of text --------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "comma"), [("t.csv", ","), ("t.tsv", "\t"), ("t.csv.gz", ",")])
def test_tables(tmp_path, name, comma):
    text = f'prompt{comma}n\n"two\nlines, ""quoted"""{comma}1\n007{comma}\n'.encode()
    (tmp_path / name).write_bytes(gzip.compress(text) if name.endswith(".gz") else text)
    rows = list(read_rows(str(tmp_path / name)))
    # Numbers stay as they are written: a prompt of digits is a text.
    assert [r.columns for r in rows] == [
        {"prompt": 'two\nlines, "quoted"', "n": "1"},
        {"prompt": "007", "n": None},
    ]
    assert rows[1].where == f"{tmp_path / name} row 2"


def test_a_row_with_another_number_of_values_is_a_bad_row(tmp_path):
    path = tmp_path / "t.csv"
    path.write_text("prompt,n\na,1\nb,2,3\nc,4\n")
    rows = list(scan_rows(str(path)))
    assert [row.columns.get("prompt") for row in rows if row.fault is None] == ["a", "c"]
    assert "has 3 values; expected 2" in str(next(row.fault for row in rows if row.fault))


def test_a_table_that_is_none(tmp_path):
    path = tmp_path / "t.csv"
    path.write_bytes(b"\xff\x00prompt,\n\xff,a\n")
    assert said(path).startswith(f"{path} cannot be read as a table")


@pytest.mark.parametrize("content", [b"", b"hello", b"PAR1" + b"\0" * 100 + b"PAR1"])
def test_unreadable_parquet(tmp_path, content):
    path = tmp_path / "p.parquet"
    path.write_bytes(content)
    assert said(path).startswith(f"{path} cannot be read as Parquet (")


def test_parquet_damaged_further_on(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    path = tmp_path / "p.parquet"
    texts = [os.urandom(100).hex() for _ in range(1000)]
    pq.write_table(pa.table({"prompt": texts}), path, row_group_size=256, compression="snappy")
    content = bytearray(path.read_bytes())
    middle = len(content) // 2
    content[middle : middle + 20_000] = b"\xff" * 20_000
    path.write_bytes(content)
    assert said(path).startswith(f"{path} cannot be read as Parquet after row ")


def test_a_name_too_long_to_look_up():
    assert said("a" * 5000) == f"{'a' * 200} cannot be looked up: File name too long."


def test_a_file_that_may_not_be_read(tmp_path, monkeypatch):
    def refuse(*_):
        raise PermissionError(13, "Permission denied")

    path = lines(tmp_path / "p.jsonl", {"a": 1})
    monkeypatch.setattr(Path, "open", refuse)  # root may read everything, so no chmod
    assert said(path) == f"{path} cannot be read: Permission denied."


def test_built_in_splits():
    assert next(read_rows("everyday", split="test")).where == "everyday/test.jsonl:1"
    assert said("everyday", split="dev") == "everyday has no split 'dev'; it has test, train."


def test_pickle_is_never_reached(tmp_path, monkeypatch):
    import pickle

    def refuse(*_, **__):
        raise AssertionError("unpickled")

    monkeypatch.setattr(pickle, "load", refuse)
    monkeypatch.setattr(pickle, "loads", refuse)
    from datasets import Dataset

    Dataset.from_list([{"prompt": "a"}]).save_to_disk(str(tmp_path / "saved"))
    assert list(read_rows(str(tmp_path / "saved")))
