"""The feature browser of the report: how its data is packed, and a reader's ways through it in a real Chromium."""

from __future__ import annotations

import base64
import importlib.util
import json
import math
import re
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest

from experiments.harness import browser, report
from experiments.harness.browser import Context, Feature, Group
from experiments.harness.run import Run

# The neighbour's driver of Chromium, and its texts; tests are no package, so it is loaded from its file.
_spec = importlib.util.spec_from_file_location("report_browser", Path(__file__).with_name("test_report_browser.py"))
neighbour = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(neighbour)

HOSTILE = ["</script><img src=x onerror=\"document.title='owned'\">", "<b>", "'\"&amp;", "\u2028\u2029", "\ud800", "\n"]
HOSTILE += ["]]>", "<!--<script>", "[MASK]", "##", *neighbour.HOSTILE]


def blocks(html):
    """What lies packed in the page: the token strings, then one entry a group."""
    texts = re.findall(r'<script type="text/plain">([A-Za-z0-9+/=]*)</script>', html)
    assert len(texts) == html.count("<script") == html.count("</script")
    return [json.loads(zlib.decompress(base64.b64decode(text))) for text in texts]


# --- packing ---------------------------------------------------------------------------------------------------------


def test_contexts_come_back_within_one_step_of_255():
    rng = np.random.default_rng(0)
    values = np.where(rng.random((3, 8)) < 0.5, 0, rng.gamma(1, 3, (3, 8)))
    values[0, 0] = 1e-9  # fires, if hardly
    contexts = [Context([f"w{at}" for at in range(8)], row, "positive") for row in values]
    words, group = blocks(browser.browser_html("sae", [Group("a", [Feature(7, 0.25, contexts)])]))
    assert group["index"] == [7] and group["scale"] == group["max"] == pytest.approx([values.max()], rel=1e-4)
    for context, (ids, levels, label, peak) in zip(contexts, group["contexts"][0], strict=True):
        assert [words[at] for at in ids] == context.tokens and label == "positive"
        np.testing.assert_allclose(np.array(levels) / 255 * values.max(), context.values, atol=values.max() / 255)
        assert peak == np.argmax(context.values)
        assert [level > 0 for level in levels] == [value > 0 for value in context.values]


def test_groups_share_their_token_strings_and_keep_what_is_missing():
    features = [Feature(0, 0.5, [Context(["a", "b"], [0, 1])], auroc=math.nan, max_activation=9), Feature(1, 0.0)]
    html = browser.browser_html("sae", [Group("x", features), Group("y", features[::-1], against="x")])
    words, x, y = blocks(html)
    assert words == ["a", "b"] and (x["against"], y["against"]) == (None, 0)
    assert x["contexts"] == y["contexts"][::-1] == [[[[0, 1], [0, 255], None, 1]], []]
    assert x["auroc"] == x["matched"] == [None, None] and x["max"] == [9, None] and x["scale"] == [1, None]
    assert blocks(browser.browser_html("none", [Group("x", [])]))[1]["index"] == []
    zero = blocks(browser.browser_html("zero", [Group("x", [Feature(0, 0, [Context(["a"], [0.0])])])]))[1]
    assert zero["contexts"] == [[[[0], [0], None, 0]]]


def test_hostile_text_is_packed_whole_and_never_seen_by_the_parser():
    group = Group(HOSTILE[0], [Feature(0, 1, [Context(HOSTILE, [1.0] * len(HOSTILE), HOSTILE[0])], HOSTILE[0])])
    html = browser.browser_html("sae", [group], HOSTILE[0])
    words, data = blocks(html)
    assert words == list(dict.fromkeys(HOSTILE)) and data["label"] == [HOSTILE[0]]
    assert "<img" not in html and "&lt;img" in html  # the group's name and the caption


@pytest.mark.parametrize(
    ("groups", "words"),
    [
        ([], "groups"),
        ([Group("a", []), Group("a", [])], "names of their own"),
        ([Group("a", [Feature(1, 0), Feature(1, 0)])], "numbers of their own"),
        ([Group("a", [Feature(-1, 0)])], "from 0 up"),
        ([Group("a", [], against="b")], "'b'"),
        ([Group("a", [Feature(3, 0, [Context(["x"], [1, 2])])])], "'a': feature 3 has 1 tokens"),
        ([Group("a", [Feature(3, 0, [Context(["x"], [-1])])])], "feature 3 .*negative"),
        ([Group("a", [Feature(3, 0, [Context(["x"], [math.nan])])])], "feature 3 .*no numbers"),
    ],
)
def test_what_cannot_be_shown_is_refused(groups, words):
    with pytest.raises(ValueError, match=words):
        browser.browser_html("sae", groups)


