import pytest

from steerlm_nemo.attributes import HELPSTEER5, NEMO12_LANG, PAPER7
from steerlm_nemo.conversation import RecordRef
from steerlm_nemo.data.sources.oasst import paths
from steerlm_nemo.errors import RecordError

REF = RecordRef("trees.jsonl", 5)
LABELS_15 = (
    *("spam", "lang_mismatch", "pii", "not_appropriate", "hate_speech", "sexual_content", "quality", "toxicity"),
    *("humor", "helpfulness", "creativity", "violence", "political_content", "moral_judgement", "fails_task"),
)


def message(text, role="prompter", replies=(), **fields):
    return {"text": text, "role": role, "replies": list(replies), **fields}


def labels(**values):
    return {name: {"value": value, "count": 3} for name, value in values.items()}


def tree(prompt):
    return {"message_tree_id": "t1", "prompt": prompt}


def texts(raw):
    return [[found.turn.text for found in path] for path in paths(raw, NEMO12_LANG, REF)]


def line(schema=NEMO12_LANG, **fields):
    ((found,),) = paths(tree(message("Hi", **fields)), schema, REF)
    return None if found.turn.attributes is None else found.turn.attributes.line


def test_every_root_to_leaf_path_comes_out_depth_first_in_file_order():
    raw = tree(
        message(
            "q",
            replies=[
                message("a", "assistant", [message("a1", replies=[message("a11", "assistant")]), message("a2")]),
                message("b", "assistant"),
            ],
        )
    )
    assert texts(raw) == [["q", "a", "a1", "a11"], ["q", "a", "a2"], ["q", "b"]]


def test_a_lone_prompt_is_a_path_of_one():
    assert texts(tree(message("q"))) == [["q"]]


def test_missing_and_null_replies_mean_a_leaf():
    no_key = {"text": "a", "role": "assistant"}
    null = {"text": "b", "role": "assistant", "replies": None}
    assert texts(tree(message("q", replies=[no_key, null]))) == [["q", "a"], ["q", "b"]]


def test_a_root_may_be_the_prompt_itself_and_any_node_may_hold_one():
    assert texts(message("q", replies=[{"prompt": message("a", "assistant")}])) == [["q", "a"]]


def test_a_thread_of_2000_turns_is_one_path():
    node = message("end")
    for _ in range(1999):
        node = message("x", replies=[node])
    (path,) = paths(tree(node), NEMO12_LANG, REF)
    assert len(path) == 2000


def test_text_is_taken_as_it_is():
    assert texts(tree(message("  é\n\r\n\u2028 "))) == [["  é\n\r\n\u2028 "]]


def test_all_fifteen_labels_keep_the_twelve_of_the_schema_in_its_order():
    graded = line(labels=labels(**dict.fromkeys(LABELS_15, 0.0)), lang="en")
    assert graded == (
        "quality:0,toxicity:0,humor:0,creativity:0,violence:0,helpfulness:0,not_appropriate:0,hate_speech:0,"
        "sexual_content:0,fails_task:0,political_content:0,moral_judgement:0,lang:en"
    )


@pytest.mark.parametrize(
    ("value", "grade"), [(0, 0), (0.125, 0), (0.375, 2), (0.5, 2), (0.625, 2), (0.7, 3), (0.875, 4), (1, 4)]
)
def test_values_are_rounded_half_to_even(value, grade):
    assert line(labels=labels(quality=value)) == f"quality:{grade}"


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, None),
        ({"labels": None, "lang": None}, None),
        ({"labels": {}}, ""),
        ({"labels": labels(spam=1.0)}, ""),
        ({"labels": {}, "lang": "pt-BR"}, "lang:pt"),
        ({"lang": "uk-UA"}, "lang:uk"),  # D-07: the reference crashes here
        ({"labels": None, "lang": "en"}, "lang:en"),
        ({"labels": labels(humor=0.5), "lang": "en"}, "humor:2,lang:en"),
        ({"labels": {"humor": None, "quality": {"value": 1.0}}}, "quality:4"),
    ],
)
def test_attribute_lines_with_and_without_labels_and_language(fields, expected):
    assert line(**fields) == expected


def test_another_schema_keeps_its_own_attributes_scale_and_no_language():
    graded = labels(quality=1.0, helpfulness=0.25, humor=0.5)
    assert line(HELPSTEER5, labels=graded, lang="en") == "helpfulness:1"
    assert line(PAPER7, labels=graded, lang="en") == "quality:9,helpfulness:2,humor:4"
    assert line(PAPER7, lang="en") is None


def test_deletion_and_language_are_kept_for_filters():
    raw = tree(message("q", lang="en", replies=[message("a", "assistant", deleted=True, lang="pt-BR")]))
    ((question, response),) = paths(raw, NEMO12_LANG, REF)
    assert (question.deleted, question.turn.lang) == (False, "en")
    assert (response.deleted, response.turn.lang) == (True, "pt")


@pytest.mark.parametrize(
    ("node", "problem"),
    [
        (message("a", "system"), "unknown role: 'system'"),
        (message("a", None), "unknown role: None"),
        (message(None, "assistant"), "wrong type: 'text'"),
        ("a", "wrong type: a message must be an object"),
        ({**message("a", "assistant"), "replies": {"0": 1}}, "wrong type: 'replies'"),
        (message("a", "assistant", labels=[1]), "wrong type: 'labels'"),
        (message("a", "assistant", labels=labels(quality=1.5)), "bad label: quality"),
        (message("a", "assistant", labels=labels(quality=-0.1)), "bad label: quality"),
        (message("a", "assistant", labels=labels(quality=float("nan"))), "bad label: quality"),
        (message("a", "assistant", labels=labels(quality=True)), "bad label: quality"),
        (message("a", "assistant", labels={"quality": {"count": 3}}), "bad label: quality"),
        (message("a", "assistant", lang=7), "bad lang: 7"),
        (message("a", "assistant", lang="en,quality:4"), "bad lang: 'en,quality:4'"),
    ],
)
def test_one_unusable_message_makes_the_tree_unusable_and_names_the_line(node, problem):
    with pytest.raises(RecordError) as caught:
        list(paths(tree(message("q", replies=[node])), NEMO12_LANG, REF))
    assert str(caught.value).startswith(f"trees.jsonl:5: {problem}")


def test_a_flat_message_is_not_taken_for_a_tree():
    flat = {"message_id": "m", "parent_id": None, "text": "q", "role": "prompter"}
    with pytest.raises(RecordError, match="not a message tree"):
        list(paths(flat, NEMO12_LANG, REF))
