"""Whatever writes an output, and whatever has its name: a link keeps being one, and nothing but a file is replaced."""

import ast
import os
import socket
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from steerlm_nemo.checkpoint.archive import NemoWriter
from steerlm_nemo.client.journal import Journal
from steerlm_nemo.conversation import RecordRef
from steerlm_nemo.errors import InputError, SteerLMError
from steerlm_nemo.outputs import remove_earlier, replacing, require_writable, target_of
from steerlm_nemo.records import Accounting, atomic_output, write_bytes
from steerlm_nemo.toy.llama import TinyLlama, write_random_llama

ROOT = Path(__file__).resolve().parents[1]


def text(path):
    with atomic_output(path) as file:
        file.write("new")


def data(path):
    write_bytes(path, b"new")


def nemo(path):
    with NemoWriter(path) as archive:
        archive.add("model_config.yaml", b"new")


def rejects(path):
    with Accounting(path) as records:
        records.rejected(RecordRef("in.jsonl", 1), "new", b"")


def journal(path):
    with Journal(path, {"new": 1}):
        pass


WRITERS = [text, data, nemo, rejects, journal]


@pytest.fixture
def link(tmp_path):
    """A link in one folder to a file in another."""
    (tmp_path / "there").mkdir()
    (tmp_path / "here").mkdir()
    (tmp_path / "here" / "second").symlink_to("../there/real")
    (tmp_path / "here" / "link").symlink_to("second")
    return tmp_path / "here" / "link"


