"""What people give for a model: older weights, files that cannot be read, and folders that are something else."""

from __future__ import annotations

import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from llamas import MakeLlama, convert_quietly, export_quietly
from safetensors.torch import load_file

from steerlm_nemo.checkpoint.archive import extract_nemo, read_config
from steerlm_nemo.checkpoint.from_hf import convert, plan_conversion
from steerlm_nemo.errors import CheckpointError, InputError

LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a214614ab2935c943f9e0ff69d22eadbb8f32b1258daaa5e2ca24d17e2393\nsize 12345\n"  # noqa: E501


def as_bin(source: Path, folder: Path, num_shards: int = 1, **options: Any) -> Path:
    """A copy whose weights are pytorch_model.bin, or shards of it."""
    shutil.copytree(source, folder)
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(tensors)
    if num_shards == 1:
        torch.save(tensors, folder / "pytorch_model.bin", **options)
        return folder
    weight_map = {}
    for number in range(num_shards):
        shard = f"pytorch_model-{number + 1:05d}-of-{num_shards:05d}.bin"
        torch.save({name: tensors[name] for name in names[number::num_shards]}, folder / shard)
        weight_map |= dict.fromkeys(names[number::num_shards], shard)
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return folder


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("num_shards", [1, 3])
def test_weights_of_torch_convert_like_safetensors(
    make_llama: MakeLlama, tmp_path: Path, dtype: str, num_shards: int
) -> None:
    source = make_llama(dtype=dtype, num_hidden_layers=1)
    folder = as_bin(source, tmp_path / "bin", num_shards)
    back = export_quietly(convert_quietly(folder, tmp_path / "model.nemo"), tmp_path / "back")
    before, after = load_file(source / "model.safetensors"), load_file(back / "model.safetensors")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) and before[key].dtype == after[key].dtype for key in before)


def test_weights_that_transformers_saved_as_bin_convert(make_llama: MakeLlama, tmp_path: Path) -> None:
    """An OrderedDict with tied weights, one of which transformers stores as a view of the other."""
    folder = make_llama(safe_serialization=False, tie_word_embeddings=True)
    assert [path.name for path in folder.glob("*.bin")] == ["pytorch_model.bin"]
    theirs = torch.load(folder / "pytorch_model.bin", weights_only=True)
    back = export_quietly(convert_quietly(folder, tmp_path / "model.nemo"), tmp_path / "back")
    after = load_file(back / "model.safetensors")
    assert {*theirs} - {*after} <= {"lm_head.weight"}
    assert all(torch.equal(theirs[key], after[key]) for key in after)


def parameters(tensors: dict[str, torch.Tensor]) -> Any:
    return {name: torch.nn.Parameter(tensor) for name, tensor in tensors.items()}


def as_views(tensors: dict[str, torch.Tensor]) -> Any:
    """All of one storage."""
    flat = torch.cat([tensor.reshape(-1) for tensor in tensors.values()])
    parts = flat.split([tensor.numel() for tensor in tensors.values()])
    return {name: part.view(tensor.shape) for (name, tensor), part in zip(tensors.items(), parts, strict=True)}


@pytest.mark.parametrize("form", [parameters, as_views])
def test_whatever_way_torch_stores_plain_tensors(llama: Path, tmp_path: Path, form: Callable[..., Any]) -> None:
    folder = as_bin(llama, tmp_path / "bin")
    torch.save(form(load_file(llama / "model.safetensors")), folder / "pytorch_model.bin")
    back = export_quietly(convert_quietly(folder, tmp_path / "model.nemo"), tmp_path / "back")
    before, after = load_file(llama / "model.safetensors"), load_file(back / "model.safetensors")
    assert all(torch.equal(before[key], after[key]) for key in before)


class Trap:
    def __reduce__(self) -> Any:
        return os.mkdir, ("sprung",)


