import json
import pickle
from functools import cache

import pytest
import sentencepiece
from hypothesis import given
from hypothesis import strategies as st

from steerlm_nemo.errors import InputError
from steerlm_nemo.records import read_records
from steerlm_nemo.tokenizer import HuggingFaceTokenizer, SentencePieceTokenizer, _WordByWord

TEXT = st.text(st.characters(blacklist_categories=("Cs",), blacklist_characters="\u2581"))

llama2_tokenizer = cache(SentencePieceTokenizer)


@cache
def plain_processors(path):
    start, continuation = (sentencepiece.SentencePieceProcessor(model_file=str(path)) for _ in range(2))
    continuation.override_normalizer_spec(add_dummy_prefix=False)
    return start, continuation


def test_only_the_start_of_a_text_gets_the_dummy_space(small_tokenizer):
    start = [small_tokenizer.id_to_piece(i) for i in small_tokenizer.encode("User")]
    continuation = [small_tokenizer.id_to_piece(i) for i in small_tokenizer.encode_continuation("User")]
    assert "".join(start) == "▁User"
    assert "".join(continuation) == "User"


def test_control_bytes_are_one_token_each_as_in_llama_2(llama2_model):
    tokenizer = SentencePieceTokenizer(llama2_model)
    assert tokenizer.encode_continuation("\x00\x11\x12\n") == [3, 20, 21, 13]
    assert (tokenizer.bos_id, tokenizer.eos_id) == (1, 2)


def test_llama_2_has_32000_pieces(genuine_data):
    assert SentencePieceTokenizer(genuine_data / "tokenizers" / "llama2-tokenizer.model").vocab_size == 32000


@given(TEXT)
def test_decoding_gives_the_text_back(small_model, text):
    tokenizer = SentencePieceTokenizer(small_model)
    assert tokenizer.decode(tokenizer.encode(text)) == text


@given(TEXT)
def test_neither_bos_nor_eos_is_added(small_model, text):
    tokenizer = SentencePieceTokenizer(small_model)
    for ids in (tokenizer.encode(text), tokenizer.encode_continuation(text)):
        assert not {tokenizer.bos_id, tokenizer.eos_id} & {*ids}


# Where two spaces, a literal ▁ or a line end meet a word is where putting a text together from words could go wrong.
KNOTTY = st.lists(st.sampled_from([" ", "  ", "\n", "\n\n", "\u2581", "a", "the", "é", "日本", "🙂", "\x12", "\t"]))


@given(st.text(st.characters(blacklist_categories=("Cs",))) | KNOTTY.map("".join))
def test_ids_are_those_sentencepiece_gives_the_whole_text(llama2_model, text):
    tokenizer = llama2_tokenizer(llama2_model)
    assert isinstance(tokenizer._encode_continuation, _WordByWord)
    start, continuation = plain_processors(llama2_model)
    assert tokenizer.encode(text) == start.encode(text)
    assert tokenizer.encode_continuation(text) == continuation.encode(text)


def test_ids_of_genuine_texts_are_those_sentencepiece_gives(llama2_model, shared_data):
    start, continuation = plain_processors(llama2_model)
    tokenizer = llama2_tokenizer(llama2_model)
    trees = [record["prompt"] for _, record in read_records(shared_data / "oasst2-animals-trees" / "trees.jsonl.gz")]
    texts = [text for tree in trees for text in texts_of(tree)]
    assert len(texts) > 600
    for text in texts:
        assert tokenizer.encode(text) == start.encode(text)
        assert tokenizer.encode_continuation(text) == continuation.encode(text)


def texts_of(message):
    yield message["text"]
    for reply in message["replies"]:
        yield from texts_of(reply)


@pytest.mark.parametrize(
    ("why", "options"),
    [
        ("weighs a text as a whole", {"model_type": "unigram"}),
        ("normalises", {"normalization_rule_name": "nmt_nfkc"}),
        ("drops spaces", {"remove_extra_whitespaces": True}),
        ("joins unknown characters", {"byte_fallback": False}),
        ("has pieces of several words", {"user_defined_symbols": ["of France"]}),
    ],
)
def test_a_model_whose_words_do_not_stand_alone_is_asked_for_whole_texts(tmp_path, train_sentencepiece, why, options):
    path = train_sentencepiece(tmp_path / "tokenizer.model", **options)
    tokenizer = SentencePieceTokenizer(path)
    assert not isinstance(tokenizer._encode_continuation, _WordByWord), why
    text = "What is the  capital of France? ☃☃"
    assert tokenizer.encode(text) == sentencepiece.SentencePieceProcessor(model_file=str(path)).encode(text)


def test_the_memory_for_words_is_bounded(small_model, monkeypatch):
    monkeypatch.setattr(_WordByWord, "MOST_WORDS", 100)
    tokenizer = SentencePieceTokenizer(small_model)
    for number in range(1000):
        tokenizer.encode(f"{number} {'x' * number}")
    words = tokenizer._encode_continuation._known
    assert 0 < len(words) <= 100
    assert max(map(len, words)) <= _WordByWord.LONGEST_WORD


