"""What people write with the `openai` package; the same for versions 1, 2 and 3."""

import asyncio

import openai
from pydantic import BaseModel


def connect(url, model):
    global BASE, MODEL, client
    BASE, MODEL = f"{url}/v1", model
    client = openai.OpenAI(base_url=BASE, api_key="none", max_retries=0)


def version():
    return openai.__version__


def models():
    return [model.id for model in client.models.list()], client.models.retrieve(MODEL).id


def chat(**settings):
    return client.chat.completions.create(model=MODEL, **settings).model_dump()


def streamed_chat(**settings):
    texts, ends, usage = {}, {}, None
    for chunk in client.chat.completions.create(model=MODEL, stream=True, **settings):
        usage = chunk.usage or usage
        for choice in chunk.choices:
            texts[choice.index] = texts.get(choice.index, "") + (choice.delta.content or "")
            ends[choice.index] = choice.finish_reason or ends.get(choice.index)
    return {"texts": texts, "ends": ends, "usage": usage.model_dump() if usage else None}


def chats_at_once(questions, **settings):
    async def ask():
        async with openai.AsyncOpenAI(base_url=BASE, api_key="none", max_retries=0) as many:
            return await asyncio.gather(
                *(
                    many.chat.completions.create(
                        model=MODEL, messages=[{"role": "user", "content": question}], **settings
                    )
                    for question in questions
                )
            )

    return [answer.choices[0].message.content for answer in asyncio.run(ask())]


def chat_by_the_helper_for_streams(**settings):
    """`.stream(...)`, which puts the answer together itself."""
    home = client.chat.completions if hasattr(client.chat.completions, "stream") else client.beta.chat.completions
    with home.stream(model=MODEL, **settings) as stream:
        text = "".join(event.delta for event in stream if event.type == "content.delta")
        whole = stream.get_final_completion()
    return {"pieces": text, "whole": whole.choices[0].message.content}


def history(questions, **settings):
    """A conversation as people keep it: the answer itself is appended."""
    messages, answers = [], []
    for question in questions:
        messages.append({"role": "user", "content": question})
        answer = client.chat.completions.create(model=MODEL, messages=messages, **settings).choices[0].message
        messages.append(answer)
        answers.append(answer.content)
    return answers


def complete(**settings):
    return client.completions.create(model=MODEL, **settings).model_dump()


def streamed_completion(**settings):
    chunks = [chunk for chunk in client.completions.create(model=MODEL, stream=True, **settings) if chunk.choices]
    return {
        "text": "".join(chunk.choices[0].text for chunk in chunks),
        "end": chunks[-1].choices[0].finish_reason,
    }


def ask_for_an_object(**settings):
    class City(BaseModel):
        name: str

    home = client.chat.completions if hasattr(client.chat.completions, "parse") else client.beta.chat.completions
    return home.parse(model=MODEL, response_format=City, **settings).model_dump()


def ask_another_model(**settings):
    return client.chat.completions.create(model="gpt-4o", **settings).model_dump()
