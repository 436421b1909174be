import gzip
import json
import random
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from trees import labels, simple_tree

from steerlm_nemo.conversation import RECORD_TYPES, SYSTEM_PROMPT
from steerlm_nemo.data.preprocessing import Filters, Options, preprocess, shuffled_order
from steerlm_nemo.data.rows import Lines
from steerlm_nemo.errors import InputError, RecordError
from steerlm_nemo.records import Accounting

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "preprocessing.py"
GENUINE = ("oasst1-en-validation", "oasst2-animals-trees", "oasst-unlabelled-trees")


def write_trees(path, trees):
    path.write_text("".join(json.dumps(tree) + "\n" for tree in trees), encoding="utf-8")
    return path


def run(input_file, prefix, record_type="TEXT_TO_VALUE", *, split_ratio=0.95, seed=10, strict=False, **options):
    trees = Accounting.beside(prefix, strict=strict)
    files = {key: options.pop(key) for key in ("format_name", "labels_from") if key in options}
    tally = preprocess(
        input_file,
        prefix,
        split_ratio=split_ratio,
        seed=seed,
        options=Options(record_type=record_type, **options),
        trees=trees,
        **files,
    )
    return trees, tally


def read(prefix, part):
    return [json.loads(line) for line in Path(f"{prefix}_{part}.jsonl").read_text(encoding="utf-8").splitlines()]


def cli(*args):
    return subprocess.run([sys.executable, SCRIPT, *map(str, args)], capture_output=True, text=True, timeout=60)


# --- what the reference does, spelled out ---


def test_the_shuffle_is_pythons_own():
    assert list(shuffled_order(20, 10)) == [14, 11, 5, 6, 19, 8, 9, 12, 16, 2, 10, 4, 17, 7, 3, 0, 15, 13, 1, 18]


ALL_15 = labels(
    **dict(spam=0.0, lang_mismatch=0.0, pii=0.0, not_appropriate=0.0, hate_speech=0.0, sexual_content=0.0),
    **dict(quality=0.875, toxicity=0.125, humor=0.375, creativity=0.625, violence=0.0, helpfulness=1.0),
    **dict(fails_task=0.0, political_content=0.1, moral_judgement=0.0),
)
WORKED_EXAMPLE = {
    "message_tree_id": "t1",
    "prompt": {
        "text": "Hi, what is 2+2?",
        "role": "prompter",
        "lang": "en",
        "labels": labels(spam=0, quality=0.875, toxicity=0.125, humor=0.375, creativity=0.625, violence=0),
        "replies": [
            {
                "text": "It is 4.",
                "role": "assistant",
                "lang": "en",
                "labels": ALL_15,
                "replies": [
                    {"text": "Thanks", "role": "prompter", "lang": "en", "labels": labels(quality=0.5), "replies": []}
                ],
            },
            {"text": "Five.", "role": "assistant", "lang": "pt-BR", "deleted": True, "labels": {}, "replies": []},
        ],
    },
}
TAIL = '"tree_id": "t1", "system": ' + json.dumps(SYSTEM_PROMPT) + ', "mask": "User", "type": "TEXT_TO_VALUE"}\n'
PROMPT_TURN = (
    '{"value": "Hi, what is 2+2?", "from": "User", '
    '"label": "quality:4,toxicity:0,humor:2,creativity:2,violence:0,lang:en", "lang": "en"}'
)
WORKED_OUTPUT = (
    '{"conversations": [' + PROMPT_TURN + ', {"value": "It is 4.", "from": "Assistant", "label": '
    '"quality:4,toxicity:0,humor:2,creativity:2,violence:0,helpfulness:4,not_appropriate:0,hate_speech:0,'
    'sexual_content:0,fails_task:0,political_content:0,moral_judgement:0,lang:en", "lang": "en"}, '
    '{"value": "Thanks", "from": "User", "label": "quality:2,lang:en", "lang": "en"}], ' + TAIL,
    '{"conversations": [' + PROMPT_TURN + ', {"value": "Five.", "from": "Assistant", "label": "lang:pt", '
    '"lang": "pt"}], ' + TAIL,
)


