import datetime
import gzip
import json
import os
import subprocess
import sys
from decimal import Decimal
from pathlib import Path

import pytest
import zstandard

from steerlm_nemo.data.options import Options
from steerlm_nemo.data.preprocessing import conversations_of
from steerlm_nemo.data.rows import Lines, require_source
from steerlm_nemo.errors import InputError
from steerlm_nemo.records import Accounting, read_records

ROOT = Path(__file__).resolve().parents[2]
ROWS = [{"prompt": f"q{n} é\n\u2028", "response": f"r{n}", "grade": n if n % 2 else None} for n in range(50)]
JSONL = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS).encode()


def rows_of(source, tmp_path):
    with Lines(source, tmp_path) as lines:
        return [lines[index].record for index in range(len(lines))]


def parquet(path):
    pyarrow = pytest.importorskip("pyarrow")
    pytest.importorskip("pyarrow.parquet").write_table(pyarrow.Table.from_pylist(ROWS), path, row_group_size=7)


def zst_frames(data):
    """Two frames one after the other, as parallel compressors write them."""
    half = len(data) // 2
    return zstandard.compress(data[:half]) + zstandard.compress(data[half:])


CONTAINERS = {
    "rows.jsonl": lambda path: path.write_bytes(JSONL),
    "crlf.jsonl": lambda path: path.write_bytes(b"\xef\xbb\xbf" + JSONL.replace(b"\n", b"\r\n\r\n")),
    "rows.jsonl.gz": lambda path: path.write_bytes(gzip.compress(JSONL)),
    "rows.jsonl.zst": lambda path: path.write_bytes(zst_frames(JSONL)),
    "rows.json": lambda path: path.write_text(json.dumps(ROWS)),
    "indented.json": lambda path: path.write_text("\ufeff \n" + json.dumps(ROWS, indent=2) + "\n"),
    "rows.json.gz": lambda path: path.write_bytes(gzip.compress(json.dumps(ROWS).encode())),
    "rows.json.zst": lambda path: path.write_bytes(zst_frames(json.dumps(ROWS).encode())),
    "rows.parquet": parquet,
    "names.lie": lambda path: path.write_bytes(zst_frames(JSONL)),
}


@pytest.mark.parametrize("name", CONTAINERS)
def test_every_container_gives_the_same_rows(tmp_path, name):
    CONTAINERS[name](tmp_path / name)
    assert rows_of(tmp_path / name, tmp_path) == ROWS
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_a_place_is_the_row_where_there_are_no_lines(tmp_path):
    (tmp_path / "rows.json").write_text(json.dumps(ROWS, indent=2))
    with Lines(tmp_path / "rows.json", tmp_path) as lines:
        assert str(lines[7].ref) == f"{tmp_path / 'rows.json'}:8"
        assert lines[7].record == ROWS[7]


def test_an_array_larger_than_a_chunk_and_one_of_odd_elements_are_read(tmp_path, monkeypatch):
    monkeypatch.setattr("steerlm_nemo.data.rows._CHUNK", 7)
    (tmp_path / "rows.json").write_text(json.dumps(ROWS))
    assert rows_of(tmp_path / "rows.json", tmp_path) == ROWS
    (tmp_path / "odd.json").write_text('[ 1234567890123 , "a]b" ,{"a":[1,{"b":null}]}, NaN ]')
    with Lines(tmp_path / "odd.json", tmp_path) as lines:
        problems = [lines[index].problem for index in range(len(lines))]
        assert lines[2].record == {"a": [1, {"b": None}]}
    assert problems == [
        "a JSON object is needed, found int",
        "a JSON object is needed, found str",
        None,
        "not JSON: NaN is not a JSON value",
    ]


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ('[{"a": 1}', "not JSON after record 1"),
        ('[{"a": 1} {"a": 2}]', "not JSON after record 1"),
        ('[{"a": 1}, {"a": }]', "not JSON after record 1"),
        ('[{"a": 1}, ', "not JSON after record 1"),
        ('[{"a": 1}] x', "text after the end of the array of 1 records"),
        ("[", "not JSON after record 0"),
    ],
)
def test_a_damaged_array_is_refused_naming_the_last_good_record(tmp_path, text, problem):
    (tmp_path / "rows.json").write_text(text)
    with pytest.raises(InputError, match=problem):
        rows_of(tmp_path / "rows.json", tmp_path)
    (tmp_path / "empty.json").write_text(" [ ] ")
    assert rows_of(tmp_path / "empty.json", tmp_path) == []


