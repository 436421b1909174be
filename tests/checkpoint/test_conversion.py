"""Hugging Face -> .nemo -> Hugging Face, and every model that is refused."""

from __future__ import annotations

import json
import os
import resource
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from llamas import LLAMA3_ROPE, ROOT, MakeLlama, convert_quietly, export_quietly
from safetensors.torch import load_file, save_file

from steerlm_nemo.checkpoint import from_hf
from steerlm_nemo.checkpoint.archive import extract_nemo, open_nemo, read_config
from steerlm_nemo.checkpoint.from_hf import plan_conversion
from steerlm_nemo.checkpoint.llama_config import tp_sizes, vocabulary_padding
from steerlm_nemo.checkpoint.streaming import EagerFile
from steerlm_nemo.checkpoint.tokenizer_files import localise_tokenizer
from steerlm_nemo.checkpoint.weights import DistributedWeights
from steerlm_nemo.errors import CheckpointError, InputError


def tensors_in(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for path in folder.glob("model*.safetensors") for name, tensor in load_file(path).items()}


def require_same_tensors(one: Path, other: Path) -> None:
    ours, theirs = tensors_in(one), tensors_in(other)
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert tensor.dtype == theirs[name].dtype and torch.equal(tensor, theirs[name]), name


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("tied", [False, True])
def test_a_round_trip_restores_every_bit(make_llama: MakeLlama, tmp_path: Path, dtype: str, tied: bool) -> None:
    source = make_llama(dtype=dtype, tie_word_embeddings=tied)
    nemo = convert_quietly(source, tmp_path / "model.nemo")
    back = export_quietly(nemo, tmp_path / "back")
    require_same_tensors(back, source)
    assert (back / "tokenizer.model").read_bytes() == (source / "tokenizer.model").read_bytes()


