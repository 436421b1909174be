import json

import pytest

from steerlm_nemo.attributes import HELPSTEER5
from steerlm_nemo.conversation import SYSTEM_PROMPT, RecordRef
from steerlm_nemo.data.preprocessing import Options, preprocess
from steerlm_nemo.data.sources.formats import FORMATS, format_of
from steerlm_nemo.errors import InputError, RecordError
from steerlm_nemo.records import Accounting, parse_line

REF = RecordRef("rows.jsonl", 3)
ALIGNER_SYSTEM = SYSTEM_PROMPT.rstrip("\n")


def line(record):
    return parse_line(REF, json.dumps(record).encode())


def found(record):
    """What a row holds: a conversation, or a pair of responses."""
    shape = format_of([line(record)], "rows.jsonl")
    return shape.adapter(record, REF, Options(schema=shape.schema))


def turns(conversation):
    return [(turn.role, turn.text, turn.attributes.line if turn.attributes else None) for turn in conversation.turns]


def run(source, prefix, *, split_ratio=1.0, **options):
    records = Accounting.beside(prefix)
    files = {key: options.pop(key) for key in ("format_name", "labels_from") if key in options}
    tally = preprocess(
        source, prefix, split_ratio=split_ratio, seed=10, options=Options(**options), trees=records, **files
    )
    return records, tally


