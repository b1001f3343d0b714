"""Features and sentences to look at, for `report.html`.

`browser_html` is a browser of thousands of sparse features: groups, search, filters, sorting, a page for each feature
with its top contexts. Its data lies in the report as base64 of compressed JSON, one block for the token strings and one
a group, which `browser.js` unpacks when the reader asks for it; activations are kept in 255 steps of the strongest one
that a feature shows. `sentences_html` is plain HTML: sentences whose tokens are coloured by a value.
"""

from __future__ import annotations

import base64
import json
import math
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

import numpy as np

SCRIPT = Path(__file__).with_name("browser.js").read_text(encoding="utf-8")
SHADES = 16  # as in browser.js

CSS = (
    """
:root { --up: 255 166 77; --down: 120 186 245; }
@media (prefers-color-scheme: dark) { :root { --up: 150 82 0; --down: 10 92 158; } }
.up { background: rgb(var(--up) / var(--shade)); } .down { background: rgb(var(--down) / var(--shade)); }
.token, .legend span { border-radius: .15rem; print-color-adjust: exact; -webkit-print-color-adjust: exact; }
.token { unicode-bidi: isolate; padding: .1em 0; } .special { color: var(--soft); font-size: .85em; }
.special.up, .special.down { color: inherit; }
.piece::before { content: "\\00b7"; color: var(--soft); } .up.piece::before, .down.piece::before { color: inherit; }
.peak { font-weight: 700; text-decoration: underline; text-underline-offset: .2em; }
.legend { margin: .3rem 0; font-size: .95rem; } .legend span { padding: 0 .6em; color: var(--text); }
.legend span:last-of-type { margin-right: .3em; }
.tag { border: 1px solid var(--edge); border-radius: .3rem; padding: 0 .4rem; font-size: .85rem; color: var(--soft); }
.sentences, .contexts { list-style: none; padding: 0; margin: 0; }
.sentences li, .contexts li { padding: .35rem 0; border-bottom: 1px solid var(--edge); line-height: 1.8; }
.contexts li { display: grid; grid-template-columns: 3.5rem minmax(0, 1fr) fit-content(8rem);
  gap: 0 .6rem; align-items: baseline; }
.browser [hidden] { display: none; }
.controls { display: flex; flex-wrap: wrap; gap: .6rem 1rem; align-items: end; background: var(--card);
  padding: .8rem 1rem; }
.controls label { display: grid; grid-template-columns: minmax(0, 1fr); font-size: .85rem;
  color: var(--soft); max-width: 100%; }
.controls label.tick { display: block; padding: .3rem 0; } .controls .wide { flex: 1 1 14rem; }
.browser input, .browser select, .browser button { font: inherit; font-size: .95rem; max-width: 100%; min-height: 2rem;
  box-sizing: border-box; } .browser input[type=checkbox] { min-height: 0; }
.browser ul.features { list-style: none; padding: 0; margin: 0; }
.row { display: grid; grid-template-columns: 4.5rem 9rem 6.5rem minmax(0, 1fr) 13rem; gap: 0 .6rem;
  padding: .4rem .5rem;
  border-bottom: 1px solid var(--edge); color: inherit; text-decoration: none; font-size: .9rem;
  font-variant-numeric: tabular-nums; } .row:hover { background: var(--card); }
.row strong { color: var(--link); text-decoration: underline; }
.row .sentence { grid-column: 1 / -1; line-height: 1.7; }
.row:focus-visible { outline: 2px solid var(--link); outline-offset: -2px; }
.browser .pager { display: flex; gap: 1rem; align-items: center; margin: .8rem 0; }
.ways a { margin-right: 1rem; } .browser h3 { font-size: 1.15rem; outline: none; }
.unseen { position: absolute; clip-path: inset(50%); width: 1px; height: 1px; overflow: hidden; white-space: nowrap; }
@media (max-width: 44rem) { .row { grid-template-columns: repeat(2, minmax(0, 1fr)); }
  .row strong { grid-column: 1 / -1; }
  .contexts li { grid-template-columns: 3rem minmax(0, 1fr); } .contexts .tag { grid-column: 2; justify-self: start; } }
@media print { .controls, .pager, .ways { display: none !important; } }
"""
    # The faintest shade is still seen; the strongest still has a contrast of more than 4.5 to the text.
    + "".join(f".l{step} {{ --shade: {0.1 + 0.9 * step / SHADES:.3f}; }}\n" for step in range(1, SHADES + 1))
)


@dataclass(frozen=True)
class Context:
    """A text as tokens with a value for each; `label` is shown beside it."""

    tokens: Sequence[str]
    values: Sequence[float]
    label: str | None = None


