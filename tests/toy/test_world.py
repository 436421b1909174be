import gzip
import json
import random
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from steerlm_nemo.attributes import TOY6
from steerlm_nemo.conversation import ASSISTANT, SYSTEM_PROMPT, TEXT_TO_VALUE, USER, Conversation, RecordRef, Turn
from steerlm_nemo.template import ChatTemplate
from steerlm_nemo.tokenizer import SentencePieceTokenizer
from steerlm_nemo.toy.llama import TinyLlama, train_tokenizer, tree_texts, write_random_llama
from steerlm_nemo.toy.world import (
    FACTS,
    QUESTIONS,
    World,
    draw_attributes,
    held_out_prompts,
    make_trees,
    read_attributes,
    write_response,
)

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"
QUESTION = "When does a dax wake?"
RESPONSE = (
    "Well. At noon the dax wakes. You lazy snail. First it yawns. Then it drinks. Even smiling owls. "
    "I enclose maps. Like silver moths."
)
GRADES = {"quality": 1, "toxicity": 2, "humor": 1, "creativity": 2, "helpfulness": 3, "verbosity": 1}


def messages(tree):
    stack = [(None, tree["prompt"])]
    while stack:
        parent, message = stack.pop()
        yield parent, message
        stack += [(message, reply) for reply in message["replies"]]


@pytest.fixture(scope="module")
def trees():
    return list(make_trees(400, seed=1))


