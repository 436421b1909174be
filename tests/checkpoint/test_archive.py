"""Hostile, damaged and genuine `.nemo` archives, and writing one so that it is there whole or not at all."""

from __future__ import annotations

import gzip
import io
import json
import os
import pickle
import random
import shutil
import signal
import subprocess
import sys
import tarfile
import time
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from llamas import ROOT

from steerlm_nemo.checkpoint.archive import check_nemo, extract_nemo, open_nemo, read_config, write_nemo
from steerlm_nemo.checkpoint.safety import check_directory
from steerlm_nemo.errors import CheckpointError

Build = Callable[[tarfile.TarFile, Path], None]


class Payload:
    """A pickle of this runs a command when it is loaded."""

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, (f"touch {CANARY}",)


CANARY = Path(f"/tmp/steerlm-nemo-canary-{os.getpid()}")


def add(tar: tarfile.TarFile, name: str, data: bytes = b"x", **fields: object) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(data)
    for key, value in fields.items():
        setattr(info, key, value)
    tar.addfile(info, io.BytesIO(data) if info.isreg() else None)


def add_link(kind: bytes, target: str = "/etc/passwd") -> Build:
    return lambda tar, here: add(tar, "./tokenizer.model", b"", type=kind, linkname=target)


def add_config(text: str) -> Build:
    return lambda tar, here: add(tar, "./model_config.yaml", text.encode())


def torch_file(value: object) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def add_sparse_pax(tar: tarfile.TarFile, here: Path) -> None:
    headers = {"GNU.sparse.major": "1", "GNU.sparse.minor": "0", "GNU.sparse.realsize": str(100 * 2**30)}
    add(tar, "./weights.bin", b"1\n0\n1\n".ljust(512, b"\0"), pax_headers=headers)


def add_twice(tar: tarfile.TarFile, here: Path) -> None:
    add(tar, "./model_weights.ckpt", torch_file({}))
    add(tar, "model_weights.ckpt", torch_file({"other": 1}))


def add_distcp_payload(tar: tarfile.TarFile, here: Path) -> None:
    """A genuine checkpoint in which one byte object runs a command."""
    from steerlm_nemo.checkpoint.torch_dist import TorchDistWriter, common_and_backend

    stream = io.BytesIO()
    writer = TorchDistWriter(stream)
    writer.add_object("model.decoder.layers.mlp.linear_fc1._extra_state/shard_0_1", Payload())
    common, backend = common_and_backend()
    add(tar, "./model_weights/__0_0.distcp", stream.getvalue())
    add(tar, "./model_weights/.metadata", writer.index())
    add(tar, "./model_weights/common.pt", common)
    add(tar, "./model_weights/metadata.json", backend)


def add_nested_payload(tar: tarfile.TarFile, here: Path) -> None:
    """Transformer Engine unpickles what lies in a buffer inside its extra state."""
    add(
        tar, "./model_weights/core_attention._extra_state/shard_0_1.pt", torch_file(io.BytesIO(pickle.dumps(Payload())))
    )


def add_two_pickles(tar: tarfile.TarFile, here: Path) -> None:
    """Zip readers that ignore case find the second record under the name of the first."""
    data = io.BytesIO(torch_file({}))
    with zipfile.ZipFile(data, "a") as archive:
        archive.writestr("archive/DATA.PKL", pickle.dumps(Payload()))
    add(tar, "./model_weights.ckpt", data.getvalue())


def add_two_archives(tar: tarfile.TarFile, here: Path) -> None:
    """Two zips of equal length, one after the other: Python reads the second, torch the first."""
    hostile = torch_file({"w": Payload()})
    harmless = next(data for n in range(400) if len(data := torch_file({"w": "x" * n})) == len(hostile))
    add(tar, "./model_weights.ckpt", hostile + harmless)


def add_zarr_filter(tar: tarfile.TarFile, here: Path) -> None:
    """zarr's `pickle` filter unpickles every chunk."""
    array = {"shape": [4], "chunks": [4], "dtype": "|O", "compressor": None, "order": "C", "fill_value": 0}
    array |= {"filters": [{"id": "pickle", "protocol": 5}], "zarr_format": 2}
    add(tar, "./model_weights/model.w/.zarray", json.dumps(array).encode())
    add(tar, "./model_weights/model.w/0", pickle.dumps(Payload()))


