"""What becomes of the labels people gave: kept apart, completed, or compared with the model's."""

import json

import live
import pytest
import stub_server
import threads

from steerlm_nemo.annotation.annotate import annotate
from steerlm_nemo.annotation.thread import AnnotationSettings
from steerlm_nemo.attributes import Attributes
from steerlm_nemo.client.pool import ServerPool
from steerlm_nemo.errors import IncompleteError, InputError

SYSTEM = "A chat between two.\n\n"
KEYS = stub_server.FORMAT.schema.keys()
FULL = ",".join(f"{key}:{'de' if key == 'lang' else 1}" for key in KEYS)


def thread(*turns):
    made = [{"value": f"word {number}", **turn} for number, turn in enumerate(turns)]
    return {"conversations": made, "system": SYSTEM, "mask": "User", "type": "TEXT_TO_VALUE"}


def grade(tmp_path, made, app=None, **settings):
    source = threads.write(tmp_path / "in.jsonl", made)
    app = app or stub_server.build_stub()
    with live.run_app(app) as port, ServerPool([("127.0.0.1", port)], retries=0) as servers:
        summary = annotate(source, tmp_path / "out.jsonl", servers, AnnotationSettings(**settings))
    return threads.read(tmp_path / "out.jsonl"), summary, app


def human(turn):
    return Attributes.parse(turn["label"]).as_dict() if turn.get("label") else {}


PARTLY = [
    thread({"from": "User"}, {"from": "Assistant"}),
    thread({"from": "User"}, {"from": "Assistant", "label": None}),
    thread(
        {"from": "User"}, {"from": "Assistant", "label": "lang:en,humor:3"}, {"from": "User"}, {"from": "Assistant"}
    ),
    thread({"from": "User"}, {"from": "Assistant", "label": FULL}, {"from": "User"}, {"from": "Assistant"}),
]


@pytest.mark.parametrize("only_generate", [False, True], ids=["our server", "NeMo's server"])
def test_only_what_people_left_out_comes_from_the_model_and_it_knows_what_they_said(tmp_path, only_generate):
    app = stub_server.build_stub(only_generate=only_generate)
    settings = {"compat": True, "mode": "slots"} if only_generate else {}
    made = [{**record, "system": SYSTEM + "\n" if only_generate else SYSTEM} for record in PARTLY]
    found, summary, _ = grade(tmp_path, made, app, only_missing=True, **settings)
    for record, graded in zip(made, found, strict=True):
        prompt = {**record, "system": SYSTEM}
        expected = threads.expected(prompt, given=human)["conversations"]
        for turn in expected:
            if turn["from"] == "Assistant":
                turn.setdefault("gt_label", "")  # nobody graded it
        assert graded["conversations"] == expected
    assert summary.counts["given"] == 2 + len(KEYS)
    assert f"{2 + len(KEYS)} human values kept" in summary.text()


def test_human_and_model_values_of_a_completed_label_can_be_told_apart(tmp_path):
    """A value is a person's if and only if `gt_label` has its key."""
    found, _, _ = grade(tmp_path, PARTLY, only_missing=True)
    first, second = (found[2]["conversations"][index] for index in (1, 3))
    assert first["gt_label"] == "lang:en,humor:3" and list(first)[-1] == "gt_label"
    label = Attributes.parse(first["label"]).as_dict()
    assert tuple(label) == KEYS and (label["humor"], label["lang"]) == (3, "en")
    assert second["gt_label"] == ""
    assert found[3]["conversations"][1]["label"] == found[3]["conversations"][1]["gt_label"] == FULL


def test_a_turn_that_people_graded_in_full_is_not_asked_about(tmp_path):
    _, _, app = grade(tmp_path, PARTLY[3:], only_missing=True)
    assert len(app.state.asked) == 1
    prompt, _ = app.state.asked[0]
    assert f"<extra_id_2>{FULL}\n" in prompt


def test_completing_again_keeps_the_human_values_and_asks_for_the_models(tmp_path):
    once, _, _ = grade(tmp_path, PARTLY, only_missing=True)
    again, _, app = grade(tmp_path, once, only_missing=True)
    assert again == once
    assert sum(given != {} for _, given in app.state.asked) == 1


def test_a_human_value_off_the_scale_is_rejected_where_it_would_have_to_be_kept(tmp_path):
    bad = thread({"from": "User"}, {"from": "Assistant", "label": "humor:9"})
    with pytest.raises(IncompleteError, match="1 of 1 records"):
        grade(tmp_path, [bad], only_missing=True)
    reject = json.loads((tmp_path / "out.jsonl.rejects.jsonl").read_text())
    assert "turn 1: the human label cannot be kept: attribute humor is 9, but it must be 0 to 4" in reject["reason"]


def test_human_values_of_attributes_the_model_does_not_know_stay_in_gt_label(tmp_path):
    made = [thread({"from": "User"}, {"from": "Assistant", "label": "humor:2,verbosity:3"})]
    found, summary, _ = grade(tmp_path, made, only_missing=True)
    turn = found[0]["conversations"][1]
    assert turn["gt_label"] == "humor:2,verbosity:3" and tuple(Attributes.parse(turn["label"]).as_dict()) == KEYS
    assert "1 human values are of attributes the model does not know: in gt_label only (verbosity 1)" in summary.text()


