"""The same weights in NeMo and in Hugging Face give the same logits, at TP 1 and 2.

And `.nemo` files pass between stock NeMo and this project in both directions, in every layout that either writes.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
import subprocess
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from llamas import FAMILY, LLAMA3_ROPE, ROOT, MakeLlama, convert_quietly, export_quietly
from safetensors.torch import load_file, save_file

from steerlm_nemo.checkpoint import mapping
from steerlm_nemo.checkpoint.archive import check_nemo, extract_nemo, open_nemo, write_nemo
from steerlm_nemo.checkpoint.inspect import inspect_nemo
from steerlm_nemo.checkpoint.llama_config import read_hf_config
from steerlm_nemo.checkpoint.weights import DistributedWeights
from steerlm_nemo.ranks import launch_ranks

pytest.importorskip("nemo", reason="needs the training stack: nemo_toolkit, megatron-core, nemo-aligner")

WORKER = ROOT / "tests/support/parity_worker.py"
STOCK_WORKER = ROOT / "tests/support/stock_worker.py"
TOLERANCE = 1e-4
LINEAR_ROPE = {"rope_type": "linear", "factor": 4.0}
CASES: dict[str, dict[str, Any]] = {
    "gqa": {},
    "mha": {"num_key_value_heads": 4},
    "one group per two": {"num_attention_heads": 8, "num_key_value_heads": 4},
    "tied": {"tie_word_embeddings": True},
    "linear rope": {"rope_scaling": LINEAR_ROPE, "rope_theta": 5e5},
    "llama3 rope": {"rope_scaling": LLAMA3_ROPE},
    "wide heads": {"head_dim": 32},
}
SAVED = ("gqa", "tied", "stories", *FAMILY)
KNOWN_TO_STOCK = ("mistral", "qwen2", "qwen3")  # beside Llamas, by keys of their own
# A `.nemo` with the same weights whose config lacks what its architecture has beside a Llama's.
WITHOUT = {
    "qwen2 without biases": ("qwen2", ("qkv_bias",)),
    "qwen3 without norms": ("qwen3", ("qk_layernorm",)),
    "mistral without window": ("mistral", ("window_size",)),
}
TOKEN_IDS = torch.randint(0, 300, (160,), generator=torch.Generator().manual_seed(0))


def hf_logits(folder: Path) -> torch.Tensor:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, torch_dtype=torch.float32, attn_implementation="eager")
    with torch.no_grad():
        return model(TOKEN_IDS.reshape(1, -1)).logits[0]


# Below, above and far above the window of `mistral`; a step of the engine takes 37 tokens.
PROMPTS = [TOKEN_IDS[:count].tolist() for count in (5, 30, 120)]
NUM_RESPONSE_TOKENS = 24


def responses_to(file: Path) -> dict[str, Any]:
    return {"prompts": PROMPTS, "num_tokens": NUM_RESPONSE_TOKENS, "file": str(file)}


def hf_responses(folder: Path) -> list[list[int]]:
    """Greedy, each token by a forward pass over all before it."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, torch_dtype=torch.float32, attn_implementation="eager")
    rows = [list(prompt) for prompt in PROMPTS]
    with torch.no_grad():
        for row in rows:
            for _ in range(NUM_RESPONSE_TOKENS):
                logits = model(torch.tensor([row]), use_cache=False).logits[0, -1, :-3]  # rows that no token has
                row.append(int(logits.argmax()))
    return [row[-NUM_RESPONSE_TOKENS:] for row in rows]


def nemo_without(nemo: Path, keys: tuple[str, ...], into: Path) -> Path:
    folder = extract_nemo(nemo, into)
    config = yaml.safe_load((folder / "model_config.yaml").read_text())
    (folder / "model_config.yaml").write_text(yaml.safe_dump({key: config[key] for key in config if key not in keys}))
    return folder


