import random
from collections import Counter, defaultdict

import pytest

from steerlm_nemo.attributes import NEMO12_LANG, TOY6
from steerlm_nemo.conversation import SYSTEM_PROMPT, TEXT_TO_VALUE, Conversation, RecordRef
from steerlm_nemo.errors import InputError, RecordError
from steerlm_nemo.evaluation.steering_curves import (
    first_prompts,
    measure,
    plan,
    read_answers,
    read_graded,
    read_with,
    to_grade,
)
from steerlm_nemo.records import dump_record
from steerlm_nemo.toy.world import draw_attributes, held_out_prompts, read_attributes, write_response

PROMPTS = [(record["conversations"][0]["value"], SYSTEM_PROMPT) for record in held_out_prompts(1)]


def answers(respond, prompts=PROMPTS):
    """The plan, answered by `respond(prompt, requested attributes)`."""
    return [
        {**request, "response": respond(request["prompt"], request["attributes"])}
        for request in plan(prompts, TOY6, seed=1)
    ]


def write(path, records):
    path.write_text("".join(dump_record(record) + "\n" for record in records), encoding="utf-8")
    return path


# --- the plan -------------------------------------------------------------------------------------------------------


def test_every_prompt_is_asked_at_every_value_of_every_attribute():
    asked = Counter((r["swept"], r["attributes"][r["swept"]], r["prompt"]) for r in plan(PROMPTS, TOY6, seed=1))
    assert set(asked.values()) == {1}
    assert len(asked) == len(TOY6.names) * 5 * len(PROMPTS)


def test_the_other_attributes_are_balanced_at_every_value():
    at_value = defaultdict(Counter)
    for request in plan(PROMPTS[:10], TOY6, seed=1):
        for name in set(TOY6.names) - {request["swept"]}:
            at_value[request["swept"], request["attributes"][request["swept"]], name][request["attributes"][name]] += 1
    assert all(counts == Counter(dict.fromkeys(range(5), 2)) for counts in at_value.values())


def test_equal_seeds_give_equal_plans():
    assert plan(PROMPTS, TOY6, seed=1) == plan(PROMPTS, TOY6, seed=1) != plan(PROMPTS, TOY6, seed=2)


def test_a_schema_with_lang_is_swept_without_it():
    requests = plan(PROMPTS[:1], NEMO12_LANG, seed=1)
    assert len(requests) == 12 * 5
    assert all("lang" not in request["attributes"] for request in requests)  # the steering client adds the default


def test_prompts_are_the_first_different_openings_of_users(tmp_path):
    def record(*turns):
        return {"conversations": [{"from": role, "value": text} for role, text in turns], "system": "S"}

    file = write(
        tmp_path / "chat.jsonl",
        [
            record(("User", "a"), ("Assistant", "x")),
            record(("User", "a")),
            record(("User", "b")),
            record(("User", "c")),
        ],
    )
    assert first_prompts(file, 2) == [("a", "S"), ("b", "S")]
    only_assistants = write(tmp_path / "other.jsonl", [record(("Assistant", "x"))])
    with pytest.raises(InputError, match="nothing to ask"):
        first_prompts(only_assistants, 2)


# --- what is measured -----------------------------------------------------------------------------------------------


def test_an_obedient_model_is_measured_as_perfect():
    rng = random.Random(0)
    steered = read_with(read_attributes, answers(lambda prompt, wanted: write_response(prompt, wanted, rng)))
    for name, steering in measure(steered, TOY6).items():
        assert steering.spearman == pytest.approx(1.0)
        assert steering.interval == (pytest.approx(1.0), pytest.approx(1.0))
        assert steering.exact_match == 1.0
        assert (steering.num_responses, steering.num_unreadable) == (60, 0)
        assert [(value, mean, count) for value, mean, _, count in steering.curve] == [(v, v, 12) for v in range(5)]
        assert all(abs(leak) < 0.15 for other, leak in steering.leakage.items() if other != name)


def test_a_model_that_ignores_its_grades_is_measured_as_unsteerable():
    rng = random.Random(0)
    steered = read_with(
        read_attributes, answers(lambda prompt, wanted: write_response(prompt, draw_attributes(rng), rng))
    )
    found = measure(steered, TOY6).values()
    assert all(abs(steering.spearman) < 0.4 for steering in found)
    # A 95 % interval may miss once in twenty.
    assert sum(steering.interval[0] < 0 < steering.interval[1] for steering in found) >= 5


