"""`verl-plugins compare`: curves of several runs in one picture and one page, with mean and spread over seeds.

Drawn over the tokens generated so far, methods are
compared at equal cost of their rollouts.
"""

from __future__ import annotations

import html
import io
import textwrap
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

import pandas as pd

from verl_plugins.commands.curves import LAST, Run, curves, ends, read_run, statistics, verdict
from verl_plugins.errors import RunError, nearest

PANELS = {
    "held-out accuracy": "validation",
    "accuracy of the step's rollouts": "health/accuracy",
    "reward": "critic/rewards/mean",
    "entropy (nats per token)": "health/entropy_mean",
    "response length (tokens)": "response_length/mean",
    "mixed groups": "health/mixed_groups",
}
"""Title -> metric."""
AXES = {"steps": "step", "tokens": "tokens generated so far"}
"""What curves can be drawn over, and the label."""
LEGEND_WIDTH = 120
"""Characters of a line of the legend."""
DASHES = ("-", "--", ":", "-.")
"""Of ten curves each."""
STYLE = "body{font-family:sans-serif;margin:2em;max-width:75em}table{border-collapse:collapse}"
STYLE += "td,th{border-bottom:1px solid #ccc;padding:.3em .8em;text-align:right}td:first-child,th:first-child"
STYLE += "{text-align:left}svg{max-width:100%;height:auto}"


def compare(arguments: Sequence[str], out: Path, metrics: Sequence[str] = (), by: str = "steps") -> list[Path]:
    """Write `curves.png` and the self-contained `index.html` to `out`; further metrics get a panel each.

    Raises:
        RunError: a folder is no run, a metric asked for is in none of the runs, or a run does not know its tokens.
    """
    if by not in AXES:
        raise RunError(f"--by {by}: curves are drawn over {' or '.join(AXES)}{nearest(by, AXES)}")
    named = curves([read_run(argument) for argument in arguments])
    for metric in metrics:
        if not any(metric in run.steps for runs in named.values() for run in runs):
            known = {key for runs in named.values() for run in runs for key in run.steps}
            raise RunError(f"--metric {metric} is in none of the runs{nearest(metric, known)}")
    panels = PANELS | {metric: metric for metric in metrics}
    data = {title: {name: statistics(runs, key) for name, runs in named.items()} for title, key in panels.items()}
    data = {title: lines for title, lines in data.items() if any(len(line) for line in lines.values())}
    drawn = {title: {name: statistics(named[name], panels[title], by) for name in named} for title in data}
    out.mkdir(parents=True, exist_ok=True)
    picture, page = out / "curves.png", out / "index.html"
    page.write_text(_page(named, {title: panels[title] for title in data}, _draw(drawn, AXES[by], picture)))
    return [picture, page]


def _draw(data: Mapping[str, Mapping[str, pd.DataFrame]], label: str, picture: Path) -> str:
    """Draw the panels into a file and as SVG text."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    columns = 2 if len(data) > 1 else 1
    rows = -(-len(data) // columns)
    names = [_legend(name) for name in next(iter(data.values()))]
    height = 3.2 * rows + 0.4 + 0.22 * sum(name.count("\n") + 1 for name in names)
    figure, axes = plt.subplots(rows, columns, figsize=(11, height), squeeze=False, layout="constrained")
    for axis, (title, lines) in zip(axes.flat, data.items(), strict=False):
        for number, line in enumerate(lines.values()):
            style = DASHES[number // 10 % len(DASHES)] + ("o" if len(line) < 4 else "")
            axis.plot(line.index, line["mean"], style, color=f"C{number % 10}")
            low, high = line["mean"] - line["std"], line["mean"] + line["std"]
            axis.fill_between(line.index, low, high, alpha=0.2, lw=0, color=f"C{number % 10}")
        axis.set_title(title, parse_math=False)
        axis.set_xlabel(label)
        axis.grid(alpha=0.3)
    legend = figure.legend(figure.axes[0].lines, names, loc="outside lower center", ncols=1, fontsize=9)
    for text in legend.get_texts():
        text.set_parse_math(False)
    for axis in figure.axes[len(data) :]:
        axis.set_axis_off()
    text = io.StringIO()
    figure.savefig(picture, dpi=120)
    figure.savefig(text, format="svg")
    plt.close(figure)
    return text.getvalue()[text.getvalue().index("<svg") :]


def _legend(name: str) -> str:
    """A curve's name on lines that fit; a leading underscore would hide it."""
    lines = textwrap.fill(name, LEGEND_WIDTH, break_on_hyphens=False)
    return f" {lines}" if lines.startswith("_") else lines


def _page(named: Mapping[str, Sequence[Run]], metrics: Mapping[str, str], svg: str) -> str:
    """Picture, table of the last steps, what differences mean, folders; nothing is loaded from anywhere."""
    rows = [
        f"<tr><td>{html.escape(name)}</td><td>{len(runs)}</td><td>{', '.join(_last_steps(runs))}</td>"
        + "".join(f"<td>{_cell(ends(runs, metric).values())}</td>" for metric in metrics.values())
        + "</tr>"
        for name, runs in named.items()
    ]
    heads = "".join(f"<th>{html.escape(title)}</th>" for title in ("", "runs", "steps", *metrics))
    folders = [
        f"<li>{html.escape(name)}: {', '.join(html.escape(str(run.folder)) for run in runs)}</li>"
        for name, runs in named.items()
    ]
    return "\n".join(
        [
            f"<!doctype html><html lang='en'><meta charset='utf-8'><title>runs</title><style>{STYLE}</style>",
            f"<h1>{html.escape(' / '.join(named))}</h1>",
            "<p>Lines are means over the runs of a curve; a band is one standard deviation to either side, where there "
            "are two runs or more.</p>",
            svg,
            f"<h2>At the end: mean of each run's last {LAST} steps</h2>",
            "<p>A metric that was not measured in them has its last value, held-out accuracy always. ± is the standard "
            "deviation over seeds; one seed has none.</p>",
            f"<table><tr>{heads}</tr>{''.join(rows)}</table>",
            *_differences(named, metrics),
            f"<h2>Folders</h2><ul>{''.join(folders)}</ul></html>",
        ]
    )


def _last_steps(runs: Sequence[Run]) -> list[str]:
    return [str(step) for step in sorted({run.last_step for run in runs})]


def _cell(values: Collection[float]) -> str:
    if not values:
        return "–"
    found = pd.Series(list(values))
    return f"{found.mean():.3f}" + (f" ± {found.std():.3f}" if len(found) > 1 else "")


def _differences(named: Mapping[str, Sequence[Run]], metrics: Mapping[str, str]) -> list[str]:
    """Against the first curve, in the first panel's metric."""
    if len(named) < 2 or not metrics:
        return []
    title, metric = next(iter(metrics.items()))
    (base, first), *others = named.items()
    lines = [f"<li>{html.escape(name)}: {html.escape(verdict(first, runs, metric))}</li>" for name, runs in others]
    return [f"<h2>{html.escape(title)}: difference from {html.escape(base)}</h2>", f"<ul>{''.join(lines)}</ul>"]