def everything(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


@pytest.mark.parametrize("write", WRITERS)
@pytest.mark.parametrize("there_is", ["an old file", "nothing"])
def test_a_link_is_written_through_to_its_target(link, tmp_path, write, there_is):
    real = tmp_path / "there" / "real"
    if there_is == "an old file" and write is not journal:  # which goes on, and so refuses what it did not write
        real.write_text("old")
    write(link)
    assert link.is_symlink() and (tmp_path / "here" / "second").is_symlink() and not real.is_symlink()
    assert b"new" in real.read_bytes() and b"old" not in real.read_bytes()
    assert everything(tmp_path) == ["here", "here/link", "here/second", "there", "there/real"]


def test_what_an_earlier_run_left_behind_a_link_is_taken_away_and_the_link_stays(link, tmp_path):
    (tmp_path / "there" / "real").write_text("old")
    remove_earlier(link)
    assert link.is_symlink() and not link.exists()
    with Accounting(link):
        pass
    with Journal(link, {}) as journal:
        journal.delete()
    assert link.is_symlink() and everything(tmp_path) == ["here", "here/link", "here/second", "there"]


def no_file(kind, folder):
    """Something that is no file, and what it must be called."""
    path = folder / "out"
    if kind == "a pipe":
        os.mkfifo(path)
    elif kind == "a device":
        try:
            os.mknod(path, stat.S_IFCHR | 0o666, os.makedev(1, 3))  # as /dev/null
        except PermissionError:
            pytest.skip("only root makes devices")
    elif kind == "a socket":
        with socket.socket(socket.AF_UNIX) as made:
            os.chdir(folder)  # its name may not be long
            made.bind("out")
    elif kind == "a directory":
        path.mkdir()
    elif kind == "a circle of links":
        path.symlink_to("other")
        (folder / "other").symlink_to("out")
    elif kind == "a link into a folder that is missing":
        path.symlink_to(folder / "missing" / "file")
    elif kind == "a link to a pipe":
        os.mkfifo(folder / "pipe")
        path.symlink_to("pipe")
    return path


KINDS = {
    "a pipe": "is a pipe",
    "a device": "is a device",
    "a socket": "is a socket",
    "a directory": "is a (directory|folder)",
    "a circle of links": "Too many levels of symbolic links",
    "a link into a folder that is missing": "there is no folder",
    "a link to a pipe": "is a pipe",
}


@pytest.mark.parametrize("write", WRITERS)
@pytest.mark.parametrize("kind", KINDS)
def test_what_is_no_file_is_refused_and_stays(tmp_path, monkeypatch, write, kind):
    monkeypatch.chdir(tmp_path)
    path = no_file(kind, tmp_path)
    before = [
        (name, (tmp_path / name).lstat().st_ino, (tmp_path / name).lstat().st_mode) for name in everything(tmp_path)
    ]
    with pytest.raises(SteerLMError, match=KINDS[kind]):
        write(path)
    with pytest.raises(InputError):
        require_writable(path)
    assert before == [
        (name, (tmp_path / name).lstat().st_ino, (tmp_path / name).lstat().st_mode) for name in everything(tmp_path)
    ]


@pytest.mark.parametrize("write", WRITERS)
def test_dev_null_stays_what_it_is(write):
    with pytest.raises(SteerLMError, match="/dev/null is a device"):
        write(Path("/dev/null"))
    assert stat.S_ISCHR(os.stat("/dev/null").st_mode)


@pytest.mark.parametrize("name", ["/dev/stdout", "/dev/fd/1", "/proc/self/fd/1"])
def test_the_file_that_a_shell_has_opened_is_not_replaced(tmp_path, name):
    code = f"from steerlm_nemo.records import write_bytes\nwrite_bytes({name!r}, b'new')"
    with (tmp_path / "log.txt").open("w") as file:
        file.write("before\n")
        file.flush()
        result = subprocess.run([sys.executable, "-c", code], stdout=file, stderr=subprocess.PIPE, text=True, cwd=ROOT)
    assert f"InputError: {name} is an open file of this process" in result.stderr
    assert (tmp_path / "log.txt").read_text() == "before\n"


def test_a_folder_that_cannot_be_written_to_is_refused_before_the_work(tmp_path):
    (tmp_path / "file").touch()
    for path in ("/proc/out.jsonl", tmp_path / "file" / "out.jsonl"):
        with pytest.raises(InputError, match="cannot be written here: .* Choose another output path"):
            require_writable(path)
    require_writable(tmp_path / "new" / "newer" / "out.jsonl")
    assert everything(tmp_path) == ["file"]  # and it makes nothing


def test_an_output_that_is_another_at_the_end_is_not_written(link, tmp_path):
    with pytest.raises(InputError, match="another place"), replacing(link):
        link.unlink()
        link.symlink_to(tmp_path / "elsewhere")
    assert everything(tmp_path) == ["here", "here/link", "here/second", "there"]


def test_a_link_to_a_folder_stays_and_the_folder_is_replaced(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "model").symlink_to("real")
    write_random_llama(tmp_path / "model", TinyLlama(vocab_size=320, max_position=8), b"", 1)
    assert (tmp_path / "model").is_symlink() and (tmp_path / "real" / "config.json").is_file()
    (tmp_path / "dangling").symlink_to("made")
    write_random_llama(tmp_path / "dangling", TinyLlama(vocab_size=320, max_position=8), b"", 1)
    assert (tmp_path / "dangling").is_symlink() and (tmp_path / "made" / "config.json").is_file()
    with pytest.raises(InputError, match="is a file, which an output would replace"):
        target_of(tmp_path / "made" / "config.json", folder=True)


def renames(path):
    """Whether a file of the package gives something another name: `a.replace(b)`, `a.rename(b)`, `os.replace(a, b)`."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if (
            isinstance(node, ast.Call)
            and isinstance(node.func, ast.Attribute)
            and node.func.attr in ("replace", "rename")
        ):
            of_os = isinstance(node.func.value, ast.Name) and node.func.value.id == "os"
            if not node.keywords and len(node.args) == 1 + of_os:
                return True
    return False


def test_whoever_renames_asks_where_an_output_goes():
    found = {path for path in (ROOT / "steerlm_nemo").rglob("*.py") if renames(path)}
    assert ROOT / "steerlm_nemo" / "checkpoint" / "archive.py" in found
    found.remove(ROOT / "steerlm_nemo" / "training" / "resume.py")  # puts a torn checkpoint aside
    assert [path.name for path in found if "target_of(" not in path.read_text(encoding="utf-8")] == []


# Where a script's output would go to a pipe; none may wait for a reader, or leave anything.
OUTPUTS = {
    "plan_steering": "--prompts_file={source} --output_file={out}",
    "attribute_annotate": "--input_file_name={source} --output_file_name={out} --port_num=9 --retries=0",
    "steered_inference": "--input_file={source} --output_file={out} --port_num=9 --retries=0",
    "inspect_data": "{source} --html={out}",
    "process_to_regression_format": "--input-file={source} --output-file={out}",
    "build_sft_data": "--input-file={source} --output-file={out}",
}


@pytest.mark.parametrize("script", OUTPUTS)
def test_a_script_refuses_a_pipe_in_a_sentence(tmp_path, script):
    source, out = tmp_path / "in.jsonl", tmp_path / "out"
    source.write_text('{"prompt": "a"}\n')
    os.mkfifo(out)
    arguments = OUTPUTS[script].format(source=source, out=out).split()
    result = subprocess.run(
        [sys.executable, ROOT / "scripts" / f"{script}.py", *arguments], capture_output=True, text=True, timeout=60
    )
    assert result.returncode == 2 and result.stderr.startswith(f"error: {out} is a pipe"), result.stderr
    assert stat.S_ISFIFO(out.stat().st_mode) and everything(tmp_path) == ["in.jsonl", "out"]