@pytest.mark.parametrize("name", ["rows.jsonl.gz", "rows.jsonl.zst", "rows.json.gz", "rows.json.zst", "rows.parquet"])
@pytest.mark.parametrize("damage", ["cut", "garbled"])
def test_damaged_data_are_refused_with_one_message(tmp_path, name, damage):
    path = tmp_path / name
    CONTAINERS[name](path)
    data = path.read_bytes()
    path.write_bytes(data[:-9] if damage == "cut" else data[:40] + bytes(200) + data[240:])
    with pytest.raises(InputError, match=r"(damaged|not JSON|not UTF-8)"):
        rows_of(path, tmp_path)


@pytest.mark.parametrize("suffix", [".jsonl.zst", ".jsonl.gz", ".jsonl"])
def test_every_tool_that_reads_records_reads_compressed_ones(tmp_path, suffix):
    path = tmp_path / f"rows{suffix}"
    CONTAINERS[path.name](path)
    assert [record for _, record in read_records(path)] == ROWS
    if suffix == ".jsonl.zst":
        path.write_bytes(path.read_bytes()[:-9])
        with pytest.raises(InputError, match="damaged zstd data after line"):
            list(read_records(path))


def test_parquet_without_pyarrow_says_what_to_install(tmp_path, monkeypatch):
    (tmp_path / "rows.parquet").write_bytes(b"PAR1" + bytes(40))
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(InputError, match="pip install pyarrow"):
        rows_of(tmp_path / "rows.parquet", tmp_path)


def test_a_directory_that_datasets_loads_is_a_source(tmp_path):
    datasets = pytest.importorskip("datasets")
    folder = tmp_path / "folder"
    (folder / "data").mkdir(parents=True)
    parquet(folder / "data" / "train-00000-of-00001.parquet")
    assert rows_of(folder, tmp_path) == ROWS
    assert rows_of(f"{folder}@train", tmp_path) == ROWS
    with pytest.raises(InputError, match="no dataset with a split 'test'"):
        rows_of(f"{folder}@test", tmp_path)
    saved = tmp_path / "saved"
    datasets.Dataset.from_list(ROWS).save_to_disk(saved)
    assert rows_of(saved, tmp_path) == ROWS


def test_a_directory_without_data_is_refused_before_it_is_searched(tmp_path):
    for read in (require_source, lambda source: Lines(source, tmp_path)):
        with pytest.raises(InputError, match="is a directory without data files"):
            read(tmp_path)


def test_a_dataset_of_the_hub_without_a_network_says_to_download(tmp_path):
    pytest.importorskip("datasets")
    done = subprocess.run(
        [
            *(sys.executable, ROOT / "scripts" / "preprocessing.py", "--input_file=hf://nvidia/HelpSteer2@validation"),
            f"--output_file_prefix={tmp_path / 'out'}",
        ],
        env={**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "home")},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 2
    assert done.stderr.startswith("error: hf://nvidia/HelpSteer2: cannot be loaded"), done.stderr
    assert "download the files of the dataset elsewhere" in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert [path.name for path in tmp_path.iterdir() if path.name != "home"] == []


def test_a_bare_dataset_name_is_answered_with_how_to_write_it():
    with pytest.raises(InputError, match="is written hf://nvidia/HelpSteer2"):
        require_source("nvidia/HelpSteer2")


def table(path, columns):
    pyarrow = pytest.importorskip("pyarrow")
    pytest.importorskip("pyarrow.parquet").write_table(pyarrow.table(columns(pyarrow)), path)
    return path


