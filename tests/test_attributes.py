import pytest
from hypothesis import given
from hypothesis import strategies as st

from steerlm_nemo.attributes import (
    HELPSTEER5,
    LANGUAGES,
    NEMO12_LANG,
    PAPER7,
    PRESETS,
    Attribute,
    Attributes,
    AttributeSchema,
    load_schema,
    schema_named,
)
from steerlm_nemo.errors import FormatMismatchError, InputError

KEYS = st.text(st.characters(exclude_characters=",:<>[]{}|"), min_size=1).filter(
    lambda key: key != "lang" and key.isprintable() and key == key.strip()
)
SPACES = st.text(" \t\n\u00a0", max_size=2)


def test_a_line_is_read_in_the_order_it_is_written():
    attributes = Attributes.parse("quality:4,toxicity:0,lang:en")
    assert attributes.items == (("quality", 4), ("toxicity", 0), ("lang", "en"))
    assert attributes.line == "quality:4,toxicity:0,lang:en"


def test_an_empty_line_has_no_items():
    assert Attributes.parse("") == Attributes(())
    assert Attributes(()).line == ""


@given(st.dictionaries(KEYS, st.integers(0, 999_999_999)), st.sampled_from([None, "en", "zh", ""]))
def test_writing_and_reading_a_line_gives_the_same_attributes(grades, lang):
    items = (*grades.items(), *([("lang", lang)] if lang is not None else []))
    assert Attributes.parse(Attributes(items).line) == Attributes(items)


@given(st.text())
def test_whatever_can_be_read_is_written_in_one_way(line):
    try:
        attributes = Attributes.parse(line)
    except ValueError:
        return
    assert Attributes.parse(attributes.line) == attributes
    assert attributes.line == ",".join(
        ":".join(map(str.strip, item.split(":", 1))) for item in line.split(",") if item.strip()
    )


@given(st.dictionaries(KEYS, st.integers(0, 999_999_999), min_size=1), st.booleans(), st.data())
def test_spaces_and_a_comma_at_the_end_change_nothing(grades, ends_in_comma, data):
    def spaced(text):
        return data.draw(SPACES) + str(text) + data.draw(SPACES)

    line = ",".join(f"{spaced(key)}:{spaced(value)}" for key, value in grades.items()) + "," * ends_in_comma
    assert Attributes.parse(line + data.draw(SPACES)) == Attributes(tuple(grades.items()))


@pytest.mark.parametrize(
    ("line", "culprit"),
    [
        ("quality", "'quality'"),
        ("quality:4,,toxicity:0", "''"),
        ("quality:4,,", "''"),
        (",", "''"),
        (":4", "':4'"),
        ("quality:4,quality:3", "'quality:3'"),
        ("quality:4, quality:3", "' quality:3'"),
        ("quality:high", "'high'"),
        ("quality:", "''"),
        ("quality:-1", "'-1'"),
        ("quality:04", "'04'"),
        ("quality:4.0", "'4.0'"),
        ("quality:４", "'４'"),
        ("quality:4;toxicity:0", "'4;toxicity:0'"),
        ("quality:4 toxicity:0", "'4 toxicity:0'"),
        ("quality=4", "'quality=4'"),
        ("qua\nlity:4", "'qua\\nlity:4'"),
        ("lang:e\nn", "character that could end the line"),
    ],
)
def test_a_malformed_line_is_refused_naming_the_item(line, culprit):
    with pytest.raises(ValueError) as caught:
        Attributes.parse(line)
    assert culprit in str(caught.value)


@pytest.mark.parametrize("key", ["Quality", "QUALITY", "Not-Appropriate", "not appropriate", "humour", "helpfullness"])
def test_a_misspelt_key_of_the_schema_is_not_taken_for_an_unknown_one(key):
    with pytest.raises(InputError, match="is not known, but '.*' is; correct one of them"):
        NEMO12_LANG.foreign(Attributes.parse(f"verbosity:1,{key}:0"))
    with pytest.raises(InputError, match="is not known, but"):
        NEMO12_LANG.known(Attributes.parse(f"{key}:0"))


def test_no_attribute_of_a_preset_is_taken_for_one_of_another():
    every = {key: 0 for schema in PRESETS.values() for key in schema.names}
    for schema in PRESETS.values():
        assert set(schema.foreign(Attributes(tuple(every.items())))) == every.keys() - set(schema.names)


def test_the_default_schema_has_the_twelve_attributes_of_the_reference_and_lang_last():
    assert NEMO12_LANG.keys() == (
        *("quality", "toxicity", "humor", "creativity", "violence", "helpfulness", "not_appropriate", "hate_speech"),
        *("sexual_content", "fails_task", "political_content", "moral_judgement", "lang"),
    )
    assert NEMO12_LANG.legal_values("quality") == ("0", "1", "2", "3", "4")
    assert NEMO12_LANG.legal_values("lang") == LANGUAGES
    assert len(LANGUAGES) == 35


def test_the_languages_can_be_left_out_and_the_nine_put_together():
    assert (*schema_named("nemo12").keys(), "lang") == NEMO12_LANG.keys()
    assert schema_named("combined9").keys() == (*schema_named("oasst4").keys(), *HELPSTEER5.keys())