@dataclass(frozen=True)
class Feature:
    """One feature; `contexts` strongest first, None for what was not measured.

    `density` is the share of tokens on which it fires, `label` the class it goes best with, `matched` the index of the
    nearest feature in the dictionary compared with, `cosine` how near that is, `status` what became of it.
    """

    index: int
    density: float
    contexts: Sequence[Context] = ()
    label: str | None = None
    auroc: float | None = None
    mutual_information: float | None = None
    status: str | None = None
    matched: int | None = None
    cosine: float | None = None
    max_activation: float | None = None  # None: the largest value in the contexts
    mean_activation: float | None = None  # over the tokens on which it fires


@dataclass(frozen=True)
class Group:
    """The features of one dictionary; `against` names the group that their `matched` refers to, if it is shown too."""

    name: str
    features: Sequence[Feature]
    against: str | None = None


def browser_html(name: str, groups: Sequence[Group], caption: str = "") -> str:
    """The part of the report in which a reader can look through `groups`; `name` becomes part of its addresses."""
    names = [group.name for group in groups]
    if not groups or len(set(names)) != len(names):
        raise ValueError(f"browser {name!r}: it needs groups with names of their own, not {names}")
    words: dict[str, int] = {}
    packed = [_packed(_columns(group, names, words)) for group in groups]
    data = "".join(f'<script type="text/plain">{text}</script>\n' for text in [_packed(list(words)), *packed])
    options = "".join(f"<option>{escape(group)}</option>" for group in names)
    sorts = "".join(f'<option value="{column}">{text}</option>' for column, text in _SORTS.items())
    title = f'<p id="browser-{name}-caption">{escape(caption or name)}</p>'
    return f"""<div class="browser block" id="browser-{name}" data-name="{name}" role="group"
 aria-labelledby="browser-{name}-caption">
{title}
<noscript><p>The features are shown by a script, which this reader does not run.</p></noscript>
<div data-part="panel" hidden>
<div class="controls">
<label class="wide">Group <select data-part="group" autocomplete="off">{options}</select></label>
<label class="wide">Words, or a feature's number
<input data-part="search" type="search" autocomplete="off" spellcheck="false"></label>
<label class="tick"><input data-part="fires" type="checkbox" autocomplete="off"> only words on which it fires</label>
<label>Status <select data-part="status" autocomplete="off"></select></label>
<label>Sorted by <select data-part="sort" autocomplete="off">{sorts}</select></label>
<button data-part="turn" type="button" aria-label="Turn the order round"></button>
<label class="tick"><input data-part="alive" type="checkbox" autocomplete="off"> only alive</label>
</div>
<p class="soft" data-part="note" role="status"></p>
<ul class="features" data-part="list" aria-label="Features"></ul>
<div class="pager" data-part="pager"><button type="button">Previous page</button><span></span>
<button type="button">Next page</button></div>
<div data-part="detail" hidden></div>
</div>
{data}</div>
"""


_SORTS = {
    "listed": "order of the report",
    "index": "number",
    "density": "density",
    "max": "max activation",
    "auroc": "association (AUROC)",
    "mi": "mutual information",
    "cosine": "cosine",
}


def _packed(value: object) -> str:
    # Base64 has no letter that means anything to an HTML parser; the escapes keep odd surrogates whole.
    return base64.b64encode(zlib.compress(json.dumps(value, allow_nan=False, separators=(",", ":")).encode())).decode()


def _columns(group: Group, names: list[str], words: dict[str, int]) -> dict:
    """The group as `browser.js` reads it: a list a property; new token strings are added to `words`."""
    features = group.features
    index = [int(feature.index) for feature in features]
    if len(set(index)) != len(index) or min(index, default=0) < 0:
        raise ValueError(f"group {group.name!r}: the features need numbers of their own, from 0 up")
    if group.against is not None and group.against not in names:
        raise ValueError(f"group {group.name!r} is compared with {group.against!r}, which is none of {names}")
    try:
        shown = [_contexts(feature, words) for feature in features]
    except ValueError as error:
        raise ValueError(f"group {group.name!r}: {error}") from error
    scales = [scale for _, scale in shown]
    highest = [
        scale if x.max_activation is None else x.max_activation for x, scale in zip(features, scales, strict=True)
    ]
    return {
        "against": None if group.against is None else names.index(group.against),
        "index": index,
        "density": _numbers(feature.density for feature in features),
        "label": [feature.label for feature in features],
        "auroc": _numbers(feature.auroc for feature in features),
        "mi": _numbers(feature.mutual_information for feature in features),
        "status": [feature.status for feature in features],
        "matched": [None if feature.matched is None else int(feature.matched) for feature in features],
        "cosine": _numbers(feature.cosine for feature in features),
        "max": _numbers(highest),
        "mean": _numbers(feature.mean_activation for feature in features),
        "scale": _numbers(scales),
        "contexts": [contexts for contexts, _ in shown],
    }


