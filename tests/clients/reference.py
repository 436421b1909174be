"""What transformers computes from the folder of a served model: greedy text, and log-probabilities."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from steerlm_nemo.checkpoint.llama_config import read_hf_config


class Reference:
    def __init__(self, folder: Path) -> None:
        # with the parameters as they are: transformers 4 passes over those that 5 spells otherwise
        config = LlamaConfig.from_dict(read_hf_config(folder).for_transformers_4())
        self.model = LlamaForCausalLM.from_pretrained(folder, config=config).float().eval()
        # by what is in it, as a folder of transformers 5 names a class that 4 does not have
        self.tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)

    def chat_ids(self, messages: list[dict[str, Any]]) -> list[int]:
        prompt = self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        return self.ids(prompt)

    def ids(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]  # type: ignore[no-any-return]

    def greedy(self, prompt_ids: list[int], num_tokens: int) -> list[int]:
        """What follows the prompt, the end included."""
        ids = torch.tensor([prompt_ids])
        settings = {"max_new_tokens": num_tokens, "do_sample": False, "pad_token_id": 0}
        made = self.model.generate(ids, attention_mask=torch.ones_like(ids), **settings)
        return made[0, len(prompt_ids) :].tolist()  # type: ignore[no-any-return]

    def text(self, token_ids: list[int]) -> str:
        return self.tokenizer.decode(token_ids, skip_special_tokens=True)  # type: ignore[no-any-return]

    def chat(self, messages: list[dict[str, Any]], num_tokens: int = 40) -> str:
        return self.text(self.greedy(self.chat_ids(messages), num_tokens))

    def logprobs(self, token_ids: list[int]) -> list[float]:
        """Of every token but the first, given those before it."""
        with torch.no_grad():
            rows = self.model(torch.tensor([token_ids])).logits[0].log_softmax(-1)
        return [float(rows[place, token]) for place, token in enumerate(token_ids[1:])]


@functools.cache
def of(folder: Path) -> Reference:
    return Reference(folder)
