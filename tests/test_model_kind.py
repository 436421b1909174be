"""What a model is for, and the format that says so inside its `.nemo`."""

from __future__ import annotations

import json

import pytest
from version_1 import stored_format

from steerlm_nemo.attributes import HELPSTEER5, NEMO12_LANG
from steerlm_nemo.errors import FormatMismatchError
from steerlm_nemo.model_kind import (
    CHAT,
    GRADE,
    GRADER,
    KINDS,
    PLAIN,
    STEER,
    STEERLM,
    SteerLMFormat,
    kind_trained_on,
    kinds_that,
)
from steerlm_nemo.template import EXTRA_ID_TEMPLATE, ChatTemplate

FORMAT = SteerLMFormat(ChatTemplate(), NEMO12_LANG, STEERLM)


def test_a_format_survives_json():
    assert SteerLMFormat.from_dict(json.loads(json.dumps(FORMAT.to_dict()))) == FORMAT


def test_a_format_of_version_1_is_read_as_the_kind_its_records_made():
    stored = stored_format()
    assert SteerLMFormat.from_dict(stored) == SteerLMFormat(ChatTemplate(), HELPSTEER5, GRADER)
    with pytest.raises(FormatMismatchError, match="edited by hand"):
        SteerLMFormat.from_dict({**stored, "record_type": "VALUE_TO_TEXT"})


def test_a_format_edited_by_hand_is_refused():
    edited = FORMAT.to_dict()
    edited["template"] = {**edited["template"], "turn_start": "<a>"}
    with pytest.raises(FormatMismatchError, match="edited by hand"):
        SteerLMFormat.from_dict(edited)
    with pytest.raises(FormatMismatchError, match="edited by hand"):
        SteerLMFormat.from_dict({**FORMAT.to_dict(), "kind": "grader"})
    with pytest.raises(FormatMismatchError, match="version 3 is not supported; this program reads versions 1 to 2"):
        SteerLMFormat.from_dict({**FORMAT.to_dict(), "version": 3})
    with pytest.raises(FormatMismatchError, match="not a SteerLM format"):
        SteerLMFormat.from_dict({"version": 1})


def test_two_sides_that_disagree_are_both_shown():
    FORMAT.require_same(SteerLMFormat(ChatTemplate(), NEMO12_LANG, STEERLM), "client", "server")
    with pytest.raises(FormatMismatchError) as caught:
        FORMAT.require_same(SteerLMFormat(EXTRA_ID_TEMPLATE, HELPSTEER5, GRADER), "client", "server")
    assert "client: steerlm" in str(caught.value) and "nemo12+lang" in str(caught.value)
    assert "server: grader" in str(caught.value) and "helpsteer5" in str(caught.value)


def test_records_make_the_kind_that_learns_from_them():
    assert kind_trained_on("TEXT_TO_VALUE") is GRADER
    assert kind_trained_on("VALUE_TO_TEXT") is STEERLM
    assert kind_trained_on(None) is PLAIN
    with pytest.raises(FormatMismatchError, match="'VALUE_TO_VALUE' make no known kind"):
        kind_trained_on("VALUE_TO_VALUE")


def test_the_table_says_who_can_do_what():
    assert [kind.name for kind in kinds_that(GRADE)] == ["grader", "regression"]
    assert [kind.name for kind in kinds_that(CHAT)] == ["steerlm", "plain", "preference"]
    assert [kind.name for kind in kinds_that(STEER)] == ["steerlm", "preference"]
    assert all(name == kind.name and kind.abilities for name, kind in KINDS.items())
