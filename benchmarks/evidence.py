"""Puts the numbers of a finished study into docs/evidence.md, and its picture beside it.

    verl-plugins study benchmarks/studies/common.yaml --out runs/common
    python benchmarks/evidence.py runs/common

What was measured of each run is kept in `benchmarks/studies/results/`; without an argument the page is made from that.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

from verl_plugins.commands.study import report, results
from verl_plugins.commands.study.design import from_options
from verl_plugins.commands.study.summary import ACCURACY, Summary, summarise

ROOT = Path(__file__).parents[1]
STUDY = ROOT / "benchmarks/studies/common.yaml"
KEPT = ROOT / "benchmarks/studies/results/common"
PAGE, PICTURE = ROOT / "docs/evidence.md", ROOT / "docs/evidence.png"
BEGIN, END = "<!-- made by benchmarks/evidence.py -->", "<!-- end -->"
COLUMNS = {
    "held-out after": "held-out accuracy at the end",
    "hard prompts solved once in 8, after": "hard prompts solved once in 8",
    "entropy, last 3": "entropy at the end",
    "all-wrong groups": "all-wrong groups",
    "mixed groups": "mixed groups",
    "length, last 3": "length at the end",
    "truncated, last 3": "truncated at the end",
    "tokens (thousands)": "tokens generated (thousands)",
}
"""Of the study -> on the page."""


def summary() -> tuple[Summary, list[results.Result]]:
    """What the kept results say."""
    study = from_options([str(STUDY)], (), ())
    known = {one.run: one for one in results.read(KEPT).values()}
    wanted = {study.name(name, seed) for name in study.variants for seed in study.seeds}
    found = [one for run, one in known.items() if run in wanted]
    return summarise(study, found), found


def block(made: Summary) -> str:
    """The table of the page."""
    heads = ["recipe", "seeds", "minus grpo, at equal tokens", "which is", *COLUMNS.values()]
    lines = [f"Accuracies in the third column are {report.compared_at(made)}.", ""]
    lines += ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    for row in made.rows:
        first = [
            row.variant,
            str(len(row.seeds)),
            report.difference(row.differences.get(ACCURACY)),
            report.verdict(row),
        ]
        cells = [_mean(row.cells.get(title)) for title in COLUMNS]
        lines.append("| " + " | ".join([*first, *cells]) + " |")
    return "\n".join(lines)


def _mean(cell) -> str:
    return "–" if cell is None else report.number(cell.mean)


def main() -> None:
    if len(sys.argv) > 1:
        KEPT.mkdir(parents=True, exist_ok=True)
        shutil.copy(Path(sys.argv[1]) / results.FILE, KEPT / results.FILE)
    made, found = summary()
    page = PAGE.read_text(encoding="utf-8")
    before, after = page.partition(BEGIN)[0], page.partition(END)[2]
    PAGE.write_text(f"{before}{BEGIN}\n{block(made)}\n{END}{after}", encoding="utf-8")
    report.draw(made, found, PICTURE)


if __name__ == "__main__":
    main()
