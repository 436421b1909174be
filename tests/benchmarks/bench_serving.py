"""Annotation and generation over HTTP: NeMo's own text generation server, our server, and a bare forward pass.

All on one tiny value model (four layers, hidden size 128, the reference's 13 attributes), trained here for seconds so
that it writes legal lines. NeMo's server is the class from its wheel, driven as the reference's client drives it: one
value per request, one request at a time, everything before the value sent again. Ours is driven by our annotator. Every
repeat has conversations of its own, so nothing but what they share (the system prompt) is in the cache before.
The limit is the model's forward pass over whole conversations in batches, each token once.
"""

from __future__ import annotations

import itertools
import json
import random
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from side_by_side import Contestant, Run, in_turns, report, timed

ROOT = Path(__file__).resolve().parents[2]
REPEATS = 3
NUM_THREADS = {"nemo": 3, "ours": 240}  # a repeat; NeMo's rate needs no more
NUM_CLIENTS = 16
REQUESTS_PER_CLIENT = {"nemo": 1, "ours": 6}
TOKENS_TO_GENERATE = 48
CONTEXT = 512


def main() -> None:
    with tempfile.TemporaryDirectory() as name, ExitStack() as stack:
        folder = Path(name)
        conversations = make_model(folder)
        print(f"  {len(conversations)} conversations; model trained and converted", file=sys.stderr)
        model = folder / "model"
        script = ROOT / "scripts/megatron_gpt_eval.py"
        ports = {"nemo": free_port(), "ours": free_port()}
        stack.enter_context(running([script, f"gpt_model_file={model}", "server=True", f"port={ports['ours']}"]))
        stack.enter_context(running([__file__, "nemo", model, ports["nemo"]]))
        limit = stack.enter_context(running([__file__, "limit", model]))
        for port in ports.values():
            wait_for(port)
        annotation(folder, conversations, ports, limit)
        generation(conversations, ports)


def annotation(folder: Path, conversations: Sequence[Any], ports: dict[str, int], limit: Any) -> None:
    """Threads per second, the labels compared, and how near the forward pass ours comes."""
    parts = [conversations[i * NUM_THREADS["ours"] :][: NUM_THREADS["ours"]] for i in range(REPEATS)]
    ours, theirs, nows, engines = (iter(range(REPEATS)) for _ in range(4))
    labels: dict[tuple[int, int], list[str]] = {}

    def run_theirs() -> Run:
        repeat = next(theirs)

        def annotate() -> None:
            for place, conversation in enumerate(parts[repeat][: NUM_THREADS["nemo"]]):
                labels[repeat, place] = reference_labels(conversation, ports["nemo"])

        return timed(annotate)

    def run_ours() -> Run:
        repeat = next(ours)
        source, output = folder / f"in{repeat}.jsonl", folder / f"out{repeat}.jsonl"
        source.write_text("".join(json.dumps(record(conversation)) + "\n" for conversation in parts[repeat]))
        command = [sys.executable, ROOT / "scripts/attribute_annotate.py", f"--input_file_name={source}"]
        command += [f"--output_file_name={output}", f"--port_num={ports['ours']}", "--host=127.0.0.1"]
        command += ["--batch_size=8", "--concurrency=12"]
        return timed(lambda: subprocess.run(command, check=True, capture_output=True))

    def ask(work: dict[str, Any]) -> Run:
        limit.stdin.write(json.dumps(work) + "\n")
        limit.stdin.flush()
        return Run(float(limit.stdout.readline()))

    def run_limit() -> Run:
        return ask({"rows": [conversation_ids(conversation, folder) for conversation in parts[next(nows)]]})

    def run_engine() -> Run:
        part = parts[next(engines)]
        return ask({"prompts": [[prompt for c in part if (prompt := grading_prompt(c, turn))] for turn in (1, 3)]})

    contestants = {"nemo": run_theirs, "ours": run_ours, "ours without HTTP": run_engine, "forward": run_limit}
    runs = in_turns(contestants, REPEATS)
    num_equal = num_compared = 0
    for (repeat, place), expected in labels.items():
        lines = (folder / f"out{repeat}.jsonl").read_text().splitlines()
        found = [turn["label"] for turn in json.loads(lines[place])["conversations"] if turn["from"] == "Assistant"]
        num_compared += len(expected)
        num_equal += sum(a == b for a, b in zip(found, expected, strict=True))
    turns = [sum(turn.role == "Assistant" for turn in c.turns) for part in parts for c in part]
    rate = {name: NUM_THREADS[name] / runs[name].seconds for name in ("nemo", "ours")}
    report(
        "serving_annotation",
        runs,
        {
            "turns per thread": statistics.mean(turns),
            "NeMo's server, reference client, threads/s": rate["nemo"],
            "ours, threads/s": rate["ours"],
            "ours against NeMo's (target 20)": rate["ours"] / rate["nemo"],
            "equal labels": f"{num_equal} of {num_compared}",
            "share of the forward pass's rate, client start included (target 0.6)": runs["forward"].seconds
            / runs["ours"].seconds,
            "the same, engine without HTTP and client": runs["forward"].seconds / runs["ours without HTTP"].seconds,
        },
    )


