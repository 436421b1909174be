"""A model's chat template goes into the `.nemo` and comes out again, from whichever place it was in."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from llamas import convert_quietly, export_quietly

from steerlm_nemo.checkpoint.archive import extract_nemo
from steerlm_nemo.checkpoint.chat_template import MAX_CHARACTERS, read_chat_template
from steerlm_nemo.checkpoint.from_hf import convert, plan_conversion
from steerlm_nemo.errors import CheckpointError

TEMPLATE = "{% for message in messages %}<|{{ message.role }}|>{{ message.content }}{% endfor %} 你好\n"
OTHER = "{{ messages }}"
NAMED = [{"name": "tool_use", "template": OTHER}, {"name": "default", "template": TEMPLATE}]


def with_template(source: Path, folder: Path, jinja: str | bytes | None, config: Any) -> Path:
    """A copy of a Hugging Face folder with a template in its file, in tokenizer_config.json, or in both."""
    shutil.copytree(source, folder)
    if jinja is not None:
        (folder / "chat_template.jinja").write_bytes(jinja if isinstance(jinja, bytes) else jinja.encode())
    path = folder / "tokenizer_config.json"
    raw = json.loads(path.read_text()) if path.is_file() else {}
    path.write_text(json.dumps(raw if config is None else {**raw, "chat_template": config}))
    return folder


@pytest.mark.parametrize("source_name", ["llama", "llama3_style"])
@pytest.mark.parametrize(
    ("jinja", "config", "expected"),
    [
        (TEMPLATE, None, TEMPLATE),
        (None, TEMPLATE, TEMPLATE),
        (TEMPLATE, OTHER, TEMPLATE),
        (None, NAMED, TEMPLATE),
        (None, NAMED[:1], None),
        (None, None, None),
        ("", None, None),
    ],
)
def test_a_chat_template_is_carried_and_read_as_transformers_reads_it(
    request: pytest.FixtureRequest,
    tmp_path: Path,
    source_name: str,
    jinja: str | None,
    config: Any,
    expected: str | None,
) -> None:
    from transformers import AutoTokenizer

    folder = with_template(request.getfixturevalue(source_name), tmp_path / "model", jinja, config)
    nemo = convert_quietly(folder, tmp_path / "model.nemo")
    assert read_chat_template(nemo) == expected
    assert read_chat_template(extract_nemo(nemo, tmp_path / "unpacked")) == expected
    back = export_quietly(nemo, tmp_path / "back")
    for name in ("chat_template.jinja", "tokenizer_config.json"):
        assert (back / name).exists() == (folder / name).exists()
        assert not (back / name).exists() or (back / name).read_bytes() == (folder / name).read_bytes()
    if expected is not None and source_name == "llama3_style":
        assert AutoTokenizer.from_pretrained(back).get_chat_template() == expected


@pytest.mark.parametrize(
    ("jinja", "config", "message"),
    [
        (b"\xff\xfe{{", None, r"chat_template\.jinja: not UTF-8"),
        ("x" * (MAX_CHARACTERS + 1), None, r"chat_template\.jinja: has 1048577 characters"),
        ("x" * (4 * MAX_CHARACTERS + 1), None, r"chat_template\.jinja: has 4194305 bytes"),
        (None, "x" * (MAX_CHARACTERS + 1), r"chat_template: has 1048577 characters"),
        ("version https://git-lfs.github.com/spec/v1\n", None, r"chat_template\.jinja: a pointer of git-lfs"),
        (None, 5, r"tokenizer_config\.json: chat_template is int, not a text"),
        (None, [1], r"chat_template is a list, but not one of names and templates"),
        (None, [{"name": "default", "template": {}}], r"chat_template is dict, not a text"),
    ],
)
def test_what_is_no_template_is_named_by_conversion_and_refused_where_it_is_wanted(
    llama: Path, tmp_path: Path, jinja: str | bytes | None, config: Any, message: str
) -> None:
    said: list[str] = []
    source = with_template(llama, tmp_path / "changed", jinja, config)
    convert(plan_conversion(source, None), tmp_path / "model.nemo", said.append)
    if "bytes" not in message:
        assert re.search(message, said[0]), said
    with pytest.raises(CheckpointError, match=message):
        read_chat_template(tmp_path / "model.nemo")


def test_templates_that_are_not_used_are_named(llama: Path, tmp_path: Path) -> None:
    source = with_template(llama, tmp_path / "model", None, NAMED[:1])
    (source / "additional_chat_templates").mkdir()
    (source / "additional_chat_templates" / "rag.jinja").write_text(OTHER)
    said: list[str] = []
    convert(plan_conversion(source, None), tmp_path / "model.nemo", said.append)
    assert "has no default template" in said[0] and "not carried over: additional_chat_templates (rag.jinja)" in said[1]
