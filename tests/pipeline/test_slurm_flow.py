"""The Slurm script, run by bash against a stand-in for `srun` and `scontrol`."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from steerlm_nemo.training.resume import EXIT_STOPPED_EARLY

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "containers" / "slurm" / "steerlm_flow.sbatch"
TERMINATED = 128 + 15
STAGES = [
    "convert_hf_llama_to_nemo.py",
    "preprocessing.py",
    *["data_clean.py"] * 2,
    "train_gpt_sft.py",  # value model
    "megatron_gpt_eval.py",
    *["attribute_annotate.py"] * 2,
    *["data_clean.py"] * 2,
    "train_gpt_sft.py",  # SteerLM model
]


class Cluster:
    """One node with two GPUs that are not there."""

    def __init__(self, folder: Path) -> None:
        self.work, self.log, self.requeued = folder / "work", folder / "calls.jsonl", folder / "requeued"
        commands = folder / "bin"
        commands.mkdir()
        self._command(commands / "srun", f'exec "{sys.executable}" "{ROOT}/tests/support/fake_srun.py" "$@"')
        self._command(commands / "scontrol", f'echo "$@" >> "{self.requeued}"')
        self._command(commands / "python", f'exec "{sys.executable}" "$@"')
        self.llama, self.trees = folder / "llama", folder / "trees.jsonl.gz"
        self.env = {
            **{name: value for name, value in os.environ.items() if not name.startswith("SLURM_")},
            "PATH": f"{commands}:{os.environ['PATH']}",
            "FAKE_SRUN_LOG": str(self.log),
            **{"SLURM_JOB_ID": "4711", "SLURM_JOB_NAME": "steerlm", "SLURMD_NODENAME": "node1"},
            "PYTHON": sys.executable,
            **{"SLURM_NNODES": "1", "SLURM_NTASKS_PER_NODE": "2"},
            **{"IMAGE": "image.sqsh", "WORK": str(self.work)},
            **{"HF_MODEL": str(self.llama), "TREES": str(self.trees)},
        }

    @staticmethod
    def _command(path: Path, body: str) -> None:
        path.write_text(f"#!/bin/sh\n{body}\n")
        path.chmod(0o755)

    def run(self, **env: str) -> subprocess.CompletedProcess[str]:
        self.log.write_text("")
        return subprocess.run(["bash", SCRIPT], cwd=ROOT, env={**self.env, **env}, capture_output=True, text=True)

    def calls(self, ended: bool = False) -> list[dict[str, Any]]:
        calls = [json.loads(line) for line in self.log.read_text().splitlines()]
        return [call for call in calls if ("code" in call) == ended]

    def scripts(self) -> list[str]:
        return [Path(call["command"][1]).name for call in self.calls()]


@pytest.fixture
def cluster(tmp_path: Path) -> Cluster:
    cluster = Cluster(tmp_path)
    cluster.llama.mkdir()
    (cluster.llama / "tokenizer.model").touch()
    cluster.trees.touch()
    return cluster


def pretending(**codes: int) -> str:
    return json.dumps({f"{name}.py": code for name, code in codes.items()})


def test_the_stages_run_in_the_order_of_the_method_and_finished_ones_are_skipped(cluster: Cluster) -> None:
    first = cluster.run(FAKE_SRUN_CODES=pretending())
    assert first.returncode == 0, first.stderr
    assert cluster.scripts() == STAGES
    steerlm = cluster.work / "train-steerlm" / "checkpoints" / "megatron_gpt_sft.nemo"
    manifest = json.loads((cluster.work / "manifest.json").read_text())
    assert all(stage["done"] for stage in manifest["stages"].values())
    assert str(steerlm) in manifest["stages"]["train-steerlm"]["outputs"]

    steerlm.unlink()
    (cluster.work / "clean-annotated" / "v2t_val.jsonl").unlink()
    again = cluster.run(FAKE_SRUN_CODES=pretending())
    assert again.returncode == 0, again.stderr
    assert cluster.scripts() == ["data_clean.py", "data_clean.py", "train_gpt_sft.py"]


def test_trainings_get_a_rank_per_gpu_and_every_step_the_image(cluster: Cluster) -> None:
    cluster.run(FAKE_SRUN_CODES=pretending(), SLURM_NNODES="4", SLURM_NTASKS_PER_NODE="8", CONFIG="llama2_70b")
    for call, script in zip(cluster.calls(), cluster.scripts(), strict=True):
        options = call["options"]
        assert options["--container-image"] == "image.sqsh"
        assert f"{cluster.work}:{cluster.work}" in options["--container-mounts"]
        expected = {"train_gpt_sft.py": ("4", "32", "8"), "megatron_gpt_eval.py": ("1", "8", "8")}
        nodes, tasks, tasks_per_node = expected.get(script, ("1", "1", "1"))
        assert (options["--nodes"], options["--ntasks"], options["--ntasks-per-node"]) == (nodes, tasks, tasks_per_node)
        if script == "train_gpt_sft.py":
            assert "trainer.num_nodes=4" in call["command"] and "trainer.devices=8" in call["command"]
    names = [arg for call in cluster.calls() for arg in call["command"] if arg.startswith("--config-name")]
    assert names == ["--config-name=llama2_70b_value", "--config-name=llama2_70b_steerlm"]


@pytest.mark.parametrize("code", [EXIT_STOPPED_EARLY, TERMINATED])
@pytest.mark.parametrize("script", ["train_gpt_sft", "attribute_annotate"])
def test_a_step_that_was_stopped_in_time_queues_the_job_again(cluster: Cluster, script: str, code: int) -> None:
    result = cluster.run(FAKE_SRUN_CODES=pretending(**{script: code}))
    assert result.returncode == EXIT_STOPPED_EARLY
    assert cluster.requeued.read_text() == "requeue 4711\n"
    assert cluster.scripts()[-1] == f"{script}.py"


@pytest.mark.parametrize("script", sorted({Path(stage).stem for stage in STAGES} - {"megatron_gpt_eval"}))
def test_a_step_that_fails_ends_the_job_with_its_code(cluster: Cluster, script: str) -> None:
    result = cluster.run(FAKE_SRUN_CODES=pretending(**{script: 3}))
    assert result.returncode == 3
    assert "error: stage " in result.stderr and "exit code 3 of: srun " in result.stderr
    assert f" python scripts/{script}.py" in result.stderr and f"{script}.py was told to fail" in result.stderr
    assert not cluster.requeued.exists()
    assert cluster.scripts()[-1] == f"{script}.py"


def test_a_server_that_cannot_start_ends_the_job_with_its_last_words(cluster: Cluster) -> None:
    result = cluster.run(FAKE_SRUN_CODES=pretending(megatron_gpt_eval=2))
    assert result.returncode == 1
    assert "megatron_gpt_eval.py was told to fail" in result.stderr
    assert "attribute_annotate.py" not in cluster.scripts()


@pytest.mark.parametrize("codes", [pretending(), pretending(attribute_annotate=3)])
def test_no_server_outlives_the_job(cluster: Cluster, codes: str) -> None:
    cluster.run(FAKE_SRUN_CODES=codes)
    (server,) = [call["pid"] for call in cluster.calls() if call["command"][1].endswith("megatron_gpt_eval.py")]
    with pytest.raises(ProcessLookupError):
        os.kill(server, 0)


@pytest.mark.parametrize("name", ["IMAGE", "HF_MODEL", "TREES", "WORK", "SLURM_JOB_ID"])
def test_what_must_be_set_is_asked_for_by_name(cluster: Cluster, name: str) -> None:
    cluster.env.pop(name)
    result = cluster.run(FAKE_SRUN_CODES=pretending())
    assert result.returncode != 0
    assert name in result.stderr
    assert cluster.calls() == []


def test_lengths_and_further_settings_reach_their_commands(cluster: Cluster) -> None:
    cluster.run(FAKE_SRUN_CODES=pretending(), SEQ_LEN="2048", TRAIN_ARGS="a.b=1 c.d=2")
    cleaned = [arg for call in cluster.calls() for arg in call["command"] if arg.startswith("--seq_len")]
    assert cleaned == ["--seq_len=1792"] * 2 + ["--seq_len=2048"] * 2
    for call in cluster.calls():
        if call["command"][1].endswith("train_gpt_sft.py"):
            assert {"model.data.train_ds.max_seq_length=2048", "a.b=1", "c.d=2"} <= set(call["command"])


@pytest.mark.parametrize(
    ("folder", "env", "told"),
    [("/", {}, "submit this from the repository"), (ROOT, {"PYTHON": "false"}, "set PYTHON to one that is")],
)
def test_where_and_with_what_it_runs_is_checked_first(
    cluster: Cluster, folder: Path, env: dict[str, str], told: str
) -> None:
    result = subprocess.run(["bash", SCRIPT], cwd=folder, env={**cluster.env, **env}, capture_output=True, text=True)
    assert result.returncode == 2 and told in result.stderr
    assert not cluster.work.exists()


@pytest.mark.slow
def test_the_whole_flow_runs_on_two_ranks_and_makes_both_models(cluster: Cluster) -> None:
    shutil.rmtree(cluster.llama)
    world = cluster.trees.parent / "world"
    for script, *flags in (
        ["make_toy_world.py", f"--output_dir={world}", "--num_trees=6"],
        [
            "make_tiny_llama.py",
            f"--trees_file={world}/trees.jsonl.gz",
            f"--output_dir={cluster.llama}",
            "--vocab_size=768",
        ],
    ):
        subprocess.run([sys.executable, ROOT / "scripts" / script, *flags], check=True, capture_output=True)
    settings = [
        "trainer.sft.max_steps=2",
        "trainer.sft.val_check_interval=2",
        "trainer.sft.limit_val_batches=1",
        "model.optim.sched.warmup_steps=1",
        *(f"model.data.train_ds.{size}_batch_size=4" for size in ("global", "micro")),
        *(f"model.data.validation_ds.{size}_batch_size=1" for size in ("global", "micro")),
    ]
    trees = str(world / "trees.jsonl.gz")
    result = cluster.run(TREES=trees, CONFIG="toy", SEQ_LEN="320", TRAIN_ARGS=" ".join(settings), OMP_NUM_THREADS="1")
    assert result.returncode == 0, result.stdout + result.stderr
    assert cluster.scripts() == STAGES
    assert [call["code"] for call in cluster.calls(ended=True) if "megatron_gpt_eval" not in call["command"][1]] == [
        0
    ] * (len(STAGES) - 1)
    for folder, kind in (("train-value", "grader"), ("train-steerlm", "steerlm")):
        nemo = cluster.work / folder / "checkpoints" / "megatron_gpt_sft.nemo"
        shown = subprocess.run(
            [sys.executable, ROOT / "scripts" / "inspect_nemo.py", nemo], check=True, capture_output=True, text=True
        )
        assert re.search(rf"kind +{kind}: ", shown.stdout), shown.stdout