# --- sentences -------------------------------------------------------------------------------------------------------


def classes(html):
    items = html.split('<p class="legend')[0]
    return [match.split() for match in re.findall(r'<span class="(token[^"]*)"', items)]


def test_sentences_are_coloured_by_sign_and_size():
    row = Context(["[CLS]", "run", "##ning", "is", "fun"], [math.nan, -2.0, 1.0, 0.0, None], "positive")
    html = browser.sentences_html("s", [row], "A caption", measure="logit")
    assert classes(html) == [
        ["token", "special"],
        ["token", "down", "l16"],
        ["token", "piece", "up", "l8"],
        ["token"],
        ["token"],
    ]
    shown = re.sub("<[^>]*>", "", html)
    assert shown.strip().startswith("[CLS] running is fun positive") and "logit: -2-1.5-1-0.500.511.52" in shown
    assert 'title="##ning: 1"' in html and 'title="fun"' in html and "<script" not in html and "style=" not in html


def test_limits_can_run_downwards():
    html = browser.sentences_html("s", [Context(list("abcd"), [1.0 + 1e-7, 0.8, 0.6, 0.1])], limits=(1.0, 0.6))
    assert classes(html) == [["token"], ["token", "up", "l8"], ["token", "up", "l16"], ["token", "up", "l16"]]
    assert "down" not in html


def test_sentences_escape_and_refuse():
    html = browser.sentences_html("s", [Context(HOSTILE, range(len(HOSTILE)), HOSTILE[0])], HOSTILE[0], measure="<b>")
    assert "<img" not in html and "<b>" not in html and "<script" not in html
    with pytest.raises(ValueError, match="2 tokens have 1 values"):
        browser.sentences_html("s", [Context(["a", "b"], [1])])
    with pytest.raises(ValueError, match="limits"):
        browser.sentences_html("s", [], limits=(1, 1))
    assert "<figure" in browser.sentences_html("s", [])


# --- the report ------------------------------------------------------------------------------------------------------


def written(out, fill):
    with Run.open(out, "evolution", {}) as run:
        fill(run)
        report.write(run, "title", "paper", [])
    return (out / "report.html").read_text(encoding="utf-8")


def test_only_a_report_with_a_browser_may_run_a_script(tmp_path):
    plain = written(tmp_path / "plain", lambda run: None)
    sentences = written(tmp_path / "sentences", lambda run: run.sentences("s", [Context(["a"], [1])]))
    both = written(tmp_path / "both", lambda run: run.browser("sae", [Group("a", [])]))
    assert "script" not in plain and "--shade" not in plain
    assert "script" not in sentences and '<h2 id="sentences">' in sentences
    assert (
        "script-src 'sha256-" in both and '<h2 id="features">' in both and "unsafe" not in both and "<noscript>" in both
    )
    with pytest.raises(ValueError, match="cannot name"):
        written(tmp_path / "bad", lambda run: run.browser('"><b>', [Group("a", [])]))


def test_the_script_is_part_of_the_package():
    code = "import sys; from experiments.harness import browser; sys.exit('</script' in browser.SCRIPT.lower())"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(browser.__file__).parents[2])
    assert "innerHTML" not in browser.SCRIPT and "eval" not in browser.SCRIPT


# --- in the browser --------------------------------------------------------------------------------------------------

READY = "(async () => { for (let i = 0; i < 2000 && !document.querySelector('.row, [data-part=detail] h3'); i++)"
READY += " await new Promise(done => setTimeout(done, 5)); return performance.now(); })()"
STATUSES = ("retained", "rotated", "new")


def features(count):
    rng = np.random.default_rng(1)
    words = [f"word{at}" for at in range(3000)] + ["##ing", "##ed"]
    for number in range(count):
        values = np.where(rng.random((8, 24)) < 0.1, rng.gamma(2, 2, (8, 24)), 0)
        tokens = [[words[at] for at in row] for row in rng.integers(len(words), size=(8, 24))]
        if number == 4321:
            tokens[3][5:7], values[3, 5:7] = ["Zebra", "##fish"], (0, 1)
        contexts = [Context(*pair, "positive") for pair in zip(tokens, values, strict=True)]
        yield Feature(
            number,
            0.0 if number % 10 == 0 else float(rng.random()),
            () if number % 10 == 0 else contexts,
            label="positive",
            auroc=float(rng.random()),
            status=STATUSES[number % 3],
            matched=count - 1 - number,
            cosine=None if number % 7 == 0 else float(rng.random()),
        )


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """A browser on a report with 5,000 features in one group, and hostile text in the other."""
    if not neighbour.CHROMIUM:
        pytest.skip("needs the program `chromium` (Debian: apt-get install chromium)")
    folder = tmp_path_factory.mktemp("report")
    odd = [
        Feature(5, 0.5, [Context(HOSTILE, [1.0] * len(HOSTILE), HOSTILE[0])], HOSTILE[0], 0.9, 0.1, HOSTILE[1], 7, 0.5)
    ]
    with Run.open(folder / "run", "evolution", {}) as run:
        run.browser(
            "sae", [Group("many", list(features(5000)), against="odd"), Group(HOSTILE[0], odd), Group("odd", odd)]
        )
        run.sentences("s", [Context(HOSTILE, range(len(HOSTILE)))], HOSTILE[0])
        report.write(run, "features", "paper", [])
    driver = neighbour.Browser(folder / "profile")
    driver.address = (folder / "run" / "report.html").as_uri()
    try:
        yield driver
    finally:
        driver.close()