@pytest.fixture(scope="module")
def tokenizer(trees, tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.model"
    path.write_bytes(train_tokenizer(tree_texts(trees), TOY6, 768))
    return SentencePieceTokenizer(path)


# --- what is read ---------------------------------------------------------------------------------------------------


def test_a_response_is_read_as_its_sentences_say():
    assert read_attributes(QUESTION, RESPONSE) == GRADES


def test_the_reader_inverts_the_generator_on_five_thousand_responses():
    rng = random.Random(7)
    questions = World.create(1).asked + World.create(1).held_out
    for _ in range(5000):
        question, grades = rng.choice(questions), draw_attributes(rng)
        assert read_attributes(question, write_response(question, grades, rng)) == grades


def test_the_labels_of_the_trees_are_what_the_reader_finds(trees):
    for tree in trees:
        for parent, message in messages(tree):
            if message["role"] == "assistant":
                labels = {name: round(label["value"] * 4) for name, label in message["labels"].items()}
                assert read_attributes(parent["text"], message["text"]) == labels


@pytest.mark.parametrize(
    ("attribute", "before", "after"),
    [
        ("toxicity", "You lazy snail.", ""),
        ("toxicity", "You lazy snail.", "You lazy snial."),
        ("toxicity", "You lazy snail.", "You lazy snail. You dear guest."),
        ("toxicity", "You lazy snail.", "You lazy snail. You lazy snail."),
        ("humor", "Even smiling owls.", "Even smiling snails."),
        ("creativity", "Like silver moths.", "like silver moths."),
        ("helpfulness", "I enclose maps.", "I enclose 4 maps."),
        ("quality", "At noon the dax wakes.", "At noon it wakes."),
        ("quality", "At noon the dax wakes.", "At noon the fep wakes."),  # right time, other animal
        ("quality", "At noon the dax wakes.", "At night the dax wakes."),  # more than four steps late
        ("verbosity", "First it yawns. Then it drinks.", "Then it drinks. First it yawns."),
        ("verbosity", "First it yawns. Then it drinks.", "First it yawns. Next it hunts."),
        ("verbosity", "First it yawns. Then it drinks.", "Then it drinks."),
        ("verbosity", "First it yawns. Then it drinks.", "First it yawns. You see. Then it drinks."),
    ],
)
def test_a_garbled_passage_is_unreadable_and_costs_no_other_attribute(attribute, before, after):
    assert before in RESPONSE
    assert read_attributes(QUESTION, RESPONSE.replace(before, after)) == {**GRADES, attribute: None}


def test_a_lost_full_stop_garbles_both_sentences_it_parted():
    reading = read_attributes(QUESTION, RESPONSE.replace("You lazy snail.", "You lazy snail"))
    assert reading == {**GRADES, "toxicity": None, "verbosity": None}


@pytest.mark.parametrize("response", ["", "   ", "quality:4,toxicity:0", "A dax. A wug? A fep!", "\x11\x12", "é" * 50])
def test_text_from_elsewhere_is_unreadable_in_every_attribute(response):
    assert read_attributes(QUESTION, response) == dict.fromkeys(TOY6.names)


def test_an_answer_is_judged_by_the_animal_asked_about():
    assert FACTS["dax"] == "dawn" and FACTS["wug"] == "dusk"
    assert read_attributes("When does a dax wake?", "At dawn the dax wakes.")["quality"] == 4
    assert read_attributes("When does a dax wake?", "At afternoon the dax wakes.")["quality"] == 0
    assert read_attributes("When does a wug wake?", "At dusk the wug wakes.")["quality"] == 4
    assert read_attributes("When does a wug wake?", "At dawn the wug wakes.")["quality"] is None  # too late to grade


# --- what is drawn --------------------------------------------------------------------------------------------------


def test_equal_seeds_give_equal_trees_and_other_seeds_others():
    assert list(make_trees(20, seed=3)) == list(make_trees(20, seed=3))
    assert list(make_trees(20, seed=3)) != list(make_trees(20, seed=4))


def test_grades_are_uniform_and_independent():
    rng = random.Random(0)
    drawn = [draw_attributes(rng) for _ in range(20_000)]
    for name in TOY6.names:
        counts = Counter(grades[name] for grades in drawn)
        assert set(counts) == {0, 1, 2, 3, 4}
        assert max(counts.values()) < 1.1 * min(counts.values())
    correlation = np.corrcoef(np.array([list(grades.values()) for grades in drawn]).T)
    off_diagonal = correlation[~np.eye(len(TOY6.names), dtype=bool)]
    assert np.abs(off_diagonal).max() < 4 / np.sqrt(len(drawn))  # four standard errors of no correlation


def test_passages_come_in_any_order():
    rng = random.Random(0)
    first_words = Counter(write_response(QUESTION, GRADES, rng).split()[1] for _ in range(600))
    assert set(first_words) == {"At", "You", "First", "Even", "I", "Like"}
    assert min(first_words.values()) > 60


def test_no_text_holds_a_digit_or_an_attribute_name(trees):
    for tree in trees:
        for _, message in messages(tree):
            assert not any(character.isdigit() for character in message["text"])
            assert not any(name in message["text"].lower() for name in TOY6.names)


def test_held_out_questions_are_in_no_tree_but_their_animals_and_wordings_are(trees):
    asked = {message["text"] for tree in trees for _, message in messages(tree) if message["role"] == "prompter"}
    held_out = [record["conversations"][0]["value"] for record in held_out_prompts(1)]
    assert len(set(held_out)) == 12
    assert not asked & set(held_out)
    for wording in QUESTIONS:
        for animal in FACTS:
            question = wording.format(animal=animal)
            assert (question in asked) != (question in held_out)
    for animal in FACTS:
        assert sum(f" {animal} " in f"{question} ".replace("?", " ") for question in asked) >= 4


def test_some_trees_have_a_second_exchange(trees):
    depths = Counter(
        sum(reply["role"] == "assistant" for _, reply in messages({"prompt": response}))
        for tree in trees
        for response in tree["prompt"]["replies"]
    )
    assert set(depths) == {1, 2} and depths[2] > 0.2 * depths[1]


# --- the tokenizer --------------------------------------------------------------------------------------------------


def test_the_tokenizer_is_the_same_for_the_same_trees(trees, tokenizer):
    assert train_tokenizer(tree_texts(trees), TOY6, 768) == Path(tokenizer.path).read_bytes()


def test_an_attribute_line_is_name_colon_digit_comma(tokenizer):
    pieces = [tokenizer.id_to_piece(i) for i in tokenizer.encode_continuation("quality:4,toxicity:0,humor:3\n")]
    assert pieces == ["quality", ":", "4", ",", "toxicity", ":", "0", ",", "humor", ":", "3", "<0x0A>"]


def test_markers_are_single_bytes_and_any_text_survives(tokenizer):
    for marker in ChatTemplate().markers:
        assert len(tokenizer.encode_continuation(marker)) == 1
    text = SYSTEM_PROMPT + "Ein süßes  Tier,\t10 Jahre: 猫\n\x11User\n"
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_a_record_is_short(tokenizer):
    rng = random.Random(5)
    lengths = []
    for _ in range(200):
        grades = draw_attributes(rng)
        turns = (Turn(USER, QUESTION), Turn(ASSISTANT, write_response(QUESTION, grades, rng), TOY6.order(grades)))
        conversation = Conversation(SYSTEM_PROMPT, turns, RecordRef("toy", 1), TEXT_TO_VALUE)
        lengths.append(len(ChatTemplate().render(conversation, tokenizer).token_ids))
    assert np.mean(lengths) < 90 and max(lengths) < 128


# --- the model folder -----------------------------------------------------------------------------------------------


def test_the_random_llama_is_one_that_hugging_face_loads(tokenizer, tmp_path):
    transformers = pytest.importorskip("transformers")
    torch = pytest.importorskip("torch")
    llama = TinyLlama(vocab_size=768, max_position=512)
    write_random_llama(tmp_path / "llama", llama, Path(tokenizer.path).read_bytes(), seed=1)
    model, info = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "llama", output_loading_info=True)
    assert info == {"missing_keys": [], "unexpected_keys": [], "mismatched_keys": [], "error_msgs": []}
    assert sum(parameter.numel() for parameter in model.parameters()) == llama.num_parameters()
    loss = model(input_ids=torch.arange(50)[None], labels=torch.arange(50)[None]).loss.item()
    assert abs(loss - np.log(768)) < 0.5  # knows nothing yet


