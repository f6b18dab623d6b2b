"""One self-contained HTML page about one or more runs: table, curves, rollout trees, settings.

Plain data in, text out. Everything that was recorded is data and stays data: what stands in the
page itself is escaped, the trees travel compressed in base64, and the script only ever sets text.
A content security policy forbids every request and every script but the page's own.
"""

from __future__ import annotations

import base64
import gzip
import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from string import Template

from app.page.curves import charts_html, curve_data
from app.page.trees import html_text, number, visible, words

MOST_RUNS = 8  # colours that can be told apart


@dataclass(frozen=True)
class Run:
    """What a run left: the rows of its JSONL files, and its trees as trees.py makes them."""

    name: str
    config: dict
    metrics: list[dict] = field(default_factory=list)
    evaluations: list[dict] = field(default_factory=list)
    trees: list[dict] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)  # what a reader should know about the files


def page(title: str, runs: list[Run]) -> str:
    """The page as text. Sections that the runs have no data for are left out."""
    style = own("page.css")
    script = "".join(map(own, ("page.js", "curves.js", "trees.js")))
    curves = curve_data([run.metrics for run in runs])
    trees = [
        {
            "name": visible(run.name),
            "shared_weight": number(run.config.get("shared_weight")) or 0,
            "trees": run.trees,
        }
        for run in runs
    ]
    names = [visible(run.name) for run in runs]
    logged = any(run.metrics or run.evaluations for run in runs)
    return Template(own("page.html")).substitute(
        policy=policy(style, script),
        style=style,
        script=script,
        title=html_text(title),
        lead=lead(runs),
        notes="".join(
            f'<p class="note">{html_text(note)}</p>' for run in runs for note in run.notes
        ),
        legend=legend(names),
        results=section(logged, "results", results(runs)),
        curves=section(logged, "curves", CURVES + charts_html(curves, names) + steps_table(runs)),
        numbers=in_this_run(runs[0].config),
        settings=settings_table(runs),
        data=packed({"curves": curves, "runs": trees}),
    )


def own(name: str) -> str:
    """A file beside this one."""
    return (Path(__file__).parent / name).read_text(encoding="utf-8")


def policy(style: str, script: str) -> str:
    """The content security policy: this style and this script, nothing else, no request at all."""
    digests = [hashlib.sha256(text.encode()).digest() for text in (style, script)]
    allowed = [f"'sha256-{base64.b64encode(digest).decode()}'" for digest in digests]
    return (
        f"default-src 'none'; style-src {allowed[0]}; script-src {allowed[1]}; "
        "base-uri 'none'; form-action 'none'"
    )


def packed(data: dict) -> str:
    """JSON, gzip, base64: compact, and no text in it can be taken for markup."""
    text = json.dumps(data, allow_nan=False, separators=(",", ":"))
    return base64.b64encode(gzip.compress(text.encode(), mtime=0)).decode()


# ---- sections -----------------------------------------------------------------------------

CURVES = '<p class="note">Thin: every training step. Thick: the mean of its neighbours.</p>'
TITLES = {"results": "Before and after", "curves": "Step by step"}


def section(wanted: bool, name: str, body: str) -> str:
    if not wanted:
        return ""
    return f'<section id="{name}" class="{name}"><h2>{TITLES[name]}</h2>{body}</section>'


def lead(runs: list[Run]) -> str:
    """What this is, in a sentence for each run."""
    return "".join(f"<p>{html_text(sentence(run))}</p>" for run in runs)


def sentence(run: Run) -> str:
    c = run.config
    M, N, rule = (c.get(key, "?") for key in ("group_size", "initial_rollouts", "branch_rule"))
    grpo = M == N or rule == "none"
    how = "GRPO, no forks" if grpo else f"ARPO, {N} of {M} begun at the question, rule “{rule}”"
    parts = [f"{run.name}: {Path(str(c.get('model_name', 'a model'))).name}, {how}"]
    if run.metrics:
        asked = c.get("questions_per_step", "?")
        parts.append(
            f"{run.metrics[-1]['step']} of {c.get('steps', '?')} steps of {asked} questions"
        )
    before, after = before_after(run, "sampled")
    if before and after:
        parts.append(
            f"test accuracy {words(before['accuracy'], '.1%')} → {words(after['accuracy'], '.1%')}"
        )
    return "; ".join(parts) + "."


