"""The page of a run, or of two side by side: one HTML file that needs nothing else."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape

import grain_ddp
from grain_ddp._tools.chart import figure
from grain_ddp._tools.findings import (
    BAD,
    FINE,
    LOOK,
    UNKNOWN,
    Finding,
    findings,
    numbers,
    opening,
    verdict,
)
from grain_ddp._tools.history import FEWEST, Run
from grain_ddp._tools.panels import TOPICS, Panel, alike, panels

_READ = {  # how to read the evidence
    "direction": "Near 1: where the others go. Near 0: no relation. Below 0: against them.",
    "length": "One that is far longer than the others decides where a mean goes; one that is far "
    "shorter, where the min-norm step goes.",
    "pairs": "Groups whose data ask for the same have a cosine above 0.",
    "conflicts": "A step that points against a group raises the loss of that group's batch, to "
    "first order. GRAIN's never does, to rounding.",
    "weights": "Blank is the equal share of a mean.",
    "noise": "It takes the groups' batches for draws from the same data.",
    "gap": "0 where no other weights make a shorter step. Equal weights have a gap: it is what "
    "GRAIN would change.",
}
_CALM = {  # in place of findings
    "direction": "No group points elsewhere than the others.",
    "length": "No group's gradient is far longer or shorter than the others'.",
    "pairs": "No two groups pull against each other for long.",
    "weights": "No group is favoured or left out over the whole run.",
}
_SIGNS = {BAD: "✕", LOOK: "!", FINE: "✓", UNKNOWN: "?"}
_ORDER = (BAD, LOOK, FINE, None)


def page(runs: Mapping[str, Run], batch: int | None = None, refresh: int | None = None) -> str:
    """The HTML of one run or of two.

    Args:
        runs: by name.
        batch: examples in one group's batch.
        refresh: the browser asks for the page again after so many seconds.
    """
    found = {name: list(findings(run, batch)) for name, run in runs.items()}
    drawn = [panels(run) for run in runs.values()]
    if len(drawn) == 2:
        drawn = list(alike(*drawn))
    title = escape(" and ".join(runs))
    again = f'<meta http-equiv="refresh" content="{refresh}">' if refresh else ""
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="generator" content="grain_ddp {grain_ddp.__version__}">
<meta name="color-scheme" content="light dark">{again}
<title>{title}: grain_ddp</title>
<style>{_STYLE}</style>
</head>
<body class="{"two" if len(runs) == 2 else "one"}">
<header><p class="kicker">grain-ddp report</p><h1>{title}</h1></header>
<div class="columns">{"".join(_verdict(n, r, found[n], len(runs)) for n, r in runs.items())}</div>
<main>
{_topics(runs, found, drawn)}
{_table(runs)}
</main>
<footer>Made by grain_ddp {grain_ddp.__version__}. A group is a row of the Gramian: a rank, unless
you set <code>groups</code> or <code>microbatches</code>. Early and late are the first and the last
third of the records. A group is called an outlier, or its length remarkable, by 3.5 robust standard
deviations of the groups and 4 standard errors.</footer>
</body>
</html>
"""


def _verdict(name: str, run: Run, found: list[Finding], runs: int) -> str:
    level, words = verdict(run, found)
    whose = f'<p class="whose">{escape(name)}</p>' if runs > 1 else ""
    most = next((f.text for f in found if f.level == level and level != FINE), "")
    more = f"<p>{escape(most)}</p>" if most else ""
    return (
        f'<section class="verdict {level}">{whose}<p class="said"><span class="sign {level}">'
        f"{_SIGNS[level]}</span><strong>{escape(words)}</strong></p>{more}"
        f'<p class="muted">{escape(opening(run))}</p></section>'
    )


def _topics(
    runs: Mapping[str, Run], found: dict[str, list[Finding]], drawn: list[dict[str, Panel]]
) -> str:
    """What is worst first, each with its evidence."""

    def rank(topic: str) -> int:
        levels = [f.level for every in found.values() for f in every if f.topic == topic]
        return min((_ORDER.index(level) for level in levels), default=len(_ORDER))

    made = []
    for topic in sorted(TOPICS, key=rank):
        if topic == "records" and not any(f.topic == topic for fs in found.values() for f in fs):
            continue
        if topic != "records" and not any(drawn):
            continue
        sides = []
        for (name, run), panel in zip(runs.items(), drawn, strict=True):
            mine = [f for f in found[name] if f.topic == topic]
            sides.append(_side(topic, name, run, mine, panel.get(topic), len(runs)))
        sign = _sign([f for fs in found.values() for f in fs if f.topic == topic])
        sign = sign if len(runs) == 1 else ""  # else each run has its own
        read = f'<p class="muted">{escape(_READ[topic])}</p>' if topic in _READ else ""
        made.append(
            f'<section class="topic"><h2>{sign}{escape(TOPICS[topic])}</h2>{read}'
            f'<div class="columns">{"".join(sides)}</div></section>'
        )
    return "\n".join(made)