@pytest.fixture
def fresh(page):
    """The page opened anew; afterwards nothing was printed, thrown, blocked or asked of the network."""
    opened(page)
    yield page
    quiet(page)


def opened(page, hash=""):
    page.open("about:blank")
    page.open(page.address + hash)
    return page.evaluate(READY)


def quiet(page):
    page.evaluate("new Promise(done => setTimeout(done, 50))")  # what was thrown or blocked has been told by then
    assert page.named("Runtime.exceptionThrown", "Runtime.consoleAPICalled", "Log.entryAdded") == []
    asked = [params["request"]["url"].split(":")[0] for params in page.named("Network.requestWillBeSent")]
    assert set(asked) <= {"file", "data"} and asked.count("file") == 1


def say(page, part, value, kind="input"):
    name = "checked" if isinstance(value, bool) else "value"
    page.evaluate(
        f"{{ const box = document.querySelector('[data-part={part}]'); box.{name} = {json.dumps(value)};"
        f" box.dispatchEvent(new Event('{kind}')); }}"
    )


def numbers(page):
    texts = page.evaluate("[...document.querySelectorAll('.row strong')].map(x => x.lastChild.data)")
    return [int(text) for text in texts]


def note(page):
    return page.evaluate("document.querySelector('[data-part=note]').textContent")


def wait(page, condition):
    expression = f"(async () => {{ for (let i = 0; i < 1000; i++) {{ if ({condition}) return true;"
    assert page.evaluate(expression + " await new Promise(done => setTimeout(done, 5)); } return false; })()"), (
        condition
    )


def press(page, key, code):
    for kind in ("keyDown", "keyUp"):
        text = {"text": "\r"} if key == "Enter" and kind == "keyDown" else {}
        page.call("Input.dispatchKeyEvent", type=kind, key=key, code=key, windowsVirtualKeyCode=code, **text)


def test_five_thousand_features_open_in_three_seconds(page):
    # Milliseconds of the page's own clock, from the start of the navigation until rows are in the list.
    assert opened(page) < 3000
    assert note(page) == "5,000 of 5,000 features" and numbers(page) == list(range(50))
    quiet(page)


def test_search_narrows_to_the_right_features(fresh):
    for query in ("zebrafish", "ZEBRA", "zebrafish word", "##fish"):
        say(fresh, "search", query)
        assert numbers(fresh) == [4321] and note(fresh) == "1 of 5,000 features", query
        assert "Zebrafish" in fresh.evaluate("document.querySelector('.row .sentence').textContent")
    say(fresh, "search", "no such word")
    assert numbers(fresh) == [] and note(fresh) == "0 of 5,000 features"
    say(fresh, "search", "#17")
    assert numbers(fresh) == [17]
    say(fresh, "search", "zebra")
    say(fresh, "fires", True)
    assert numbers(fresh) == []  # it fires on the second piece alone
    say(fresh, "search", "fish")
    assert numbers(fresh) == [4321]


def test_filters_and_order(fresh):
    every = list(features(5000))
    say(fresh, "status", "rotated")
    assert numbers(fresh) == list(range(1, 150, 3)) and note(fresh) == "1,667 of 5,000 features"
    say(fresh, "alive", True)
    alive = [x for x in every if x.density and x.status == "rotated"]
    assert numbers(fresh) == [x.index for x in alive][:50]
    for sort, value in (("density", lambda x: x.density), ("auroc", lambda x: x.auroc), ("cosine", lambda x: x.cosine)):
        known = [x for x in alive if value(x) is not None]
        say(fresh, "sort", sort, "change")
        assert numbers(fresh) == [x.index for x in sorted(known, key=value, reverse=True)][:50]
        fresh.evaluate("document.querySelector('[data-part=turn]').click()")
        assert numbers(fresh) == [x.index for x in sorted(known, key=value)][:50]
    fresh.evaluate("document.querySelector('.pager button:last-child').click()")
    assert numbers(fresh) == [x.index for x in sorted(known, key=value)][50:100]


