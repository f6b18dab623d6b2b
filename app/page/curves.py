"""Curves over the steps of one or more runs, as SVG that needs no script."""

from __future__ import annotations

import math
from statistics import fmean

from app.page.trees import html_text, number, words

W, H = 440, 210  # of a chart, in its own units
LEFT, RIGHT, TOP, BOTTOM = 46, 424, 10, 182

# title, caption, format of a value, (key of metrics.jsonl, name, class) of each line
CHARTS = [
    (
        "Reward",
        "Mean over all trajectories of a step: 1 right, 0 wrong, −1 badly formed.",
        ".2f",
        [("reward", "", "")],
    ),
    (
        "Right answers",
        "Share of the trajectories of a step whose answer is right.",
        ".0%",
        [("accuracy", "", "")],
    ),
    (
        "Entropy before and after tools",
        "How unsure the policy is at the start (dashed) and right after a tool result (solid). "
        "ARPO forks where the second is above the first.",
        ".4f",
        [("entropy_after_tool", "after", ""), ("entropy_initial", "start", "dashed")],
    ),
    (
        "Forks",
        "Trajectories of a step that began in the middle of another one.",
        ".0f",
        [("forks", "", "")],
    ),
    (
        "Tool calls",
        "Calls that were executed; a call that several trajectories share counts once.",
        ".0f",
        [("tool_calls", "", "")],
    ),
    (
        "Clip fraction",
        "Share of the trained tokens that the clip held back; 0 with one update per rollout.",
        ".1%",
        [("clip_fraction", "", "")],
    ),
]


def curve_data(runs: list[list[dict]]) -> dict:
    """Steps and values for the readouts: lines[chart] = [{run, name, values over the steps}]."""
    by_step = [{row["step"]: row for row in rows} for rows in runs]
    steps = sorted({step for rows in by_step for step in rows})
    charts = [
        [
            {"run": r, "name": name, "values": [number(rows.get(s, {}).get(key)) for s in steps]}
            for r, rows in enumerate(by_step)
            for key, name, _ in lines
        ]
        for _, _, _, lines in CHARTS
    ]
    return {"steps": steps, "charts": charts, "formats": [form for _, _, form, _ in CHARTS]}


def charts_html(data: dict, names: list[str]) -> str:
    """A figure for each of CHARTS; `data` is that of `curve_data`."""
    return "\n".join(figure(i, data, names) for i in range(len(CHARTS)))


def figure(i: int, data: dict, names: list[str]) -> str:
    title, caption, form, lines = CHARTS[i]
    steps, series = data["steps"], data["charts"][i]
    known = [v for line in series for v in line["values"] if v is not None]
    if not known:
        body = '<p class="empty">No step has been logged yet.</p>'
    else:
        body = svg(
            i, steps, series, form, [style for _, _, style in lines], described(i, data, names)
        )
    return (
        f'<figure class="chart"><h3>{title}</h3>'
        f'<p class="readout" id="readout{i}" aria-live="off"></p>{body}'
        f"<figcaption>{caption}</figcaption></figure>"
    )


def described(i: int, data: dict, names: list[str]) -> str:
    """One sentence for those who do not see the curve."""
    title, _, form, _ = CHARTS[i]
    parts = []
    for line in data["charts"][i]:
        known = [
            (s, v) for s, v in zip(data["steps"], line["values"], strict=True) if v is not None
        ]
        if known:
            (first, a), (last, b) = known[0], known[-1]
            which = f"{names[line['run']]} {line['name']}".strip()
            parts.append(
                f"{which}: {words(a, form)} at step {first}, {words(b, form)} at step {last}"
            )
    return f"{title}. " + "; ".join(parts)


def svg(i: int, steps: list, series: list, form: str, styles: list[str], sentence: str) -> str:
    ticks = nice_ticks([v for line in series for v in line["values"] if v is not None], form)
    x = scale(steps[0], steps[-1], LEFT, RIGHT)
    y = scale(ticks[0], ticks[-1], BOTTOM, TOP)
    parts = [
        f'<svg class="plot" data-chart="{i}" tabindex="0" role="img" viewBox="0 0 {W} {H}" '
        f'aria-labelledby="t{i} d{i}"><title id="t{i}">{CHARTS[i][0]}</title>'
        f'<desc id="d{i}">{html_text(sentence)}. Arrow keys move through the steps.</desc>'
    ]
    for tick in ticks:
        parts.append(f'<path class="grid" d="M{LEFT} {y(tick):.1f}H{RIGHT}"/>')
        parts.append(
            f'<text x="{LEFT - 6}" y="{y(tick) + 4:.1f}" class="end">{tick_text(tick, form)}</text>'
        )
    for step in step_ticks(steps):
        parts.append(f'<text x="{x(step):.1f}" y="{H - 9}" class="mid">{step}</text>')
    for n, line in enumerate(series):
        classes = f"run{line['run']} {styles[n % len(styles)]}".strip()
        points = [(x(s), y(v)) for s, v in zip(steps, line["values"], strict=True) if v is not None]
        parts.append(f'<path class="raw {classes}" d="{path(thinned(points))}"/>')
        parts.append(f'<path class="line {classes}" d="{path(thinned(smooth(points)))}"/>')
    parts.append(f'<path class="cross" id="cross{i}" d="M0 {TOP}V{BOTTOM}" visibility="hidden"/>')
    return "".join(parts) + "</svg>"


def scale(low: float, high: float, start: float, end: float):
    span = (high - low) or 1
    return lambda value: start + (end - start) * (value - low) / span


def nice_ticks(values: list[float], form: str) -> list[float]:
    """About four round values that enclose the data and 0."""
    low, high = min(0, *values), max(0, *values)
    if low == high:
        high = 0.01 if form.endswith("%") else 1
    if form == ".0%":
        low, high = min(low, 0), max(high, 1)
    rough = max((high - low) / 4.5, 1e-300)
    unit = 10 ** math.floor(math.log10(rough))
    step = next(unit * m for m in (1, 2, 2.5, 5, 10) if unit * m >= rough)
    if form == ".0f":
        step = max(1, math.ceil(step))
    first = math.floor(low / step + 1e-9)
    last = math.ceil(high / step - 1e-9)
    return [n * step for n in range(first, last + 1)]


def tick_text(value: float, form: str) -> str:
    return f"{100 * value:.4g}%" if form.endswith("%") else f"{value:.4g}"


def step_ticks(steps: list[int]) -> list[int]:
    """The first, the last, and a few between."""
    count = min(4, len(steps) - 1)
    return sorted({steps[round(n * (len(steps) - 1) / max(1, count))] for n in range(count + 1)})


def smooth(points: list[tuple]) -> list[tuple]:
    """Mean over a twentieth of the steps around each: the eye's help, drawn over the raw line."""
    reach = len(points) // 40
    return [
        (x, fmean([y for _, y in points[max(0, n - reach) : n + reach + 1]]))
        for n, (x, _) in enumerate(points)
    ]


def thinned(points: list[tuple], most: int = 1000) -> list[tuple]:
    """At most so many points: of each stretch the lowest and the highest, so that peaks stay."""
    if len(points) <= most:
        return points
    size = math.ceil(len(points) / (most // 2))
    kept = []
    for at in range(0, len(points), size):
        stretch = points[at : at + size]
        low, high = min(stretch, key=lambda p: p[1]), max(stretch, key=lambda p: p[1])
        kept += sorted({low, high})
    return kept


def path(points: list[tuple]) -> str:
    if len(points) == 1:  # a step alone: a dot (the line's ends are round)
        points = points * 2
    return "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in points) if points else ""
