"""The page in a real browser, as a person uses it."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from selenium import webdriver
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.remote.webelement import WebElement

CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
needs_chromium = pytest.mark.skipif(
    not (CHROMIUM and DRIVER), reason="no chromium and chromedriver here (Debian: chromium, chromium-driver)"
)
PATIENCE_S = 60  # only ever waited for in full when something is broken


class Page:
    """The page as a person uses it: what is seen, what is typed, what is clicked."""

    def __init__(self, browser: webdriver.Chrome) -> None:
        self.browser = browser

    def open(self, port: int) -> None:
        self.browser.get(f"http://127.0.0.1:{port}/")
        self.wait_loaded()

    def reload(self) -> None:
        self.browser.refresh()
        self.wait_loaded()

    def wait_loaded(self) -> None:
        self.until(lambda: self.browser.find_elements(By.CSS_SELECTOR, "body[data-mode]") or self.alerts())

    def fit(self, width: int, height: int = 800) -> None:
        """The page at this size, as a phone has it."""
        metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 1000}
        self.browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)

    def run(self, script: str, *values: object) -> Any:
        return self.browser.execute_script(script, *values)

    def one(self, css: str) -> WebElement:
        return self.browser.find_element(By.CSS_SELECTOR, css)

    def all(self, css: str) -> list[WebElement]:
        return [found for found in self.browser.find_elements(By.CSS_SELECTOR, css) if found.is_displayed()]

    def until(self, holds: Callable[[], object]) -> None:
        end = time.monotonic() + PATIENCE_S
        while not holds():
            assert time.monotonic() < end, self.one("body").text
            time.sleep(0.02)

    def slide(self, name: str, value: int) -> None:
        """By the keyboard, as sliders are."""
        slider = self.one(f"input[name='{name}']")
        slider.send_keys(Keys.HOME, Keys.RIGHT * (value - int(slider.get_attribute("min"))))

    def set(self, css: str, text: str) -> None:
        self.one(css).clear()
        self.one(css).send_keys(text)

    def ask(self, prompt: str) -> None:
        """Type the prompt, send it and wait until every answer has ended."""
        self.set("#prompt", prompt)
        self.press("Send")
        self.settle()

    def press(self, name: str, place: int = -1) -> None:
        found = [button for button in self.all("button") if button.text == name]
        assert found, f"no button {name!r}: {[button.text for button in self.all('button')]}"
        found[place].click()

    def settle(self) -> None:
        self.until(lambda: not self.all(".answer[aria-busy=true]"))

    def answers(self, side: str = "") -> list[str]:
        return [found.text for found in self.all(f".answer{side and '.'}{side} .text")]

    def alerts(self) -> list[str]:
        return [alert.text for alert in self.all(".error")]

    def record_requests(self) -> None:
        """From now on, keep what the page really sends."""
        self.browser.execute_script(
            "window.sent = []; const real = window.fetch;"
            "window.fetch = (path, init) => { sent.push(init?.body); return real(path, init); };"
        )

    def sent(self) -> list[dict]:
        return [json.loads(body) for body in self.browser.execute_script("return sent") if body]

    def request(self, form: str, answer: int = -1) -> str:
        """The request of an answer, as it lies on the clipboard."""
        self.press("Request", answer)
        self.press(form)
        self.press("Copy")
        self.until(lambda: self.one("#copy").text == "Copied")
        self.press("Close")
        return self.browser.execute_async_script("navigator.clipboard.readText().then(arguments[0])")


@contextmanager
def chromium(profile: Path) -> Iterator[webdriver.Chrome]:
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM or ""
    for flag in (
        *("headless", "no-sandbox", "disable-gpu", "disable-quic", "no-first-run", "disable-sync"),
        *("disable-background-networking", "disable-component-update", "window-size=1280,900"),
        f"user-data-dir={profile}",
    ):
        options.add_argument(f"--{flag}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options, Service(DRIVER))
    try:
        permissions = {"permissions": ["clipboardReadWrite", "clipboardSanitizedWrite"]}
        driver.execute_cdp_cmd("Browser.grantPermissions", permissions)
        yield driver
    finally:
        driver.quit()


@contextmanager
def fresh_page(browser: webdriver.Chrome) -> Iterator[Page]:
    """A page that knows nothing of the one before. It may leave neither exceptions nor violations of its policy."""
    browser.get("about:blank")
    browser.get_log("browser")
    yield Page(browser)
    # Answers with an error status are what some tests ask for.
    noise = [entry["message"] for entry in browser.get_log("browser") if entry["source"] != "network"]
    assert not noise
    if browser.current_url.startswith("http"):
        browser.execute_script(
            "sessionStorage.clear(); localStorage.clear(); addEventListener('pagehide', () => sessionStorage.clear())"
        )
    browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
