"""What programs written for OpenAI's own Python client get from our server: the client here is that client."""

import inspect
import json
import threading
from concurrent.futures import ThreadPoolExecutor, as_completed

import httpx
import live
import openai
import pytest
import tiny_world
import torch
from hf_engine import HFEngine

from steerlm_nemo.conversation import Conversation, RecordRef, Turn
from steerlm_nemo.engine.text import GrowingText, safe_length, token_bytes
from steerlm_nemo.serving.requests.openai import ChatRequest
from steerlm_nemo.serving.samples.chat import chat_of
from steerlm_nemo.serving.samples.openai import chat_samples
from steerlm_nemo.steering.steer import Sampling, steer

VALUES = {"quality": 1, "humor": 2, "lang": "de"}
ASK = [{"role": "system", "content": tiny_world.SYSTEM}, {"role": "user", "content": "Speak!"}]
STEERED = {"attributes": VALUES}


@pytest.fixture(scope="module")
def engine():
    return live.engine("VALUE_TO_TEXT")


@pytest.fixture(scope="module")
def port(engine):
    with live.run_engine(engine) as port:
        yield port


@pytest.fixture(scope="module")
def client(port):
    return client_of(port)


def client_of(port, **options):
    return openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0, **options)


def chat(client, messages=ASK, **options):
    settings = {"temperature": 0, "extra_body": STEERED, **options}
    return client.chat.completions.create(model="VALUE_TO_TEXT", messages=messages, **settings)


def samples_of(body, info):
    request = ChatRequest.from_json(body, max_prompts=128)
    chatting = chat_of(info)
    return chat_samples(request, chatting.line(request), info, chatting, 128).samples


def streamed(chunks):
    """Text, finish reasons and token log-probabilities per choice, as a client puts them together."""
    texts, ends, tokens = {}, {}, {}
    for chunk in chunks:
        for choice in chunk.choices:
            piece = choice.delta.content if hasattr(choice, "delta") else choice.text
            texts[choice.index] = texts.get(choice.index, "") + (piece or "")
            ends[choice.index] = choice.finish_reason or ends.get(choice.index)
            if choice.logprobs is not None:
                tokens.setdefault(choice.index, []).extend(choice.logprobs.content)
    return texts, ends, tokens


def test_a_chat_is_steered_by_the_attributes_of_extra_body(client):
    for quality, humor, lang in [(0, 0, "en"), (4, 2, "de"), (2, 1, "en")]:
        values = {"quality": quality, "humor": humor, "lang": lang}
        answer = chat(client, extra_body={"attributes": values})
        assert answer.choices[0].message.role == "assistant"
        assert answer.choices[0].message.content == tiny_world.response(values)
        assert answer.choices[0].finish_reason == "stop"
        assert answer.object == "chat.completion" and answer.model == "VALUE_TO_TEXT"


def test_attributes_come_in_any_order_and_those_left_out_get_the_defaults_of_the_schema(client):
    answers = [chat(client, extra_body={"attributes": values}) for values in (VALUES, dict(reversed(VALUES.items())))]
    assert answers[0].choices[0].message == answers[1].choices[0].message
    answer = chat(client, extra_body={})
    assert answer.choices[0].message.content == tiny_world.response({"quality": 4, "humor": 0, "lang": "en"})
    assert answer.attributes == {"quality": 4, "humor": 0, "lang": "en"}


def test_the_prompt_of_a_chat_is_the_beginning_of_a_training_record_token_by_token(engine):
    served, tokenizer = engine.info.format, engine.info.tokenizer
    earlier = served.schema.order({"quality": 3, "humor": 1, "lang": "en"})
    wanted = served.schema.order(VALUES)
    turns = (
        Turn("User", "Tell me.\n"),
        Turn("Assistant", " good joke hello", earlier),
        Turn("User", "Say it \x11 again."),
        Turn("Assistant", "poor laugh hallo", wanted),
    )
    trained = served.template.render(
        Conversation(tiny_world.SYSTEM, turns, RecordRef("train", 1), "VALUE_TO_TEXT"), tokenizer
    )
    body = {
        "messages": [
            {"role": "developer", "content": tiny_world.SYSTEM},
            {"role": "user", "content": [{"type": "text", "text": "Tell "}, {"type": "text", "text": "me.\n"}]},
            {"role": "assistant", "content": " good joke hello", "attributes": earlier.as_dict(), "refusal": None},
            {"role": "user", "content": "Say it \x11 again."},
        ],
        "attributes": dict(reversed(VALUES.items())),
    }
    prompt = samples_of(body, engine.info)[0].prompt_ids
    assert prompt == trained.token_ids[: len(prompt)]
    assert tokenizer.decode(list(trained.token_ids[len(prompt) :])) == "poor laugh hallo\n\x11"


