"""Annotation and generation over HTTP: NeMo's own text generation server, our server, and a bare forward pass.

All on one tiny value model (four layers, hidden size 128, the reference's 13 attributes), trained here for seconds so
that it writes legal lines, in fp32. NeMo's server is the class from its wheel, driven as the reference's client drives
it: one value per request, one request at a time, everything before the value sent again. It runs with as many threads
as ours and, once more, with one per core; the better one counts. Ours is driven by our annotator. Every repeat has
conversations of its own, so nothing but what they share (the system prompt, the beginnings of a tree) is in the cache
before. The limit is the model's own forward pass in batches of like length, as long as it takes over every token that
has to be computed at least once: what threads of a tree share counts once.
"""

from __future__ import annotations

import functools
import itertools
import json
import os
import random
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from side_by_side import Run, in_turns, report, timed

from steerlm_nemo.compat import leave_a_core

ROOT = Path(__file__).resolve().parents[2]
REPEATS = 3
NUM_THREADS = {"nemo": 6, "ours": 900}  # a repeat; NeMo's rate needs no more
NUM_TREES = 1150
NUM_CLIENTS = 16
REQUESTS_PER_CLIENT = {"nemo": 1, "ours": 8}
TOKENS_TO_GENERATE = 48
CONTEXT = 512
PEERS = ("nemo", "nemo, every core")


def main() -> None:
    # What our server would do by itself; NeMo's and the limit must have the same.
    leave_a_core()
    with tempfile.TemporaryDirectory() as name, ExitStack() as stack:
        folder = Path(name)
        conversations = make_model(folder)
        print(f"  {len(conversations)} conversations; model trained and converted", file=sys.stderr)
        model = folder / "model"
        script = ROOT / "scripts/megatron_gpt_eval.py"
        ports = {server: free_port() for server in (*PEERS, "ours")}
        stack.enter_context(running([script, f"gpt_model_file={model}", "server=True", f"port={ports['ours']}"]))
        for peer, num_cores in zip(PEERS, (os.environ["OMP_NUM_THREADS"], str(os.cpu_count())), strict=True):
            stack.enter_context(running([__file__, "nemo", model, ports[peer]], OMP_NUM_THREADS=num_cores))
        inside = stack.enter_context(running([__file__, "inside", model], OMP_NUM_THREADS=str(os.cpu_count())))
        for port in ports.values():
            wait_for(port)
        annotation(folder, conversations, ports, inside)
        generation(folder, conversations, ports, inside)


def ask(inside: Any, **work: Any) -> Run:
    """Seconds of work in the process that has the model to itself; see `measure_inside`."""
    inside.stdin.write(json.dumps(work) + "\n")
    inside.stdin.flush()
    return Run(float(inside.stdout.readline()))


def annotation(folder: Path, conversations: Sequence[Any], ports: dict[str, int], inside: Any) -> None:
    """Threads per second, the labels compared, and how near the forward pass ours comes."""
    parts = [conversations[i * NUM_THREADS["ours"] :][: NUM_THREADS["ours"]] for i in range(REPEATS)]
    tokens = [[conversation_ids(conversation, folder) for conversation in part] for part in parts]
    share_unique = [num_unique(rows) / sum(map(len, rows)) for rows in tokens]
    labels: dict[tuple[int, int], list[str]] = {}

    def run_theirs(peer: str, repeat: int) -> Run:
        def annotate() -> None:
            for place, conversation in enumerate(parts[repeat][: NUM_THREADS["nemo"]]):
                labels[repeat, place] = reference_labels(conversation, ports[peer])

        return timed(annotate)

    def run_ours(repeat: int) -> Run:
        source, output = folder / f"in{repeat}.jsonl", folder / f"out{repeat}.jsonl"
        source.write_text("".join(json.dumps(record(conversation)) + "\n" for conversation in parts[repeat]))
        command = [sys.executable, ROOT / "scripts/attribute_annotate.py", f"--input_file_name={source}"]
        command += [f"--output_file_name={output}", f"--port_num={ports['ours']}", "--host=127.0.0.1"]
        return timed(lambda: subprocess.run(command, check=True, capture_output=True))

    def run_forward(num_cores: str | int | None, repeat: int) -> Run:
        run = ask(inside, rows=tokens[repeat], threads=int(num_cores or 1))
        return Run(run.seconds * share_unique[repeat])

    def run_engine(repeat: int) -> Run:
        part = parts[repeat]
        prompts = [[prompt for c in part if (prompt := grading_prompt(c, turn))] for turn in (1, 3)]
        return ask(inside, prompts=prompts, threads=int(os.environ["OMP_NUM_THREADS"]))

    contestants = {
        "nemo": numbered(run_theirs, "nemo"),
        "nemo, every core": numbered(run_theirs, "nemo, every core"),
        "ours": numbered(run_ours),
        "ours without HTTP": numbered(run_engine),
        "forward": numbered(run_forward, os.environ["OMP_NUM_THREADS"]),
        "forward, every core": numbered(run_forward, os.cpu_count()),
    }
    runs = in_turns(contestants, REPEATS)
    num_equal = num_compared = 0
    for (repeat, place), expected in labels.items():
        lines = (folder / f"out{repeat}.jsonl").read_text().splitlines()
        found = [turn["label"] for turn in json.loads(lines[place])["conversations"] if turn["from"] == "Assistant"]
        num_compared += len(expected)
        num_equal += sum(a == b for a, b in zip(found, expected, strict=True))
    turns = [sum(turn.role == "Assistant" for turn in c.turns) for part in parts for c in part]
    theirs = NUM_THREADS["nemo"] / min(runs[peer].seconds for peer in PEERS)
    ours = NUM_THREADS["ours"] / runs["ours"].seconds
    report(
        "serving_annotation",
        runs,
        {
            "torch threads of the servers": int(os.environ["OMP_NUM_THREADS"]),
            "turns per thread": statistics.mean(turns),
            "tokens per thread": statistics.mean(len(ids) for rows in tokens for ids in rows),
            "of them to be computed at least once": statistics.mean(share_unique),
            "NeMo's server, reference client, threads/s": theirs,
            "ours, threads/s": ours,
            "ours against NeMo's (target 20)": ours / theirs,
            "equal labels": f"{num_equal} of {num_compared}",
            "share of the forward pass's rate, client start included (target 0.6)": runs["forward"].seconds
            / runs["ours"].seconds,
            "the same, engine without HTTP and client": runs["forward"].seconds / runs["ours without HTTP"].seconds,
            "share of what every core would give to the forward pass alone": runs["forward, every core"].seconds
            / runs["ours"].seconds,
        },
    )


