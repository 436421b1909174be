"""Flow files: every one of ours is sound, and what is wrong with another is told at once."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from repository import ROOT, missing_references

from steerlm_nemo.errors import ConfigError, InputError
from steerlm_nemo.pipeline import flow as flow_file
from steerlm_nemo.pipeline.flow import Flow, load_flow
from steerlm_nemo.pipeline.launcher import Size, SlurmJob, ThisMachine
from steerlm_nemo.pipeline.shell import shell_script

SCRIPT = ROOT / "scripts" / "flow.py"
STEPS = ROOT / "nemo_configs" / "flows" / "steps.yaml"
FLOWS = [path for path in sorted(STEPS.parent.glob("*.yaml")) if "stages" in (yaml.safe_load(path.read_text()) or {})]
FLOWS.remove(STEPS)
TOY = STEPS.with_name("toy.yaml")


def ours(path: Path, *settings: str) -> Flow:
    """One of our flows, what it requires being given."""
    required = [name for name, value in yaml.safe_load(path.read_text())["parameters"].items() if value == "???"]
    return load_flow(path, [*(f"{name}=given_{name}" for name in required), *settings])


def flow(*argv: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, SCRIPT, *map(str, argv)], capture_output=True, text=True)


@pytest.mark.parametrize("path", FLOWS, ids=lambda path: path.stem)
def test_every_stage_reads_what_is_given_or_what_an_earlier_one_writes(path: Path) -> None:
    made: set[Path] = set()
    for stage in ours(path).stages:
        for source in stage.inputs:
            known = source in made or any(source in written.parents for written in made)
            assert known or str(source).startswith("given_"), (stage.name, source)
        assert stage.about and all(stage.folder in output.parents for output in stage.outputs)
        made |= set(stage.outputs)


@pytest.mark.parametrize("path", [STEPS, *FLOWS], ids=lambda path: path.stem)
def test_the_header_says_how_to_run_it_and_names_things_that_exist(path: Path) -> None:
    text = path.read_text()
    header = text.split("\n\n")[0] if path == STEPS else text.split("\nuse:")[0]
    assert "python scripts/flow.py run nemo_configs/flows/" in header
    assert list(missing_references(text)) == []


def test_every_step_is_used_by_a_flow() -> None:
    used = {stage.name for path in FLOWS for stage in ours(path).stages}
    assert set(yaml.safe_load(STEPS.read_text())["stages"]) <= used


def test_the_flows_are_the_same_but_for_their_data() -> None:
    """One idea of the method: what is trained, cleaned and graded comes in one order everywhere."""
    names = {path.stem: [stage.name for stage in ours(path).stages] for path in FLOWS}
    common = names["llama2"]
    for name in ("toy", "oasst"):
        assert [stage for stage in names[name] if stage in common] == common


def test_the_guide_explains_every_key_and_its_example_is_a_flow(tmp_path: Path) -> None:
    guide = (ROOT / "docs" / "flows.md").read_text()
    (tmp_path / "mine.yaml").write_text(re.search(r"```yaml\n(.*?)```", guide, re.DOTALL)[1])  # type: ignore[index]
    (tmp_path / "steps.yaml").write_text(STEPS.read_text())
    mine = load_flow(tmp_path / "mine.yaml", ["hf_model=llama", "trees=t.jsonl", "lengths=1 2 3"])
    assert mine.stages[-1].commands[0][-4:] == ("--seq_len", "1", "2", "3")
    explained = set(re.findall(r"`(\w+)(?:: true)?`", guide.split("| key of a stage")[1].split("\n## ")[0]))
    assert set(flow_file._STAGE_KEYS) | set(flow_file._SERVER_KEYS) <= explained | {"name", "about"}


# --- parameters -----------------------------------------------------------------------------------------------------

SMALL = {
    "parameters": {"out": "results", "trees": "trees.jsonl", "more": [], "num": 3},
    "servers": {"value": {"run": "megatron_gpt_eval.py port={value.port}", "port": 1424}},
    "stages": [
        {
            "name": "first",
            "run": ["preprocessing.py --input_file={trees} --seed={num} {more}"],
            "inputs": ["{trees}"],
            "outputs": ["a.jsonl"],
        },
        {
            "name": "second",
            "run": ["data_clean.py --dataset_file={first}/a.jsonl"],
            "inputs": ["{first}/a.jsonl"],
            "outputs": ["b.jsonl"],
        },
    ],
}


@pytest.fixture
def small(tmp_path: Path):
    """Writes the small flow with changes; returns its file."""

    def write(*changes: tuple[str, object]) -> Path:
        steps = {**SMALL, "stages": {s["name"]: {k: v for k, v in s.items() if k != "name"} for s in SMALL["stages"]}}
        given: dict = {"use": "steps.yaml", "parameters": {}, "stages": ["first", "second"]}
        for key, value in changes:
            *above, last = key.split(".")
            target = steps if above and above[0] == "steps" else given
            for name in above[1:] if target is steps else above:
                target = target[name]
            target[last] = value
        (tmp_path / "steps.yaml").write_text(yaml.safe_dump(yaml.safe_load(yaml.safe_dump(steps))))
        (tmp_path / "small.yaml").write_text(yaml.safe_dump(given))
        return tmp_path / "small.yaml"

    return write


def test_parameters_of_the_command_line_win_over_the_flow_and_the_flow_over_its_steps(small) -> None:
    path = small(("parameters.num", 4), ("parameters.trees", "own.jsonl"))
    stage = load_flow(path, ["trees=my trees.jsonl", "more=--shuffle 'a b'"]).stages[0]
    expected = ("preprocessing.py", "--input_file=my trees.jsonl", "--seed=4", "--shuffle", "a b")
    assert stage.commands == (expected,)
    assert stage.inputs == (Path("my trees.jsonl"),) and stage.outputs == (Path("results/first/a.jsonl"),)


@pytest.mark.parametrize(
    ("changes", "settings", "told"),
    [
        ((), ["tree=x"], "unknown parameter tree; did you mean trees?"),
        ((), ["trees"], "'trees' is no setting; parameters are given as KEY=VALUE"),
        ([("parameters.trees", "???")], [], "parameter trees has no value; add trees=... to the command"),
        ([("parameters.trees", "{tree}")], [], "{tree} is no parameter and no stage; did you mean trees?"),
        ([("parameters.trees", "{num}"), ("parameters.num", "{trees}")], [], "given by itself: trees -> num -> trees"),
        ([("parameters.trees", ["a"])], [], "{trees} is a list; it can only stand as a word of its own"),
        ([("parameters.first", "x")], [], "first is a stage and a parameter"),
        ([("stages", ["first", "secnd"])], [], "stage 'secnd' is stated nowhere; did you mean second?"),
        ([("stages", ["first", "first"])], [], "stage first is there twice"),
        ([("stages", ["second", "first"])], [], "reads results/first/a.jsonl, which stage first makes after it"),
        ([("stage", [])], [], "unknown key stage; did you mean stages?"),
        ([("steps.stages.first.input", [])], [], "stage first: unknown key input; did you mean inputs?"),
        ([("steps.stages.first.run", [])], [], "stage first has nothing to run"),
        ([("steps.stages.first.run", "report.py")], [], "run is 'report.py'; a list of texts is needed"),
        ([("steps.stages.first.run", ["report.py 'a"])], [], "which a shell cannot split: No closing quotation"),
        ([("steps.stages.first.outputs", ["../a"])], [], "output results/first/../a is not in the stage's folder"),
        ([("steps.stages.first.outputs", ["/a"])], [], "output /a is not in the stage's folder"),
        ([("stages", [{"name": "../home", "run": []}])], [], "stage ../home: letters, digits, - and _ make a name"),
        ([("steps.stages.first.inputs", [3])], [], "inputs is [3]; a list of texts is needed"),
        ([("steps.stages.first", 3)], [], "steps.yaml: stages is "),
        ([("parameters", ["a"])], [], "small.yaml: parameters is ['a']; a mapping of texts"),
        ([("parameters.trees", None)], [], "a mapping of texts, numbers and lists of them is needed"),
        ([("use", 3)], [], "small.yaml: use is 3; a text is needed"),
        ([("stages", [{"run": []}])], [], "a list of names, or of mappings with a name is needed"),
        ((), ["more='a"], 'parameter more is "\'a", which a shell cannot split'),
        ([("steps.stages.first.run", ["rm -r /"])], [], "a command starts with a script of"),
        ([("steps.stages.first.servers", ["valu"])], [], "stage first: no server valu; did you mean value?"),
        ([("steps.stages.first.run", ["report.py {value.port}"])], [], "{value.port} is the port of a server that"),
        ([("steps.stages.first.nodes", "{trees}")], [], "stage first: nodes is 'trees.jsonl'; a number above 0"),
        ([("steps.stages.second.inputs", [])], [], "is told to read results/first/a.jsonl, but it is not among its"),
    ],
)
def test_what_is_wrong_is_told_with_its_place(small, changes, settings, told) -> None:
    path = small(*changes)
    with pytest.raises(ConfigError, match=re.escape(told)) as caught:
        load_flow(path, settings)
    assert str(path) in str(caught.value)


def test_all_that_is_wrong_is_told_together(small) -> None:
    with pytest.raises(ConfigError, match=r"(?s)unknown parameter tree.*stage 'third' is stated nowhere"):
        load_flow(small(("stages", ["first", "third"])), ["tree=x"])


@pytest.mark.parametrize(("text", "told"), [("a: [", "not valid YAML"), ("- a", "a mapping with")])
def test_what_is_no_flow_is_told(tmp_path: Path, text: str, told: str) -> None:
    (tmp_path / "flow.yaml").write_text(text)
    with pytest.raises(ConfigError, match=told):
        load_flow(tmp_path / "flow.yaml")


# --- choosing and printing ------------------------------------------------------------------------------------------


def test_stages_are_chosen_by_name(small) -> None:
    loaded = load_flow(small())
    assert [stage.name for stage in loaded.choose(only="first")] == ["first"]
    assert [stage.name for stage in loaded.choose(start="second")] == ["second"]
    with pytest.raises(InputError, match="flow small has no stage third; its stages are first, second"):
        loaded.choose(only="third")


def test_a_stage_whose_input_another_makes_is_not_run_without_it(small, tmp_path: Path) -> None:
    loaded = load_flow(small(), [f"out={tmp_path}/out"])
    with pytest.raises(InputError, match=r"a\.jsonl: no such file; stage second needs it, which stage first makes"):
        loaded.require_inputs(loaded.choose(only="second"))


def test_what_dry_run_prints_is_run_by_a_shell_and_makes_what_the_flow_makes(tmp_path: Path) -> None:
    settings = ["num_trees=60"]
    choice = {"toy": [f"out={tmp_path}/typed"], "run": [f"out={tmp_path}/run"]}
    shown = flow("run", TOY, *choice["toy"], *settings, "--dry-run")
    assert shown.returncode == 0, shown.stderr
    until_training = shown.stdout.split("\n# train-value")[0]
    subprocess.run(["bash", "-euo", "pipefail", "-c", until_training], check=True, capture_output=True)
    for stage in ("world", "base", "convert", "preprocess", "clean"):
        ran = flow("run", TOY, *choice["run"], *settings, "--only", stage)
        assert ran.returncode == 0 and f"[{stage}]" in ran.stdout, ran.stderr
    typed, ran = ((tmp_path / name / "clean" / "t2v_val.jsonl").read_bytes() for name in ("typed", "run"))
    assert typed == ran and typed.count(b"\n") > 20
    again = flow("run", TOY, *choice["run"], *settings, "--only=clean")
    assert again.returncode == 0 and "[clean] done before" in again.stdout


def test_dry_run_prints_servers_with_the_commands_they_are_for() -> None:
    shown = shell_script(ours(TOY).choose(only="annotate"), ThisMachine()).splitlines()
    assert shown[0].startswith("# annotate: ")
    assert shown[1].endswith("port=1424 trainer.devices=2 &") and "/health" in shown[2]
    assert all("--port_num=1424" in line for line in shown[3:5]) and shown[5] == "kill %1; wait"
    assert "{" not in "".join(shown)


@pytest.mark.parametrize("argv", [["--only=a", "--from=b"], ["--dryrun"]])
def test_flags_that_make_no_sense_are_refused(argv: list[str]) -> None:
    result = flow("run", FLOWS[0], *argv)
    assert result.returncode == 2 and "Traceback" not in result.stderr


def test_several_nodes_need_a_slurm_job(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match="takes a Slurm job"):
        ThisMachine().argv(["train_gpt_sft.py"], Size(nodes=2))
    monkeypatch.delenv("SLURMD_NODENAME", raising=False)
    with pytest.raises(InputError, match="start it with sbatch"):
        SlurmJob([])


def test_a_flow_needs_only_pyyaml_beside_the_standard_library(tmp_path: Path) -> None:
    """On a cluster the nodes have no training stack: it is in the image."""
    allowed = tmp_path / "allowed"
    allowed.mkdir()
    source = Path(yaml.__file__).parent
    (allowed / "yaml").symlink_to(source)
    if (source.parent / "_yaml").is_dir():
        (allowed / "_yaml").symlink_to(source.parent / "_yaml")
    result = subprocess.run(
        [sys.executable, "-S", SCRIPT, "run", TOY, f"out={tmp_path}/out", "--only=world", "num_trees=5"],
        env={**os.environ, "PYTHONPATH": f"{allowed}:{ROOT}"},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "out" / "world" / "trees.jsonl.gz").is_file()
