"""Chat over HTTP with models that have no attributes, and what all models make of unusual conversations."""

from __future__ import annotations

from dataclasses import replace

import chat_shapes
import live
import openai
import pytest
import tiny_world
import torch
from hf_engine import HFEngine
from transformers import LlamaConfig, LlamaForCausalLM

from steerlm_nemo.conversation import SYSTEM_PROMPT, Conversation, RecordRef, Turn
from steerlm_nemo.engine.protocol import ModelInfo, Sample, complete
from steerlm_nemo.model_kind import PLAIN, STEERLM, SteerLMFormat
from steerlm_nemo.own_template.own import OwnTemplate
from steerlm_nemo.serving.requests.body import BadRequest
from steerlm_nemo.serving.requests.openai import ChatRequest
from steerlm_nemo.serving.samples.chat import MarkerChat
from steerlm_nemo.tokenizer import HuggingFaceTokenizer

ASK = [{"role": "user", "content": "Name a river."}]
GREEDY = {"temperature": 0, "max_tokens": 12}


def client_of(port):
    return openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0)


@pytest.fixture(scope="module")
def theirs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("instruct")
    return chat_shapes.save_tokenizer(folder, "qwen2.5"), folder


@pytest.fixture(scope="module")
def instruct(theirs):
    """A model with random weights and a template of its own; the third token that it says ends a text."""
    tokenizer = HuggingFaceTokenizer(theirs[1])
    torch.manual_seed(5)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=tokenizer.vocab_size, max_position_embeddings=256, **sizes))
    own = OwnTemplate(chat_shapes.QWEN25, tokenizer.special_names)
    return HFEngine(model, tokenizer, None, "instruct", own)


@pytest.fixture(scope="module")
def client(instruct):
    with live.run_engine(instruct) as port:
        yield client_of(port)


def completion(engine, theirs, messages, **options):
    ids = theirs.apply_chat_template(messages, add_generation_prompt=True)
    (made,) = complete(engine, [Sample(tuple(ids), tokens_to_generate=12, greedy=True, **options)])
    return made.token_ids[len(ids) :]


def test_a_model_without_attributes_answers_as_generate_after_its_template_does(client, instruct, theirs):
    for messages in (
        ASK,
        [{"role": "system", "content": "Be brief."}, *ASK],
        [*ASK, {"role": "assistant", "content": "No."}, *ASK],
    ):
        made = completion(instruct, theirs[0], messages)
        answer = client.chat.completions.create(model="instruct", messages=messages, **GREEDY)
        assert answer.choices[0].message.content == theirs[0].decode(made, skip_special_tokens=True)
        assert answer.usage.prompt_tokens == len(theirs[0].apply_chat_template(messages, add_generation_prompt=True))
        assert answer.choices[0].finish_reason == "length" and not hasattr(answer, "attributes")
        chunks = list(client.chat.completions.create(model="instruct", messages=messages, stream=True, **GREEDY))
        assert "".join(c.choices[0].delta.content or "" for c in chunks) == answer.choices[0].message.content


def test_a_response_ends_with_any_token_that_generation_config_names(instruct, theirs):
    third = completion(instruct, theirs[0], ASK)[2]
    ending = HFEngine(
        instruct.model, instruct.info.tokenizer, None, "x", replace(instruct.info.own_template, end_ids=(third,))
    )
    with live.run_engine(ending) as port:
        for answer in (
            client_of(port).chat.completions.create(model="x", messages=ASK, **GREEDY),
            client_of(port).completions.create(
                model="x", prompt=theirs[0].apply_chat_template(ASK, add_generation_prompt=True), **GREEDY
            ),
        ):
            assert answer.choices[0].finish_reason == "stop" and answer.usage.completion_tokens == 3


def test_what_the_model_is_is_told_and_its_document_knows_no_attributes(client, instruct):
    card = client.models.retrieve("instruct")
    assert (card.kind, card.abilities, card.template) == (None, ["chat", "generate"], "own")
    assert card.title == "a checkpoint with a chat template of its own"
    document = live.app(instruct).state.server.document["components"]["schemas"]
    assert "OwnChatRequest" in document and "ChatRequest" not in document
    assert document["OwnChatRequest"]["properties"]["attributes"]["enum"] == [{}, None]