def test_pieces_smaller_than_a_tensor_and_records_beyond_4_gib_change_nothing(
    make_llama: MakeLlama, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = make_llama(dtype="bfloat16")
    wide = convert_quietly(source, tmp_path / "wide.nemo", "32")  # one piece per tensor, cast
    with monkeypatch.context() as patch:
        patch.setattr(from_hf, "PIECE_BYTES", 1000)
        patch.setattr(EagerFile, "LARGE_BYTES", 100)
        patch.setattr(zipfile, "ZIP64_LIMIT", 5000)
        nemo = convert_quietly(source, tmp_path / "model.nemo")
        cast = convert_quietly(source, tmp_path / "cast.nemo", "32")
    require_same_tensors(export_quietly(nemo, tmp_path / "back"), source)
    require_same_tensors(export_quietly(cast, tmp_path / "cast"), export_quietly(wide, tmp_path / "wide"))


def test_a_conversion_imports_neither_torch_nor_nemo(llama: Path, tmp_path: Path) -> None:
    program = "import sys, convert_hf_llama_to_nemo as c; c.main(sys.argv[1:]); print(sorted(sys.modules))"
    arguments = ["--in-file", llama, "--out-file", tmp_path / "model.nemo", "--no_check"]
    done = subprocess.run(
        [sys.executable, "-c", program, *arguments],
        env={**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'scripts'}"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert "'zipfile'" in done.stdout
    assert not [name for name in ("torch", "numpy", "nemo", "megatron") if f"'{name}'" in done.stdout]


def test_a_genuine_checkpoint_survives_the_round_trip(stories: Path, tmp_path: Path) -> None:
    back = export_quietly(convert_quietly(stories, tmp_path / "stories.nemo"), tmp_path / "back")
    require_same_tensors(back, stories)
    for name in ("tokenizer.model", "tokenizer_config.json"):
        assert (back / name).read_bytes() == (stories / name).read_bytes()


@pytest.mark.parametrize("rope", [None, {"type": "linear", "rope_type": "linear", "factor": 2.0}, LLAMA3_ROPE])
def test_transformers_computes_the_same_logits_after_a_round_trip(
    make_llama: MakeLlama, tmp_path: Path, rope: dict[str, Any] | None
) -> None:
    from transformers import AutoModelForCausalLM

    source = make_llama(rope_scaling=rope)
    back = export_quietly(convert_quietly(source, tmp_path / "model.nemo"), tmp_path / "back")
    token_ids = torch.arange(3, 203).reshape(1, -1)
    with torch.no_grad():
        before, after = (AutoModelForCausalLM.from_pretrained(path)(token_ids).logits for path in (source, back))
    assert torch.equal(before, after)


def test_sharded_safetensors_convert_like_a_single_file(
    make_llama: MakeLlama, llama: Path, llama_nemo: Path, tmp_path: Path
) -> None:
    sharded = tmp_path / "sharded"
    shutil.copytree(llama, sharded)
    tensors = load_file(sharded / "model.safetensors")
    names = sorted(tensors)
    (sharded / "model.safetensors").unlink()
    weight_map = {}
    for number, part in enumerate((names[::2], names[1::2]), start=1):
        shard = f"model-{number:05d}-of-00002.safetensors"
        save_file({name: tensors[name] for name in part}, sharded / shard)
        weight_map |= dict.fromkeys(part, shard)
    (sharded / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    nemo = convert_quietly(sharded, tmp_path / "sharded.nemo")
    with open_nemo(nemo) as ours, open_nemo(llama_nemo) as single:
        name = "model_weights/__0_0.distcp"
        one, other = DistributedWeights(ours), DistributedWeights(single)
        assert one.index.tensors.keys() == other.index.tensors.keys()
        for key in one.index.tensors:
            assert torch.equal(one.read(key, None), other.read(key, None)), (key, name)


def test_a_large_export_is_split_with_an_index_that_transformers_reads(
    llama: Path, llama_nemo: Path, tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM

    back = export_quietly(llama_nemo, tmp_path / "back", max_shard_bytes=200_000)
    assert len(list(back.glob("model-*-of-*.safetensors"))) > 1
    require_same_tensors(back, llama)
    loaded = AutoModelForCausalLM.from_pretrained(back).state_dict()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in tensors_in(llama).items())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_zarr_checkpoint_of_nemo_1_exports(make_llama: MakeLlama, tmp_path: Path, dtype: str) -> None:
    """Arrays as zarr's own library writes them, chunked as by four tensor-parallel ranks, one layer per chunk."""
    zarr = pytest.importorskip("zarr")
    numpy = pytest.importorskip("numpy")
    source = make_llama(dtype=dtype)
    folder = extract_nemo(convert_quietly(source, tmp_path / "model.nemo"), tmp_path / "zarr")
    with open_nemo(folder) as nemo:
        weights = DistributedWeights(nemo)
        tensors = {key: weights.read(key, None) for key in weights.index.tensors}
    shutil.rmtree(folder / "model_weights")
    for key, tensor in tensors.items():
        stacked = ".layers." in key
        chunks = list(tensor.shape)
        chunks[0 if not stacked else 1] //= 4
        if stacked:
            chunks[0] = 1
        is_bfloat16 = tensor.dtype is torch.bfloat16  # zarr has no such type; Megatron writes the name into .zarray
        values = tensor.view(torch.int16).numpy() if is_bfloat16 else tensor.numpy()
        path = folder / "model_weights" / key
        array = zarr.open(str(path), "w", shape=values.shape, chunks=chunks, dtype=values.dtype, compressor=None)
        array[:] = numpy.ascontiguousarray(values)
        if is_bfloat16:
            (path / ".zarray").write_text((path / ".zarray").read_text().replace('"<i2"', '"bfloat16"'))
    require_same_tensors(export_quietly(folder, tmp_path / "back"), source)
    next(folder.glob("model_weights/*fc1.weight/0.0.0")).unlink()
    with pytest.raises(CheckpointError, match="no bytes found"):
        export_quietly(folder, tmp_path / "again")


@pytest.mark.parametrize(("precision", "dtype"), [("32", "float32"), ("16", "float16"), ("bf16", "bfloat16")])
def test_precision_decides_the_stored_dtype(llama: Path, tmp_path: Path, precision: str, dtype: str) -> None:
    nemo_path = convert_quietly(llama, tmp_path / "model.nemo", precision)
    with open_nemo(nemo_path) as nemo:
        assert DistributedWeights(nemo).dtype == dtype
        assert str(nemo.config["precision"]) == precision


def test_a_value_beyond_the_range_of_fp16_is_refused_and_nothing_is_left(llama: Path, tmp_path: Path) -> None:
    folder = copy_with(llama, tmp_path, lambda tensors: tensors["model.norm.weight"].fill_(1e6))
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight has values beyond 65504"):
        convert_quietly(folder, tmp_path / "out" / "model.nemo", "16")
    assert list((tmp_path / "out").iterdir()) == []


def test_the_config_has_what_stock_nemo_reads(stories: Path, tmp_path: Path) -> None:
    config = read_config(convert_quietly(stories, tmp_path / "stories.nemo"))
    expected = {
        "mcore_gpt": True,
        "num_layers": 5,
        "hidden_size": 64,
        "ffn_hidden_size": 172,
        "num_attention_heads": 8,
        "num_query_groups": 4,
        "kv_channels": None,
        "encoder_seq_length": 512,
        "layernorm_epsilon": 1e-5,
        "rotary_base": 10000.0,
        "share_embeddings_and_output_weights": True,
        "activation": "fast-swiglu",
        "normalization": "rmsnorm",
        "position_embedding_type": "rope",
        "precision": 32,
    }
    assert {key: config[key] for key in expected} == expected
    assert config["tokenizer"]["model"] == "nemo:tokenizer.model"
    assert "seq_len_interpolation_factor" not in config and "scale_positional_embedding" not in config


def test_rope_scaling_comes_from_the_source_config(make_llama: MakeLlama, tmp_path: Path) -> None:
    linear = make_llama(rope_scaling={"rope_type": "linear", "factor": 4.0}, rope_theta=5e5)
    config = read_config(convert_quietly(linear, tmp_path / "linear.nemo"))
    assert config["seq_len_interpolation_factor"] == 4.0 and config["rotary_base"] == 5e5
    llama3 = read_config(convert_quietly(make_llama(rope_scaling=LLAMA3_ROPE), tmp_path / "llama3.nemo"))
    assert llama3["scale_positional_embedding"] is True
    names = ("scale_factor", "low_freq_factor", "high_freq_factor", "old_context_len")
    assert [llama3[name] for name in names] == [8.0, 1.0, 4.0, 32]


@pytest.mark.parametrize(
    ("heads", "groups", "sizes"), [(32, 8, (1, 2, 4, 8)), (8, 1, (1, 2, 4, 8)), (9, 3, (1, 3)), (15, 15, (1, 3, 5))]
)
@pytest.mark.parametrize("num_rows", [403, 512, 1000, 32000, 32001, 32064, 49152, 128256, 151936])
def test_nemo_computes_the_stored_vocabulary_at_every_tp(
    num_rows: int, heads: int, groups: int, sizes: tuple[int, ...]
) -> None:
    assert tp_sizes(heads, groups, 15 * 1024) == sizes
    for tokenizer_size in (num_rows, num_rows - 3):
        padded, divisor = vocabulary_padding(num_rows, tokenizer_size, tokenizer_size, sizes)
        for tp_size in sizes:
            multiple = divisor * tp_size  # as NeMo's _vocab_size_with_padding rounds
            assert -(-tokenizer_size // multiple) * multiple == padded >= num_rows
    usual = 128  # the control: the reference's divisor gives 32000 another size at TP 4
    assert -(-32000 // (usual * 4)) * usual * 4 != 32000


def copy_with(source: Path, tmp_path: Path, change: Any, **config: Any) -> Path:
    """A copy of a Hugging Face folder with changed tensors and config entries."""
    folder = tmp_path / "changed"
    shutil.copytree(source, folder)
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    raw = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**raw, **config}))
    return folder


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            {"architectures": ["GPT2LMHeadModel"]},
            "architectures is ['GPT2LMHeadModel']; that is no Llama: it has LayerNorm",
        ),
        ({"attention_bias": True}, "attention_bias is true"),
        ({"mlp_bias": True}, "mlp_bias is true"),
        ({"sliding_window": 4096}, "sliding_window is 4096"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "rope type is 'yarn'"),
        ({"rope_scaling": {"type": "dynamic", "factor": 4.0}}, "rope type is 'dynamic'"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "llama3 lacks low_freq_factor"),
        ({"quantization_config": {"bits": 4}}, "quantization_config is set"),
        ({"num_key_value_heads": 3}, "not a multiple of num_key_value_heads 3"),
        ({"hidden_size": None}, "hidden_size: missing"),
        ({"hidden_size": 128}, "has shape [64], config.json asks for [128]"),
        ({"num_hidden_layers": 4}, "model.layers.3.input_layernorm.weight is missing"),
        ({"num_hidden_layers": 2}, "model.layers.2.input_layernorm.weight is not a tensor of this architecture"),
        ({"tie_word_embeddings": True}, "lm_head.weight differs from the embedding"),
        ({"vocab_size": 100}, "the tokenizer has"),
    ],
)
def test_a_model_that_cannot_be_converted_is_refused_by_name(
    llama: Path, tmp_path: Path, config: dict[str, Any], message: str
) -> None:
    folder = copy_with(llama, tmp_path, lambda tensors: None, **config)
    with pytest.raises(CheckpointError) as refusal:
        plan_conversion(folder, None)
    assert message in str(refusal.value)