def test_a_tokenizer_that_is_sent_to_another_process_is_the_same(small_model):
    tokenizer = SentencePieceTokenizer(small_model)
    sent = pickle.loads(pickle.dumps(tokenizer))
    assert sent.encode_continuation("Paris") == tokenizer.encode_continuation("Paris") != tokenizer.encode("Paris")


def test_padding_and_end_of_text_decode_to_nothing(small_tokenizer):
    ids = small_tokenizer.encode("User")
    padded = [*ids, small_tokenizer.eos_id, small_tokenizer.vocab_size]
    assert small_tokenizer.decode(padded) == "User"
    assert small_tokenizer.id_to_piece(small_tokenizer.vocab_size) == f"<padding {small_tokenizer.vocab_size}>"


def test_a_model_that_cannot_be_loaded_is_refused(tmp_path):
    with pytest.raises(InputError, match="no such file"):
        SentencePieceTokenizer(tmp_path / "none.model")
    (tmp_path / "bad.model").write_text("no model")
    with pytest.raises(InputError, match="not a SentencePiece model"):
        SentencePieceTokenizer(tmp_path / "bad.model")


@pytest.fixture(scope="module")
def tokenizer_json(tmp_path_factory):
    tokenizers = pytest.importorskip("tokenizers")
    pytest.importorskip("transformers")
    model = tokenizers.Tokenizer(tokenizers.models.BPE())
    model.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, special_tokens=["<eos>"])
    model.train_from_iterator(["What is the capital of France?"], trainer)
    path = tmp_path_factory.mktemp("hf") / "tokenizer.json"
    model.save(str(path))
    return path


def test_a_hugging_face_tokenizer_keeps_extra_markers_as_one_token(tokenizer_json):
    plain = HuggingFaceTokenizer(tokenizer_json)
    extended = HuggingFaceTokenizer(tokenizer_json, ("<extra_id_1>",))
    assert len(plain.encode("<extra_id_1>")) > 1
    (marker,) = extended.encode("<extra_id_1>")
    assert extended.vocab_size == plain.vocab_size + 1
    assert extended.id_to_piece(marker) == "<extra_id_1>"
    assert extended.decode(extended.encode("capital<extra_id_1> é")) == "capital é"


def test_a_hugging_face_tokenizer_gives_the_ids_of_its_own_encode_whatever_its_file_says_of_length(tokenizer_json):
    from transformers import PreTrainedTokenizerFast

    spec = json.loads(tokenizer_json.read_text(encoding="utf-8"))
    spec["truncation"] = {"direction": "Right", "max_length": 3, "strategy": "LongestFirst", "stride": 0}
    path = tokenizer_json.with_name("limited.json")
    path.write_text(json.dumps(spec), encoding="utf-8")
    theirs, ours = PreTrainedTokenizerFast(tokenizer_file=str(path)), HuggingFaceTokenizer(path)
    for text in ("", "What is the capital?", "é日本🙂 <eos> \n\n x" * 50):
        assert ours.encode(text) == theirs.encode(text, add_special_tokens=False)


def test_a_folder_without_a_tokenizer_is_refused(tmp_path):
    pytest.importorskip("transformers")
    with pytest.raises(InputError, match="cannot load a Hugging Face tokenizer"):
        HuggingFaceTokenizer(tmp_path)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("tokenizer.json", '{"version": "1.0", "model": {"type": "BPE", "vocab": {'),
        ("tokenizer.json", '{"version": "9.0", "model": {"type": "Future"}}'),
        ("tokenizer_config.json", '["tokenizer_class"]'),
    ],
)
def test_whatever_the_library_raises_is_one_message(tmp_path, tokenizer_json, name, content):
    for source in tokenizer_json.parent.glob("*.json"):
        (tmp_path / source.name).write_bytes(source.read_bytes())
    (tmp_path / name).write_text(content)
    with pytest.raises(InputError, match="cannot load a Hugging Face tokenizer from here"):
        HuggingFaceTokenizer(tmp_path)


@pytest.mark.parametrize(
    "config",
    [
        {"tokenizer_class": "TokenizersBackend", "backend": "tokenizers", "eos_token": "<eos>"},
        {"tokenizer_class": "TokenizersBackend", "eos_token": {"content": "<eos>", "__type": "AddedToken"}},
        {"tokenizer_class": "PreTrainedTokenizerFast", "extra_special_tokens": ["<eos>"], "eos_token": "<eos>"},
        {"tokenizer_class": "OwnTokenizer", "auto_map": {"AutoTokenizer": ["own.Own", None]}, "eos_token": "<eos>"},
    ],
)
def test_a_tokenizer_whose_class_is_not_known_here_is_read_as_it_is(tmp_path, tokenizer_json, config, caplog):
    (tmp_path / "tokenizer.json").write_bytes(tokenizer_json.read_bytes())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer, plain = HuggingFaceTokenizer(tmp_path), HuggingFaceTokenizer(tokenizer_json)
    text = "What is the capital? <eos> é"
    assert tokenizer.encode(text) == plain.encode(text)
    assert [tokenizer.eos_id] == plain.encode("<eos>")
    assert f"{tmp_path}: tokenizer.json is read as it is" in caplog.text
    with pytest.raises(InputError, match="cannot load a Hugging Face tokenizer from here"):
        HuggingFaceTokenizer(tmp_path, as_named=True)