@pytest.mark.parametrize("num_words", [0, 1, 2])
def test_a_begun_response_is_continued_at_the_requested_attributes(client, engine, num_words):
    for values in ({"quality": 4, "humor": 0, "lang": "en"}, {"quality": 0, "humor": 2, "lang": "de"}):
        begun = " ".join(tiny_world.response(values).split(" ")[:num_words])
        messages = [*ASK, {"role": "assistant", "content": begun}]
        keys = {"attributes": values, "continue_final_message": True, "add_generation_prompt": False}
        assert begun + chat(client, messages, extra_body=keys).choices[0].message.content == tiny_world.response(values)
        whole = samples_of({"messages": ASK, "attributes": values}, engine.info)[0].prompt_ids
        assert samples_of({"messages": messages, **keys}, engine.info)[0].prompt_ids[: len(whole)] == whole


def test_a_chat_is_answered_as_the_steering_client_is(client, port):
    messages = [*ASK, {"role": "assistant", "content": "good joke hello"}, {"role": "user", "content": "And now?"}]
    for limit in (2, 30):
        theirs = chat(client, messages, max_tokens=limit).choices[0].message.content
        ours = steer(messages, VALUES, f"127.0.0.1:{port}", sampling=Sampling(tokens_to_generate=limit))
        assert theirs == ours.text


def test_usage_counts_real_tokens_and_length_is_told_from_stop(client, engine):
    answer = chat(client, max_completion_tokens=2, n=3)
    prompt = samples_of({"messages": ASK, "attributes": VALUES}, engine.info)[0].prompt_ids
    assert [choice.finish_reason for choice in answer.choices] == ["length"] * 3
    assert answer.usage.prompt_tokens == len(prompt)
    assert answer.usage.completion_tokens == 2 * 3
    assert answer.usage.total_tokens == len(prompt) + 6
    assert chat(client).choices[0].finish_reason == "stop"


@pytest.mark.parametrize(
    "settings",
    [
        {"temperature": 0},
        {"temperature": 1.5, "seed": 7, "n": 3, "max_tokens": 40},
        {"temperature": 2, "seed": -1, "top_p": 0.95, "max_tokens": 60},
        {"temperature": 1.2, "seed": 3, "stop": ["o", "ll"], "n": 2},
        {"temperature": 2, "seed": 11, "logprobs": True, "top_logprobs": 3, "n": 2, "max_tokens": 30},
    ],
)
def test_a_streamed_answer_adds_up_to_the_one_that_is_not(client, settings):
    whole = chat(client, **settings)
    chunks = list(chat(client, stream=True, stream_options={"include_usage": True}, **settings))
    texts, ends, tokens = streamed(chunks)
    assert texts == {choice.index: choice.message.content for choice in whole.choices}
    assert ends == {choice.index: choice.finish_reason for choice in whole.choices}
    assert chunks[-1].usage == whole.usage and chunks[-1].choices == []
    assert all(chunk.usage is None and chunk.object == "chat.completion.chunk" for chunk in chunks[:-1])
    assert len({chunk.id for chunk in chunks}) == 1
    if "logprobs" in settings:
        assert tokens == {choice.index: choice.logprobs.content for choice in whole.choices}


def test_a_stream_comes_while_the_model_generates(engine):
    release = threading.Event()

    class Slow:
        info, counters = engine.info, engine.counters
        add, cancel = staticmethod(engine.add), staticmethod(engine.cancel)
        steps = 0

        def step(self):
            self.steps += 1
            if self.steps > 6:
                assert release.wait(30)
            return engine.step()

    with live.run_engine(Slow()) as port:
        chunks = iter(chat(client_of(port), stream=True))
        text = ""
        while not text:
            text += next(chunks).choices[0].delta.content or ""
        release.set()  # only now the rest can be made
        text += streamed(chunks)[0][0]
    assert text == tiny_world.response(VALUES)


