"""`inspect_nemo.py` on sound and on damaged files."""

from __future__ import annotations

import json
import random
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any

import pytest
import yaml
from llamas import ROOT
from version_1 import stored_format

from steerlm_nemo.attributes import NEMO12_LANG
from steerlm_nemo.checkpoint.archive import extract_nemo, open_nemo, write_nemo
from steerlm_nemo.checkpoint.inspect import inspect_nemo
from steerlm_nemo.model_kind import GRADER, SteerLMFormat
from steerlm_nemo.template import EXTRA_ID_TEMPLATE


def run(*args: str | Path) -> subprocess.CompletedProcess[str]:
    script = ROOT / "scripts" / "inspect_nemo.py"
    return subprocess.run([sys.executable, script, *args], capture_output=True, text=True, check=False)


def test_a_sound_file_is_described(llama_nemo: Path) -> None:
    facts = inspect_nemo(llama_nemo, verify=True)
    assert facts["damage"] == []
    assert facts["architecture"]["num_layers"] == 3 and facts["architecture"]["num_query_groups"] == 2
    rows = facts["weights"]["tensors"]["model.embedding.word_embeddings.weight"][0]
    per_layer = 64 * (2 * 64 + 2 * 32) + 3 * 64 * 96 + 2 * 64
    assert facts["weights"]["num_parameters"] == 2 * rows * 64 + 3 * per_layer + 64
    assert facts["weights"]["dtypes"] == ["float32"] and facts["weights"]["num_not_finite"] == 0
    assert facts["weights"]["checksums"] == "CRC-32 of every chunk agrees"
    assert facts["weights"]["tensor_parallel_ranks"] == 1
    assert facts["tokenizer"]["member"] == "tokenizer.model"
    assert facts["converted_from"]["config"]["architectures"] == ["LlamaForCausalLM"]
    assert facts["steerlm"] is None
    assert len(facts["members"]["model_weights/__0_0.distcp"]["sha256"]) == 64


def test_the_format_and_origin_of_a_trained_model_are_shown(llama_nemo: Path, tmp_path: Path) -> None:
    staged = extract_nemo(llama_nemo, tmp_path / "staged")
    config = yaml.safe_load((staged / "model_config.yaml").read_text())
    stored = SteerLMFormat(EXTRA_ID_TEMPLATE, NEMO12_LANG, GRADER).to_dict()
    config |= {"steerlm": stored, "steerlm_provenance": {"name": "judge", "base": "llama.nemo", "seed": 1234}}
    (staged / "model_config.yaml").write_text(yaml.safe_dump(config))
    write_nemo(staged, tmp_path / "value.nemo")
    facts = inspect_nemo(tmp_path / "value.nemo", verify=False)
    assert facts["damage"] == [] and facts["steerlm"] == stored
    shown = run(tmp_path / "value.nemo").stdout
    for text in (
        "judge",
        "grader: a value model, which grades by writing; it can generate, grade, lines",
        "nemo12+lang",
        "quality:0-4",
        "<extra_id_1>",
        stored["digest"],
        "llama.nemo",
    ):
        assert text in shown


def test_json_output_is_json_and_a_sound_file_exits_with_zero(llama_nemo: Path) -> None:
    done = run(llama_nemo, "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["damage"] == []


def drop(name: str) -> Any:
    return lambda folder: (folder / name).unlink()


def cut(folder: Path) -> None:
    path = folder / "model_weights" / "__0_0.distcp"
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip_bits(folder: Path) -> None:
    """Bits inside tensor data, such that they are no numbers."""
    with open_nemo(folder) as nemo:
        from steerlm_nemo.checkpoint.weights import DistributedWeights

        chunk = DistributedWeights(nemo).index.tensors["model.embedding.word_embeddings.weight"].chunks[0]
    path = folder / "model_weights" / chunk.file
    data = bytearray(path.read_bytes())
    middle = chunk.start + chunk.num_bytes // 2
    data[middle : middle + 64] = b"\xff" * 64
    path.write_bytes(data)


def flip_one_bit(folder: Path) -> None:
    """The least significant bit of one weight: as good a number as the right one."""
    with open_nemo(folder) as nemo:
        from steerlm_nemo.checkpoint.weights import DistributedWeights

        chunk = DistributedWeights(nemo).index.tensors["model.embedding.word_embeddings.weight"].chunks[0]
    path = folder / "model_weights" / chunk.file
    data = bytearray(path.read_bytes())
    data[chunk.start + chunk.num_bytes // 2] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (drop("model_config.yaml"), "has no model_config.yaml"),
        (drop("model_weights/.metadata"), "expected model_weights/.metadata or zarr arrays"),
        (drop("model_weights/__0_0.distcp"), "has no member model_weights/__0_0.distcp"),
        (drop("tokenizer.model"), "the tokenizer 'nemo:tokenizer.model' of model_config.yaml is not in it"),
        (lambda folder: (folder / "tokenizer.model").write_bytes(b"junk"), "not a SentencePiece model"),
        (lambda folder: (folder / "model_config.yaml").write_text("a: ["), "not valid YAML"),
        (lambda folder: (folder / "model_weights" / ".metadata").write_bytes(b"junk"), "not a readable pickle"),
        (cut, "__0_0.distcp: model."),
        (flip_bits, "weights are NaN or infinite"),
        (flip_one_bit, "model.embedding.word_embeddings.weight is not what was written: its CRC-32 differs"),
    ],
)
def test_damage_is_named_and_the_rest_is_still_shown(
    llama_nemo: Path, tmp_path: Path, damage: Any, message: str
) -> None:
    folder = extract_nemo(llama_nemo, tmp_path / "folder")
    damage(folder)
    facts = inspect_nemo(folder, verify=True)
    assert any(message in problem for problem in facts["damage"]), facts["damage"]
    # Whatever is broken, the other half is still described.
    assert facts.get("architecture") or facts.get("weights")
    assert len(facts["members"]) >= 5