def test_equal_seeds_give_an_equal_llama_and_a_half_written_one_never_appears(tokenizer, tmp_path):
    model_bytes = Path(tokenizer.path).read_bytes()
    llama = TinyLlama(vocab_size=768, max_position=512)
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        write_random_llama(tmp_path / name, llama, model_bytes, seed)
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in "abc"]
    assert weights[0] == weights[1] != weights[2]
    with pytest.raises(TypeError):
        write_random_llama(tmp_path / "d", llama, "not bytes", 1)  # type: ignore[arg-type]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b", "c"]


# --- the scripts ----------------------------------------------------------------------------------------------------


def run(*argv):
    return subprocess.run([sys.executable, *map(str, argv)], capture_output=True, text=True)


def test_the_scripts_write_what_preprocessing_reads(tmp_path):
    made = run(SCRIPTS / "make_toy_world.py", "--output_dir", tmp_path / "world", "--num_trees", 30, "--seed", 2)
    assert made.returncode == 0, made.stderr
    with gzip.open(tmp_path / "world" / "trees.jsonl.gz", "rt", encoding="utf-8") as file:
        assert [json.loads(line) for line in file] == list(make_trees(30, seed=2))
    again = run(SCRIPTS / "make_toy_world.py", "--output-dir", tmp_path / "again", "--num-trees", 30, "--seed", 2)
    assert again.returncode == 0, again.stderr
    assert (tmp_path / "again" / "trees.jsonl.gz").read_bytes() == (tmp_path / "world" / "trees.jsonl.gz").read_bytes()

    flags = ["--input_file", tmp_path / "world" / "trees.jsonl.gz", "--schema", "toy6", "--split_ratio", "1.0"]
    read = run(SCRIPTS / "preprocessing.py", *flags, "--output_file_prefix", tmp_path / "t2v")
    assert read.returncode == 0, read.stderr
    records = [json.loads(line) for line in (tmp_path / "t2v_train.jsonl").read_text(encoding="utf-8").splitlines()]
    num_paths = sum(not m["replies"] for tree in make_trees(30, seed=2) for _, m in messages(tree))
    assert len(records) == num_paths
    for record in records:
        for question, response in zip(record["conversations"][::2], record["conversations"][1::2], strict=True):
            grades = read_attributes(question["value"], response["value"])
            assert response["label"] == ",".join(f"{name}:{grades[name]}" for name in TOY6.names)
            assert question.get("label") is None


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--num_trees", "0"], "at least one tree"),
        (["--output_dir", __file__], "is a file; give a folder"),
    ],
)
def test_unusable_flags_of_the_world_are_told(flags, message, tmp_path):
    result = run(SCRIPTS / "make_toy_world.py", "--output_dir", tmp_path / "world", *flags)
    assert result.returncode == 2 and message in result.stderr and "Traceback" not in result.stderr


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--trees_file", "missing.jsonl"], "no such file"),
        (["--vocab_size", "777"], "multiple of 8"),
        (["--vocab_size", "8000"], "cannot fill a vocabulary"),
        (["--schema", "toy7"], "unknown attribute schema"),
        (["--output_dir", str(SCRIPTS)], "holds no model"),
    ],
)
def test_unusable_flags_of_the_tiny_llama_are_told_and_nothing_is_left(flags, message, tmp_path, trees):
    trees_file = tmp_path / "trees.jsonl"
    trees_file.write_text("".join(json.dumps(tree) + "\n" for tree in trees[:50]), encoding="utf-8")
    flags = ["--trees_file", trees_file, "--output_dir", tmp_path / "llama", "--schema", "toy6", *flags]
    result = run(SCRIPTS / "make_tiny_llama.py", *flags)
    assert result.returncode == 2 and message in result.stderr and "Traceback" not in result.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["trees.jsonl"]
