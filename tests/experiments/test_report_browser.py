"""The report in a real browser: Debian's Chromium, driven over the DevTools pipe with nothing but the standard library.

The page opens from the file, and what it asks of the network, prints on the console or runs as a script is recorded.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess

import numpy as np
import pytest

from experiments.harness import figures, report
from experiments.harness.claims import Claim, greater_than, less_than, not_tested
from experiments.harness.run import Run

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
pytestmark = pytest.mark.skipif(not CHROMIUM, reason="needs the program `chromium` (Debian: apt-get install chromium)")

FLAGS = (
    "--headless --no-sandbox --disable-gpu --no-first-run --disable-background-networking --disable-component-update "
    "--disable-sync --disable-dev-shm-usage --remote-debugging-pipe"
).split()

HOSTILE = [
    "<script>document.title='owned'</script>",
    "<img src=x onerror=\"document.title='owned'\">",
    "\"><svg onload=document.title='owned'>",
    "' onmouseover='document.title=1' x='",
    "</style></title></textarea></table></section><h1>owned</h1>",
    "javascript:document.title='owned'",
    '<a href="javascript:document.title=1">click</a>',
    "<iframe srcdoc='<script>parent.document.title=1</script>'></iframe>",
    "<meta http-equiv=refresh content='0;url=http://192.0.2.1/'>",
    "&lt;b&gt; &amp; &#60;script&#62;",
    "<!-- comment --> ]]> <![CDATA[ ${7*7} {{7*7}}",
    "\u202eright to left\u202c \ud800 lone surrogate",
]


class Browser:
    """A page of a headless browser; `events` holds what it said, `call` speaks the DevTools protocol."""

    def __init__(self, profile):
        to_browser, self._write = os.pipe()
        self._read, from_browser = os.pipe()
        command = [CHROMIUM, *FLAGS, f"--user-data-dir={profile}", "about:blank"]
        # The protocol is spoken on descriptors 3 and 4; bash moves ours there.
        script = f'exec "$0" "$@" 3<&{to_browser} 4>&{from_browser}'
        self._process = subprocess.Popen(
            ["bash", "-c", script, *command],
            pass_fds=(to_browser, from_browser),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(to_browser)
        os.close(from_browser)
        self._replies = os.fdopen(self._read, "rb")
        self._buffer = b""
        self._number = 0
        self.events: list[dict] = []
        self._session = None
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def _message(self) -> dict:
        while b"\0" not in self._buffer:
            chunk = self._replies.read1(1 << 20)
            assert chunk, "the browser went away"
            self._buffer += chunk
        message, self._buffer = self._buffer.split(b"\0", 1)
        return json.loads(message)

    def call(self, method: str, **params) -> dict:
        self._number += 1
        message = {"id": self._number, "method": method, "params": params}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._write, json.dumps(message).encode() + b"\0")
        while True:
            reply = self._message()
            if reply.get("id") == self._number:
                assert "error" not in reply, reply
                return reply["result"]
            self.events.append(reply)

    def open(self, url: str) -> None:
        self.events.clear()
        self.call("Page.navigate", url=url)
        while not self.named("Page.loadEventFired"):
            self.events.append(self._message())

    def evaluate(self, expression: str):
        reply = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in reply, reply
        return reply["result"].get("value")

    def named(self, *methods: str) -> list[dict]:
        return [event["params"] for event in self.events if event.get("method") in methods]

    def close(self) -> None:
        os.close(self._write)  # the browser ends when its pipe does
        try:
            self._process.wait(20)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._replies.close()


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """The browser, standing on a report whose every text is hostile."""
    folder = tmp_path_factory.mktemp("report")
    with Run.open(folder / "run", "apt", {"corpus": HOSTILE, HOSTILE[0]: HOSTILE[1]}, command=HOSTILE[2]) as run:
        for number in range(2):
            fig, ax = figures.new(height=2.0)
            figures.line(ax, [0, 1, 2], [0.1, 0.2, 0.4], low=[0.0, 0.1, 0.3], high=[0.2, 0.3, 0.5], label=HOSTILE[0])
            figures.bars(ax, HOSTILE[:3], [1.0, 2.0, 3.0])
            run.figure(f"figure{number}", fig, alt=HOSTILE[number], caption=HOSTILE[2 + number])
        run.table("tokens", [{"token": text, HOSTILE[0]: 1.5, "count": 3} for text in HOSTILE], caption=HOSTILE[4])
        run.table("empty", {"a": [], "b": []})
        rules = [greater_than([1.0, 1.1], 0), less_than([1.0, 1.1], 0), not_tested(HOSTILE[3])]
        run.write_claims(
            [Claim(text, text, text, text, *rules[at % 3]) for at, text in enumerate(HOSTILE)],
        )
        report.write(run, HOSTILE[0], HOSTILE[1], HOSTILE, arxiv="2509.03407\"><script>document.title='owned'</script>")
    browser = Browser(folder / "profile")
    try:
        browser.open((folder / "run" / "report.html").as_uri())
        yield browser
    finally:
        browser.close()


def test_no_console_error_and_nothing_but_the_file_is_asked_for(page):
    # Console messages of the page, exceptions, and what the browser itself logs about it (blocked or missing files).
    page.open(page.evaluate("location.href"))
    page.evaluate("new Promise(done => setTimeout(done, 200))")
    assert page.named("Runtime.consoleAPICalled", "Runtime.exceptionThrown", "Log.entryAdded") == []
    asked = [params["request"]["url"].split(":")[0] for params in page.named("Network.requestWillBeSent")]
    assert asked.count("file") == 1 and set(asked) <= {"file", "data"}


def test_claims_come_first(page):
    assert page.evaluate("[...document.querySelectorAll('main h2')].map(x => x.textContent)") == [
        "Claims",
        "Figures",
        "Tables",
        "Configuration",
    ]
    tops = page.evaluate("['.claims', 'figure', 'main table'].map(s => document.querySelector(s).offsetTop)")
    assert tops == sorted(tops)
    verdicts = page.evaluate("[...document.querySelectorAll('.claims .verdict')].map(x => x.textContent.slice(2))")
    assert verdicts == ["supported", "not supported", "not tested"] * 4


def test_every_figure_is_there(page):
    sizes = page.evaluate("[...document.images].map(x => [x.complete, x.naturalWidth, x.naturalHeight, x.alt])")
    assert [(done, width, alt) for done, width, _, alt in sizes] == [
        (True, round(figures.WIDTH * figures.DPI), HOSTILE[number]) for number in range(2)
    ]


def test_hostile_text_stays_text(page):
    assert page.evaluate("document.title") == HOSTILE[0]  # nothing ran
    counts = page.evaluate(
        "['script', 'iframe', 'svg', 'img', 'meta', 'h1', 'style', 'title', 'figure']"
        ".map(x => document.getElementsByTagName(x).length)"
    )
    assert counts == [0, 0, 0, 2, 3, 1, 1, 1, 2]
    attributes = page.evaluate("[...document.querySelectorAll('*')].flatMap(x => x.getAttributeNames())")
    assert not [name for name in attributes if name.startswith("on") or name in ("srcdoc", "style")]
    links = page.evaluate("[...document.links].map(x => x.getAttribute('href'))")
    assert all(link.startswith(("https://arxiv.org/abs/", "#", "tables/", "config.json")) for link in links)
    # The words a reader sees are the words of the data (a lone surrogate is shown by its escape).
    said = [text.replace("\ud800", "\\ud800") for text in HOSTILE]
    select = "s => [...document.querySelectorAll(s)].map(x => x.textContent)"
    assert page.evaluate(f"({select})('.claims h3')") == [
        f"{'✓×–'[at % 3]} {['supported', 'not supported', 'not tested'][at % 3]}: {text}"
        for at, text in enumerate(said)
    ]
    assert page.evaluate(f"({select})('header > p:not(.soft)')") == said
    assert page.evaluate(f"({select})('tbody tr td:first-child')")[: len(said)] == said
    assert page.evaluate(f"({select})('figcaption')") == said[2:4]
    assert page.evaluate(f"({select})('pre')") == said[2:3]


def test_the_policy_stops_a_script_that_gets_into_the_page(page):
    page.events.clear()
    page.evaluate(
        "document.body.insertAdjacentHTML('beforeend', `<img id=bad src='data:,' onerror=\"document.title='owned'\">`);"
        "new Promise(done => setTimeout(done, 200))"
    )
    assert page.evaluate("document.title") == HOSTILE[0]
    assert "Content Security Policy" in str(page.named("Log.entryAdded"))
    page.evaluate("document.getElementById('bad').remove()")


@pytest.mark.parametrize("width", [320, 1200])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_readable_on_any_screen(page, width, scheme):
    page.call("Emulation.setDeviceMetricsOverride", width=width, height=800, deviceScaleFactor=1, mobile=width < 500)
    page.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
    assert page.evaluate("document.documentElement.scrollWidth") <= width  # only tables scroll, in their own box
    # WCAG AA: contrast of at least 4.5 between text and what is behind it.
    pairs = page.evaluate(
        """['body', '.soft', '.claims dt', 'a', '.supported .verdict', '.not-supported .verdict', '.not-tested span']
        .map(s => { const e = document.querySelector(s), card = e.closest('.claims li') || document.body;
                    return [getComputedStyle(e).color, getComputedStyle(card).backgroundColor]; })"""
    )
    for colours in pairs:
        light, dark = sorted((_luminance(colour) for colour in colours), reverse=True)
        assert (light + 0.05) / (dark + 0.05) >= 4.5, colours


def _luminance(colour: str) -> float:
    """Relative luminance of `rgb(r, g, b)` (WCAG 2.1)."""
    rgb = np.array([int(part) for part in colour[4:-1].split(",")]) / 255
    return float(np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4) @ [0.2126, 0.7152, 0.0722])
