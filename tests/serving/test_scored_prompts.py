"""What lm-evaluation-harness's `local-completions` gets: prompts with the log-probabilities of their tokens.

It sends a context and a continuation as token ids (or their text), asks for one token, greedily, with `echo` and
`logprobs` 1, and reads what stands between the context and that one token.
"""

import json

import httpx
import live
import pytest
import torch
from hf_engine import HFEngine

TEXTS = ["Once upon a time, there was", "Lily", 'She said, "Hello!"\nThen the sun came out.']


@pytest.fixture(scope="module")
def engine(genuine_checkpoint):
    return HFEngine.load(genuine_checkpoint)


@pytest.fixture(scope="module")
def ask(engine):
    with live.run_engine(engine) as port, httpx.Client(base_url=f"http://127.0.0.1:{port}", trust_env=False) as client:

        def ask(prompt, **settings):
            body = {"prompt": prompt, "echo": True, "logprobs": 1, "temperature": 0, "max_tokens": 1, "seed": 1234}
            answer = client.post("/v1/completions", json=body | settings, timeout=60)
            assert answer.status_code == 200, answer.text
            return answer if settings.get("stream") else answer.json()

        yield ask


def expected(engine, ids):
    """Of each token after the first: its log-probability, and whether it is the likeliest."""
    with torch.no_grad():
        rows = engine.model(torch.tensor([ids])).logits[0, :-1].log_softmax(-1)
    return [(float(row[token]), int(row.argmax()) == token) for row, token in zip(rows, ids[1:], strict=True)]


def harness(answer, num_context):
    """`parse_logprobs` of lm_eval/models/openai_completions.py: a sum, and whether greedy text would be the same."""
    found = []
    for choice, ctxlen in zip(answer["choices"], num_context, strict=True):
        logprobs = choice["logprobs"]["token_logprobs"][ctxlen:-1]
        top = choice["logprobs"]["top_logprobs"][ctxlen:-1]
        found.append((sum(logprobs), all(one == max(best.values()) for one, best in zip(logprobs, top, strict=True))))
    return found


@pytest.mark.parametrize("max_tokens", [0, 1, 3])
@pytest.mark.parametrize("kind", ["texts", "ids"])
def test_a_batch_of_prompts_is_scored_in_openais_shape(ask, engine, kind, max_tokens):
    tokenizer = engine.info.tokenizer
    ids = [tokenizer.encode(text) for text in TEXTS]
    answer = ask(TEXTS if kind == "texts" else ids, max_tokens=max_tokens)
    assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2]
    assert answer["usage"]["completion_tokens"] == 3 * max_tokens
    for text, prompt, choice in zip(TEXTS, ids, answer["choices"], strict=True):
        assert choice["text"].startswith(text) and choice["finish_reason"] == "length"
        tokens, logprobs, top, offsets = (
            choice["logprobs"][key] for key in ("tokens", "token_logprobs", "top_logprobs", "text_offset")
        )
        assert len(tokens) == len(logprobs) == len(top) == len(offsets) == len(prompt) + max_tokens
        assert logprobs[0] is None and top[0] is None
        right = expected(engine, prompt)
        assert logprobs[1 : len(prompt)] == pytest.approx([logprob for logprob, _ in right], abs=1e-4)
        likeliest = [logprob == max(best.values()) for logprob, best in zip(logprobs[1:], top[1:], strict=True)]
        assert likeliest == [is_likeliest for _, is_likeliest in right] + [True] * max_tokens  # those made are greedy
        assert all(token in best and len(best) <= 2 for token, best in zip(tokens[1:], top[1:], strict=True))
        ends = [*offsets[1:], len(choice["text"])]
        pieces = [choice["text"][start:end] for start, end in zip(offsets, ends, strict=True)]
        assert "".join(pieces) == choice["text"]
        assert [piece.strip() for piece in pieces] == [token.strip() for token in tokens]


@pytest.mark.parametrize("batch", [1, 3])
def test_the_harness_reads_the_sum_and_the_greedy_check_of_a_continuation(ask, engine, batch):
    tokenizer = engine.info.tokenizer
    context = [tokenizer.bos_id, *tokenizer.encode("Once upon a time")]
    greedy = tokenizer.encode_continuation(ask([context], max_tokens=4, echo=False)["choices"][0]["text"])
    continuations = [greedy, tokenizer.encode_continuation(" there dog"), tokenizer.encode_continuation(" ,.")][:batch]
    answer = ask([context + continuation for continuation in continuations])
    found = harness(answer, [len(context)] * batch)
    assert [is_greedy for _, is_greedy in found] == [True, False, False][:batch]
    for (total, is_greedy), continuation in zip(found, continuations, strict=True):
        right = expected(engine, context + continuation)[len(context) - 1 :]
        assert total == pytest.approx(sum(logprob for logprob, _ in right), abs=1e-4)
        assert is_greedy == all(likeliest for _, likeliest in right)


def test_a_rolling_window_as_long_as_the_context_is_scored_and_one_longer_is_refused_as_clients_know_it(ask, engine):
    window = [engine.info.tokenizer.bos_id] * engine.info.context_length
    assert len(ask([window], max_tokens=0)["choices"][0]["logprobs"]["tokens"]) == len(window)
    assert len(ask([window[1:]])["choices"][0]["logprobs"]["tokens"]) == len(window)
    told = f"context_length_exceeded.*This model's maximum context length is {len(window)} tokens.*prompt is too long"
    with pytest.raises(AssertionError, match=told):
        ask([[*window, 5]], max_tokens=0)


def test_the_token_after_a_prompt_is_there_even_where_it_only_ends_the_text(ask, engine):
    """The harness takes the last one for it, so without it a token of the continuation would not be counted."""
    tokenizer = engine.info.tokenizer
    ids = tokenizer.encode(TEXTS[0])
    (choice,) = ask([ids], logit_bias={str(tokenizer.eos_id): 100})["choices"]
    assert (choice["text"], choice["finish_reason"]) == (TEXTS[0], "stop")
    assert len(choice["logprobs"]["tokens"]) == len(ids) + 1


def test_a_stream_of_scored_prompts_adds_up_to_the_answer_that_is_none(ask, engine):
    settings = {"n": 2, "temperature": 1, "max_tokens": 5}
    whole = ask(TEXTS, **settings)["choices"]
    texts, logprobs, ends = {}, {}, {}
    for line in ask(TEXTS, stream=True, **settings).text.split("\n\n"):
        if line and line != "data: [DONE]":
            (choice,) = json.loads(line.removeprefix("data: "))["choices"]
            index = choice["index"]
            texts[index] = texts.get(index, "") + choice["text"]
            logprobs[index] = choice["logprobs"] or logprobs[index]
            ends[index] = choice["finish_reason"] or ends.get(index)
    for choice in whole:
        index = choice["index"]
        assert (texts[index], logprobs[index], ends[index]) == (
            choice["text"],
            choice["logprobs"],
            choice["finish_reason"],
        )


def test_nothing_to_generate_is_answered_with_nothing_or_the_prompt(ask):
    (choice,) = ask("Lily", max_tokens=0, logprobs=None)["choices"]
    assert (choice["text"], choice["finish_reason"], choice["logprobs"]) == ("Lily", "length", None)
    assert ask("Lily", max_tokens=0, logprobs=None, echo=False)["choices"][0]["text"] == ""
    for text in TEXTS:
        assert ask(text, max_tokens=0, echo=False)["choices"][0]["logprobs"]["tokens"] == []