def test_the_first_chunk_of_a_choice_has_its_first_text_and_every_choice_ends_when_it_ends(client):
    """Load tools take the first chunk for the first token; a choice that has ended does not wait for the others."""
    settings = {"n": 4, "temperature": 2, "seed": 5, "max_tokens": 60, "stop": "o"}
    chunks = [chunk.choices[0] for chunk in chat(client, stream=True, **settings)]
    assert sorted({choice.index for choice in chunks}) == [0, 1, 2, 3]
    for index in range(4):
        first, *others = [choice for choice in chunks if choice.index == index]
        assert first.delta.role == "assistant" and (first.delta.content or first.finish_reason)
        assert all(choice.delta.role is None for choice in others)
        assert [choice.finish_reason is not None for choice in (first, *others)] == [False] * len(others) + [True]
    ends = [n for n, choice in enumerate(chunks) if choice.finish_reason]
    assert any(choice.delta.content for choice in chunks[ends[0] + 1 :])


def test_usage_so_far_comes_with_every_chunk_where_it_is_asked_for(client):
    options = {"include_usage": True, "continuous_usage_stats": True}
    # Long enough that not all of it can be in the first chunk, however late that is sent.
    long = {"max_tokens": 100, "extra_body": {**STEERED, "ignore_eos": True}}
    counts = [chunk.usage.completion_tokens for chunk in chat(client, stream=True, stream_options=options, **long)]
    assert counts == sorted(counts) and 0 < counts[0] < counts[-1] == 100


def test_a_text_goes_on_where_its_end_is_ignored_or_has_to_wait(client, engine):
    whole = chat(client)
    text, num_tokens = whole.choices[0].message.content, whole.usage.completion_tokens
    for settings in ({"ignore_eos": True}, {"min_tokens": num_tokens + 9}):
        longer = chat(client, max_tokens=num_tokens + 9, extra_body={**STEERED, **settings})
        assert longer.choices[0].message.content.startswith(text) and longer.usage.completion_tokens == num_tokens + 9
        assert longer.choices[0].finish_reason == "length"
    # A stop string in the text of the least number of tokens is no stop; one after it is.
    ids = engine.info.tokenizer.encode_continuation(text)
    pieces = [engine.info.tokenizer.decode(ids[:n]) for n in range(len(ids) + 1)]
    least = next(n for n, piece in enumerate(pieces) if "l" in piece)
    late = chat(client, stop="l", extra_body={**STEERED, "min_tokens": least}).choices[0].message.content
    assert late == pieces[least] + text[len(pieces[least]) :].partition("l")[0] != text.partition("l")[0]


def test_what_ended_a_text_is_part_of_it_only_on_request(client, engine):
    text = chat(client).choices[0].message.content
    ids = engine.info.tokenizer.encode_continuation(text)
    word = ids.index(ids[-1])  # where that token comes first
    for settings, plain, end in [
        ({"stop": "la"}, text.partition("la")[0], "la"),
        ({"stop_token_ids": [ids[word]]}, engine.info.tokenizer.decode(ids[:word]), None),
    ]:
        for stream in (False, True):
            answers = []
            for keep in (False, True):
                body = {**STEERED, **settings, "include_stop_str_in_output": keep}
                answer = chat(client, extra_body=body, stream=stream)
                answers.append(streamed(answer)[0][0] if stream else answer.choices[0].message.content)
            end = end or engine.info.tokenizer.decode(ids[: word + 1]).removeprefix(plain)
            assert answers == [plain, plain + end]


def test_biases_and_penalties_act_on_greedy_texts_too(client, engine):
    tokenizer = engine.info.tokenizer
    first = tokenizer.encode_continuation(chat(client).choices[0].message.content)[0]
    biased = chat(client, logit_bias={str(first): -100}).choices[0].message.content
    assert tokenizer.encode_continuation(biased)[0] != first
    assert chat(client, logit_bias={str(first): 0}) and chat(client, logit_bias={}, presence_penalty=0)
    settings = {"max_tokens": 40, "presence_penalty": 2, "frequency_penalty": 2, "logprobs": True}
    varied = chat(client, **settings, extra_body={**STEERED, "ignore_eos": True, "repetition_penalty": 5.0})
    plain = chat(client, max_tokens=40, logprobs=True, extra_body={**STEERED, "ignore_eos": True})
    kinds = [len({token.token for token in each.choices[0].logprobs.content}) for each in (plain, varied)]
    assert kinds[1] > kinds[0]
    for bias, told in (
        ({"x": 1}, "has the key 'x'; keys must be token ids"),
        ({"9999": 1}, "not below the vocabulary"),
    ):
        with pytest.raises(openai.BadRequestError, match=told):
            chat(client, logit_bias=bias)


