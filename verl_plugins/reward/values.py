"""What an answer can be: the values that `reading.py` finds and `compare.py` compares."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import sympy
from sympy import Expr, Rational


@dataclass(frozen=True)
class Quantity:
    """A number or a term, with what stands beside it."""

    value: Expr
    unit: str = ""
    places: int | None = None
    """Decimals, where it is written as one decimal number."""


class Several(NamedTuple):
    """Values in a list (`kind` ""), or in brackets: "(" and "[" in order, "{" in any, "(]" and "[)" intervals."""

    items: tuple[Any, ...]
    kind: str


class Named(NamedTuple):
    """`x = 3`, `f(x) = …`, `(x, y) = …`."""

    name: str
    value: Any


class Relation(NamedTuple):
    """An equation or inequality that gives no name a value; larger sides stand on the right."""

    sign: str
    left: Expr
    right: Expr


class Region(NamedTuple):
    """A union of intervals: (low, low is in it, high, high is in it)."""

    parts: tuple[tuple[Expr, bool, Expr, bool], ...]


class Grid(NamedTuple):
    """A matrix."""

    rows: tuple[tuple[Any, ...], ...]


class Words(NamedTuple):
    """Text, as `words.meaning` writes it."""

    text: str


class Colons(NamedTuple):
    """A ratio or a time of day."""

    numbers: tuple[Rational, ...]
    half: str


class Based(NamedTuple):
    """Digits in a base."""

    digits: str
    base: int


class Remainder(NamedTuple):
    """A number modulo another."""

    value: Expr
    modulus: Expr


class Computed(NamedTuple):
    """`3 + 4 = 7` or `\\sqrt{7} \\approx 2.65`: a value, and what else it is written as."""

    value: Any
    written: Any


REALS = Region(((-sympy.oo, False, sympy.oo, False),))


def as_region(value: Any) -> Region | None:
    """An interval, a union of intervals or a set of numbers as a union of intervals; None for anything else."""
    if isinstance(value, Region):
        return value
    if not isinstance(value, Several) or not all(isinstance(item, Quantity) and not item.unit for item in value.items):
        return None
    ends = [item.value for item in value.items]
    if any(end.free_symbols for end in ends):
        return None
    if value.kind == "{":
        return merged([(end, True, end, True) for end in ends])
    if len(ends) != 2 or value.kind == "" or not all(end.is_extended_real for end in ends) or not ends[0] < ends[1]:
        return None
    closed = {"(": (False, False), "[": (True, True), "(]": (False, True), "[)": (True, False), "([": (False, False)}
    low, high = closed.get(value.kind, (False, False))
    return Region(((ends[0], low and ends[0].is_finite, ends[1], high and ends[1].is_finite),))


def merged(parts: list[tuple[Expr, bool, Expr, bool]]) -> Region:
    done: list[tuple[Expr, bool, Expr, bool]] = []
    for low, low_in, high, high_in in sorted(parts, key=lambda part: (float(part[0]), not part[1])):
        if done and (low < done[-1][2] or (low == done[-1][2] and (low_in or done[-1][3]))):
            first = done.pop()
            end, end_in = max((first[2], first[3]), (high, high_in), key=lambda end: (float(end[0]), end[1]))
            done.append((first[0], first[1], end, end_in))
        else:
            done.append((low, low_in, high, high_in))
    return Region(tuple(done))


def all_but(points: list[Expr]) -> Region:
    ends = sorted(set(points), key=float)
    low = [-sympy.oo, *ends]
    return Region(tuple((one, False, other, False) for one, other in zip(low, [*ends, sympy.oo], strict=True)))


def common(one: Region, other: Region) -> Region:
    """Where both are; each is one interval."""
    (low, low_in, high, high_in), (bottom, bottom_in, top, top_in) = one.parts[0], other.parts[0]
    start = max((low, not low_in), (bottom, not bottom_in), key=lambda end: (float(end[0]), end[1]))
    end = min((high, high_in), (top, top_in), key=lambda end: (float(end[0]), end[1]))
    return Region(((start[0], not start[1], end[0], end[1]),))
