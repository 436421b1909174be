"""POST /v1/annotate gives what the annotator gives."""

import json

import httpx
import live
import pytest
import tiny_world

from steerlm_nemo.annotation.annotate import annotate
from steerlm_nemo.annotation.thread import AnnotationSettings
from steerlm_nemo.attributes import Attributes
from steerlm_nemo.client.pool import ServerPool


def post(port, **body):
    return httpx.post(f"http://127.0.0.1:{port}/v1/annotate", json=body, trust_env=False, timeout=60)


def messages_of(record):
    """The record as OpenAI's clients have conversations."""
    roles = {"User": "user", "Assistant": "assistant"}
    return [
        {"role": "system", "content": record["system"]},
        *({"role": roles[turn["from"]], "content": turn["value"]} for turn in record["conversations"]),
    ]


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"turns": "all"},
        {"soft": True, "output_type": "VALUE_TO_TEXT"},
        {"only_missing": True},
    ],
)
def test_records_come_back_as_the_annotator_writes_them(value_port, chat_file, tmp_path, settings):
    source, records = chat_file(12)
    for number, record in enumerate(records):  # people graded some turns in part, some not at all
        for turn in record["conversations"]:
            if turn["label"] is not None and number % 3:
                turn["label"] = turn["label"].split(",")[0] if number % 3 == 1 else None
    source.write_text("".join(json.dumps(record) + "\n" for record in records))
    with ServerPool([("127.0.0.1", value_port)], 30.0, 2, 4) as servers:
        annotate(source, tmp_path / "out.jsonl", servers, AnnotationSettings(**settings))
    written = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    answer = post(value_port, conversations=records, **settings).json()
    assert answer["conversations"] == written
    asked = ("Assistant", "User") if settings.get("turns") == "all" else ("Assistant",)
    assert answer["num_turns"] == sum(turn["from"] in asked for record in records for turn in record["conversations"])


def test_messages_come_back_with_the_attributes_that_a_chat_takes(value_port, chat_file):
    _, records = chat_file(5)
    answer = post(value_port, conversations=[{"messages": messages_of(record)} for record in records]).json()
    for record, graded in zip(records, answer["conversations"], strict=True):
        assert [message["content"] for message in graded["messages"]] == [
            message["content"] for message in messages_of(record)
        ]
        for message in graded["messages"]:
            assert ("attributes" in message) == (message["role"] == "assistant")
            if message["role"] == "assistant":
                assert message["attributes"] == tiny_world.reading(message["content"])


def test_grades_of_messages_are_kept_on_request_and_beliefs_told(value_port):
    messages = [
        {"role": "system", "content": tiny_world.SYSTEM},
        {"role": "user", "content": "Speak!"},
        {"role": "assistant", "content": "bad joke hello", "attributes": {"quality": 3}},
    ]
    body = {"conversations": [{"messages": messages, "id": 7}], "only_missing": True, "soft": True}
    (graded,) = post(value_port, **body).json()["conversations"]
    assert graded["id"] == 7
    assert graded["messages"][-1]["attributes"] == {"quality": 3, "humor": 1, "lang": "en"}
    soft = graded["messages"][-1]["attributes_soft"]
    assert set(soft) == {"humor", "lang"} and sum(soft["humor"]["probabilities"].values()) == pytest.approx(1, abs=1e-3)


@pytest.mark.parametrize(
    ("conversation", "says"),
    [
        ({}, r"conversations\[1\]: 'conversations' must be a non-empty list"),
        ({"conversations": [{"from": "User"}], "system": ""}, r"conversations\[1\] turn 0: 'value' must be a string"),
        ({"messages": [{"role": "user", "content": 1}]}, r"conversations\[1\].messages\[0\].content must be a string"),
        (
            {"messages": [{"role": "user", "content": ""}, {"role": "system", "content": ""}]},
            r"conversations\[1\]: message 1: role 'system' is not known here.*system for the first only",
        ),
        (
            {"messages": [{"role": "assistant", "content": "", "attributes": {"qualty": 1}}]},
            r"conversations\[1\]: message 0: unknown attribute 'qualty'; did you mean 'quality'",
        ),
        (
            {"messages": [{"role": "user", "content": "a " * 300}, {"role": "assistant", "content": "bad"}]},
            r"conversations\[1\] turn 1: .*maximum context length is .*a line of|no room",
        ),
    ],
)
def test_a_conversation_that_cannot_be_graded_is_named(value_port, conversation, says):
    import re

    good = {"messages": [{"role": "user", "content": "Speak!"}, {"role": "assistant", "content": "bad dry hello"}]}
    answer = post(value_port, conversations=[good, conversation])
    assert answer.status_code == 400
    assert re.search(says, answer.json()["message"]), answer.json()


def test_a_model_that_responds_does_not_grade():
    with live.run_engine(live.engine("VALUE_TO_TEXT")) as port:
        answer = post(port, conversations=[{}])
    assert answer.status_code == 404
    assert "needs a value model" in answer.json()["message"] and "is a SteerLM model" in answer.json()["message"]


def test_grades_do_not_depend_on_the_company(value_port, chat_file):
    _, records = chat_file(9)
    together = post(value_port, conversations=records).json()["conversations"]
    alone = [post(value_port, conversations=[record]).json()["conversations"][0] for record in records]
    assert together == alone
    assert all(Attributes.parse(turn["label"]) for r in alone for turn in r["conversations"] if turn["from"] != "User")