def generation(conversations: Sequence[Any], ports: dict[str, int]) -> None:
    """Tokens per second and latencies of concurrent clients, each prompt new to the servers."""
    from steerlm_nemo.template import ChatTemplate

    chance = random.Random(5)
    prompts: Iterator[str] = (
        ChatTemplate().annotation_prompt(replace(conversation, system=f"{number} {chance.random()}\n"), 1)
        for number, conversation in enumerate(itertools.cycle(conversations))
    )
    latencies: dict[str, list[float]] = {"nemo": [], "ours": []}

    def clients(name: str) -> Run:
        texts = [[next(prompts) for _ in range(REQUESTS_PER_CLIENT[name])] for _ in range(NUM_CLIENTS)]

        def client(mine: Sequence[str]) -> None:
            for text in mine:
                start = time.perf_counter()
                body = {"sentences": [text], "tokens_to_generate": TOKENS_TO_GENERATE, "greedy": True}
                answer = put(ports[name], {**body, "min_tokens_to_generate": TOKENS_TO_GENERATE, "end_strings": []})
                assert text in answer["sentences"][0]
                latencies[name].append(time.perf_counter() - start)

        def everybody() -> None:
            with ThreadPoolExecutor(NUM_CLIENTS) as pool:
                list(pool.map(client, texts))

        return timed(everybody)

    runs: dict[str, Contestant] = in_turns({name: lambda name=name: clients(name) for name in ports}, REPEATS)
    tokens = {name: NUM_CLIENTS * REQUESTS_PER_CLIENT[name] * TOKENS_TO_GENERATE for name in ports}
    rate = {name: tokens[name] / runs[name].seconds for name in ports}
    p50, p99 = (float(statistics.quantiles(latencies["ours"], n=100)[place]) for place in (49, 98))
    report(
        "serving_generation",
        runs,
        {
            "clients": NUM_CLIENTS,
            "NeMo's server, tokens/s": rate["nemo"],
            "ours, tokens/s": rate["ours"],
            "ours against NeMo's (target 5)": rate["ours"] / rate["nemo"],
            "ours, median latency in s": p50,
            "ours, 99th percentile in s": p99,
            "99th percentile against median (target at most 2)": p99 / p50,
        },
    )


def reference_labels(conversation: Any, port: int) -> list[str]:
    """Grade the responses of a conversation as the reference's client does: one value per request, one at a time."""
    from steerlm_nemo.attributes import Attributes, schema_named
    from steerlm_nemo.template import ChatTemplate

    template, schema = ChatTemplate(), schema_named("nemo12+lang")
    constant = {"tokens_to_generate": 1, "temperature": 0.1, "add_BOS": False, "top_k": 1, "top_p": 1.0}
    constant |= {"greedy": True, "all_probs": False, "repetition_penalty": 1.0, "min_tokens_to_generate": 1}
    constant |= {"end_strings": [template.turn_start, "<|endoftext|>"]}
    turns, labels = [], []
    for number, turn in enumerate(conversation.turns):
        if turn.role == "Assistant":
            prompt = template.annotation_prompt(replace(conversation, turns=(*turns, turn)), number)
            line = ""
            for key in schema.keys():  # noqa: SIM118 - no mapping
                line += f"{',' if line else ''}{key}:"
                line += put(port, {"sentences": [prompt + line], **constant})["sentences"][0][len(prompt + line) :]
            labels.append(line)
            turn = replace(turn, attributes=Attributes.parse(line))
        turns.append(turn)
    return labels


