"""Whether an answer is the ground truth: runs in the confined worker only, for sympy may take for ever.

Exact values are compared exactly. A decimal stands for a longer value only if it is that value rounded or cut to as
many places and shows six significant digits.
"""

from __future__ import annotations

import re
from typing import Any

import sympy
from sympy import Expr, Rational
from sympy.core.function import AppliedUndef

from verl_plugins.reward import units
from verl_plugins.reward.reading import letter, read
from verl_plugins.reward.tokens import NotUnderstood
from verl_plugins.reward.values import (
    Based,
    Colons,
    Computed,
    Grid,
    Named,
    Quantity,
    Region,
    Relation,
    Remainder,
    Several,
    Words,
    as_region,
)

SIGNIFICANT = 6
DIGITS = 40
"""Digits to which irrational values are compared."""
_POINTS = (
    Rational(37, 53),
    Rational(-71, 89),
    Rational(211, 97),
    Rational(-163, 61),
    Rational(19, 131),
    Rational(401, 103),
)
_STEPS = (Rational(7, 31), Rational(-5, 43), Rational(11, 37), Rational(-13, 29), Rational(17, 41), Rational(3, 23))
"""Values of the variables at which terms are compared: each variable is a point plus its own number of steps."""


def judge(answer: str, truth: str) -> dict[str, Any]:
    """The reason of the verdict on an answer and a truth in normal form, and what was not understood."""
    try:
        return {"reason": _verdict(answer, truth)}
    except (NotUnderstood, RecursionError) as error:
        return {"reason": "not understood", "what": str(error)[:200]}
    except Exception as error:
        return {"reason": "error", "what": f"{type(error).__name__}: {error}"[:200]}


def _verdict(answer: str, truth: str) -> str:
    wanted, given = letters(truth), letters(answer)
    if wanted and given:
        return "equal value" if wanted == given else "not equal"
    if (verdict := _choice(answer, truth)) is not None:
        return "equal value" if verdict else "not equal"
    try:
        expected = read(truth)
    except NotUnderstood as error:
        raise NotUnderstood(f"in the ground truth: {error}") from None
    return "equal value" if _equal_text(expected, answer) else "not equal"


def letters(text: str) -> frozenset[str] | None:
    """Several letters of choices in any order and way of writing (`B, C`, `BC`, `(B) and (C)`); None for all else."""
    plain = re.sub(r"\\(?:text|mathrm)(?![A-Za-z])|\b(?:and|und|et|y)\b|[{}()\s,;&.]", "", text)
    found = frozenset(plain)
    return found if re.fullmatch("[A-J]{2,10}", plain) and len(found) == len(plain) else None


def _choice(answer: str, truth: str) -> bool | None:
    """Whether the letter of the choice is the right one; None where no choice is asked for."""
    wanted = letter(truth)
    if wanted is None:
        given = letter(answer)
        if given is not None and given[1]:
            return _equal_text(read(truth), given[1].strip())
        return None
    given = letter(answer)
    if wanted[1] == "":
        alone = re.fullmatch(r"(?:\\text\{)?\(?[A-J]\)?\.?\}?", truth)
        if given is not None and alone and (given[0] == wanted[0]):
            return True
        return False if alone and (given is not None or truth != truth.lower()) else None
    if given is not None:
        return given[0] == wanted[0]
    return _equal_text(read(wanted[1]), answer)


def _equal_text(expected: Any, answer: str) -> bool:
    found = read(answer)
    if equal(expected, found):
        return True
    comma = re.fullmatch(r"(-?\d+),(?!\d{3}$)(\d+)", answer)
    if comma and isinstance(expected, Quantity) and expected.places is not None:
        return equal(expected, Quantity(Rational(f"{comma[1]}.{comma[2]}"), expected.unit, len(comma[2])))
    if isinstance(expected, Several) and re.fullmatch(r"\d+(?:,\d+)+", answer):
        return equal(expected, Several(tuple(read(part) for part in answer.split(",")), ""))
    return False


def equal(truth: Any, answer: Any) -> bool:
    """Whether two values are the same."""
    if isinstance(answer, Computed):
        approximated = (
            isinstance(truth, Quantity) and truth.places is not None and _rounds(answer.value, answer.written)
        )
        return equal(truth, answer.value) or (approximated and equal(truth, answer.written))
    if isinstance(truth, Computed):
        return equal(truth.value, answer) or equal(truth.written, answer)
    if isinstance(truth, Named) and isinstance(answer, Named):
        same = truth.name == answer.name or (truth.name in "yY" and answer.name.startswith("f("))
        return same and equal(truth.value, answer.value)
    if isinstance(truth, Named) or isinstance(answer, Named):
        return _equal_named(truth, answer)
    if isinstance(truth, Several) or isinstance(answer, Several):
        return _equal_several(truth, answer)
    if isinstance(truth, Colons) or isinstance(answer, Colons):
        return _equal_colons(truth, answer)
    if isinstance(truth, Remainder) or isinstance(answer, Remainder):
        return _equal_remainder(truth, answer)
    if type(truth) is not type(answer):
        return False
    if isinstance(truth, Quantity):
        return _equal_quantities(truth, answer)
    if isinstance(truth, Region):
        return _equal_regions(truth, answer)
    if isinstance(truth, Relation):
        return _equal_relations(truth, answer)
    if isinstance(truth, Grid):
        return len(truth.rows) == len(answer.rows) and all(
            len(one) == len(other) and all(map(equal, one, other))
            for one, other in zip(truth.rows, answer.rows, strict=True)
        )
    return truth == answer if isinstance(truth, (Words, Based)) else False


