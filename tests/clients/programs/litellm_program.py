"""What people write with `litellm`; what NeMo-Skills sends goes through it, too."""

import asyncio

import litellm

litellm.suppress_debug_info = True


def connect(url, model):
    global WHERE
    WHERE = {"model": f"openai/{model}", "api_base": f"{url}/v1", "api_key": "EMPTY", "max_retries": 0}


def chat(**settings):
    return litellm.completion(**WHERE, **settings).model_dump()


def streamed_chat(**settings):
    chunks = list(litellm.completion(**WHERE, stream=True, stream_options={"include_usage": True}, **settings))
    whole = litellm.stream_chunk_builder(chunks)
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    return {"text": text, "whole": whole.choices[0].message.content, "usage": whole.usage.model_dump()}


def chat_async(**settings):
    return asyncio.run(litellm.acompletion(**WHERE, **settings)).model_dump()


def complete(**settings):
    return litellm.text_completion(**WHERE, **settings).model_dump()


def complete_async(**settings):
    return asyncio.run(litellm.atext_completion(**WHERE, **settings)).model_dump()