def test_seeds_repeat_and_choices_differ(client):
    drawn = {"temperature": 2, "max_tokens": 12, "n": 4}
    first, again, other = (
        [choice.message.content for choice in chat(client, seed=seed, **drawn).choices] for seed in (1, 1, 100)
    )
    assert first == again != other
    assert len(set(first)) > 1
    assert chat(client, **{**drawn, "n": 1}, seed=2).choices[0].message.content == first[1]  # choice i has seed + i


def test_stop_strings_end_the_text_before_them_even_inside_a_token(client, engine):
    whole = chat(client).choices[0].message.content  # poor laugh hallo
    pieces = [engine.info.tokenizer.id_to_piece(i) for i in engine.info.tokenizer.encode_continuation(whole)]
    inside = next(word[:-1] for piece in pieces if len(word := piece.strip("▁")) > 2)
    for stop in (inside, "laugh", "hallo", "r l", ["never", "o"], "poor"):
        stops = [stop] if isinstance(stop, str) else stop
        answer = chat(client, stop=stop)
        cut = min(whole.find(each) for each in stops if each in whole)
        assert answer.choices[0].message.content == whole[:cut]
        assert answer.choices[0].finish_reason == "stop"
        assert answer.usage.completion_tokens < chat(client).usage.completion_tokens
        assert streamed(chat(client, stop=stop, stream=True))[0] == {0: whole[:cut]}


def test_log_probabilities_are_those_of_the_model(client, engine):
    answer = chat(client, logprobs=True, top_logprobs=4)
    content = answer.choices[0].logprobs.content
    assert b"".join(bytes(token.bytes) for token in content) == answer.choices[0].message.content.encode()
    prompt = samples_of({"messages": ASK, "attributes": VALUES}, engine.info)[0].prompt_ids
    ids = [*prompt, *engine.info.tokenizer.encode_continuation(answer.choices[0].message.content)]
    with torch.no_grad():
        expected = engine.model(torch.tensor([ids])).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
    assert len(content) == len(expected)
    for token, row, chosen in zip(content, expected, ids[len(prompt) :], strict=True):
        best = row.topk(4)
        assert token.logprob == pytest.approx(float(row[chosen]), abs=1e-4)
        assert [other.logprob for other in token.top_logprobs] == pytest.approx(best.values.tolist(), abs=1e-4)
        assert token.top_logprobs[0].token == token.token  # greedy
        assert [bytes(other.bytes) for other in token.top_logprobs] == [
            token_bytes(engine.info.tokenizer, i) for i in best.indices.tolist()
        ]


def test_completions_continue_text_and_token_ids_alike(client, engine):
    prompt = "\x00System\nThree words.\n\n\n\x11User\nSpeak!\n\x11Assistant\n\x12quality:1,humor:2,lang:de\n"
    ids = engine.info.format.template.encode_prompt(prompt, engine.info.tokenizer)
    settings = {"model": "VALUE_TO_TEXT", "temperature": 0, "stop": "\n", "logprobs": 2}
    one = client.completions.create(prompt=prompt, **settings)
    assert one.object == "text_completion" and one.choices[0].text == "poor laugh hallo"
    assert one.usage.prompt_tokens == len(ids)
    logprobs = one.choices[0].logprobs
    assert "".join(logprobs.tokens) == "poor laugh hallo"
    assert logprobs.text_offset == [len("".join(logprobs.tokens[:i])) for i in range(len(logprobs.tokens))]
    assert [max(top.values()) for top in logprobs.top_logprobs] == logprobs.token_logprobs
    many = client.completions.create(prompt=[ids, ids[:-3]], n=2, **settings)
    assert [choice.index for choice in many.choices] == [0, 1, 2, 3]
    assert [choice.text for choice in many.choices[:2]] == ["poor laugh hallo"] * 2
    assert many.usage.prompt_tokens == len(ids) + len(ids) - 3
    stream = client.completions.create(prompt=prompt, stream=True, **{**settings, "logprobs": None})
    assert "".join(chunk.choices[0].text for chunk in stream) == "poor laugh hallo"
    echo = client.completions.create(prompt=prompt, echo=True, **{**settings, "logprobs": None})
    assert echo.choices[0].text == prompt + "poor laugh hallo"


