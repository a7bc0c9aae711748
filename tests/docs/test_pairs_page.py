"""The table of all pairs is what composing them gives: some rows of it here, all of it in `make test-pairs`."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from verl_plugins.commands.pairs import pairs

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))
import pairs as page  # noqa: E402


def row(text: str, name: str) -> str:
    (found,) = [line for line in text.splitlines() if line.startswith(f"| [`{name}`]")]
    return found


@pytest.mark.parametrize("name", ["ravl", "spo_tree", "steer", "vcpo"])
def test_a_row_is_what_composing_gives(name: str) -> None:
    made = page.markdown(pairs(name, "cpu", page.ROOM), set(page.TRAINED.read_text().split()))
    assert row(page.PAGE.read_text(), name) == row(made, name), "python benchmarks/pairs.py makes the page anew"


def test_every_training_recipe_has_a_row() -> None:
    names = {pair.first for pair in pairs("grpo", "cpu")} | {pair.second for pair in pairs("grpo", "cpu")}
    assert all(row(page.PAGE.read_text(), name) for name in names)


@pytest.mark.pairs
def test_the_page_is_made_by_composing_each_pair() -> None:
    """Three minutes of a core."""
    shown = page.PAGE.read_text().partition(f"{page.BEGIN}\n")[2].partition(page.END)[0]
    assert shown == page.block()


def test_pairs_that_were_trained_meet() -> None:
    for pair in page.TRAINED.read_text().split():
        first, _, second = pair.partition("+")
        assert f"**{second}**" in row(page.PAGE.read_text(), first)
