"""The whole serving path, a real `.nemo` on one and two ranks, against Hugging Face running the same weights."""

import json
import random
import subprocess
import sys
import tarfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import live
import openai
import pytest
import tiny_world
import yaml

from steerlm_nemo.checkpoint.archive import open_nemo
from steerlm_nemo.checkpoint.identity import identity

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def value_nemo(tmp_path_factory):
    """The tiny value model converted to `.nemo`, with its format where training would have put it."""
    folder = tmp_path_factory.mktemp("nemo")
    hf = live.model_folder("TEXT_TO_VALUE")
    convert = [
        sys.executable,
        ROOT / "scripts/convert_hf_llama_to_nemo.py",
        "--in-file",
        hf,
        "--no_check",
        "--out-file",
    ]
    subprocess.run([*convert, folder / "plain.nemo"], check=True, capture_output=True)
    with tarfile.open(folder / "plain.nemo") as archive:
        archive.extractall(folder / "unpacked", filter="data")
    config = next((folder / "unpacked").rglob("model_config.yaml"))
    served = json.loads((hf / "format.json").read_text())
    config.write_text(yaml.safe_dump({**yaml.safe_load(config.read_text()), "steerlm": served}))
    with tarfile.open(folder / "value.nemo", "w") as archive:
        archive.add(folder / "unpacked", arcname=".")
    return folder / "value.nemo"


def put(port, body):
    return httpx.put(f"http://127.0.0.1:{port}/generate", json=body, timeout=120, trust_env=False).json()


def lines(port, prompts):
    answer = httpx.post(
        f"http://127.0.0.1:{port}/v1/attribute_lines", json={"prompts": prompts}, timeout=120, trust_env=False
    ).json()
    return list(zip(answer["lines"], answer["num_overruled"], strict=True))


def complete(port, body):
    """Text, finish reason, and log-probability of each token, of the whole answer and of the streamed one."""
    client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0)
    model = client.models.list().data[0].id
    (choice,) = client.completions.create(model=model, **body).choices
    chunks = [chunk.choices[0] for chunk in client.completions.create(model=model, stream=True, **body)]
    tokens = [value for chunk in chunks if chunk.logprobs for value in chunk.logprobs.token_logprobs]
    streamed = ("".join(chunk.text for chunk in chunks), chunks[-1].finish_reason)
    return (choice.text, choice.finish_reason), choice.logprobs.token_logprobs, streamed, tokens


def grades(port, records):
    body = {"conversations": records, "soft": True, "turns": "all"}
    return httpx.post(f"http://127.0.0.1:{port}/v1/annotate", json=body, timeout=120, trust_env=False).json()


def close_to(wanted):
    """Probabilities are written with four digits."""
    if isinstance(wanted, dict):
        return {key: close_to(value) for key, value in wanted.items()}
    if isinstance(wanted, list):
        return [close_to(value) for value in wanted]
    return pytest.approx(wanted, abs=2e-4) if isinstance(wanted, float) else wanted


@pytest.mark.slow
@pytest.mark.parametrize("tp_size", [1, 2])
def test_a_served_nemo_answers_concurrent_clients_token_by_token_as_hugging_face_does(value_nemo, tp_size):
    chance = random.Random(0)
    bodies = []
    for number, conversation in enumerate(tiny_world.conversations(24, "TEXT_TO_VALUE", seed=9)):
        prompts = [tiny_world.TEMPLATE.annotation_prompt(conversation, t) for t in range(len(conversation.turns))]
        bodies.append(
            {
                "sentences": prompts[: chance.randint(1, 4)],
                "greedy": True,
                "tokens_to_generate": chance.randint(1, 40),
                "end_strings": chance.choice([["\x11"], [], ["quality:"], ["\n"]]),
                "compute_logprob": number % 3 == 0,
            }
        )
    prompts = [sentence for body in bodies for sentence in body["sentences"]]
    records = [tiny_world.record(c) for c in tiny_world.conversations(6, "TEXT_TO_VALUE", seed=10)]
    settings = {"temperature": 0, "max_tokens": 24, "logprobs": 2}
    texts = [
        {"prompt": prompt, "stop": stop, **settings}
        for prompt, stop in zip(prompts, [None, "ualit", ["mor", "z"], ":"] * 2, strict=False)
    ]
    with live.run_engine(live.engine("TEXT_TO_VALUE")) as port:
        expected = [put(port, body) for body in bodies]
        expected_lines = lines(port, prompts)
        expected_texts = [complete(port, body) for body in texts]
        expected_grades = grades(port, records)["conversations"]
    with live.open_listener(0) as free:
        port = free.getsockname()[1]
    command = [sys.executable, ROOT / "scripts/megatron_gpt_eval.py", f"gpt_model_file={value_nemo}", "server=True"]
    command += [f"port={port}", f"trainer.devices={tp_size}", f"tensor_model_parallel_size={tp_size}"]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        while True:
            assert server.poll() is None, server.communicate()[0]
            try:
                health = httpx.get(f"http://127.0.0.1:{port}/health", trust_env=False).json()
                break
            except httpx.TransportError:
                time.sleep(0.2)
        assert health["tp_size"] == tp_size
        with open_nemo(value_nemo) as nemo:
            known = identity(nemo)  # the annotator refuses to go on with another model than it began with
        assert httpx.get(f"http://127.0.0.1:{port}/v1/attributes", trust_env=False).json()["identity"] == known
        with ThreadPoolExecutor(12) as pool:
            answers = list(pool.map(lambda body: put(port, body), bodies))
            served_lines = list(pool.map(lambda prompt: lines(port, [prompt])[0], prompts))
            served_texts = list(pool.map(lambda body: complete(port, body), texts))
            served_grades = grades(port, records)["conversations"]
    finally:
        server.terminate()
        log, _ = server.communicate(timeout=60)
    assert server.returncode == 0, log
    assert [answer["token_ids"] for answer in answers] == [answer["token_ids"] for answer in expected]
    assert [answer["sentences"] for answer in answers] == [answer["sentences"] for answer in expected]
    assert served_lines == expected_lines and len(served_lines) == len(prompts)
    assert served_grades == close_to(expected_grades)
    for (text, scores, streamed, tokens), (wanted_text, wanted_scores, *_) in zip(
        served_texts, expected_texts, strict=True
    ):
        assert text == streamed == wanted_text
        # What was in the cache already may differ in its last bits.
        assert scores == pytest.approx(wanted_scores, abs=1e-4)
        assert tokens == pytest.approx(wanted_scores, abs=1e-4)
    for answer, wanted in zip(answers, expected, strict=True):
        for row, wanted_row in zip(answer["logprob"] or [], wanted["logprob"] or [], strict=True):
            assert row == pytest.approx(wanted_row, abs=1e-4)