@pytest.fixture(scope="module", params=[1, 2], ids=["tp1", "tp2"])
def ran(
    request: pytest.FixtureRequest,
    make_llama: MakeLlama,
    family: dict[str, Path],
    stories: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[Path, dict[str, Path]]:
    """All cases through NeMo at one TP size, in one start of the ranks. Returns the folder and the HF folders."""
    folder = tmp_path_factory.mktemp(f"tp{request.param}")
    save_file({"text": TOKEN_IDS}, folder / "text.safetensors")
    expected = load_file(stories / "expected_logits.safetensors")
    save_file({key: ids for key, ids in expected.items() if key.endswith("input_ids")}, folder / "stories.safetensors")

    sources = {name: make_llama(**settings) for name, settings in CASES.items()}
    nemo_files = {name: convert_quietly(source, folder / f"{name}.nemo") for name, source in sources.items()}
    nemo_files["stories"] = convert_quietly(stories, folder / "stories.nemo")
    sources |= family
    nemo_files |= {name: convert_quietly(source, folder / f"{name}.nemo") for name, source in family.items()}
    nemo_files |= {name: nemo_without(nemo_files[of], keys, folder / name) for name, (of, keys) in WITHOUT.items()}
    with pytest.MonkeyPatch.context() as patch:
        swapped = {"q_norm": "k_norm", "k_norm": "q_norm"}
        wrong = tuple(
            dataclasses.replace(rule, hf=tuple(name.replace(part, swapped[part]) for name in rule.hf))
            if (part := next((norm for norm in swapped if norm in rule.hf[0]), ""))
            else rule
            for rule in mapping.RULES
        )
        patch.setattr(mapping, "RULES", wrong)
        nemo_files["qwen3 norms exchanged"] = convert_quietly(family["qwen3"], folder / "exchanged.nemo")
    with pytest.MonkeyPatch.context() as patch:
        wrong = tuple(
            # what converters are prone to: all queries, then all keys, then all values
            dataclasses.replace(rule, order=mapping.in_order) if rule.order is mapping.by_query_group else rule
            for rule in mapping.RULES
        )
        patch.setattr(mapping, "RULES", wrong)
        nemo_files["wrong order"] = convert_quietly(sources["gqa"], folder / "wrong order.nemo")
    tasks = [
        {
            "nemo": str(path),
            "token_ids": str(folder / ("stories.safetensors" if name == "stories" else "text.safetensors")),
            "logits": str(folder / f"{name}.logits"),
            "save": str(folder / f"{name}.saved") if name in SAVED else None,
            "gradients": str(folder / f"{name}.gradients") if name == "qwen3" else None,
            "responses": responses_to(folder / f"{name}.responses") if name in (*FAMILY, *WITHOUT) else None,
        }
        for name, path in nemo_files.items()
    ]
    stock = {form: str(folder / f"stock {form}.nemo") for form in ("torch_dist", "zarr")}
    text = {"token_ids": str(folder / "text.safetensors")}
    loaded_by_stock = text | {"nemo": str(nemo_files["gqa"]), "logits": str(folder / "by stock.logits"), "save": stock}
    of_family = [
        text | {"nemo": str(nemo_files[name]), "logits": str(folder / f"{name} by stock.logits"), "save": {}}
        for name in KNOWN_TO_STOCK
    ]
    (folder / "stock.json").write_text(json.dumps([loaded_by_stock, *of_family]))
    assert launch_ranks([str(STOCK_WORKER), str(folder / "stock.json")], request.param) == 0
    for form, path in stock.items():
        logits = str(folder / f"stock {form}.logits")
        nothing = dict.fromkeys(("save", "gradients", "responses"))
        tasks.append(text | nothing | {"nemo": path, "logits": logits})
    (folder / "tasks.json").write_text(json.dumps(tasks))
    assert launch_ranks([str(WORKER), str(folder / "tasks.json")], request.param) == 0
    return folder, sources


@pytest.mark.slow
@pytest.mark.parametrize("name", [*CASES, *FAMILY])
def test_nemo_and_transformers_agree(ran: tuple[Path, dict[str, Path]], name: str) -> None:
    folder, sources = ran
    ours = load_file(folder / f"{name}.logits")["text"]
    theirs = hf_logits(sources[name])
    difference = (ours[:, : theirs.shape[1]] - theirs).abs().max().item()
    assert difference <= TOLERANCE, difference
    assert theirs.abs().max() > 1  # logits that small differences would drown in


@pytest.mark.slow
def test_nemo_agrees_with_an_implementation_that_is_neither_torch_nor_nemo(
    ran: tuple[Path, dict[str, Path]], stories: Path
) -> None:
    folder, _ = ran
    ours, expected = load_file(folder / "stories.logits"), load_file(stories / "expected_logits.safetensors")
    for name, logits in ours.items():
        assert (logits - expected[name.replace("input_ids", "logits")]).abs().max().item() <= TOLERANCE, name


@pytest.mark.slow
def test_a_wrong_order_of_heads_does_not_pass(ran: tuple[Path, dict[str, Path]]) -> None:
    folder, sources = ran
    ours, theirs = load_file(folder / "wrong order.logits")["text"], hf_logits(sources["gqa"])
    assert (ours[:, : theirs.shape[1]] - theirs).abs().max().item() > 100 * TOLERANCE


@pytest.mark.slow
@pytest.mark.parametrize("name", [*WITHOUT, "qwen3 norms exchanged"])
def test_what_an_architecture_has_beside_a_llama_is_not_left_out(ran: tuple[Path, dict[str, Path]], name: str) -> None:
    """The controls: each of these converters would be refused by the bar."""
    folder, sources = ran
    ours, theirs = load_file(folder / f"{name}.logits")["text"], hf_logits(sources[name.partition(" ")[0]])
    assert (ours[:, : theirs.shape[1]] - theirs).abs().max().item() > 100 * TOLERANCE


@pytest.mark.slow
@pytest.mark.parametrize("name", KNOWN_TO_STOCK)
def test_stock_nemo_computes_the_same_from_every_architecture(ran: tuple[Path, dict[str, Path]], name: str) -> None:
    folder, sources = ran
    ours, theirs = load_file(folder / f"{name} by stock.logits")["text"], hf_logits(sources[name])
    assert (ours[:, : theirs.shape[1]] - theirs).abs().max().item() <= TOLERANCE


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILY)
def test_every_architecture_is_served_as_transformers_runs_it(ran: tuple[Path, dict[str, Path]], name: str) -> None:
    folder, sources = ran
    expected = hf_responses(sources[name])
    assert json.loads((folder / f"{name}.responses").read_text()) == expected
    for other, (of, _) in WITHOUT.items():  # the controls
        if of == name:
            assert json.loads((folder / f"{other}.responses").read_text()) != expected


