"""What a lab found, compared with the table on its page."""

from __future__ import annotations

import re
from pathlib import Path

from verl_plugins.lab import Findings

PAGES = Path(__file__).parents[1] / "docs" / "recipes"
NUMBER = re.compile(r"-?\d+(?:\.\d+)?(?:e[+-]?\d+)?")
SMALL = 1e-4
"""Rounding noise: numbers this small are alike."""


def not_on_page(name: str, found: Findings, close: float = 0.01) -> list[str]:
    """Claims whose row `| claim | whose | expected | measured here |` is not on the recipe's page.

    Another processor rounds otherwise: measured numbers may differ by the share `close`.
    """
    rows = [
        [cell.strip() for cell in line.strip("| ").split(" | ")]
        for line in (PAGES / f"{name}.md").read_text(encoding="utf-8").splitlines()
        if line.startswith("| ")
    ]
    wrong = []
    for claim in found.claims:
        measured = [row[3] for row in rows if row[:3] == [claim.name, claim.source, claim.expected] and len(row) == 4]
        if not any(_same(claim.measured, text, close) for text in measured):
            wrong.append(f"| {claim.name} | {claim.source} | {claim.expected} | {claim.measured} |")
    return wrong


def _same(one: str, other: str, close: float) -> bool:
    pairs = zip(map(float, NUMBER.findall(one)), map(float, NUMBER.findall(other)), strict=False)
    near = all(abs(a - b) <= close * max(abs(a), abs(b)) or max(abs(a), abs(b)) < SMALL for a, b in pairs)
    return near and NUMBER.sub("#", one) == NUMBER.sub("#", other)
