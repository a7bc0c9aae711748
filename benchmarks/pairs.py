"""Puts the table of all pairs of recipes into docs/pairs.md.

    python benchmarks/pairs.py

Pairs are composed, not trained. Those that `make test-pairs` has trained are in docs/pairs.txt, and bold on the page:

    PAIRS_RECORD=docs/pairs.txt make test-pairs
"""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from pathlib import Path

from verl_plugins.commands.pairs import Pair, pairs

ROOT = Path(__file__).parents[1]
PAGE, TRAINED = ROOT / "docs/pairs.md", ROOT / "docs/pairs.txt"
BEGIN, END = "<!-- made by benchmarks/pairs.py -->", "<!-- end -->"
ROOM = ("data.max_prompt_length=2048", "data.max_response_length=2048")
"""The preset's own room is too small for the hints of sage."""


def block() -> str:
    """The tables as they are now."""
    return markdown(pairs(None, "cpu", ROOM), set(TRAINED.read_text().split()))


def markdown(found: Sequence[Pair], trained: Collection[str]) -> str:
    """The tables of `docs/pairs.md`: a row for each recipe, and the reasons of refusals; `trained` pairs are bold."""
    names = sorted({one for pair in found for one in (pair.first, pair.second)})
    lines = ["| recipe | meets | first say which value | refused beside |", "|---|---|---|---|"]
    for name in names:
        mine = [pair for pair in found if name in (pair.first, pair.second)]
        met = [_met(pair, name, trained) for pair in mine if pair.stages]
        asked = [pair.other(name) for pair in mine if pair.settled and not pair.refused]
        refused = [pair.other(name) for pair in mine if pair.refused]
        lines.append(
            f"| [`{name}`](recipes/{name}.md) | {', '.join(met)} | {', '.join(asked)} | {', '.join(refused)} |"
        )
    lines += ["", "## Why pairs are refused", "", "| reason | pairs |", "|---|---|"]
    reasons: dict[str, list[str]] = {}
    for pair in found:
        if pair.refused:
            reasons.setdefault(_kind(pair.refused), []).append(f"{pair.first}+{pair.second}")
    lines += [f"| {reason} | {', '.join(those)} |" for reason, those in reasons.items()]
    return "\n".join(lines) + "\n"


def _met(pair: Pair, name: str, trained: Collection[str]) -> str:
    other, stages = pair.other(name), ", ".join(f"`{stage}`" for stage in pair.stages)
    return f"{f'**{other}**' if f'{pair.first}+{pair.second}' in trained else other} ({stages})"


def _kind(sentence: str) -> str:
    """The sentence without the names of two plugins, by which many differ alone."""
    both = re.sub(
        r"^plugins '\w+' \(.*?\) and '\w+' \(.*?\) both implement (\w+), which", r"both implement `\1`, which", sentence
    )
    return re.sub(r"as in ~plugins\.\w+$", "as in `~plugins.…`", both).replace("|", "\\|")


if __name__ == "__main__":
    before, _, rest = PAGE.read_text().partition(BEGIN)
    PAGE.write_text(f"{before}{BEGIN}\n{block()}{END}{rest.partition(END)[2]}")