@pytest.mark.slow
def test_the_gradients_of_query_and_key_norms_are_whole_on_every_rank(ran: tuple[Path, dict[str, Path]]) -> None:
    """Each rank has some of the heads: what one of them finds alone is a part, and another one on the next rank."""
    from transformers import AutoModelForCausalLM

    folder, sources = ran
    found = load_file(folder / "qwen3.gradients")
    model = AutoModelForCausalLM.from_pretrained(sources["qwen3"], torch_dtype=torch.float32)
    logits = model(TOKEN_IDS.reshape(1, -1)).logits[0]
    padding = (
        load_file(folder / "qwen3.logits")["text"].shape[1] - logits.shape[1]
    )  # Megatron sums over these rows, too
    logits = torch.nn.functional.pad(logits, (0, padding))
    torch.nn.functional.cross_entropy(logits[:-1], TOKEN_IDS[1:]).backward()
    is_split = int(folder.name[2]) > 1
    for kind in ("q", "k"):
        for layer in range(3):
            expected = getattr(model.model.layers[layer].self_attn, f"{kind}_norm").weight.grad
            assert torch.allclose(found[f"{layer}.{kind}_layernorm"], expected, atol=1e-5)
            of_one_rank = found[f"alone.{layer}.{kind}_layernorm"]
            assert torch.allclose(of_one_rank, expected, atol=1e-5) != is_split  # the control


def test_ignoring_rope_scaling_does_not_pass(make_llama: MakeLlama, tmp_path: Path) -> None:
    """The control of the rope cases: without its scaling each gives other logits."""
    for scaling in (LINEAR_ROPE, LLAMA3_ROPE):
        source = make_llama(rope_scaling=scaling)
        scaled = hf_logits(source)
        config = json.loads((source / "config.json").read_text())
        plain = shutil.copytree(source, tmp_path / scaling["rope_type"])
        (plain / "config.json").write_text(json.dumps({**config, "rope_scaling": None}))
        assert (hf_logits(plain) - scaled).abs().max().item() > 100 * TOLERANCE


@pytest.mark.slow
@pytest.mark.parametrize("name", SAVED)
def test_weights_that_nemo_saved_export_bit_for_bit(
    ran: tuple[Path, dict[str, Path]], stories: Path, tmp_path: Path, name: str
) -> None:
    folder, sources = ran
    staged = extract_nemo(folder / f"{name}.nemo", tmp_path / "staged")
    shutil.rmtree(staged / "model_weights")
    shutil.copytree(folder / f"{name}.saved", staged / "model_weights")
    write_nemo(staged, tmp_path / "saved.nemo")
    back = export_quietly(tmp_path / "saved.nemo", tmp_path / "back")
    before = load_file(sources.get(name, stories) / "model.safetensors")
    after = load_file(back / "model.safetensors")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gqa", *FAMILY])
def test_nemo_stores_the_keys_shapes_and_splits_of_the_table(ran: tuple[Path, dict[str, Path]], name: str) -> None:
    from steerlm_nemo.checkpoint.torch_dist import INDEX, parse_index

    folder, sources = ran
    with (folder / f"{name}.saved" / INDEX).open("rb") as file:
        stock = parse_index(file, "stock").tensors
    with open_nemo(folder / f"{name}.nemo") as nemo:
        ours = DistributedWeights(nemo).index.tensors
    assert {key: (t.dtype, t.shape) for key, t in stock.items()} == {key: (t.dtype, t.shape) for key, t in ours.items()}
    tp_size = int(folder.name[2])
    for rule in mapping.rules_for(read_hf_config(sources[name]).traits):
        chunk, shape = stock[rule.mcore].chunks[0].shape, stock[rule.mcore].shape
        split_axes = [axis for axis, size in enumerate(chunk) if size < shape[axis]]
        leading = 1 if rule.is_stacked else 0
        expected = [0] * leading  # one chunk per layer
        if rule.tp_axis is not None and (tp_size > 1 or "linear_fc1." in rule.mcore):
            expected.append(rule.tp_axis + leading)  # gate and up are chunks of their own at any TP
        assert split_axes == expected, rule.mcore