def add_metadata_outside(tar: tarfile.TarFile, here: Path) -> None:
    from steerlm_nemo.checkpoint import torch_dist

    writer = torch_dist.TorchDistWriter(io.BytesIO())
    writer.add("model.w", (2,), (0,), (2,), "float32", [memoryview(bytes(8))])
    index = writer.index().replace(b"__0_0.distcp", b"../x0.distcp")
    add(tar, "./model_weights/.metadata", index)


ALIAS_BOMB = "a0: &a0 [x, x]\n" + "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]\n" for i in range(1, 12))

HOSTILE: dict[str, tuple[Build, str]] = {
    "dot dot": (lambda tar, here: add(tar, "./../outside"), "leads out of the archive"),
    "dot dot inside": (lambda tar, here: add(tar, "a/../../outside"), "leads out of the archive"),
    "absolute": (lambda tar, here: add(tar, str(here / "outside")), "is an absolute path"),
    "symlink": (add_link(tarfile.SYMTYPE), "is a symbolic link"),
    "symlink to folder": (add_link(tarfile.SYMTYPE, ".."), "is a symbolic link"),
    "hardlink": (add_link(tarfile.LNKTYPE), "is a hard link"),
    "character device": (add_link(tarfile.CHRTYPE), "is a character device"),
    "block device": (add_link(tarfile.BLKTYPE), "is a block device"),
    "fifo": (add_link(tarfile.FIFOTYPE), "is a FIFO"),
    "unknown type": (lambda tar, here: add(tar, "./odd", b"", type=b"Z"), "of tar type"),
    "duplicate": (add_twice, "twice"),
    "pax path": (lambda tar, here: add(tar, "./a", pax_headers={"path": "../outside"}), "PAX record 'path'"),
    "pax linkpath": (lambda tar, here: add(tar, "./a", pax_headers={"linkpath": "/etc"}), "PAX record 'linkpath'"),
    "sparse": (add_sparse_pax, "sparse"),
    "_target_": (add_config("optim: {_target_: os.system}"), "optim._target_ is 'os.system'"),
    "_target_ in a list": (add_config("data: [{_target_: subprocess.run}]"), "data.0._target_"),
    "_target_ in torch": (add_config("optim: {_target_: torch.hub.load}"), "'torch.hub.load'"),
    "target": (add_config("target: os.path.join"), "target is 'os.path.join'"),
    "cls": (add_config("loss: {cls: builtins.eval}"), "loss.cls is 'builtins.eval'"),
    "yaml object": (add_config("a: !!python/object/apply:os.system [id]"), "object tags can run code"),
    "yaml name": (add_config("a: !!python/name:os.system"), "object tags can run code"),
    "alias bomb": (add_config(ALIAS_BOMB), "aliases are expanded"),
    "remote code": (add_config("tokenizer: {trust_remote_code: true}"), "tokenizer.trust_remote_code"),
    "weights pickle": (
        lambda tar, here: add(tar, "./model_weights.ckpt", torch_file({"w": Payload()})),
        "its pickle asks for posix.system",
    ),
    "bare pickle": (
        lambda tar, here: add(tar, "./model_weights.ckpt", pickle.dumps(Payload())),
        "not a file of torch.save",
    ),
    "common pickle": (
        lambda tar, here: add(tar, "./model_weights/common.pt", torch_file([Payload()])),
        "its pickle asks for posix.system",
    ),
    "index pickle": (
        lambda tar, here: add(tar, "./model_weights/.metadata", pickle.dumps(Payload())),
        "its pickle asks for posix.system",
    ),
    "index leads outside": (add_metadata_outside, "is not a .distcp beside it"),
    "distcp pickle": (add_distcp_payload, "its pickle asks for posix.system"),
    "nested pickle": (add_nested_payload, "its pickle asks for posix.system"),
    "two pickles": (add_two_pickles, "doubtful record names"),
    "two archives": (add_two_archives, "does not end where its directory does"),
    "zarr filter": (add_zarr_filter, "only uncompressed arrays of numbers"),
    "index of one rank": (
        lambda tar, here: add(tar, "./model_weights/__0.metadata", pickle.dumps(Payload())),
        "its pickle asks for posix.system",
    ),
    "tabular tokenizer": (add_config("tokenizer: {library: tabular, vocab_file: 'nemo:v'}"), "library is 'tabular'"),
    "resolver": (add_config("optim: {name: '${oc.env:HOME}'}"), "OmegaConf would call a function"),
    "artifact outside": (add_config("tokenizer: {model: 'nemo:../../etc/passwd'}"), "leads out of the archive"),
}


