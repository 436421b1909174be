import gzip
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from steerlm_nemo.data.preprocessing import Filters, Options, preprocess
from steerlm_nemo.records import Accounting


def message(name, parent=None, role=None, **fields):
    role = role or ("prompter" if parent is None else "assistant")
    return {"message_id": name, "parent_id": parent, "text": f"text {name}", "role": role, "lang": "en", **fields}


def write(path, rows):
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def run(source, prefix, split_ratio=1.0, **options):
    records = Accounting.beside(prefix)
    tally = preprocess(source, prefix, split_ratio=split_ratio, seed=10, options=Options(**options), trees=records)
    return records, tally


def read(prefix):
    with open(f"{prefix}_train.jsonl", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def texts(prefix):
    return [[turn["value"].removeprefix("text ") for turn in record["conversations"]] for record in read(prefix)]


def rejects(records):
    found = [json.loads(line) for line in records.rejects_path.read_text().splitlines()]
    return {int(reject["where"].rpartition(":")[2]): reject["reason"] for reject in found}


def test_messages_in_any_order_become_the_paths_of_their_tree(tmp_path):
    rows = [message("a1", "a"), message("a", "q"), message("b", "q"), message("q"), message("a2", "a")]
    records, _ = run(write(tmp_path / "m.jsonl", rows), tmp_path / "out")
    assert texts(tmp_path / "out") == [["q", "a", "a1"], ["q", "a", "a2"], ["q", "b"]]
    assert {record["tree_id"] for record in read(tmp_path / "out")} == {"q"}
    assert records.summary() == "5 read = 5 written + 0 filtered + 0 rejected"


def test_labels_as_parallel_lists_are_read(tmp_path):
    labels = {"name": ["spam", "quality", "humor"], "value": [0.0, 0.875, None], "count": [3, 3, 0]}
    run(write(tmp_path / "m.jsonl", [message("q"), message("a", "q", labels=labels)]), tmp_path / "out")
    assert read(tmp_path / "out")[0]["conversations"][1]["label"] == "quality:4,lang:en"


def test_orphans_cycles_duplicates_and_unreadable_messages_are_rejected_one_by_one(tmp_path):
    rows = [
        message("q"),
        message("a", "q"),
        message("o", "nowhere"),  # 3
        message("p", "o"),  # 4
        message("x", "y"),  # 5
        message("y", "x"),  # 6
        message("z", "x"),  # 7
        message("a", "q"),  # 8
        "{",  # 9
        message("s", "q", role="system"),  # 10
        message("t", "s"),  # 11
        message("u", 7),  # 12
        {"message_id": "n", "role": "assistant"},  # 13
        message("l", "q", text="\ud800"),  # 14
        message("r", "q", labels={"name": ["quality"], "value": []}),  # 15
        message("lone"),
    ]
    records, _ = run(write(tmp_path / "m.jsonl", rows), tmp_path / "out")
    assert texts(tmp_path / "out") == [["q", "a"]]
    assert dict(records.counts) == {"written": 2, "filtered": 1, "rejected": 13}
    found = rejects(records)
    assert sorted(found) == list(range(3, 16))
    assert found[3] == "orphan: parent_id nowhere is not in the file or was rejected"
    assert found[4] == "orphan: a message above it is not in the file or was rejected"
    assert all(found[line].startswith("cycle: parent_id") for line in (5, 6, 7))
    assert found[8] == f"duplicate message_id: a is also at {tmp_path / 'm.jsonl'}:2"
    assert found[9].startswith("not JSON")
    assert found[10].startswith("unknown role: 'system'")
    assert found[11] == "orphan: a message above it was rejected"
    assert found[12].startswith("wrong type: 'parent_id'")
    assert found[13].startswith("wrong type: 'text'")
    assert found[14].startswith("lone surrogate")
    assert found[15].startswith("bad label")


def test_filters_count_messages(tmp_path):
    rows = [
        message("q", tree_state="growing"),
        message("a", "q"),
        message("r", tree_state="ready_for_export"),
        message("b", "r"),
        message("c", "r", deleted=True),
        message("s", tree_state="ready_for_export"),
    ]
    filters = Filters(tree_states=("ready_for_export",), drop_deleted=True)
    records, _ = run(write(tmp_path / "m.jsonl", rows), tmp_path / "out", filters=filters)
    assert texts(tmp_path / "out") == [["r", "b"]]
    assert dict(records.counts) == {"written": 2, "filtered": 4}


def test_a_thread_of_500_turns_is_rebuilt(tmp_path):
    rows = [message(str(n), str(n - 1) if n else None) for n in reversed(range(500))]
    run(write(tmp_path / "m.jsonl", rows), tmp_path / "out")
    assert [len(path) for path in texts(tmp_path / "out")] == [500]


def test_genuine_messages_give_the_conversations_of_the_genuine_trees(shared_data, tmp_path):
    folder = shared_data / "oasst1-en-validation"
    trees, _ = run(folder / "trees.jsonl.gz", tmp_path / "trees", split_ratio=0.95)
    messages, _ = run(folder / "messages.jsonl.gz", tmp_path / "messages", split_ratio=0.95)
    for part in ("train", "val"):
        assert (tmp_path / f"trees_{part}.jsonl").read_bytes() == (tmp_path / f"messages_{part}.jsonl").read_bytes()
    assert dict(trees.counts) == {"written": 130}
    # Two messages name a parent that is not in the file; the trees were made without them.
    assert dict(messages.counts) == {"written": 1361, "rejected": 2}
    assert dict(messages.reasons) == {"orphan": 2}


@pytest.mark.parametrize("folder", ["oasst2-animals-trees", "oasst-unlabelled-trees"])
def test_genuine_trees_taken_apart_give_the_same_conversations(shared_data, tmp_path, folder):
    """All tree states, deleted and unlabelled messages, thirty languages; labels stay maps here."""
    rows = []
    with gzip.open(shared_data / folder / "trees.jsonl.gz", "rt", encoding="utf-8") as file:
        # Genuine files hold some trees twice; of messages, the second would be rejected as duplicates.
        trees = {tree["message_tree_id"]: tree for tree in map(json.loads, file)}
    write(tmp_path / "trees.jsonl", trees.values())
    for tree in trees.values():
        own = {key: tree[key] for key in ("message_tree_id", "tree_state")}
        pending = [(tree["prompt"], None)]
        while pending:
            node, parent = pending.pop()
            pending.extend((reply, node["message_id"]) for reply in reversed(node.get("replies") or []))
            rows.append({**node, **own, "parent_id": parent, "replies": None})
    run(tmp_path / "trees.jsonl", tmp_path / "trees", split_ratio=0.95)
    records, _ = run(write(tmp_path / "m.jsonl", rows), tmp_path / "messages", split_ratio=0.95)
    for part in ("train", "val"):
        assert (tmp_path / f"trees_{part}.jsonl").read_bytes() == (tmp_path / f"messages_{part}.jsonl").read_bytes()
    assert records.counts.total() == len(rows)
    assert records.counts["rejected"] == 0


NAMES = st.sampled_from("abcdefgh")


@given(st.lists(st.tuples(NAMES, st.none() | NAMES, st.text(max_size=5)), max_size=12))
def test_whatever_the_parents_every_message_is_accounted_for_once(tmp_path_factory, raw):
    folder = tmp_path_factory.mktemp("messages")
    rows = [message("root"), message("reply", "root")]
    rows += [message(name, parent, text=text) for name, parent, text in raw]
    records, _ = run(write(folder / "m.jsonl", rows), folder / "out")
    assert records.counts.total() == len(rows)
    written = {name for path in read(folder / "out") for name in [path["tree_id"]]}
    assert "root" in written
    if records.counts["rejected"]:
        assert len(rejects(records)) == records.counts["rejected"]
