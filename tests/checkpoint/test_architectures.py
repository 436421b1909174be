"""Which model classes convert, what their rows say, and what is said of those that do not."""

from __future__ import annotations

import importlib.util
import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from llamas import FAMILY, MakeLlama, convert_quietly, export_quietly
from safetensors.torch import load_file

from steerlm_nemo.checkpoint.architectures import BY_NAME, LLAMAS_UNDER_ANOTHER_NAME, REFUSED, architecture_of
from steerlm_nemo.checkpoint.archive import extract_nemo, read_config
from steerlm_nemo.checkpoint.from_hf import convert, plan_conversion
from steerlm_nemo.errors import CheckpointError, ConfigError
from steerlm_nemo.models.loading import check_parallelism
from steerlm_nemo.models.logits_check import transformers_logits

TOKEN_IDS = torch.arange(3, 203).reshape(1, -1)


def changed(source: Path, folder: Path, without: tuple[str, ...] = (), **config: Any) -> Path:
    """A copy of a Hugging Face folder with other entries in its config.json."""
    shutil.copytree(source, folder)
    path = folder / "config.json"
    raw = {key: value for key, value in json.loads(path.read_text()).items() if key not in without}
    path.write_text(json.dumps(raw | config))
    return folder


def logits(folder: Path) -> torch.Tensor:
    from transformers import AutoModelForCausalLM

    with torch.no_grad():
        return AutoModelForCausalLM.from_pretrained(folder)(TOKEN_IDS).logits


@pytest.mark.parametrize("name", FAMILY)
def test_every_architecture_comes_back_as_the_class_it_was_bit_for_bit(
    family: dict[str, Path], tmp_path: Path, name: str
) -> None:
    back = export_quietly(convert_quietly(family[name], tmp_path / "model.nemo"), tmp_path / "back")
    before, after = load_file(family[name] / "model.safetensors"), load_file(back / "model.safetensors")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)
    one, other = (json.loads((folder / "config.json").read_text()) for folder in (family[name], back))
    assert {key: other[key] for key in one if key not in ("torch_dtype", "rope_scaling")}.items() >= {
        key: one[key] for key in ("architectures", "model_type", "num_key_value_heads", "tie_word_embeddings")
    }.items()
    assert torch.equal(logits(family[name]), logits(back))


@pytest.mark.parametrize("name", FAMILY)
def test_a_model_of_which_no_source_is_known_is_exported_as_what_computes_the_same(
    family: dict[str, Path], tmp_path: Path, name: str
) -> None:
    """As stock NeMo's own converters leave it: without `hf_checkpoint`."""
    import yaml

    folder = extract_nemo(convert_quietly(family[name], tmp_path / "model.nemo"), tmp_path / "folder")
    config = yaml.safe_load((folder / "model_config.yaml").read_text())
    rows = config.pop("hf_checkpoint")["config"]["vocab_size"]
    (folder / "model_config.yaml").write_text(yaml.safe_dump(config))
    back = export_quietly(folder, tmp_path / "back")
    exported = json.loads((back / "config.json").read_text())
    assert exported["architectures"][0] == {"phi3": "LlamaForCausalLM"}.get(
        name, json.loads((family[name] / "config.json").read_text())["architectures"][0]
    )
    ours, theirs = logits(back), logits(family[name])
    known = min(exported["vocab_size"], rows)  # rows that no token has are not known either
    assert torch.allclose(ours[..., :known], theirs[..., :known], atol=1e-5)


@pytest.mark.parametrize("name", FAMILY)
@pytest.mark.parametrize("absent", [(), ("head_dim", "torch_dtype")])
def test_the_reference_of_every_architecture_is_what_transformers_makes_of_the_folder(
    family: dict[str, Path], tmp_path: Path, name: str, absent: tuple[str, ...]
) -> None:
    """The comparison of logits computes with the config that we read."""
    from transformers import AutoModelForCausalLM

    raw = json.loads((family[name] / "config.json").read_text())
    heads = raw["hidden_size"] // raw["num_attention_heads"]
    can_go = [key for key in absent if key != "head_dim" or raw.get("head_dim", heads) == heads]
    folder = changed(family[name], tmp_path / "model", tuple(can_go))
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager", torch_dtype=torch.float32)
    with torch.no_grad():
        expected = model(TOKEN_IDS).logits[0]
    assert torch.equal(transformers_logits(folder, TOKEN_IDS[0], torch.float32), expected)