def read(prefix, part="train"):
    with open(f"{prefix}_{part}.jsonl", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


HELPSTEER = {"prompt": "What is 2+2?", "response": "It is 4.", "helpfulness": 3, "correctness": 4, "coherence": 4}
HELPSTEER |= {"complexity": 2, "verbosity": 1}


def test_helpsteer_gives_the_bytes_of_the_aligners_script(tmp_path):
    run(write_rows(tmp_path / "rows.jsonl", [HELPSTEER]), tmp_path / "out", record_type="VALUE_TO_TEXT")
    assert (tmp_path / "out_train.jsonl").read_text() == (
        '{"conversations": [{"value": "What is 2+2?", "from": "User", "label": null}, '
        '{"value": "It is 4.", "from": "Assistant", '
        '"label": "helpfulness:3,correctness:4,coherence:4,complexity:2,verbosity:1"}], '
        f'"system": "{ALIGNER_SYSTEM}", "mask": "User", "type": "VALUE_TO_TEXT"}}\n'
    )


def test_earlier_turns_in_a_helpsteer2_prompt_become_turns():
    prompt = "Hi\n<extra_id_1>Assistant\nHello.\n<extra_id_1>User\nWhat is 2+2?"
    made = found({**HELPSTEER, "prompt": prompt})
    assert [text for _, text, _ in turns(made)] == ["Hi", "Hello.", "What is 2+2?", "It is 4."]
    assert [role for role, _, _ in turns(made)] == ["User", "Assistant"] * 2


@pytest.mark.parametrize("value", [5, -1, 2.5, "3", True])
def test_a_rating_that_is_no_whole_number_from_0_to_4_is_refused(value):
    with pytest.raises(RecordError, match=r"rows\.jsonl:3: bad label"):
        found({**HELPSTEER, "correctness": value})


@pytest.mark.parametrize(("strength", "first", "second"), [(-3, "chosen", "rejected"), (2, "rejected", "chosen")])
def test_a_helpsteer2_pair_is_two_records_with_the_strength_of_the_preference(strength, first, second):
    pair = {"prompt": "2+2?", "response_1": "4", "response_2": "It is 4.", "preference_strength": strength}
    made = found(pair)
    one, two = made.conversations()
    assert turns(one)[1] == ("Assistant", "4", f"quality:{strength}")
    assert turns(two)[1] == ("Assistant", "It is 4.", f"quality:{strength}")
    assert (one.further["preference"], two.further["preference"]) == (first, second)
    assert (made.chosen, made.margin) == (int(strength > 0), abs(strength))
    with pytest.raises(RecordError, match="preference_strength is 4"):
        found({**pair, "preference_strength": 4})


@pytest.mark.parametrize(
    ("row", "question", "response"),
    [
        ({"instruction": "Translate.", "input": "Hi", "output": "Salut"}, "Translate.\n\nHi", "Salut"),
        ({"instruction": "Sing.", "input": "", "output": "La"}, "Sing.", "La"),
        ({"instruction": "Sing.", "output": "La"}, "Sing.", "La"),
        ({"prompt": "Sing.", "response": "La"}, "Sing.", "La"),
        ({"ID": "AC-1", "text": "質問", "output": "答え", "harm-type": "x"}, "質問", "答え"),
    ],
)
def test_instruction_rows_are_ungraded_conversations_of_two_turns(row, question, response):
    made = found(row)
    assert turns(made) == [("User", question, None), ("Assistant", response, None)]
    assert made.system == SYSTEM_PROMPT


def test_messages_keep_their_system_prompt_and_join_the_parts_of_a_text():
    parts = [{"type": "text", "text": "What is "}, {"type": "text", "text": "2+2?"}]
    made = found(
        {
            "messages": [
                {"role": "system", "content": "Be brief."},
                {"role": "user", "content": parts, "message_id": "m1"},
                {"role": "assistant", "content": "4.", "message_id": "m2", "label": {"quality": 3, "humor": 0}},
            ]
        }
    )
    assert made.system == "Be brief."
    assert turns(made) == [("User", "What is 2+2?", None), ("Assistant", "4.", "quality:3,humor:0")]
    assert [turn.id for turn in made.turns] == ["m1", "m2"]


@pytest.mark.parametrize(
    ("names"), [("human", "gpt"), ("user", "assistant"), ("User", "Assistant"), ("Human", "ChatGPT")]
)
def test_conversations_know_the_usual_names_of_the_speakers(names):
    made = found({"conversations": [{"from": name, "value": name} for name in names]})
    assert [role for role, _, _ in turns(made)] == ["User", "Assistant"]


def test_a_record_of_our_own_keeps_system_mask_tree_and_labels(tmp_path):
    record = {
        "conversations": [
            {"value": "Hi", "from": "Anna", "label": None, "lang": "en"},
            {"value": "Hello.", "from": "Ben", "label": "verbosity:3,lang:en", "lang": "en"},
        ],
        "tree_id": "t1",
        "system": "Play.",
        "mask": "Anna",
        "type": "TEXT_TO_VALUE",
    }
    run(write_rows(tmp_path / "rows.jsonl", [record]), tmp_path / "out")
    assert read(tmp_path / "out") == [record]


@pytest.mark.parametrize(
    ("record", "problem"),
    [
        ({"messages": [{"role": "tool", "content": "x"}, {"role": "user", "content": "y"}]}, "unknown role: 'tool'"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "not text: a part of 'content'"),
        ({"messages": [{"role": "user", "content": None}]}, "wrong type: 'content'"),
        ({"messages": [{"role": "user", "content": "x"}]}, "too short: 1 turn"),
        ({"messages": "x"}, "wrong type: 'messages'"),
        (
            {"messages": [{"role": "user", "content": "x"}, {"role": "system", "content": "y"}]},
            "second system prompt: message 1",
        ),
        (
            {"conversations": [{"from": "gpt", "value": "x", "label": "quality"}]},
            "bad label: attribute item 'quality'",
        ),
        ({"conversations": [{"from": 1, "value": "x"}]}, "unknown role: 1"),
    ],
)
def test_a_chat_that_cannot_be_read_is_refused_with_place_and_reason(record, problem):
    with pytest.raises(RecordError) as caught:
        found(record)
    assert str(caught.value).startswith(f"rows.jsonl:3: {problem}")


GOOD = "\n\nHuman: 2+2?\n\nAssistant: 4.\n\nHuman: Sure?\n\nAssistant: Yes:\n\n- quite"


def test_a_transcript_is_cut_at_its_speakers_and_the_better_one_comes_first():
    pair = found({"chosen": GOOD, "rejected": "\n\nHuman: 2+2?\n\nAssistant: 5."})
    chosen, rejected = pair.conversations()
    assert turns(chosen) == [
        ("User", "2+2?", None),
        ("Assistant", "4.", None),
        ("User", "Sure?", None),
        ("Assistant", "Yes:\n\n- quite", None),
    ]
    assert turns(rejected) == [("User", "2+2?", None), ("Assistant", "5.", None)]
    assert turns(pair.context) == [("User", "2+2?", None)]
    assert (chosen.further, rejected.further) == ({"preference": "chosen"}, {"preference": "rejected"})


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("Human: hi", r"does not start with '\n\nHuman: '"),
        ("\n\nAssistant: hi", r"does not start with '\n\nHuman: '"),
        ("\n\nHuman: hi", "does not end with the assistant"),
        ("\n\nHuman: hi\n\nHuman: ho\n\nAssistant: he", "turns 1 and 2 are both from the human"),
        ("\n\nHuman: hi\n\nAssistant:", "turn 2 of 2 is empty"),
    ],
)
def test_a_malformed_transcript_is_refused_naming_side_and_turn(text, problem):
    with pytest.raises(RecordError) as caught:
        found({"chosen": GOOD, "rejected": text})
    assert str(caught.value) == f"rows.jsonl:3: malformed transcript: 'rejected' {problem}"