def test_a_file_that_is_cut_off_exits_with_a_message(llama_nemo: Path, tmp_path: Path) -> None:
    path = tmp_path / "model.nemo"
    path.write_bytes(llama_nemo.read_bytes()[:100_000])
    done = run(path)
    assert done.returncode == 2 and "the file ends before" in done.stdout and "Traceback" not in done.stderr


def test_a_file_from_elsewhere_is_described_without_our_additions(llama_nemo: Path, tmp_path: Path) -> None:
    staged = extract_nemo(llama_nemo, tmp_path / "staged")
    config = yaml.safe_load((staged / "model_config.yaml").read_text())
    del config["hf_checkpoint"]
    name = f"{'c3' * 16}_tokenizer.model"
    config["tokenizer"]["model"] = f"nemo:{name}"
    (staged / "model_config.yaml").write_text(yaml.safe_dump(config))
    shutil.move(staged / "tokenizer.model", staged / name)
    with tarfile.open(tmp_path / "stock.nemo", "w:") as tar:
        tar.add(staged, arcname=".")
    facts = inspect_nemo(tmp_path / "stock.nemo", verify=False)
    assert facts["damage"] == [] and facts["converted_from"] is None and facts["tokenizer"]["member"] == name


def test_a_tokenizer_that_is_not_packed_is_damage(llama_nemo: Path, tmp_path: Path) -> None:
    staged = extract_nemo(llama_nemo, tmp_path / "staged")
    config = (staged / "model_config.yaml").read_text()
    (staged / "model_config.yaml").write_text(config.replace("nemo:tokenizer.model", "/home/somebody/tokenizer.model"))
    facts = inspect_nemo(staged, verify=False)
    assert any("'/home/somebody/tokenizer.model' of model_config.yaml is not in it" in text for text in facts["damage"])


def test_no_flipped_byte_ends_in_a_traceback(llama_nemo: Path, tmp_path: Path) -> None:
    chance = random.Random(0)
    whole = llama_nemo.read_bytes()
    path = tmp_path / "model.nemo"
    num_damaged = 0
    for _ in range(150):
        data = bytearray(whole)
        for _ in range(chance.choice([1, 3, 10])):
            near = chance.choice([0, len(data) - 20_000])  # headers, config and tokenizer; index and common.pt
            data[near + chance.randrange(20_000)] = chance.randrange(256)
        path.write_bytes(data)
        num_damaged += bool(inspect_nemo(path, verify=False)["damage"])
    assert num_damaged > 30


def test_a_format_of_version_1_is_shown_as_the_kind_its_records_made(llama_nemo: Path, tmp_path: Path) -> None:
    config = extract_nemo(llama_nemo, tmp_path / "old.nemo") / "model_config.yaml"
    config.write_text(yaml.safe_dump({**yaml.safe_load(config.read_text()), "steerlm": stored_format()}))
    facts = inspect_nemo(tmp_path / "old.nemo", verify=False)
    assert facts["damage"] == [] and facts["steerlm"]["kind"] == "grader" and facts["name"] == "old"


def test_an_export_says_what_stays_behind(llama_nemo: Path, tmp_path: Path) -> None:
    config = extract_nemo(llama_nemo, tmp_path / "old.nemo") / "model_config.yaml"
    config.write_text(yaml.safe_dump({**yaml.safe_load(config.read_text()), "steerlm": stored_format()}))
    script = ROOT / "scripts" / "convert_nemo_to_hf_llama.py"
    command = [sys.executable, script, "--in-file", tmp_path / "old.nemo", "--out-file", tmp_path / "hf"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "this is a value model, which grades by writing; its markers and attribute schema helpsteer5" in done.stdout