@pytest.mark.parametrize(
    ("body", "param", "reason"),
    [
        ({"extra_body": {"attributes": {"quality": 4}}}, "attributes", "this model has no attributes; accepted: {}"),
        (
            {"messages": [{"role": "tool", "content": "x", "name": "f"}] * 200},
            "messages",
            "maximum context length is 256",
        ),
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools", "the model calls no tools"),
    ],
)
def test_refusals_of_a_model_with_its_own_template_name_the_key(client, body, param, reason):
    with pytest.raises(openai.BadRequestError, match=reason) as caught:
        client.chat.completions.create(**{"model": "instruct", "messages": ASK, **body})
    assert caught.value.param == param


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("{% for %}", "template cannot be used: line 1"),
        ("{{ raise_exception('no chat') }}", "refuses this conversation: no chat"),
        ("{{ 'a' * 10**10 }}", "needs more memory than it may have"),
    ],
)
def test_a_template_that_cannot_be_used_costs_the_chat_and_nothing_else(instruct, source, reason, caplog):
    broken = HFEngine(instruct.model, instruct.info.tokenizer, None, "x", OwnTemplate(source, {}))
    with live.run_engine(broken) as port:
        with pytest.raises(openai.NotFoundError, match=f"POST /v1/completions continues text.*{reason}"):
            client_of(port).chat.completions.create(model="x", messages=ASK)
        assert client_of(port).completions.create(model="x", prompt="a").choices[0].text
        card = client_of(port).models.retrieve("x")
        assert (card.abilities, card.template) == (["generate"], None)
    assert "no chat with model x" in caplog.text


@pytest.fixture(scope="module")
def steered(tmp_path_factory):
    """What the API knows of a SteerLM model; there is no model."""
    tokenizer = tiny_world.make_tokenizer(tmp_path_factory.mktemp("tiny"))
    served = SteerLMFormat(tiny_world.TEMPLATE, tiny_world.SCHEMA, STEERLM)
    return ModelInfo("tiny", tokenizer, tokenizer.vocab_size, 256, served, {})


def prompt_of(info, messages, **keys):
    chat = MarkerChat(info, info.format)
    request = ChatRequest.from_json({"messages": messages, **keys}, max_prompts=128)
    return chat.prompt(request, chat.line(request))


def rendered(info, kind, system, *turns):
    turns = [Turn(role, text, *more) for role, text, *more in turns]
    return info.format.template.render(
        Conversation(system, tuple(turns), RecordRef("train", 1), kind), info.tokenizer
    ).token_ids


def test_a_model_fine_tuned_without_attributes_is_asked_as_it_was_trained(steered):
    info = replace(steered, format=replace(steered.format, kind=PLAIN))
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes?"}, *ASK]
    trained = rendered(
        info,
        None,
        SYSTEM_PROMPT,
        ("User", "Hi"),
        ("Assistant", "Yes?"),
        ("User", "Name a river."),
        ("Assistant", "Seine"),
    )
    ids = tuple(prompt_of(info, messages).ids)
    assert ids == trained[: len(ids)] and info.tokenizer.decode(list(trained[len(ids) :])) == "Seine\n\x11"
    with pytest.raises(BadRequest, match="without attributes: leave attributes out"):
        prompt_of(info, messages, attributes={"quality": 4})


def test_system_messages_are_one_wherever_they_stand(steered):
    scattered = [{"role": "system", "content": "One."}, *ASK, {"role": "assistant", "content": "a"}]
    scattered += [{"role": "developer", "content": "Two."}, *ASK, {"role": "system", "content": "Three."}]
    gathered = [{"role": "system", "content": "One.\nTwo.\nThree."}, *ASK, {"role": "assistant", "content": "a"}, *ASK]
    assert prompt_of(steered, scattered).ids == prompt_of(steered, gathered).ids
    later = [*ASK, {"role": "system", "content": "Two."}]
    assert prompt_of(steered, later).ids == prompt_of(steered, [{"role": "system", "content": "Two."}, *ASK]).ids


@pytest.mark.parametrize(
    ("messages", "keys", "reason"),
    [
        ([*ASK, {"role": "assistant", "content": "a"}], {}, "last message must be the user's.*continue_final_message"),
        (ASK, {"continue_final_message": True}, "the last message is the user's, not the assistant's"),
        (ASK, {"add_generation_prompt": False}, "needs continue_final_message: true"),
        (
            [*ASK, {"role": "assistant", "content": "a", "attributes": {"quality": 0}}],
            {"continue_final_message": True, "attributes": {"quality": 3}},
            r"messages\[1\].attributes: .*written at the requested attributes",
        ),
        ([{"role": "tool", "content": "x"}], {}, r"messages\[0\].role 'tool' is not supported; accepted: 'system' or"),
        (
            [{"role": "assistant", "content": "a", "tool_calls": [{"function": {"name": "f"}}]}],
            {},
            r"messages\[0\].tool_calls .* is not supported: the model calls no tools",
        ),
        ([{"role": "system", "content": "a"}], {}, "last message must be the user's"),
    ],
)
def test_what_the_training_of_a_steered_model_never_had_is_refused_by_name(steered, messages, keys, reason):
    with pytest.raises(BadRequest, match=reason):
        prompt_of(steered, messages, **keys)
