"""The page in a browser: what one can do with it, by mouse and by keys, and what it never does."""

from __future__ import annotations

import asyncio
import base64
import json
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import httpx
import pytest
from selenium.webdriver import Chrome
from selenium.webdriver.common.keys import Keys

from tests.actors.edge.running import edge_config, running_edge
from tests.clips import make_clip
from tests.system.browser import Page
from tests.system.server import Server
from vlmrt.runtime.config import ApiKey, ServerOptions
from vlmrt.tools.checkpoint import make_checkpoint

DOCS = Path(__file__).parents[2] / "docs"
Opener = Callable[..., Page]

# In the page, before its own scripts: chat completions are answered by `window.answer(body)`, an async function that
# returns what goes into the stream piece by piece.  An Error among the pieces breaks the connection there.
ANSWERED_HERE = """
const real = window.fetch;
window.asked = [];
window.fetch = async (address, options) => {
  if (!String(address).endsWith("chat/completions")) return real(address, options);
  window.asked.push(JSON.parse(await new Response(options.body).text()));
  const pieces = PIECES;
  return new Response(new ReadableStream({
    async pull(controller) {
      const piece = pieces.shift();
      if (piece === undefined) controller.close();
      else if (piece === null) controller.error(new TypeError("network error"));
      else controller.enqueue(new TextEncoder().encode(piece));
    }
  }), {headers: {"content-type": "text/event-stream", "x-request-id": "r1"}});
};
"""


def answered_here(pieces: Sequence[str | None]) -> str:
    return ANSWERED_HERE.replace("PIECES", json.dumps(pieces))


def chunk(text: str, num_tokens: int = 1, finish_reason: str | None = None) -> str:
    usage = {"prompt_tokens": 7, "completion_tokens": num_tokens, "total_tokens": 7 + num_tokens}
    choice = {"index": 0, "delta": {"content": text}, "finish_reason": finish_reason}
    return f"data: {json.dumps({'choices': [choice], 'usage': usage})}\n\n"


END = chunk("", 9, "stop") + "data: [DONE]\n\n"


@pytest.fixture
def open_page(browser: Chrome, demo_server: Server) -> Iterator[Opener]:
    """Opens the page; at the end of the test no page has broken its policy, complained, or asked another host."""
    opened: list[Page] = []

    def check() -> None:
        for page in opened:
            assert page.complaints() == []
            assert page.requested_hosts() == {page.url.removeprefix("http://")}
        opened.clear()

    def open_page(before: str = "", **options: Any) -> Page:
        check()
        opened.append(Page(browser, options.pop("url", demo_server.url), before, **options))
        return opened[-1]

    yield open_page
    check()
    browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


def test_a_picture_is_shown_sent_and_answered_in_a_stream(open_page: Opener) -> None:
    page = open_page()
    page.wait(lambda: page.texts("#model-name") == ["vlmrt-demo"], "model name")
    page.attach(DOCS / "shapes.png")
    page.wait_for_attachments(1)
    page.run(
        "window.lengths = new Set();"
        "const look = () => lengths.add(document.querySelector('.answer .prose')?.textContent.length ?? 0);"
        "new MutationObserver(look).observe(document.querySelector('#turns'), {childList: true, subtree: true,"
        " characterData: true})"
    )
    answer = page.ask("Describe the image.")
    assert all(word in answer for word in ("red circle", "blue square", "yellow star"))
    assert page.run("return lengths.size") > 2  # it grew
    assert page.run("return document.querySelector('.question img').naturalWidth") > 0
    (figures,) = page.texts(".figures")
    assert re.fullmatch(r"TTFT \S+ m?s · \S+ tokens/s · \d+ tokens · prompt \d+( \(\d+ cached\))?", figures), figures
    assert page.all("#attachments .tile") == []
    assert page.ask("How many shapes are there?") == "Three."  # the picture is sent with every turn


