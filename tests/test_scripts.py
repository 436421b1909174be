"""Every script explains itself at once, and says in one message that its input is not there."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = sorted((ROOT / "scripts").glob("*.py"))
HEAVY = {"torch", "nemo", "nemo_aligner", "megatron", "lightning", "transformers", "tensorflow", "hydra", "omegaconf"}

# Arguments that are complete, but name an input that does not exist ({missing}) beside a free output ({out}).
MISSING_INPUT = {
    "attribute_annotate": "--input_file_name={missing} --output_file_name={out}",
    "build_sft_data": "--input-file={missing} --output-file={out}",
    "convert_hf_llama_to_nemo": "--in-file={missing} --out-file={out}",
    "convert_nemo_to_hf_llama": "--in-file={missing} --out-file={out}",
    "data_clean": "--dataset_file={missing} --output_file={out} --library=sentencepiece --model_file={missing}",
    "demo": "--data={missing} --output_dir={out}",
    "flow": "run {missing} out={out}",
    "inspect_data": "{missing}",
    "inspect_nemo": "{missing}",
    "make_tiny_llama": "--trees_file={missing} --output_dir={out}",
    "megatron_gpt_eval": "gpt_model_file={missing} server=True",
    "plan_steering": "--prompts_file={missing} --output_file={out}",
    "preprocessing": "--input_file={missing} --output_file_prefix={out}",
    "process_to_regression_format": "--input-file={missing} --output-file={out}",
    "report": "--graded_file={missing} --graded_responses_file={missing} --output_dir={out}",
    "show_mask": "--dataset_file={missing} --library=sentencepiece --model_file={missing}",
    "steered_inference": "--input_file={missing} --output_file={out}",
    "train_gpt_sft": "model.restore_from_path={missing} model.data.train_ds.file_path={missing} "
    "model.data.validation_ds.file_path={missing} exp_manager.explicit_log_dir={out}",
}
NO_INPUT = {"make_toy_world"}  # makes its data from a seed


def run(script: Path, *args: str, python: tuple[str, ...] = (), **env: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *python, script, *args]
    return subprocess.run(command, env={**os.environ, **env}, capture_output=True, text=True, timeout=120)


def imported(importtime: str) -> set[str]:
    """Top-level names of all modules in the report of `python -X importtime`."""
    return {
        name.split(".")[0] for name in re.findall(r"^import time:[^|]+\|[^|]+\|\s*([\w.]+)", importtime, re.MULTILINE)
    }


def test_every_script_is_covered_here() -> None:
    assert {script.stem for script in SCRIPTS} == set(MISSING_INPUT) | NO_INPUT


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.stem)
def test_help_answers_without_the_heavy_imports(script: Path) -> None:
    result = run(script, "--help", python=("-X", "importtime"), PAGER="cat")
    assert result.returncode == 0, result.stderr
    said = result.stdout + "\n".join(line for line in result.stderr.splitlines() if not line.startswith("import time:"))
    assert len(said) > 200
    modules = imported(result.stderr)
    assert "steerlm_nemo" in modules
    assert modules & HEAVY == set()


def test_a_heavy_import_would_be_seen(tmp_path: Path) -> None:
    """Control of the test above, also for an import that is swallowed."""
    (tmp_path / "torch.py").touch()
    (tmp_path / "script.py").write_text("try:\n    import torch\nexcept ImportError:\n    pass\n")
    result = run(tmp_path / "script.py", python=("-X", "importtime"))
    assert imported(result.stderr) & HEAVY == {"torch"}


@pytest.mark.parametrize("script", sorted(MISSING_INPUT))
def test_a_missing_input_is_one_message_and_leaves_nothing(script: str, tmp_path: Path) -> None:
    missing, out = tmp_path / "not_there.jsonl", tmp_path / "out"
    args = MISSING_INPUT[script].format(missing=missing, out=out).split()
    result = run(ROOT / "scripts" / f"{script}.py", *args)
    assert result.returncode == 2, result.stderr
    assert result.stderr.startswith("error: ") and result.stderr.count("error: ") == 1, result.stderr
    assert str(missing) in result.stderr
    assert "Traceback" not in result.stdout + result.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("script", sorted(MISSING_INPUT))
def test_the_wrong_kind_of_file_is_one_message(script: str, tmp_path: Path) -> None:
    """A folder where a file belongs, and a file of noise where a folder or a `.nemo` belongs."""
    given = tmp_path / "given"
    if script == "convert_hf_llama_to_nemo":
        given.write_bytes(os.urandom(64))
    else:
        given.mkdir()
    args = MISSING_INPUT[script].format(missing=given, out=tmp_path / "out").split()
    result = run(ROOT / "scripts" / f"{script}.py", *args)
    assert result.returncode == 2, result.stderr
    # What is wrong with a file is what inspect_nemo reports, so there it is no error.
    message = result.stdout.partition("\nDAMAGE\n")[2] if script == "inspect_nemo" else result.stderr
    assert message.startswith("  " if script == "inspect_nemo" else "error: ")
    assert str(given) in message
    assert "Traceback" not in result.stdout + result.stderr
    assert list(tmp_path.iterdir()) == [given]


def test_a_flag_is_not_guessed_from_its_beginning(tmp_path: Path) -> None:
    result = run(ROOT / "scripts" / "make_toy_world.py", f"--output={tmp_path / 'world'}", f"--output_dir={tmp_path}")
    assert result.returncode == 2 and "unrecognized arguments: --output=" in result.stderr
    result = run(ROOT / "scripts" / "data_clean.py", "--dataset_file=in.jsonl", "--output_fil=out.jsonl")
    assert result.returncode == 2 and "--output_fil=out.jsonl; did you mean --output_file?" in result.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_hugging_face_folder_is_to_be_converted_first(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    result = run(ROOT / "scripts" / "megatron_gpt_eval.py", f"gpt_model_file={tmp_path}", "server=True")
    assert result.returncode == 2 and "scripts/convert_hf_llama_to_nemo.py makes a .nemo of it" in result.stderr


def test_a_question_may_have_quotes(tmp_path: Path) -> None:
    question = """Who said "it's raining"?"""
    # The tests themselves are run by make.
    env = {key: value for key, value in os.environ.items() if not key.startswith("MAKE")}
    command = ["make", "-n", "steer", f"PROMPT={question}"]
    result = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    (said,) = (line for line in result.stdout.splitlines() if "steered_inference.py" in line)
    said = said.replace(".venv/bin/python scripts/steered_inference.py", "printf '%s|'")
    shown = subprocess.run(["bash", "-c", said], env={"QUESTION": question}, capture_output=True, text=True).stdout
    assert f"--prompt={question}|" in shown


def test_a_folder_cannot_be_made_where_a_file_is(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    result = run(ROOT / "scripts" / "make_toy_world.py", f"--output_dir={tmp_path}/file")
    assert result.returncode == 2 and result.stderr.startswith("error: ") and f"{tmp_path}/file" in result.stderr


def test_every_script_ends_in_the_one_place_that_knows_how_to_end() -> None:
    for script in SCRIPTS:
        last = script.read_text(encoding="utf-8").rstrip().rpartition('if __name__ == "__main__":\n')[2]
        assert last.startswith("    exit_with_message(") and "\n" not in last, script


@pytest.mark.parametrize("script", ["preprocessing", "train_gpt_sft", "data_clean"])
def test_help_that_nobody_reads_to_its_end_is_no_traceback(script: str) -> None:
    # Unbuffered: or what is printed would leave in one piece, and a fast reader would see it all.
    env = {**os.environ, "PYTHONUNBUFFERED": "1", "PAGER": "cat"}
    command = ["bash", "-c", '"$@" | true; exit ${PIPESTATUS[0]}', "bash", sys.executable]
    command += [str(ROOT / "scripts" / f"{script}.py"), "--help"]
    result = subprocess.run(command, env=env, capture_output=True, text=True, timeout=120)
    assert result.returncode in (0, 141) and "Traceback" not in result.stderr and "BrokenPipe" not in result.stderr


@pytest.mark.parametrize("errors_too", [False, True])
@pytest.mark.parametrize("buffered", ["", "1"])
def test_what_nobody_reads_ends_a_program_without_a_word(tmp_path: Path, buffered: str, errors_too: bool) -> None:
    body = "for n in range(30000):\n        print(n)\n        print('e', file=sys.stderr) if two else None"
    program = tmp_path / "program.py"
    program.write_text(
        "import sys\nfrom steerlm_nemo.errors import InputError, exit_with_message\ntwo = len(sys.argv) > 1\n"
        f"def main():\n    {body}\n    raise InputError('wrong')\n"
        "exit_with_message(main)\n"
    )
    command = f'"$@" {"2>&1 |" if errors_too else "|"} head -n 1; exit ${{PIPESTATUS[0]}}'
    env = {**os.environ, "PYTHONUNBUFFERED": buffered, "PYTHONPATH": str(ROOT)}
    result = subprocess.run(
        ["bash", "-c", command, "bash", sys.executable, program, *(["two"] if errors_too else [])],
        capture_output=True, text=True, env=env,
    )  # fmt: skip
    assert result.returncode == 141 and result.stdout in ("0\n", "e\n")
    assert "Traceback" not in result.stderr and "BrokenPipe" not in result.stderr


def test_a_pipe_of_another_kind_that_breaks_is_a_defect_and_keeps_its_traceback(tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text(
        "from steerlm_nemo.errors import exit_with_message\n"
        "def main():\n    raise BrokenPipeError('of a worker')\n"
        "exit_with_message(main)\n"
    )
    result = run(program, PYTHONPATH=str(ROOT))
    assert result.returncode == 1 and "BrokenPipeError: of a worker" in result.stderr