def test_the_worked_example_of_the_reference_comes_out_byte_for_byte(tmp_path):
    run(write_trees(tmp_path / "trees.jsonl", [WORKED_EXAMPLE]), tmp_path / "out", split_ratio=1.0)
    assert (tmp_path / "out_train.jsonl").read_text() == "".join(WORKED_OUTPUT)
    assert (tmp_path / "out_val.jsonl").read_bytes() == b""


def test_the_split_is_by_tree_with_the_share_rounded_down(tmp_path):
    source = write_trees(tmp_path / "trees.jsonl", [simple_tree(str(i)) for i in range(20)])
    run(source, tmp_path / "out", split_ratio=0.59)
    order = [14, 11, 5, 6, 19, 8, 9, 12, 16, 2, 10, 4, 17, 7, 3, 0, 15, 13, 1, 18]
    assert [int(record["tree_id"]) for record in read(tmp_path / "out", "train")] == order[:11]
    assert [int(record["tree_id"]) for record in read(tmp_path / "out", "val")] == order[11:]


def naive_reference(trees, record_type, split_ratio=0.95, seed=10):
    """Section 1 of the behaviour specification read aloud: all in memory, recursive, no error handling."""
    keys = (
        *("quality", "toxicity", "humor", "creativity", "violence", "helpfulness", "not_appropriate"),
        *("hate_speech", "sexual_content", "fails_task", "political_content", "moral_judgement"),
    )

    def conversations(node):
        turn = {"value": node["text"], "from": {"prompter": "User", "assistant": "Assistant"}[node["role"]]}
        if "labels" in node:
            turn["label"] = ",".join(
                f"{k}:{round(node['labels'][k]['value'] * 4)}" for k in keys if k in node["labels"]
            )
        if "lang" in node:
            turn["lang"] = node["lang"].split("-")[0]
            turn["label"] = ",".join(filter(None, [turn["label"], "lang:" + turn["lang"]]))
        return [[turn, *rest] for reply in node["replies"] for rest in conversations(reply)] or [[turn]]

    trees = list(trees)
    random.seed(seed)
    random.shuffle(trees)
    num_train = int(len(trees) * split_ratio)
    outputs = []
    for part in (trees[:num_train], trees[num_train:]):
        records = [
            {"conversations": c, "tree_id": t["message_tree_id"], "system": SYSTEM_PROMPT, "mask": "User"}
            | {"type": record_type}
            for t in part
            for c in conversations(t["prompt"])
            if len(c) > 1
        ]
        outputs.append("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records))
    return outputs


def labelled(node):
    return "labels" in node and all(labelled(reply) for reply in node["replies"])


@pytest.mark.parametrize("record_type", RECORD_TYPES)
@pytest.mark.parametrize("folder", ["oasst1-en-validation", "oasst2-animals-trees"])
def test_genuine_trees_give_the_bytes_of_the_naive_algorithm_wherever_it_runs(
    shared_data, tmp_path, folder, record_type
):
    with gzip.open(shared_data / folder / "trees.jsonl.gz", "rt", encoding="utf-8") as file:
        trees = [tree for tree in map(json.loads, file) if labelled(tree["prompt"])]
    assert len(trees) > 100
    source = write_trees(tmp_path / "trees.jsonl", trees)
    run(source, tmp_path / "out", record_type, compat=True)
    got = [(tmp_path / f"out_{part}.jsonl").read_text(encoding="utf-8") for part in ("train", "val")]
    assert got == naive_reference(trees, record_type)


@pytest.mark.parametrize("folder", GENUINE)
def test_every_genuine_tree_is_accounted_for(shared_data, tmp_path, folder):
    path = shared_data / folder / "trees.jsonl.gz"
    trees, tally = run(path, tmp_path / "out")
    num_trees = {"oasst1-en-validation": 130, "oasst2-animals-trees": 386, "oasst-unlabelled-trees": 70}[folder]
    assert sum(trees.counts.values()) == num_trees
    assert trees.counts["rejected"] == 0
    records = {part: read(tmp_path / "out", part) for part in ("train", "val")}
    assert {part: len(found) for part, found in records.items()} == dict(tally.conversations)
    with gzip.open(path, "rt", encoding="utf-8") as file:
        answered = {tree["message_tree_id"] for tree in map(json.loads, file) if tree["prompt"]["replies"]}
    assert {record["tree_id"] for found in records.values() for record in found} == answered


# --- where it differs from the reference ---


def test_value_to_text_records_have_no_label_on_user_turns_unless_asked(tmp_path):
    source = write_trees(tmp_path / "trees.jsonl", [WORKED_EXAMPLE])
    run(source, tmp_path / "ours", "VALUE_TO_TEXT", split_ratio=1.0)
    run(source, tmp_path / "theirs", "VALUE_TO_TEXT", split_ratio=1.0, compat=True)
    (ours, _), (theirs, _) = read(tmp_path / "ours", "train"), read(tmp_path / "theirs", "train")
    question = {"value": "Hi, what is 2+2?", "from": "User", "label": None, "lang": "en"}
    assert ours["conversations"][0] == question
    assert ours["conversations"][1] == theirs["conversations"][1]
    assert theirs["conversations"][2]["label"] == "quality:2,lang:en"


def test_blank_lines_do_not_change_the_permutation(tmp_path):
    trees = [simple_tree(str(i)) for i in range(20)]
    run(write_trees(tmp_path / "plain.jsonl", trees), tmp_path / "plain")
    spaced = "\n\n" + "\n   \n".join(json.dumps(tree) for tree in trees)
    (tmp_path / "spaced.jsonl").write_text(spaced, encoding="utf-8")
    run(tmp_path / "spaced.jsonl", tmp_path / "spaced")
    assert read(tmp_path / "plain", "train") == read(tmp_path / "spaced", "train")


def test_gzip_crlf_and_byte_order_mark_change_nothing(tmp_path):
    trees = [simple_tree(str(i)) for i in range(20)]
    source = write_trees(tmp_path / "plain.jsonl", trees)
    run(source, tmp_path / "plain")
    odd = b"\xef\xbb\xbf" + source.read_bytes().replace(b"\n", b"\r\n")
    (tmp_path / "odd.jsonl.gz").write_bytes(gzip.compress(odd))
    run(tmp_path / "odd.jsonl.gz", tmp_path / "odd")
    assert (tmp_path / "odd_train.jsonl").read_bytes() == (tmp_path / "plain_train.jsonl").read_bytes()
    assert not [path for path in tmp_path.iterdir() if path.name.startswith((".", "tmp"))]


BAD_LINES = {
    b'{"message_tree_id": "t", "prompt": {"text": "\xff"': "not UTF-8",
    b'{"message_tree_id": "t", "prompt": {"text": "a", ': "not JSON",
    b"[]": "a JSON object is needed",
    b'{"message_tree_id": "t"}': "not a message tree",
    json.dumps(simple_tree("t", prompt={"text": "a", "role": "system", "replies": []})).encode(): "unknown role",
    json.dumps(simple_tree("\ud800")).encode(): "lone surrogate",
    json.dumps({**simple_tree("t"), "message_tree_id": None}).encode(): "no message_tree_id",
    json.dumps(simple_tree("t")).replace('"value": 1,', '"value": NaN,').encode(): "not JSON",
    json.dumps(simple_tree("t")).replace('"value": 1,', '"value": 1e999,').encode(): "bad label",
}


def test_each_unusable_line_is_rejected_with_place_reason_and_raw_text(tmp_path):
    good = [json.dumps(simple_tree(str(i))).encode() for i in range(10)]
    source = tmp_path / "trees.jsonl"
    source.write_bytes(b"\n".join([*good, *BAD_LINES]))
    trees, _ = run(source, tmp_path / "out")
    assert dict(trees.counts) == {"written": 10, "rejected": len(BAD_LINES)}
    assert trees.summary().startswith(f"19 read = 10 written + 0 filtered + {len(BAD_LINES)} rejected")
    rejects = [json.loads(line) for line in (tmp_path / "out.rejects.jsonl").read_text().splitlines()]
    by_place = {reject["where"]: reject for reject in rejects}
    for line_number, (raw, reason) in enumerate(BAD_LINES.items(), 11):
        reject = by_place[f"{source}:{line_number}"]
        assert reject["reason"].startswith(reason)
        assert reject["raw"] == raw.decode("utf-8", errors="backslashreplace")


def test_strict_stops_at_an_unusable_tree_and_leaves_no_output(tmp_path):
    source = tmp_path / "trees.jsonl"
    source.write_text(json.dumps(simple_tree("1")) + "\n{\n")
    with pytest.raises(RecordError, match=r"trees\.jsonl:2: not JSON"):
        run(source, tmp_path / "out", strict=True)
    assert [path.name for path in tmp_path.iterdir()] == ["trees.jsonl"]


def test_a_thread_of_2000_turns_is_read_from_a_file(tmp_path):
    node = '{"text": "x", "role": "prompter", "replies": [' * 2000
    source = tmp_path / "trees.jsonl"
    source.write_text('{"message_tree_id": "t", "prompt": ' + node + "]}" * 2000 + "}\n")
    trees, _ = run(source, tmp_path / "out", split_ratio=1.0)
    assert trees.counts["written"] == 1
    assert len(read(tmp_path / "out", "train")[0]["conversations"]) == 2000


def test_filters_count_trees_and_paths(tmp_path):
    def reply(text, **fields):
        return {"text": text, "role": "assistant", "replies": [], "lang": "en", **fields}

    mixed = simple_tree("mixed")
    mixed["prompt"]["replies"] = [
        reply("en"),
        reply("de", lang="de-AT"),
        reply("gone", deleted=True),
        reply("?", lang=None),
    ]
    german = simple_tree("german")
    german["prompt"]["lang"] = "de"
    growing = simple_tree("growing", tree_state="growing")
    lone = simple_tree("lone")
    lone["prompt"]["replies"] = []
    source = write_trees(tmp_path / "trees.jsonl", [mixed, german, growing, lone])
    filters = Filters(languages=("en",), tree_states=("ready_for_export",), drop_deleted=True)
    trees, tally = run(source, tmp_path / "out", split_ratio=1.0, filters=filters)
    assert [[t["value"] for t in r["conversations"]] for r in read(tmp_path / "out", "train")] == [
        ["question mixed", "en"]
    ]
    assert dict(trees.counts) == {"written": 1, "filtered": 3}
    assert dict(trees.reasons) == {"--tree_state": 1, "no reply to the prompt": 1, "every path left out by --lang": 1}
    assert dict(tally.left_out) == {"--lang": 3, "--drop_deleted": 1}


def test_without_filters_deleted_foreign_and_unfinished_trees_stay(tmp_path):
    gone = simple_tree("gone", tree_state="aborted_low_grade")
    gone["prompt"].update(deleted=True, lang="swg")
    trees, tally = run(write_trees(tmp_path / "trees.jsonl", [gone]), tmp_path / "out", split_ratio=1.0)
    assert trees.counts["written"] == 1
    assert tally.languages == {"en", "swg"}


NAMES = st.text(st.characters(blacklist_categories=("Cs",)), max_size=8)


@st.composite
def nodes(draw, depth=0):
    node = {"text": draw(NAMES), "role": draw(st.sampled_from(["prompter", "assistant"]))}
    node["labels"] = labels(**draw(st.dictionaries(st.sampled_from(["quality", "spam", "humor"]), st.floats(0, 1))))
    if draw(st.booleans()):
        node["lang"] = draw(st.sampled_from(["en", "pt-BR", "zh"]))
    node["replies"] = [draw(nodes(depth + 1)) for _ in range(draw(st.integers(0, 2 if depth < 4 else 0)))]
    return node


TREES = st.lists(st.builds(lambda name, node: {"message_tree_id": name, "prompt": node}, NAMES, nodes()), min_size=1)


@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.too_slow])
@given(TREES, st.sampled_from(RECORD_TYPES), st.floats(0, 1), st.integers(0, 99))
def test_random_trees_give_the_bytes_of_the_naive_algorithm(tmp_path_factory, trees, record_type, ratio, seed):
    folder = tmp_path_factory.mktemp("trees")
    source = write_trees(folder / "trees.jsonl", trees)
    expected = naive_reference(trees, record_type, ratio, seed)
    if expected == ["", ""]:
        with pytest.raises(InputError, match="no conversation"):
            run(source, folder / "out", record_type, split_ratio=ratio, seed=seed, compat=True)
        return
    run(source, folder / "out", record_type, split_ratio=ratio, seed=seed, compat=True)
    assert [(folder / f"out_{part}.jsonl").read_text(encoding="utf-8") for part in ("train", "val")] == expected