@pytest.mark.parametrize(
    ("write", "error", "message"),
    [
        (lambda path, tensors: torch.save({"model": tensors}, path), InputError, "model is no dense tensor"),
        (lambda path, tensors: torch.save([1, 2], path), InputError, "holds no tensors by name"),
        (lambda path, tensors: torch.save({**tensors, "x": Trap()}, path), CheckpointError, "asks for posix.mkdir"),
        (
            lambda path, tensors: torch.save({**tensors, "x": torch.ones(2, 3).t()}, path),
            InputError,
            "x is stored transposed",
        ),
        (lambda path, tensors: torch.save({**tensors, "x": torch.ones(2).int()}, path), InputError, "IntStorage"),
        (
            lambda path, tensors: torch.save(tensors, path, _use_new_zipfile_serialization=False),
            CheckpointError,
            "torch 1.6 or later",
        ),
        (lambda path, tensors: path.write_bytes(pickle.dumps(Trap())), CheckpointError, "torch 1.6 or later"),
        (lambda path, tensors: path.write_bytes(LFS), InputError, "git lfs pull"),
        (lambda path, tensors: path.write_bytes(b""), CheckpointError, "torch 1.6 or later"),
    ],
)
def test_a_bin_that_is_more_or_less_than_tensors_is_refused(
    llama: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    write: Callable[[Path, dict[str, torch.Tensor]], Any],
    error: type[Exception],
    message: str,
) -> None:
    folder = as_bin(llama, tmp_path / "bin")
    monkeypatch.chdir(tmp_path)
    write(folder / "pytorch_model.bin", load_file(llama / "model.safetensors"))
    with pytest.raises(error, match=message):
        plan_conversion(folder, None)
    assert not (tmp_path / "sprung").exists()


def test_safetensors_come_before_a_bin_as_in_transformers(llama: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(llama, tmp_path / "model")
    (folder / "pytorch_model.bin").write_bytes(b"whatever")
    assert all(place.path.suffix == ".safetensors" for place in plan_conversion(folder, None).tensors.values())


NAMES = ("config.json", "generation_config.json", "tokenizer.model", "tokenizer_config.json", "model.safetensors")


def as_directory(path: Path) -> None:
    path.unlink(missing_ok=True)
    path.mkdir()


def as_loop(path: Path) -> None:
    path.unlink(missing_ok=True)
    path.symlink_to(path.name)


def as_broken_link(path: Path) -> None:
    path.unlink(missing_ok=True)
    path.symlink_to(Path("..", "..", "blobs", "0123456789abcdef"))


def as_fifo(path: Path) -> None:
    path.unlink(missing_ok=True)
    os.mkfifo(path)


def as_pointer(path: Path) -> None:
    path.write_bytes(LFS)


@pytest.mark.parametrize("spoil", [as_directory, as_loop, as_broken_link, as_fifo, as_pointer])
@pytest.mark.parametrize("name", [*NAMES, "tokenizer.json", "chat_template.jinja"])
def test_a_file_that_is_there_and_cannot_be_read_is_one_message(
    llama: Path, tmp_path: Path, name: str, spoil: Callable[[Path], None]
) -> None:
    folder = shutil.copytree(llama, tmp_path / "model")
    (folder / "tokenizer_config.json").write_text("{}")
    spoil(folder / name)
    if spoil is as_pointer and name == "chat_template.jinja":  # the model does without it
        assert "a pointer of git-lfs" in plan_conversion(folder, None).tokenizer.notes[0]
        return
    with pytest.raises(InputError, match=name):
        plan_conversion(folder, None)


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
@pytest.mark.parametrize("name", NAMES)
def test_a_file_of_somebody_else_is_one_message(llama: Path, tmp_path: Path, name: str) -> None:
    folder = shutil.copytree(llama, tmp_path / "model")
    (folder / "tokenizer_config.json").write_text("{}")
    (folder / name).chmod(0)
    with pytest.raises(InputError, match=rf"{name}: cannot be read: Permission denied"):
        plan_conversion(folder, None)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"\x80\x04\x95binary\xff", "not valid JSON"),
        (b"[" * 100_000, "nested more than 40 deep"),
        (b'{"a":' * 100 + b"1" + b"}" * 100, "nested more than 40 deep"),
        (b"null", "null"),
        (b"\xef\xbb\xbf{", "not valid JSON"),
        (b'{"a": ' + b"9" * 5000 + b"}", "not valid JSON"),
        (b"<!DOCTYPE html><html>", "a page of a web site"),
    ],
)
@pytest.mark.parametrize(
    "name", ["config.json", "generation_config.json", "tokenizer_config.json", "added_tokens.json"]
)
def test_a_file_beside_the_weights_that_is_no_configuration_is_one_message(
    llama: Path, tmp_path: Path, name: str, content: bytes, message: str
) -> None:
    folder = shutil.copytree(llama, tmp_path / "model")
    (folder / name).write_bytes(content)
    with pytest.raises(InputError, match=rf"{name}: .*{message}"):
        plan_conversion(folder, None)


