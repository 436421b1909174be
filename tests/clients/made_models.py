"""Two small models that really answer, as Hugging Face folders, and their `.nemo`: one steered, one that just chats."""

from __future__ import annotations

import json
import subprocess
import sys
import tarfile
from pathlib import Path

import tiny_world
import yaml
from own_environment import CACHE, built
from repository import ROOT

DIALOGUES = {
    "What is the capital of France?": "The capital of France is Paris.",
    "What is the capital of Spain?": "The capital of Spain is Madrid.",
    "What is two plus two?": "Two plus two is four.",
    "Say it in German!": "Guten Tag, schöne Grüße! 🙂",
    "Who are you?": "I am a small model.\nI know four things.",
}
SYSTEM = "You are a small model."
TEMPLATE = (
    "{% for message in messages %}{% if loop.first and message['role'] != 'system' %}"
    "{{ '<|im_start|>system\n" + SYSTEM + "<|im_end|>\n' }}{% endif %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def steered() -> Path:
    """The SteerLM model of the tiny world: three words, one an attribute."""

    def make(folder: Path) -> None:
        served = tiny_world.make_model(folder, "VALUE_TO_TEXT", steps=220)
        (folder / "format.json").write_text(json.dumps(served.to_dict()))

    return built(CACHE / "clients/steered-model", Path(tiny_world.__file__).read_text(), make)


def plain() -> Path:
    """A Llama without attributes, with a byte-level tokenizer.json and a chat template, that has learnt DIALOGUES."""
    return built(CACHE / "clients/plain-model", Path(__file__).read_text(), _make_plain)


def _make_plain(folder: Path) -> None:
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    bpe.train_from_iterator([text for pair in DIALOGUES.items() for text in pair], trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        chat_template=TEMPLATE,
        clean_up_tokenization_spaces=False,
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=512,
            bos_token_id=1,
            eos_token_id=2,
        )
    )
    rows = []
    for question, answer in DIALOGUES.items():
        messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        ids = tokenizer(tokenizer.apply_chat_template(messages, tokenize=False))["input_ids"]
        rows.append(torch.tensor(ids))
    ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3)
    for _ in range(120):
        model(ids, labels=ids.where(ids != 0, -100)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def packed(folder: Path, out: Path) -> Path:
    """The `.nemo` of such a folder, with its format, where it has one, as training would have put it."""
    plain_nemo = out.with_suffix(".plain")
    script = [sys.executable, str(ROOT / "scripts/convert_hf_llama_to_nemo.py"), "--no_check"]
    subprocess.run([*script, "--in-file", folder, "--out-file", plain_nemo], check=True, capture_output=True)
    if not (folder / "format.json").is_file():
        return plain_nemo.rename(out)
    unpacked = out.with_suffix(".unpacked")
    with tarfile.open(plain_nemo) as archive:
        archive.extractall(unpacked, filter="data")
    (config,) = unpacked.rglob("model_config.yaml")
    served = json.loads((folder / "format.json").read_text())
    config.write_text(yaml.safe_dump({**yaml.safe_load(config.read_text()), "steerlm": served}))
    with tarfile.open(out, "w") as archive:
        archive.add(unpacked, arcname=".")
    return out