@pytest.mark.parametrize("type", ["binary", "large_binary", "string", "large_string"])
def test_texts_of_parquet_are_texts_however_they_are_stored(tmp_path, type):
    path = table(tmp_path / "rows.parquet", lambda pa: {"text": pa.array([b"q1 \xc3\xa9", None], getattr(pa, type)())})
    assert rows_of(path, tmp_path) == [{"text": "q1 é"}, {"text": None}]


def test_bytes_within_lists_and_structs_of_parquet_are_texts(tmp_path):
    turns = [[{"role": b"user", "content": b"Hi"}]]

    def columns(pa):
        return {"messages": pa.array(turns, pa.list_(pa.struct([("role", pa.binary()), ("content", pa.binary())])))}

    assert rows_of(table(tmp_path / "rows.parquet", columns), tmp_path) == [
        {"messages": [{"role": "user", "content": "Hi"}]}
    ]


OF_NO_JSON = {
    "not UTF-8": (b"\xff\xfe", {"bytes": "fffe"}),
    "NaN": (float("nan"), {"float": "nan"}),
    "infinite": (float("-inf"), {"float": "-inf"}),
    "a date": (datetime.date(2024, 1, 15), {"date": "2024-01-15"}),
    "a time": (datetime.datetime(2024, 1, 15, 7), {"datetime": "2024-01-15 07:00:00"}),
    "a duration": (datetime.timedelta(hours=1), {"timedelta": "1:00:00"}),
    "a list of NaN": ([float("nan"), 1.0], [{"float": "nan"}, 1.0]),
}


@pytest.mark.parametrize("kind", OF_NO_JSON)
def test_a_value_that_json_cannot_hold_rejects_a_row_only_where_it_is_read(tmp_path, kind):
    value, form = OF_NO_JSON[kind]
    row = {"prompt": "Hi", "response": "Hello.", "helpfulness": 3, "unread": "x"}
    for column, num_written in (("unread", 1), ("prompt", 0), ("helpfulness", 0)):
        path = table(
            tmp_path / f"{column}.parquet", lambda pa, at=column: {k: [v] for k, v in {**row, at: value}.items()}
        )
        assert rows_of(path, tmp_path) == [{**row, column: form}]
        records = Accounting(tmp_path / "rejects.jsonl")
        found = list(conversations_of(path, Options(), records, scratch_dir=tmp_path))
        assert (len(found), records.counts["written"], records.counts["rejected"]) == (
            num_written,
            num_written,
            1 - num_written,
        )


def test_whole_decimals_are_whole_numbers(tmp_path):
    path = table(tmp_path / "rows.parquet", lambda pa: {"grade": [Decimal("3.00"), Decimal("2.50")]})
    assert rows_of(path, tmp_path) == [{"grade": 3}, {"grade": 2.5}]


@pytest.fixture
def folder_with_code(tmp_path):
    """A dataset's directory with code that leaves a trace when it is run."""
    pytest.importorskip("datasets")
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "train.jsonl").write_bytes(JSONL)
    return folder, f"open({str(tmp_path / 'ran')!r}, 'w').close()\n"


@pytest.mark.parametrize("split", ["", "@train"])
@pytest.mark.parametrize("trusting", [None, True])
def test_the_code_of_a_directory_is_never_run(tmp_path, folder_with_code, monkeypatch, split, trusting):
    import datasets

    folder, code = folder_with_code
    (folder / "folder.py").write_text(code)
    # What HF_DATASETS_TRUST_REMOTE_CODE sets, and nobody to answer the question.
    monkeypatch.setattr(datasets.config, "HF_DATASETS_TRUST_REMOTE_CODE", trusting, raising=False)
    monkeypatch.setattr("builtins.input", lambda *args: "y")
    with pytest.raises(InputError, match=r"code of its own, which is never run here. Give .*train\.jsonl"):
        rows_of(f"{folder}{split}", tmp_path)
    assert not (tmp_path / "ran").exists()


def test_a_script_that_is_not_the_directorys_own_is_left_alone(tmp_path, folder_with_code):
    folder, code = folder_with_code
    (folder / "make.py").write_text(code)
    assert rows_of(folder, tmp_path) == ROWS
    assert not (tmp_path / "ran").exists()


