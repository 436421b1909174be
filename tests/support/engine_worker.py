"""One rank: the same prompts through our engine and through NeMo's own `generate`, results to a JSON file.

engine_worker.py MODEL.nemo PROMPTS.json RESULTS.json
"""

from __future__ import annotations

import json
import os
import random
import sys
from pathlib import Path

from steerlm_nemo.engine.megatron import EngineSettings, MegatronEngine
from steerlm_nemo.engine.protocol import (
    Completion,
    Failed,
    Finished,
    Sample,
    Scored,
    ScoreRequest,
    ServedTokenizer,
    complete,
    score,
)
from steerlm_nemo.models.loading import load_for_inference

NUM_LABELS = 1000


def main() -> None:
    import torch

    model_path, prompts_path, results_path = sys.argv[1:]
    prompts, tokens_to_generate = json.loads(Path(prompts_path).read_text())
    loaded = load_for_inference(model_path, int(os.environ["WORLD_SIZE"]), "32")
    results: dict[str, object] = {}
    for name, settings in {
        # So small a cache that prefixes are evicted all the time.
        "reused": EngineSettings(max_batch_rows=64, max_step_tokens=256, kv_cache_gb=0.002, prefix_reuse=True),
        "computed": EngineSettings(max_batch_rows=24, max_step_tokens=37, kv_cache_gb=0.02, prefix_reuse=False),
    }.items():
        engine = MegatronEngine(loaded, "model", settings)
        if os.environ["RANK"] != "0":
            engine.follow()
        else:
            results[name] = _ours(engine, prompts, tokens_to_generate)
            engine.close()
    # One at a time: NeMo gives the shorter prompts of a batch more tokens than asked for (D-16).
    results["theirs"] = [_nemo(loaded, torch.tensor([prompt]), tokens_to_generate) for prompt in prompts]
    if os.environ["RANK"] == "0":
        Path(results_path).write_text(json.dumps(results))


def _ours(engine: MegatronEngine, prompts: list[list[int]], tokens_to_generate: int) -> dict[str, object]:
    eos = (engine.info.tokenizer.eos_id,)

    def sample(prompt: list[int], **settings: object) -> Sample:
        return Sample(tuple(prompt), tokens_to_generate, stop_ids=eos, **settings)  # type: ignore[arg-type]

    greedy = [sample(prompt, greedy=True) for prompt in prompts]
    scored = [sample(prompt, greedy=True, compute_logprob=True, all_probs=i == 0) for i, prompt in enumerate(prompts)]
    partly = [sample(prompt, greedy=True, token_logprobs=True, top_logprobs=3) for prompt in prompts]
    # As lm-evaluation-harness has prompts scored: with one token after them, or none.
    echoed = [
        Sample(tuple(prompt), n % 2, greedy=True, token_logprobs=True, top_logprobs=2, prompt_logprobs=True)
        for n, prompt in enumerate(prompts)
    ]
    drawn = [sample(prompt, random_seed=7, top_k=20, top_p=0.95) for prompt in prompts]
    penalised = sample(prompts[0], top_k=1, repetition_penalty=50.0)
    scored_done, partly_done = complete(engine, scored), complete(engine, partly)
    results: dict[str, object] = {
        "together": _ids(complete(engine, greedy)),
        "alone": [complete(engine, [one])[0].token_ids for one in greedy],
        # Beside other rows, with other settings, in another order.
        "mixed": _ids(complete(engine, [*reversed(greedy), *drawn])[: len(greedy)])[::-1],
        "scored": _ids(scored_done),
        "partly scored": _ids(partly_done),
        "logprob": [done.logprob for done in scored_done],
        "full_logprob": scored_done[0].full_logprob,
        "token_logprobs": [done.token_logprobs for done in partly_done],
        "top_logprobs": [done.top_logprobs for done in partly_done],
        "echoed": [[done.token_ids, done.token_logprobs, done.top_logprobs] for done in complete(engine, echoed)],
        "drawn": _ids(complete(engine, drawn)),
        "drawn alone": [complete(engine, [one])[0].token_ids for one in drawn],
        "drawn among others": _ids(complete(engine, [*greedy, penalised, *reversed(drawn)])[len(greedy) + 1 :])[::-1],
        "penalised": complete(engine, [penalised])[0].token_ids,
        "joining": _joining(engine, greedy, seed=1),
        "scores": _scores(engine, greedy),
        "labels": [_labels(engine, prompts, seed) for seed in range(3)],
        "counters": vars(engine.counters).copy(),
    }
    return results


def _ids(completions: list[Completion]) -> list[tuple[int, ...]]:
    return [done.token_ids for done in completions]


def _joining(engine: MegatronEngine, samples: list[Sample], seed: int) -> list[tuple[int, ...]]:
    """Rows that join at random steps, beside others that are cancelled on the way."""
    chance = random.Random(seed)
    waiting, rows, doomed, done = list(range(len(samples))), {}, [], {}
    chance.shuffle(waiting)
    while len(done) < len(samples):
        if waiting and chance.random() < 0.3:
            place = waiting.pop()
            rows[engine.add(samples[place])] = place
            doomed.append(engine.add(samples[chance.randrange(len(samples))]))
        if doomed and chance.random() < 0.2:
            engine.cancel(doomed.pop())
        for event in engine.step():
            assert not isinstance(event, Failed), event
            if isinstance(event, Finished) and event.row in rows:
                done[rows[event.row]] = event.completion.token_ids
    for row in doomed:
        engine.cancel(row)
    return [done[place] for place in range(len(samples))]