def _sign(found: list[Finding]) -> str:
    """Of the worst of them."""
    level = min((f.level for f in found), key=_ORDER.index, default=None)
    return f'<span class="sign {level}">{_SIGNS[level]}</span>' if level else ""


def _side(
    topic: str, name: str, run: Run, found: list[Finding], panel: Panel | None, runs: int
) -> str:
    words = [f'<p class="{f.level or "note"}">{escape(f.text)}</p>' for f in found]
    calm = topic in _CALM and len(run.steps) >= FEWEST and run.n > 1
    if calm and (not found or (topic == "length" and found[0].level is None)):
        words.insert(0, f"<p>{escape(_CALM[topic])}</p>")
    whose = f'<p class="whose">{_sign(found)}{escape(name)}</p>' if runs > 1 else ""
    return (
        f'<div class="side"><div class="words">{whose}{"".join(words)}</div>'
        f"{figure(panel) if panel else ''}</div>"
    )


def _table(runs: Mapping[str, Run]) -> str:
    made = {name: numbers(run) for name, run in runs.items() if len(run.steps)}
    if not made:
        return ""
    names = list(dict.fromkeys(row for values in made.values() for row in values))
    top = "".join(f'<th colspan="2">{escape(name)}</th>' for name in made)
    whose = f"<tr><th></th>{top}</tr>" if len(made) > 1 else ""
    rows = "".join(
        f"<tr><th>{escape(row)}</th>"
        + "".join(f"<td>{v}</td>" for values in made.values() for v in values.get(row, ("", "")))
        + "</tr>"
        for row in names
    )
    heads = "<th>early</th><th>late</th>" * len(made)
    return (
        '<section class="topic"><h2>Numbers</h2><div class="scroll"><table>'
        f"<thead>{whose}<tr><th></th>{heads}</tr></thead><tbody>{rows}</tbody></table></div></section>"
    )


