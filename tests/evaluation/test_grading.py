import pytest

from steerlm_nemo.attributes import TOY6, Attribute, AttributeSchema
from steerlm_nemo.errors import InputError, RecordError
from steerlm_nemo.evaluation.grading import Grading, evaluate
from steerlm_nemo.records import dump_record


def write(path, turns):
    records = [
        {"conversations": [{"value": "?", "from": "User"}, {"value": "!", "from": "Assistant", **turn}], "system": ""}
        for turn in turns
    ]
    path.write_text("".join(dump_record(record) + "\n" for record in records), encoding="utf-8")
    return path


def test_the_metrics_of_a_small_file_are_those_worked_out_by_hand(tmp_path):
    file = write(
        tmp_path / "graded.jsonl",
        [
            {"label": "quality:4,humor:0", "gt_label": "quality:4,humor:1"},
            {"label": "quality:3,humor:0", "gt_label": "quality:4,humor:1"},
            {"label": "quality:0,humor:0", "gt_label": "quality:2,humor:1"},
            {"label": "quality:0,humor:0,lang:en", "gt_label": "quality:0,lang:en"},
        ],
    )
    gradings = evaluate(file, TOY6)
    assert set(gradings) == {"quality", "humor"}  # nothing else is graded on both sides
    quality, humor = gradings["quality"], gradings["humor"]
    assert (quality.num_turns, quality.exact_match, quality.within_one, quality.mae) == (4, 0.5, 0.75, 0.75)
    assert quality.pearson == pytest.approx(10.5 / (11 * 12.75) ** 0.5)  # deviations from the means 2.5 and 1.75
    assert quality.confusion == [[1, 0, 0, 0, 0], [0] * 5, [1, 0, 0, 0, 0], [0] * 5, [0, 0, 0, 1, 1]]
    assert (humor.num_turns, humor.exact_match, humor.within_one, humor.mae, humor.pearson) == (3, 0.0, 1.0, 1.0, None)


def test_a_turn_graded_on_one_side_only_does_not_count(tmp_path):
    both = {"label": "quality:1", "gt_label": "quality:1"}
    file = write(tmp_path / "graded.jsonl", [both, {"label": "quality:1"}, {"label": None, "gt_label": "quality:3"}])
    assert evaluate(file, TOY6)["quality"].num_turns == 1


def test_a_file_without_human_labels_is_refused(tmp_path):
    with pytest.raises(InputError, match="no turn has both"):
        evaluate(write(tmp_path / "graded.jsonl", [{"label": "quality:1"}]), TOY6)


@pytest.mark.parametrize("label", ["quality:9", "quality", "quality:one"])
def test_a_label_off_the_scale_is_told_with_its_place(label, tmp_path):
    file = write(tmp_path / "graded.jsonl", [{"label": "quality:1", "gt_label": "quality:1"}, {"label": label}])
    with pytest.raises(RecordError, match=r"graded\.jsonl:2 turn 1: attribute .*quality"):
        evaluate(file, TOY6)


def test_a_constant_predictor_scores_what_chance_gives():
    grading = Grading.of({(human, 2): 20 for human in range(5)}, Attribute("quality"))
    assert (grading.exact_match, grading.within_one, grading.mae) == (0.2, 0.6, 1.2)
    assert grading.pearson is None


def test_a_scale_that_begins_at_one_has_no_row_for_zero(tmp_path):
    schema = AttributeSchema("own", (Attribute("quality", 1, 5, 3),))
    file = write(
        tmp_path / "graded.jsonl",
        [{"label": "quality:5", "gt_label": "quality:5"}, {"label": "quality:1", "gt_label": "quality:2"}],
    )
    quality = evaluate(file, schema)["quality"]
    assert quality.values == [1, 2, 3, 4, 5]
    assert quality.confusion == [[0] * 5, [1, 0, 0, 0, 0], [0] * 5, [0] * 5, [0, 0, 0, 0, 1]]
    assert (quality.exact_match, quality.mae) == (0.5, 0.5)
    write(file, [{"label": "quality:0", "gt_label": "quality:1"}])
    with pytest.raises(RecordError, match="quality is 0, but it must be 1 to 5"):
        evaluate(file, schema)


@pytest.mark.parametrize("truth", [3, ["quality:1"], {"quality": 1}, "quality"])
def test_a_human_label_that_is_no_line_is_told_with_its_place(truth, tmp_path):
    file = write(tmp_path / "graded.jsonl", [{"label": "quality:1", "gt_label": truth}])
    with pytest.raises(RecordError, match=r"graded\.jsonl:1 turn 1: "):
        evaluate(file, TOY6)