def score_requests(prompts: list[list[int]], tokenizer: ServedTokenizer) -> list[ScoreRequest]:
    """Several spans after each prompt: what a story may say, and any tokens at all, of one token and of more than a
    step takes, equal ones, some beginning alike."""
    chance = random.Random(4)
    said = [" there was a little girl.", " She liked to play with her red ball in the park. One day, she saw a dog."]
    requests = []
    for prompt in prompts:
        spans = [tuple(tokenizer.encode_continuation(text)) for text in said]
        spans += [
            tuple(chance.randrange(3, tokenizer.vocab_size) for _ in range(length)) for length in (1, 2, 60, 9, 1, 5)
        ]
        requests.append(ScoreRequest(tuple(prompt), (*spans, spans[1], (*spans[1][:12], 5), (*spans[4][:30], 5))))
    return requests


def _scores(engine: MegatronEngine, greedy: list[Sample]) -> dict[str, object]:
    """Token log-probabilities of the same requests in different company, and what greedy rows among them become."""
    requests = score_requests([list(sample.prompt_ids) for sample in greedy], engine.info.tokenizer)
    chance = random.Random(6)
    order = chance.sample(range(len(requests)), len(requests))
    mixed: dict[int, object] = {}
    # Beside rows that generate, others that are cancelled on the way, and the same spans asked for once more.
    places = {engine.add(requests[place]): ("scores", place) for place in order}
    doomed = [engine.add(request) for request in requests[:4]]
    places |= {engine.add(sample): ("ids", place) for place, sample in enumerate(greedy)}
    beside: dict[int, object] = {}
    while len(mixed) + len(beside) < len(requests) + len(greedy):
        for event in engine.step():
            assert not isinstance(event, Failed), event
            if isinstance(event, Scored) and event.row in places:
                mixed[places[event.row][1]] = event.scores.token_logprobs
            elif isinstance(event, Finished):
                beside[places[event.row][1]] = event.completion.token_ids
        if doomed and chance.random() < 0.5:
            engine.cancel(doomed.pop())
    for row in doomed:
        engine.cancel(row)
    return {
        "together": [found.token_logprobs for found in score(engine, requests)],
        "alone": [score(engine, [request])[0].token_logprobs for request in requests],
        "span by span": [
            [score(engine, [ScoreRequest(request.prompt_ids, (span,))])[0].token_logprobs[0] for span in request.spans]
            for request in requests
        ],
        "mixed": [mixed[place] for place in range(len(requests))],
        "greedy beside": [beside[place] for place in range(len(greedy))],
    }


def _labels(engine: MegatronEngine, prompts: list[list[int]], seed: int) -> list[list[object]]:
    """Constrained lines on beginnings of the prompts, added in another order and in other portions for every seed."""
    digits = [engine.info.tokenizer.encode(str(value))[-1] for value in range(5)]
    comma = engine.info.tokenizer.encode("a,")[-1]
    step = tuple((digit, comma) for digit in digits)
    key = (tuple(engine.info.tokenizer.encode("q:")),)
    texts = [prompt[: 1 + n % len(prompt)] for n, prompt in enumerate(prompts * (NUM_LABELS // len(prompts) + 1))]
    samples = [
        Sample(tuple([*text, 3 + n % 200]), 24, greedy=True, constraint=(key, step, key, step))
        for n, text in enumerate(texts[:NUM_LABELS])
    ]
    chance = random.Random(seed)
    order = chance.sample(range(NUM_LABELS), NUM_LABELS)
    labels: dict[int, list[object]] = {}
    while order:
        count = chance.randint(1, 120)
        portion, order = order[:count], order[count:]
        for place, done in zip(portion, complete(engine, [samples[place] for place in portion]), strict=True):
            choices = [[choice.chosen, choice.logprobs] for choice in done.choices]
            labels[place] = [done.token_ids, choices]
    return [labels[place] for place in range(NUM_LABELS)]


def _nemo(loaded: object, prompt: object, tokens_to_generate: int) -> dict[str, object]:
    import torch
    from nemo.collections.nlp.modules.common.text_generation_strategy import GPTModelTextGenerationStrategy
    from nemo.collections.nlp.modules.common.text_generation_utils import generate  # what NeMo's server calls

    model = loaded.nemo_model  # type: ignore[attr-defined]
    padded = torch.nn.functional.pad(prompt, (0, tokens_to_generate), value=model.tokenizer.eos_id)  # type: ignore[arg-type]
    output = generate(
        model,
        inputs=(padded, torch.tensor([prompt.shape[1]])),  # type: ignore[attr-defined]
        tokens_to_generate=tokens_to_generate,
        compute_logprob=True,
        greedy=True,
        strategy=GPTModelTextGenerationStrategy(model),
    )
    return {"token_ids": output["token_ids"][0], "logprob": output["logprob"][0].tolist()}


if __name__ == "__main__":
    main()
