"""The steering page against real servers with models that really do their job."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import live
import pytest
import tiny_world
from hf_engine import HFEngine
from page_driver import Page, chromium, fresh_page, needs_chromium
from selenium import webdriver
from selenium.common.exceptions import JavascriptException
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys

from steerlm_nemo.conversation import TEXT_TO_VALUE, VALUE_TO_TEXT, Conversation, RecordRef, Turn
from steerlm_nemo.model_kind import STEERLM, SteerLMFormat
from steerlm_nemo.serving import page as page_routes

pytestmark = needs_chromium
MARKUP = "<b><img src=x onerror=alert(1)></b>"


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[webdriver.Chrome]:
    with chromium(tmp_path_factory.mktemp("chromium")) as driver:
        yield driver


@pytest.fixture
def page(browser: webdriver.Chrome) -> Iterator[Page]:
    with fresh_page(browser) as page:
        yield page


def open_tiny(page: Page, port: int) -> None:
    """Load the page; the models of these tests were trained with a system prompt of their own."""
    page.open(port)
    if page.all("#system"):
        page.set("#system", tiny_world.SYSTEM)


@pytest.fixture(scope="module")
def steerlm() -> Iterator[live.ServerProcess]:
    """A tiny SteerLM model in a server process of its own."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    server = live.ServerProcess(live.model_folder(VALUE_TO_TEXT), port)
    server.start()
    server.wait_ready()
    yield server
    server.kill()


@pytest.fixture(scope="module")
def endless(tmp_path_factory: pytest.TempPathFactory) -> HFEngine:
    """A model of random weights and a long context: it talks until it is cut or stopped."""
    folder = tmp_path_factory.mktemp("endless")
    served = tiny_world.make_model(folder, None, steps=0)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 10_000}))
    return HFEngine.load(folder, SteerLMFormat(served.template, served.schema, STEERLM))


def values_of(page: Page, side: str) -> dict[str, int | str]:
    shown = {control.get_attribute("name"): control.get_attribute("value") for control in page.all("#sliders [name]")}
    return {
        name.removeprefix(f"{side} "): value if name.endswith("lang") else int(value)
        for name, value in shown.items()
        if name.startswith(f"{side} ")
    }


def test_there_is_a_slider_for_every_attribute_of_the_served_schema(page: Page, steerlm: live.ServerProcess) -> None:
    open_tiny(page, steerlm.port)
    sliders = {slider.get_attribute("name"): slider for slider in page.all("#sliders input[type=range]")}
    expected = {
        f"{side} {attribute.name}": [str(attribute.minimum), str(attribute.maximum), str(start)]
        for attribute in tiny_world.SCHEMA.attributes
        for side, start in (("A", attribute.default), ("B", attribute.minimum))
    }
    assert expected == {
        name: [slider.get_attribute(key) for key in ("min", "max", "value")] for name, slider in sliders.items()
    }
    languages = page.one("select[name='A lang']").find_elements(By.TAG_NAME, "option")
    assert tuple(option.text for option in languages) == tiny_world.SCHEMA.languages
    assert live.model_folder(VALUE_TO_TEXT).name in page.one("#served").text


def test_two_settings_answer_the_same_prompt_each_as_its_sliders_ask(page: Page, steerlm: live.ServerProcess) -> None:
    open_tiny(page, steerlm.port)
    page.slide("A quality", 3)
    page.slide("B quality", 1)
    page.slide("B humor", 2)
    page.one("select[name='B lang']").send_keys("de")
    page.ask("Tell me.")
    a, b = page.all(".answer")
    assert tiny_world.reading(page.answers("A")[0]) == {"quality": 3, "humor": 0, "lang": "en"} == values_of(page, "A")
    assert tiny_world.reading(page.answers("B")[0]) == {"quality": 1, "humor": 2, "lang": "de"} == values_of(page, "B")
    assert a.location["y"] == b.location["y"] and a.location["x"] + a.size["width"] <= b.location["x"]