def test_memory_does_not_grow_with_the_texts(tmp_path):
    import tracemalloc

    def peak(num_trees):
        source = write_trees(tmp_path / "trees.jsonl", [simple_tree("x" * 20_000) for _ in range(num_trees)])
        tracemalloc.start()
        with Lines(source, tmp_path) as lines:
            num_bytes = sum(len(lines[i].raw) for i in shuffled_order(len(lines), 1))
        _, most = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert num_bytes > num_trees * 60_000
        return most

    few, many = peak(20), peak(400)
    # 380 more trees hold 23 MB more text; their places take 16 bytes each.
    assert many - few < 100_000


def test_trees_of_the_same_id_end_in_the_same_split_but_for_compat(tmp_path):
    trees = [simple_tree(str(number % 20)) for number in range(200)]
    source = write_trees(tmp_path / "trees.jsonl", trees)

    def sides(prefix):
        return [{record["tree_id"] for record in read(prefix, part)} for part in ("train", "val")]

    accounting, tally = run(source, tmp_path / "ours", split_ratio=0.5)
    train, val = sides(tmp_path / "ours")
    assert not train & val
    assert tally.num_moved > 0
    assert f"same id: {tally.num_moved}" in tally.summary(accounting)
    run(source, tmp_path / "theirs", split_ratio=0.5, compat=True)
    train, val = sides(tmp_path / "theirs")
    assert train & val