def record(conversation: Any) -> dict[str, Any]:
    turns = [{"value": turn.text, "from": turn.role} for turn in conversation.turns]
    return {"conversations": turns, "system": conversation.system, "mask": "User", "type": "TEXT_TO_VALUE"}


def conversation_ids(conversation: Any, folder: Path) -> list[int]:
    """Every token that annotation computes at least once: up to the last value of the last line."""
    from steerlm_nemo.template import ChatTemplate
    from steerlm_nemo.tokenizer import SentencePieceTokenizer

    return list(ChatTemplate().render(conversation, SentencePieceTokenizer(folder / "hf/tokenizer.model")).token_ids)


def make_model(folder: Path) -> list[Any]:
    """The value model as an unpacked `.nemo`, folder/model; returns conversations it was not trained on."""
    import torch
    import yaml
    from transformers import LlamaForCausalLM

    from steerlm_nemo.attributes import schema_named
    from steerlm_nemo.conversation import Conversation
    from steerlm_nemo.data.tiny_llama import TinyLlama, train_tokenizer, tree_texts, write_random_llama
    from steerlm_nemo.records import read_records
    from steerlm_nemo.template import ChatTemplate, SteerLMFormat
    from steerlm_nemo.tokenizer import SentencePieceTokenizer

    call("make_toy_world.py", "--output_dir", folder, "--num_trees", 400)
    trees = folder / "trees.jsonl.gz"
    call(
        *("preprocessing.py", f"--input_file={trees}", f"--output_file_prefix={folder / 't2v'}", "--mask_role=User"),
        *("--type=TEXT_TO_VALUE", "--schema=nemo12+lang", "--split_ratio=0.3", "--seed=10"),
    )
    schema = schema_named("nemo12+lang")

    def graded(path: Path) -> list[Conversation]:
        made = []
        for ref, raw in read_records(path):
            conversation = Conversation.from_record(raw, ref)
            turns = [
                replace(turn, attributes=schema.complete({**turn.attributes.as_dict(), "lang": "en"}))
                if turn.attributes
                else turn
                for turn in conversation.turns
            ]
            made.append(replace(conversation, turns=tuple(turns)))
        return made

    train, held_out = graded(folder / "t2v_train.jsonl"), graded(folder / "t2v_val.jsonl")
    tokenizer_model = train_tokenizer(tree_texts(tree for _, tree in read_records(trees)), schema, 768)
    write_random_llama(folder / "hf", TinyLlama(768, CONTEXT, num_layers=4), tokenizer_model, 1)
    tokenizer = SentencePieceTokenizer(folder / "hf/tokenizer.model")
    model = LlamaForCausalLM.from_pretrained(folder / "hf", torch_dtype=torch.float32)
    rendered = [ChatTemplate().render(conversation, tokenizer) for conversation in train]
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3, betas=(0.9, 0.95))
    chance = random.Random(3)
    for _ in range(60):
        batch = chance.sample(rendered, 8)
        longest = max(len(row.token_ids) for row in batch)
        ids = torch.zeros(len(batch), longest, dtype=torch.long)
        targets = torch.full((len(batch), longest), -100)
        for place, row in enumerate(batch):
            ids[place, : len(row.token_ids)] = torch.tensor(row.token_ids)
            mask = torch.tensor(row.loss_mask, dtype=torch.bool)
            targets[place, : len(mask)][mask] = ids[place, : len(mask)][mask]
        model(ids, labels=targets).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(folder / "hf")
    call("convert_hf_llama_to_nemo.py", "--in-file", folder / "hf", "--out-file", folder / "plain.nemo")
    (folder / "model").mkdir()
    subprocess.run(["tar", "-xf", folder / "plain.nemo", "-C", folder / "model"], check=True)
    config = folder / "model/model_config.yaml"
    served = SteerLMFormat(ChatTemplate(), schema, "TEXT_TO_VALUE").to_dict()
    config.write_text(yaml.safe_dump({**yaml.safe_load(config.read_text()), SteerLMFormat.CONFIG_KEY: served}))
    return [conversation for conversation in held_out if len(conversation_ids(conversation, folder)) < CONTEXT - 1]