def test_a_setting_remembers_its_own_answers_and_their_grades(page: Page, steerlm: live.ServerProcess) -> None:
    open_tiny(page, steerlm.port)
    page.record_requests()
    page.slide("B quality", 0)
    page.ask("Tell me.")
    page.slide("B quality", 2)
    page.ask("And now?")
    body = page.sent()[-1]
    assert body["messages"] == [
        {"role": "system", "content": tiny_world.SYSTEM},
        {"role": "user", "content": "Tell me."},
        {
            "role": "assistant",
            "content": page.answers("B")[0],
            "attributes": {"quality": 0, "humor": 0, "lang": "en"},
        },
        {"role": "user", "content": "And now?"},
    ]
    assert body["attributes"] == {"quality": 2, "humor": 0, "lang": "en"}
    assert tiny_world.reading(page.answers("B")[1])["quality"] == 2

    page.press("Go on from this", 2)  # the second answer at setting A
    page.ask("Speak!")
    both = page.sent()[-2:]
    assert [body["messages"][-2]["content"] for body in both] == [page.answers("A")[1]] * 2
    assert [body["messages"][2]["content"] for body in both] == [page.answers("A")[0], page.answers("B")[0]]


def test_asking_again_replaces_the_last_answers_at_the_settings_of_now(page: Page, steerlm: live.ServerProcess) -> None:
    open_tiny(page, steerlm.port)
    page.one("#compare").click()
    page.ask("Tell me.")
    assert len(page.answers()) == 1
    page.slide("A humor", 2)
    page.press("Ask again")
    page.settle()
    (answer,) = page.answers()
    assert tiny_world.reading(answer)["humor"] == 2


def test_text_is_shown_as_it_is_made(page: Page, endless: HFEngine) -> None:
    with live.run_engine(endless) as port:
        open_tiny(page, port)
        page.one("#compare").click()
        page.set("#max-tokens", "9000")
        page.browser.execute_script(
            "window.seen = new Set();"
            "new MutationObserver(() => seen.add(document.querySelector('.answer .text')?.textContent))"
            ".observe(document.querySelector('#thread'), {subtree: true, childList: true, characterData: true});"
        )
        page.set("#prompt", "Speak!")
        page.one("#prompt").send_keys(Keys.ENTER)
        page.until(lambda: page.browser.execute_script("return seen.size") > 5)
        page.press("Stop")
        page.settle()
        *partial, whole = (text for text in page.browser.execute_script("return [...seen]") if text)
    assert len(partial) >= 2 and all(whole.startswith(text) for text in partial)


@pytest.mark.parametrize("greedy", [True, False])
def test_the_copied_request_is_the_one_that_was_sent_and_gives_the_same_answer(
    page: Page, steerlm: live.ServerProcess, tmp_path: Path, greedy: bool
) -> None:
    open_tiny(page, steerlm.port)
    page.record_requests()
    page.slide("A quality", 1)
    if not greedy:
        page.one("#greedy").click()
        page.set("#temperature", "1.5")
    page.ask('It\'s "quoted", $HOME, `date`, \\n, ü and\\')
    page.ask("And now?")
    first, second = page.sent()[-2:]
    assert ("seed" in first, first["temperature"]) == ((False, 0) if greedy else (True, 1.5))
    assert (first.get("seed"), first["messages"][0]) == (second.get("seed"), second["messages"][0])

    line = page.request("curl", -2)
    assert json.loads(run_shell(line.replace("curl", "printf '%s\\n'", 1)).splitlines()[-1]) == first
    answer = streamed(run_shell(line))
    assert answer == page.answers("A")[-1]

    program = tmp_path / "request.py"
    program.write_text(page.request("Python", -2))
    assert run_shell(f"{sys.executable} {program}") == answer + "\n"


def run_shell(line: str, **variables: str) -> str:
    """What a line typed into a shell prints."""
    environment = {**os.environ, "NO_PROXY": "127.0.0.1", **variables}
    return subprocess.run(["bash", "-c", line], capture_output=True, text=True, check=True, env=environment).stdout


def streamed(events: str) -> str:
    """The text of a streamed chat answer."""
    chunks = [json.loads(line.removeprefix("data: ")) for line in events.splitlines() if line.startswith("data: {")]
    return "".join(chunk["choices"][0]["delta"].get("content") or "" for chunk in chunks if chunk["choices"])


def test_markup_is_shown_as_text_wherever_it_comes_from(page: Page, tmp_path: Path) -> None:
    line = tiny_world.SCHEMA.complete({})
    told = Conversation("S", (Turn("User", MARKUP), Turn("Assistant", MARKUP, line)), RecordRef("", 1), VALUE_TO_TEXT)
    served = tiny_world.make_model(tmp_path, VALUE_TO_TEXT, steps=60, records=[told] * 32)
    with live.run_engine(HFEngine.load(tmp_path, served)) as port:
        open_tiny(page, port)
        page.set("#system", "S")
        page.ask(MARKUP)
        assert page.answers() == [MARKUP] * 2
        assert page.one(".prompt").text == MARKUP
        assert MARKUP in page.request("Python")
        assert not page.all("img")