def test_no_genuine_tree_is_on_both_sides(shared_data, tmp_path):
    """23 of the 386 trees of this file are there twice."""
    trees, tally = run(shared_data / "oasst2-animals-trees" / "trees.jsonl.gz", tmp_path / "out", split_ratio=0.7)
    train, val = ({record["tree_id"] for record in read(tmp_path / "out", part)} for part in ("train", "val"))
    assert not train & val
    assert tally.num_moved > 0
    assert dict(trees.counts) == {"written": 82, "filtered": 304}


TEXTS = st.text(st.characters(), max_size=20)  # lone surrogates and control characters too


@given(st.lists(TEXTS, min_size=1, max_size=6))
def test_any_text_is_written_and_read_back_as_it_was_or_rejected(tmp_path_factory, texts):
    folder = tmp_path_factory.mktemp("texts")
    trees = [simple_tree("sound")]
    for number, text in enumerate(texts):
        tree = simple_tree(str(number))
        tree["prompt"]["replies"][0]["text"] = text
        trees.append(tree)
    accounting, _ = run(write_trees(folder / "trees.jsonl", trees), folder / "out", split_ratio=1.0)
    sound = [text for text in texts if not any("\ud800" <= character <= "\udfff" for character in text)]
    assert accounting.counts["written"] == 1 + len(sound)
    assert accounting.counts["rejected"] == len(texts) - len(sound)
    raw_lines = (folder / "out_train.jsonl").read_bytes().decode("utf-8").split("\n")[:-1]
    written = [json.loads(line)["conversations"][1]["value"] for line in raw_lines]
    assert sorted(written) == sorted(["answer sound", *sound])