@pytest.mark.slow
@pytest.mark.parametrize("logits", ["by stock", "stock torch_dist", "stock zarr"])
def test_stock_nemo_loads_ours_and_ours_loads_what_stock_nemo_saves(
    ran: tuple[Path, dict[str, Path]], logits: str
) -> None:
    folder, sources = ran
    found, expected = load_file(folder / f"{logits}.logits")["text"], hf_logits(sources["gqa"])
    assert (found[:, : expected.shape[1]] - expected).abs().max().item() <= TOLERANCE


def layouts(folder: Path, tokenizer_json: Path, into: Path) -> Iterator[tuple[str, Path]]:
    """Every layout of a `.nemo` that stock NeMo, tar and this project produce."""
    archives = {
        "ours": folder / "gqa.nemo",
        "ours, tied": folder / "tied.nemo",
        "ours, tokenizer.json": tokenizer_json,
        "stock, torch_dist": folder / "stock torch_dist.nemo",
        "stock, zarr": folder / "stock zarr.nemo",
    }
    for number, (name, path) in enumerate(archives.items()):
        unpacked = into / f"folder {number}"
        with tarfile.open(path) as tar:
            tar.extractall(unpacked, filter="data")
        yield f"{name}, packed", path
        yield f"{name}, folder", unpacked
        zipped = into / f"{number}.nemo"
        with tarfile.open(zipped, "w:gz", compresslevel=1) as tar:
            tar.add(unpacked, arcname=".")
        yield f"{name}, gzip", zipped
        packed = into / f"gnu {number}.nemo"
        subprocess.run(["tar", "cf", packed, "-C", unpacked, "."], check=True)
        yield f"{name}, GNU tar", packed
    hashed = [f"{digits * 16}_tokenizer.model" for digits in ("b2", "a1")]
    for number in (3, 4):  # NeMo 1.21 stored the tokenizer twice; Transformer Engine adds its state to zarr
        twice = shutil.copytree(into / f"folder {number}", into / f"twice {number}")
        for name in hashed:
            shutil.copy(twice / "tokenizer.model", twice / name)
        (twice / "tokenizer.model").unlink()
        config = twice / "model_config.yaml"
        config.write_text(config.read_text().replace("nemo:tokenizer.model", f"nemo:{hashed[0]}"))
        state = twice / "model_weights" / "model.decoder.layers.mlp.linear_fc1._extra_state"
        state.mkdir(exist_ok=True)
        torch.save(None, state / "shard_0_3.pt")
        yield f"two tokenizers {number}, folder", twice
        write_nemo(twice, into / f"twice {number}.nemo")
        yield f"two tokenizers {number}, packed", into / f"twice {number}.nemo"
    renamed = shutil.copytree(into / "twice 3", into / "renamed")  # as the reference's guide does after extraction
    (renamed / hashed[0]).rename(renamed / "tokenizer.model")
    (renamed / hashed[1]).unlink()
    yield "renamed tokenizer, folder", renamed


@pytest.mark.slow
def test_no_genuine_layout_is_refused(ran: tuple[Path, dict[str, Path]], llama3_style: Path, tmp_path: Path) -> None:
    folder, sources = ran
    tokenizer_json = convert_quietly(llama3_style, tmp_path / "tokenizer json.nemo")
    expected = {"ours, tied": sources["tied"], "ours, tokenizer.json": llama3_style}
    opened = []
    for name, path in layouts(folder, tokenizer_json, tmp_path):
        config = check_nemo(path)
        with open_nemo(path) as nemo:
            assert nemo.resolve(config["tokenizer"]["model"]) is not None, name
            assert (nemo.dir / "model_weights").is_dir(), name
        facts = inspect_nemo(path, verify=True)
        assert facts["damage"] == [], name
        assert facts["weights"]["tensor_parallel_ranks"] == (1 if name.startswith("ours") else int(folder.name[2])), (
            name
        )
        back = export_quietly(path, tmp_path / "back" / name)
        source = expected.get(name.rpartition(", ")[0], sources["gqa"])
        before, after = load_file(source / "model.safetensors"), load_file(back / "model.safetensors")
        assert before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before), name
        opened.append(name)
    assert len(set(opened)) == 25