def serve_nemo(model_path: str, port: int) -> None:
    """NeMo's `MegatronServer` on the same weights, as its megatron_gpt_eval.py starts it."""
    from steerlm_nemo.serving.loading import load_for_inference

    loaded = load_for_inference(model_path)
    from nemo.collections.nlp.modules.common.text_generation_server import MegatronServer
    from nemo.collections.nlp.modules.common.text_generation_strategy import GPTModelTextGenerationStrategy

    # Passing the strategy is all that a CPU needs: choosing it imports the multimodal collection.
    MegatronServer(loaded.nemo_model, GPTModelTextGenerationStrategy(loaded.nemo_model)).run("127.0.0.1", port)


def grading_prompt(conversation: Any, turn: int) -> str | None:
    """With the grades that earlier responses have in the data: what they say does not matter to the rate."""
    from steerlm_nemo.template import ChatTemplate

    return ChatTemplate().annotation_prompt(conversation, turn) if turn < len(conversation.turns) else None


def measure_inside(model_path: str) -> None:
    """For each line of work its seconds: a forward pass over `rows` of tokens in batches of like length, or our engine
    on `prompts`, first responses first."""
    import torch

    from steerlm_nemo.serving.engine import EngineSettings, MegatronEngine
    from steerlm_nemo.serving.lines import line_samples
    from steerlm_nemo.serving.loading import load_for_inference
    from steerlm_nemo.serving.sampling import complete

    loaded = load_for_inference(model_path)
    model = loaded.nemo_model.model
    engine = MegatronEngine(loaded, "model", EngineSettings(64, 1024, 1.0, prefix_reuse=True))
    for line in sys.stdin:
        work = json.loads(line)
        if "prompts" in work:
            start = time.perf_counter()
            for prompts in work["prompts"]:
                for first in range(0, len(prompts), 128):
                    complete(engine, line_samples({"prompts": prompts[first : first + 128]}, engine.info))
            print(time.perf_counter() - start, flush=True)
            continue
        rows = sorted(work["rows"], key=len)
        with torch.inference_mode():
            start = time.perf_counter()
            for first in range(0, len(rows), 8):
                batch = rows[first : first + 8]
                ids = torch.tensor([row + [0] * (len(batch[-1]) - len(row)) for row in batch])
                model(ids, torch.arange(ids.shape[1]).expand_as(ids), None)
            print(time.perf_counter() - start, flush=True)


def call(script: str, *arguments: object) -> None:
    command = [sys.executable, ROOT / "scripts" / script, *map(str, arguments)]
    subprocess.run(command, check=True, capture_output=True)


@contextmanager
def running(command: Sequence[object]) -> Iterator[Any]:
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
    process = subprocess.Popen([sys.executable, *map(str, command)], text=True, **pipes)
    try:
        yield process
    finally:
        process.terminate()
        process.wait()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def wait_for(port: int) -> None:
    deadline = time.monotonic() + 300
    while True:
        try:
            put(port, {"sentences": ["warm up"], "tokens_to_generate": 2, "greedy": True})
            return
        except OSError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.2)


def put(port: int, body: dict[str, Any]) -> dict[str, Any]:
    import http.client

    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=300)
    connection.request("PUT", "/generate", json.dumps(body), {"Content-Type": "application/json"})
    answer = connection.getresponse()
    text = answer.read()
    connection.close()
    if answer.status != 200:
        raise RuntimeError(f"port {port} answered {answer.status}: {text[:300]!r}")
    return json.loads(text)


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["nemo", model_path, port]:
            serve_nemo(model_path, int(port))
        case ["limit", model_path]:
            measure_inside(model_path)
        case _:
            main()
