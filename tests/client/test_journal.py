import pytest

from steerlm_nemo.client.journal import Journal
from steerlm_nemo.conversation import RecordRef
from steerlm_nemo.errors import InputError
from steerlm_nemo.records import RawLine

SETTINGS = {"mode": "line"}


def line(number, text):
    return RawLine(RecordRef("in.jsonl", number), text.encode(), {"text": text})


@pytest.fixture
def path(tmp_path):
    return tmp_path / "out.jsonl.progress.jsonl"


def fill(path, count):
    with Journal(path, SETTINGS) as journal:
        for number in range(1, count + 1):
            journal.add(line(number, "same text"), {"número": number}, {"by_line": 2})


def test_finished_records_are_found_again_by_line_and_content_not_by_text(path):
    fill(path, 3)
    with Journal(path, SETTINGS) as journal:
        assert len(journal) == 3
        record, counts = journal.get(line(2, "same text"))
        assert (record, counts["by_line"]) == ({"número": 2}, 2)
        assert not journal.has(line(2, "edited")) and journal.get(line(2, "edited")) is None
        assert not journal.has(line(4, "same text"))


@pytest.mark.parametrize("cut", [1, 2, 30])
def test_a_torn_last_line_costs_that_record_only(path, cut):
    fill(path, 3)
    path.write_bytes(path.read_bytes()[:-cut])
    with Journal(path, SETTINGS) as journal:
        assert [journal.has(line(n, "same text")) for n in (1, 2, 3)] == [True, True, False]
        journal.add(line(3, "same text"), {"número": 33}, {})
        assert journal.get(line(3, "same text"))[0] == {"número": 33}
        assert journal.get(line(1, "same text"))[0] == {"número": 1}
    with Journal(path, SETTINGS) as journal:
        assert len(journal) == 3


def test_other_settings_are_refused_with_both_values(path):
    fill(path, 1)
    with pytest.raises(InputError, match="mode was 'line', now 'slots'"):
        Journal(path, {"mode": "slots"})


def test_two_runs_cannot_write_one_output(path):
    with Journal(path, SETTINGS), pytest.raises(InputError, match="another run is writing"):
        Journal(path, SETTINGS)