def as_jsonl(path, records):
    return write_trees(path.with_suffix(".jsonl"), records)


def as_array(path, records):
    path.with_suffix(".json").write_text(json.dumps(records), encoding="utf-8")
    return path.with_suffix(".json")


def flat_messages(number):
    name, text = str(number), "x" * 10_000
    return [
        {"message_id": name, "text": text, "role": "prompter"},
        {"message_id": f"{name}a", "parent_id": name, "text": text, "role": "assistant"},
    ]


SHAPES = {
    "trees": lambda number: [simple_tree(str(number) + "x" * 10_000)],
    "messages": flat_messages,
    "rows": lambda number: [{"prompt": f"{number} {'x' * 10_000}", "response": "y" * 10_000}],
}


@pytest.mark.parametrize("write", [as_jsonl, as_array])
@pytest.mark.parametrize("shape", SHAPES)
def test_a_whole_run_takes_no_more_memory_for_more_text(tmp_path, monkeypatch, shape, write):
    import tracemalloc

    monkeypatch.setattr("steerlm_nemo.data.rows._CHUNK", 1 << 16)

    def peak(number):
        records = [record for i in range(number) for record in SHAPES[shape](i)]
        source = write(tmp_path / "source", records)
        del records
        tracemalloc.start()
        run(source, tmp_path / "out")
        _, most = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        return most

    peak(20)  # what the first run imports
    few, many = peak(20), peak(400)
    # 380 more hold 7 MB more text.
    assert many - few < 700_000


