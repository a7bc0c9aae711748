"""A study as a page that loads nothing from anywhere, as Markdown and as plain data, with its picture."""

from __future__ import annotations

import html
import io
import math
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from verl_plugins.commands.compare import STYLE
from verl_plugins.commands.curves import printable
from verl_plugins.commands.study.results import Result
from verl_plugins.commands.study.summary import ACCURACY, Interval, Row, Summary

CURVES = 10
"""With more variants only the baseline, and the best and worst of the others, are drawn as curves."""


def plain(summary: Summary) -> dict[str, Any]:
    """The table as plain data."""
    study = summary.study
    told = {"title": study.title, "preset": study.preset, "steps": study.steps, "baseline": study.baseline}
    told |= {"budget": study.budget, "seeds": [*study.seeds]}
    rows = [
        {
            "variant": row.variant,
            "arguments": [*study.variants[row.variant]],
            "seeds": [*row.seeds],
            "columns": {title: _plain(row.cells.get(title)) for title in summary.columns},
            "differences": {title: _plain(cell) for title, cell in row.differences.items()},
            "says": verdict(row),
        }
        for row in summary.rows
    ]
    missing = {name: [*seeds] for name, seeds in summary.missing.items()}
    return {"study": told, "compared at": summary.budget, "table": rows, "missing": missing}


def _plain(cell: Interval | None) -> dict[str, Any] | None:
    return None if cell is None else asdict(cell)


def verdict(row: Row) -> str:
    """What the difference in accuracy means; of the baseline, that it is one."""
    if not row.differences:
        return "baseline"
    found = row.differences.get(ACCURACY)
    return "not measured in both" if found is None else found.says


def compared_at(summary: Summary) -> str:
    """In words, where accuracies are compared."""
    if summary.budget is None:
        return "no run has a held-out accuracy at a known cost"
    unit = "tokens generated for training" if summary.study.budget == "tokens" else "steps"
    return f"compared at {summary.budget:,.0f} {unit}, what the cheapest run took in all"


def number(value: float) -> str:
    """Three decimals of what is about one, none of what is large."""
    if not math.isfinite(value):
        return str(value)
    return f"{value:.3f}" if abs(value) < 10 else f"{value:,.1f}" if abs(value) < 1000 else f"{value:,.0f}"


def cell(found: Interval | None) -> str:
    """`0.512 (0.480 to 0.544)`."""
    if found is None:
        return "–"
    return (
        number(found.mean)
        if found.low is None
        else f"{number(found.mean)} ({number(found.low)} to {number(found.high)})"
    )


def difference(found: Interval | None) -> str:
    """`+0.031 (-0.004 to +0.066)`."""
    if found is None:
        return "–"
    if found.low is None:
        return f"{found.mean:+.3f}"
    return f"{found.mean:+.3f} ({found.low:+.3f} to {found.high:+.3f})"


def table(summary: Summary) -> list[list[str]]:
    """Heads and rows of the main table, as text."""
    first, *others = summary.columns
    heads = ["variant", "seeds", first, f"minus {summary.study.baseline}", "which is", *others]
    rows = [
        [row.variant, str(len(row.seeds)), cell(row.cells.get(first)), difference(row.differences.get(first))]
        + [verdict(row), *(cell(row.cells.get(title)) for title in others)]
        for row in summary.rows
    ]
    return [heads, *rows]


def missing(summary: Summary) -> str | None:
    """Which runs are not there yet."""
    parts = [
        f"{name}: seed{'s' * (len(seeds) > 1)} {', '.join(map(str, seeds))}" for name, seeds in summary.missing.items()
    ]
    return f"not finished yet: {'; '.join(parts)}" if parts else None


