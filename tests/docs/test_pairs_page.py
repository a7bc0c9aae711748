"""The table of all pairs is what composing them gives."""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))
import pairs  # noqa: E402


def test_the_page_is_made_by_composing_each_pair() -> None:
    shown = pairs.PAGE.read_text().partition(f"{pairs.BEGIN}\n")[2].partition(pairs.END)[0]
    assert shown == pairs.block(), "python benchmarks/pairs.py makes the page anew"


def test_pairs_that_were_trained_meet() -> None:
    text = pairs.PAGE.read_text()
    for pair in pairs.TRAINED.read_text().split():
        first, _, second = pair.partition("+")
        row = next(line for line in text.splitlines() if line.startswith(f"| [`{first}`]"))
        assert f"**{second}**" in row
