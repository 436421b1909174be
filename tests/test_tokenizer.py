import pytest
from hypothesis import given
from hypothesis import strategies as st

from steerlm_nemo.errors import InputError
from steerlm_nemo.tokenizer import HuggingFaceTokenizer, SentencePieceTokenizer

TEXT = st.text(st.characters(blacklist_categories=("Cs",), blacklist_characters="\u2581"))


def test_only_the_start_of_a_text_gets_the_dummy_space(small_tokenizer):
    start = [small_tokenizer.id_to_piece(i) for i in small_tokenizer.encode("User")]
    continuation = [small_tokenizer.id_to_piece(i) for i in small_tokenizer.encode_continuation("User")]
    assert "".join(start) == "▁User"
    assert "".join(continuation) == "User"


def test_control_bytes_are_one_token_each_as_in_llama_2(llama2_model):
    tokenizer = SentencePieceTokenizer(llama2_model)
    assert tokenizer.encode_continuation("\x00\x11\x12\n") == [3, 20, 21, 13]
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.vocab_size) == (1, 2, 32000)


@given(TEXT)
def test_decoding_gives_the_text_back(small_model, text):
    tokenizer = SentencePieceTokenizer(small_model)
    assert tokenizer.decode(tokenizer.encode(text)) == text


@given(TEXT)
def test_neither_bos_nor_eos_is_added(small_model, text):
    tokenizer = SentencePieceTokenizer(small_model)
    for ids in (tokenizer.encode(text), tokenizer.encode_continuation(text)):
        assert not {tokenizer.bos_id, tokenizer.eos_id} & {*ids}


def test_padding_and_end_of_text_decode_to_nothing(small_tokenizer):
    ids = small_tokenizer.encode("User")
    padded = [*ids, small_tokenizer.eos_id, small_tokenizer.vocab_size]
    assert small_tokenizer.decode(padded) == "User"
    assert small_tokenizer.id_to_piece(small_tokenizer.vocab_size) == f"<padding {small_tokenizer.vocab_size}>"


def test_a_model_that_cannot_be_loaded_is_refused(tmp_path):
    with pytest.raises(InputError, match="no such SentencePiece model"):
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


def test_a_folder_without_a_tokenizer_is_refused(tmp_path):
    pytest.importorskip("transformers")
    with pytest.raises(InputError, match="cannot load a Hugging Face tokenizer"):
        HuggingFaceTokenizer(tmp_path)
