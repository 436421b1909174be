"""Chat templates in the shapes that instruct models have, a tokenizer with their special tokens, and conversations."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

SPECIAL = (
    *("<|endoftext|>", "<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|begin_of_text|>", "<|start_header_id|>"),
    *("<|end_header_id|>", "<|eot_id|>", "<|user|>", "<|assistant|>", "<|system|>", "[INST]", "[/INST]"),
)
NOT_SPECIAL = ("<think>", "</think>", "<tool_call>", "</tool_call>")  # added, but shown when decoded
_DIALOGUE = (
    "Tell me about the river, please. The river is long: it runs from the hills to the sea.",
    "def add(a, b):\n    return a + b\n\nWhat does it do? It adds 12 and 30, which makes 42.",
    "Wie geht es dir? Gut, danke! 你好,很高兴。 Zoë's café — naïve, isn't it?",
)

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' }}"
    "{{ '\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# A system prompt of its own where none is given.
SMOLLM2 = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou answer briefly.<|im_end|>\n' }}{% endif %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# Tools, and turns of tools that follow one another as one.
QWEN25 = """\
{%- if messages[0].role == 'system' %}
    {{- '<|im_start|>system\n' + messages[0].content + '<|im_end|>\n' }}
{%- else %}
    {{- '<|im_start|>system\nYou are helpful.<|im_end|>\n' }}
{%- endif %}
{%- for message in messages %}
    {%- if message.role == 'user' or (message.role == 'system' and not loop.first) %}
        {{- '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}
    {%- elif message.role == 'assistant' %}
        {{- '<|im_start|>assistant\n' + message.content }}
        {%- for call in message.tool_calls %}
            {%- set call = call.function if call.function is defined else call %}
            {{- '\n<tool_call>\n{"name": "' + call.name + '", "arguments": ' + (call.arguments | tojson) + '}' }}
            {{- '\n</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>\n' }}
    {%- elif message.role == 'tool' %}
        {%- if loop.first or messages[loop.index0 - 1].role != 'tool' %}{{- '<|im_start|>user' }}{%- endif %}
        {{- '\n<tool_response>\n' + message.content + '\n</tool_response>' }}
        {%- if loop.last or messages[loop.index0 + 1].role != 'tool' %}{{- '<|im_end|>\n' }}{%- endif %}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}
"""
# The reasoning of earlier responses is left out; a variable of the client's, and marks for training.
QWEN3 = """\
{%- set ns = namespace(last_query=messages | length - 1, searching=true) %}
{%- for message in messages[::-1] %}
    {%- if ns.searching and message.role == 'user' %}
        {%- set ns.searching = false %}
        {%- set ns.last_query = messages | length - 1 - loop.index0 %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- if message.role == 'assistant' %}
        {%- set content = message.content %}
        {%- if '</think>' in content and loop.index0 < ns.last_query %}
            {%- set content = content.split('</think>')[-1].lstrip('\n') %}
        {%- endif %}
        {{- '<|im_start|>assistant\n' }}{% generation %}{{- content + '<|im_end|>' }}{% endgeneration %}{{- '\n' }}
    {%- else %}
        {{- '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}{{- '<think>\n\n</think>\n\n' }}{%- endif %}
{%- endif %}
"""
# The system prompt inside the first user's turn; turns must alternate.
LLAMA2 = (
    "{% if messages[0]['role'] == 'system' %}{% set told = messages[1:] %}{% set system = messages[0]['content'] %}"
    "{% else %}{% set told = messages %}{% set system = false %}{% endif %}{% for message in told %}"
    "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
    "{% if loop.index0 == 0 and system != false %}{% set content = '<<SYS>>\n' + system + '\n<</SYS>>\n\n' + "
    "message['content'] %}{% else %}{% set content = message['content'] %}{% endif %}"
    "{% if message['role'] == 'user' %}{{ bos_token + '[INST] ' + content.strip() + ' [/INST]' }}"
    "{% elif message['role'] == 'assistant' %}{{ ' ' + content.strip() + ' ' + eos_token }}{% endif %}{% endfor %}"
)
# Headers, trimmed content and a date.
LLAMA31 = """\
{{- bos_token }}
{%- if date_string is not defined %}{%- set date_string = strftime_now('%Y') %}{%- endif %}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content'] | trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system_message = '' %}
{%- endif %}
{{- '<|start_header_id|>system<|end_header_id|>\n\nToday is in ' + date_string + '\n\n' + system_message }}
{{- '<|eot_id|>' }}
{%- for message in messages %}
    {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' + message['content'] | trim + '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{%- endif %}
"""
# No place for a system prompt, and it says nothing about it.
MISTRAL = (
    "{{ bos_token }}{% for message in messages if message['role'] != 'system' %}"
    "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('After the optional system message, roles must alternate user and assistant!') }}{% endif %}"
    "{% if message['role'] == 'user' %}{{ '[INST] ' + message['content'] + ' [/INST]' }}"
    "{% elif message['role'] == 'assistant' %}{{ message['content'] + eos_token + ' ' }}{% endif %}{% endfor %}"
)
ZEPHYR = """\
{% for message in messages %}
{% if message['role'] == 'user' %}
{{ '<|user|>\n' + message['content'] + eos_token }}
{% elif message['role'] == 'system' %}
{{ '<|system|>\n' + message['content'] + eos_token }}
{% elif message['role'] == 'assistant' %}
{{ '<|assistant|>\n'  + message['content'] + eos_token }}
{% endif %}
{% if loop.last and add_generation_prompt %}
{{ '<|assistant|>' }}
{% endif %}
{% endfor %}
"""
SHAPES = {
    "chatml": CHATML,
    "smollm2": SMOLLM2,
    "qwen2.5": QWEN25,
    "qwen3": QWEN3,
    "llama2": LLAMA2,
    "llama3.1": LLAMA31,
    "mistral": MISTRAL,
    "zephyr": ZEPHYR,
}
# What ends a text of such models, and what ends a turn, where that is something else.
ENDS = {"llama2": "</s>", "mistral": "</s>", "zephyr": "</s>", "llama3.1": "<|eot_id|>"}


def save_tokenizer(folder: Path, shape: str, **settings: Any) -> PreTrainedTokenizerFast:
    """A byte-level tokenizer with a template of this shape, saved to the folder as transformers saves one."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=list(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_DIALOGUE, trainer)
    bos = {"llama3.1": "<|begin_of_text|>"}.get(shape, "<s>")
    named = {"bos_token": bos, "eos_token": ENDS.get(shape, "<|im_end|>"), "pad_token": "<|endoftext|>"}
    made = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **{**named, **settings})
    made.add_tokens(list(NOT_SPECIAL))
    made.chat_template = SHAPES[shape]
    made.save_pretrained(folder)
    return made


def conversation(chance: random.Random) -> list[dict[str, str]]:
    """System prompt or none, one to five turns, sometimes one too many, with odd blanks, characters and thoughts."""
    messages = [{"role": "system", "content": text(chance)}] if chance.random() < 0.4 else []
    for turn in range(chance.randint(1, 5)):
        role = ("user", "assistant")[turn % 2]
        if chance.random() < 0.03:
            role = chance.choice(("user", "assistant", "system"))
        thought = f"<think>\n{text(chance)}\n</think>\n\n" if role == "assistant" and chance.random() < 0.2 else ""
        messages.append({"role": role, "content": thought + text(chance)})
    return messages


def text(chance: random.Random) -> str:
    words = " ".join(_DIALOGUE).split(" ")
    said = " ".join(chance.choice(words) for _ in range(chance.randint(1, 8)))
    return chance.choice(("", "", " ", "\n", "\t")) + said + chance.choice(("", "", " ", "\n\n", "{{ x }}", "{% if %}"))