def test_the_code_of_a_dataset_of_the_hub_is_never_run(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    asked = {}
    monkeypatch.setattr(datasets, "load_dataset", lambda name, **options: asked.update(options) or iter(ROWS))
    assert rows_of("hf://someone/something@test", tmp_path) == ROWS
    # From 4 on `datasets` runs no code and takes no such option.
    assert asked.get("trust_remote_code", datasets.__version__ < "4") is False
    assert (asked["split"], asked["streaming"]) == ("test", True)


@pytest.mark.parametrize("splits", [["train_sft", "test_sft"], ["test"], ["validation", "test"]])
def test_a_split_that_is_not_there_is_answered_with_those_that_are(tmp_path, splits):
    datasets = pytest.importorskip("datasets")
    files, saved = tmp_path / "files", tmp_path / "saved"
    (files / "data").mkdir(parents=True)
    for split in splits:
        parquet(files / "data" / f"{split}-00000-of-00001.parquet")
    datasets.DatasetDict({split: datasets.Dataset.from_list(ROWS) for split in splits}).save_to_disk(saved)
    for source in (files, saved):
        with pytest.raises(InputError, match=f"no dataset with a split 'train' here; there are {source}@") as refused:
            rows_of(source, tmp_path)
        assert all(f"{source}@{split}" in str(refused.value) for split in splits)
        assert rows_of(f"{source}@{splits[-1]}", tmp_path) == ROWS
    single = tmp_path / "single"
    datasets.Dataset.from_list(ROWS).save_to_disk(single)
    with pytest.raises(InputError, match="no dataset with a split 'test' here; it holds one"):
        rows_of(f"{single}@test", tmp_path)


ODD = [
    {"prompt": [{"type": "text", "text": "parts?"}], "response": "r"},
    {"prompt": 7, "response": None},
    {"other": {"keys": 1}},
    {"prompt": {"text": "q"}, "response": ["r"]},
]


@pytest.mark.parametrize("odd", ODD)
@pytest.mark.parametrize("num_before", [1, 60_000])
@pytest.mark.parametrize("names", [["train.jsonl"], ["train-0.jsonl", "train-1.jsonl"], ["train.json.gz"]])
def test_a_record_of_other_types_keeps_its_place_in_a_directory(tmp_path, odd, num_before, names):
    """`datasets` guesses a table's types from its first 10 MB and fails later."""
    pytest.importorskip("datasets")
    folder = tmp_path / "folder"
    folder.mkdir()
    rows = [{"prompt": f"q{n} " + "x" * 200, "response": "r"} for n in range(num_before)]
    for name in names:
        text = "".join(json.dumps(row) + "\n" for row in [*rows, odd]).encode()
        (folder / name).write_bytes(gzip.compress(text, 1) if name.endswith(".gz") else text.removesuffix(b"\n"))
    with Lines(folder, tmp_path) as lines:
        assert len(lines) == len(names) * (num_before + 1)
        for number, name in enumerate(names, 1):
            last = lines[number * (num_before + 1) - 1]
            assert (last.record, str(last.ref)) == (odd, f"{folder / name}:{num_before + 1}")
            first = lines[(number - 1) * (num_before + 1)]
            assert (first.record, str(first.ref)) == (rows[0], f"{folder / name}:1")


def test_files_that_only_datasets_reads_are_still_read_and_fail_with_one_message(tmp_path):
    pytest.importorskip("datasets")
    folder = tmp_path / "folder"
    (folder / "data").mkdir(parents=True)
    (folder / "data" / "train.csv").write_text("prompt,response\nq,r\n")
    (folder / "README.md").write_text("---\nconfigs:\n- config_name: default\n  data_files: data/*.csv\n---\n")
    (folder / "extra.json").write_text("[]")
    assert rows_of(folder, tmp_path) == [{"prompt": "q", "response": "r"}]
    (folder / "data" / "train.csv").write_text('prompt,response\nq,r\nq,"r\n' + "a,b,c,d\n" * 9)
    with pytest.raises(InputError, match=r"folder: cannot be (loaded|read after row \d+): .*Give one of its files"):
        rows_of(folder, tmp_path)
