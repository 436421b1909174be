"""Every key of nemo_configs/ is read, or is accepted with a reason: a setting that does nothing says so."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from steerlm_nemo.accepted_keys import ACCEPTED
from steerlm_nemo.config import CONFIG_DIR, load_config
from steerlm_nemo.errors import ConfigError


def leaves(node: yaml.Node, prefix: str = "") -> Iterator[tuple[str, int]]:
    """Full key and line number, from 0, of every value in a YAML file; lists are values."""
    if not isinstance(node, yaml.MappingNode):
        yield prefix, node.start_mark.line
        return
    for key, value in node.value:
        yield from leaves(value, f"{prefix}.{key.value}".lstrip("."))


def lines_of(name: str) -> dict[str, str]:
    """Full key -> the line of nemo_configs/NAME.yaml that has its value."""
    text = (CONFIG_DIR / f"{name}.yaml").read_text()
    return {key: text.splitlines()[number] for key, number in leaves(yaml.compose(text))}


@pytest.mark.parametrize("name", ACCEPTED)
def test_the_file_marks_as_accepted_what_the_table_accepts_and_nothing_else(name: str) -> None:
    marked = {key for key, line in lines_of(name).items() if re.search("# accepted\\b", line)}
    assert marked == {*ACCEPTED[name]}
    assert all(row.why for row in ACCEPTED[name].values())


def test_a_value_that_would_do_nothing_is_refused_and_all_of_them_are_named() -> None:
    with pytest.raises(ConfigError) as err:
        load_config(["trainer.max_time=00:01:00:00", "model.data.sample=true", "trainer.devices=2"], "gpt_sft")
    first, second = str(err.value).splitlines()
    assert "trainer.max_time is '00:01:00:00', which would have no effect" in first
    assert "exp_manager.max_time_per_run limits a run. Leave it at null" in first
    assert second.startswith("model.data.sample is True")


@pytest.mark.parametrize(
    "override",
    [
        *("model.data.train_ds.add_eos=True", "model.data.train_ds.hf_dataset=True", "model.answer_only_loss=False"),
        *("model.data.validation_ds.index_mapping_dir=/indexmap_dir", "model.data.validation_ds.label_key=text"),
        *("exp_manager.log_step_timing=True", "model.save_nemo_on_validation_end=True", "model.ffn_dropout=0"),
    ],
)
def test_what_commands_for_aligner_carry_and_it_does_not_use_is_accepted(override: str) -> None:
    load_config([override], "gpt_sft")


def test_there_is_a_table_for_every_program(tmp_path: Path) -> None:
    """A config that lists its keys itself, rather than change another's, is a program's."""
    programs = {path.stem for path in CONFIG_DIR.glob("*.yaml") if "defaults" not in yaml.safe_load(path.read_text())}
    assert programs == {*ACCEPTED}