def test_a_bias_or_unknown_tensor_is_refused_by_name(llama: Path, tmp_path: Path) -> None:
    name = "model.layers.0.self_attn.q_proj.bias"
    folder = copy_with(llama, tmp_path, lambda tensors: tensors.update({name: torch.zeros(64)}))
    with pytest.raises(CheckpointError, match=r"q_proj\.bias is not a tensor of this architecture"):
        plan_conversion(folder, None)


def test_a_tied_model_may_store_its_output_layer_too(make_llama: MakeLlama, tmp_path: Path) -> None:
    tied = make_llama(tie_word_embeddings=True)
    folder = copy_with(
        tied, tmp_path, lambda tensors: tensors.update({"lm_head.weight": tensors["model.embed_tokens.weight"].clone()})
    )
    with open_nemo(convert_quietly(folder, tmp_path / "model.nemo")) as nemo:
        assert "model.output_layer.weight" not in DistributedWeights(nemo).index.tensors


def test_mistral_without_a_sliding_window_converts_and_keeps_its_name(llama: Path, tmp_path: Path) -> None:
    mistral = {"architectures": ["MistralForCausalLM"], "model_type": "mistral", "sliding_window": None}
    folder = copy_with(llama, tmp_path, lambda tensors: None, **mistral)
    back = export_quietly(convert_quietly(folder, tmp_path / "m.nemo"), tmp_path / "back")
    exported = json.loads((back / "config.json").read_text())
    assert {key: exported[key] for key in mistral} == mistral