def test_a_cvalues_pair_keeps_the_kind_of_its_responses():
    pair = {"prompt": "问", "pos_resp": "好", "neg_resp": "坏", "pos_type": "拒绝为主", "neg_type": "风险回复"}
    good, bad = found(pair).conversations()
    assert turns(good) == [("User", "问", None), ("Assistant", "好", None)]
    assert good.further == {"preference": "chosen", "response_type": "拒绝为主"}
    assert bad.further == {"preference": "rejected", "response_type": "风险回复"}


def test_a_templated_text_is_read_back_with_its_vector():
    text = "<extra_id_0>System\nS\n<extra_id_1>User\nHi\nthere\n<extra_id_1>Assistant\nHello.\n<extra_id_2>"
    made = found({"text": text, "label": [-100.0] * 4 + [4.0, 4.0, 4.0, 3.0, 2.0]})
    assert made.system == "S"
    assert turns(made) == [
        ("User", "Hi\nthere", None),
        ("Assistant", "Hello.", "helpfulness:4,correctness:4,coherence:4,complexity:3,verbosity:2"),
    ]
    for bad in ("x", "<extra_id_0>System\nS\n<extra_id_1>User\nHi\n", text + "more"):
        with pytest.raises(RecordError, match="malformed transcript"):
            found({"text": bad})


@pytest.mark.parametrize("key", ["prompt", "response"])
def test_an_empty_text_is_refused(key):
    with pytest.raises(RecordError, match=f"empty text: '{key}' is ' '"):
        found({"prompt": "a", "response": "b", key: " "})


def test_an_unknown_shape_is_refused_with_the_keys_seen_and_the_shapes_known():
    with pytest.raises(InputError) as caught:
        format_of([line({"question": 1, "turns": 2})], "rows.jsonl")
    assert "the keys seen are question, turns" in str(caught.value)
    assert all(known.name in str(caught.value) for known in FORMATS)


def test_a_malformed_first_line_does_not_hide_the_shape():
    bad = [parse_line(REF, b"{"), line({"odd": 1})]
    assert format_of([*bad, line(HELPSTEER)], "rows.jsonl").name == "helpsteer"


def test_a_row_without_the_keys_of_its_format_is_rejected_with_the_keys_seen(tmp_path):
    source = write_rows(tmp_path / "rows.jsonl", [HELPSTEER, {"prompt": "a", "odd": 1}])
    records, _ = run(source, tmp_path / "out")
    assert dict(records.counts) == {"written": 1, "rejected": 1}
    assert "missing key: helpfulness, response; keys seen are ['odd', 'prompt']" in records.rejects_path.read_text()


def test_a_format_that_is_asked_for_overrides_the_keys(tmp_path):
    source = write_rows(tmp_path / "rows.jsonl", [HELPSTEER])
    run(source, tmp_path / "out", format_name="prompt-response")
    assert read(tmp_path / "out")[0]["conversations"][1]["label"] is None
    with pytest.raises(InputError, match="--format is 'helpster'; known: oasst-messages"):
        run(source, tmp_path / "out", format_name="helpster")