def legend(names: list[str]) -> str:
    """Which colour is which run; a run alone needs none."""
    if len(names) < 2:
        return ""
    items = (
        f'<li><svg viewBox="0 0 30 8" aria-hidden="true"><path class="line run{i}" d="M2 4H28"/>'
        f"</svg><bdi>{html_text(name)}</bdi></li>"
        for i, name in enumerate(names)
    )
    return f'<ul class="legend" aria-label="Colours of the runs">{"".join(items)}</ul>'


def before_after(run: Run, decoding: str) -> tuple[dict | None, dict | None]:
    """The evaluation at step 0 and the last one on as many questions; or else the last one."""
    rows = [row for row in run.evaluations if row["decoding"] == decoding]
    before = next((row for row in rows if row["step"] == 0), None)
    later = [row for row in rows if row["step"] > 0]
    full = [row for row in later if before and row["questions"] == before["questions"]]
    return before, (full or later or [None])[-1]


def results(runs: list[Run]) -> str:
    """Test figures before and after training, with 95 % intervals; a table for each decoding."""
    caption = (
        "Test questions before and after training, with 95 % intervals. Sampled: at temperature 1. "
        "Greedy: always the likeliest token. ○ before, ● after, on a scale from 0 to 100 %."
    )
    tables = "".join(results_table(runs, decoding) for decoding in ("sampled", "greedy"))
    return f'<p class="note">{caption}</p><div class="pair">{tables}</div>{partial(runs)}'


def results_table(runs: list[Run], decoding: str) -> str:
    several = '<th scope="col">run</th>' if len(runs) > 1 else ""
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-label="Before and after, {decoding}">'
        f'<table class="figures"><caption class="unseen">Before and after, {decoding}</caption>'
        f'<thead><tr><th scope="col">{decoding}</th>{several}<th scope="col">before</th>'
        '<th scope="col">after</th><th scope="col"><span class="ends"><i>0</i><i>100 %</i></span>'
        f"</th></tr></thead><tbody>{''.join(result_rows(runs, decoding))}</tbody></table></div>"
    )


def partial(runs: list[Run]) -> str:
    """A word on runs whose two evaluations cannot be compared one to one."""
    notes = []
    for run in runs:
        before, after = before_after(run, "sampled")
        if before is None and after is None:
            notes.append(f"{run.name}: not evaluated yet.")
        elif after is None:
            notes.append(f"{run.name}: not evaluated since step 0.")
        elif before is None or before["questions"] != after["questions"]:
            notes.append(
                f"{run.name}: its newest look is at step {after['step']}, on "
                f"{after['questions']} questions only."
            )
    return "".join(f'<p class="note">{html_text(note)}</p>' for note in notes)


def result_rows(runs: list[Run], decoding: str) -> Iterator[str]:
    """A row for each figure and run."""
    pairs = [before_after(run, decoding) for run in runs]
    yield from figure_rows("accuracy", runs, pairs, style="main")
    known = [figures for pair in pairs for figures in pair if figures]
    for domain in sorted({domain for figures in known for domain in figures["domains"]}):
        yield from figure_rows(domain, runs, of_domain(pairs, domain), style="sub")
    yield from figure_rows("well-formed", runs, pairs, key="well_formed")
    yield from figure_rows("tool calls a question", runs, pairs, key="tool_calls", form=".2f")


def of_domain(pairs: list[tuple], domain: str) -> list[tuple]:
    return [tuple(f and f["domains"].get(domain) for f in pair) for pair in pairs]


def figure_rows(label, runs, pairs, key="accuracy", form=".1%", style="") -> Iterator[str]:
    """One figure before and after, for every run."""
    for i, (run, pair) in enumerate(zip(runs, pairs, strict=True)):
        head = f'<th scope="row" rowspan="{len(runs)}">{html_text(label)}</th>' if i == 0 else ""
        which = f'<td class="run{i}"><bdi>{html_text(run.name)}</bdi></td>' if len(runs) > 1 else ""
        shares = [((f or {}).get(key), interval(f) if key == "accuracy" else None) for f in pair]
        cells = "".join(f"<td>{cell(*share, form)}</td>" for share in shares)
        picture = dumbbell(i, *shares) if form.endswith("%") else ""
        first = "first" if i == 0 else ""
        yield f'<tr class="{style} {first}">{head}{which}{cells}<td>{picture}</td></tr>'


