"""Hugging Face folders as other programs and other versions save them: converted as transformers reads them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from llamas import LLAMA3_ROPE, MakeLlama, convert_quietly, export_quietly
from safetensors.torch import load_file, save_file

from steerlm_nemo.checkpoint.architectures import BY_NAME
from steerlm_nemo.checkpoint.archive import open_nemo, read_config
from steerlm_nemo.checkpoint.from_hf import convert, plan_conversion
from steerlm_nemo.checkpoint.llama_config import read_hf_config
from steerlm_nemo.checkpoint.tokenizer_files import find_tokenizer, localise_tokenizer
from steerlm_nemo.errors import CheckpointError, InputError
from steerlm_nemo.models.logits_check import logits_check, transformers_logits

STACK = "needs the training stack: nemo_toolkit, megatron-core, nemo-aligner"
LINEAR_ROPE = {"rope_type": "linear", "factor": 2.0}
MISTRAL = {"architectures": ["MistralForCausalLM"], "model_type": "mistral"}


def changed(source: Path, folder: Path, without: tuple[str, ...] = (), **config: Any) -> Path:
    """A copy of a Hugging Face folder with other entries in its config.json."""
    shutil.copytree(source, folder)
    path = folder / "config.json"
    raw = {key: value for key, value in json.loads(path.read_text()).items() if key not in without}
    path.write_text(json.dumps(raw | config))
    return folder


def respelled(source: Path, folder: Path) -> Path:
    """The folder as transformers 5 spells its config."""
    raw = json.loads((source / "config.json").read_text())
    rope = {"rope_theta": raw["rope_theta"], "rope_type": "default"} | (raw["rope_scaling"] or {})
    old = ("rope_theta", "rope_scaling", "torch_dtype")
    return changed(source, folder, old, rope_parameters=rope, dtype=raw["torch_dtype"])


@pytest.mark.parametrize("scaling", [None, LINEAR_ROPE, LLAMA3_ROPE])
def test_a_config_of_transformers_5_converts_as_the_same_config_of_4(
    make_llama: MakeLlama, tmp_path: Path, scaling: dict[str, Any] | None
) -> None:
    older = make_llama(rope_theta=5e5, rope_scaling=scaling)
    newer = respelled(older, tmp_path / "newer")
    one, other = (
        read_config(convert_quietly(folder, tmp_path / f"{number}.nemo"))
        for number, folder in enumerate((older, newer))
    )
    assert one["rotary_base"] == 5e5
    assert {**one, "hf_checkpoint": None} == {**other, "hf_checkpoint": None}


@pytest.mark.parametrize("scaling", [None, LINEAR_ROPE, LLAMA3_ROPE])
def test_the_reference_computes_with_the_rope_that_a_config_of_transformers_5_has(
    make_llama: MakeLlama, tmp_path: Path, scaling: dict[str, Any] | None
) -> None:
    older = make_llama(rope_theta=5e5, rope_scaling=scaling)
    newer = respelled(older, tmp_path / "newer")
    token_ids = torch.arange(3, 203)
    logits = transformers_logits(older, token_ids, torch.float32)
    assert torch.equal(transformers_logits(newer, token_ids, torch.float32), logits)
    other = changed(older, tmp_path / "other", rope_theta=10000.0)  # the control: what an unread rope_theta becomes
    assert (transformers_logits(other, token_ids, torch.float32) - logits).abs().max() > 0.1


@pytest.mark.slow
def test_a_folder_of_transformers_5_passes_the_comparison_of_logits(make_llama: MakeLlama, tmp_path: Path) -> None:
    pytest.importorskip("nemo", reason=STACK)
    newer = respelled(make_llama(rope_theta=5e5, dtype="bfloat16"), tmp_path / "newer")
    said: list[str] = []
    plan = plan_conversion(newer, None)
    convert(plan, tmp_path / "model.nemo", said.append, logits_check(plan, newer, said.append))
    assert any(line.startswith("logits of 128 tokens differ by") for line in said), said


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"rope_parameters": [1]}, "rope_parameters is [1], not a mapping"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}}, "rope type is 'yarn'"),
        ({"rope_parameters": {"full_attention": {"rope_theta": 1e4}}}, "rope_parameters differ by layer"),
        ({"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}}, "partial_rotary_factor is 0.5"),
        ({"rope_parameters": {"rope_theta": "many"}}, "rope_theta is 'many', not a positive number"),
        ({"rope_parameters": {"rope_theta": 5e5}, "rope_theta": 1e4}, "rope_theta is 10000.0, but 500000.0 in"),
    ],
)
def test_rope_parameters_that_a_llama_of_nemo_has_not_are_refused(
    llama: Path, tmp_path: Path, config: dict[str, Any], message: str
) -> None:
    folder = changed(llama, tmp_path / "model", ("rope_theta", "rope_scaling"), **config)
    with pytest.raises(CheckpointError) as refusal:
        plan_conversion(folder, None)
    assert message in str(refusal.value)


def with_tokenizer_config(source: Path, folder: Path, change: dict[str, Any] | None) -> Path:
    """A copy with other entries in tokenizer_config.json (None takes one away), or without the file."""
    shutil.copytree(source, folder)
    path = folder / "tokenizer_config.json"
    if change is None:
        path.unlink()
        return folder
    raw = json.loads(path.read_text()) | change
    path.write_text(json.dumps({key: value for key, value in raw.items() if value is not None}))
    return folder


@pytest.mark.parametrize(
    "change",
    [
        {"tokenizer_class": "TokenizersBackend", "backend": "tokenizers", "is_local": True},
        {"tokenizer_class": "TokenizersBackend", "extra_special_tokens": ["<|eot_id|>"]},
        {"extra_special_tokens": ["<|eot_id|>"]},
        {"tokenizer_class": "TokenizerOfNextYear"},
        {"tokenizer_class": "TheirTokenizer", "auto_map": {"AutoTokenizer": [None, "theirs.TheirTokenizer"]}},
        {"tokenizer_class": None},
        {"tokenizer_class": "Qwen2Tokenizer"},
    ],
)
def test_a_tokenizer_of_an_unknown_class_is_read_from_its_json(
    llama3_style: Path, tmp_path: Path, change: dict[str, Any]
) -> None:
    from transformers import AutoTokenizer

    known = AutoTokenizer.from_pretrained(llama3_style)
    folder = with_tokenizer_config(llama3_style, tmp_path / "model", change)
    with open_nemo(convert_quietly(folder, tmp_path / "model.nemo")) as nemo:
        # NeMo loads `tokenizer.type` in just this way.
        packed = AutoTokenizer.from_pretrained(localise_tokenizer(nemo.config, nemo.dir)["tokenizer"]["type"])
    ids = (known.bos_token_id, known.eos_token_id)
    assert None not in ids
    assert (packed.bos_token_id, packed.eos_token_id, len(packed)) == (*ids, len(known))
    text = "  The table — each row\n<|eot_id|> 42"
    assert packed.encode(text, add_special_tokens=False) == known.encode(text, add_special_tokens=False)


def test_a_token_that_the_config_adds_by_itself_stays(llama3_style: Path, tmp_path: Path) -> None:
    """As old folders have it: a padding token that is in no other file, and that every class adds."""
    folder = with_tokenizer_config(llama3_style, tmp_path / "model", {"pad_token": "[PAD]"})
    found = find_tokenizer(folder)
    assert (found.size, found.notes) == (find_tokenizer(llama3_style).size + 1, ())


def test_a_tokenizer_that_loads_is_packed_as_it_is(llama3_style: Path) -> None:
    packed = find_tokenizer(llama3_style)
    assert packed.files["tokenizer_config.json"] == (llama3_style / "tokenizer_config.json").read_bytes()
    assert packed.notes == ()


@pytest.mark.parametrize(
    ("name", "damage", "message"),
    [
        ("tokenizer_config.json", lambda text: text[:-9], r"tokenizer_config\.json: not valid JSON"),
        ("tokenizer_config.json", lambda text: "[]", r"tokenizer_config\.json: expected a JSON object, found list"),
        ("tokenizer.json", lambda text: text[:-9], r"tokenizer\.json: not a Hugging Face tokenizer\.json"),
        (
            "tokenizer.json",
            lambda text: text.replace('"ByteLevel"', '"NextLevel"'),
            r"tokenizers [\d.]+ cannot read it",
        ),
    ],
)
def test_a_tokenizer_that_nothing_loads_is_refused_before_anything_is_written(
    llama3_style: Path, tmp_path: Path, name: str, damage: Any, message: str
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(llama3_style, folder)
    (folder / name).write_text(damage((folder / name).read_text()))
    with pytest.raises(InputError, match=message):
        plan_conversion(folder, None)


def in_shards(source: Path, folder: Path, change: float, num_shards: int) -> Path:
    """A copy with an index and shards beside its model.safetensors; of their norm something is taken."""
    shutil.copytree(source, folder)
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"] = tensors["model.norm.weight"] - change
    names, weight_map = sorted(tensors), {}
    for number in range(num_shards):
        shard = f"model-{number + 1:05d}-of-{num_shards:05d}.safetensors"
        part = names[number::num_shards]
        save_file({name: tensors[name] for name in part}, folder / shard, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, shard)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return folder


@pytest.mark.parametrize("num_shards", [1, 3])
def test_the_weights_are_those_that_transformers_loads_where_shards_lie_beside_a_single_file(
    llama: Path, tmp_path: Path, num_shards: int
) -> None:
    from transformers import AutoModelForCausalLM

    folder = in_shards(llama, tmp_path / "model", 0.25, num_shards)
    said: list[str] = []
    convert(plan_conversion(folder, None), tmp_path / "model.nemo", said.append)
    back = load_file(export_quietly(tmp_path / "model.nemo", tmp_path / "back") / "model.safetensors")
    theirs = AutoModelForCausalLM.from_pretrained(folder).state_dict()
    assert all(torch.equal(theirs[name], tensor) for name, tensor in back.items())
    assert "model.safetensors.index.json and its shards are passed over" in said[0]
    (folder / "model.safetensors").unlink()  # the control: alone, the shards are the model
    convert(plan_conversion(folder, None), tmp_path / "shards.nemo", said.append)
    other = load_file(export_quietly(tmp_path / "shards.nemo", tmp_path / "other") / "model.safetensors")
    assert torch.equal(other["model.norm.weight"], back["model.norm.weight"] - 0.25)


@pytest.mark.parametrize("precision", ["32", "16", "bf16"])
@pytest.mark.parametrize("spelling", [{"dtype": "bfloat16"}, {"torch_dtype": "bfloat16"}, {}])
def test_an_export_names_the_dtype_of_its_weights_and_no_other(
    llama: Path, tmp_path: Path, precision: str, spelling: dict[str, str]
) -> None:
    folder = changed(llama, tmp_path / "model", ("torch_dtype",), **spelling)
    back = export_quietly(convert_quietly(folder, tmp_path / "model.nemo", precision), tmp_path / "back")
    exported = json.loads((back / "config.json").read_text())
    stored = {str(tensor.dtype) for tensor in load_file(back / "model.safetensors").values()}
    assert {f"torch.{exported[key]}" for key in ("torch_dtype", "dtype")} == stored


def test_an_export_says_the_same_rope_as_transformers_4_and_5_spell_it(make_llama: MakeLlama, tmp_path: Path) -> None:
    newer = respelled(make_llama(rope_theta=5e5, rope_scaling=LINEAR_ROPE), tmp_path / "newer")
    back = export_quietly(convert_quietly(newer, tmp_path / "model.nemo"), tmp_path / "back")
    exported = json.loads((back / "config.json").read_text())
    assert (exported["rope_theta"], exported["rope_scaling"]["factor"]) == (5e5, 2.0)
    assert exported["rope_parameters"] == {"rope_type": "linear", "rope_theta": 5e5, "factor": 2.0}
    again = export_quietly(convert_quietly(back, tmp_path / "again.nemo"), tmp_path / "again")
    assert json.loads((again / "config.json").read_text()) == exported


@pytest.mark.parametrize("architecture", BY_NAME)
def test_absent_keys_mean_what_the_class_of_transformers_takes_them_for(
    llama: Path, tmp_path: Path, architecture: str
) -> None:
    import transformers

    folder = tmp_path / "bare"
    folder.mkdir()
    bare: dict[str, Any] = {"architectures": [architecture]}
    (folder / "config.json").write_text(json.dumps(bare))
    config = read_hf_config(folder)
    theirs = getattr(transformers, architecture).config_class(**bare)
    for key, value in config.raw.items():
        if value is not None:  # null: worked out from others, see below
            assert getattr(theirs, key) == value, key
    assert config.num_query_groups == theirs.num_key_value_heads
    assert config.head_dim == (getattr(theirs, "head_dim", None) or theirs.hidden_size // theirs.num_attention_heads)
    used = getattr(theirs, "use_sliding_window", True)
    assert config.window == (getattr(theirs, "sliding_window", None) if used else None)
    assert config.rope == {"rope_type": "default", "rope_theta": theirs.rope_theta}


@pytest.mark.parametrize(
    ("window", "without", "expected"),
    [({}, True, 4096), ({"sliding_window": 100}, False, 100), ({"sliding_window": None}, False, None)],
)
def test_an_absent_window_of_mistral_is_the_default_of_its_class(
    llama: Path, tmp_path: Path, window: dict[str, Any], without: bool, expected: int | None
) -> None:
    folder = changed(llama, tmp_path / "model", **MISTRAL, **window)
    said: list[str] = []
    convert(plan_conversion(folder, None), tmp_path / "model.nemo", said.append)
    assert read_config(tmp_path / "model.nemo").get("window_size") == (expected and [expected - 1, 0])
    named = [line for line in said if f"sliding_window is {expected}" in line]
    assert len(named) == (expected is not None)
    assert all(("the default of MistralForCausalLM" in line) == without for line in named)
    back = export_quietly(tmp_path / "model.nemo", tmp_path / "back")
    assert json.loads((back / "config.json").read_text())["sliding_window"] == expected


def test_absent_key_value_heads_of_mistral_are_those_of_its_class(llama: Path, tmp_path: Path) -> None:
    folder = changed(llama, tmp_path / "model", ("num_key_value_heads",), **MISTRAL)
    with pytest.raises(CheckpointError, match="num_key_value_heads 8"):
        plan_conversion(folder, None)


@pytest.mark.parametrize(
    "weight_map",
    [[], {}, None, 3, "model.safetensors", ["model.norm.weight"], {"lm_head.weight": None}, {"lm_head.weight": ["x"]}],
)
def test_an_index_that_is_no_map_of_names_to_files_is_refused(llama: Path, tmp_path: Path, weight_map: Any) -> None:
    folder = changed(llama, tmp_path / "model")
    (folder / "model.safetensors").rename(folder / "model-00001-of-00001.safetensors")
    for index in ({"weight_map": weight_map}, weight_map):
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
        with pytest.raises(InputError, match=r"index\.json: "):
            plan_conversion(folder, None)


@pytest.mark.parametrize("is_tied", [False, True])
@pytest.mark.parametrize("absent", ["model.embed_tokens.weight", "model.norm.weight"])
def test_a_missing_tensor_is_named_whatever_else_is_there(
    llama: Path, tmp_path: Path, absent: str, is_tied: bool
) -> None:
    folder = changed(llama, tmp_path / "model", tie_word_embeddings=is_tied)
    tensors = load_file(folder / "model.safetensors")
    del tensors[absent]
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=rf"{absent} is missing"):
        plan_conversion(folder, None)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"architectures": 5}, "architectures is 5"),
        ({"architectures": {"a": 1}}, "architectures is {'a': 1}"),
        ({"hidden_size": 64.0}, "hidden_size: missing, or not a positive whole number"),
        ({"num_key_value_heads": "two"}, "num_key_value_heads is 'two'"),
        ({"head_dim": [16]}, "head_dim is [16]"),
        ({"rms_norm_eps": "1e-6"}, "rms_norm_eps is '1e-6', not a number"),
        ({"rms_norm_eps": -1e-6}, "rms_norm_eps is -1e-06, not a number, or a negative one"),
        ({"rope_scaling": {"rope_type": "linear", "factor": 0}}, "factor of the rope is 0, not a number above 0"),
        ({"tie_word_embeddings": "false"}, "tie_word_embeddings is 'false'"),
        ({"rope_scaling": {"rope_type": ["linear"]}}, "rope type is ['linear']"),
        ({"rope_scaling": {"rope_type": "linear", "factor": "2"}}, "factor of the rope is '2', not a number"),
    ],
)
def test_a_config_with_values_of_another_type_is_refused_by_name(
    llama: Path, tmp_path: Path, config: dict[str, Any], message: str
) -> None:
    folder = changed(llama, tmp_path / "model", **config)
    with pytest.raises(CheckpointError) as refusal:
        plan_conversion(folder, None)
    assert message in str(refusal.value)


@pytest.mark.parametrize("content", ["[]", "7", "{"])
def test_a_generation_config_that_is_no_object_is_refused(llama: Path, tmp_path: Path, content: str) -> None:
    folder = changed(llama, tmp_path / "model")
    (folder / "generation_config.json").write_text(content)
    with pytest.raises(InputError, match=r"generation_config\.json: (expected a JSON object|not valid JSON)"):
        plan_conversion(folder, None)


@pytest.mark.parametrize("weights", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("constant", [torch.float32, torch.float64, torch.int64])
def test_a_constant_that_is_ignored_decides_nothing(
    make_llama: MakeLlama, tmp_path: Path, weights: str, constant: torch.dtype
) -> None:
    folder = make_llama(dtype=weights, num_hidden_layers=1)
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(8, dtype=constant)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    assert plan_conversion(folder, None).dtype == weights
    (folder / "model.safetensors").rename(folder / "model-00001-of-00001.safetensors")
    weight_map = dict.fromkeys(tensors, "model-00001-of-00001.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    assert plan_conversion(folder, None).dtype == weights


def test_weights_of_two_precisions_still_ask_for_a_choice(llama: Path, tmp_path: Path) -> None:
    folder = changed(llama, tmp_path / "model")
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"] = tensors["model.norm.weight"].half()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match="choose one with --precision"):
        plan_conversion(folder, None)


@pytest.mark.parametrize("place", ["added_tokens.json", "tokenizer_config.json"])
def test_added_tokens_that_a_tokenizer_model_has_not_are_named(llama: Path, tmp_path: Path, place: str) -> None:
    folder = changed(llama, tmp_path / "model")
    rows = json.loads((folder / "config.json").read_text())["vocab_size"]
    unused = {"<|im_start|>": rows - 2, "<|im_end|>": rows - 1}
    decoder = {str(token_id): {"content": token} for token, token_id in unused.items()}
    content: dict[str, Any] = {"added_tokens.json": unused, "tokenizer_config.json": {"added_tokens_decoder": decoder}}
    (folder / place).write_text(json.dumps(content[place]))
    said: list[str] = []
    convert(plan_conversion(folder, None), tmp_path / "model.nemo", said.append)
    assert f"<|im_start|> ({rows - 2}), <|im_end|> ({rows - 1})" in said[0], said
    (folder / place).write_text(json.dumps({"added_tokens.json": {"<s>": 1}, "tokenizer_config.json": {}}[place]))
    assert plan_conversion(folder, None).tokenizer.notes == ()  # the control: <s> is a piece of the model


@pytest.mark.parametrize("content", ["[]", '{"<a>": "x"}', '{"<a>": null}', "{"])
def test_malformed_added_tokens_are_refused(llama: Path, tmp_path: Path, content: str) -> None:
    folder = changed(llama, tmp_path / "model")
    (folder / "added_tokens.json").write_text(content)
    with pytest.raises(InputError, match=r"added_tokens\.json"):
        plan_conversion(folder, None)


@pytest.mark.parametrize("content", [b"aGVsbG8= 0\nd29ybGQ= 1\n", b"version https://git-lfs.github.com/spec/v1\n", b""])
def test_a_tokenizer_model_of_another_kind_leaves_the_json_to_be_used(
    llama3_style: Path, tmp_path: Path, content: bytes
) -> None:
    folder = changed(llama3_style, tmp_path / "model")
    (folder / "tokenizer.model").write_bytes(content)
    found = plan_conversion(folder, None).tokenizer
    assert found.library == "huggingface" and "tokenizer.model" not in found.files
    assert "tokenizer.model is not a SentencePiece model" in found.notes[0]


@pytest.mark.parametrize(("largest", "fits"), [(None, True), (384, False), (1000, False)])
def test_the_largest_id_of_a_tokenizer_must_have_a_row(
    llama3_style: Path, tmp_path: Path, largest: int | None, fits: bool
) -> None:
    """Ids with a gap: as many tokens as rows, and one of them behind the last row."""
    folder = changed(llama3_style, tmp_path / "model")
    assert json.loads((folder / "config.json").read_text())["vocab_size"] == 384
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    vocab = tokenizer["model"]["vocab"]
    last = max(vocab, key=vocab.get)
    vocab[last] = vocab[last] if largest is None else largest
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    if fits:
        assert plan_conversion(folder, None).tokenizer.num_rows == 384
    else:
        with pytest.raises(CheckpointError, match=f"384 tokens with ids up to {largest}"):
            plan_conversion(folder, None)