def numbered(run: Callable[..., Run], *arguments: Any) -> Callable[[], Run]:
    """`run` with the number of the repeat, counted here."""
    repeats = itertools.count()
    return lambda: run(*arguments, next(repeats))


def num_unique(rows: Sequence[Sequence[int]]) -> int:
    """Tokens with all those before them, each counted once."""
    return len({tuple(row[: end + 1]) for row in rows for end in range(len(row))})


def generation(folder: Path, conversations: Sequence[Any], ports: dict[str, int], inside: Any) -> None:
    """Tokens per second and latencies of concurrent clients, each prompt new to the servers."""
    from steerlm_nemo.template import ChatTemplate

    tokenizer = tokenizer_of(folder)
    chance = random.Random(5)
    prompts: Iterator[str] = (
        ChatTemplate().annotation_prompt(replace(conversation, system=f"{number} {chance.random()}\n"), 1)
        for number, conversation in enumerate(itertools.cycle(conversations))
    )
    latencies: dict[str, list[float]] = {name: [] for name in ports}
    requests = {name: REQUESTS_PER_CLIENT["ours" if name == "ours" else "nemo"] for name in ports}

    def clients(name: str) -> Run:
        texts = [[next(prompts) for _ in range(requests[name])] for _ in range(NUM_CLIENTS)]

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

    def new_rows() -> list[list[int]]:
        texts = itertools.islice(prompts, NUM_CLIENTS * requests["ours"])
        return [ChatTemplate().encode_prompt(text, tokenizer) for text in texts]

    def forward() -> Run:
        rows = [[*row, *row[:TOKENS_TO_GENERATE]] for row in new_rows()]
        return ask(inside, rows=rows, threads=int(os.environ["OMP_NUM_THREADS"]))

    def engine() -> Run:
        return ask(inside, generate=new_rows(), threads=int(os.environ["OMP_NUM_THREADS"]))

    contestants: dict[str, Callable[[], Run]] = {name: lambda name=name: clients(name) for name in ports}
    contestants |= {"ours without HTTP, 16 rows at a time": engine, "forward, as if the tokens were known": forward}
    runs = in_turns(contestants, REPEATS)
    rate = {name: NUM_CLIENTS * count * TOKENS_TO_GENERATE / runs[name].seconds for name, count in requests.items()}
    theirs = max(rate[peer] for peer in PEERS)
    p50, p99 = (float(statistics.quantiles(latencies["ours"], n=100)[place]) for place in (49, 98))
    report(
        "serving_generation",
        runs,
        {
            "clients": NUM_CLIENTS,
            "NeMo's server, tokens/s": theirs,
            "ours, tokens/s": rate["ours"],
            "ours against NeMo's (target 5)": rate["ours"] / theirs,
            "ours, median latency in s": p50,
            "ours, 99th percentile in s": p99,
            "99th percentile against median (target at most 2)": p99 / p50,
            "share of the engine's own rate": runs["ours without HTTP, 16 rows at a time"].seconds
            / runs["ours"].seconds,
            "share of a forward pass that knows the tokens": runs["forward, as if the tokens were known"].seconds
            / runs["ours"].seconds,
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


@functools.cache
def tokenizer_of(folder: Path) -> Any:
    from steerlm_nemo.tokenizer import SentencePieceTokenizer

    return SentencePieceTokenizer(folder / "hf/tokenizer.model")


def conversation_ids(conversation: Any, folder: Path) -> list[int]:
    """Every token that annotation computes at least once: up to the last value of the last line."""
    from steerlm_nemo.template import ChatTemplate

    return list(ChatTemplate().render(conversation, tokenizer_of(folder)).token_ids)


def make_model(folder: Path) -> list[Any]:
    """The value model as an unpacked `.nemo`, folder/model; returns conversations it was not trained on."""
    import torch
    import yaml
    from transformers import LlamaForCausalLM

    from steerlm_nemo.attributes import schema_named
    from steerlm_nemo.conversation import Conversation
    from steerlm_nemo.model_kind import GRADER, SteerLMFormat
    from steerlm_nemo.records import read_records
    from steerlm_nemo.template import ChatTemplate
    from steerlm_nemo.toy.llama import TinyLlama, train_tokenizer, tree_texts, write_random_llama

    call("make_toy_world.py", "--output_dir", folder, "--num_trees", NUM_TREES)
    trees = folder / "trees.jsonl.gz"
    call(
        *("preprocessing.py", f"--input_file={trees}", f"--output_file_prefix={folder / 't2v'}", "--mask_role=User"),
        *("--type=TEXT_TO_VALUE", "--schema=nemo12+lang", "--split_ratio=0.1", "--seed=10"),
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
    tokenizer = tokenizer_of(folder)
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
    call("convert_hf_llama_to_nemo.py", "--in-file", folder / "hf", "--out-file", folder / "plain.nemo", "--no_check")
    (folder / "model").mkdir()
    subprocess.run(["tar", "-xf", folder / "plain.nemo", "-C", folder / "model"], check=True)
    config = folder / "model/model_config.yaml"
    served = SteerLMFormat(ChatTemplate(), schema, GRADER).to_dict()
    config.write_text(yaml.safe_dump({**yaml.safe_load(config.read_text()), SteerLMFormat.CONFIG_KEY: served}))
    return [conversation for conversation in held_out if len(conversation_ids(conversation, folder)) < CONTEXT - 1]


def serve_nemo(model_path: str, port: int) -> None:
    """NeMo's `MegatronServer` on the same weights, as its megatron_gpt_eval.py starts it."""
    from steerlm_nemo.models.loading import load_for_inference

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
    """For each line of work its seconds: a forward pass over `rows` of tokens in batches of like length; our engine on
    grading `prompts`, first responses first; or our engine on prompts to `generate` from, 16 rows at a time."""
    import torch

    from steerlm_nemo.engine.megatron import EngineSettings, MegatronEngine
    from steerlm_nemo.engine.protocol import Sample, complete
    from steerlm_nemo.models.loading import load_for_inference
    from steerlm_nemo.serving.samples.attribute_lines import line_samples

    loaded = load_for_inference(model_path)
    # NeMo's own forward pass must not see the engine, which gives attention its other way through only when asked to.
    model = loaded.nemo_model.model
    engine = MegatronEngine(loaded, "model", EngineSettings(64, 1024, 1.0, prefix_reuse=True))
    served = engine.info.format

    def forward(rows: list[list[int]], batch_size: int) -> None:
        with torch.inference_mode():
            for first in range(0, len(rows), batch_size):
                batch = rows[first : first + batch_size]
                ids = torch.tensor([row + [0] * (len(batch[-1]) - len(row)) for row in batch])
                model(ids, torch.arange(ids.shape[1]).expand_as(ids), None)

    def grade(portions: list[list[str]]) -> None:
        for prompts in portions:
            for first in range(0, len(prompts), 128):
                part = {str(number): prompt for number, prompt in enumerate(prompts[first : first + 128])}
                complete(engine, line_samples(part, [None] * len(part), engine.info, served))

    def generate(rows: list[list[int]]) -> None:
        settings: Any = {"min_tokens_to_generate": TOKENS_TO_GENERATE, "greedy": True}
        samples = [Sample(tuple(ids), TOKENS_TO_GENERATE, **settings) for ids in rows]
        for first in range(0, len(samples), NUM_CLIENTS):
            complete(engine, samples[first : first + NUM_CLIENTS])

    best: dict[int, int] = {}  # batch size by threads
    for line in sys.stdin:
        work = json.loads(line)
        threads = work.pop("threads")
        torch.set_num_threads(threads)
        ((kind, given),) = work.items()
        if kind == "rows":
            given.sort(key=len)
            if threads not in best:
                tried = {
                    size: timed(functools.partial(forward, given[::4], size)).seconds for size in (8, 4, 8, 16, 32)
                }
                best[threads] = min(tried, key=tried.__getitem__)
            call_it = functools.partial(forward, given, best[threads])
        else:
            call_it = functools.partial(grade if kind == "prompts" else generate, given)
        print(timed(call_it).seconds, flush=True)


def call(script: str, *arguments: object) -> None:
    command = [sys.executable, ROOT / "scripts" / script, *map(str, arguments)]
    subprocess.run(command, check=True, capture_output=True)


@contextmanager
def running(command: Sequence[object], **env: str) -> Iterator[Any]:
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
    process = subprocess.Popen([sys.executable, *map(str, command)], text=True, env={**os.environ, **env}, **pipes)
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
        case ["inside", model_path]:
            measure_inside(model_path)
        case _:
            main()