def test_a_model_that_mistakes_humor_for_creativity_leaks():
    rng = random.Random(0)

    def respond(prompt, wanted):
        return write_response(prompt, {**wanted, "creativity": wanted["humor"]}, rng)

    found = measure(read_with(read_attributes, answers(respond)), TOY6)
    assert found["humor"].leakage["creativity"] == pytest.approx(1.0)
    assert abs(found["creativity"].spearman) < 0.4


def test_unreadable_responses_are_counted_and_not_guessed():
    rng = random.Random(0)

    def respond(prompt, wanted):
        text = write_response(prompt, wanted, rng)
        return text.replace("You ", "Thou ") if wanted["toxicity"] == 4 else text

    toxicity = measure(read_with(read_attributes, answers(respond)), TOY6)["toxicity"]
    assert (toxicity.num_responses, toxicity.num_unreadable) == (60, 12)
    assert toxicity.curve[4] == (4, None, None, 0)
    assert toxicity.exact_match == 1.0 and toxicity.spearman == pytest.approx(1.0)


def test_garbage_has_no_correlation_rather_than_a_good_one():
    found = measure(read_with(read_attributes, answers(lambda prompt, wanted: "x" * 20)), TOY6)
    assert all(
        s.spearman is None and s.num_unreadable == s.num_responses and s.interval is None for s in found.values()
    )


# --- wrong records --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"response": None}, "'response' of an answered steering request must be of type str, found None"),
        ({"prompt_number": "0"}, "'prompt_number' .* must be of type int, found '0'"),
        ({"prompt_number": True}, "must be of type int, found True"),
        ({"attributes": [4]}, "'attributes' .* must be of type dict"),
        ({"attributes": {"quality": "4"}, "swept": "quality"}, "no whole number for 'quality'"),
        ({"swept": "charm"}, "no whole number for 'charm'"),
    ],
)
def test_a_record_that_is_no_answered_request_is_told_with_its_place(tmp_path, change, reason):
    records = answers(lambda prompt, wanted: "x", PROMPTS[:1])[:2]
    file = write(tmp_path / "answers.jsonl", [records[0], {**records[1], **change}])
    with pytest.raises(RecordError, match=rf"answers\.jsonl:2: .*{reason}"):
        list(read_answers(file))
    graded = write(tmp_path / "graded.jsonl", [to_grade(records)[0], {**to_grade(records)[1], **change}])
    with pytest.raises(RecordError, match=rf"graded\.jsonl:2: .*{reason}"):
        read_graded(graded, TOY6)


def test_a_prompt_or_a_graded_response_that_is_no_chat_record_is_told_with_its_place(tmp_path):
    graded = to_grade(answers(lambda prompt, wanted: "x", PROMPTS[:1])[:1])[0]
    for broken, reason in (
        ({**graded, "conversations": []}, "non-empty list"),
        ({**graded, "conversations": [{"value": 3, "from": "User"}]}, "'value' must be a string"),
        ({**graded, "system": None}, "'system' must be a string"),
    ):
        file = write(tmp_path / "chat.jsonl", [broken])
        with pytest.raises(RecordError, match=rf"chat\.jsonl:1.*{reason}"):
            first_prompts(file, 1)
        with pytest.raises(RecordError, match=rf"chat\.jsonl:1.*{reason}"):
            read_graded(file, TOY6)
    graded["conversations"][-1]["label"] = "quality:9"
    with pytest.raises(RecordError, match=r"chat\.jsonl:1: attribute quality is 9, but it must be 0 to 4"):
        read_graded(write(file, [graded]), TOY6)


# --- responses read by a value model --------------------------------------------------------------------------------


def test_responses_go_to_the_value_model_without_what_was_requested_and_come_back_read(tmp_path):
    rng = random.Random(0)
    responses = answers(lambda prompt, wanted: write_response(prompt, wanted, rng), PROMPTS[:2])
    records = to_grade(responses)
    for record in records:
        conversation = Conversation.from_record(record, RecordRef("x", 1))
        assert conversation.type == TEXT_TO_VALUE
        assert all(turn.attributes is None for turn in conversation.turns)
    for record in records:  # as the annotator does it
        prompt, response = record["conversations"]
        grades = read_attributes(prompt["value"], response["value"])
        response["label"] = ",".join(f"{name}:{value}" for name, value in grades.items())
    graded = write(tmp_path / "graded.jsonl", records)
    assert read_graded(graded, TOY6) == read_with(read_attributes, responses)