def test_the_policy_lets_nothing_in_from_outside_and_no_text_become_markup(
    page: Page, steerlm: live.ServerProcess
) -> None:
    answer = httpx.get(f"http://127.0.0.1:{steerlm.port}/", trust_env=False)
    policy = dict(part.strip().split(" ", 1) for part in answer.headers["content-security-policy"].split(";"))
    assert policy["default-src"] == "'none'" and policy["connect-src"] == "'self'"
    assert "unsafe" not in answer.headers["content-security-policy"]
    parts = ["/", *re.findall(r'(?:href|src)="(/[^"]+)"', answer.text)]
    assert len(parts) == 4
    for part in parts:
        text = httpx.get(f"http://127.0.0.1:{steerlm.port}{part}", trust_env=False).raise_for_status().text
        assert "://" not in text.replace("http://www.w3.org/2000/svg", "")  # the icon's name space
    assert httpx.get(f"http://127.0.0.1:{steerlm.port}/page/page.py", trust_env=False).status_code == 404
    open_tiny(page, steerlm.port)
    with pytest.raises(JavascriptException, match="requires 'TrustedHTML'"):
        page.browser.execute_script("document.body.innerHTML = arguments[0]", MARKUP)
    page.browser.get_log("browser")  # the violation just provoked


def test_stop_keeps_what_is_there_and_frees_the_place(page: Page, endless: HFEngine) -> None:
    with live.run_engine(endless) as port:
        open_tiny(page, port)
        page.set("#max-tokens", "9000")
        for stop in (lambda: page.press("Stop"), lambda: page.one("#prompt").send_keys(Keys.ESCAPE)):
            page.set("#prompt", "Speak!")
            page.one("#prompt").send_keys(Keys.ENTER)
            page.until(lambda: all(page.answers()[-2:]) and len(page.answers()[-1]) > 20)
            stop()
            page.settle()
            assert [about.text for about in page.all(".about")[-2:]] == ["stopped"] * 2
            page.until(lambda: is_idle(endless))
        assert all(len(answer) > 20 for answer in page.answers())
        assert page.one("#send").is_displayed()


def is_idle(engine: HFEngine) -> bool:
    before = engine.counters.generated_tokens
    time.sleep(0.2)
    return engine.counters.generated_tokens == before


def test_a_prompt_that_is_too_long_a_full_queue_and_a_wrong_setting_are_told(page: Page, endless: HFEngine) -> None:
    with live.run_engine(endless, http=live.http(max_waiting_requests=0)) as port:
        open_tiny(page, port)
        page.one("#compare").click()
        page.ask("Tell me.")
        card, box = page.alerts()
        assert "The server is busy; it asks to wait 1 s" in card and card in box
    with live.run_engine(live.engine(VALUE_TO_TEXT)) as port:
        open_tiny(page, port)
        page.one("#compare").click()
        page.ask("Tell me. " * 60)
        card, box = page.alerts()
        assert "context length is 256 tokens" in card and card in box
        assert page.one("#prompt").get_attribute("value") == "Tell me. " * 60
        page.set("#max-tokens", "0")
        page.set("#prompt", "And now?")
        page.press("Send")
        assert len(page.all(".turn")) == 1
        assert page.browser.execute_script("return document.querySelector('#max-tokens').validationMessage")


def test_a_token_is_asked_for_and_never_copied(page: Page) -> None:
    with live.run_engine(live.engine(VALUE_TO_TEXT), http=live.http(token="open-sesame")) as port:
        open_tiny(page, port)
        assert "wants a bearer token" in page.alerts()[0]
        page.set("#token-value", "open-barley")
        page.press("Use token")
        page.until(lambda: "does not know this token" in "".join(page.alerts()))
        page.set("#token-value", "open-sesame")
        page.press("Use token")
        page.until(lambda: page.all("#prompt"))
        page.one("#compare").click()
        page.set("#system", tiny_world.SYSTEM)
        page.ask("Tell me.")
        assert tiny_world.reading(page.answers()[0])["quality"] == 4 and not page.alerts()
        line, program = page.request("curl"), page.request("Python")
        assert "open-sesame" not in line + program and "STEERLM_TOKEN" in program
        assert streamed(run_shell(line, STEERLM_TOKEN="open-sesame")) == page.answers()[0]