def test_completions_default_to_16_tokens_as_openais(client):
    assert client.completions.create(model="VALUE_TO_TEXT", prompt="a").usage.completion_tokens <= 16


def test_a_genuine_base_model_completes_text_and_says_why_it_cannot_chat(genuine_checkpoint):
    expected = json.loads((genuine_checkpoint / "expected.json").read_text())["greedy_text"]
    engine = HFEngine.load(genuine_checkpoint)
    with live.run_engine(engine) as port:
        client = client_of(port)
        model = client.models.list().data[0].id
        answer = client.completions.create(
            model=model, prompt="", temperature=0, max_tokens=60, extra_body={"add_BOS": True}
        )
        assert len(answer.choices[0].text) > 100
        assert expected.strip().startswith(answer.choices[0].text.strip())
        with pytest.raises(openai.NotFoundError, match="needs a SteerLM model.*without a kind, which continues text"):
            client.chat.completions.create(model=model, messages=ASK)


def test_a_value_model_says_that_it_grades_and_does_not_chat():
    with (
        live.run_engine(live.engine("TEXT_TO_VALUE")) as port,
        pytest.raises(openai.NotFoundError, match="needs a SteerLM model.*is a value model, which grades"),
    ):
        client_of(port).chat.completions.create(model="TEXT_TO_VALUE", messages=ASK)


def test_the_model_is_listed_and_another_is_not_found(client):
    (card,) = client.models.list().data
    assert (card.id, card.object, card.context_length) == ("VALUE_TO_TEXT", "model", 256)
    assert client.models.retrieve("VALUE_TO_TEXT") == card
    with pytest.raises(openai.NotFoundError, match="this server has 'VALUE_TO_TEXT'"):
        client.models.retrieve("gpt-4")
    with pytest.raises(openai.NotFoundError) as caught:
        client.chat.completions.create(model="gpt-4", messages=ASK)
    assert caught.value.code == "model_not_found" and caught.value.param == "model"


@pytest.mark.parametrize(
    ("options", "param", "message"),
    [
        (
            {"extra_body": {"attributes": {"qualty": 4}}},
            "attributes",
            "unknown attribute 'qualty'; did you mean 'quality'",
        ),
        ({"extra_body": {"attributes": {"quality": 5}}}, "attributes", "quality is 5, but it must be 0 to 4"),
        ({"extra_body": {"attributes": {"quality": [1]}}}, "attributes.quality", "must be a whole number"),
        ({"extra_body": {"attributes": {"lang": "xx"}}}, "attributes", "one of en de"),
        ({"extra_body": {"atributes": {}}}, "atributes", "unknown key 'atributes'; did you mean 'attributes'?"),
        ({"temperature": 3}, "temperature", "temperature must be a number from 0 to 2, found 3"),
        ({"top_logprobs": 3}, "top_logprobs", "needs logprobs"),
        ({"stream_options": {"include_usage": True}}, "stream_options", "needs stream"),
        ({"stop": ""}, "stop", "not empty|1 to 500 characters"),
        ({"n": 129}, "n", "1 prompts x n 129 are more than 128 choices"),
        (
            {"tools": [{"type": "function", "function": {"name": "f"}}], "tool_choice": "auto"},
            "tools",
            r'tools \[{"type": "function".* not supported: the model calls no tools; accepted: \[\] or leaving it out',
        ),
        (
            {"response_format": {"type": "json_object"}},
            "response_format",
            "response_format type 'json_object' is not supported: .*; accepted: 'text' or leaving it out",
        ),
        ({"messages": []}, "messages", "1 to|at least 1"),
        ({"messages": [{"role": "tool", "content": "x", "tool_call_id": "1"}]}, "messages[0].tool_call_id", "no tools"),
        (
            {"messages": [{"role": "robot", "content": "x"}]},
            "messages[0].role",
            "'robot' is not supported; accepted: 'sy",
        ),
        ({"messages": [{"role": "assistant", "content": "x"}]}, "messages", "the last message must be the user's"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
            "messages[0].content[0].type",
            "type 'image_url' is not supported: text is all that is read and written; accepted: 'text'",
        ),
        ({"messages": [{"role": "user", "content": "a " * 300}]}, "messages", "no room to generate"),
    ],
)
def test_what_cannot_be_done_raises_the_clients_bad_request_error_naming_the_key(client, options, param, message):
    with pytest.raises(openai.BadRequestError, match=message) as caught:
        chat(client, **options)
    assert caught.value.type == "invalid_request_error" and caught.value.param == param