@pytest.mark.parametrize("key", ["num_hidden_layers", "hidden_size", "vocab_size", "num_attention_heads"])
def test_a_size_beyond_all_measure_is_refused_at_once(llama: Path, tmp_path: Path, key: str) -> None:
    folder = shutil.copytree(llama, tmp_path / "model")
    raw = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(raw | {key: 10**15}))
    with pytest.raises(CheckpointError, match=rf"{key}|has shape|vocab_size"):
        plan_conversion(folder, None)


def hub_cache(folder: Path, llama: Path) -> Path:
    """A download as the Hub's client lays it out, with two snapshots."""
    root = folder / "models--meta-llama--Llama-2-7b-hf"
    for commit in ("aaaa", "bbbb"):
        shutil.copytree(llama, root / "snapshots" / commit)
    (root / "blobs").mkdir()
    (root / "refs").mkdir()
    (root / "refs" / "main").write_text("bbbb")
    return root


def empty(folder: Path, llama: Path) -> Path:
    folder.mkdir()
    return folder


def weights_only(name: str, content: bytes = b"x") -> Callable[[Path, Path], Path]:
    def make(folder: Path, llama: Path) -> Path:
        folder.mkdir()
        (folder / name).write_bytes(content)
        return folder

    return make


def beside_config(name: str, content: bytes = b"x") -> Callable[[Path, Path], Path]:
    """A whole folder but for its weights, which are something else."""

    def make(folder: Path, llama: Path) -> Path:
        shutil.copytree(llama, folder)
        (folder / "model.safetensors").unlink()
        (folder / name).write_bytes(content)
        return folder

    return make


def one_file(name: str, content: bytes = b"x") -> Callable[[Path, Path], Path]:
    def make(folder: Path, llama: Path) -> Path:
        return weights_only(name, content)(folder, llama) / name

    return make


def missing_shards(folder: Path, llama: Path) -> Path:
    beside_config("model-00001-of-00002.safetensors")(folder, llama)
    weight_map = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return folder


def broken_weights(folder: Path, llama: Path) -> Path:
    shutil.copytree(llama, folder)
    as_broken_link(folder / "model.safetensors")
    return folder


def checkpoints_inside(folder: Path, llama: Path) -> Path:
    shutil.copytree(llama, folder / "checkpoint-500")
    (folder / "trainer_state.json").write_text("{}")
    return folder


