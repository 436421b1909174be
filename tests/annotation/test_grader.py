import re

import httpx
import live
import pytest
import tiny_world
import torch

from steerlm_nemo.annotation.grader import Grader, legal_prefix
from steerlm_nemo.attributes import Attribute, AttributeSchema
from steerlm_nemo.client.pool import ServerPool
from steerlm_nemo.model_kind import GRADER, SteerLMFormat


@pytest.mark.parametrize(
    ("completion", "items"),
    [
        ("quality:4,humor:0,lang:en\n\x11", "quality:4,humor:0,lang:en"),
        ("quality:4,humor:0,lang:en\n", "quality:4,humor:0,lang:en"),
        ("quality:4,humor:0,lang:en", "quality:4,humor:0"),  # not closed: en could be the beginning of english
        ("quality:4,humor:0,lang:xx\n", "quality:4,humor:0"),
        ("quality:4,humor:3,lang:en\n", "quality:4"),  # humor ends at 2
        ("quality:4,lang:en,humor:0\n", "quality:4"),
        ("quality:44,humor:0,lang:en\n", ""),
        ("humor:0,lang:en\n", ""),
        ("quality: 4,humor:0,lang:en\n", ""),
        ("", ""),
        ("quality:4\n", ""),
    ],
)
def test_only_what_asking_slot_by_slot_would_have_found_is_taken_from_a_line(completion, items):
    found = legal_prefix(completion, tiny_world.SCHEMA, "\n")
    assert ",".join(f"{key}:{value}" for key, value in found) == items


def prompts(count, seed=5):
    made = tiny_world.conversations(count, "TEXT_TO_VALUE", seed)
    return [tiny_world.TEMPLATE.annotation_prompt(c, len(c.turns) - 1) for c in made], made


def pool(port):
    return ServerPool([("127.0.0.1", port)], retries=0)


@pytest.fixture
def client(value_port):
    servers = pool(value_port)
    servers.format()
    return servers


def test_one_request_for_the_line_gives_the_slot_by_slot_values(client, value_engine):
    texts, made = prompts(20)
    served = value_engine.info.format
    whole = Grader(client, served, "line").grade(texts)
    num_line_requests = client.num_requests  # the first asked for the format
    slots = Grader(client, served, "slots").grade(texts)
    assert [found.attributes for found in whole] == [found.attributes for found in slots]
    # The model has learned its world.
    assert [found.attributes for found in whole] == [c.turns[-1].attributes for c in made]
    assert num_line_requests == 2 and client.num_requests - num_line_requests == len(served.schema.keys())
    assert all(found.counts["by_line"] == 1 for found in whole)
    assert all(found.counts == {"by_slots": 1, "slots": 3, "chosen": 0, "given": 0} for found in slots)


def likeliest(engine, prompt, key, legal, after):
    """Straight from the model: the probability of each legal text after the prompt."""
    tokenizer, template = engine.info.tokenizer, engine.info.format.template
    scores = []
    for value in legal:
        before = template.encode_prompt(prompt, tokenizer)
        ids = template.encode_prompt(prompt + value + after, tokenizer)
        with torch.no_grad():
            log_probs = engine.model(torch.tensor([ids])).logits[0].log_softmax(-1)
        assert ids[: len(before)] == before
        scores.append(sum(float(log_probs[i - 1, ids[i]]) for i in range(len(before), len(ids))))
    return legal[scores.index(max(scores))]


def test_a_whole_line_is_legal_whatever_the_model_would_say():
    """Its values are the greedy choice among the legal ones, after what was chosen before."""
    engine = live.engine(None)  # random weights: hardly a legal token comes first
    served, tokenizer = engine.info.format, engine.info.tokenizer
    texts, _ = prompts(6)
    with live.run_engine(engine) as port:
        found = Grader(pool(port), served, "line").grade(texts)
    for text, graded_line in zip(texts, found, strict=True):
        line, counts = graded_line.attributes, graded_line.counts
        assert counts["by_line"] == 1 and counts["chosen"] > 0
        for key, value in line.items:
            before = text + line.line[: line.line.index(f"{key}:") + len(key) + 1]
            with torch.no_grad():
                logits = engine.model(torch.tensor([served.template.encode_prompt(before, tokenizer)])).logits[0, -1]
            first = {legal: tokenizer.encode_continuation(legal)[0] for legal in served.schema.legal_values(key)}
            assert float(logits[first[str(value)]]) == max(float(logits[token]) for token in first.values())


def test_a_server_without_the_call_is_asked_freely_and_slot_by_slot(client, value_engine):
    """As NeMo's own server, which knows /generate only."""
    texts, made = prompts(8)
    client.attribute_lines = lambda prompts, given, home, beliefs: None  # what it answers to a 404
    found = Grader(client, value_engine.info.format, "line").grade(texts)
    assert [graded_line.attributes for graded_line in found] == [c.turns[-1].attributes for c in made]