# --- arguments and files ---


@pytest.mark.parametrize("prefix_as", ["out", "in"])
def test_a_failure_keeps_earlier_outputs_and_the_input(tmp_path, prefix_as):
    source = write_trees(tmp_path / "in_train.jsonl", [simple_tree("1")])
    (tmp_path / "out_train.jsonl").write_text("old")
    before = source.read_bytes()
    if prefix_as == "in":
        with pytest.raises(InputError, match="is the input itself"):
            run(source, tmp_path / "in")
    else:
        source.write_text("{\n")
        before = source.read_bytes()
        with pytest.raises(InputError, match=r"no conversation to write.*1 rejected.*The first one: .*:1: "):
            run(source, tmp_path / "out")
    assert source.read_bytes() == before
    assert (tmp_path / "out_train.jsonl").read_text() == "old"


def test_the_script_takes_the_references_flags_and_prints_its_line(tmp_path):
    source = write_trees(tmp_path / "trees.jsonl", [simple_tree(str(i)) for i in range(20)])
    done = cli(
        *(f"--input-file={source}", f"--output_file_prefix={tmp_path / 'out'}", "--mask_role=User"),
        *("--type=VALUE_TO_TEXT", "--split_ratio=0.5", "--seed=10"),
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == (
        "lang values: ['en']\ntrees: 20 read = 20 written + 0 filtered + 0 rejected\nconversations: 10 train + 10 val\n"
    )
    report = json.loads((tmp_path / "out.report.json").read_text())
    assert {key: report[key] for key in ("read", "written", "filtered", "rejected", "seed")} == {
        **{"read": 20, "written": 20, "filtered": 0, "rejected": 0},
        "seed": 10,
    }
    assert report["conversations"] == {"train": 10, "val": 10}
    assert read(tmp_path / "out", "train")[0]["tree_id"] == "14"
    assert read(tmp_path / "out", "train")[0]["conversations"][0]["label"] is None


def test_the_script_in_compatible_mode_prints_only_the_references_line(tmp_path):
    source = write_trees(tmp_path / "trees.jsonl", [WORKED_EXAMPLE])
    done = cli(f"--input_file={source}", f"--output_file_prefix={tmp_path / 'out'}", "--compat=nemo1.23")
    assert done.stdout == "lang values: ['en', 'pt']\n"
    assert "1 read = 1 written" in done.stderr
    assert "out_train.jsonl is empty" in done.stderr


def test_the_script_takes_filters(tmp_path):
    german = simple_tree("german")
    german["prompt"]["lang"] = german["prompt"]["replies"][0]["lang"] = "de"
    source = write_trees(
        tmp_path / "trees.jsonl", [german, simple_tree("en"), simple_tree("new", tree_state="growing")]
    )
    done = cli(
        *(f"--input_file={source}", f"--output_file_prefix={tmp_path / 'out'}", "--split_ratio=1"),
        *("--lang", "de,fr", "--drop_deleted", "--tree_state", "ready_for_export"),
    )
    assert "3 read = 1 written + 2 filtered + 0 rejected" in done.stdout
    assert [record["tree_id"] for record in read(tmp_path / "out", "train")] == ["german"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--input_file=none.jsonl"], "none.jsonl: no such file"),
        (["--input_file=."], "is a directory"),
        (["--type=FOO"], "--type is 'FOO'; it must be TEXT_TO_VALUE or VALUE_TO_TEXT"),
        (["--split_ratio=1.5"], "--split_ratio is 1.5"),
        (["--split_ratio=half"], "--split_ratio is 'half'"),
        (["--seed=1.5"], "--seed is '1.5'; it must be a whole number"),
        (["--mask_role=user"], "--mask_role is 'user', but the speakers are User and Assistant; did you mean User?"),
        (["--sed=1"], "unknown flag --sed; did you mean --seed?"),
        (["--schema=nemo"], "unknown attribute schema 'nemo'"),
        (["--compat=nemo2"], "--compat is 'nemo2'"),
        (["--lang"], "--lang needs a value"),
        (["--system", "--strict"], "--system needs a value"),
        (["--strict=maybe"], "--strict is 'maybe'"),
        (["--format=oast-trees"], "--format is 'oast-trees'"),
        (["--fill=violence"], "--fill is 'violence'; give an attribute line"),
        (["--labels_from=none.jsonl"], "none.jsonl: no such file"),
    ],
)
def test_the_script_refuses_bad_arguments_with_one_line(tmp_path, flags, message):
    source = write_trees(tmp_path / "trees.jsonl", [simple_tree("1")])
    inputs = [] if any("input_file" in flag for flag in flags) else [f"--input_file={source}"]
    done = cli(*inputs, f"--output_file_prefix={tmp_path / 'out'}", *flags)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert message in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["trees.jsonl"]