PICTURES = """
const [how, ...encoded] = arguments;
const files = encoded.map((text, i) => {
  const bytes = Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0));
  return new File([bytes], `${how}-${i}.png`, {type: "image/png"});
});
const transfer = new DataTransfer();
files.forEach((file) => transfer.items.add(file));
const target = document.querySelector("#message");
const common = {bubbles: true, cancelable: true};
if (how === "paste") target.dispatchEvent(new ClipboardEvent("paste", {...common, clipboardData: transfer}));
else for (const type of ["dragenter", "dragover", "drop"]) {
  target.dispatchEvent(new DragEvent(type, {...common, dataTransfer: transfer}));
}
"""


def encoded(name: str) -> str:
    return base64.b64encode((DOCS / name).read_bytes()).decode()


def test_pictures_come_by_paste_and_by_drop(open_page: Opener) -> None:
    page = open_page()
    page.run(PICTURES, "paste", encoded("circle.png"))
    page.wait_for_attachments(1)
    page.run(PICTURES, "drop", encoded("square.png"), encoded("shapes.png"))
    page.wait_for_attachments(3)
    assert not page.one("#drop-veil").is_displayed()
    page.one("[aria-label='Remove drop-1.png']").click()
    page.wait_for_attachments(2)
    assert page.focused() == "Remove drop-0.png"
    assert page.ask("Are these images different?").startswith("Yes")


def test_a_clip_is_shown_sent_and_answered(open_page: Opener, tmp_path: Path) -> None:
    page = open_page()
    (tmp_path / "walk.mp4").write_bytes(make_clip(num_frames=12))
    page.attach(tmp_path / "walk.mp4")
    page.wait_for_attachments(1)
    page.wait(lambda: page.run("return document.querySelector('.tile video').videoWidth") == 160, "preview")
    assert page.ask("Describe the video.")
    assert page.texts(".turns .failure") == []
    assert int(re.findall(r"prompt (\d+)", page.texts(".figures")[0])[0]) > 20  # its frames are in it


def test_stop_ends_the_answer_here_and_on_the_server(open_page: Opener, demo_server: Server) -> None:
    page = open_page(  # the demo model never has so much to say by itself
        "const real = fetch; window.fetch = async (address, options) => {"
        " if (!String(address).endsWith('chat/completions')) return real(address, options);"
        " const body = JSON.parse(await new Response(options.body).text());"
        " return real(address, {...options, body: JSON.stringify({...body, ignore_eos: true})}); }"
    )
    page.one("#message").send_keys("What can you do?")
    page.one("#send").click()
    page.wait(lambda: page.texts(".answer .prose") not in ([], [""]), "first words")
    page.one("#stop").click()
    answer = page.answer()
    assert answer
    assert page.texts(".ending") == ["Stopped."]
    assert page.one("#send").is_displayed()
    assert not page.one("#stop").is_displayed()
    demo_server.wait_until(
        lambda: httpx.get(f"{demo_server.url}/load", timeout=5).json()["server_load"] == 0, "the end on the server"
    )
    page.driver.refresh()  # without the option above
    page.wait(lambda: page.all("html[data-started]"), "the page again")


def test_all_of_it_can_be_done_by_keys(open_page: Opener) -> None:
    page = open_page(answered_here([chunk("Fine."), END]))
    page.press(Keys.TAB)
    assert page.focused() == "Skip to the message box"
    page.press(Keys.ENTER)
    assert page.focused() == "message"
    page.press("One line")
    page.press_with_shift(Keys.ENTER)
    page.press("and another", Keys.ENTER)
    assert page.answer() == "Fine."
    assert page.texts(".said") == ["One line\nand another"]
    assert page.focused() == "message"
    order = []
    for _ in range(3):
        page.press(Keys.TAB)
        order.append(page.focused())
    assert order == ["attach", "link", "send"]
    page.press_with_shift(Keys.TAB)
    page.press(Keys.ENTER)
    assert page.focused() == "link-url"
    page.press(Keys.ESCAPE)
    assert page.focused() == "message"
    page.run("document.querySelector('#settings-toggle').focus()")
    page.press(Keys.ENTER)
    assert page.focused() == "settings-close"
    assert page.one("#settings-toggle").get_attribute("aria-expanded") == "true"
    page.press(Keys.TAB, Keys.TAB, Keys.TAB)
    assert page.focused() == "temperature"
    page.press("0.5", Keys.ESCAPE)
    assert page.focused() == "settings-toggle"
    assert not page.one("#settings").is_displayed()
    page.run("document.querySelector('.answer [aria-label=Regenerate]').focus()")
    page.press(Keys.ENTER)
    page.wait(lambda: page.run("return window.asked.length") == 2, "second request")
    assert page.run("return [asked[0].temperature, asked[1].temperature]") == [None, 0.5]
    assert page.answer() == "Fine."