def interval(figures: dict | None) -> list[float] | None:
    ends = (figures or {}).get("interval")
    whole = isinstance(ends, list | tuple) and len(ends) == 2
    return ends if whole and None not in map(number, ends) else None


def cell(share, ends: list[float] | None, form: str) -> str:
    small = f" <small>{ends[0]:.0%}–{ends[1]:.0%}</small>" if ends else ""
    return words(share, form) + small


def dumbbell(i: int, before: tuple, after: tuple) -> str:
    """Two shares, each with its interval, on a line from 0 to 100 %."""
    parts = ['<path class="grid" d="M5 9H205"/>']
    for (share, ends), y, style in ((before, 6, "before"), (after, 12, "after")):
        if number(share) is None:
            continue
        if ends:
            low, high = (5 + 200 * end for end in ends)
            parts.append(f'<path class="range run{i}" d="M{low:.1f} {y}H{high:.1f}"/>')
        parts.append(
            f'<circle class="{style} run{i}" cx="{5 + 200 * share:.1f}" cy="{y}" r="3.6"/>'
        )
    return f'<svg class="dumbbell" viewBox="0 0 210 18" aria-hidden="true">{"".join(parts)}</svg>'


KEYS = (
    "reward accuracy well_formed entropy_initial entropy_after_tool forks tool_calls clip_fraction"
).split()


def steps_table(runs: list[Run], most: int = 100) -> str:
    """The curves as numbers, for those who do not see them; thinned to about `most` rows a run."""
    parts = []
    for run in runs:
        every = max(1, len(run.metrics) // most)
        rows = [
            f'<tr><th scope="row">{row["step"]}</th>'
            + "".join(f"<td>{words(row.get(key), '.4g')}</td>" for key in KEYS)
            for row in run.metrics[::every]
        ]
        which = "Every step" if every == 1 else f"Every {every}th step"
        head = "".join(f'<th scope="col">{key}</th>' for key in KEYS)
        parts.append(
            f'<div class="scroll" tabindex="0" role="region" aria-label="Steps"><table>'
            f"<caption><bdi>{html_text(run.name)}</bdi>: {which.lower()} of metrics.jsonl</caption>"
            f'<thead><tr><th scope="col">step</th>{head}</tr></thead>'
            f"<tbody>{''.join(rows)}</tbody></table></div>"
        )
    return (
        f'<details class="steps"><summary>The curves as a table</summary>{"".join(parts)}</details>'
    )


def in_this_run(config: dict) -> str:
    """The numbers that the explanation of the algorithm speaks of."""
    shown = {
        "M": "group_size", "N": "initial_rollouts", "k": "entropy_tokens",
        "α": "branch_probability", "β": "entropy_weight", "τ": "entropy_threshold",
        "w": "shared_weight",
    }  # fmt: skip
    items = (f"<b>{sign}</b> {html_text(config.get(key, '?'))}" for sign, key in shown.items())
    return ", ".join(items)


def settings_table(runs: list[Run]) -> str:
    """Every setting; where runs differ, first and marked."""
    keys = list(dict.fromkeys(key for run in runs for key in run.config))
    odd = {key for key in keys if len({repr(run.config.get(key)) for run in runs}) > 1}
    rows = []
    for key in sorted(keys, key=lambda key: key not in odd):
        values = (f"<td><bdi>{html_text(run.config.get(key, '–'))}</bdi></td>" for run in runs)
        differs = ' class="differs"' if key in odd else ""
        rows.append(f'<tr{differs}><th scope="row">{html_text(key)}</th>{"".join(values)}</tr>')
    heads = (f'<th scope="col"><bdi>{html_text(run.name)}</bdi></th>' for run in runs)
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-label="Settings">'
        f'<table class="settings"><caption>config.json{"; differences first" if odd else ""}'
        f'</caption><thead><tr><th scope="col">setting</th>{"".join(heads)}</tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table></div>"
    )
