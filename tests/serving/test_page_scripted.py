"""The page against scripted answers: what it does whatever a server does, and how it looks at any size."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from itertools import product
from types import SimpleNamespace
from typing import Any

import live
import page_measures
import pytest
from page_driver import Page, chromium, fresh_page, needs_chromium
from page_stub import CARDS, PageStub, graded, past_messages, refused, said
from selenium import webdriver
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.keys import Keys
from starlette.responses import HTMLResponse, Response

from steerlm_nemo.attributes import HELPSTEER5, NEMO12_LANG, PAPER7, Attribute, AttributeSchema

pytestmark = needs_chromium

TOO_LONG = "the prompt has 940 tokens, the context 512"


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[webdriver.Chrome]:
    with chromium(tmp_path_factory.mktemp("chromium")) as driver:
        yield driver


@pytest.fixture(scope="module")
def served() -> Iterator[SimpleNamespace]:
    stub = PageStub()
    with live.run_app(stub.app) as port:
        yield SimpleNamespace(stub=stub, port=port)


@pytest.fixture
def stub(served: SimpleNamespace) -> PageStub:
    served.stub.reset()
    return served.stub


@pytest.fixture
def page(browser: webdriver.Chrome, stub: PageStub, served: SimpleNamespace) -> Iterator[Page]:
    with fresh_page(browser) as page:
        page.serve = lambda mode, **more: _serve(page, served, mode, **more)  # type: ignore[attr-defined]
        yield page


def _serve(page: Page, served: SimpleNamespace, mode: str, **more: Any) -> None:
    served.stub.mode = mode
    for name, value in more.items():
        setattr(served.stub, name, value)
    page.open(served.port)


def serve_single(page: Page, **more: Any) -> None:
    """A model that answers at one setting."""
    page.serve("steer", **more)  # type: ignore[attr-defined]
    page.one("#compare").click()


def typed(page: Page, css: str = "#prompt") -> str:
    return page.one(css).get_attribute("value")


def in_view(page: Page, css: str) -> bool:
    """All of it, and nothing before it."""
    return page.run(
        "const {left, top, bottom, height} = document.querySelector(arguments[0]).getBoundingClientRect();"
        "const hit = document.elementFromPoint(left + 8, top + height / 2);"
        "return top >= 0 && bottom <= innerHeight && document.querySelector(arguments[0]).contains(hit);",
        css,
    )


# ---- nothing typed is lost ----

FAULTS: dict[str, tuple[Callable[[], Response], str]] = {
    "too long": (lambda: refused(400, TOO_LONG, "context_length_exceeded"), TOO_LONG),
    "roles of a template": (lambda: refused(400, "System role not supported"), "System role not supported"),
    "busy": (lambda: refused(429, "8 requests are waiting already"), "The server is busy: 8 requests are waiting"),
    "ending": (lambda: refused(503, "the server is ending"), "The server is not ready: the server is ending"),
    "a defect": (lambda: Response("Internal Server Error", 500), "The server refused (500): Internal Server Error"),
    "a proxy": (lambda: HTMLResponse("<html>Bad Gateway</html>", 502), "The server refused (502): Bad Gateway"),
    "another model": (lambda: refused(404, "model 'stub' is not served", "model_not_found"), "Reload the page"),
    "broken off": (lambda: said(broken=True), "The connection broke before the end"),
    "ended": (lambda: said(error="rank 1 has died"), "The server stopped: rank 1 has died"),
}


def test_a_message_without_an_answer_stays_with_its_reason_and_is_given_back(page: Page, stub: PageStub) -> None:
    page.serve("steer")
    for fault, (answer, reason) in FAULTS.items():
        stub.asked.clear()
        stub.answer = lambda body: answer()  # noqa: B023
        page.ask("What is a dog?")
        page.until(lambda: page.all("#refused"))
        alert = page.one("#refused")
        assert reason in alert.text and "Your message is back in the box" in alert.text, fault
        assert alert.get_attribute("role") == "alert" and in_view(page, "#refused")
        assert typed(page) == page.one(".prompt").text == "What is a dog?"
        assert "Not answered" in page.one(".turn").text
        assert len(page.all(".answer .error")) == 2

        stub.answer = lambda body: said("A pet.")
        page.press("Try again")  # at the box: both settings
        page.settle()
        assert page.answers() == ["A pet."] * 2 and page.alerts() == [] and typed(page) == ""
        assert "Not answered" not in page.one(".turn").text
        assert stub.asked[-1] in stub.asked[:2]  # the very request
        page.press("Clear chat")


def test_an_edited_message_follows_the_failed_one_which_says_that_it_was_left_out(page: Page, stub: PageStub) -> None:
    page.serve("steer", answer=lambda body: refused(400, TOO_LONG))
    page.ask("What is a dog?")
    page.one("#prompt").send_keys(" In short.")
    stub.answer = lambda body: said("A pet.")
    page.press("Send")
    page.settle()
    assert [prompt.text for prompt in page.all(".prompt")] == ["What is a dog?", "What is a dog? In short."]
    assert past_messages(stub.asked[-1]) == ["What is a dog? In short."]
    notes = [note.text for note in page.all(".turn .note")]
    assert len(notes) == 2 and all("not told of this turn" in note for note in notes)


def test_the_same_message_again_takes_the_place_of_the_failed_one(page: Page, stub: PageStub) -> None:
    page.serve("steer", answer=lambda body: refused(429, "busy"))
    page.ask("What is a dog?")
    stub.answer = lambda body: said("A pet.")
    page.press("Send")
    page.settle()
    assert len(page.all(".turn")) == 1 and page.answers() == ["A pet."] * 2


def test_what_is_being_typed_is_not_written_over(page: Page, stub: PageStub) -> None:
    page.serve("steer", answer=lambda body: said(held=True))
    page.set("#prompt", "What is a dog?")
    page.press("Send")
    page.one("#prompt").send_keys("And a cat?")
    page.press("Stop")
    page.settle()
    assert typed(page) == "And a cat?"
    page.press("Edit")
    assert typed(page) == "And a cat?\n\nWhat is a dog?"


def test_stopping_before_the_first_word_gives_the_message_back_and_later_keeps_the_words(
    page: Page, stub: PageStub
) -> None:
    serve_single(page, answer=lambda body: said(held=True))
    page.set("#prompt", "What is a dog?")
    page.press("Send")
    page.press("Stop")
    page.settle()
    assert typed(page) == "What is a dog?" and "Stopped before the first word" in page.one("#told").text
    stub.answer = lambda body: said("A pet", held=True)
    page.press("Send")
    page.until(lambda: page.answers() == ["A pet"])
    page.press("Stop")
    page.settle()
    assert page.answers() == ["A pet"] and typed(page) == ""
    stub.answer = lambda body: said("Yes.")
    page.ask("Really?")
    assert past_messages(stub.asked[-1]) == ["What is a dog?", "A pet", "Really?"]


@pytest.mark.parametrize("end", [{"broken": True}, {"error": "rank 1 has died"}])
def test_a_stream_that_breaks_keeps_what_came_and_says_so(page: Page, stub: PageStub, end: dict[str, Any]) -> None:
    serve_single(page, answer=lambda body: said("A pet", " that", **end))
    page.ask("What is a dog?")
    assert page.answers() == ["A pet that"] and page.all(".about")[0].text == "broken off"
    reason = end.get("error", "what came is incomplete")
    assert reason in page.one("#refused").text and reason in page.one(".answer .error").text
    assert typed(page) == "" and "Not answered" not in page.one(".turn").text

    stub.answer = lambda body: refused(429, "busy")
    page.press("Try again", -1)
    page.settle()
    assert page.answers() == [""]
    page.one(".earlier summary").click()
    assert page.answers() == ["A pet that", ""]
    stub.answer = lambda body: said("A pet that barks.")
    page.press("Try again", -1)
    page.settle()
    page.ask("Really?")
    assert past_messages(stub.asked[-1]) == ["What is a dog?", "A pet that barks.", "Really?"]


def test_one_setting_that_fails_says_what_it_was_not_told_and_can_go_on_from_the_other(
    page: Page, stub: PageStub
) -> None:
    page.serve("steer", answer=lambda body: said("Yes.") if body["attributes"]["helpfulness"] else refused(429, "busy"))
    page.ask("What is a dog?")
    assert page.answers("A") == ["Yes."] and typed(page) == ""
    page.ask("And a cat?")
    asked = {body["attributes"]["helpfulness"]: past_messages(body) for body in stub.asked[-2:]}
    assert asked == {4: ["What is a dog?", "Yes.", "And a cat?"], 0: ["And a cat?"]}
    assert "Go on from this" in page.all(".answer.B .note")[0].text
    page.press("Go on from this", 0)
    page.ask("And a cow?")
    asked = {body["attributes"]["helpfulness"]: past_messages(body) for body in stub.asked[-2:]}
    assert asked[0] == ["What is a dog?", "Yes.", "And a cow?"]


def test_switching_between_one_setting_and_two_forgets_no_turn(page: Page, stub: PageStub) -> None:
    page.serve("steer")
    page.one("#compare").click()
    page.set("#prompt", "Half a thou")
    page.one("#compare").click()
    page.slide("A helpfulness", 1)
    page.one("#compare").click()
    assert typed(page) == "Half a thou"
    page.ask("What is a dog?")
    page.one("#compare").click()
    page.ask("And a cat?")
    assert [past_messages(body) for body in stub.asked[-2:]] == [["What is a dog?", "Yes.", "And a cat?"]] * 2


def test_asking_again_keeps_the_answers_of_before_to_be_read(page: Page, stub: PageStub) -> None:
    serve_single(page, answer=lambda body: said("First."))
    page.ask("What is a dog?")
    stub.answer = lambda body: refused(429, "busy")
    page.press("Ask again")
    page.settle()
    page.one(".earlier summary").click()
    assert page.answers() == ["First.", ""]
    assert page.one(".earlier summary").text.endswith("Earlier answers (1)")


def test_a_reload_keeps_everything_until_it_is_cleared(page: Page, stub: PageStub) -> None:
    page.serve("steer", answer=lambda body: said(f"At {body['attributes']['quality']}."), schema=NEMO12_LANG)
    page.slide("B quality", 2)
    page.one("select[name='B lang']").send_keys("de")
    page.set("#system", "Be short.")
    page.ask("What is a dog?")
    page.press("Go on from this", 1)
    stub.answer = lambda body: refused(400, TOO_LONG)
    page.ask("And a cat?")
    page.one("#prompt").send_keys(" In short")
    before = page.one("#thread").text, values(page)

    page.reload()
    assert (page.one("#thread").text, values(page)) == before
    assert (typed(page), typed(page, "#system")) == ("And a cat? In short", "Be short.")
    stub.answer = lambda body: said("A pet.")
    page.press("Send")
    page.settle()
    assert [past_messages(body) for body in stub.asked[-2:]] == [
        ["Be short.", "What is a dog?", "At 2.", "And a cat? In short"]
    ] * 2
    assert stub.asked[-1]["messages"][2]["attributes"]["lang"] == "de"

    page.set("#prompt", "Half a thou")
    page.press("Clear chat")
    assert not page.all(".turn") and typed(page) == "Half a thou"
    assert "What is a dog?" not in page.run("return JSON.stringify(sessionStorage)")
    page.press("Bring it back")
    assert len(page.all(".turn")) == 3
    page.press("Clear chat")
    page.reload()
    assert not page.all(".turn") and typed(page) == "Half a thou"


def values(page: Page) -> dict[str, str]:
    return {control.get_attribute("name"): control.get_attribute("value") for control in page.all("#sliders [name]")}


def test_a_reload_in_the_middle_of_an_answer_keeps_what_came(page: Page, stub: PageStub) -> None:
    serve_single(page, answer=lambda body: said("A pet", held=True))
    page.set("#prompt", "What is a dog?")
    page.press("Send")
    page.until(lambda: page.answers() == ["A pet"])
    page.reload()
    assert page.answers() == ["A pet"] and page.all(".about")[0].text == "broken off"
    assert page.one(".answer .error").text == "This page was left before the end of the answer."
    assert page.all("#send") and not page.all(".answer[aria-busy=true]")
    stub.answer = lambda body: said("A pet that barks.")
    page.press("Try again")
    page.settle()
    assert page.answers() == ["A pet that barks."]


def test_a_browser_that_keeps_no_more_is_told_of(page: Page, stub: PageStub) -> None:
    serve_single(page)
    page.run(
        "window.real = Storage.prototype.setItem;"
        "Storage.prototype.setItem = function (key, value) {"
        "  if (key.startsWith('chat')) throw new DOMException('The quota has been exceeded.');"
        "  real.call(this, key, value); }"
    )
    page.ask("What is a dog?")
    page.one("#prompt").send_keys("R")  # a draft is kept still, the conversation is not
    assert page.answers() == ["Yes."]
    assert "a reload loses it: The quota has been exceeded." in page.one("#unkept").text
    page.run("Storage.prototype.setItem = real")
    page.ask("Really?")
    assert not page.all("#unkept")


def test_a_token_that_is_asked_for_in_the_middle_loses_nothing(page: Page, stub: PageStub) -> None:
    page.serve("steer", answer=lambda body: refused(401, "this server wants a token"))
    page.ask("What is a dog?")
    assert typed(page) == "What is a dog?" and "wants a bearer token" in page.one("#token").text
    stub.answer = lambda body: said("A pet.")
    page.set("#token-value", "open-sesame")
    page.press("Use token")
    page.until(lambda: page.answers() == ["A pet."] * 2)
    assert typed(page) == "" and not page.alerts()


# ---- what is served ----

OWN = AttributeSchema("own", (Attribute("formality", 1, 5, 1), Attribute("length", 1, 3, 1)), ())
FIXED = AttributeSchema("fixed", (Attribute("safety", 4, 4, 4), Attribute("wit", 0, 2, 1)), ())


@pytest.mark.parametrize("schema", [HELPSTEER5, NEMO12_LANG, PAPER7, OWN, FIXED], ids=lambda s: s.name)
def test_the_two_settings_begin_at_the_top_and_the_bottom_of_what_is_wanted(
    page: Page, schema: AttributeSchema
) -> None:
    page.serve("steer", schema=schema)
    wanted = {one.name for one in schema.attributes if one.minimum < one.default == one.maximum} or {
        "own": {"formality"},
        "fixed": {"wit"},
    }[schema.name]
    shown = values(page)
    for one in schema.attributes:
        expected = (one.maximum, one.minimum) if one.name in wanted else (one.default, one.default)
        assert (int(shown[f"A {one.name}"]), int(shown[f"B {one.name}"])) == expected
    assert all(name in page.one("#difference").text for name in wanted)


@pytest.mark.parametrize(
    ("mode", "says"),
    [
        ("chat", "by the chat template that came with it"),
        ("plain", "trained on conversations without attributes"),
    ],
)
def test_a_model_without_attributes_chats_without_sliders(page: Page, stub: PageStub, mode: str, says: str) -> None:
    page.serve(mode)
    assert not page.all("input[type=range]") and not page.all("#compare")
    assert says in page.one("#empty").text and "nothing to steer" in page.one("#empty").text
    assert CARDS[mode]["title"] in page.one("#served").text
    page.ask("What is a dog?")
    page.ask("Really?")
    assert stub.asked[-1]["messages"] == [
        {"role": "user", "content": "What is a dog?"},
        {"role": "assistant", "content": "Yes."},
        {"role": "user", "content": "Really?"},
    ]
    assert "attributes" not in stub.asked[-1]
    assert "None" not in page.request("Python") and "attributes" not in page.request("curl")


def test_a_model_that_only_continues_text_shows_the_text_with_what_followed(page: Page, stub: PageStub) -> None:
    page.serve("continue", answer=lambda body: refused(400, TOO_LONG))
    assert "no chat template" in page.one("#why-plain").text
    page.set("#text", "Once upon a time")
    page.one("#text").send_keys(Keys.CONTROL, Keys.ENTER)
    page.until(lambda: page.all("#not-continued"))
    assert TOO_LONG in page.one("#not-continued").text and in_view(page, "#not-continued")
    assert typed(page, "#text") == "Once upon a time"
    stub.answer = lambda body: said(" there was", " a dog.")
    page.press("Try again", 0)
    page.settle()
    page.reload()
    assert typed(page, "#text") == "Once upon a time" and not page.alerts()[:-1]
    assert page.all(".given")[0].text == "Once upon a time" and page.answers()[0].strip() == "there was a dog."
    page.press("Clear list")
    assert not page.all(".answer")
    page.press("Bring it back")
    assert page.answers()[0].strip() == "there was a dog."


def test_a_model_that_the_page_cannot_ask_is_told_what_it_is(page: Page) -> None:
    page.serve("none")
    assert "a pairwise reward model" in page.one("#none").text and "/openapi.json" in page.one("#none").text


# ---- the value page ----


def test_a_grade_is_shown_with_its_pair_and_probabilities_to_read_and_kept(page: Page, stub: PageStub) -> None:
    page.serve("grade", schema=NEMO12_LANG, answer=lambda body: refused(503, "the server is ending"))
    page.set("#question", "What is a dog?")
    page.set("#response", "A pet.")
    page.one("#response").send_keys(Keys.CONTROL, Keys.ENTER)
    page.until(lambda: page.all("#ungraded"))
    assert "The server is not ready: the server is ending" in page.one("#ungraded").text
    assert in_view(page, "#ungraded") and not page.all(".graded")
    assert (typed(page, "#question"), typed(page, "#response")) == ("What is a dog?", "A pet.")

    stub.answer = graded
    page.one("#question").send_keys(Keys.META, Keys.ENTER)
    page.until(lambda: page.all(".graded"))
    assert not page.all("#ungraded")
    result = page.all(".graded")[0].text
    assert all(text in result for text in ("What is a dog?", "A pet.", "quality", "70 %", "8 %", "mean 3.40"))
    assert "31 others\n27 %" in result  # of the languages, the likeliest
    page.set("#question", "What is a cat?")
    page.press("Grade")
    page.until(lambda: len(page.all(".graded")) == 2)
    page.reload()
    assert ["cat" in result.text for result in page.all(".graded")] == [True, False]
    assert page.all(".graded")[1].text == result
    page.press("Clear list")
    assert not page.all(".graded") and "dog" not in page.run(
        "return sessionStorage.getItem('grades stub ' + '0'.repeat(16))"
    )
    page.press("Bring it back")
    assert len(page.all(".graded")) == 2


@pytest.mark.parametrize("answer", [HTMLResponse("<html>Log in</html>"), Response("{", media_type="application/json")])
def test_an_answer_that_is_no_answer_is_told_at_the_button(page: Page, answer: Response) -> None:
    page.serve("grade", schema=NEMO12_LANG, answer=lambda body: answer)
    page.set("#question", "What is a dog?")
    page.set("#response", "A pet.")
    page.press("Grade")
    page.until(lambda: page.all("#ungraded"))
    assert "something that is not JSON" in page.one("#ungraded").text


# ---- its shape ----


def test_the_page_works_where_a_proxy_lets_in_only_its_own_address(page: Page, stub: PageStub, browser: Any) -> None:
    async def strict(scope: Any, receive: Any, send: Any) -> None:
        async def watched(message: Any) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], (b"content-security-policy", b"default-src 'self'")]
            await send(message)

        await stub.app(scope, receive, watched)

    with live.run_app(strict) as port:  # type: ignore[arg-type]
        page.open(port)
        page.ask("What is a dog?")
        assert page.answers() == ["Yes."] * 2
        assert page.run("return getComputedStyle(document.querySelector('.answer.B')).borderTopWidth") == "3px"
        assert (
            page.run("return document.querySelector('input[type=range]').style.getPropertyValue('--filled')") == "100%"
        )


def filled(page: Page, stub: PageStub, mode: str) -> None:
    """The page with everything on it that it can show."""
    if mode in ("steer", "chat"):
        page.ask("What is a dog, and how does it differ from a wolf?")
        stub.answer = lambda body: refused(400, TOO_LONG)
        page.ask("Donaudampfschifffahrtselektrizitaetenhauptbetriebswerkbauunterbeamtengesellschaft")
    elif mode == "grade":
        stub.answer = graded
        page.set("#question", "What is a dog?")
        page.set("#response", "Donaudampfschifffahrtselektrizitaetenhauptbetriebswerkbauunterbeamtengesellschaft")
        page.press("Grade")
        page.until(lambda: page.all(".graded"))
    elif mode == "continue":
        page.set("#text", "Once upon a time")
        page.press("Continue")
        page.settle()


@pytest.mark.parametrize(
    ("mode", "width"),
    [
        *product(("steer", "grade"), (320, 768, 1280)),
        ("chat", 320),
        ("continue", 320),
        ("continue", 1280),
        ("none", 320),
    ],
)
def test_everything_is_legible_and_in_reach(page: Page, stub: PageStub, mode: str, width: int) -> None:
    page.fit(width, 700)
    page.serve(mode, schema=NEMO12_LANG)
    empty = {script: page.run(script, "body") for script in (page_measures.CONTRASTS, page_measures.SMALL_TARGETS)}
    assert empty == {script: [] for script in empty}
    filled(page, stub, mode)
    for theme in ("light", "dark"):
        page.run("theme.value = arguments[0]; theme.dispatchEvent(new Event('change'))", theme)
        for part in ("body", "aside"):
            if part == "aside":
                if not page.all("aside summary"):
                    continue  # a wide page shows them anyway
                page.run("settings.open = true")
            assert page.run(page_measures.CONTRASTS, part) == []
            assert page.run(page_measures.SMALL_TARGETS, part) == []
            assert page.run(page_measures.STICKS_OUT, part) == []
            assert page.run(page_measures.COVERED, part) == []
            page.run("if (innerWidth < 960) settings.open = false")
        if page.all(".answer"):
            page.run("document.querySelector('.answer .tools button:last-child').click()")
            for measure in (page_measures.CONTRASTS, page_measures.SMALL_TARGETS, page_measures.STICKS_OUT):
                assert page.run(measure, "dialog") == []
            page.press("Close")


def test_the_measures_see_what_is_wrong(page: Page) -> None:
    page.serve("continue")
    page.run(
        "const made = document.createElement('p'); made.textContent = 'faint'; made.style.color = '#999';"
        "const small = document.createElement('button'); small.textContent = 'x'; small.style.cssText ="
        " 'min-height: 0; height: 20px; margin-left: 3000px; position: relative; z-index: -1';"
        "document.querySelector('form#continuing').append(made, small)"
    )
    assert any("faint" in line for line in page.run(page_measures.CONTRASTS, "body"))
    assert any("20: button" in line for line in page.run(page_measures.SMALL_TARGETS, "body"))
    assert any("button" in line for line in page.run(page_measures.STICKS_OUT, "body"))
    assert any("button" in line for line in page.run(page_measures.COVERED, "body"))


@pytest.mark.parametrize("height", [480, 700])
def test_the_box_for_messages_stays_at_the_end_of_a_phone(page: Page, height: int) -> None:
    page.fit(320, height)
    page.serve("steer")

    def place() -> list[int]:
        return page.run(
            "const {top, bottom} = document.querySelector('#composer').getBoundingClientRect();"
            "return [Math.round(top), Math.round(bottom)]"
        )

    start = place()
    assert start[1] == height
    page.one("summary").click()
    assert place() == start
    page.one("summary").click()
    for prompt in ("What is a dog?", "Really?", "And a cat?"):
        page.ask(prompt)
        assert place() == start
    page.run("scrollTo(0, 0)")
    assert place() == start


def test_every_part_is_in_a_landmark_and_every_control_has_a_name(page: Page, stub: PageStub) -> None:
    page.serve("steer")
    filled(page, stub, "steer")
    nodes = page.browser.execute_cdp_cmd("Accessibility.getFullAXTree", {})["nodes"]
    shown = [
        (node["role"]["value"], node.get("name", {}).get("value", ""))
        for node in nodes
        if not node.get("ignored", False)
    ]
    assert {("banner", ""), ("main", ""), ("complementary", "Settings"), ("form", "Your message")} <= set(shown)
    controls = {"slider", "combobox", "checkbox", "spinbutton", "textbox", "button", "link"}
    assert [role for role, name in shown if role in controls and not name] == []
    outside = page.run(
        "return [...document.body.querySelectorAll('p, button, input, select, textarea, h1')].filter((element) =>"
        " element.checkVisibility() && !element.closest('header, aside, main, [role=status], dialog'))"
        ".map((element) => element.outerHTML)"
    )
    assert outside == []
    assert page.run("return document.documentElement.lang") == "en"


def test_the_keyboard_goes_through_the_page_in_order_and_is_seen(page: Page, stub: PageStub) -> None:
    page.serve("steer")
    page.one(".skip").send_keys(Keys.SHIFT + Keys.TAB)  # out of the page
    order = []
    for _ in range(22):
        ActionChains(page.browser).send_keys(Keys.TAB).perform()
        order.append(page.run("return document.activeElement.id || document.activeElement.textContent"))
        outline = page.run("return getComputedStyle(document.activeElement).outlineStyle")
        assert outline == "solid" or order[-1] in ("compare", "greedy"), order
    wanted = ["Skip the settings", "theme", "compare", "reset", "= B", "reset", "= A"]
    wanted += [f"{side}-{one.name}" for one in HELPSTEER5.attributes for side in "AB"]
    assert order[: len(wanted)] == wanted
    assert order[len(wanted) :][:5] == ["greedy", "max-tokens", "system", "prompt", "send"]


def test_the_focus_stays_where_the_button_was(page: Page, stub: PageStub) -> None:
    def focus() -> str:
        return page.run("return document.activeElement.id || document.activeElement.textContent")

    serve_single(page, answer=lambda body: said("A pet", held=True))
    page.set("#prompt", "What is a dog?")
    page.one("#send").send_keys(Keys.ENTER)
    assert focus() == "stop"
    page.one("#stop").send_keys(Keys.ENTER)
    page.settle()
    assert focus() == "send"
    stub.answer = lambda body: refused(429, "busy")
    page.ask("Really?")
    page.all("#refused button")[0].send_keys(Keys.ENTER)
    page.settle()
    assert focus() == "prompt"


def test_an_answer_is_read_out_once_and_whole(page: Page, stub: PageStub) -> None:
    serve_single(page, answer=lambda body: said("A ", "loyal ", "pet."))
    page.run(
        "window.heard = []; new MutationObserver(() => heard.push(document.querySelector('#status').textContent))"
        ".observe(document.querySelector('#status'), {childList: true, characterData: true, subtree: true})"
    )
    page.ask("What is a dog?")
    page.until(lambda: len(page.run("return heard")) == 2)
    assert page.run("return heard") == ["Answering.", "A: A loyal pet."]
    assert not page.all(".answer [aria-live], .answer[role=alert], #thread[aria-live]")


def test_nothing_moves_for_those_who_asked_for_that(page: Page, stub: PageStub) -> None:
    serve_single(page, answer=lambda body: said("A pet", held=True))
    page.set("#prompt", "What is a dog?")
    page.press("Send")
    page.until(lambda: page.answers() == ["A pet"])

    def moving() -> int:
        return page.run("return document.getAnimations().length")

    features = [{"name": "prefers-reduced-motion", "value": "no-preference"}]
    page.browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
    page.until(lambda: moving() == 1)
    features = [{"name": "prefers-reduced-motion", "value": "reduce"}]
    page.browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
    page.until(lambda: moving() == 0)
    page.browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})
    page.press("Stop")
    page.settle()


def test_kept_messages_are_named_once_however_long_the_chat(page: Page, stub: PageStub) -> None:
    serve_single(page, answer=lambda body: said("Yes. " * 40))
    for number in range(6):
        page.ask(f"Question {number}")
    stored = json.loads(page.run("return sessionStorage.getItem('chat stub ' + '0'.repeat(16))"))
    assert len(stored["messages"]) == 6 + 1  # six questions; their answers were all the same
    assert stored["turns"][-1]["answers"][0]["body"]["messages"] == [0, 1, 2, 1, 3, 1, 4, 1, 5, 1, 6]