def test_stats_show_the_service_only_while_they_are_looked_at(open_page: Opener) -> None:
    page = open_page(
        "const [set, clear] = [setTimeout, clearTimeout]; window.waiting = new Set();"
        "window.setTimeout = (run, delay, ...more) => {"
        "  const id = set(() => { waiting.delete(id); run(); }, delay, ...more);"
        "  if (delay === 2000) waiting.add(id); return id; };"
        "window.clearTimeout = (id) => { waiting.delete(id); clear(id); };"
    )
    page.ask("What can you do?")
    assert page.run("return waiting.size") == 0
    page.one("#link-stats").click()
    page.wait(lambda: re.search(r"[1-9]\d* answered", "".join(page.texts(".stats-head .note"))), "answers in the stats")
    actors = page.texts("tbody tr:has(.badge) th")
    assert {"edge:0", "scheduler:0", "llm:0", "vit:0", "media:0"} <= set(actors)
    assert set(page.texts(".badge")) == {"ready"}
    latency = page.texts("[aria-label=Latency] tbody tr:first-child td")
    assert int(latency[0]) >= 1
    assert all(re.fullmatch(r"\S+ m?s", cell) for cell in latency[1:5]), latency
    page.wait(lambda: page.run("return waiting.size") == 1, "plan to ask again")
    page.one("#link-chat").click()
    page.wait(lambda: page.run("return waiting.size") == 0, "end of the asking")
    assert page.texts(".answer .prose") != []


def test_the_policy_holds_in_the_browser_and_these_tests_would_notice(browser: Chrome, demo_server: Server) -> None:
    page = Page(browser, demo_server.url)
    assert page.complaints() == []
    outcomes = page.driver.execute_async_script(
        "const done = arguments[0]; const outcomes = [];"
        "const attempt = (run) => { try { run(); outcomes.push('ran') } catch (error) { outcomes.push(error.name) } };"
        "attempt(() => { document.body.innerHTML = '<p>' });"
        "attempt(() => { document.createElement('script').text = 'window.hurt = 1' });"
        "const image = new Image(); image.src = 'http://127.0.0.1:9/a.png';"
        "image.onerror = () => fetch('http://127.0.0.1:9/').catch(() => done(outcomes));"
    )
    assert outcomes == ["TypeError", "TypeError"]
    told = "\n".join(page.complaints())
    for complaint in ("requires 'TrustedHTML'", "requires 'TrustedScript'", "a.png", "Refused to connect"):
        assert complaint in told
    assert "127.0.0.1:9" in page.requested_hosts()  # which counts what the browser refused to send


NASTY = (
    "<img src=x onerror=window.hurt=1><script>window.hurt=2</script>\n\n"
    "- <b onclick=hurt()>list</b> with **<i>bold</i>** and `<u>code</u>`\n\n"
    "```html\n<iframe src=javascript:alert(1)></iframe>\n```\n"
    "[click](javascript:alert(1)) ![](http://203.0.113.7/a.png)"
)