def markdown(summary: Summary) -> str:
    """Title, where it is compared, the table."""
    heads, *rows = [[printable(text).replace("|", "\\|") for text in row] for row in table(summary)]
    lines = [f"# {_title(summary)}", "", f"Means over seeds with 95 % intervals; {compared_at(summary)}."]
    lines += ["Differences are paired by seed.", "", "| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    lines += ["| " + " | ".join(row) + " |" for row in rows]
    if note := missing(summary):
        lines += ["", f"{printable(note)}."]
    return "\n".join(lines) + "\n"


def page(summary: Summary, svg: str) -> str:
    """One HTML file; text of others is shown, never interpreted."""
    heads, *rows = [[html.escape(text) for text in row] for row in table(summary)]
    head = "".join(f"<th>{text}</th>" for text in heads)
    body = "".join("<tr>" + "".join(f"<td>{text}</td>" for text in row) + "</tr>" for row in rows)
    words = {row.variant: " ".join(summary.study.variants[row.variant]) for row in summary.rows}
    used = "".join(f"<li>{html.escape(name)}: <code>{html.escape(said)}</code></li>" for name, said in words.items())
    notes = [text for text in (missing(summary),) if text]
    return "\n".join(
        [
            f"<!doctype html><html lang='en'><meta charset='utf-8'><title>{html.escape(_title(summary))}</title>",
            f"<style>{STYLE}</style><h1>{html.escape(_title(summary))}</h1>",
            f"<p>Means over seeds with 95 % intervals (Student's t); {html.escape(compared_at(summary))}. Differences "
            "are paired by seed. Of twenty differences that are none, one is called more than noise by chance.</p>",
            *(f"<p>{html.escape(text)}.</p>" for text in notes),
            svg,
            f"<div style='overflow-x:auto'><table><tr>{head}</tr>{body}</table></div><h2>Variants</h2><ul>{used}</ul>",
            "</html>\n",
        ]
    )


def _title(summary: Summary) -> str:
    return printable(summary.study.title or " / ".join(summary.study.variants))


def draw(summary: Summary, results: Sequence[Result], file: Path) -> str:
    """Curves over the budget and the differences with their intervals, as a picture and as SVG text."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = summary.rows
    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 3 + 0.24 * len(rows)), layout="constrained")
    for row in _drawn(rows):
        _curve(left, row.variant, summary, results)
    left.set_title(ACCURACY)
    left.set_xlabel("tokens generated" if summary.study.budget == "tokens" else "step")
    left.legend(fontsize=8)
    left.grid(alpha=0.3)
    compared = [(row.variant, row.differences[ACCURACY]) for row in rows[::-1] if row.differences.get(ACCURACY)]
    for place, (_, found) in enumerate(compared):
        reach = 0.0 if found.low is None else found.high - found.mean
        colour = "C2" if found.says.startswith("higher") else "C3" if found.says.startswith("lower") else "0.5"
        right.errorbar(found.mean, place, xerr=reach, fmt="o", color=colour, capsize=3)
    right.axvline(0, color="0.3", lw=1)
    right.set_yticks(range(len(compared)), [printable(name)[:40] for name, _ in compared], parse_math=False)
    right.set_title(f"minus {printable(summary.study.baseline)[:40]}, 95 % intervals", parse_math=False)
    right.grid(alpha=0.3, axis="x")
    text = io.StringIO()
    figure.savefig(file, dpi=110)
    figure.savefig(text, format="svg", metadata={"Date": None})
    plt.close(figure)
    return text.getvalue()[text.getvalue().index("<svg") :]


def _drawn(rows: Sequence[Row]) -> Sequence[Row]:
    return rows if len(rows) <= CURVES else [*rows[: CURVES // 2], *rows[-CURVES // 2 :]]


def _curve(axis: Any, variant: str, summary: Summary, results: Sequence[Result]) -> None:
    """Mean over seeds at each validation."""
    place = 1 if summary.study.budget == "tokens" else 0
    curves = [one.curve for one in results if one.variant == variant and one.seed in summary.study.seeds]
    shortest = min(map(len, curves), default=0)
    points = [[curve[at] for curve in curves] for at in range(shortest)]
    points = [point for point in points if all(one[place] is not None for one in point)]
    costs = [math.fsum(one[place] for one in point) / len(point) for point in points]
    means = [math.fsum(one[2] for one in point) / len(point) for point in points]
    style = {"color": "black", "lw": 2} if variant == summary.study.baseline else {"lw": 1}
    axis.plot(costs, means, "o-", ms=3, label=f" {printable(variant)[:40]}", **style)