def test_a_tokenizer_json_is_packed_and_found_again(llama: Path, tmp_path: Path) -> None:
    from tokenizers import Tokenizer, models
    from transformers import AutoTokenizer

    from steerlm_nemo.checkpoint.tokenizer_files import load_tokenizer

    folder = copy_with(llama, tmp_path, lambda tensors: None)
    (folder / "tokenizer.model").unlink()
    rows = json.loads((folder / "config.json").read_text())["vocab_size"]
    words = {"<s>": 0, "</s>": 1, "[UNK]": 2} | {f"word{number}": number for number in range(3, rows)}
    Tokenizer(models.WordLevel(words, unk_token="[UNK]")).save(str(folder / "tokenizer.json"))
    special = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(special))
    path = convert_quietly(folder, tmp_path / "model.nemo")
    with open_nemo(path) as nemo:
        tokenizer = load_tokenizer(nemo)
        assert (tokenizer.vocab_size, tokenizer.eos_id, tokenizer.encode("word7")) == (rows, 1, [7])
        # NeMo's huggingface tokenizer loads `tokenizer.type` in just this way.
        stock = AutoTokenizer.from_pretrained(localise_tokenizer(nemo.config, nemo.dir)["tokenizer"]["type"])
        assert (len(stock), stock.eos_token_id, stock.encode("word7")) == (rows, 1, [7])
    back = export_quietly(path, tmp_path / "back")
    assert (back / "tokenizer.json").read_bytes() == (folder / "tokenizer.json").read_bytes()


def run_script(*args: str | Path, limit_bytes: int | None = None) -> subprocess.CompletedProcess[str]:
    def limit() -> None:
        if limit_bytes is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit_bytes, limit_bytes))

    script, *rest = args
    return subprocess.run(
        [sys.executable, ROOT / "scripts" / script, *rest],
        capture_output=True,
        text=True,
        preexec_fn=limit,
        check=False,
    )


def cut_off(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: shutil.rmtree(folder), "not a folder"),
        (lambda folder: (folder / "config.json").unlink(), "has no config.json"),
        (lambda folder: (folder / "config.json").write_text("{"), "not valid JSON"),
        (lambda folder: (folder / "model.safetensors").unlink(), "has neither model.safetensors nor"),
        (lambda folder: (folder / "model.safetensors").write_bytes(b"garbage"), "not a safetensors file"),
        (cut_off, "lies outside the file"),
        (lambda folder: (folder / "tokenizer.model").unlink(), "has neither tokenizer.model nor tokenizer.json"),
        (lambda folder: (folder / "tokenizer.model").write_bytes(b"junk"), "not a SentencePiece model"),
    ],
)
def test_a_damaged_source_gives_one_message(llama: Path, tmp_path: Path, damage: Any, message: str) -> None:
    folder = copy_with(llama, tmp_path, lambda tensors: None)
    damage(folder)
    with pytest.raises(InputError) as refusal:
        plan_conversion(folder, None)
    assert message in str(refusal.value)


