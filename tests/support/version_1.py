"""A SteerLM format as this project wrote it up to format version 1."""

from __future__ import annotations

import json

FORMAT = r"""
{
 "version": 1,
 "record_type": "TEXT_TO_VALUE",
 "template": {"system_turn_start": "\u0000", "turn_start": "\u0011", "label_start": "\u0012",
  "end_of_turn": "\n", "end_of_name": "\n"},
 "schema": {"name": "helpsteer5", "languages": [], "attributes": [
  {"name": "helpfulness", "minimum": 0, "maximum": 4, "default": 4},
  {"name": "correctness", "minimum": 0, "maximum": 4, "default": 4},
  {"name": "coherence", "minimum": 0, "maximum": 4, "default": 4},
  {"name": "complexity", "minimum": 0, "maximum": 4, "default": 4},
  {"name": "verbosity", "minimum": 0, "maximum": 4, "default": 4}]},
 "digest": "b1993ef3bd23ecc8"
}
"""


def stored_format() -> dict[str, object]:
    return json.loads(FORMAT)