def test_what_a_model_writes_stays_text(open_page: Opener) -> None:
    pieces = [chunk(NASTY[place : place + 5]) for place in range(0, len(NASTY), 5)]
    page = open_page(answered_here([*pieces, END]))
    page.one("#message").send_keys("<img src=x onerror=window.hurt=3>")
    page.ask("")
    shown = "".join(page.texts(".answer .prose"))
    for piece in ("<img src=x onerror=window.hurt=1>", "<script>window.hurt=2</script>", "<b onclick=hurt()>list</b>",
                  "<iframe src=javascript:alert(1)></iframe>", "![](http://203.0.113.7/a.png)"):  # fmt: skip
        assert piece in shown
    assert page.texts(".said") == ["<img src=x onerror=window.hurt=3>"]
    assert page.all(".turns :is(img, script, b, i, u, iframe, a)") == []
    assert page.texts(".prose strong") == ["<i>bold</i>"]
    assert page.texts(".prose li code") == ["<u>code</u>"]
    assert page.texts(".prose pre code") == ["<iframe src=javascript:alert(1)></iframe>\n"]
    assert page.run("return window.hurt") is None


MARKDOWN = """# Title

First line
second line with **bold** and `code`.

1. one
2. two

- a
  - nested
* b

```python
def f():
    return "```"

```

~~~
tilde
~~~
last - not a list, 1. nor this
"""


@pytest.mark.parametrize("size", [1, 2, 7, 10_000])
def test_an_answer_looks_the_same_however_it_is_cut_into_pieces(size: int, open_page: Opener) -> None:
    page = open_page()
    pieces = [MARKDOWN[place : place + size] for place in range(0, len(MARKDOWN), size)]
    shown = page.driver.execute_async_script(
        "const [pieces, done] = arguments; import('./page/prose.js').then(({Prose}) => {"
        " const root = document.createElement('div'); const prose = new Prose(root, () => {});"
        " pieces.forEach((piece) => prose.append(piece)); prose.end();"
        " done([...root.children].map((node) => [node.tagName, node.querySelector('code[class], pre code')?.textContent"
        " ?? [...node.childNodes].map((inner) => inner.textContent).join('|')])); })",
        pieces,
    )
    assert shown == [
        ["H3", "Title"],
        ["P", "First line|\n|second line with |bold| and |code|.|\n"],
        ["OL", "one|two"],
        ["UL", "a|nested|b"],
        ["DIV", 'def f():\n    return "```"\n\n'],
        ["DIV", "tilde\n"],
        ["P", "last - not a list, 1. nor this|\n"],
    ]


def test_a_long_answer_is_drawn_by_frames_and_not_by_tokens(open_page: Opener) -> None:
    words = [f"word{number}{'. ' if number % 9 else chr(10) * 2}" for number in range(5000)]
    pieces = ["".join(map(chunk, words[place : place + 50])) for place in range(0, len(words), 50)]
    page = open_page(answered_here([*pieces, END]))
    page.run(
        "window.rounds = 0; new MutationObserver(() => { rounds += 1; }).observe(document.querySelector('#turns'),"
        " {childList: true, subtree: true, characterData: true})"
    )
    answer = page.ask("Tell me a long story")
    assert answer.split() == " ".join(words).split()
    assert page.run("return rounds") < len(words) / 10


def test_a_screen_reader_hears_the_answer_once_and_whole(open_page: Opener) -> None:
    page = open_page(answered_here([chunk("One "), chunk("two "), chunk("three."), END]))
    page.run(
        "window.heard = []; const announcer = document.querySelector('#announcer');"
        "new MutationObserver(() => heard.push(announcer.textContent)).observe(announcer, {childList: true})"
    )
    page.ask("Count.")
    page.wait(lambda: len(page.run("return heard")) >= 2, "announcement")
    assert page.run("return heard") == ["The answer is being written.", "Answer: One two three."]
    assert page.one("#transcript").get_attribute("aria-live") == "off"