def _contexts(feature: Feature, words: dict[str, int]) -> tuple[list[list], float | None]:
    """For each context token ids, activations in 255 steps, label and place of the peak; and what 255 stands for."""
    values = [np.asarray(context.values, np.float64) for context in feature.contexts]
    for context, levels in zip(feature.contexts, values, strict=True):
        if levels.shape != (len(context.tokens),):
            raise ValueError(f"feature {feature.index} has {len(context.tokens)} tokens and values {levels.shape}")
        if not (np.isfinite(levels).all() and (levels >= 0).all()):
            raise ValueError(f"feature {feature.index} has activations that are negative or no numbers")
    scale = float(max((levels.max(initial=0) for levels in values), default=0))
    packed = []
    for context, levels in zip(feature.contexts, values, strict=True):
        ids = [words.setdefault(str(token), len(words)) for token in context.tokens]
        # A token on which the feature fires, however weakly, must not be shown as one on which it does not.
        steps = np.maximum(np.rint(levels / (scale or 1) * 255), levels > 0).astype(int)
        packed.append([ids, steps.tolist(), context.label, int(levels.argmax()) if ids else 0])
    return packed, scale if feature.contexts else None


def _numbers(values) -> list[float | None]:
    """Five digits, None for what is no number: more is not shown."""
    return [None if value is None or not math.isfinite(value) else float(f"{value:.5g}") for value in values]


def sentences_html(
    name: str,
    rows: Sequence[Context],
    caption: str = "",
    *,
    measure: str = "value",
    limits: tuple[float, float] | None = None,
) -> str:
    """Sentences coloured by a value a token, and a legend; a value that is NaN or None leaves its token plain.

    `limits` are the values without colour and with the full one: `(1.0, 0.6)` colours what is far from 1. A second
    colour grows the other way. By default they grow from 0 to the largest absolute value.
    """
    values = [np.array([np.nan if value is None else value for value in row.values], np.float64) for row in rows]
    for row, value in zip(rows, values, strict=True):
        if value.size != len(row.tokens):
            raise ValueError(f"sentences {name!r}: {len(row.tokens)} tokens have {value.size} values")
    known = np.concatenate([value[np.isfinite(value)] for value in values] or [np.zeros(0)])
    plain, full = limits or (0.0, float(np.abs(known).max(initial=0)) or 1.0)
    if not (math.isfinite(plain) and math.isfinite(full) and plain != full):
        raise ValueError(f"sentences {name!r}: limits need to be two numbers, not {limits}")
    lines = []
    for row, value in zip(rows, values, strict=True):
        shades = (value - plain) / (full - plain)
        text = "".join(map(_token, row.tokens, value.tolist(), shades.tolist())).lstrip()
        tag = "" if row.label is None else f' <span class="tag">{escape(row.label)}</span>'
        lines.append(f"<li>{text}{tag}</li>\n")
    both = any(_shade(shade).startswith("down") for shade in ((known - plain) / (full - plain)).tolist())
    steps = np.linspace(-1, 1, 9) if both else np.linspace(0, 1, 5)
    legend = "".join(f'<span class="{_shade(step)}">{plain + step * (full - plain):.3g}</span>' for step in steps)
    return f"""<figure id="sentences-{name}"><ul class="sentences">
{"".join(lines)}</ul>
<p class="legend soft">{escape(measure)}: {legend}</p>
<figcaption>{escape(caption or name)}</figcaption></figure>
"""


def _token(token: str, value: float, shade: float) -> str:
    piece = len(token) > 2 and token.startswith("##")  # joins the word before it, with a mark
    special = token.startswith("[") and token.endswith("]") and token[1:-1].isalnum()
    css = " ".join(filter(None, ["token", "piece" * piece, "special" * special, _shade(shade)]))
    said = f"{token}: {value:.4g}" if math.isfinite(value) else token
    shown = token[2:] if piece else token if token.strip() else "␣"
    return f'{"" if piece else " "}<span class="{css}" title="{escape(said)}">{escape(shown)}</span>'


def _shade(value: float) -> str:
    step = math.ceil(min(abs(value), 1) * SHADES - 0.01) if math.isfinite(value) else 0  # noise about 0 has no colour
    return f"{'up' if value > 0 else 'down'} l{step}" if step else ""