def test_helpsteer_and_paper_schemas_have_their_own_attributes_and_ranges():
    assert HELPSTEER5.keys() == ("helpfulness", "correctness", "coherence", "complexity", "verbosity")
    assert PAPER7.legal_values("humor") == tuple("0123456789")


def test_an_unknown_attribute_is_refused_with_the_nearest_name():
    with pytest.raises(InputError, match="did you mean 'toxicity'"):
        NEMO12_LANG.legal_values("toxcity")
    with pytest.raises(InputError, match="unknown attribute 'lang'"):
        HELPSTEER5.legal_values("lang")


@pytest.mark.parametrize("line", ["quality:5", "lang:xx"])
def test_a_value_out_of_range_is_refused(line):
    with pytest.raises(InputError, match=line.split(":")[0]):
        NEMO12_LANG.check(Attributes.parse(line))


def test_values_given_in_any_order_are_put_in_the_order_of_training():
    assert NEMO12_LANG.order({"lang": "de", "humor": 1, "quality": 4}).line == "quality:4,humor:1,lang:de"


def test_a_full_line_has_the_given_values_and_a_default_for_every_other_attribute():
    assert HELPSTEER5.complete({"verbosity": 1}).line == (
        "helpfulness:4,correctness:4,coherence:4,complexity:4,verbosity:1"
    )
    assert NEMO12_LANG.complete({"toxicity": 2}).line == (
        "quality:4,toxicity:2,humor:0,creativity:0,violence:0,helpfulness:4,not_appropriate:0,hate_speech:0,"
        "sexual_content:0,fails_task:0,political_content:0,moral_judgement:0,lang:en"
    )


@pytest.mark.parametrize("name", PRESETS)
def test_a_schema_survives_its_dictionary_form(name):
    assert AttributeSchema.from_dict(schema_named(name).to_dict()) == schema_named(name)


@pytest.mark.parametrize(
    "data",
    [{"name": "x"}, {"name": "x", "attributes": [{"nam": "q"}], "languages": []}, {"name": "x", "attributes": 3}],
)
def test_a_mapping_that_is_no_schema_is_refused(data):
    with pytest.raises(FormatMismatchError, match="not an attribute schema"):
        AttributeSchema.from_dict(data)


def test_an_unknown_preset_is_refused_with_the_known_ones():
    with pytest.raises(InputError, match=r"nemo12\+lang, nemo12, helpsteer5, combined9, paper7"):
        schema_named("nemo13")


def test_a_schema_comes_from_a_preset_or_a_yaml_file(tmp_path):
    own = tmp_path / "schema.yaml"
    own.write_text("name: own\nattributes: [{name: quality, minimum: 1, maximum: 9}]\nlanguages: [en]\n")
    assert load_schema("nemo12+lang") == NEMO12_LANG
    assert load_schema(str(own)).keys() == ("quality", "lang")
    assert load_schema(str(own)).legal_values("quality") == tuple("123456789")
    assert load_schema(str(own)).complete({}).line == "quality:1,lang:en"


@pytest.mark.parametrize(
    ("text", "error", "reason"),
    [
        ("a: [", InputError, "not YAML"),
        ("- 1", InputError, "name, attributes and languages"),
        ("name: x", FormatMismatchError, "'attributes'"),
        ("{name: x, attributes: [quality], languages: []}", FormatMismatchError, "not an attribute schema"),
        ("{name: x, attributes: [], languages: []}", FormatMismatchError, "no attributes"),
        ("{name: x, attributes: [{name: q, minimum: 5}], languages: []}", FormatMismatchError, "runs from 5 to 4"),
        ("{name: x, attributes: [{name: q, maximum: high}], languages: []}", FormatMismatchError, "whole numbers"),
        ("{name: x, attributes: [{name: q, default: 9}], languages: []}", FormatMismatchError, "default 9"),
        ("{name: x, attributes: [{name: q, minimum: -1}], languages: []}", FormatMismatchError, "'-1'"),
        ("{name: x, attributes: [{name: q, maximum: 10000}], languages: []}", FormatMismatchError, "1,000 values"),
        ("{name: x, attributes: [{name: q}, {name: q}], languages: []}", FormatMismatchError, "'q:0'"),
        ("{name: x, attributes: [{name: 'a,b'}], languages: []}", FormatMismatchError, "'a'"),
        ("{name: x, attributes: [{name: yes}], languages: []}", FormatMismatchError, "name True"),
        ("{name: x, attributes: [{name: lang}], languages: []}", FormatMismatchError, "under 'languages'"),
        ("{name: x, attributes: [{name: q}], languages: ['e,n']}", FormatMismatchError, "'n'"),
    ],
)
def test_a_schema_file_that_is_none_is_refused(tmp_path, text, error, reason):
    bad = tmp_path / "bad.yaml"
    bad.write_text(text)
    with pytest.raises(error, match=reason):
        load_schema(str(bad))


def test_a_schema_file_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"none\.yaml: No such file"):
        load_schema(str(tmp_path / "none.yaml"))


def test_a_range_includes_both_ends():
    assert list(Attribute("quality", 1, 3).values()) == [1, 2, 3]