def test_every_control_has_a_name(open_page: Opener) -> None:
    page = open_page(answered_here([chunk("Fine.\n\n```\nx\n```\n"), END]))
    page.attach(DOCS / "circle.png")
    page.wait_for_attachments(1)
    page.ask("What is this?")
    page.attach(DOCS / "circle.png")
    page.wait_for_attachments(1)
    page.one("#link").click()
    page.one("#settings-toggle").click()
    page.one("#settings summary").click()
    nodes = page.driver.execute_cdp_cmd("Accessibility.getFullAXTree", {})["nodes"]
    roles = ("button", "textbox", "searchbox", "combobox", "spinbutton", "link", "checkbox", "image", "log", "region")
    controls = [(node["role"]["value"], node.get("name", {}).get("value", "")) for node in nodes
                if not node["ignored"] and node["role"]["value"] in roles]  # fmt: skip
    assert len(controls) > 30
    assert [control for control in controls if not control[1].strip()] == []


def test_errors_of_the_server_are_shown_with_their_message(open_page: Opener) -> None:
    page = open_page(expects_failures=True)
    page.run(PICTURES, "paste", base64.b64encode(b"no picture at all").decode())
    page.wait_for_attachments(1)
    page.ask("What is this?")
    assert "image" in page.texts(".failure p")[0]
    assert re.search(r"HTTP 400 · \w+ · request \w+", page.texts(".failure .note")[0])
    assert page.one("#send").is_displayed()
    again = page.one(".answer .turn-foot button:last-child")
    assert again.text == "Try again"


def test_a_lost_connection_keeps_what_has_come(open_page: Opener) -> None:
    page = open_page(answered_here([chunk("Half an "), None]))
    assert page.ask("Well?") == "Half an"
    assert page.texts(".failure p") == [
        "The connection was lost before the answer was complete.",
    ]


def test_an_error_within_a_stream_is_shown(open_page: Opener) -> None:
    error = {"message": "the engine has restarted", "type": "server_error", "param": None, "code": "engine_lost"}
    page = open_page(answered_here([chunk("Half"), f"data: {json.dumps({'error': error})}\n\ndata: [DONE]\n\n"]))
    assert page.ask("Well?") == "Half"
    assert page.texts(".failure p") == ["the engine has restarted", "engine_lost · request r1"]


def test_a_server_that_is_not_ready_is_told_until_it_is(open_page: Opener) -> None:
    page = open_page(
        "const real = fetch; let asked = 0; window.fetch = (address, options) =>"
        " String(address) === 'health' && asked++ < 1"
        " ? Promise.resolve(new Response(JSON.stringify({ready: false, down: ['llm:0 (starting)']}), {status: 503}))"
        " : real(address, options)"
    )
    page.wait(lambda: page.all(".notice"), "notice")
    assert "llm:0 (starting)" in page.texts(".notice p")[0]
    page.wait(lambda: not page.all(".notice"), "end of the notice")
    assert page.texts("#state-text") == [", ready"]


def test_files_that_the_server_would_refuse_are_refused_before_they_are_sent(open_page: Opener) -> None:
    page = open_page()
    page.run(
        "const give = (...files) => { const transfer = new DataTransfer(); files.forEach((f) => transfer.items.add(f));"
        " document.dispatchEvent(new ClipboardEvent('paste', {clipboardData: transfer, bubbles: true})) };"
        "window.give = give; give(new File([new Uint8Array(49 * 2 ** 20)], 'huge.png', {type: 'image/png'}))"
    )
    page.wait(lambda: page.all(".notice"), "notice")
    assert page.texts(".notice p") == [
        "“huge.png” has 49.0 MiB, 65.3 MiB as it is sent; a request may have 64 MiB here."
    ]
    page.run("give(new File(['text'], 'notes.txt', {type: 'text/plain'}))")
    page.wait(lambda: "neither" in "".join(page.texts(".notice p")), "notice about the text")
    assert page.texts(".notice p") == ["“notes.txt” is neither a picture nor a clip."]
    page.run("give(...Array.from({length: 65}, (_, i) => new File(['x'], `${i}.png`, {type: 'image/png'})))")
    page.wait(lambda: "64 pictures" in "".join(page.texts(".notice p")), "notice about the number")
    assert len(page.all("#attachments .tile")) == 64


