"""`report.html`: one page that needs nothing but itself.

Styles are inline, pictures are data URLs, and the page's own policy forbids every script but one, named by its hash,
that is there only for a browser of features (`browser.py`). So text from the data (an article with `<script>` in it, a
token `<img onerror=...>`) can only ever be text. Every string is escaped where it enters the page.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Mapping, Sequence
from html import escape
from urllib.parse import quote

import numpy as np

from experiments.harness import browser
from experiments.harness.claims import VERDICTS, Claim
from experiments.harness.run import Figure, Run, Table, write_file

_MARKS = dict(zip(VERDICTS, ("\N{CHECK MARK}", "\N{MULTIPLICATION SIGN}", "\N{EN DASH}"), strict=True))

_CSS = """
:root { color-scheme: light dark; --text: #1c1e21; --soft: #5c6370; --page: #fff; --card: #f5f6f8; --edge: #d7dae0;
  --yes: #00694a; --no: #a83c00; --open: #5c6370; --link: #005a94; }
@media (prefers-color-scheme: dark) { :root { --text: #e6e8eb; --soft: #a3a9b4; --page: #16181c; --card: #20242a;
  --edge: #3a4049; --yes: #4fcf9f; --no: #ff9a66; --open: #a3a9b4; --link: #7cc0f5; } }
body { font: 16px/1.55 system-ui, sans-serif; color: var(--text); background: var(--page); max-width: 56rem;
  margin: 0 auto; padding: 1.5rem 1rem 4rem; overflow-wrap: anywhere; }
h1 { font-size: 1.8rem; line-height: 1.2; margin: 0 0 .3rem; } h2 { font-size: 1.3rem; margin: 2.5rem 0 .8rem; }
h3 { font-size: 1rem; margin: 0; } a { color: var(--link); } .soft { color: var(--soft); }
nav a { margin-right: 1rem; }
.claims { list-style: none; padding: 0; margin: 0; }
.claims li { background: var(--card); border-left: .35rem solid var(--verdict); padding: .7rem 1rem;
  margin: 0 0 .7rem; }
.supported { --verdict: var(--yes); } .not-supported { --verdict: var(--no); } .not-tested { --verdict: var(--open); }
.verdict { color: var(--verdict); font-weight: 700; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .1rem 1rem; margin: .4rem 0 0; }
dt { color: var(--soft); } dd { margin: 0; }
figure { margin: 0 0 2rem; } figcaption { color: var(--soft); font-size: .95rem; margin-top: .3rem; }
img { display: block; max-width: 100%; height: auto; background: #fff; border-radius: .2rem; }
.scroll { overflow-x: auto; margin: 0 0 .3rem; } .block { margin: 0 0 2rem; }
table { border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums; overflow-wrap: normal; }
caption { text-align: left; font-weight: 600; padding-bottom: .3rem; }
th, td { text-align: left; padding: .25rem .8rem .25rem 0; border-bottom: 1px solid var(--edge); vertical-align: top;
  max-width: 30rem; overflow-wrap: break-word; white-space: pre-wrap; }
.pairs th, .pairs td { overflow-wrap: anywhere; max-width: none; } .pairs th { font-weight: 400; min-width: 6rem; }
.number { text-align: right; white-space: nowrap; }
code, pre { font: .88em ui-monospace, monospace; } pre { background: var(--card); padding: .7rem 1rem; 
  margin: 0 0 1.5rem; white-space: pre-wrap; }
@media (max-width: 34rem) { dl { grid-template-columns: 1fr; } dd { margin-bottom: .3rem; } }
@media print { body { max-width: none; padding: 0; font-size: 11pt; } nav { display: none; }
  figure, .claims li, .block { break-inside: avoid; } .scroll { overflow: visible; } }
"""
_POLICY = "default-src 'none'; img-src data:; base-uri 'none'; form-action 'none'; style-src "


def write(run: Run, title: str, paper: str, summary: Sequence[str], arxiv: str = "") -> None:
    """Write `report.html` from the claims, figures and tables that `run` was given.

    `summary` holds plain paragraphs: what was run and what came out; `paper` names the paper, `arxiv` is its number.
    """
    if not run.primary:
        return
    page = _page(run, title, paper, summary, arxiv)
    write_file(run.out / "report.html", page.encode(errors="backslashreplace"))


def _page(run: Run, title: str, paper: str, summary: Sequence[str], arxiv: str) -> str:
    source = f' (<a href="https://arxiv.org/abs/{quote(arxiv)}">arXiv {_text(arxiv)}</a>)' if arxiv else ""
    parts = {
        "Claims": _claims(run.claims),
        "Figures": "".join(map(_figure, run.figures.values())),
        "Sentences": "".join(run.coloured.values()),
        "Features": "".join(run.browsers.values()),
        "Tables": "".join(map(_table, run.tables.values())),
        "Configuration": _configuration(run),
    }
    parts = {name: part for name, part in parts.items() if part}
    links = "".join(f'<a href="#{name.lower()}">{name}</a>' for name in parts)
    sections = "".join(
        f'<section aria-labelledby="{name.lower()}"><h2 id="{name.lower()}">{name}</h2>\n{part}</section>\n'
        for name, part in parts.items()
    )
    css = _CSS + browser.CSS if run.coloured or run.browsers else _CSS
    policy, script = _POLICY + _hash(css), ""
    if run.browsers:
        policy += f"; script-src {_hash(browser.SCRIPT)}"
        script = f"<script>{browser.SCRIPT}</script>\n"
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{_text(title)}</title>
<link rel="icon" href="data:,">
<style>{css}</style>
</head>
<body>
<header>
<h1>{_text(title)}</h1>
<p class="soft">A test of: {_text(paper)}{source}</p>
{"".join(f"<p>{_text(paragraph)}</p>" for paragraph in summary)}
<nav aria-label="Sections">{links}</nav>
</header>
<main>
{sections}</main>
{script}</body>
</html>
"""


def _hash(text: str) -> str:
    """How a content security policy names an inline style or script."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def _claims(claims: Sequence[Claim]) -> str:
    if not claims:
        return ""
    counts = [(sum(claim.verdict == verdict for claim in claims), verdict) for verdict in VERDICTS]
    total = ", ".join(f"{count} {verdict}" for count, verdict in counts if count)
    return f'<p>{total}.</p>\n<ul class="claims">{"".join(map(_claim, claims))}</ul>\n'


def _claim(claim: Claim) -> str:
    measured = _number(claim.measured)
    if claim.interval is not None:
        measured += f" [{_number(claim.interval[0])}, {_number(claim.interval[1])}]"
    seeds = f"{claim.seeds} seed" + "s" * (claim.seeds != 1)
    rows = {
        "Expected": "" if claim.expected is None else _number(claim.expected),
        "Measured": f"{measured} ({seeds})" if claim.measured is not None else "no number",
        "Rule": claim.rule,
        "Source": f"{claim.paper} (claim {claim.id})",
    }
    return f"""<li class="{claim.verdict.replace(" ", "-")}">
<h3><span class="verdict">{_MARKS[claim.verdict]} {claim.verdict}</span>: {_text(claim.statement)}</h3>
<dl>{"".join(f"<dt>{name}</dt><dd>{_text(value)}</dd>" for name, value in rows.items() if value)}</dl></li>
"""


def _figure(figure: Figure) -> str:
    width, height = (int.from_bytes(figure.png[at : at + 4], "big") for at in (16, 20))  # the PNG header
    image = base64.b64encode(figure.png).decode()
    return f"""<figure id="figure-{_text(figure.name)}">
<img src="data:image/png;base64,{image}" alt="{_text(figure.alt)}" width="{width}" height="{height}">
<figcaption>{_text(figure.caption or figure.alt)}</figcaption></figure>
"""


def _table(table: Table) -> str:
    # A column is right-aligned when nothing but numbers is in it.
    numeric = [all(_is_number(row[at]) or row[at] is None for row in table.head) for at in range(len(table.columns))]
    classes = [' class="number"' if right else "" for right in numeric]
    head = "".join(f'<th scope="col"{css}>{_text(name)}</th>' for name, css in zip(table.columns, classes, strict=True))
    rows = "".join(
        "<tr>" + "".join(f"<td{css}>{_text(_number(x))}</td>" for x, css in zip(row, classes, strict=True)) + "</tr>\n"
        for row in table.head
    )
    shown = f"first {len(table.head)} of {table.rows:,} rows" if table.rows > len(table.head) else f"{table.rows} rows"
    caption = table.caption or table.name
    return f"""<div class="block"><div class="scroll" role="region" tabindex="0" aria-label="{_text(caption)}">
<table><caption>{_text(caption)}</caption><thead><tr>{head}</tr></thead>
<tbody>{rows}</tbody></table></div>
<p class="soft">{shown}; all digits in <a href="tables/{_text(table.name)}.csv">tables/{_text(table.name)}.csv</a></p>
</div>
"""


def _configuration(run: Run) -> str:
    record = run.record
    here = record["environment"]
    facts = {
        "Started": record["started"],
        "Device": f"{here['device_count']} x {here['device_kind']}",
        "System": here["system"],
        "Versions": ", ".join(f"{name} {version}" for name, version in here["versions"].items()),
        "Commit": here["git_commit"] or "unknown",
    }
    if record["resumed_in"]:
        facts["Resumed"] = f"in {len(record['resumed_in'])} other environment(s), see config.json"
    command = f"<pre>{_text(record['command'])}</pre>\n" if record["command"] else ""
    return f"""{command}{_pairs("Where it ran", facts)}{_pairs("Settings", run.config)}
<p class="soft">All of it in <a href="config.json">config.json</a></p>
"""


def _pairs(caption: str, values: Mapping) -> str:
    rows = "".join(
        f'<tr><th scope="row">{_text(key)}</th><td>'
        f"{_text(value if isinstance(value, str) else json.dumps(value, ensure_ascii=False))}</td></tr>\n"
        for key, value in values.items()
    )
    head = f'<table class="pairs"><caption>{_text(caption)}</caption>'
    return f'<div class="block">{head}<tbody>{rows}</tbody></table></div>\n'


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) or hasattr(value, "dtype") and value.dtype.kind in "iuf"


def _number(value: object) -> str:
    """Four digits are enough to read; the files have all of them."""
    if value is None:
        return ""
    if isinstance(value, bool) or not _is_number(value):
        return str(value)
    whole = isinstance(value, int) or getattr(value, "dtype", np.dtype(float)).kind in "iu"
    return f"{value:,}" if whole else f"{value:.4g}"


def _text(value: object) -> str:
    return escape(str(value), quote=True)
