import json

import pytest
import tiny_world
from hypothesis import given
from hypothesis import strategies as st

from steerlm_nemo.engine.protocol import ModelInfo
from steerlm_nemo.model_kind import STEERLM, SteerLMFormat
from steerlm_nemo.serving.requests.body import BadRequest
from steerlm_nemo.serving.requests.generate import GenerateRequest, Nemo123Request
from steerlm_nemo.serving.samples.generate import generate_samples
from steerlm_nemo.template import ChatTemplate

ONE = {"sentences": ["hi"]}


@pytest.fixture(scope="module")
def info(tmp_path_factory):
    tokenizer = tiny_world.make_tokenizer(tmp_path_factory.mktemp("tokenizer"))
    served = SteerLMFormat(ChatTemplate(), tiny_world.SCHEMA, STEERLM)
    return ModelInfo("tiny", tokenizer, tokenizer.vocab_size, 64, served, {})


def read(body, model=GenerateRequest):
    return model.from_json(body, max_prompts=128)


def refusal(body, model=GenerateRequest):
    with pytest.raises(BadRequest) as err:
        read(body, model)
    return str(err.value)


def test_defaults_are_the_references():
    assert read(ONE).model_dump(exclude={"task_ids"}) == {
        "sentences": ["hi"],
        "tokens_to_generate": 64,
        "all_probs": False,
        "temperature": 1.0,
        "add_BOS": False,
        "greedy": False,
        "top_k": 0,
        "top_p": 0.9,
        "repetition_penalty": 1.0,
        "end_strings": ["<|endoftext|>"],
        "min_tokens_to_generate": 0,
        "min_tokens": 0,
        "ignore_eos": False,
        "neighbors": None,
        "compute_logprob": False,
        "random_seed": None,
    }


@pytest.mark.parametrize(
    ("key", "values", "message"),
    [
        ("tokens_to_generate", [0, -1, 1.0, "5", True, None], "tokens_to_generate must be an integer greater than 0"),
        ("all_probs", [0, 1, "true", None], "all_probs must be a boolean value"),
        (
            "temperature",
            [0, -1, 100.1, True, "1", None, 10**400],
            "temperature must be a positive number less than or equal to 100.0",
        ),
        ("add_BOS", [1, "no"], "add_BOS must be a boolean value"),
        ("greedy", [1, None], "greedy must be a boolean value"),
        ("top_k", [-1, 1.5, True, "1", 10**400], "top_k must be a positive integer number"),
        ("top_p", [-0.1, 1.1, True, None], "top_p must be a positive number less than or equal to 1.0"),
        ("repetition_penalty", [0.9, True, "2"], "repetition_penalty must be a positive number no less than 1.0"),
        ("end_strings", ["a", [1], [""], None, ["\ud800"]], "expect end_strings to be a list of strings"),
        ("min_tokens_to_generate", [-1, 1.0, True], "min_tokens_to_generate must be an integer no less than 0"),
        ("neighbors", [-1, 1.5, True], "num of neighbors must be an integer no less than 0"),
        ("compute_logprob", [1, None], "compute_logprob must be a boolean value"),
        ("random_seed", [-1, 1.5, True, 2**63], "random_seed must be a positive integer number or None"),
    ],
)
def test_every_broken_rule_gets_the_references_message(key, values, message):
    for value in values:
        assert refusal({**ONE, key: value}, Nemo123Request) == message, value
        assert refusal({**ONE, key: value}).startswith(message + ", found "), value


@pytest.mark.parametrize(
    ("key", "value", "taken"),
    [
        ("temperature", 100, 100.0),
        ("top_k", 3.0, 3),
        ("top_p", 0, 0.0),
        ("top_p", 1, 1.0),
        ("end_strings", [], []),
        ("random_seed", 2**53 + 1, 2**53 + 1),
    ],
)
def test_values_at_the_edge_are_taken(key, value, taken):
    assert getattr(read({**ONE, key: value}), key) == taken


@pytest.mark.parametrize("sentences", [[], "hi", [1], None, [["a"]], ["\ud800"]])
def test_sentences_must_be_a_list_of_texts(sentences):
    assert "sentences" in refusal({"sentences": sentences})


def test_a_missing_list_of_sentences_is_named():
    assert refusal({}) == "the key 'sentences' is missing; it must be a list of strings"
    assert "JSON object" in refusal(["hi"])


