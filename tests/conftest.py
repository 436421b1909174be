"""What several test folders need: genuine data where it is present, and a tokenizer made on the spot."""

from __future__ import annotations

import io
import json
import os
import signal
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import hypothesis
import pytest

from steerlm_nemo.tokenizer import SentencePieceTokenizer

SHARED_DATA = Path(__file__).resolve().parents[2] / "shared" / "data"

# Before anything imports torch. The models of the tests gain nothing from a second thread; on a busy machine two
# threads wait for each other in every operation, spinning, and a fixture of seconds takes minutes.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# A busy machine is no reason to fail: how long drawing an example takes is not what the tests are about.
hypothesis.settings.register_profile(
    "repository", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow]
)
hypothesis.settings.load_profile("repository")

# Shells start background jobs with SIGINT ignored, and children inherit that; tests that interrupt a child need it.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

SENTENCES = (
    "A chat between a curious user and an artificial intelligence assistant.",
    "The assistant gives helpful, detailed, and polite answers to the user's questions.",
    "System User Assistant quality:4,toxicity:0,humor:2,creativity:1,helpfulness:3,lang:en",
    "What is the capital of France? The capital of France is Paris, a city on the Seine.",
    "Two plus two is four, and four plus four is eight. Thank you! You are welcome.",
)


def pytest_report_header() -> str:
    """Says once what a whole run stands on."""
    if SHARED_DATA.is_dir():
        return f"genuine data: {SHARED_DATA}"
    return f"genuine data: none at {SHARED_DATA}; samples made here, of the same shape, stand in"


@pytest.fixture(scope="session")
def genuine_data() -> Path:
    """The folder of genuine data; tests of what only it can show are skipped without it."""
    if not SHARED_DATA.is_dir():
        pytest.skip(f"no genuine data at {SHARED_DATA}")
    return SHARED_DATA


@pytest.fixture(scope="session")
def made_data(train_sentencepiece: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder like that of genuine data, made here."""
    import genuine_shaped

    folder = tmp_path_factory.mktemp("made")
    genuine_shaped.write_samples(folder)
    (folder / "tokenizers").mkdir()
    train_sentencepiece(folder / "tokenizers" / "llama2-tokenizer.model")
    return folder


@pytest.fixture(scope="session", params=["genuine", "made"])
def shared_data(request: pytest.FixtureRequest) -> Path:
    """Genuine data, and what is made in its shape: a test that takes this holds for both."""
    return request.getfixturevalue(f"{request.param}_data")


@pytest.fixture(scope="session")
def llama2_model(shared_data: Path) -> Path:
    """Llama 2's tokenizer, or a small one of its kind."""
    return shared_data / "tokenizers" / "llama2-tokenizer.model"


@pytest.fixture(scope="session")
def train_sentencepiece() -> Callable[..., Path]:
    """Trains a SentencePiece model of Llama 2's kind, but for the options given, and writes it to a path."""
    import sentencepiece

    def train(path: Path, sentences: Sequence[str] = SENTENCES, **options: Any) -> Path:
        model = io.BytesIO()
        settings = {
            "model_type": "bpe",
            "vocab_size": 400,
            "byte_fallback": True,
            "normalization_rule_name": "identity",
            "remove_extra_whitespaces": False,
            "hard_vocab_limit": False,
            "minloglevel": 2,
            **options,
        }
        sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter(sentences), model_writer=model, **settings)
        path.write_bytes(model.getvalue())
        return path

    return train


@pytest.fixture(scope="session")
def small_model(train_sentencepiece: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A SentencePiece model of Llama 2's kind (BPE, byte fallback, dummy space, no normalisation), 400 pieces."""
    return train_sentencepiece(tmp_path_factory.mktemp("tokenizer") / "tokenizer.model")


@pytest.fixture(scope="session")
def small_tokenizer(small_model: Path) -> SentencePieceTokenizer:
    return SentencePieceTokenizer(small_model)


# --- what tests of clients, engine and server share; imported where it is used, as it brings torch ----------------


@pytest.fixture(scope="session")
def genuine_checkpoint(train_sentencepiece: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small Llama with logits and greedy text found by another program: a genuine one, or where there is none, one
    of the same sizes that is made here."""
    if SHARED_DATA.is_dir():
        return SHARED_DATA / "tiny-llama-checkpoint"
    import genuine_shaped
    import made_llama

    folder = tmp_path_factory.mktemp("checkpoint") / "tiny-llama-checkpoint"
    sentences = genuine_shaped.sentences(500)
    tokenizer = train_sentencepiece(folder.parent / "tokenizer.model", sentences, vocab_size=512)
    made_llama.write_made_llama(folder, tokenizer)
    return folder


@pytest.fixture(scope="session")
def value_engine() -> Any:
    import live

    return live.engine("TEXT_TO_VALUE")


@pytest.fixture(scope="session")
def value_port(value_engine: Any) -> Iterator[int]:
    import live

    with live.run_engine(value_engine) as port:
        yield port


@pytest.fixture
def chat_file(tmp_path: Path) -> Callable[..., Any]:
    """A maker of chat files; returns the path and the records."""
    import tiny_world

    def make(count: int, record_type: str = "VALUE_TO_TEXT", seed: int = 77) -> Any:
        records = [tiny_world.record(c) for c in tiny_world.conversations(count, record_type, seed)]
        path = tmp_path / "in.jsonl"
        path.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records))
        return path, records

    return make


@pytest.fixture
def fast_retries(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("steerlm_nemo.client.pool.FIRST_PAUSE_S", 0.05)
    monkeypatch.setattr("steerlm_nemo.client.pool.LONGEST_PAUSE_S", 0.2)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with slow tests first: or one process would run the last of them while the other has nothing to do."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)