def test_scripts_exit_with_a_message_and_without_a_traceback(llama: Path, llama_nemo: Path, tmp_path: Path) -> None:
    for args, message in [
        (
            ("convert_hf_llama_to_nemo.py", "--in-file", tmp_path / "no", "--out-file", tmp_path / "x.nemo"),
            "not a folder",
        ),
        (("convert_hf_llama_to_nemo.py", "--in-file", llama, "--out-file", tmp_path), "is a folder"),
        (
            ("convert_nemo_to_hf_llama.py", "--in-file", tmp_path / "no", "--out-file", tmp_path / "x"),
            "cannot be opened",
        ),
        (("convert_nemo_to_hf_llama.py", "--in-file", llama_nemo, "--out-file", llama), "not an empty folder"),
    ]:
        done = run_script(*args)
        assert done.returncode == 2 and done.stderr.startswith("error: ") and message in done.stderr, done.stderr
        assert "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_the_spellings_of_nemo_2_and_the_old_rope_flag_are_accepted(llama: Path, tmp_path: Path) -> None:
    out = tmp_path / "model.nemo"
    args = (
        "--input_name_or_path",
        llama,
        "--output_path",
        out,
        "--precision",
        "bf16",
        "--llama31",
        "True",
        "--no_check",
    )
    done = run_script("convert_hf_llama_to_nemo.py", *args)
    assert done.returncode == 0, done.stderr
    assert "--llama31 is ignored" in done.stderr and "scale_positional_embedding" not in read_config(out)
    assert "layer 3 of 3" in done.stdout and done.stdout.splitlines()[-1].startswith(f"wrote {out}")


def test_a_disk_that_fills_up_leaves_the_old_file_and_nothing_else(llama: Path, tmp_path: Path) -> None:
    out = tmp_path / "model.nemo"
    out.write_bytes(b"the old file")
    done = run_script("convert_hf_llama_to_nemo.py", "--in-file", llama, "--out-file", out, limit_bytes=300_000)
    assert done.returncode == 2 and "writing failed: File too large" in done.stderr, done.stderr
    assert out.read_bytes() == b"the old file" and list(tmp_path.iterdir()) == [out]


def test_an_export_onto_a_full_disk_leaves_no_folder(llama_nemo: Path, tmp_path: Path) -> None:
    done = run_script(
        "convert_nemo_to_hf_llama.py", "--in-file", llama_nemo, "--out-file", tmp_path / "hf", limit_bytes=300_000
    )
    assert done.returncode == 2 and "writing failed" in done.stderr, done.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("script", ["convert_hf_llama_to_nemo", "convert_nemo_to_hf_llama"])
def test_sigterm_leaves_nothing_behind(llama: Path, llama_nemo: Path, tmp_path: Path, script: str) -> None:
    source = llama if script == "convert_hf_llama_to_nemo" else llama_nemo
    # Stops itself in the middle of writing: whoever watches from outside is too slow for a file this small.
    program = (
        "import os, runpy, signal, sys; from steerlm_nemo.checkpoint.streaming import EagerFile\n"
        "sync = EagerFile.sync\n"
        "EagerFile.sync = lambda self: (sync(self), os.kill(os.getpid(), signal.SIGTERM))\n"
        "runpy.run_path(sys.argv.pop(1), run_name='__main__')"
    )
    arguments = [ROOT / "scripts" / f"{script}.py", "--in-file", source, "--out-file", tmp_path / "out"]
    done = subprocess.run([sys.executable, "-c", program, *arguments], capture_output=True, text=True)
    assert done.returncode == 143, done.stderr
    assert list(tmp_path.iterdir()) == []


def test_an_empty_tokenizer_is_no_tokenizer(llama: Path, tmp_path: Path) -> None:
    folder = copy_with(llama, tmp_path, lambda tensors: None)
    (folder / "tokenizer.model").write_bytes(b"")
    with pytest.raises(InputError, match=r"tokenizer\.model: not a SentencePiece model \(an empty file\)"):
        plan_conversion(folder, None)


def test_a_damaged_record_beside_the_weights_is_a_message(llama_nemo: Path, tmp_path: Path) -> None:
    data = llama_nemo.read_bytes()
    (tmp_path / "changed.nemo").write_bytes(data.replace(b"archive/byteorderlittle", b"archive/byteorderlittlx", 1))
    with pytest.raises(CheckpointError, match=r"__0_0\.distcp: damaged \(BadZipFile"):
        export_quietly(tmp_path / "changed.nemo", tmp_path / "back")
    assert not (tmp_path / "back").exists()