def test_given_values_stand_in_the_line_and_later_ones_are_chosen_after_them(client, value_engine):
    texts, made = prompts(12)
    wrong = [{"humor": (c.turns[-1].attributes.as_dict()["humor"] + 1) % 3} for c in made]
    served = value_engine.info.format
    for mode in ("line", "slots"):
        for graded_line, given, c in zip(Grader(client, served, mode).grade(texts, wrong), wrong, made, strict=True):
            assert graded_line.attributes == served.schema.order({**c.turns[-1].attributes.as_dict(), **given})
            assert graded_line.counts["given"] == 1


def test_beliefs_are_the_models_own_probabilities_after_what_was_chosen(client, value_engine):
    texts, _ = prompts(5)
    served, tokenizer = value_engine.info.format, value_engine.info.tokenizer
    given = [{}, {}, {}, {"quality": 0}, {"quality": 0, "lang": "de"}]
    for text, known, graded_line in zip(texts, given, Grader(client, served, "line").grade(texts, given), strict=True):
        assert set(graded_line.beliefs) == set(served.schema.keys()) - set(known)
        for key, belief in graded_line.beliefs.items():
            line = graded_line.attributes.line
            ids = served.template.encode_prompt(text + line[: line.index(f"{key}:") + len(key) + 1], tokenizer)
            with torch.no_grad():
                log_probs = value_engine.model(torch.tensor([ids])).logits[0, -1].log_softmax(-1)
            legal = served.schema.legal_values(key)
            first = [tokenizer.encode_continuation(value)[0] for value in legal]  # one token tells them apart
            shares = log_probs[first].softmax(-1).tolist()
            assert belief["probabilities"] == pytest.approx(dict(zip(legal, shares, strict=True)), abs=1e-4)
            assert belief["value"] == graded_line.attributes.as_dict()[key]
            place = legal.index(str(belief["value"]))
            assert belief["confidence"] == pytest.approx(shares[place], abs=1e-4)
            assert belief["logprob"] == pytest.approx(float(log_probs[first[place]]), abs=1e-3)
            mean = None if key == "lang" else sum(int(v) * s for v, s in zip(legal, shares, strict=True))
            assert belief["expected"] == (None if mean is None else pytest.approx(mean, abs=1e-3))


def test_beliefs_that_nobody_asks_for_are_not_sent(client, value_engine):
    texts, made = prompts(3)
    for graded_line, c in zip(
        Grader(client, value_engine.info.format, "line", beliefs=False).grade(texts), made, strict=True
    ):
        assert graded_line.attributes == c.turns[-1].attributes and graded_line.beliefs is None


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([{"quality": 5}], "given\\[0\\]: quality is '5'"),
        ([{"qualty": 4}], "did you mean 'quality'"),
        ([{}, {}], "one entry per prompt"),
        ([4], "given\\[0\\] must be an object"),
    ],
)
def test_given_values_that_cannot_be_are_refused(value_port, given, message):
    answer = httpx.post(
        f"http://127.0.0.1:{value_port}/v1/attribute_lines", json={"prompts": ["x"], "given": given}, trust_env=False
    )
    assert answer.status_code == 400 and re.search(message, answer.json()["message"])


def test_an_unknown_path_counts_as_a_server_without_the_call():
    from starlette.applications import Starlette

    with live.run_app(Starlette()) as port:
        assert pool(port).attribute_lines(["x"]) is None


def test_an_illegal_first_choice_is_replaced_by_the_likeliest_legal_value():
    engine = live.engine(None)  # random weights: hardly a legal token comes first
    served = engine.info.format
    texts, _ = prompts(4)
    with live.run_engine(engine) as port:
        found = Grader(pool(port), served, "slots").grade(texts)
    for text, graded_line in zip(texts, found, strict=True):
        line, counts = graded_line.attributes, graded_line.counts
        assert counts["chosen"] > 0
        expected = []
        for key in ("quality", "humor", "lang"):
            after = "\n" if key == "lang" else ","
            prompt = text + ",".join([*expected, f"{key}:"])
            expected.append(f"{key}:{likeliest(engine, prompt, key, served.schema.legal_values(key), after)}")
        # A first choice that is legal is also the likeliest legal one up to its separator.
        assert line.line == ",".join(expected)


def test_values_that_begin_one_another_are_never_read_by_their_first_token(client, value_engine):
    """With a range up to 10, the token 1 may be the beginning of 10."""
    wide = AttributeSchema("wide", (Attribute("quality", 0, 10), Attribute("humor", 0, 2)), ("en", "de"))
    served = SteerLMFormat(tiny_world.TEMPLATE, wide, GRADER)
    texts, made = prompts(3)
    for graded_line, c in zip(Grader(client, served, "slots").grade(texts), made, strict=True):
        assert graded_line.attributes == c.turns[-1].attributes
        assert graded_line.counts["chosen"] == 1
