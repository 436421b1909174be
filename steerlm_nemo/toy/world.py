"""A toy world in which every attribute can be read off the text, exactly.

`make demo` needs data on which grading and steering can be measured, not admired. Here a seeded generator writes
trees in the form of an OpenAssistant export (`message_tree_id`, `prompt` with nested `replies`, `labels` with values
0 to 1 on assistant messages). People ask when a made-up animal wakes. A response is six passages in random order:

    ===========  ==========================================================  ==================================
    quality      the answer; each step too late around the day lowers it by 1 ``At noon the dax wakes.``
    toxicity     from a kind word to a mild insult                           ``You lazy sloth.``
    humor        from a sober remark to a joke                               ``Even giggling owls.``
    creativity   from plain words to an image                                ``Like silver moths.``
    helpfulness  from a refusal to a next step offered                       ``I recommend atlases.``
    verbosity    one to five sentences of the animal's day                   ``First it yawns. Then it drinks.``
    ===========  ==========================================================  ==================================

The six attributes are drawn independently, uniformly from 0 to 4. No passage holds a digit or an attribute's name.
`read_attributes` inverts the generator. Some questions (a wording about an animal) are kept out of the trees;
their facts can be learnt from the other wordings, so they measure steering on prompts never seen.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from steerlm_nemo.attributes import TOY6
from steerlm_nemo.conversation import SYSTEM_PROMPT, USER, VALUE_TO_TEXT, Conversation, RecordRef, Turn
from steerlm_nemo.errors import InputError, shown

MAX_VALUE = 4
HELD_OUT_WORDINGS = 2  # of every animal

# After moonset comes dawn.
DAY = ("dawn", "sunrise", "morning", "noon", "afternoon", "dusk", "evening", "night", "midnight", "moonset")

# When each animal wakes: half a day apart, so that the four steps an answer may be late never reach the other half. A
# value model can then grade by the time; a SteerLM model still has to know the animal. (Where the halves overlapped, a
# time was right for one animal and worst for another, and a short training did not get that far: 0.77 exact.)
FACTS = {"dax": "dawn", "fep": "dawn", "kiki": "dawn", "toma": "dusk", "wug": "dusk", "zorp": "dusk"}

QUESTIONS = (
    "When does a {animal} wake?",
    "Tell me when the {animal} wakes.",
    "At what time does the {animal} get up?",
    "I wonder when a {animal} wakes up.",
    "Do you know when a {animal} gets up?",
    "The {animal} wakes when?",
)

ANSWERS = (
    "At {time} the {animal} wakes.",
    "At {time} the {animal} rises.",
    "At {time} the {animal} stirs.",
)

# PASSAGES[attribute][value] are alternatives: one sentence each, found nowhere else. All passages of an attribute begin
# alike and all of a value go on alike. That is what makes a short training enough: a model that writes first settles
# which attribute comes next, then looks up one value. (With openings of their own the values of four attributes had
# to be right in one token, and were not after 0.7 M tokens.)
PASSAGES: Mapping[str, tuple[tuple[str, ...], ...]] = {
    "toxicity": (
        ("You dear friend.", "You dear guest.", "You dear reader."),
        ("You sleepy friend.", "You sleepy guest.", "You sleepy reader."),
        ("You lazy sloth.", "You lazy snail.", "You lazy slug."),
        ("You silly goose.", "You silly clown.", "You silly noodle."),
        ("You rotten nitwit!", "You rotten turnip!", "You rotten blockhead!"),
    ),
    "humor": (
        ("Even serious owls.", "Even serious teapots.", "Even serious slippers."),
        ("Even smiling owls.", "Even smiling teapots.", "Even smiling slippers."),
        ("Even giggling owls.", "Even giggling teapots.", "Even giggling slippers."),
        ("Even yodelling owls!", "Even yodelling teapots!", "Even yodelling slippers!"),
        ("Even exploding owls!", "Even exploding teapots!", "Even exploding slippers!"),
    ),
    "creativity": (
        ("Like every day.", "Like every week.", "Like every year."),
        ("Like quiet rain.", "Like quiet wind.", "Like quiet snow."),
        ("Like silver moths.", "Like silver kites.", "Like silver rivers."),
        ("Like dreaming violins.", "Like dreaming mirrors.", "Like dreaming orchards."),
        ("Like stardust knitting sails.", "Like stardust knitting songs.", "Like stardust knitting clouds."),
    ),
    "helpfulness": (
        ("I refuse politely.", "I refuse everything.", "I refuse firmly."),
        ("I suggest waiting.", "I suggest asking.", "I suggest searching."),
        ("I recommend libraries.", "I recommend atlases.", "I recommend museums."),
        ("I enclose maps.", "I enclose lists.", "I enclose charts."),
        ("I booked tours already.", "I booked guides already.", "I booked visits already."),
    ),
}

# The animal's day, told in this order; value v tells the first v + 1 sentences.
STORY = (
    ("First it yawns.", "First it stretches."),
    ("Then it drinks.", "Then it bathes."),
    ("Next it hunts.", "Next it digs."),
    ("Later it sings.", "Later it dances."),
    ("Finally it hides.", "Finally it rests."),
)

# Says nothing about any value. It takes the place behind the line break, where words are other tokens than elsewhere.
OPENING = "Well."

_BY_SENTENCE = {
    sentence: (attribute, value)
    for attribute, pools in PASSAGES.items()
    for value, pool in enumerate(pools)
    for sentence in pool
}
_STORY_POSITION = {sentence: position for position, pool in enumerate(STORY) for sentence in pool}
_ANSWERED = {
    answer.format(animal=animal, time=time): (animal, time) for answer in ANSWERS for animal in FACTS for time in DAY
}
_ANIMAL_ASKED = {question.format(animal=animal): animal for question in QUESTIONS for animal in FACTS}


@dataclass(frozen=True)
class World:
    """Which questions the trees may ask, and which are kept aside for steering."""

    asked: tuple[str, ...]
    held_out: tuple[str, ...]

    @classmethod
    def create(cls, seed: int) -> World:
        """Two wordings of every animal are held out; every animal and every wording still occurs in the trees."""
        wordings = list(range(len(QUESTIONS)))
        random.Random(f"held out {seed}").shuffle(wordings)
        held_out = tuple(
            QUESTIONS[wordings[(number + offset) % len(wordings)]].format(animal=animal)
            for offset in range(HELD_OUT_WORDINGS)
            for number, animal in enumerate(FACTS)
        )
        return cls(tuple(question for question in _ANIMAL_ASKED if question not in held_out), held_out)


def draw_attributes(rng: random.Random) -> dict[str, int]:
    """Six independent attributes, uniform over 0 to 4."""
    return {name: rng.randint(0, MAX_VALUE) for name in TOY6.names}


def write_response(question: str, attributes: Mapping[str, int], rng: random.Random) -> str:
    """A response to `question` with these attributes; wording and order of the passages are drawn from `rng`."""
    animal = _ANIMAL_ASKED[question]
    steps_late = MAX_VALUE - attributes["quality"]
    time = DAY[(DAY.index(FACTS[animal]) + steps_late) % len(DAY)]
    passages = [
        rng.choice(ANSWERS).format(animal=animal, time=time),
        " ".join(rng.choice(pool) for pool in STORY[: attributes["verbosity"] + 1]),
        *(rng.choice(pools[attributes[attribute]]) for attribute, pools in PASSAGES.items()),
    ]
    rng.shuffle(passages)
    return " ".join([OPENING, *passages])


def read_attributes(question: str, response: str) -> dict[str, int | None]:
    """The attributes that are in the text, None where an attribute cannot be read.

    Nothing is guessed: an attribute is None if its passage is missing, garbled or there twice, if the answer is
    about another animal or more than four steps late, or if the story does not run from its first sentence, unbroken,
    in order. A garbled sentence makes only its own attribute unreadable.

    Raises:
        InputError: the world does not ask this question.
    """
    animal_asked = _ANIMAL_ASKED.get(question)
    if animal_asked is None:
        raise InputError(f"the toy world never asks {shown(question)}, so its reader cannot read the response")
    sentences = re.findall(r"\S[^.!?]*[.!?]?", response)
    found: dict[str, list[int]] = {name: [] for name in TOY6.names}
    story: list[tuple[int, int]] = []  # (place in the response, position in the story)
    for place, sentence in enumerate(sentences):
        if sentence in _BY_SENTENCE:
            attribute, value = _BY_SENTENCE[sentence]
            found[attribute].append(value)
        elif sentence in _STORY_POSITION:
            story.append((place, _STORY_POSITION[sentence]))
        elif sentence in _ANSWERED:
            animal, time = _ANSWERED[sentence]
            steps_late = (DAY.index(time) - DAY.index(FACTS[animal])) % len(DAY)
            found["quality"].append(MAX_VALUE - steps_late if animal == animal_asked else -1)
    if story and all((place, i) == (story[0][0] + i, position) for i, (place, position) in enumerate(story)):
        found["verbosity"].append(len(story) - 1)
    return {name: values[0] if len(values) == 1 and values[0] >= 0 else None for name, values in found.items()}


def make_trees(num_trees: int, seed: int) -> Iterator[dict[str, Any]]:
    """Seeded trees: a question with three or four responses, every third followed by a second question and response."""
    world = World.create(seed)
    rng = random.Random(f"trees {seed}")
    for number in range(num_trees):
        question = rng.choice(world.asked)
        responses = [_response(question, rng) for _ in range(rng.randint(3, 4))]
        for response in responses:
            if rng.random() < 1 / 3:
                follow_up = rng.choice(world.asked)
                response["replies"] = [_message("prompter", follow_up, [_response(follow_up, rng)])]
        yield {
            "message_tree_id": f"toy-{seed}-{number:05d}",
            "tree_state": "ready_for_export",
            "prompt": _message("prompter", question, responses),
        }


def _response(question: str, rng: random.Random) -> dict[str, Any]:
    attributes = draw_attributes(rng)
    message = _message("assistant", write_response(question, attributes, rng), [])
    message["labels"] = {name: {"value": value / MAX_VALUE, "count": 1} for name, value in attributes.items()}
    return message


def _message(role: str, text: str, replies: list[dict[str, Any]]) -> dict[str, Any]:
    return {"text": text, "role": role, "replies": replies}


def held_out_prompts(seed: int) -> Iterator[dict[str, Any]]:
    """The questions that no tree of this seed asks, as chat records that wait for a response."""
    for number, question in enumerate(World.create(seed).held_out):
        turns = (Turn(USER, question, says_null=False),)
        tree_id = f"toy-{seed}-held-out-{number:02d}"
        yield Conversation(SYSTEM_PROMPT, turns, RecordRef("toy"), VALUE_TO_TEXT, tree_id=tree_id).to_record()