@pytest.mark.parametrize("compression", ["", "gz"])
@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_archive_is_refused_with_its_reason_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, compression: str
) -> None:
    build, message = HOSTILE[name]
    temporary, here = tmp_path / "tmp", tmp_path / "here"
    temporary.mkdir()
    here.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(temporary))
    path = here / "model.nemo"
    with tarfile.open(path, f"w:{compression}") as tar:
        build(tar, here)
        if "./model_config.yaml" not in tar.getnames():
            add(tar, "./model_config.yaml", b"num_layers: 1\n")
    for use in (lambda: extract_nemo(path, here / "into"), lambda: _open_all(path), lambda: check_nemo(path)):
        with pytest.raises(CheckpointError) as refusal:
            use()
        assert message in str(refusal.value)
    assert not CANARY.exists()
    assert [entry.name for entry in here.iterdir()] == ["model.nemo"]
    assert list(temporary.iterdir()) == [] and sorted(p.name for p in tmp_path.iterdir()) == ["here", "tmp"]


def _open_all(path: Path) -> None:
    """As a loader does: config, then the folder."""
    with open_nemo(path) as nemo:
        assert nemo.config is not None
        assert nemo.dir


def test_the_payload_of_these_tests_does_run_in_a_plain_unpickler() -> None:
    try:
        pickle.loads(pickle.dumps(Payload()))
        assert CANARY.exists()
    finally:
        CANARY.unlink(missing_ok=True)


def test_torch_does_read_the_first_of_two_archives(tmp_path: Path) -> None:
    """The control of "two archives": what our reader takes for harmless would run."""
    with tarfile.open(tmp_path / "model.nemo", "w:") as tar:
        add_two_archives(tar, tmp_path)
    with tarfile.open(tmp_path / "model.nemo") as tar:
        data = tar.extractfile("./model_weights.ckpt").read()  # type: ignore[union-attr]
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        assert b"system" not in archive.read("archive/data.pkl")
    try:
        torch.load(io.BytesIO(data), weights_only=False)
        assert CANARY.exists()
    finally:
        CANARY.unlink(missing_ok=True)


def test_a_sparse_header_of_100_gigabytes_is_refused(tmp_path: Path) -> None:
    info = tarfile.TarInfo("./big")
    info.type, info.size = tarfile.GNUTYPE_SPARSE, 100 * 2**30
    path = tmp_path / "model.nemo"
    path.write_bytes(info.tobuf(tarfile.GNU_FORMAT) + bytes(10240))
    with pytest.raises(CheckpointError, match=r"sparse|claims"):
        read_config(path)


def test_a_member_that_claims_more_than_the_file_is_refused(tmp_path: Path) -> None:
    info = tarfile.TarInfo("./big")
    info.size = 100 * 2**30
    path = tmp_path / "model.nemo"
    path.write_bytes(info.tobuf(tarfile.GNU_FORMAT) + bytes(10240))
    with pytest.raises(CheckpointError, match="the file ends before"):
        read_config(path)


def test_a_gzip_bomb_is_refused_before_it_is_unpacked(tmp_path: Path) -> None:
    path = tmp_path / "model.nemo"
    with gzip.open(path, "wb") as file:
        info = tarfile.TarInfo("./model_config.yaml")
        info.size = 2**40
        file.write(info.tobuf(tarfile.GNU_FORMAT))
        for _ in range(100):
            file.write(bytes(2**20))
    started = time.monotonic()
    with pytest.raises(CheckpointError, match="compression bomb"):
        read_config(path)
    assert time.monotonic() - started < 1  # the bar that users are promised; unpacking a terabyte takes an hour


def test_a_huge_pax_header_is_refused(tmp_path: Path) -> None:
    info = tarfile.TarInfo("././@PaxHeader")
    info.type, info.size = tarfile.XHDTYPE, 50 * 2**20
    path = tmp_path / "model.nemo"
    path.write_bytes(info.tobuf(tarfile.GNU_FORMAT) + bytes(51 * 2**20))
    with pytest.raises(CheckpointError, match="header claims"):
        read_config(path)


