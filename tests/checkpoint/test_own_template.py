"""What a `.nemo` that was converted from an instruct model says about its chat template, for a server to use."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from llamas import convert_quietly

from steerlm_nemo.checkpoint.archive import open_nemo
from steerlm_nemo.checkpoint.tokenizer_files import load_tokenizer
from steerlm_nemo.errors import CheckpointError
from steerlm_nemo.models.own_template import own_template_of
from steerlm_nemo.own_template.own import OwnTemplate


def own(source: Path, folder: Path, ends: Any, **settings: Any) -> OwnTemplate | None:
    """Of the source, converted with these files beside its weights."""
    shutil.copytree(source, folder / "model")
    (folder / "model" / "generation_config.json").write_text(json.dumps({"eos_token_id": ends}))
    path = folder / "model" / "tokenizer_config.json"
    raw = json.loads(path.read_text()) if path.is_file() else {}
    path.write_text(json.dumps({**raw, **settings}))
    with open_nemo(convert_quietly(folder / "model", folder / "model.nemo")) as nemo:
        return own_template_of(nemo, load_tokenizer(nemo))


def test_the_ends_of_generation_config_and_the_names_of_tokens_are_carried(llama3_style: Path, tmp_path: Path) -> None:
    found = own(llama3_style, tmp_path, [382, 383], chat_template="{{ bos_token }}")
    assert found is not None and (found.source, found.end_ids) == ("{{ bos_token }}", (382, 383))
    assert found.names["bos_token"] == "<|begin_of_text|>" and found.names["eos_token"] == "<|end_of_text|>"


def test_with_sentencepiece_the_config_names_the_tokens_or_the_model_does(llama: Path, tmp_path: Path) -> None:
    config = {"eos_token": {"content": "[END]", "special": True}, "add_bos_token": True, "legacy": False}
    found = own(llama, tmp_path, 2, chat_template="x", **config)
    assert found is not None and not found.spaced and found.end_ids == (2,)
    assert found.names == {"bos_token": "<s>", "eos_token": "[END]", "unk_token": "<unk>"}
    (tmp_path / "other").mkdir()
    found = own(llama, tmp_path / "other", None, chat_template="x")
    assert found is not None and found.spaced and found.end_ids == () and found.names["eos_token"] == "</s>"


def test_without_a_template_there_is_none_and_ends_that_are_no_ids_are_refused(llama: Path, tmp_path: Path) -> None:
    assert own(llama, tmp_path, 2) is None
    (tmp_path / "other").mkdir()
    with pytest.raises(CheckpointError, match=r"eos_token_id has '</s>'; it must be the id of a token"):
        own(llama, tmp_path / "other", ["</s>"], chat_template="x")
