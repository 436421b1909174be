import json

import live
import pytest
import tiny_world


@pytest.fixture(scope="session")
def value_engine():
    return live.engine("TEXT_TO_VALUE")


@pytest.fixture(scope="session")
def value_port(value_engine):
    with live.run_engine(value_engine) as port:
        yield port


@pytest.fixture
def chat_file(tmp_path):
    """A maker of chat files; returns the path and the records."""

    def make(count, record_type="VALUE_TO_TEXT", seed=77):
        records = [tiny_world.record(c) for c in tiny_world.conversations(count, record_type, seed)]
        path = tmp_path / "in.jsonl"
        path.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records))
        return path, records

    return make


@pytest.fixture
def fast_retries(monkeypatch):
    monkeypatch.setattr("steerlm_nemo.serving.client.FIRST_PAUSE_S", 0.05)
    monkeypatch.setattr("steerlm_nemo.serving.client.LONGEST_PAUSE_S", 0.2)