_STYLE = """
:root { --bg: #f6f7f9; --card: #fff; --ink: #1b1f24; --muted: #5c6670; --line: #d9dee3;
  --bad: #b3261e; --look: #8a5a00; --fine: #1d6f42; --unknown: #5c6670;
  --bad-bg: #fdecea; --look-bg: #fff4dc; --fine-bg: #e6f4ec; --unknown-bg: #eceff2;
  --grain: #1668c7; --mark0: #d6281f; --mark1: #d9760b; --mark2: #8430b8; --mark3: #8a5a2b;
  --group: #98a2ad; --noise: #1d7f4e; }
@media (prefers-color-scheme: dark) { :root { --bg: #111418; --card: #1a1e24; --ink: #e6e9ec;
  --muted: #9aa4ae; --line: #343b43; --bad: #ff8a80; --look: #ffc35a; --fine: #7ad7a0;
  --unknown: #b4bdc6; --bad-bg: #3a1d1c; --look-bg: #372b12; --fine-bg: #15301f;
  --unknown-bg: #262c33; --grain: #6cb2ff; --mark0: #ff6b61; --mark1: #ffab4a; --mark2: #cf8df7;
  --mark3: #d3a877; --group: #7d8894; --noise: #63d29a; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 28px 20px 48px; max-width: 1080px; background: var(--bg);
  color: var(--ink); font: 16px/1.5 system-ui, -apple-system, "Segoe UI", sans-serif; }
p { margin: 0 0 .6em; } h1 { margin: 0 0 .7em; font-size: 1.7rem; overflow-wrap: anywhere; }
h2 { display: flex; align-items: flex-start; margin: 0 0 .3em; font-size: 1.15rem; }
.kicker { margin: 0; color: var(--muted); font-size: .85rem; letter-spacing: .04em; }
.muted { color: var(--muted); font-size: .92rem; }
.columns { display: grid; gap: 20px; } .two .columns { grid-template-columns: 1fr 1fr; }
.columns > * { min-width: 0; }
.two .side { display: flex; flex-direction: column; justify-content: space-between; }
.verdict { padding: 18px 22px 10px; border-radius: 10px; border-left: 6px solid; }
.said { display: flex; gap: 12px; align-items: center; font-size: 1.35rem; line-height: 1.3; }
.two .said { font-size: 1.15rem; }
.verdict .sign { width: 1.7em; height: 1.7em; font-size: 1rem; }
.verdict.bad { background: var(--bad-bg); border-color: var(--bad); }
.verdict.look { background: var(--look-bg); border-color: var(--look); }
.verdict.fine { background: var(--fine-bg); border-color: var(--fine); }
.verdict.unknown { background: var(--unknown-bg); border-color: var(--unknown); }
.sign { flex: none; display: inline-flex; align-items: center; justify-content: center;
  width: 1.45em; height: 1.45em; margin-right: .5em; border-radius: 50%; color: var(--card);
  font-size: .85rem; font-weight: 700; } .said .sign { margin: 0; }
h2 .sign { margin-top: .22rem; }
.sign.bad { background: var(--bad); } .sign.look { background: var(--look); }
.sign.fine { background: var(--fine); } .sign.unknown { background: var(--unknown); }
.topic { margin-top: 20px; padding: 20px 22px; border: 1px solid var(--line); border-radius: 10px;
  background: var(--card); }
.one .side { display: grid; grid-template-columns: minmax(0, 4fr) minmax(0, 6fr); gap: 28px;
  align-items: start; }
.whose { color: var(--muted); font-weight: 600; font-size: .92rem; overflow-wrap: anywhere; }
.words p.bad, .words p.look { padding-left: 12px; border-left: 3px solid; }
.words p.bad { border-color: var(--bad); } .words p.look { border-color: var(--look); }
figure { margin: 0; } figcaption { font-weight: 600; font-size: .92rem; }
svg { display: block; width: 100%; height: auto; }
svg text { fill: var(--muted); font: 12.5px system-ui, sans-serif; }
svg .cell { fill: var(--ink); } .middle { text-anchor: middle; } .end { text-anchor: end; }
svg path { fill: none; stroke-width: 1.6; stroke-linejoin: round; stroke-linecap: round; }
svg .grid { stroke: var(--line); stroke-width: 1; } svg .axis { stroke: var(--muted);
  stroke-width: 1; } svg .band { fill: var(--group); opacity: .3; stroke: none; }
svg .frame { fill: none; stroke: var(--line); } image { image-rendering: pixelated; }
svg .group { stroke: var(--group); stroke-width: 1; } svg .mean { stroke: var(--ink);
  stroke-width: 2; stroke-dasharray: 5 4; } svg .grain { stroke: var(--grain); stroke-width: 2.2; }
svg .noise { stroke: var(--noise); stroke-width: 2; } svg .zero { stroke: var(--muted);
  stroke-width: 1; } svg .limit { stroke: var(--ink); stroke-dasharray: 1 5; stroke-width: 2; }
svg .mark0 { stroke: var(--mark0); stroke-width: 2.2; }
svg .mark1 { stroke: var(--mark1); stroke-width: 2.2; }
svg .mark2 { stroke: var(--mark2); stroke-width: 2.2; }
svg .mark3 { stroke: var(--mark3); stroke-width: 2.2; }
.pair { display: grid; grid-template-columns: 1fr 1fr; gap: 16px; }
.legend { display: flex; flex-wrap: wrap; gap: 2px 18px; margin: 2px 0 8px; padding: 0;
  list-style: none; color: var(--muted); font-size: .87rem; }
.legend li { display: flex; align-items: center; gap: 7px; }
.line { width: 22px; height: 0; border-top: 3px solid var(--group); }
.line.mean { border-top-style: dashed; border-color: var(--ink); }
.line.limit { border-top-style: dotted; border-color: var(--ink); }
.line.grain { border-color: var(--grain); } .line.noise { border-color: var(--noise); }
.line.mark0 { border-color: var(--mark0); } .line.mark1 { border-color: var(--mark1); }
.line.mark2 { border-color: var(--mark2); } .line.mark3 { border-color: var(--mark3); }
.key { width: 15px; height: 15px; border: 1px solid var(--line); border-radius: 3px; }
.scroll { overflow-x: auto; } table { border-collapse: collapse; font-size: .92rem; }
th, td { padding: 5px 14px 5px 0; border-bottom: 1px solid var(--line); text-align: right;
  font-variant-numeric: tabular-nums; }
th { font-weight: 500; } th:first-child { text-align: left; }
thead th { color: var(--muted); }
footer { margin-top: 24px; color: var(--muted); font-size: .85rem; }
@media (max-width: 760px) { body { padding: 18px 14px 36px; font-size: 15px; }
  .one .side, .two .columns { grid-template-columns: 1fr; gap: 14px; }
  .topic, .verdict { padding: 15px 15px 12px; } svg text { font-size: 18px; }
  .pair svg text { font-size: 14px; } }
"""