def _equal_named(truth: Any, answer: Any) -> bool:
    """One of them says a name: it does not matter, but an equation may be the same in another form."""
    if isinstance(truth, Relation) or isinstance(answer, Relation):
        one, other = (_as_relation(value) for value in (truth, answer))
        return one is not None and other is not None and _equal_relations(one, other)
    bare = [value.value if isinstance(value, Named) else value for value in (truth, answer)]
    return equal(*bare)


def _as_relation(value: Any) -> Relation | None:
    if isinstance(value, Named) and isinstance(value.value, Quantity) and len(value.name) == 1:
        return Relation("=", sympy.Symbol(value.name, real=True), value.value.value)
    return value if isinstance(value, Relation) else None


def _equal_several(truth: Any, answer: Any) -> bool:
    if isinstance(truth, Grid) or isinstance(answer, Grid):
        grid, other = (truth, answer) if isinstance(truth, Grid) else (answer, truth)
        if not isinstance(other, Several) or other.kind not in ("(", "["):
            return False
        cells = [cell for row in grid.rows for cell in row]
        return 1 in (len(grid.rows), len(grid.rows[0])) and _in_order(cells, other.items)
    if isinstance(truth, Region) or isinstance(answer, Region):
        one, other = as_region(truth), as_region(answer)
        return one is not None and other is not None and _equal_regions(one, other)
    if not isinstance(truth, Several) or not isinstance(answer, Several):
        one, other = (truth, answer) if isinstance(truth, Several) else (answer, truth)
        return one.kind in ("{", "") and len(one.items) == 1 and equal(one.items[0], other)
    kinds = {truth.kind, answer.kind}
    if kinds == {"("} or kinds == {"["} or (len(truth.items) > 2 and kinds <= {"(", "["}):
        return _in_order(truth.items, answer.items)
    if kinds <= {"", "{"}:
        return _in_any_order(truth.items, answer.items)
    if "" in kinds and kinds & {"(", "["}:
        return _in_order(*(_by_name(value) for value in (truth, answer)))
    return truth.kind == answer.kind and _in_order(truth.items, answer.items)


def _by_name(several: Several) -> list[Any]:
    """The values, in the order of their names if all have one."""
    if all(isinstance(item, Named) for item in several.items):
        return [item.value for item in sorted(several.items, key=lambda item: item.name)]
    return list(several.items)


def _in_order(truth: Any, answer: Any) -> bool:
    return len(truth) == len(answer) and all(map(equal, truth, answer))


def _in_any_order(truth: Any, answer: Any) -> bool:
    if len(truth) != len(answer):
        return False
    named = [all(isinstance(item, Named) for item in items) for items in (truth, answer)]
    if named[0] != named[1]:
        return _in_order(_by_name(Several(truth, "")), _by_name(Several(answer, "")))
    left = list(answer)
    for item in truth:
        place = next((place for place, other in enumerate(left) if equal(item, other)), None)
        if place is None:
            return False
        del left[place]
    return True


def _equal_colons(truth: Any, answer: Any) -> bool:
    if isinstance(truth, Colons) and isinstance(answer, Colons):
        if len(truth.numbers) != len(answer.numbers):
            return False
        one, other = truth.numbers, answer.numbers
        if truth.half != answer.half:
            if truth.half and answer.half:
                return False
            clock, half = (other, truth.half) if truth.half else (one, answer.half)
            said = one if truth.half else other
            late = Rational(12 if half == "pm" and said[0] != 12 else -12 if half == "am" and said[0] == 12 else 0)
            return clock == said or clock == (said[0] + late, *said[1:])
        return one == other
    colons, other = (truth, answer) if isinstance(truth, Colons) else (answer, truth)
    time = colons.half or 10 <= colons.numbers[1] < 60 and colons.numbers[0] <= 24
    if len(colons.numbers) != 2 or time or colons.numbers[1] in (0, 1) or not isinstance(other, Quantity) or other.unit:
        return False
    return other.value == colons.numbers[0] / colons.numbers[1]


def _equal_remainder(truth: Any, answer: Any) -> bool:
    if isinstance(truth, Remainder) and isinstance(answer, Remainder):
        return truth == answer
    one, other = (truth, answer) if isinstance(truth, Remainder) else (answer, truth)
    return isinstance(other, Quantity) and not other.unit and other.value == one.value