def test_enter_opens_a_feature_and_the_way_back_leads_to_its_row(fresh):
    say(fresh, "search", "#4321")
    fresh.evaluate("document.querySelector('.row').focus()")
    press(fresh, "Enter", 13)
    wait(fresh, "document.querySelector('[data-part=detail] h3')")
    assert fresh.evaluate("location.hash") == "#feature-sae-0-4321"
    assert fresh.evaluate("document.activeElement.textContent") == "Feature 4321"
    feature = next(x for x in features(5000) if x.index == 4321)
    lines = fresh.evaluate("[...document.querySelectorAll('.contexts .sentence')].map(x => x.textContent)")
    assert lines == [re.sub(r"(^| )##", "", " ".join(context.tokens)) for context in feature.contexts]
    token = "[...document.querySelectorAll('.token')].find(x => x.title.startsWith('##fish'))"
    assert fresh.evaluate(f"[{token}.textContent, {token}.title, {token}.className]")[0] == "fish"
    assert float(fresh.evaluate(f"{token}.title").split(": ")[1]) == pytest.approx(1, abs=0.1)
    peaks = fresh.evaluate("[...document.querySelectorAll('.contexts .peak')].map(x => x.title.split(':')[0])")
    assert peaks == [context.tokens[int(np.argmax(context.values))] for context in feature.contexts]
    assert "of odd, cosine" in fresh.evaluate("document.querySelector('[data-part=detail] dl').textContent")
    fresh.evaluate("history.back()")
    wait(fresh, "document.querySelector('[data-part=detail]').hidden")
    assert fresh.evaluate("document.activeElement.className") == "row" and numbers(fresh) == [4321]


def test_an_address_opens_its_feature(page):
    opened(page, "#feature-sae-0-77")
    assert page.evaluate("document.querySelector('[data-part=detail] h3').textContent") == "Feature 77"
    page.evaluate("location.hash = '#feature-sae-2-5'")
    wait(page, "document.querySelector('[data-part=detail] h3').textContent === 'Feature 5'")
    assert page.evaluate("document.querySelector('[data-part=group]').selectedIndex") == 2
    page.evaluate("location.hash = '#feature-sae-2-6'")
    wait(page, "document.querySelector('[data-part=detail]').textContent.includes('no feature 6')")
    say(page, "search", "mask")
    assert numbers(page) == [5] and page.evaluate("location.hash") == "#browser-sae"
    quiet(page)


def test_hostile_text_stays_text(page):
    opened(page, "#feature-sae-1-5")
    title = page.evaluate("document.title")
    page.evaluate("new Promise(done => setTimeout(done, 200))")
    assert title == page.evaluate("document.title") == "features"
    shown = page.evaluate("[...document.querySelectorAll('.contexts .token')].map(x => x.textContent)")
    expected = ["␣" if not text.strip() else text for text in HOSTILE]
    assert [text.replace("\ufffd", "\ud800") for text in shown] == expected
    counts = page.evaluate("['img', 'b', 'svg', 'iframe', 'h1'].map(x => document.getElementsByTagName(x).length)")
    assert counts == [0, 0, 0, 0, 1]
    assert page.evaluate("document.querySelector('[data-part=group]').selectedOptions[0].text") == HOSTILE[0]
    attributes = page.evaluate("[...document.querySelectorAll('*')].flatMap(x => x.getAttributeNames())")
    assert not [name for name in attributes if name.startswith("on") or name in ("srcdoc", "style")]
    quiet(page)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_readable_on_a_narrow_screen_and_in_every_shade(page, scheme):
    page.call("Emulation.setDeviceMetricsOverride", width=320, height=800, deviceScaleFactor=1, mobile=True)
    page.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
    opened(page)
    assert page.evaluate("document.documentElement.scrollWidth") <= 320
    page.evaluate("location.hash = '#feature-sae-0-77'")
    wait(page, "document.querySelector('.contexts')")
    assert page.evaluate("document.documentElement.scrollWidth") <= 320
    text, back = page.evaluate("(s => [s.color, s.backgroundColor])(getComputedStyle(document.body))")
    for kind in ("up", "down"):
        shade = page.evaluate(
            f"(() => {{ const x = document.createElement('span'); x.className = 'token {kind} l16';"
            " document.body.append(x); const c = getComputedStyle(x).backgroundColor; x.remove(); return c; })()"
        )
        levels = [neighbour._luminance(colour) for colour in (text, shade, back)]
        light, dark = sorted(levels[:2], reverse=True)
        assert (light + 0.05) / (dark + 0.05) >= 4.5 and shade != back
    quiet(page)