def test_a_server_that_is_gone_is_told_and_asked_again(page: Page, steerlm: live.ServerProcess) -> None:
    open_tiny(page, steerlm.port)
    page.one("#compare").click()
    steerlm.kill()
    try:
        page.ask("Tell me.")
        assert f"No answer from 127.0.0.1:{steerlm.port}" in page.alerts()[0]
    finally:
        steerlm.start()
        steerlm.wait_ready()
    page.press("Try again")
    page.settle()
    assert page.alerts() == []
    assert tiny_world.reading(page.answers()[0])["quality"] == 4


def test_a_value_model_grades_a_pasted_response(page: Page) -> None:
    with live.run_engine(live.engine(TEXT_TO_VALUE)) as port:
        open_tiny(page, port)
        assert not page.all("input[type=range]")
        assert "value model" in page.one("#grading").text
        cases = (("poor laugh hallo", ["1", "2", "de"]), ("great dry hello", ["4", "0", "en"]))
        for number, (text, expected) in enumerate(cases, start=1):
            page.set("#question", "Tell me.")
            page.set("#response", text)
            page.set("#grading-system", tiny_world.SYSTEM)
            page.press("Grade")
            page.until(lambda: len(page.all("#grades table")) == number)  # noqa: B023
            newest = page.all("#grades .graded")[0]
            assert newest.find_element(By.CSS_SELECTOR, ".response").text == text
            assert [cell.text for cell in newest.find_elements(By.CSS_SELECTOR, "td.value b")] == expected
            line = "quality:{},humor:{},lang:{}".format(*expected)
            assert newest.find_element(By.CSS_SELECTOR, "code").text == line
        (graded,) = json.loads(run_shell(page.request("curl", 0)))["conversations"]
        assert tiny_world.SCHEMA.order(graded["messages"][-1]["attributes"]).line == line


def test_a_model_without_a_format_continues_text(page: Page, endless: HFEngine) -> None:
    plain = HFEngine(endless.model, endless.info.tokenizer, None, "plain")
    with live.run_engine(plain) as port:
        open_tiny(page, port)
        assert not page.all("input[type=range]")
        assert "no attribute schema" in page.one("#why-plain").text
        page.set("#max-tokens", "12")
        page.set("#text", "Once upon a time")
        page.press("Continue")
        page.settle()
        assert page.all(".about")[0].text.startswith("12 tokens")
        body = {"prompt": "Once upon a time", "max_tokens": 12, "temperature": 0}
        answer = httpx.post(f"http://127.0.0.1:{port}/v1/completions", json=body, trust_env=False).json()
        assert page.answers()[0].strip() == answer["choices"][0]["text"].strip()


def test_every_control_has_a_name_and_the_page_fits_a_phone(page: Page, steerlm: live.ServerProcess) -> None:
    page.fit(360, 740)
    open_tiny(page, steerlm.port)
    page.one("#settings > summary").click()
    nodes = page.browser.execute_cdp_cmd("Accessibility.getFullAXTree", {})["nodes"]
    controls = [
        (node["role"]["value"], node["name"]["value"])
        for node in nodes
        if any(prop["name"] == "focusable" and prop["value"]["value"] for prop in node.get("properties", []))
        and node["role"]["value"] not in ("RootWebArea", "generic", "MenuListPopup", "main")
    ]
    assert {"slider", "combobox", "checkbox", "spinbutton", "textbox", "button"} <= {role for role, _ in controls}
    assert all(name for _, name in controls), controls
    assert ("slider", "quality, setting B") in controls
    page.ask("Tell me.")
    assert page.browser.execute_script("return document.documentElement.scrollWidth") == 360


def test_an_installed_package_has_the_page(tmp_path: Path) -> None:
    build = "from setuptools import setup; setup()"
    command = [sys.executable, "-c", build, "-q", "build_py", "--build-lib", str(tmp_path)]
    subprocess.run(command, cwd=Path(__file__).parents[2], check=True, capture_output=True)
    static = tmp_path / "steerlm_nemo" / "serving" / "static"
    sources = Path(page_routes.__file__).parent / "static"
    assert sorted(file.name for file in static.iterdir()) == sorted(file.name for file in sources.iterdir())