@pytest.mark.parametrize(
    ("name", "entry"),
    [
        ("config.json", {"trust_remote_code": True}),
        ("config.json", {"extra": {"_target_": "os.system"}}),
        ("generation_config.json", {"note": "${oc.env:HOME}"}),
        ("config.json", {"padding": "x" * 5_000_000}),
    ],
)
def test_what_would_make_a_nemo_that_nothing_opens_is_refused_before_it_is_written(
    llama: Path, tmp_path: Path, name: str, entry: dict[str, Any]
) -> None:
    folder = shutil.copytree(llama, tmp_path / "model")
    raw = json.loads((folder / name).read_text())
    (folder / name).write_text(json.dumps(raw | entry))
    with pytest.raises(CheckpointError, match=r"config\.json: as model_config\.yaml: "):
        convert_quietly(folder, tmp_path / "model.nemo")
    assert not (tmp_path / "model.nemo").exists()


def nemo_2(folder: Path, llama: Path) -> Path:
    (folder / "context").mkdir(parents=True)
    (folder / "weights").mkdir()
    (folder / "context" / "model.yaml").write_text("{}")
    return folder


ADAPTER = json.dumps({"base_model_name_or_path": "meta-llama/Llama-2-7b-hf", "peft_type": "LORA"}).encode()


@pytest.mark.parametrize(
    ("make", "messages"),
    [
        (hub_cache, ("a download cache", "snapshots/bbbb")),
        (lambda folder, llama: hub_cache(folder, llama).parent, ("a download cache", "snapshots/bbbb")),
        (lambda folder, llama: hub_cache(folder, llama) / "snapshots", ("a download cache", "snapshots/bbbb")),
        (empty, ("an empty folder",)),
        (broken_weights, ("model.safetensors", "blobs", "cp -rL")),
        (missing_shards, ("1 of its 2 shards are not there", "model-00002-of-00002", "download them again")),
        (
            weights_only("adapter_config.json", ADAPTER),
            ("an adapter (LoRA) of meta-llama/Llama-2-7b-hf", "merge_and_unload"),
        ),
        (beside_config("adapter_config.json", ADAPTER), ("an adapter (LoRA) of meta-llama/Llama-2-7b-hf",)),
        (weights_only("llama-2-7b.Q4_K_M.gguf", b"GGUF"), ("a GGUF file", "gguf_file=")),
        (beside_config("llama-2-7b.Q4_K_M.gguf", b"GGUF"), ("a GGUF file", "gguf_file=")),
        (one_file("llama-2-7b.Q4_K_M.gguf", b"GGUF\3\0\0\0"), ("a GGUF file", "gguf_file=")),
        (weights_only("consolidated.00.pth"), ("as Meta packs them", "convert_llama_weights_to_hf.py")),
        (one_file("consolidated.00.pth"), ("as Meta packs them", "convert_llama_weights_to_hf.py")),
        (weights_only("model_index.json", b"{}"), ("a diffusion pipeline",)),
        (weights_only("config.json", b'{"_class_name": "UNet2DConditionModel"}'), ("a part of a diffusion pipeline",)),
        (weights_only("sd_xl_base_1.0.safetensors"), ("holds sd_xl_base_1.0.safetensors, but no config.json",)),
        (beside_config("tf_model.h5"), ("weights of TensorFlow", "from_tf=True")),
        (beside_config("flax_model.msgpack"), ("weights of Flax", "from_flax=True")),
        (beside_config("model.safetensors", LFS), ("a pointer of git-lfs", "git lfs pull")),
        (beside_config("model.safetensors", b"<!DOCTYPE html>"), ("a page of a web site",)),
        (one_file("model.safetensors"), ("give the folder that has it",)),
        (one_file("model.nemo"), ("a .nemo file", "convert_nemo_to_hf_llama.py")),
        (one_file("model.tar.gz"), ("unpack it first",)),
        (weights_only("model_config.yaml"), ("an unpacked .nemo already",)),
        (checkpoints_inside, ("has 1 inside", "checkpoint-500")),
        (lambda folder, llama: Path("meta-llama/Llama-2-7b-hf"), ("hf download meta-llama/Llama-2-7b-hf",)),
        (lambda folder, llama: folder / "nowhere", ("no such file or folder",)),
    ],
)
def test_what_is_no_model_folder_is_named_with_what_to_do(
    llama: Path, tmp_path: Path, make: Callable[[Path, Path], Path], messages: tuple[str, ...]
) -> None:
    given = make(tmp_path / "given", llama)
    with pytest.raises((InputError, CheckpointError)) as refusal:
        plan_conversion(given, None)
    assert all(message in str(refusal.value) for message in messages), str(refusal.value)