@pytest.mark.parametrize("label", ["humor:2, lang:en", "humor: 2,lang:en,", " humor:2 ,\tlang:en\n"])
@pytest.mark.parametrize("key", ["label", "gt_label"])
def test_a_human_value_is_kept_however_its_label_is_spaced(tmp_path, label, key):
    made = [thread({"from": "User"}, {"from": "Assistant", key: label})]
    found, summary, _ = grade(tmp_path, made, only_missing=True)
    turn = found[0]["conversations"][1]
    assert turn["gt_label"] == "humor:2,lang:en" and summary.counts["given"] == 2
    assert turn["label"].split(",")[2] == "humor:2" and turn["label"].endswith(",lang:en")


@pytest.mark.parametrize(
    ("label", "reason"),
    [
        ("Humor:2", "the human label cannot be kept: attribute 'Humor' is not known, but 'humor' is"),
        ("hate-speech:2", "attribute 'hate-speech' is not known, but 'hate_speech' is"),
        ("humor:2;lang:en", "attribute humor has value '2;lang:en'"),
        ("humor=2", "attribute item 'humor=2' is not a new key:value pair"),
        ("humor:2.0", "attribute humor has value '2.0', which is not a whole number"),
    ],
)
def test_a_human_value_that_cannot_be_read_is_never_overruled(tmp_path, label, reason):
    bad = thread({"from": "User"}, {"from": "Assistant", "label": label})
    with pytest.raises(IncompleteError, match="1 of 1 records"):
        grade(tmp_path, [bad], only_missing=True)
    reject = json.loads((tmp_path / "out.jsonl.rejects.jsonl").read_text())
    assert (
        reject["where"].endswith("in.jsonl:1")
        and reject["reason"].startswith("turn 1: ")
        and reason in reject["reason"]
    )


def test_soft_labels_are_what_the_server_believes_and_stand_before_gt_label(tmp_path):
    made = [thread({"from": "User"}, {"from": "Assistant", "label": "quality:3,lang:en"})]
    found, _, _ = grade(tmp_path, made, soft=True, only_missing=True)
    turn = found[0]["conversations"][1]
    assert list(turn) == ["value", "from", "label", "label_soft", "gt_label"]
    assert set(turn["label_soft"]) == set(KEYS) - {"quality", "lang"}  # what people said is no belief
    for key, soft in turn["label_soft"].items():
        value = Attributes.parse(turn["label"]).as_dict()[key]
        assert soft["confidence"] == 0.6 == soft["probabilities"][str(value)]
        assert soft["probabilities"] == {str(v): 0.6 if v == value else 0.1 for v in range(5)}
        assert soft["expected"] == round(0.6 * value + 0.1 * (10 - value), 4)


def test_soft_labels_follow_process_lang_and_have_no_expected_language(tmp_path):
    made = [thread({"from": "User"}, {"from": "Assistant"})]
    with_lang, _, _ = grade(tmp_path, made, soft=True)
    lang = with_lang[0]["conversations"][1]["label_soft"]["lang"]
    assert lang["expected"] is None and lang["confidence"] == 0.6 and len(lang["probabilities"]) == 35
    without, _, _ = grade(tmp_path, made, soft=True, process_lang=False)
    assert "lang" not in without[0]["conversations"][1]["label_soft"]


def test_soft_is_refused_where_nobody_tells_probabilities(tmp_path):
    with pytest.raises(InputError, match="--soft needs --mode=line"):
        AnnotationSettings(soft=True, mode="slots")
    with pytest.raises(InputError, match="does not tell how sure its model is"):
        grade(tmp_path, PARTLY[:1], stub_server.build_stub(tells_beliefs=False), soft=True)


def test_the_comparison_counts_what_both_sides_graded_and_is_saved(tmp_path):
    made = threads.records(40)
    made[0]["conversations"][1]["label"] = "quality:9,verbosity:2,humor:1"
    found, summary, _ = grade(tmp_path, made)
    pairs = [
        (human(turn | {"label": turn["gt_label"]}), human(turn))
        for record in found
        for turn in record["conversations"]
        if "gt_label" in turn
    ]
    quality = [(truth["quality"], model["quality"]) for truth, model in pairs if truth["quality"] != 9]
    saved = json.loads((tmp_path / "out.jsonl.comparison.json").read_text())
    graded = saved["attributes"]["quality"]
    assert graded["num_turns"] == len(quality) == 39
    assert graded["exact_match"] == sum(a == b for a, b in quality) / 39
    assert graded["within_one"] == sum(abs(a - b) <= 1 for a, b in quality) / 39
    assert graded["mae"] == pytest.approx(sum(abs(a - b) for a, b in quality) / 39)
    assert graded["confusion"][4] == [sum(b == value for _, b in quality) for value in range(5)]
    assert graded["pearson"] is None  # every human said 4
    assert saved["num_off_scale"] == 2  # quality:9, and verbosity, which the model does not know
    assert sum(count for _, _, count in saved["attributes"]["lang"]["confusion"]) == 39
    assert "2 human values are not on the model's scale" in summary.text() and "within 1" in summary.text()
    page = (tmp_path / "out.jsonl.comparison.html").read_text()
    assert "<h2>quality</h2>" in page and "class=heat" in page


def test_nothing_is_compared_where_human_values_were_kept_or_are_absent(tmp_path):
    grade(tmp_path, threads.records(4))
    assert (tmp_path / "out.jsonl.comparison.json").exists()
    _, summary, _ = grade(tmp_path, PARTLY, only_missing=True)
    assert "compared" not in summary.text()
    assert not (tmp_path / "out.jsonl.comparison.json").exists()  # that of the run before is gone