@pytest.mark.parametrize("name", LLAMAS_UNDER_ANOTHER_NAME)
def test_a_llama_by_another_name_is_one(llama: Path, tmp_path: Path, name: str) -> None:
    code = {"AutoModelForCausalLM": "modeling_theirs.TheirModel"}
    folder = changed(llama, tmp_path / "model", architectures=[name], model_type="theirs", auto_map=code)
    said: list[str] = []
    convert(plan_conversion(folder, None), tmp_path / "model.nemo", said.append)
    assert said[0].startswith(f"NOTE: {name} is converted as the LlamaForCausalLM that it is")
    assert "auto_map" in said[1]
    back = export_quietly(tmp_path / "model.nemo", tmp_path / "back")
    exported = json.loads((back / "config.json").read_text())
    assert (exported["architectures"], exported["model_type"]) == (["LlamaForCausalLM"], "llama")
    assert "auto_map" not in exported
    assert torch.equal(logits(back), logits(llama))
    shorter = changed(folder, tmp_path / "shorter", ("rms_norm_eps",))
    with pytest.raises(CheckpointError, match="rms_norm_eps is missing"):  # what theirs would be is not known
        plan_conversion(shorter, None)


@pytest.mark.parametrize(
    ("architecture", "reason"),
    [
        ("GraniteForCausalLM", "factors of its own"),
        ("SmolLM3ForCausalLM", "no rotary positions"),
        ("MixtralForCausalLM", "mixture of experts"),
        ("Gemma2ForCausalLM", "scales its embeddings"),
        ("InternLM2ForCausalLM", "Copies saved as LlamaForCausalLM convert"),
        ("SomethingMoeForCausalLM", "mixture of experts"),
        ("LlamaForSequenceClassification", "classification head"),
        ("MistralModel", "no output layer"),
        ("LlavaForConditionalGeneration", "images"),
        ("NextYearForCausalLM", "nothing is known here of that class"),
    ],
)
def test_what_is_no_llama_is_refused_with_the_reason(
    llama: Path, tmp_path: Path, architecture: str, reason: str
) -> None:
    folder = changed(llama, tmp_path / "model", architectures=[architecture])
    with pytest.raises(CheckpointError) as refusal:
        plan_conversion(folder, None)
    message = str(refusal.value)
    assert f"architectures is ['{architecture}']" in message and reason in message
    assert all(known in message for known in BY_NAME)  # what to look for instead


def test_a_config_without_a_class_is_told_the_likely_one(llama: Path, tmp_path: Path) -> None:
    folder = changed(llama, tmp_path / "model", ("architectures",), model_type="qwen2")
    with pytest.raises(CheckpointError, match=r'write "architectures": \["Qwen2ForCausalLM"\]'):
        plan_conversion(folder, None)


def test_every_class_of_transformers_that_looks_like_a_llama_is_decided_on() -> None:
    """Those with Llama's names of tensors: each is in the table, or refused with a reason."""
    spec = importlib.util.find_spec("transformers")
    if spec is None or spec.origin is None:
        pytest.skip("needs transformers")
    decided = {*BY_NAME, *REFUSED, *LLAMAS_UNDER_ANOTHER_NAME}
    undecided = []
    others = re.compile("Kwargs|^Flax|^TF|^Csm|^Mllama")  # type aliases, other frameworks, parts of larger models
    for path in sorted(Path(spec.origin).parent.glob("models/*/modeling_*.py")):
        text = path.read_text(encoding="utf-8")
        if all(f"self.{name}" in text for name in ("input_layernorm", "gate_proj", "q_proj", "lm_head")):
            undecided += [name for name in re.findall(r"^class (\w+ForCausalLM)\(", text, re.M) if name not in decided]
    assert [name for name in undecided if not others.search(name)] == []
    with pytest.raises(ValueError, match="nothing is known"):  # the control
        architecture_of({"architectures": ["FakeForCausalLM"]})


