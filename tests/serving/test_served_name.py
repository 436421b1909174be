"""The name that a server's model has for its clients: as typed, and the same wherever it is told."""

from __future__ import annotations

from dataclasses import replace

import httpx
import live
import openai
import pytest

from steerlm_nemo.config import load_config
from steerlm_nemo.errors import ConfigError
from steerlm_nemo.serving.process import overrides_from

# Other than as quoted texts, Hydra reads these as a number, a switch, nothing, a list, or not at all.
NAMES = ("2024_01", "1e3", "true", "null", "[a]", "{a: b}", "org/model:v1", "a=b", "two words", "it's", "end\\", "\\'")


def name_of(*arguments):
    overrides = overrides_from(["gpt_model_file=x.nemo", *arguments, "port=1424"])
    cfg = load_config(overrides, "megatron_gpt_inference")
    assert (cfg.gpt_model_file, cfg.port) == ("x.nemo", 1424)
    return cfg.served_model_name


@pytest.mark.parametrize("name", NAMES)
def test_the_name_is_the_text_that_was_typed(name):
    for arguments in (["--served_model_name", name], [f"--served-model-name={name}"], [f"served_model_name={name}"]):
        expected = None if arguments == ["served_model_name=null"] else name
        assert name_of(*arguments) == expected
    assert name_of("served_model_name='quoted as other values are'") == "quoted as other values are"
    assert name_of() is None


@pytest.mark.parametrize(
    "arguments",
    [["--served_model_name"], ["--served_model_name="], ["--served-model-name", ""], ["served_model_name="]],
)
def test_a_flag_without_a_name_is_refused(arguments):
    with pytest.raises(ConfigError, match=r"served.model.name needs a name"):
        overrides_from(arguments)


def test_clients_find_the_name_in_lists_answers_streams_and_numbers_and_no_other_is_served():
    engine = live.engine("VALUE_TO_TEXT")
    name = "org/my model:2024_01"

    class Named:
        counters, add, cancel, step = engine.counters, engine.add, engine.cancel, engine.step
        info = replace(engine.info, name=name)

    messages = [{"role": "user", "content": "Speak!"}]
    with live.run_engine(Named()) as port:
        client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0)
        assert [model.id for model in client.models.list().data] == [name] == [client.models.retrieve(name).id]
        chat = client.chat.completions.create(model=name, messages=messages, max_tokens=2)
        text = client.completions.create(model=name, prompt="a", max_tokens=2)
        chunks = list(client.chat.completions.create(model=name, messages=messages, max_tokens=2, stream=True))
        assert {chat.model, text.model, *(chunk.model for chunk in chunks)} == {name}
        for ask in (
            lambda: client.chat.completions.create(model="gpt-4o", messages=messages),
            lambda: client.chat.completions.create(model="gpt-4o", messages=messages, stream=True),
            lambda: client.completions.create(model="VALUE_TO_TEXT", prompt="a"),
            lambda: client.models.retrieve("gpt-4o"),
        ):
            with pytest.raises(openai.NotFoundError, match="is not served here; this server has 'org/my model") as err:
                ask()
            assert (err.value.code, err.value.param) == ("model_not_found", "model")
            assert err.value.type == "invalid_request_error"
        numbers = httpx.get(f"http://127.0.0.1:{port}/metrics", trust_env=False).text
        assert httpx.get(f"http://127.0.0.1:{port}/health", trust_env=False).json()["model"] == name
    assert f'steerlm_num_requests_running{{model_name="{name}"}} 0.0' in numbers
