"""lm-evaluation-harness: tasks of our own, with data in this file, by the models that it has for servers."""

from __future__ import annotations

import json
import math
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import reference
import yaml
from programs_of_clients import Server, client_environment

CLIENT = "lm-eval"
CAPITALS = [
    {"question": "What is the capital of France?", "choices": ["Paris", "Madrid", "four"], "answer": 0},
    {"question": "What is the capital of Spain?", "choices": ["Paris", "Madrid", "a small model"], "answer": 1},
    {"question": "What is two plus two?", "choices": ["Guten Tag", "two", "four"], "answer": 2},
]
TEXTS = [{"text": "The capital of France is Paris.\nTwo plus two is four. Schöne Grüße! 🙂"}, {"text": "I know."}]
TASKS: dict[str, tuple[list[dict[str, Any]], dict[str, Any]]] = {
    "our_choice": (
        CAPITALS,
        {
            "output_type": "multiple_choice",
            "doc_to_text": "{{question}}\nThe answer is",
            "doc_to_choice": "{{choices}}",
            "doc_to_target": "{{answer}}",
            "metric_list": [{"metric": "acc"}],
        },
    ),
    "our_generation": (
        CAPITALS,
        {
            "output_type": "generate_until",
            "doc_to_text": "{{question}}",
            "doc_to_target": "{{choices[answer]}}",
            "generation_kwargs": {"until": ["."], "max_gen_toks": 24, "temperature": 0, "do_sample": False},
            "metric_list": [{"metric": "exact_match"}],
        },
    ),
    "our_perplexity": (
        TEXTS,
        {
            "output_type": "loglikelihood_rolling",
            "doc_to_text": "",
            "doc_to_target": "{{text}}",
            "metric_list": [{"metric": "word_perplexity"}],
        },
    ),
}


@pytest.fixture
def evaluate(
    python_of: Callable[[str], Path], plain: Server, tmp_path: Path
) -> Callable[..., tuple[dict[str, Any], list[dict[str, Any]]]]:
    """Runs the harness's command; its results for a task, and its samples in the order of the data."""

    def run(model: str, task: str, *flags: str, **model_args: object) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        records, config = TASKS[task]
        data = tmp_path / "data.jsonl"
        data.write_text("".join(json.dumps(record) + "\n" for record in records))
        files = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(data)}}, "test_split": "test"}
        (tmp_path / f"{task}.yaml").write_text(yaml.safe_dump({"task": task, **files, **config}))
        route = "chat/completions" if "chat" in model else "completions"
        arguments = {"model": plain.model, "base_url": f"{plain.url}/v1/{route}", "max_retries": 1, **model_args}
        command = [str(python_of(CLIENT)), "-m", "lm_eval", "run", "--model", model, "--tasks", task, *flags]
        command += ["--model_args", ",".join(f"{key}={value}" for key, value in arguments.items())]
        command += ["--include_path", str(tmp_path), "--output_path", str(tmp_path / "out"), "--log_samples"]
        env = {**client_environment(), "HF_DATASETS_CACHE": str(tmp_path / "cache"), "HF_HOME": str(tmp_path / "home")}
        ended = subprocess.run(command, capture_output=True, text=True, env=env, timeout=600)
        assert ended.returncode == 0, "\n".join(
            line for line in ended.stderr.splitlines() if "Error" in line or "failed" in line
        )
        (results,) = (tmp_path / "out").rglob("results_*.json")
        (samples,) = (tmp_path / "out").rglob("samples_*.jsonl")
        rows = [json.loads(line) for line in samples.read_text().splitlines()]
        return json.loads(results.read_text())["results"][task], sorted(rows, key=lambda row: row["doc_id"])

    return run


def number(value: object) -> float:
    return float(str(value))


@pytest.mark.parametrize("tokenized", [True, False], ids=["token ids", "text"])
def test_log_likelihoods_of_choices_are_those_of_transformers(
    evaluate: Callable[..., Any], plain: Server, tokenized: bool
) -> None:
    theirs = reference.of(plain.folder)
    settings = {"tokenizer": plain.folder, "tokenized_requests": tokenized, "num_concurrent": 2, "max_length": 256}
    results, samples = evaluate("local-completions", "our_choice", **settings)
    right = 0
    for record, sample in zip(CAPITALS, samples, strict=True):
        context = theirs.ids(f"{record['question']}\nThe answer is")
        wanted = []
        for choice in record["choices"]:
            whole = theirs.ids(f"{record['question']}\nThe answer is {choice}")
            assert whole[: len(context)] == context
            wanted.append(math.fsum(theirs.logprobs(whole)[len(context) - 1 :]))
        got = [number(response[0][0]) for response in sample["resps"]]
        assert got == pytest.approx(wanted, abs=2e-3)
        greedy = [str(response[0][1]) == "True" for response in sample["resps"]]
        for choice, is_greedy in zip(record["choices"], greedy, strict=True):
            added = theirs.ids(f"{record['question']}\nThe answer is {choice}")[len(context) :]
            assert is_greedy == (theirs.greedy(context, len(added)) == added)
        right += max(range(3), key=wanted.__getitem__) == record["answer"]
    assert results["acc,none"] == pytest.approx(right / 3)


def test_rolling_log_likelihoods_are_those_of_transformers(evaluate: Callable[..., Any], plain: Server) -> None:
    theirs = reference.of(plain.folder)
    results, samples = evaluate("local-completions", "our_perplexity", tokenizer=plain.folder, max_length=128)
    total, words = 0.0, 0
    for record, sample in zip(TEXTS, samples, strict=True):
        ids = [theirs.tokenizer.bos_token_id, *theirs.ids(record["text"])]  # the harness's own beginning
        wanted = math.fsum(theirs.logprobs(ids))
        assert number(sample["resps"][0][0]) == pytest.approx(wanted, abs=5e-3)
        total, words = total + wanted, words + len(record["text"].split())
    assert results["word_perplexity,none"] == pytest.approx(math.exp(-total / words), rel=1e-3)


def test_generation_by_completions(evaluate: Callable[..., Any], plain: Server) -> None:
    theirs = reference.of(plain.folder)
    _, samples = evaluate("local-completions", "our_generation", "--batch_size", "2", tokenizer=plain.folder)
    for record, sample in zip(CAPITALS, samples, strict=True):
        text = theirs.text(theirs.greedy(theirs.ids(record["question"]), 24))
        assert sample["resps"][0][0] == text.split(".")[0]


def test_generation_by_chats(evaluate: Callable[..., Any], plain: Server) -> None:
    theirs = reference.of(plain.folder)
    results, samples = evaluate("local-chat-completions", "our_generation", "--apply_chat_template")
    answers = []
    for record, sample in zip(CAPITALS, samples, strict=True):
        answers.append(theirs.chat([{"role": "user", "content": record["question"]}], 24).split(".")[0])
        assert sample["resps"][0][0] == answers[-1]
    matching = sum(
        answer == record["choices"][record["answer"]] for answer, record in zip(answers, CAPITALS, strict=True)
    )
    assert results["exact_match,none"] == pytest.approx(matching / 3)