def test_keys_that_are_not_carried_over_are_counted(tmp_path):
    _, tally = run(write_rows(tmp_path / "rows.jsonl", [{**HELPSTEER, "split": "x"}] * 3), tmp_path / "out")
    assert dict(tally.unread) == {"split": 3}
    assert "keys not carried over, with the rows that had them: split: 3" in tally.summary(Accounting.beside("x"))


def test_rows_with_the_same_question_end_in_the_same_split(tmp_path):
    rows = [{"prompt": f"question {n % 40}", "response": f"response {n}"} for n in range(200)]
    run(write_rows(tmp_path / "rows.jsonl", rows), tmp_path / "out", split_ratio=0.75)
    sides = [{r["conversations"][0]["value"] for r in read(tmp_path / "out", part)} for part in ("train", "val")]
    assert [len(side) for side in sides] == [30, 10]
    assert not sides[0] & sides[1]
    assert [len(read(tmp_path / "out", part)) for part in ("train", "val")] == [150, 50]


def test_filters_of_trees_are_refused_for_other_data(tmp_path):
    from steerlm_nemo.data.preprocessing import Filters

    with pytest.raises(InputError, match="this file is helpsteer"):
        source = write_rows(tmp_path / "rows.jsonl", [HELPSTEER])
        run(source, tmp_path / "out", filters=Filters(drop_deleted=True))


def test_another_schema_keeps_its_own_ratings(tmp_path):
    from steerlm_nemo.attributes import COMBINED9

    source = write_rows(tmp_path / "rows.jsonl", [HELPSTEER])
    run(source, tmp_path / "out", schema=COMBINED9)
    assert read(tmp_path / "out")[0]["conversations"][1]["label"].startswith("helpfulness:3,correctness:4")
    assert HELPSTEER5.names == COMBINED9.names[4:]


def test_a_system_prompt_that_is_given_stands_in_only_where_there_is_none(tmp_path):
    own = [{"role": "system", "content": "Mine."}, {"role": "user", "content": "a"}, {"role": "user", "content": "b"}]
    source = write_rows(
        tmp_path / "rows.jsonl", [{"messages": own}, {"messages": [{**own[1], "content": "c"}, own[2]]}]
    )
    run(source, tmp_path / "out", system="Given.")
    assert {record["system"] for record in read(tmp_path / "out")} == {"Mine.", "Given."}


GENUINE = {
    #                                                 rows  written rejected conversations
    "helpsteer-sample/helpsteer.jsonl.gz": (317, 317, 0, 317),
    "hh-rlhf/harmless-base-test.jsonl.gz": (1630, 1619, 11, 3238),
    "hh-rlhf/helpful-base-train-sample.jsonl.gz": (359, 358, 1, 716),
    "cvalues/cvalues_comparison_two_rows.jsonl": (2, 2, 0, 4),
    "rewardbench-sample/reward_bench.jsonl.gz": (348, 348, 0, 696),
    "nemo-aligner-test-data/sft-chat.jsonl": (21, 21, 0, 21),
    "nemo-aligner-test-data/rm-pairs.jsonl": (4, 4, 0, 4),
}


@pytest.mark.parametrize("name", GENUINE)
def test_every_genuine_row_is_accounted_for(shared_data, tmp_path, name):
    num_rows, num_written, num_rejected, num_conversations = GENUINE[name]
    records, tally = run(shared_data / name, tmp_path / "out", split_ratio=0.9)
    assert num_rows == num_written + num_rejected
    assert (records.counts["written"], records.counts["rejected"]) == (num_written, num_rejected)
    assert tally.conversations.total() == num_conversations
    assert len(read(tmp_path / "out", "train")) + len(read(tmp_path / "out", "val")) == num_conversations


def test_genuine_pairs_are_rejected_for_what_is_wrong_with_them(shared_data, tmp_path):
    records, _ = run(shared_data / "hh-rlhf/harmless-base-test.jsonl.gz", tmp_path / "out")
    reasons = [json.loads(line)["reason"] for line in records.rejects_path.read_text().splitlines()]
    assert sum("is empty" in reason for reason in reasons) == 3
    assert sum("are both from" in reason for reason in reasons) == 8