@pytest.mark.parametrize(
    ("config", "window"),
    [
        ({"use_sliding_window": False, "sliding_window": 8, "max_window_layers": 0}, None),
        ({"use_sliding_window": True, "sliding_window": None, "max_window_layers": 0}, None),
        ({"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 0}, 8),
        ({"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 3}, None),
        (
            {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 2},
            "from layer max_window_layers 2 of 3",
        ),
        ({"layer_types": ["full_attention"] * 3}, None),
        ({"layer_types": ["full_attention", "sliding_attention", "full_attention"]}, "layer_types is"),
        ({"layer_types": ["sliding_attention"] * 3}, "say that the window is None"),
        ({"layer_types": 7}, "layer_types is 7"),
    ],
)
def test_a_window_of_qwen_is_what_all_layers_have(
    family: dict[str, Path], tmp_path: Path, config: dict[str, Any], window: int | str | None
) -> None:
    folder = changed(family["qwen2"], tmp_path / "model", **config)
    if isinstance(window, str):
        with pytest.raises(CheckpointError, match=window):
            plan_conversion(folder, None)
        return
    convert_quietly(folder, tmp_path / "model.nemo")
    assert read_config(tmp_path / "model.nemo").get("window_size") == (window and [window - 1, 0])
    back = export_quietly(tmp_path / "model.nemo", tmp_path / "back")
    assert json.loads((back / "config.json").read_text()).items() >= config.items()


@pytest.mark.parametrize(
    ("name", "config", "message"),
    [
        ("qwen3", {"attention_bias": True}, "attention_bias is true and mlp_bias is not"),
        ("all biases", {"mlp_bias": False}, "attention_bias is true and mlp_bias is not"),
        ("mistral", {"attention_bias": True}, "MistralForCausalLM does not read it"),
        ("mistral", {"sliding_window": "many"}, "sliding_window is 'many'"),
        ("mistral", {"sliding_window": 0}, "sliding_window is 0"),
        ("phi3", {"partial_rotary_factor": 0.75}, "partial_rotary_factor is 0.75"),
        ("qwen2", {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "rope type is 'yarn'"),
    ],
)
def test_what_nemo_cannot_express_of_an_architecture_is_refused_by_name(
    family: dict[str, Path], tmp_path: Path, name: str, config: dict[str, Any], message: str
) -> None:
    folder = changed(family[name], tmp_path / "model", **config)
    with pytest.raises(CheckpointError, match=message):
        plan_conversion(folder, None)


@pytest.mark.parametrize(
    ("name", "left_out"),
    [
        ("qwen2", "model.layers.1.self_attn.k_proj.bias"),
        ("qwen3", "model.layers.1.self_attn.q_norm.weight"),
        ("phi3", "model.layers.1.self_attn.qkv_proj.weight"),
        ("all biases", "model.layers.1.mlp.down_proj.bias"),
    ],
)
def test_a_tensor_that_an_architecture_has_is_missed(
    family: dict[str, Path], tmp_path: Path, name: str, left_out: str
) -> None:
    from safetensors.torch import save_file

    folder = changed(family[name], tmp_path / "model")
    tensors = load_file(folder / "model.safetensors")
    del tensors[left_out]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=rf"{re.escape(left_out)} is missing"):
        plan_conversion(folder, None)


def test_nine_heads_in_three_groups_are_for_three_ranks(make_llama: MakeLlama, tmp_path: Path) -> None:
    """SmolLM2-135M's: two ranks cannot share them."""
    source = make_llama(num_attention_heads=9, num_key_value_heads=3, hidden_size=72)
    said: list[str] = []
    convert(plan_conversion(source, None), tmp_path / "model.nemo", said.append)
    assert said[-1].endswith("(the same at TP 1 and 3)")
    config = read_config(tmp_path / "model.nemo")
    with pytest.raises(ConfigError, match=r"2 does not divide .* num_attention_heads 9; this model takes 1 or 3"):
        check_parallelism(config, 2, 1, 2)
    check_parallelism(config, 3, 1, 3)


@pytest.mark.parametrize("tp_size", [3, 5, 6])
def test_a_size_that_divides_the_heads_but_not_the_vocabulary_is_refused_by_name(tp_size: int) -> None:
    sizes = {"num_attention_heads": 60, "num_query_groups": 60, "ffn_hidden_size": 120, "hf_checkpoint": {}}
    with pytest.raises(ConfigError, match="another number of rows than it has; this model takes 1 or 2 or 4"):
        check_parallelism(sizes, tp_size, 1, tp_size)
    check_parallelism(sizes, 4, 1, 4)