def _equal_quantities(truth: Quantity, answer: Quantity) -> bool:
    if "%" in (truth.unit, answer.unit) and truth.unit != answer.unit:
        percent, other = (truth, answer) if truth.unit == "%" else (answer, truth)
        if other.unit:
            return False
        if same_value(percent.value / 100, other.value):
            return True
        return bool(percent.value.is_number and abs(percent.value) >= 1) and _equal_values(truth, answer)
    if truth.unit == answer.unit or truth.unit in units.NEUTRAL or answer.unit in units.NEUTRAL:
        return _equal_values(truth, answer)
    one, other = units.factor(truth.unit), units.factor(answer.unit)
    if one is None or other is None or one[0] != other[0]:
        return False
    return same_value(truth.value * Rational(one[1], one[2]), answer.value * Rational(other[1], other[2]))


def _equal_values(truth: Quantity, answer: Quantity) -> bool:
    return same_value(truth.value, answer.value) or _rounds(truth, answer) or _rounds(answer, truth)


def _rounds(exact: Any, decimal: Any) -> bool:
    """Whether a decimal is the other value, rounded or cut to as many places, with enough digits to say so."""
    if (
        decimal.places is None
        or exact.value.free_symbols
        or exact.value.atoms(AppliedUndef)
        or not exact.value.is_extended_real
    ):
        return False
    if exact.places is not None and exact.places <= decimal.places:
        return False
    scale = 10**decimal.places
    shown = abs(decimal.value * scale)
    if not shown.is_Integer or len(str(shown)) < SIGNIFICANT or abs(exact.value) > 10**12:
        return False
    if exact.value.is_Integer:
        return False
    scaled = abs(exact.value) * scale
    cut = sympy.floor(scaled.evalf(DIGITS))
    nearest = sympy.floor((scaled + Rational(1, 2)).evalf(DIGITS))
    return bool((exact.value < 0) == (decimal.value < 0) and shown in (cut, nearest))


def same_value(one: Expr, other: Expr) -> bool:
    """Whether two terms are equal: exactly for rational numbers, else by their values to forty digits."""
    if one == other:
        return True
    if one.is_Rational and other.is_Rational:
        return False
    if one.free_symbols or other.free_symbols:
        return _same_function(one, other)
    if one.atoms(AppliedUndef) or other.atoms(AppliedUndef) or not (one.is_finite and other.is_finite):
        return False
    return _vanishes(one, other)


def _vanishes(one: Expr, other: Expr) -> bool:
    """Whether the difference of two numbers is 0, relative to their size."""
    difference = (one - other).evalf(DIGITS, maxn=200)
    size = max(abs(one.evalf(15)), abs(other.evalf(15)))
    if not difference.is_number or not size.is_number:
        return False
    return bool(abs(difference) <= size * Rational(1, 10**25))


def _same_function(one: Expr, other: Expr) -> bool:
    symbols = sorted(one.free_symbols | other.free_symbols, key=lambda symbol: symbol.name)
    if one.atoms(AppliedUndef) or other.atoms(AppliedUndef):
        return bool(sympy.expand(one - other) == 0)
    seen = 0
    for point, step in zip(_POINTS, _STEPS, strict=True):
        values = {symbol: point + step * (place + 1) for place, symbol in enumerate(symbols)}
        left, right = one.subs(values), other.subs(values)
        if not (left.is_finite and right.is_finite):
            continue
        if not (left == right or _vanishes(left, right)):
            return False
        seen += 1
    return seen >= 3


def _equal_regions(truth: Region, answer: Region) -> bool:
    return len(truth.parts) == len(answer.parts) and all(
        one[1] == other[1] and one[3] == other[3] and same_value(one[0], other[0]) and same_value(one[2], other[2])
        for one, other in zip(truth.parts, answer.parts, strict=True)
    )


def _equal_relations(truth: Relation, answer: Relation) -> bool:
    """The same sign, and differences of the sides that are multiples of each other: positive ones for inequalities."""
    if truth.sign != answer.sign:
        return False
    one, other = truth.left - truth.right, answer.left - answer.right
    if one.free_symbols != other.free_symbols or not one.free_symbols:
        return False
    ratio = _ratio(one, other)
    return ratio is not None and ratio != 0 and (truth.sign in ("=", "\\ne") or bool(ratio > 0))


def _ratio(one: Expr, other: Expr) -> Expr | None:
    """The constant that one is of the other; None if they are no multiples."""
    symbols = sorted(one.free_symbols, key=lambda symbol: symbol.name)
    found: list[Expr] = []
    for point, step in zip(_POINTS, _STEPS, strict=True):
        values = {symbol: point + step * (place + 1) for place, symbol in enumerate(symbols)}
        left, right = one.subs(values), other.subs(values)
        if left.is_finite and right.is_finite and right != 0:
            found.append(left / right)
    if len(found) < 3 or not all(same_value(found[0], value) for value in found[1:]):
        return None
    return found[0]
