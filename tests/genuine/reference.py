"""`reference.py MODEL QUESTIONS.json OUT`: what transformers, version 4 or 5, computes from a folder, in fp32.

OUT/logits.safetensors has `NAME.token_ids` [S] and `NAME.logits` [S, V]; OUT/answers.json, for each question, the text
of the chat template, its token ids, and the ids and the text that greedy generation adds to them, the end included.
"""

import json
import sys
from pathlib import Path

import torch
import transformers
from safetensors.torch import save_file

MAX_NEW_TOKENS = 48
TEXTS = {
    "prose": "The Seine rises near Dijon and flows through Paris, Rouen and Le Havre to the sea. It is 777 km long.",
    "code": "def fib(n):\n    return n if n < 2 else fib(n - 1) + fib(n - 2)\n\n\nprint([fib(n) for n in range(10)])\n",
    "foreign": "Ein Glück, dass der Fluß über die Ufer tritt! 東京は日本の首都です。 Ñandú, œuvre, \u200dемодзи 🙂🙃",
    "chat": "<|im_start|>user\nHello!<|im_end|>\n<|im_start|>assistant\nHi, how can I help?<|im_end|>\n",
}


def main() -> None:
    folder, questions, out = (Path(arg) for arg in sys.argv[1:])
    model = transformers.AutoModelForCausalLM.from_pretrained(folder).float().eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    out.mkdir(parents=True, exist_ok=True)
    tensors = {}
    chance = torch.Generator().manual_seed(0)
    sequences = {"any": torch.randint(0, model.config.vocab_size, (300,), generator=chance)}
    for name, text in TEXTS.items():
        sequences[name] = torch.tensor(tokenizer(text, add_special_tokens=False)["input_ids"])
    with torch.no_grad():
        for name, token_ids in sequences.items():
            tensors[f"{name}.token_ids"] = token_ids
            tensors[f"{name}.logits"] = model(token_ids[None]).logits[0].contiguous()
    save_file(tensors, out / "logits.safetensors")

    answers = []
    for question in json.loads(questions.read_text()):
        messages = [{"role": "user", "content": question}]
        prompt = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        prompt_ids = tokenizer(prompt, add_special_tokens=False, return_tensors="pt")["input_ids"]
        settings = {"max_new_tokens": MAX_NEW_TOKENS, "do_sample": False}
        added = model.generate(prompt_ids, attention_mask=torch.ones_like(prompt_ids), **settings)[
            0, len(prompt_ids[0]) :
        ]
        text = tokenizer.decode(added, skip_special_tokens=True)
        ids = {"prompt_ids": prompt_ids[0].tolist(), "added_ids": added.tolist()}
        answers.append({"question": question, "prompt": prompt, **ids, "text": text})
    found = {
        "transformers": transformers.__version__,
        "tokenizer_class": type(tokenizer).__name__,
        "answers": answers,
    }
    (out / "answers.json").write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