def test_129_sentences_are_too_many_and_128_are_not():
    assert len(read({"sentences": ["hi"] * 128}).sentences) == 128
    assert refusal({"sentences": ["hi"] * 129}) == "Maximum number of sentences is 128"


def test_task_ids_are_refused_with_the_references_words():
    assert refusal({**ONE, "task_ids": [1]}) == (
        "Input at 'sentences' must by a tuple of two tensors like:                    "
        "(context_tokens_tensor, context_length_tensor) if task ids are given"
    )


def test_neighbors_are_for_retrieval_models():
    assert "RETRO" in refusal({**ONE, "neighbors": 2})
    assert read({**ONE, "neighbors": None})
    assert read({**ONE, "neighbors": 2}, Nemo123Request)


def test_an_unknown_key_is_refused_with_the_nearest_one():
    assert (
        refusal({**ONE, "temprature": 1}) == "The request key 'temprature' is not allowed; did you mean 'temperature'?"
    )
    assert read({**ONE, "temprature": 1}, Nemo123Request).model_dump() == read(ONE).model_dump()


def test_checks_run_in_the_references_order():
    assert refusal({**ONE, "random_seed": -1, "greedy": 1, "top_p": 2}) == "greedy must be a boolean value, found 1"


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=5,
)
known = list(GenerateRequest.model_fields)
bodies = st.dictionaries(st.sampled_from([*known, "other"]), json_values, max_size=6)


@given(body=bodies, model=st.sampled_from([GenerateRequest, Nemo123Request]), ok=st.booleans())
def test_any_json_is_either_a_request_or_a_bad_request(info, body, model, ok):
    if ok:
        body["sentences"] = ["hi"]
    try:
        samples = generate_samples(read(body, model), info)
    except BadRequest as err:
        assert str(err)
    else:
        assert all(1 <= s.tokens_to_generate <= 64 - len(s.prompt_ids) and 0 < s.temperature <= 100 for s in samples)


def first_sample(info, **keys):
    return generate_samples(read({**ONE, **keys}), info)[0]


def test_one_token_end_strings_stop_by_id_and_longer_ones_by_text(info):
    sample = first_sample(info, end_strings=["\x11", "\n", "<extra_id_1>", "<|endoftext|>"])
    assert sample.stop_ids == (info.tokenizer.eos_id, *info.tokenizer.encode_continuation("\x11\n"))
    assert sample.stop_texts == ("<extra_id_1>",)


def test_eos_ends_a_row_whatever_the_end_strings(info):
    for end_strings in ([], ["<|endoftext|>"], ["\x11"]):
        assert info.tokenizer.eos_id in first_sample(info, end_strings=end_strings).stop_ids


def test_bos_comes_first_and_only_on_request(info):
    plain = first_sample(info).prompt_ids
    assert first_sample(info, add_BOS=True).prompt_ids == (info.tokenizer.bos_id, *plain)


def test_an_empty_sentence_needs_bos(info):
    assert generate_samples(read({"sentences": [""], "add_BOS": True}), info)[0].prompt_ids == (1,)
    with pytest.raises(BadRequest, match=r"sentences\[1\] is empty"):
        generate_samples(read({"sentences": ["a", ""]}), info)


def test_tokens_to_generate_are_clipped_to_the_context_and_a_full_prompt_is_refused(info):
    ids = info.tokenizer.encode("hello " * 20)
    sample = generate_samples(read({"sentences": ["hello " * 20], "tokens_to_generate": 4096}), info)[0]
    assert sample.tokens_to_generate == 64 - len(ids)
    with pytest.raises(BadRequest, match="This model's maximum context length is 64 tokens"):
        generate_samples(read({"sentences": ["hello " * 100]}), info)


def test_all_probs_of_a_whole_library_are_refused_before_they_fill_the_memory(info):
    body = {"sentences": ["hi"], "all_probs": True, "tokens_to_generate": 60}
    assert generate_samples(read(body), info)
    big = ModelInfo("big", info.tokenizer, 10**6, 64, info.format, {})
    with pytest.raises(BadRequest, match="all_probs would answer with"):
        generate_samples(read(body), big)


def test_messages_survive_json():
    assert json.loads(json.dumps(refusal({**ONE, "task_ids": None}))).startswith("Input at")