def test_the_script_refuses_a_cut_gzip_file(tmp_path):
    (tmp_path / "trees.jsonl.gz").write_bytes(gzip.compress(json.dumps(simple_tree("1")).encode())[:-9])
    done = cli(f"--input_file={tmp_path / 'trees.jsonl.gz'}", f"--output_file_prefix={tmp_path / 'out'}")
    assert done.returncode == 2
    assert "damaged gzip data" in done.stderr and "Traceback" not in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["trees.jsonl.gz"]


def test_help_lists_the_flags():
    done = cli("--help")
    assert done.returncode == 0
    flags = ("split_ratio", "drop_deleted", "tree_state", "format", "labels_from", "fill")
    assert all(f"--{flag}" in done.stdout + done.stderr for flag in flags)


def test_the_script_fills_several_attributes(tmp_path):
    source = write_trees(tmp_path / "trees.jsonl", [simple_tree("1")])
    flags = ("--fill=violence:0,humor:1", "--schema=paper7", "--split_ratio=1")
    done = cli(f"--input_file={source}", f"--output_file_prefix={tmp_path / 'out'}", *flags)
    assert done.returncode == 0, done.stderr
    assert read(tmp_path / "out", "train")[0]["conversations"][1]["label"] == "quality:9,violence:0,humor:1"
    assert "attributes filled in: 2" in done.stdout


def test_a_flag_is_the_text_that_was_typed(tmp_path):
    """fire reads it as Python: 20240115, 123, False that is true, a list of which only text is a language."""
    german = simple_tree("german")
    german["prompt"]["lang"] = german["prompt"]["replies"][0]["lang"] = "de"
    write_trees(tmp_path / "0x10", [german, simple_tree("en"), simple_tree("fr")])
    flags = ("--system=123", "--lang=de,en", "--strict=False", "--split-ratio", "1", "--tree_state=ready_for_export")
    command = [sys.executable, SCRIPT, "--input_file=0x10", "--output_file_prefix=2024_01_15", *flags]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert {record["system"] for record in read(tmp_path / "2024_01_15", "train")} == {"123"}
    assert len(read(tmp_path / "2024_01_15", "train")) == 3
    report = json.loads((tmp_path / "2024_01_15.report.json").read_text())
    assert (report["input_file"], report["seed"], report["split_ratio"]) == ("0x10", 10, 1.0)


def every_file(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize(
    "refused",
    [
        b'{"instruction": "a", "context": "b", "response": "c"}\n',  # unknown shape
        b'{"messages": [{"role": "user", "content": null}]}\n',  # nothing to write
        b"PAR1 but no Parquet",
        b"",
    ],
)
def test_a_refused_run_leaves_everything_of_the_earlier_one(tmp_path, refused):
    source = tmp_path / "rows.jsonl"
    source.write_bytes(b"{\n" + json.dumps(simple_tree("t")).encode())
    trees, _ = run(source, tmp_path / "out")
    assert trees.counts["rejected"] == 1
    source.write_bytes(refused)
    before = every_file(tmp_path)
    with pytest.raises(InputError):
        run(source, tmp_path / "out")
    after = every_file(tmp_path)
    after.pop("out.rejects.new.jsonl", None)
    assert after == before
