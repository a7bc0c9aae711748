"""What a lab is: a paper's own claim, measured here on the CPU and outside of RL post-training.

A lab is a function `lab(settings, seed, progress) -> Findings`; `settings` is annotated with a dataclass, whose fields
are made with `setting` as those of a plugin's Config. A recipe names it as `recipe.lab: package.module:function`, and
`verl-plugins lab NAME` runs it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

Progress = Callable[[float, str], None]
"""Called with the share that is done, from 0 to 1, and what is being done."""


@dataclass(frozen=True)
class Claim:
    """One line of a lab's table."""

    name: str
    """What is claimed, in a line."""
    expected: str
    """What should come out, in the words or figures of `source`."""
    measured: str
    """What came out here."""
    holds: bool
    source: Literal["paper", "derived", "ours"] = "paper"
    """Whose claim it is: the paper's, what follows from its setting, or ours."""


@dataclass(frozen=True)
class Curve:
    """Points (x, y) of a panel, in the order in which they are joined."""

    label: str
    """Empty: it belongs to the curve before it, and is drawn in its colour."""
    x: Sequence[float]
    y: Sequence[float]
    style: Literal["line", "dashed", "points"] = "line"


@dataclass(frozen=True)
class Panel:
    """One set of axes in a lab's picture."""

    title: str
    x: str
    """What the axis shows, with its unit."""
    y: str
    curves: Sequence[Curve]
    log: Literal["", "x", "y", "xy"] = ""
    """Which axes are logarithmic."""


@dataclass(frozen=True)
class Findings:
    """What a lab gives back.

    Raises:
        ValueError: there is no claim, so that nothing could fail.
    """

    claims: Sequence[Claim]
    panels: Sequence[Panel] = ()
    notes: Sequence[str] = ()
    """What a reader of the table must know, a sentence each."""

    def __post_init__(self) -> None:
        if not self.claims:
            raise ValueError("a lab must make at least one claim")

    @property
    def failed(self) -> list[Claim]:
        """Claims that do not hold."""
        return [claim for claim in self.claims if not claim.holds]