def test_genuine_prompts_without_responses_are_no_conversations(shared_data, tmp_path):
    for name in ("mt-bench/question.jsonl", "cvalues/cvalues_responsibility_prompts.jsonl"):
        with pytest.raises(InputError, match="unknown shape; the keys seen are"):
            run(shared_data / name, tmp_path / "out")


def chat_of(**response):
    return {"messages": [{"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "5.", **response}]}


@pytest.mark.parametrize(
    ("key", "value"),
    [("weight", 0), ("weight", 0.5), ("train", False), ("training", False), ("loss", 0), ("loss", "no")],
)
@pytest.mark.parametrize("type", ["TEXT_TO_VALUE", "VALUE_TO_TEXT"])
def test_a_response_marked_as_not_to_be_learnt_is_rejected(tmp_path, key, value, type):
    sharegpt = [{"from": "human", "value": "2+2?"}, {"from": "gpt", "value": "5.", key: value}]
    for rows in ([chat_of(**{key: value}), chat_of(**{key: 1})], [{"conversations": sharegpt}, chat_of()]):
        name = "messages" if "messages" in rows[0] else "chat"
        if name == "chat":
            rows[1] = {"conversations": [{"from": "human", "value": "2+2?"}, {"from": "gpt", "value": "4.", key: None}]}
        records, tally = run(write_rows(tmp_path / f"{name}.jsonl", rows), tmp_path / name, record_type=type)
        assert dict(records.counts) == {"rejected": 1, "written": 1}
        assert dict(records.reasons) == {"not to be learnt": 1}
        assert not tally.unread


def test_marks_that_say_what_is_done_anyway_are_followed_and_others_named(tmp_path):
    user = {"role": "user", "content": "2+2?"}
    system = {"role": "system", "content": "Be brief.", "weight": 0}
    rows = [
        {"messages": [system, {**user, "weight": 0}, {"role": "assistant", "content": "4.", "weight": 1}]},
        {"messages": [{**user, "train": True}, {"role": "assistant", "content": "4.", "train": True}]},
    ]
    records, tally = run(write_rows(tmp_path / "rows.jsonl", rows), tmp_path / "out")
    assert records.counts["written"] == 2
    assert tally.unread == {"messages[].train": 1}


@pytest.mark.parametrize(
    "meaning",
    [
        {"tool_calls": [{"id": "c1"}]},
        {"function_call": {"name": "weather"}},
        {"reasoning_content": "Hm."},
        {"audio": {"id": "a1"}},
    ],
)
@pytest.mark.parametrize("content", ["", " \n"])
def test_a_message_whose_meaning_is_elsewhere_is_rejected(meaning, content):
    (key,) = meaning
    with pytest.raises(RecordError, match=f"rows.jsonl:3: empty text: message 1 says nothing but in {key}"):
        found(chat_of(content=content, **meaning))
    empty = {key: type(value)() for key, value in meaning.items()}
    assert turns(found(chat_of(content=content, **empty)))[1] == ("Assistant", content, None)


def test_keys_of_messages_and_of_their_parts_are_counted_by_rows(tmp_path):
    part = {"type": "text", "text": "4.", "cache_control": {"type": "ephemeral"}}
    rows = [
        chat_of(tool_calls=[{"id": "c1"}], name="bot"),
        chat_of(name="bot", tool_calls=None),
        chat_of(content=[part]),
    ]
    rows[0]["messages"][0]["name"] = "Anna"
    records, tally = run(write_rows(tmp_path / "rows.jsonl", rows), tmp_path / "out")
    assert tally.unread == {
        "messages[].name": 2,
        "messages[].tool_calls": 1,
        "messages[].content[].cache_control": 1,
    }
    assert "keys not carried over, with the rows that had them: messages[].name: 2" in tally.summary(records)


def test_a_content_of_no_parts_is_no_empty_response(tmp_path):
    rows = [
        {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": content}]}
        for content in ([], [{"type": "text", "text": "Yes."}])
    ]
    source = tmp_path / "in.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    trees = Accounting.beside(tmp_path / "p")
    preprocess(source, tmp_path / "p", split_ratio=1.0, seed=1, options=Options(), trees=trees)
    assert trees.counts == {"written": 1, "rejected": 1}
    assert trees.first_rejected == f"{source}:1: empty text: 'content' is a list of no parts"