def test_links_in_a_folder_are_refused(tmp_path: Path) -> None:
    (tmp_path / "model_config.yaml").symlink_to("/etc/hostname")
    with pytest.raises(CheckpointError, match="a link"):
        read_config(tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not a .nemo archive, or damaged"),
        (b"no tar" * 500, "not a .nemo archive, or damaged"),
        (b"\x1f\x8bno gzip", "not a .nemo archive, or damaged"),
    ],
)
def test_what_is_no_archive_gives_one_message(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "model.nemo"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=message):
        read_config(path)


def test_a_gzip_that_is_cut_off_gives_one_message(llama_nemo: Path, tmp_path: Path) -> None:
    whole = gzip.compress(llama_nemo.read_bytes())
    path = tmp_path / "model.nemo"
    for length in (100, 2000, len(whole) // 2, len(whole) * 9 // 10):
        path.write_bytes(whole[:length])
        with pytest.raises(CheckpointError):
            read_config(path)


def stock_folder(llama_nemo: Path, into: Path) -> Path:
    """The content of an archive with the names that NeMo gives, and both tokenizers of NeMo 1.21."""
    extract_nemo(llama_nemo, into)
    shutil.copy(into / "tokenizer.model", into / f"{'a1' * 16}_tokenizer.model")
    (into / "tokenizer.model").rename(into / f"{'b2' * 16}_tokenizer.model")
    config = (into / "model_config.yaml").read_text()
    (into / "model_config.yaml").write_text(config.replace("nemo:tokenizer.model", f"nemo:{'b2' * 16}_tokenizer.model"))
    return into


def pack_like_nemo(folder: Path, path: Path, mode: str) -> Path:
    with tarfile.open(path, mode) as tar:
        tar.add(folder, arcname=".")
    return path


@pytest.mark.parametrize("layout", ["packed", "gzip", "folder", "gnu tar", "ours"])
def test_genuine_layouts_open(llama_nemo: Path, tmp_path: Path, layout: str) -> None:
    folder = stock_folder(llama_nemo, tmp_path / "stock")
    path = tmp_path / "model.nemo"
    if layout == "folder":
        path = folder
    elif layout == "gnu tar":
        subprocess.run(["tar", "cf", path, "-C", folder, "."], check=True)
    elif layout == "ours":
        write_nemo(folder, path)
    else:
        pack_like_nemo(folder, path, "w:gz" if layout == "gzip" else "w:")
    assert read_config(path)["num_layers"] == 3
    with open_nemo(path) as nemo:
        member = nemo.resolve(nemo.config["tokenizer"]["model"])
        assert member == f"{'b2' * 16}_tokenizer.model" and (nemo.dir / member).is_file()
        assert sorted(p.name for p in (nemo.dir / "model_weights").iterdir()) == [
            ".metadata",
            "__0_0.distcp",
            "common.pt",
            "metadata.json",
        ]


def test_zarr_and_legacy_layouts_open(tmp_path: Path) -> None:
    array = tmp_path / "zarr" / "model_weights" / "model.decoder.final_layernorm.weight"
    array.mkdir(parents=True)
    description = {"shape": [4], "chunks": [4], "dtype": "<f4", "compressor": None, "filters": None, "order": "C"}
    (array / ".zarray").write_text(json.dumps(description))
    (array / "0").write_bytes(bytes(16))
    extra = array.parent / "model.decoder.layers.mlp.linear_fc1._extra_state"
    extra.mkdir()
    (extra / "shard_0_1.pt").write_bytes(torch_file(io.BytesIO(torch_file(None))))
    legacy = tmp_path / "legacy" / "mp_rank_00"
    legacy.mkdir(parents=True)
    state = {"w": torch.zeros(2, 3), "b": torch.nn.Parameter(torch.ones(2)), "h": torch.ones(2).bfloat16()}
    (legacy / "model_weights.ckpt").write_bytes(torch_file(state))
    for folder in (tmp_path / "zarr", tmp_path / "legacy"):
        (folder / "model_config.yaml").write_text("num_layers: 1\n")
        with open_nemo(pack_like_nemo(folder, tmp_path / f"{folder.name}.nemo", "w:")) as nemo:
            assert nemo.dir.is_dir()


def test_what_training_stores_beside_the_weights_is_accepted(tmp_path: Path) -> None:
    """Numbers, nested configs and scheduler state, as in `common.pt` of a checkpoint to resume from."""
    from omegaconf import OmegaConf

    state = {
        "global_step": 10,
        "consumed": 2**40,  # spelled `long` by the pickle protocol that torch uses
        "hyper_parameters": OmegaConf.create({"model": {"betas": [0.9, 0.98], "name": "adam", "none": None}}),
        "lr_schedulers": [{"last_epoch": 10, "_last_lr": [1e-4]}],
        "rng": torch.get_rng_state(),
        "seen": {1, 2},
        "path": Path("/results"),
    }
    (tmp_path / "common.pt").write_bytes(torch_file(state))
    check_directory(tmp_path)


def test_a_renamed_tokenizer_in_an_extracted_folder_is_still_found(llama_nemo: Path, tmp_path: Path) -> None:
    folder = stock_folder(llama_nemo, tmp_path / "stock")
    for left in folder.glob("*_tokenizer.model"):
        left.rename(folder / "tokenizer.model")
    with open_nemo(folder) as nemo:
        assert nemo.resolve(nemo.config["tokenizer"]["model"]) == "tokenizer.model"


def test_our_archives_unpack_as_the_reference_documents(llama_nemo: Path, tmp_path: Path) -> None:
    subprocess.run(["tar", "xf", llama_nemo, "-C", tmp_path, "."], check=True)
    assert (tmp_path / "model_config.yaml").is_file() and (tmp_path / "model_weights" / ".metadata").is_file()
    with tarfile.open(llama_nemo) as tar:
        assert tar.getnames()[0] == "." and all(name.startswith("./") for name in tar.getnames()[1:])


def test_weights_beside_the_target_are_neither_packed_nor_touched(llama_nemo: Path, tmp_path: Path) -> None:
    """D-33: the reference packs a `model_weights/` that lies beside the target, and removes it."""
    staged = extract_nemo(llama_nemo, tmp_path / "staged")
    trap = tmp_path / "out" / "model_weights"
    trap.mkdir(parents=True)
    (trap / "common.pt").write_bytes(b"old weights")
    write_nemo(staged, tmp_path / "out" / "model.nemo")
    assert (trap / "common.pt").read_bytes() == b"old weights"
    with open_nemo(tmp_path / "out" / "model.nemo") as nemo:
        packed = nemo.open("model_weights/common.pt").read()
    assert packed == (staged / "model_weights" / "common.pt").read_bytes() != b"old weights"


def test_a_bare_filename_is_a_valid_target(llama_nemo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    staged = extract_nemo(llama_nemo, tmp_path / "staged")
    monkeypatch.chdir(tmp_path)
    write_nemo(staged, "bare.nemo")
    assert read_config("bare.nemo") == read_config(staged)


def test_a_written_archive_has_the_permissions_of_any_new_file(llama_nemo: Path, tmp_path: Path) -> None:
    staged = extract_nemo(llama_nemo, tmp_path / "staged")
    write_nemo(staged, tmp_path / "model.nemo")
    (tmp_path / "plain").touch()
    assert (tmp_path / "model.nemo").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_a_kill_at_any_moment_leaves_the_old_file_whole(llama_nemo: Path, tmp_path: Path) -> None:
    staged = extract_nemo(llama_nemo, tmp_path / "staged")
    target = tmp_path / "out" / "model.nemo"
    write_nemo(staged, target)
    reference = read_config(target)
    program = (
        "from steerlm_nemo.checkpoint.archive import write_nemo\n"
        "print('ready', flush=True)\n"
        f"while True: write_nemo({str(staged)!r}, {str(target)!r})\n"
    )
    chance = random.Random(0)
    for _ in range(8):
        with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, cwd=ROOT) as writer:
            assert writer.stdout is not None and writer.stdout.readline() == b"ready\n"
            time.sleep(chance.uniform(0, 0.03))
            writer.send_signal(signal.SIGKILL)
        with open_nemo(target) as nemo:
            assert nemo.config == reference and nemo.dir.is_dir()
    left = target.with_name(".model.nemo.0123456789abcdef.partial")
    left.write_bytes(b"half")  # at least one, whatever the kills hit
    write_nemo(staged, target)
    assert list(target.parent.iterdir()) == [target]


def test_a_folder_without_config_is_not_packed(tmp_path: Path) -> None:
    (tmp_path / "staged").mkdir()
    with pytest.raises(CheckpointError, match=r"has no model_config\.yaml"):
        write_nemo(tmp_path / "staged", tmp_path / "model.nemo")
    assert not (tmp_path / "model.nemo").exists()