def test_every_argument_of_the_client_is_honoured_or_refused_by_name(client, engine):
    ours = {"self", "messages", "model", "extra_headers", "extra_query", "extra_body", "timeout"}
    arguments = set(inspect.signature(client.chat.completions.create).parameters) - ours
    known, neutral = ChatRequest.model_fields, ChatRequest.neutral
    assert arguments <= known.keys() | neutral.keys()
    for key in sorted(arguments - known.keys()):
        if neutral[key].takes("x"):
            assert samples_of({"messages": ASK, key: "x"}, engine.info)
        else:
            with pytest.raises(openai.BadRequestError, match=f"{key} 'x' is not supported: .*; accepted: ") as caught:
                chat(client, extra_body={key: "x"})
            assert caught.value.param == key
    assert {"stop", "n", "seed", "logprobs", "stream"} <= arguments


def test_other_failures_raise_the_clients_other_errors(engine):
    busy, gate = threading.Event(), threading.Event()

    class Stuck:
        info, counters = engine.info, engine.counters
        add, cancel = staticmethod(engine.add), staticmethod(engine.cancel)

        def step(self):
            busy.set()
            gate.wait(30)
            return engine.step()

    with (
        live.run_engine(Stuck(), max_batch_rows=1, http=live.http(max_waiting_requests=1)) as port,
        ThreadPoolExecutor(4) as pool,
    ):
        client = client_of(port)
        first = pool.submit(chat, client)
        assert busy.wait(30)
        others = as_completed([pool.submit(chat, client) for _ in range(3)])  # of which one may wait
        for _ in range(2):
            refused = next(others).exception()
            assert isinstance(refused, openai.RateLimitError) and "waiting already" in refused.message
            assert refused.response.headers["retry-after"] == "1"
        gate.set()
        assert first.result().choices and next(others).result().choices
    with pytest.raises(openai.APIConnectionError):
        chat(client)


def test_errors_under_v1_have_openais_shape_whatever_the_method(port):
    for method, path, status in [
        ("GET", "/v1/chat/completions", 405),
        ("POST", "/v1/embeddings", 404),
        ("POST", "/v1/completions", 415),
    ]:
        answer = httpx.request(method, f"http://127.0.0.1:{port}{path}", trust_env=False)
        assert answer.status_code == status
        assert set(answer.json()["error"]) == {"message", "type", "param", "code"}


def test_growing_text_is_the_text_of_all_tokens_however_they_cut_characters():
    tokenizer = live.engine(None).info.tokenizer
    prompt = tokenizer.encode("Tell me")
    generated = tokenizer.encode_continuation(" good \u00e4\U0001f600\u4e2d\n  joke \x11")
    growing, seen = GrowingText(tokenizer, prompt), []
    for token_id in generated:
        growing.add(token_id)
        seen.append(growing.text)
    assert growing.finish() == " good \u00e4\U0001f600\u4e2d\n  joke \x11"
    assert all("\ufffd" not in text and growing.finish().startswith(text) for text in seen)
    assert len(generated) > len(set(seen))  # bytes of one character did not show one by one


def test_text_that_may_turn_out_to_be_a_stop_string_is_held_back():
    assert safe_length("abc\n", ["\n\x11"]) == 3
    assert safe_length("abc<ext", ["<extra_id_1>", "t."]) == 3
    assert safe_length("abc", ["xyz"]) == 3
    assert safe_length("abc", []) == 3
