import bz2
import errno
import gzip
import io
import json
import lzma
import os
import tarfile
import zipfile

import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from steerlm_nemo.conversation import RecordRef
from steerlm_nemo.data.rows import Lines, require_source
from steerlm_nemo.errors import IncompleteError, InputError, RecordError
from steerlm_nemo.records import (
    Accounting,
    atomic_output,
    dump_record,
    read_lines,
    read_records,
    require_file,
    require_other_file,
)

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(st.characters(blacklist_categories=("Cs",))),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(st.characters(blacklist_categories=("Cs",))), inner),
    max_leaves=8,
)


def write(path, content: bytes):
    path.write_bytes(content)
    return path


@given(st.dictionaries(st.text(st.characters(blacklist_categories=("Cs",))), JSON))
def test_a_written_record_is_one_line_and_reads_back_the_same(tmp_path_factory, record):
    path = tmp_path_factory.mktemp("records") / "x.jsonl"
    with atomic_output(path) as file:
        file.write(dump_record(record) + "\n")
    assert path.read_bytes().count(b"\n") == 1
    assert [read for _, read in read_records(path)] == [record]


def test_lines_are_written_as_the_reference_writes_them():
    assert dump_record({"b": "é\n", "a": [1, None]}) == '{"b": "é\\n", "a": [1, null]}'


def test_a_lone_surrogate_cannot_be_written():
    with pytest.raises(ValueError):
        dump_record({"a": "\ud800"})


@pytest.mark.parametrize("compress", [bytes, gzip.compress])
def test_blank_lines_are_skipped_and_lines_keep_their_number(tmp_path, compress):
    path = write(tmp_path / "x.jsonl", compress(b'\xef\xbb\xbf{"a": 1}\r\n\n   \n{"a": 2}'))
    assert list(read_records(path)) == [
        (RecordRef(str(path), 1), {"a": 1}),
        (RecordRef(str(path), 4), {"a": 2}),
    ]


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        (b'{"a": 1', "not JSON"),
        (b'{"a": "\xff"}', "not UTF-8: byte 7"),
        (b"[1]", "a JSON object is needed, found list"),
        (b'{"a": NaN}', "NaN is not a JSON value"),
        (b"[" * 200_000, "not JSON"),
    ],
)
def test_a_malformed_line_is_marked_and_the_others_are_read(tmp_path, line, problem):
    path = write(tmp_path / "x.jsonl", b'{"a": 1}\n' + line + b'\n{"a": 3}\n')
    first, bad, last = read_lines(path)
    assert (first.record, bad.record, last.record) == ({"a": 1}, None, {"a": 3})
    assert problem in bad.problem
    assert bad.raw == line
    with pytest.raises(RecordError, match=r"x\.jsonl:2: "):
        list(read_records(path))


def test_a_missing_file_and_a_directory_are_refused(tmp_path):
    with pytest.raises(InputError, match="no such file"):
        list(read_lines(tmp_path / "none.jsonl"))
    with pytest.raises(InputError, match="is a directory"):
        list(read_lines(tmp_path))


def test_a_cut_gzip_file_is_refused_with_the_last_good_line(tmp_path):
    lines = b"".join(b'{"a": %d}\n' % (i * 7919) for i in range(5000))
    path = write(tmp_path / "x.jsonl.gz", gzip.compress(lines)[:-2000])
    with pytest.raises(InputError, match=r"damaged gzip data after line [1-9]"):
        list(read_lines(path))


def test_an_output_takes_its_name_only_when_complete(tmp_path):
    path = tmp_path / "sub" / "out.jsonl"
    with atomic_output(path) as file:
        file.write("first\n")
        assert not path.exists()
    assert path.read_text() == "first\n"


def test_a_failure_leaves_the_old_output_and_nothing_else(tmp_path):
    path = write(tmp_path / "out.jsonl", b"old\n")
    with pytest.raises(KeyboardInterrupt), atomic_output(path) as file:
        file.write("half")
        raise KeyboardInterrupt
    assert path.read_text() == "old\n"
    assert list(tmp_path.iterdir()) == [path]


def test_an_output_that_cannot_be_written_is_refused_before_the_work(tmp_path):
    with pytest.raises(InputError, match="is a directory"), atomic_output(tmp_path):
        raise AssertionError("the work has begun")
    blocker = write(tmp_path / "file", b"")
    with pytest.raises(InputError, match="cannot be written"), atomic_output(blocker / "out.jsonl"):
        raise AssertionError("the work has begun")