KILLER = """
import os, random, shutil, signal, sys, time
from pathlib import Path
from llamas import convert_quietly, export_quietly

direction, source, out, kept = sys.argv[1], *map(Path, sys.argv[2:])

def once():
    if direction == "convert":
        convert_quietly(source, out)
    else:
        if out.exists():
            out.rename(kept / f"old-{time.time_ns()}")
        export_quietly(source, out)

chance = random.Random(0)
for number in range(20):
    child = os.fork()
    if child == 0:
        once()
        if number == 0:
            os._exit(0)  # so that there is an old file
        while True:
            once()
    if number > 0:
        time.sleep(chance.uniform(0, 0.15))
        os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    if out.is_file():
        shutil.copy(out, kept / str(number))
    elif out.exists():
        shutil.copytree(out, kept / str(number))
"""


@pytest.mark.parametrize("direction", ["convert", "export"])
def test_a_kill_at_any_moment_leaves_a_whole_result_or_none(
    llama: Path, llama_nemo: Path, tmp_path: Path, direction: str
) -> None:
    """The next run removes what a killed one left under a hidden name, and touches nothing else."""
    source = {"convert": llama, "export": llama_nemo}[direction]
    out, kept = tmp_path / "out" / "result", tmp_path / "kept"
    out.parent.mkdir()
    kept.mkdir()
    bystander = out.parent / ".other.0.partial"
    bystander.write_bytes(b"somebody else's")
    subprocess.run(
        [sys.executable, "-c", KILLER, direction, source, out, kept],
        env={**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'tests/support'}"},
        check=True,
    )
    results = list(kept.iterdir())
    for number, result in enumerate(results):
        require_same_tensors(result if result.is_dir() else export_quietly(result, tmp_path / f"back-{number}"), llama)
    assert len(results) >= (20 if direction == "convert" else 1)
    shutil.rmtree(out) if out.is_dir() else out.unlink(missing_ok=True)
    (out.parent / ".result.0123.partial").mkdir()  # at least one, whatever the kills hit
    convert_quietly(llama, out) if direction == "convert" else export_quietly(llama_nemo, out)
    assert sorted(out.parent.iterdir()) == sorted([bystander, out])


def test_what_is_stored_in_rows_is_copied_and_the_rest_loaded(llama_nemo: Path, tmp_path: Path) -> None:
    """The control of the copies: chunks that look alike but are not the plain rows of the tensor go another way."""
    from steerlm_nemo.checkpoint.torch_dist import Chunk, StoredTensor, stored_rows

    with open_nemo(llama_nemo) as nemo:
        weights = DistributedWeights(nemo)
        for key in weights.index.tensors:
            layer = 1 if ".layers." in key else None
            (rows,) = weights.rows(key, layer)
            loaded = weights.read(key, layer)
            with weights.open_file(rows.file) as file:
                file.seek(rows.start)
                stored = file.read(loaded.numel() * loaded.itemsize)
            assert stored == loaded.contiguous().view(torch.uint8).numpy().tobytes()
            assert (rows.first, rows.count) == (0, loaded.shape[0])
    values = torch.arange(24.0).reshape(4, 6)
    cases = {
        "plain": (values.clone(), True),
        "second half of a storage": (torch.arange(48.0)[24:].reshape(4, 6), True),
        "transposed": (torch.arange(24.0).reshape(6, 4).t(), False),
        "another dtype": (values.to(torch.bfloat16), False),
        "a parameter": (torch.nn.Parameter(values), False),
    }
    path = tmp_path / "chunk.distcp"
    for name, (tensor, is_plain) in cases.items():
        torch.save(tensor, path)
        chunk = Chunk((0, 0), (4, 6), path.name, 0, path.stat().st_size)
        found = stored_rows(StoredTensor("float32", (4, 6), (chunk,)), None, lambda _: path.open("rb"), "here")
        assert (found is not None) == is_plain, name
        if found is not None:
            assert path.read_bytes()[found[0].start :][:96] == tensor.contiguous().numpy().tobytes(), name
        wide = StoredTensor("float32", (4, 12), (chunk, Chunk((0, 6), (4, 6), path.name, 0, chunk.num_bytes)))
        assert stored_rows(wide, None, lambda _: path.open("rb"), "here") is None  # split within rows