def test_an_earlier_message_can_be_edited_and_answers_made_again(open_page: Opener) -> None:
    page = open_page(answered_here([chunk("Fine."), END]))
    page.attach(DOCS / "circle.png")
    page.wait_for_attachments(1)
    page.ask("First")
    page.ask("Second")
    page.one("#message").send_keys("A draft")
    page.press_in_turn(0, "Edit this message")
    assert page.one("#message").get_property("value") == "First"
    assert len(page.all("#attachments .tile")) == 1
    page.press(Keys.ESCAPE)
    assert page.one("#message").get_property("value") == "A draft"
    assert page.all("#attachments .tile") == []
    page.press_in_turn(0, "Edit this message")
    page.one("#message").send_keys(" changed" + Keys.ENTER)
    page.answer()
    assert page.texts(".said") == ["First changed"]
    assert page.run("return document.querySelector('.question img').naturalWidth") > 0
    assert page.one("#message").get_property("value") == "A draft"
    page.press_in_turn(1, "Regenerate")
    page.wait(lambda: page.run("return asked.length") == 4, "request")
    page.answer()
    asked = page.run("return asked")
    assert [len(body["messages"]) for body in asked] == [1, 3, 1, 1]
    assert asked[2] == asked[3]
    assert [part["type"] for part in asked[2]["messages"][0]["content"]] == ["image_url", "text"]


def test_a_cleared_conversation_can_be_brought_back(open_page: Opener) -> None:
    page = open_page(answered_here([chunk("Fine."), END]))
    page.attach(DOCS / "circle.png")
    page.wait_for_attachments(1)
    page.ask("First")
    page.one("#new-chat").click()
    assert page.all(".turn") == []
    assert page.one("#welcome").is_displayed()
    page.one(".notice .plain").click()
    assert page.texts(".said") == ["First"]
    page.wait(lambda: page.run("return document.querySelector('.question img').naturalWidth"), "picture")
    page.one("#new-chat").click()
    page.ask("Another")
    assert page.all(".notice") == []
    assert [len(body["messages"]) for body in page.run("return asked")] == [1, 1]


def test_answers_can_be_copied(open_page: Opener) -> None:
    page = open_page(answered_here([chunk("Fine **indeed**."), END]))
    page.driver.execute_cdp_cmd("Browser.grantPermissions", {"permissions": ["clipboardReadWrite"], "origin": page.url})
    page.ask("Well?")
    page.press_in_turn(1, "Copy this answer")
    page.wait(lambda: page.texts("#announcer") == ["Copied."], "word that it was copied")
    copied = page.driver.execute_async_script("navigator.clipboard.readText().then(arguments[0])")
    assert copied == "Fine **indeed**."


def test_settings_go_into_the_request_and_wrong_ones_do_not(open_page: Opener) -> None:
    page = open_page(answered_here([chunk("Fine."), END]))
    page.one("#settings-toggle").click()
    for name, value in {"system": "Be brief.", "top_p": "0.9", "max_tokens": "12", "seed": "7"}.items():
        page.one(f"#{name}").send_keys(value)
    page.run(
        "for (const [id, value] of [['frames_by', 'fps'], ['detail', 'low']]) { const field ="
        " document.getElementById(id); field.value = value; field.dispatchEvent(new Event('input', {bubbles: true})) }"
    )
    page.one("#temperature").send_keys("3")
    page.one("#message").send_keys("Hello" + Keys.ENTER)
    assert page.texts(".notice p")[0].startswith("Temperature: ")
    page.one(".notice .plain").click()
    assert page.focused() == "temperature"
    page.press(Keys.BACKSPACE, "0")
    page.run(PICTURES, "paste", encoded("circle.png"))
    page.run("give = document.querySelector('#link').click()")
    page.one("#link-url").send_keys("https://203.0.113.7/clip.mp4" + Keys.ENTER)
    page.wait_for_attachments(2)
    page.ask("")
    (body,) = page.run("return asked")
    system, user = body.pop("messages")
    assert system == {"role": "system", "content": "Be brief."}
    assert body == {
        "model": "vlmrt-demo",
        "temperature": 0,
        "top_p": 0.9,
        "max_tokens": 12,
        "seed": 7,
        "stream": True,
        "stream_options": {"include_usage": True, "continuous_usage_stats": True},
    }
    picture, clip, text = user["content"]
    assert (picture["type"], picture["image_url"]["detail"]) == ("image_url", "low")
    assert clip == {"type": "video_url", "video_url": {"url": "https://203.0.113.7/clip.mp4", "fps": 2}}
    assert text == {"type": "text", "text": "Hello"}