@given(st.lists(st.sampled_from(["written", "filtered", "rejected"])))
def test_the_sums_add_up_to_what_was_read(tmp_path_factory, fates):
    records = Accounting.beside(tmp_path_factory.mktemp("records") / "out.jsonl")
    with records:
        for number, fate in enumerate(fates, 1):
            if fate == "written":
                records.written()
            elif fate == "filtered":
                records.filtered(RecordRef("in.jsonl", number), "too long")
            else:
                records.rejected(RecordRef("in.jsonl", number), "not JSON: odd", b"{")
    assert records.summary().startswith(
        f"{len(fates)} read = {fates.count('written')} written + {fates.count('filtered')} filtered + "
        f"{fates.count('rejected')} rejected"
    )
    assert records.rejects_path.exists() == ("rejected" in fates)
    if "rejected" in fates:
        assert len(records.rejects_path.read_text().splitlines()) == fates.count("rejected")


def test_a_rejected_record_is_kept_with_place_reason_and_raw_line(tmp_path):
    with Accounting.beside(tmp_path / "out.jsonl") as records:
        records.rejected(RecordRef("in.jsonl", 3), "not UTF-8: byte 0", b"\xff\xc3\xa9")
    (line,) = (tmp_path / "out.jsonl.rejects.jsonl").read_text().splitlines()
    assert json.loads(line) == {"where": "in.jsonl:3", "reason": "not UTF-8: byte 0", "raw": "\\xffé"}


def test_strict_stops_at_the_first_reject(tmp_path):
    records = Accounting.beside(tmp_path / "out.jsonl", strict=True)
    with pytest.raises(RecordError, match=r"in\.jsonl:3: not JSON"), records:
        records.rejected(RecordRef("in.jsonl", 3), "not JSON", b"{")


def test_rejects_of_an_earlier_run_are_not_kept(tmp_path):
    write(tmp_path / "out.jsonl.rejects.jsonl", b"old")
    with Accounting.beside(tmp_path / "out.jsonl"):
        pass
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("old", [b"old", None])
@pytest.mark.parametrize("num_rejected", [0, 2])
@pytest.mark.parametrize("failure", [InputError("no"), IncompleteError("some"), KeyboardInterrupt()])
def test_a_failed_run_leaves_the_rejects_of_the_output_that_stays(tmp_path, old, num_rejected, failure):
    write(tmp_path / "out.jsonl", b"{}")
    kept = tmp_path / "out.jsonl.rejects.jsonl"
    if old:
        write(kept, old)
    records = Accounting.beside(tmp_path / "out.jsonl")
    with pytest.raises(type(failure)), records:
        for number in range(num_rejected):
            records.rejected(RecordRef("in.jsonl", number), "not JSON", b"{")
        told = records.summary()
        raise failure
    assert kept.exists() == bool(old) and (not old or kept.read_bytes() == old)
    own = tmp_path / "out.jsonl.rejects.new.jsonl"
    assert own.exists() == bool(num_rejected)
    assert (f"rejected records are in {own}" in told) == bool(num_rejected)

    # The next one that ends well has the one name, and what the failed one left is gone.
    with Accounting.beside(tmp_path / "out.jsonl") as records:
        records.rejected(RecordRef("in.jsonl", 9), "not JSON", b"{")
    assert '"in.jsonl:9"' in kept.read_text()
    assert records.summary().endswith(f"rejected records are in {kept}")
    assert not own.exists()


def test_a_file_is_never_written_over_what_it_is_made_from(tmp_path):
    source = tmp_path / "records.jsonl"
    source.write_text("{}\n")
    (tmp_path / "alias.jsonl").symlink_to(source)
    for output in (source, tmp_path / "alias.jsonl"):
        with pytest.raises(InputError, match="is the input itself"):
            require_other_file(output, source)
    require_other_file(tmp_path / "new.jsonl", source)


def tar_of(content, format=tarfile.USTAR_FORMAT):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=format) as tar:
        info = tarfile.TarInfo("data.jsonl")
        info.size = len(content)
        tar.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


def old_tar_of(content):
    """As tar wrote it before 1988: without a magic number, its checksum is all there is."""
    raw = bytearray(tar_of(content))
    raw[257:265] = raw[148:156] = b" " * 8
    raw[257:265] = bytes(8)
    raw[148:156] = b"%06o\0 " % sum(raw[:512])
    return bytes(raw)


def zip_of(content):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("data.jsonl", content)
    return buffer.getvalue()


