"""Every program that opens a `.nemo` refuses the same hostile ones, each for its own reason, before NeMo is started."""

from __future__ import annotations

import importlib.util
import io
import os
import pickle
import shutil
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from llamas import ROOT

from steerlm_nemo.checkpoint.archive import extract_nemo
from steerlm_nemo.errors import SteerLMError
from steerlm_nemo.training.resume import check_resumable

CANARY = Path(f"/tmp/steerlm-entry-canary-{os.getpid()}")
GIGABYTES_100 = 100 * 2**30


class Payload:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, (f"touch {CANARY}",)


def torch_file(value: object) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def member(name: str, data: bytes = b"x", **fields: object) -> Callable[[tarfile.TarFile], None]:
    def add(tar: tarfile.TarFile) -> None:
        info = tarfile.TarInfo(name)
        info.size = len(data)
        for key, value in fields.items():
            setattr(info, key, value)
        tar.addfile(info, io.BytesIO(data) if info.isreg() else None)

    return add


def sparse(tar: tarfile.TarFile) -> None:
    info = tarfile.TarInfo("./weights.bin")
    info.type, info.size = tarfile.GNUTYPE_SPARSE, GIGABYTES_100
    assert tar.fileobj is not None
    tar.fileobj.write(info.tobuf(tarfile.GNU_FORMAT))


def twice(tar: tarfile.TarFile) -> None:
    member("./tokenizer.model", b"one")(tar)
    member("tokenizer.model", b"other")(tar)


def bomb(tar: tarfile.TarFile) -> None:
    info = tarfile.TarInfo("./zeros")
    info.size = 200 * 2**20

    class Zeros(io.RawIOBase):
        def read(self, size: int = -1) -> bytes:
            return bytes(size)

    tar.addfile(info, Zeros())  # type: ignore[arg-type]


LINK = {"linkname": "/etc/passwd"}
# What is put into an otherwise genuine archive, and the words of its refusal.
IN_THE_TAR: dict[str, tuple[Callable[[tarfile.TarFile], None], str]] = {
    "dot dot": (member("./../outside"), "leads out of the archive"),
    "absolute": (member("/tmp/outside"), "is an absolute path"),
    "symlink": (member("./link", b"", type=tarfile.SYMTYPE, **LINK), "is a symbolic link"),
    "hardlink": (member("./link", b"", type=tarfile.LNKTYPE, **LINK), "is a hard link"),
    "device": (member("./device", b"", type=tarfile.CHRTYPE), "is a character device"),
    "FIFO": (member("./fifo", b"", type=tarfile.FIFOTYPE), "is a FIFO"),
    "duplicate": (twice, "twice"),
    "PAX path": (member("./a", pax_headers={"path": "../outside"}), "PAX record 'path'"),
    "sparse": (sparse, "is a sparse file"),
    "bomb": (bomb, "a compression bomb"),
}
IN_A_FILE: dict[str, tuple[str, Callable[[bytes], bytes], str]] = {
    "_target_": ("model_config.yaml", lambda old: old + b"\nx: {_target_: os.system}\n", "x._target_ is 'os.system'"),
    "YAML object": (
        "model_config.yaml",
        lambda old: old + b"\nx: !!python/object/apply:os.system [id]\n",
        "YAML object tags can run code",
    ),
    "weights pickle": (
        "model_weights.ckpt",
        lambda old: torch_file({"w": Payload()}),
        "model_weights.ckpt: its pickle asks for posix.system",
    ),
    "common pickle": (
        "model_weights/common.pt",
        lambda old: torch_file([Payload()]),
        "common.pt: its pickle asks for posix.system",
    ),
    # Beyond the fourteen: three that NeMo itself would act upon.
    "index pickle": (
        "model_weights/.metadata",
        lambda old: pickle.dumps(Payload()),
        ".metadata: its pickle asks for posix.system",
    ),
    "tabular tokenizer": (
        "model_config.yaml",
        lambda old: old.replace(b"library: sentencepiece", b"library: tabular"),
        "tokenizer.library is 'tabular'",
    ),
    "resolver": ("model_config.yaml", lambda old: old + b"\nx: ${oc.env:HOME}\n", "OmegaConf would call a function"),
}
FORMS = [  # gzip takes the way of a folder once it is unpacked; test_archive.py has all of them gzipped
    *((name, "packed") for name in (*IN_THE_TAR, *IN_A_FILE) if name != "bomb"),
    *((name, "gzip") for name in ("bomb", "dot dot", "common pickle")),
    *((name, "folder") for name in (*IN_A_FILE, "symlink", "FIFO")),
]
IN_A_FOLDER = {"symlink": "a link or special file", "FIFO": "a link or special file"}


def build(genuine: Path, name: str, form: str, into: Path) -> Path:
    folder = into / "model"
    shutil.copytree(genuine, folder)
    if name in IN_A_FILE:
        file, change, _ = IN_A_FILE[name]
        before = (folder / file).read_bytes() if (folder / file).is_file() else b""
        (folder / file).write_bytes(change(before))
    if form == "folder":
        if name == "symlink":
            (folder / "link").symlink_to("/etc/passwd")
        if name == "FIFO":
            os.mkfifo(folder / "fifo")
        return folder
    path = into / "model.nemo"
    with tarfile.open(path, "w:gz" if form == "gzip" else "w:") as tar:
        if name in IN_THE_TAR:
            IN_THE_TAR[name][0](tar)
        tar.add(folder, arcname=".")
    shutil.rmtree(folder)
    return path


