"""What people write with `langchain-openai`."""

from langchain_core.messages import AIMessage, HumanMessage, SystemMessage
from langchain_core.output_parsers import StrOutputParser
from langchain_core.prompts import ChatPromptTemplate
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI, OpenAI


def connect(url, model):
    global WHERE
    WHERE = {"base_url": f"{url}/v1", "model": model, "api_key": "none", "max_retries": 0}


def _model(settings):
    return ChatOpenAI(**WHERE, temperature=0, **settings)


def invoke(question, **settings):
    answer = _model(settings).invoke(question)
    return {"text": answer.content, "usage": answer.usage_metadata, "about": answer.response_metadata}


def stream(question, **settings):
    pieces = list(_model(settings).stream(question))
    whole = pieces[0]
    for piece in pieces[1:]:
        whole = whole + piece
    return {"text": whole.content, "usage": whole.usage_metadata, "num_pieces": sum(bool(p.content) for p in pieces)}


def batch(questions, **settings):
    return [answer.content for answer in _model(settings).batch(questions)]


def chain(system, question, **settings):
    prompt = ChatPromptTemplate.from_messages([("system", "{system}"), ("human", "{question}")])
    return (prompt | _model(settings) | StrOutputParser()).invoke({"system": system, "question": question})


def history(turns, **settings):
    kinds = {"system": SystemMessage, "user": HumanMessage, "assistant": AIMessage}
    return _model(settings).invoke([kinds[role](text) for role, text in turns]).content


def complete(prompt, **settings):
    return OpenAI(**WHERE, temperature=0, **settings).invoke(prompt)


def call_tools(question, **settings):
    @tool
    def weather(city: str) -> str:
        """The weather of a city."""
        return "sunny"

    return _model(settings).bind_tools([weather]).invoke(question).content
