"""The page in a browser: a whole conversation, errors as they are, text that would be markup, the keyboard.

A browser must be there: without one these fail.
"""

import json
import os
import struct
from collections.abc import Iterator
from pathlib import Path
from urllib.request import urlopen

import pytest
from chromium import Tab, chromium
from told import told

pytestmark = pytest.mark.slow

RAIN = "Does it rain in Ulm tomorrow? I want to cycle."
FORECAST = '{"rain_mm": [0, 0, 2, 5], "wind_kmh": 12}'
THOUGHT = "They want to go by bicycle tomorrow. I have no forecast of my own, so I call the tool."
MARKUP = "<img src=/x onerror=alert(1)> <script>alert(2)</script>"
HOSTILE = f"{MARKUP} **<b>bold</b>** `<i>` [a](javascript:alert(3))"
LISTS = "- a\n  - b\n* c\n\n3. three\n4. **four**"
SEVERAL = f"# Head\n\nOne\nparagraph.\n\n{LISTS}\n\n| x | y |\n|---|---|\n\n```\n<p>\n\n- no item"
FINAL, CALL = "<|channel|>final<|message|>", "<|channel|>commentary <|constrain|>json<|message|>"
SCRIPTS = {
    RAIN: f"<|channel|>analysis<|message|>{THOUGHT}<|end|><|start|>assistant to=functions.weather{CALL}"
    '{"city": "Ulm", "days": 1}<|call|>',
    FORECAST: "<|channel|>analysis<|message|>Four parts of a day: dry until noon, then 2 mm, in the evening 5.<|end|>"
    f"<|start|>assistant{FINAL}**Go in the morning.** It stays dry until noon, with a light wind of `12 km/h`:\n\n"
    "1. before noon: dry\n2. afternoon: some showers, **2 mm**\n3. evening: steady rain, **5 mm**\n\n"
    'For your own checks:\n\n```python\ndry = [mm == 0 for mm in forecast["rain_mm"]]\n```\n<|return|>',
    "hostile": f"<|channel|>analysis<|message|>{HOSTILE}<|end|><|start|>assistant to=functions.<u>x</u>{CALL}"
    f'{{"<b>": "{HOSTILE}"}}<|call|>',
    "hostile too": f"{FINAL}{HOSTILE}\n\n- {HOSTILE}\n\n```html\n{HOSTILE}\n```<|return|>",
    "lists": f"{FINAL}{SEVERAL}<|return|>",
    "long": f"{FINAL}{'word ' * 3000}<|return|>",
}
TOOLS = [{"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "properties": {}}}}]


@pytest.fixture(scope="module")
def at(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with told(tmp_path_factory.mktemp("told"), SCRIPTS, pace_s=0.01) as address:
        yield address


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Tab]:
    with chromium(tmp_path_factory.mktemp("chromium")) as tab:
        yield tab


@pytest.fixture
def tab(browser: Tab, at: str) -> Iterator[Tab]:
    """The page, as if nobody had been there; at the end the browser has nothing to complain of."""
    browser.look(960, 900)
    browser.go(at + "/")
    browser.value("sessionStorage.clear()")
    browser.go(at + "/")
    yield browser
    assert browser.complaints == []


def figure(at: str, name: str) -> float:
    with urlopen(at + "/metrics", timeout=20) as found:
        lines = found.read().decode().splitlines()
    return next(float(line.split()[1]) for line in lines if line.startswith(f"{name} "))


def ask(tab: Tab, text: str) -> None:
    """And wait for the end of the answer."""
    answers = "document.querySelectorAll('.answer')"
    count = tab.value(f"document.getElementById('text').focus(), {answers}.length")
    tab.write(text)
    tab.press("Enter")
    tab.until(f"{answers}.length == {count + 1} && {answers}[{count}].dataset.ended")


def put(tab: Tab, **fields: str) -> None:
    """Values of the settings, as somebody would type them."""
    tab.click("#open")
    for name, value in fields.items():
        tab.value(f"document.querySelector('[name={name}]').focus(), document.execCommand('selectAll')")
        tab.write(value)
    tab.press("Escape")


def test_a_conversation(tab: Tab, at: str) -> None:
    """Reasoning is folded away; a call is shown, and its result sent; what came is told. Its picture may be kept."""
    tab.until("document.getElementById('model').textContent == 'scripted' && document.title == 'scripted · epmoe'")
    put(tab, system="Be brief.", tools=json.dumps(TOOLS))
    ask(tab, RAIN)
    assert tab.text(".user") == RAIN
    assert tab.text(".thought summary") == f"Reasoning, {len(THOUGHT.split())} words"
    assert tab.value("document.querySelector('.thought').open") is False
    assert tab.value("document.querySelector('.thought > div').textContent") == THOUGHT
    assert tab.text(".call figcaption") == "calls weather"
    assert json.loads(tab.text(".call pre")) == {"city": "Ulm", "days": 1}

    tab.write(FORECAST)  # the focus is there
    tab.click(".results")
    tab.until("document.querySelectorAll('.answer').length == 2 && !document.getElementById('send').hidden")
    assert tab.text(".answer strong") == "5 mm" and tab.text(".answer p code") == "12 km/h"
    assert tab.value("[...document.querySelectorAll('.answer ol li')].map(each => each.value)") == [1, 2, 3]
    assert tab.text(".answer > div > pre") == 'dry = [mm == 0 for mm in forecast["rain_mm"]]'
    assert not tab.value("document.querySelector('.results') || document.querySelector('.error')")
    rate, first, tokens, prompt = tab.text(".foot span").split(" · ")
    assert 0 < float(rate.removesuffix(" tokens/s")) < 100 and first.startswith("first token ")
    assert int(tokens.split()[0]) > 50 and prompt.endswith(" from cache") and " 0 from" not in prompt

    tab.click(".thought summary")
    for name in ("step", "hits", "used", "waiting"):
        tab.until(f"document.getElementById('{name}').textContent != '–'")
    tab.until("document.getElementById('running').textContent == '0'")
    picture = tab.picture()
    assert struct.unpack(">II", picture[16:24]) == (960, 900) and len(picture) < 200_000
    if kept := os.environ.get("EPMOE_PAGE_PNG"):
        Path(kept).write_bytes(picture)


def test_text_is_never_markup(tab: Tab) -> None:
    elements = "document.querySelectorAll('.answer :is(img, script, b, i, u, a)').length"
    for message in ("hostile", "hostile too"):
        ask(tab, message)
        assert tab.value(elements) == 0
    shown = tab.value("[...document.querySelectorAll('.answer')].map(each => each.textContent).join('')")
    assert shown.count(MARKUP) == 5
    ask(tab, HOSTILE)  # the fake says it again
    assert tab.value("document.querySelectorAll('#log :is(img, script, b, i, a)').length") == 0


def test_markdown(tab: Tab) -> None:
    ask(tab, "lists")
    shape = "[...document.querySelector('.answer > div').children].map(each => [each.tagName, each.textContent])"
    assert tab.value(shape) == [
        ["H3", "Head"], ["P", "One\nparagraph."], ["UL", "abc"], ["OL", "threefour"], ["PRE", "| x | y |\n|---|---|"],
        ["PRE", "<p>\n\n- no item"],
    ]  # fmt: skip
    found = tab.value("[...document.querySelectorAll('.answer li')].map(each => [each.dataset.depth, each.value])")
    assert [(depth, value) for depth, value in found] == [("0", 0), ("1", 0), ("0", 0), ("0", 3), ("0", 4)]


@pytest.mark.parametrize("how", ["button", "Escape", "new chat"])
def test_stop_ends_the_request(tab: Tab, at: str, how: str) -> None:
    """On the server, too; what has come stays, and the conversation goes on."""
    tab.value("document.getElementById('text').focus()")
    tab.write("long")
    tab.press("Enter")
    tab.until("document.querySelector('.answer > div')?.textContent.length > 50")
    assert figure(at, "epmoe_requests_running") <= 1  # it is told once a second
    match how:
        case "button":
            tab.click("#stop")
        case "Escape":
            tab.press("Escape")
        case _:
            tab.click("#fresh")
    tab.until("document.getElementById('stop').hidden && !document.getElementById('send').hidden")
    tab.until("document.getElementById('running').textContent == '0'")
    assert figure(at, "epmoe_completion_tokens_total") < 2500
    if how == "new chat":
        assert tab.value("document.getElementById('log').children.length") == 0
    else:
        assert tab.text(".foot span").endswith("stopped") and not tab.value("document.querySelector('.error')")
    ask(tab, "lists")
    assert tab.text(".answer h3") == "Head"


def test_errors_are_shown_as_they_are(tab: Tab, at: str) -> None:
    put(tab, temperature="-1")
    ask(tab, "lists")
    said = tab.text(".error")
    assert said.startswith("400 ") and "temperature" in said and "invalid_request_error" in said
    tab.complaints.clear()  # a browser tells of each status that is none of success
    put(tab, temperature="0.5")
    tab.click(".again")
    tab.until("document.querySelector('.answer').dataset.ended == 'stop' && !document.querySelector('.error')")
    put(tab, tools="[{")
    ask(tab, "lists")
    assert tab.text(".error").startswith("Tools are no JSON: ")
    tab.value("window.fetch = () => Promise.reject(new TypeError('gone')), 0")
    put(tab, tools="[]")
    ask(tab, "lists")
    assert tab.text(".error") == "The server cannot be reached: gone"
    tab.until("document.getElementById('running').textContent == '–'")


def test_settings_reach_the_request(tab: Tab) -> None:
    put(tab, max_tokens="3")
    ask(tab, "lists")
    assert tab.text(".foot span").split(" · ")[2::2] == ["3 tokens", "cut at its length"]
    before = int(tab.text(".foot span").split("prompt ")[1].split(",")[0])
    tab.click("#fresh")
    put(tab, system="A system message.")
    tab.value("document.querySelector('[name=reasoning_effort]').value = 'high'")
    ask(tab, "lists")
    after = int(tab.text(".foot span").split("prompt ")[1].split(",")[0])
    assert after == before + len("A system message.") + len("system") + 3 + len("high")
    tab.call("Page.reload")
    tab.until("document.readyState == 'complete' && document.querySelector('[name=system]').value")
    assert tab.value("[document.querySelector('[name=max_tokens]').value, localStorage.length]") == ["3", 0]


def test_keyboard(tab: Tab) -> None:
    assert tab.value("document.activeElement.id") == "text"
    tab.press("Enter")  # nothing to send
    assert tab.value("document.querySelectorAll('#log > *').length") == 0
    tab.write("two")
    tab.press("Enter", shift=True)
    tab.write("lines")
    assert tab.value("document.getElementById('text').value") == "two\nlines"
    tab.press("Enter")
    tab.until("document.querySelector('.answer')?.dataset.ended")
    assert tab.text(".user") == "two\nlines"
    tab.value("document.activeElement.blur()")
    tab.press("/")
    assert tab.value("[document.activeElement.id, document.getElementById('text').value]") == ["text", ""]
    tab.click("#open")
    assert tab.value("document.activeElement.name") == "system"
    tab.press("Escape")
    assert tab.value("document.getElementById('settings').hidden")


@pytest.mark.parametrize(("width", "dark"), [(360, False), (360, True), (1600, False)])
def test_it_fits_any_window(tab: Tab, width: int, dark: bool) -> None:
    tab.look(width, 700, dark=dark)
    ask(tab, FORECAST)
    tab.click("#open")
    assert tab.value("document.documentElement.scrollWidth") <= width
    light = tab.value("getComputedStyle(document.body).backgroundColor.match(/\\d+/)[0] > 128")
    assert light is not dark


def test_a_key_is_asked_for_and_sent(browser: Tab, tmp_path: Path) -> None:
    with told(tmp_path, SCRIPTS, key="secret") as address:
        browser.go(address + "/")
        browser.until("document.activeElement.name == 'key'")
        browser.write("secret")
        browser.press("Escape")
        browser.until("document.getElementById('model').textContent == 'scripted'")
        ask(browser, "lists")
        assert browser.text(".answer h3") == "Head"
        assert all("401" in each for each in browser.complaints)
        browser.complaints.clear()