def programs(nemo: Path, out: Path) -> dict[str, list[str]]:
    train = [f"model.data.{part}.file_path={out}/none.jsonl" for part in ("train_ds", "validation_ds")]
    clean = ["--dataset_file", __file__, "--output_file", str(out / "clean.jsonl"), "--template_from", str(nemo)]
    return {
        "convert_nemo_to_hf_llama": ["--in-file", str(nemo), "--out-file", str(out / "hf")],
        "inspect_nemo": [str(nemo)],
        "train_gpt_sft": [f"model.restore_from_path={nemo}", *train, f"exp_manager.explicit_log_dir={out / 'log'}"],
        "megatron_gpt_eval": [f"gpt_model_file={nemo}", "server=True", "port=0"],
        "data_clean": clean,
    }


def run(script: str, argv: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> str:
    """The refusal of a script run in this process: what it raises, or what inspect prints."""
    spec = importlib.util.spec_from_file_location(script, ROOT / "scripts" / f"{script}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(sys, "argv", [f"{script}.py", *argv])
    try:
        module.main()
    except SteerLMError as err:
        return str(err)
    except SystemExit as err:
        assert script == "inspect_nemo" and err.code == 2
        return capsys.readouterr().out.partition("DAMAGE")[2]
    raise AssertionError(f"{script} accepted it")


@pytest.fixture(scope="module")
def genuine(llama_nemo: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return extract_nemo(llama_nemo, tmp_path_factory.mktemp("genuine") / "folder")


@pytest.mark.parametrize(("name", "form"), FORMS)
def test_every_program_refuses_it_for_its_reason_runs_nothing_and_writes_nothing(
    genuine: Path,
    tmp_path: Path,
    name: str,
    form: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    temporary, out = tmp_path / "tmp", tmp_path / "out"
    temporary.mkdir()
    out.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(temporary))
    path = build(genuine, name, form, tmp_path)
    message = (IN_THE_TAR[name] if name in IN_THE_TAR else IN_A_FILE[name])[-1]
    if form == "folder":
        message = IN_A_FOLDER.get(name, message)
    for script, argv in programs(path, out).items():
        refusal = run(script, argv, capsys, monkeypatch)
        # Cleaning reads the config alone: a hostile weight is not refused there, and not read either.
        expected = "names no markers" if script == "data_clean" and "pickle" in name else str(message)
        assert expected in refusal, (script, refusal)
    assert not CANARY.exists() and not Path("/tmp/outside").exists()
    assert sorted(entry.name for entry in tmp_path.iterdir()) == sorted([path.name, "out", "tmp"])
    assert list(temporary.iterdir()) == [] and list(out.iterdir()) == []


def test_each_attack_has_words_of_its_own() -> None:
    words = [entry[-1] for entry in (*IN_THE_TAR.values(), *IN_A_FILE.values())]
    assert len(words) == len(set(words)) == 17


@pytest.mark.parametrize("name", IN_A_FILE)
def test_a_training_checkpoint_is_checked_before_it_is_resumed_from(genuine: Path, tmp_path: Path, name: str) -> None:
    checkpoint = build(genuine, name, "folder", tmp_path).rename(tmp_path / "step=4-last")
    with pytest.raises(SteerLMError) as refusal:
        check_resumable(checkpoint)
    assert str(IN_A_FILE[name][-1]) in str(refusal.value)
    assert not CANARY.exists()


def test_a_checkpoint_to_resume_from_is_a_folder(tmp_path: Path) -> None:
    """A file `...last.ckpt`, which NeMo would unpickle as a whole."""
    (tmp_path / "step=4-last.ckpt").write_bytes(torch_file({"w": Payload()}))
    with pytest.raises(SteerLMError, match="not a folder"):
        check_resumable(tmp_path / "step=4-last.ckpt")
    assert not CANARY.exists()


@pytest.mark.parametrize("name", ["common pickle", "index pickle"])
def test_a_run_refuses_a_hostile_checkpoint_in_its_log_folder(
    genuine: Path, llama_nemo: Path, tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The training script on a sound base whose log folder holds something to resume from."""
    from steerlm_nemo.config import load_config
    from steerlm_nemo.training import run as training
    from steerlm_nemo.training.methods import METHODS

    log_dir = tmp_path / "log"
    (log_dir / "checkpoints").mkdir(parents=True)
    (tmp_path / "made").mkdir()
    build(genuine, name, "folder", tmp_path / "made").rename(log_dir / "checkpoints" / "step=4-last")
    argv = [f"model.restore_from_path={llama_nemo}", f"exp_manager.explicit_log_dir={log_dir}"]
    argv += [f"model.data.{part}.file_path={__file__}" for part in ("train_ds", "validation_ds")]
    monkeypatch.setattr(training, "prepare", lambda: pytest.fail("NeMo was started"))
    with pytest.raises(SteerLMError) as refusal:
        training.run(load_config(argv, "gpt_sft"), METHODS["sft"])
    assert str(IN_A_FILE[name][-1]) in str(refusal.value)
    assert not CANARY.exists()
