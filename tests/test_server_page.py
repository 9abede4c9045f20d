"""The chat page in a real browser without a screen: Chromium, driven by selenium."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests import serving
from tests.serving import Server

pytest.importorskip("uvicorn")
selenium = pytest.importorskip("selenium", reason="selenium is not installed")
BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
DRIVER = shutil.which("chromedriver")
if BROWSER is None or DRIVER is None:
    pytest.skip("there is no Chromium with its chromedriver here", allow_module_level=True)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    model = serving.tiny_chat_model(tmp_path_factory.mktemp("page"))
    with serving.process(model, "--chat-format", "llama3", "-c", "600", "-s", "7", "--alias", "<b>tiny</b>") as running:
        yield running


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = BROWSER
    profile = tmp_path_factory.mktemp("profile")
    for option in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage",
                   "--window-size=900,700", f"--user-data-dir={profile}"):  # fmt: skip
        options.add_argument(option)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=Service(DRIVER))
    yield driver
    driver.quit()


@pytest.fixture
def page(browser: Any, server: Server) -> Any:
    browser.get(server.url)
    serving.wait_until(lambda: "tokens of context" in text(browser, "#model"), "the page did not greet")
    return browser


def text(page: Any, selector: str) -> str:
    return str(page.execute_script("return document.querySelector(arguments[0]).textContent", selector))


def fill(page: Any, name: str, value: str) -> None:
    page.execute_script("document.getElementById(arguments[0]).value = arguments[1]", name, value)


def click(page: Any, name: str) -> None:
    page.execute_script("document.getElementById(arguments[0]).click()", name)


def messages(page: Any) -> list[str]:
    return list(page.execute_script("return [...document.querySelectorAll('.message')].map(m => m.textContent)"))


def idle(page: Any) -> None:
    serving.wait_until(lambda: page.execute_script("return document.body.dataset.state") == "idle", "still busy")


def test_a_conversation(page: Any, tmp_path: Path) -> None:
    fill(page, "max_tokens", "20")
    for turn in (1, 2):
        fill(page, "prompt", f"<img src=x onerror=alert({turn})> & hello")
        click(page, "send")
        idle(page)
        assert len(messages(page)) == 2 * turn and messages(page)[-1]
    assert messages(page)[0] == "<img src=x onerror=alert(1)> & hello"
    assert "20 tokens, " in text(page, "#stats") and "seed 7" in text(page, "#stats")
    assert "(0 reused)" not in text(page, "#stats")  # the second question found the first in the context
    assert text(page, "#model").startswith("<b>tiny</b>")
    assert page.execute_script("return document.querySelectorAll('img, b').length") == 0
    assert page.save_screenshot(str(tmp_path / "page.png")) and (tmp_path / "page.png").stat().st_size > 5000
    click(page, "clear")
    assert messages(page) == []
    problems = [entry for entry in page.get_log("browser") if entry["level"] in ("SEVERE", "WARNING")]
    assert problems == []


def test_stop_ends_the_answer_on_the_server_too(page: Any, server: Server) -> None:
    page.execute_script("window.request = () => ({messages: conversation, stream: true, max_tokens: 1e6, "
                        "stream_options: {include_usage: true}, logit_bias: {2: -100, 3: -100}})")  # fmt: skip
    fill(page, "prompt", "Go on for ever")
    click(page, "send")
    serving.wait_until(lambda: len(messages(page)) == 2 and len(messages(page)[1]) > 5, "nothing came")
    assert server.metric("trit_running") == 1
    click(page, "stop")
    idle(page)
    server.wait_for("trit_running", 0)
    assert text(page, "#stats") == "stopped" and len(messages(page)) == 2


def test_errors_are_shown(page: Any) -> None:
    fill(page, "temperature", "9")
    fill(page, "prompt", "Hello")
    click(page, "send")
    idle(page)
    assert text(page, "#error") == "temperature must be a number from 0 to 2, got 9"
    assert messages(page) == [] and page.execute_script("return document.getElementById('prompt').value") == "Hello"
    page.get_log("browser")  # the refused request is logged there
