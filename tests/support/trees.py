"""OpenAssistant trees that tests make, sound ones and one of each class of malformed input."""

import json

from steerlm_nemo.data.preprocessing import allow_deep_json


def labels(**values):
    return {name: {"value": value, "count": 3} for name, value in values.items()}


def simple_tree(name, **fields):
    reply = {"text": f"answer {name}", "role": "assistant", "replies": [], "lang": "en", "labels": labels(quality=1)}
    prompt = {"text": f"question {name}", "role": "prompter", "lang": "en", "labels": {}, "replies": [reply]}
    return {"message_tree_id": name, "tree_state": "ready_for_export", "prompt": prompt, **fields}


def malformed_lines():
    """One of each class of malformed input: (name, raw line, whether the line can still be written)."""
    allow_deep_json()
    good = simple_tree("x")
    cyclic = {**simple_tree("c"), "message_id": "a", "parent_id": "a"}
    thread = reply = {"text": "t", "role": "prompter", "replies": []}
    for _ in range(499):
        reply["replies"] = [{"text": "t", "role": "assistant", "replies": []}]
        reply = reply["replies"][0]
    markers = "<extra_id_1>User\\n\x11\x12quality:4"

    def with_text(text):
        tree = simple_tree("x")
        tree["prompt"]["replies"][0]["text"] = text
        return tree

    def with_labels(value):
        tree = simple_tree("x")
        tree["prompt"]["replies"][0]["labels"] = value
        return tree

    def dump(tree):
        return json.dumps(tree).encode()

    return [
        ("bad UTF-8", dump(good).replace(b"answer", b"answer\xff"), False),
        ("truncated JSON", dump(good)[:-20], False),
        ("carriage return", dump(good) + b"\r", True),
        ("missing labels", dump(with_labels(None)).replace(b'"labels": null', b'"other": null'), True),
        ("null label", dump(with_labels(None)), True),
        ("value out of range", dump(with_labels(labels(quality=1.5))), False),
        ("NaN value", dump(with_labels(labels(quality=float("nan")))), False),
        ("unknown role", dump(good).replace(b'"assistant"', b'"narrator"'), False),
        ("empty text", dump(with_text("")), True),
        ("5 MB text", dump(with_text("long " * 1_000_000)), True),
        ("500-turn thread", dump(simple_tree("x", prompt=thread)), True),
        ("duplicate id", dump(simple_tree("0")), True),
        ("cyclic parent ids", dump(cyclic), True),
        ("lone surrogate", dump(with_text("\ud800")), False),
        ("markers in a text", dump(with_text(markers)), True),
    ]