LINES = b"".join(b'{"prompt": "q%d", "response": "r"}\n' % number for number in range(40))
CONTAINERS = {
    "tar": (tar_of(LINES), "a tar archive. Unpack it first"),
    "pax tar": (tar_of(LINES, tarfile.PAX_FORMAT), "a tar archive. Unpack it first"),
    "old tar": (old_tar_of(LINES), "a tar archive. Unpack it first"),
    "tar.gz": (gzip.compress(tar_of(LINES)), "a tar archive. Unpack it first"),
    "tar.zst": (zstandard.compress(tar_of(LINES)), "a tar archive. Unpack it first"),
    "zip": (zip_of(LINES), "a zip archive. Unpack it first"),
    "gzip twice": (gzip.compress(gzip.compress(LINES)), "compressed twice"),
    "bzip2": (bz2.compress(LINES), "compressed with bzip2. Decompress it first"),
    "xz": (lzma.compress(LINES), "compressed with xz. Decompress it first"),
    "gzip of Parquet": (gzip.compress(b"PAR1" + bytes(40)), "a Parquet file"),
    "SQLite": (b"SQLite format 3\0" + bytes(100), "an SQLite file. Write it as JSON lines"),
    "Avro": (b"Obj\x01\x04" + bytes(100), "an Avro file. Write it as JSON lines"),
    "UTF-16": (LINES.decode().encode("utf-16"), "UTF-16"),
    "unknown": (b"\x93NUMPY\x01\x00v\x00\n" + bytes(100), "binary, of a kind that is not known"),
}


@pytest.mark.parametrize("kind", CONTAINERS)
@pytest.mark.parametrize("name", ["rows.jsonl", "rows.bin"])
def test_a_container_of_another_kind_is_refused_with_what_to_do(tmp_path, kind, name):
    content, advice = CONTAINERS[kind]
    path = write(tmp_path / name, content)
    with pytest.raises(InputError, match=f"{name} is no file of JSON lines: .*{advice}"):
        list(read_lines(path))
    with pytest.raises(InputError, match=f"{name} is no file of JSON lines: .*{advice}"):
        Lines(path, tmp_path)


def test_lines_with_null_bytes_among_others_are_rejected_alone(tmp_path):
    path = write(tmp_path / "x.jsonl", b'\xef\xbb\xbf {"a": 1}\n\0\0\n{"a": 3}\n')
    assert [line.record for line in read_lines(path)] == [{"a": 1}, None, {"a": 3}]


@pytest.fixture
def as_other_user(monkeypatch):
    """Root may read everything, so the system's refusal is given in its place."""

    def refuse(unreadable):
        real = io.open

        def opened(file, *args, **options):
            if str(file) == str(unreadable):
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(file))
            return real(file, *args, **options)

        unreadable.chmod(0)
        monkeypatch.setattr(io, "open", opened)
        monkeypatch.setattr("builtins.open", opened)

    return refuse


@pytest.mark.parametrize("content", [LINES, gzip.compress(LINES), b"[1]", b"PAR1"])
def test_a_file_that_cannot_be_read_is_one_message(tmp_path, as_other_user, content):
    path = write(tmp_path / "rows.json", content)
    as_other_user(path)
    for read in (lambda: list(read_lines(path)), lambda: Lines(path, tmp_path), lambda: require_source(tmp_path)):
        with pytest.raises(InputError, match=r"rows\.json: cannot be read: Permission denied\. Check its permissions"):
            read()


@pytest.mark.parametrize("read", [require_file, require_source])
def test_a_path_through_what_cannot_be_searched_is_one_message(monkeypatch, read):
    def refused(path, **options):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))

    monkeypatch.setattr("pathlib.Path.stat", refused)
    monkeypatch.setattr("pathlib.Path.is_dir", lambda path: bool(path.stat()))
    with pytest.raises(InputError, match=r"closed/rows\.jsonl: cannot be read: Permission denied"):
        read("closed/rows.jsonl")


def test_a_disk_that_fails_halfway_is_one_message(tmp_path, monkeypatch):
    class Failing(io.BytesIO):
        def __next__(self):
            if self.tell() > 100:
                raise OSError(errno.EIO, os.strerror(errno.EIO))
            return super().__next__()

    path = write(tmp_path / "x.jsonl", LINES)
    monkeypatch.setattr("steerlm_nemo.records.open_bytes", lambda path: Failing(LINES))
    with pytest.raises(InputError, match=r"x\.jsonl: cannot be read: Input/output error"):
        list(read_lines(path))