@pytest.mark.parametrize("view", ["chat", "settings", "stats"])
def test_nothing_is_wider_than_a_small_screen(view: str, open_page: Opener, browser: Chrome) -> None:
    page = open_page(answered_here([chunk("A_very_long_word" * 20 + "\n\n```\n" + "code " * 100 + "\n```\n"), END]))
    page.resize(360, 740)
    page.attach(DOCS / "shapes.png")
    page.wait_for_attachments(1)
    page.ask("How_long_can_a_word_be" * 10)
    if view == "settings":
        page.one("#settings-toggle").click()
        assert page.run("return document.querySelector('#view-chat').inert")
    if view == "stats":
        page.one("#link-stats").click()
        page.wait(lambda: page.texts(".badge"), "stats")
    boxes = ".bar > *, .dock > *, .turn, .turn > *, .view:not([hidden]), .card, .table-box, .settings, .settings input"
    outside = page.run(
        "return [...document.querySelectorAll(arguments[0])].filter((node) => node.checkVisibility())"
        ".filter((node) => { const box = node.getBoundingClientRect(); return box.left < -1 || box.right > 361 })"
        ".map((node) => `${node.tagName} ${node.className} ${node.id}`)",
        boxes,
    )
    assert outside == []
    assert page.run("return document.scrollingElement.scrollWidth") <= 360


async def test_a_key_is_asked_for_kept_in_the_tab_and_sent(browser: Chrome, tmp_path: Path) -> None:
    checkpoint = make_checkpoint(tmp_path / "checkpoint", "test-qwen2-vl", weights=False)
    server = ServerOptions(api_keys=(ApiKey.of("right"),))

    def give(page: Page, key: str) -> None:
        page.run("const key = document.querySelector('#key'); key.value = ''; key.focus()")
        page.press(key, Keys.ENTER, Keys.TAB)

    def visit(url: str) -> str:
        page = Page(browser, url, expects_failures=True)
        page.wait(lambda: page.texts(".notice p") == ["This server needs an API key."], "notice")
        page.one("#link-stats").click()
        page.wait(lambda: "an API key is required" in page.texts("#view-stats > .failure")[0], "refusal of the stats")
        page.one("#link-chat").click()
        page.one(".notice .plain").click()
        assert page.focused() == "key"
        assert page.one("#key").get_attribute("type") == "password"
        give(page, "wrong")
        page.wait(lambda: page.texts(".notice p") == ["the API key is not one of this server's"], "refusal")
        give(page, "right")
        page.wait(lambda: page.texts("#model-name") == ["test-model"], "model name")
        assert page.all(".notice") == []
        assert page.ask("Hello") == "fine"
        page.driver.refresh()
        page.wait(lambda: page.texts("#model-name") == ["test-model"], "model name after a reload")
        assert page.run("return [localStorage.length, document.cookie]") == [0, ""]
        assert page.run("return sessionStorage.getItem('vlmrt-key')") == "right"
        page.run("sessionStorage.clear()")
        assert page.complaints() == []
        return page.url

    async with running_edge(edge_config(checkpoint, server=server), tmp_path) as edge, edge.answering("fine"):
        assert await asyncio.to_thread(visit, edge.url) == edge.url