@pytest.mark.parametrize(
    ("make", "messages"),
    [
        (lambda folder, llama: llama, ("a Hugging Face folder", "convert_hf_llama_to_nemo.py")),
        (nemo_2, ("a checkpoint of NeMo 2", "export_ckpt")),
        (one_file("model.nemo", LFS), ("a pointer of git-lfs", "git lfs pull")),
        (one_file("model.nemo", b"GGUF\3\0\0\0"), ("a GGUF file",)),
        (one_file("model.nemo", b"<html>"), ("a page of a web site",)),
        (weights_only("adapter_config.json", ADAPTER), ("an adapter (LoRA)", "merge_and_unload")),
        (hub_cache, ("a download cache", "snapshots/bbbb")),
        (empty, ("an empty folder",)),
    ],
)
def test_what_is_no_nemo_is_named_with_what_to_do(
    llama: Path, tmp_path: Path, make: Callable[[Path, Path], Path], messages: tuple[str, ...]
) -> None:
    given = make(tmp_path / "given", llama)
    with pytest.raises(CheckpointError) as refusal:
        read_config(given)
    assert all(message in str(refusal.value) for message in messages), str(refusal.value)


def test_an_adapter_beside_whole_weights_is_named(llama: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(llama, tmp_path / "model")
    (folder / "adapter_config.json").write_bytes(ADAPTER)
    said: list[str] = []
    convert(plan_conversion(folder, None), tmp_path / "model.nemo", said.append)
    assert "the adapter beside the weights is passed over" in said[0]


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
@pytest.mark.parametrize("name", ["model_config.yaml", "tokenizer.model", "model_weights"])
def test_an_unpacked_nemo_that_cannot_be_read_is_one_message(llama_nemo: Path, tmp_path: Path, name: str) -> None:
    folder = extract_nemo(llama_nemo, tmp_path / "folder")
    (folder / name).chmod(0)
    try:
        with pytest.raises(CheckpointError, match=rf"{name}|folder: cannot be read: Permission denied"):
            export_quietly(folder, tmp_path / "back")
    finally:
        (folder / name).chmod(0o755)


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_a_folder_that_nobody_may_enter_is_one_message(llama: Path, llama_nemo: Path, tmp_path: Path) -> None:
    shut = tmp_path / "shut"
    shut.mkdir()
    shutil.copy(llama_nemo, shut / "model.nemo")
    shutil.copytree(llama, shut / "model")
    shut.chmod(0)
    try:
        for attempt in (
            lambda: plan_conversion(shut / "model", None),
            lambda: read_config(shut / "model.nemo"),
            lambda: convert_quietly(llama, shut / "other.nemo"),
            lambda: export_quietly(llama_nemo, shut / "back"),
        ):
            with pytest.raises((InputError, CheckpointError), match="Permission denied"):
                attempt()
    finally:
        shut.chmod(0o755)


def test_a_nemo_of_another_kind_is_named(llama_nemo: Path, tmp_path: Path) -> None:
    folder = extract_nemo(llama_nemo, tmp_path / "folder")
    config = yaml.safe_load((folder / "model_config.yaml").read_text())
    target = "nemo.collections.asr.models.rnnt_bpe_models.EncDecRNNTBPEModel"
    (folder / "model_config.yaml").write_text(yaml.safe_dump({"target": target, "tokenizer": config["tokenizer"]}))
    with pytest.raises(CheckpointError, match=rf"target is '{target}': a model of another kind"):
        export_quietly(folder, tmp_path / "back")
