r"""What an answer in normal form is: a number with its unit, several values, an interval, a relation, words, …

Anything that is none of these is not understood, as a whole: no part of it stands for it.
"""

from __future__ import annotations

import re
from functools import lru_cache
from typing import Any

import sympy
from sympy import Expr, Rational

from verl_plugins.reward import words
from verl_plugins.reward.expression import expression
from verl_plugins.reward.quantities import as_words, is_prose, quantity_or_words, split_unit
from verl_plugins.reward.tokens import NotUnderstood, pieces, tokens
from verl_plugins.reward.values import (
    REALS,
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
    all_but,
    as_region,
    common,
    merged,
)

_ENDS = {"<": (False, False), ">": (False, False), "\\le": (True, True), "\\ge": (True, True)}
_RELATIONS = {"=", "<", ">", "\\le", "\\ge", "\\ne", "\\approx", "\\in", "\\equiv", "\\sim"}
_TURNED_BRACKETS = re.compile(r"([\[\]])([^\[\]()]+,[^\[\]()]+)([\[\]])")
"""`]2, 3[` is the open interval."""
_TURNED = {">": "<", "\\ge": "\\le"}
_NAME = re.compile(
    r"(?!\\(?:pi|infty|sqrt|frac\{\d)|e$|i$)(?:m?(?:\\(?:angle|triangle|text|mathrm|overline|vec|hat|bar)\s*)*"
    r"(?:\{[^{}]*\}|\\?[A-Za-z]+)(?:_(?:\{[\w\\*',]+\}|\w)|\^(?:\{-1\}|\{?[*']\}?))?'*"
    r"(?:\((?:[\w\\,.+-]|\{\w+\}){1,20}\))?|\|[A-Zz]{1,3}\||\\frac\{d\w?\}\{d\w\}"
    r"|\\(?:sin|cos|tan|cot|sec|csc)(?:\\angle)? ?\(?(?:\\[a-z]+|[A-Za-z]{1,3})\)?)"
)
_BASED = re.compile(
    r"\(?(?:\\text\{)?([0-9A-Fa-f]+)\}?\)?"
    r"(?:_\{?\(?(?:\\text\{)?(\d+|[a-z]+)\}?\)?\}?| ?(?:\\text\{)?\(?(?:in )?base ?\}? ?(\d+|[a-z]+)\)?\}?)"
)
_BASES = {
    "two": 2,
    "three": 3,
    "four": 4,
    "five": 5,
    "six": 6,
    "seven": 7,
    "eight": 8,
    "nine": 9,
    "ten": 10,
    "twelve": 12,
    "sixteen": 16,
}
_COLONS = re.compile(
    r"(\d+(?:\.\d+)?(?::\d+(?:\.\d+)?)+)\s*(?:\\text\{)?\s*([aApP]\.?\s*[mM]\.?)?\}?|(\d{1,2})\s*(?:\\text\{)?\s*([aApP]\.?\s?[mM]\.?)\}?"
)
_TO = re.compile(r"(\d+)(?:\\text\{to\}| to )(\d+)")
_MATRIX = re.compile(r"\\begin\{([pbvBV]?matrix|smallmatrix|array)\}(?:\{[lcr|]*\})?(.*)\\end\{\1\}", re.DOTALL)
_MODULO = re.compile(r"(.+?)(?:\\pmod\s*\{?(\w+)\}?|\\?\(?(?:\\bmod|\\mod|\\text\{mod\}|mod)\s*\{?(\d+)\}?\)?)")
_JOIN = re.compile(
    r"\\text\{,? ?(?:or|and)\}|(?<![A-Za-z\\])(?:or|and)(?![A-Za-z])|\\vee(?![A-Za-z])|\\wedge(?![A-Za-z])"
)
_LETTER = re.compile(r"(?:\\text\{)?\(?(?i:option |choice |answer )?\(?([A-Ja-j])\)?(?:([.:)])?\}?)(.*)", re.DOTALL)


@lru_cache(maxsize=2048)
def read(text: str) -> Any:
    """The value of an answer in normal form.

    Raises:
        NotUnderstood: if it is nothing that is known.
    """
    if not text.strip():
        raise NotUnderstood("nothing")
    for reader in (_colons, _special, _based, _modulo, _several, _related, _bracketed, _union, _matrix):
        if (found := reader(text)) is not None:
            return found
    return quantity_or_words(text)


def letter(text: str) -> tuple[str, str] | None:
    """The letter of a choice and what stands after it: `C`, `(C)`, `C. 48`; None if it is no choice."""
    text = re.sub(r"\\text\{\s*(\(?[A-Ja-j]\)?[.:)]?)\s*\}", r"\1", text)
    match = _LETTER.fullmatch(text)
    if match is None:
        return None
    rest = match[3].strip().removesuffix("}").strip() if text.startswith("\\text{") else match[3].strip()
    marked = text[match.end(1) : match.end(1) + 1] in (".", ":", ")")
    if rest and not marked:
        return None
    if re.search(r"(?<![A-Za-z\\])[A-J](?![A-Za-z])|^\W*(?:or|and)\b|^,", rest):
        return None
    return match[1].upper(), rest


def _special(text: str) -> Any:
    known = {"\\emptyset": Several((), "{"), "\\{\\}": Several((), "{"), "\\mathbb{R}": REALS, "\\{\\emptyset\\}": None}
    if text in known:
        return known[text]
    if re.search(r"\\text\{[^{}]*[.!] +[A-Z]|\?", text):
        raise NotUnderstood("sentences, or a question mark")
    meant = words.meaning(text)
    if meant == "no solution":
        return Several((), "{")
    if meant == "reals":
        return REALS
    return (
        Words(meant)
        if meant in ("infinitely many", "does not exist", "undefined", "yes", "no", "true", "false")
        else None
    )


def _colons(text: str) -> Any:
    if wrapped := re.fullmatch(r"\\text\{([^{}]*:[^{}]*)\}", text):
        text = wrapped[1]
    if match := _TO.fullmatch(text):
        return Colons((Rational(match[1]), Rational(match[2])), "")
    match = _COLONS.fullmatch(text)
    if match is None:
        return None
    numbers = tuple(Rational(number) for number in (match[1] or f"{match[3]}:00").split(":"))
    half = re.sub(r"[.\s]", "", match[2] or match[4] or "").lower()
    return Colons(numbers, half)


def _based(text: str) -> Any:
    match = _BASED.fullmatch(text)
    if match is None or not any(sign.isdigit() for sign in match[1]):
        return None
    base = match[2] or match[3]
    base = int(base) if base.isdigit() else _BASES.get(base, 0)
    if not 2 <= base <= 36 or any(int(digit, 36) >= base for digit in match[1]):
        return None if not match[1].isdigit() else Words(text)
    return Based(match[1].lstrip("0").upper() or "0", base)


def _modulo(text: str) -> Any:
    if "mod" not in text:
        return None
    match = _MODULO.fullmatch(text)
    if match is None:
        return None
    value = match[1].rpartition("\\equiv")[2] if "\\equiv" in match[1] else match[1].rpartition("=")[2]
    modulus = expression(match[2] or match[3])
    return Remainder(sympy.Mod(expression(value.rstrip("(")), modulus), modulus)


def _several(text: str) -> Any:
    """Values between commas, "or" and "and" outside of brackets, and the two of a plus-minus."""
    joined = _JOIN.sub(",", re.sub(r"\\text\{(?:either|both|[Ee]ither|[Bb]oth) ?\}|\b[Ee]ither\b|\bboth\b", "", text))
    found = [part for part, _ in pieces(joined, {",", ";"})]
    if len(found) == 1:
        if not re.search(r"\\[pm][mp](?![A-Za-z])", text) or "," in text:
            return None
        name, equals, value = text.rpartition("=")
        if equals and not _NAME.fullmatch(name):
            return None
        unit = ""
        try:
            both = [expression(value, sign) for sign in (1, -1)]
        except NotUnderstood:
            value, unit = split_unit(value)
            both = [expression(value, sign) for sign in (1, -1)]
        return Several(tuple(Quantity(one, unit) for one in both), "")
    found = [part for part in found if part]
    if len(found) < 2 or len(found) > 200:
        raise NotUnderstood("a list without values")
    if is_prose(joined):
        return as_words(text)
    head, equals, first = found[0].rpartition("=")
    items = [read(part) for part in found]
    if equals and _NAME.fullmatch(head) and not any(isinstance(item, Named) for item in items[1:]):
        items[0] = read(first)
        return _list(items)
    names = {item.name for item in items if isinstance(item, Named)}
    if len(names) == 1 and len(items) == sum(isinstance(item, Named) for item in items):
        items = [item.value for item in items]
    if all(isinstance(item, (Region, Relation)) for item in items) and any(isinstance(item, Region) for item in items):
        if _JOIN.search(text) and "or" in text or "\\vee" in text:
            regions = [item for item in items if isinstance(item, Region)]
            if len(regions) == len(items):
                return merged([part for region in regions for part in region.parts])
        elif len(items) == 2 and all(isinstance(item, Region) and len(item.parts) == 1 for item in items):
            return common(*items)
    return _list(items)


def _list(items: list[Any]) -> Several:
    flat: list[Any] = []
    for item in items:
        flat += item.items if isinstance(item, Several) and item.kind == "" else [item]
    return Several(tuple(flat), "")


def _related(text: str) -> Any:
    """A name with its value, an inequality, an equation; None where there is no relation."""
    parts = list(pieces(text, _RELATIONS))
    if len(parts) == 1:
        return None
    if not parts[0][0]:
        raise NotUnderstood("a relation without a left side")
    signs = [sign for _, sign in parts[1:]]
    sides = [part for part, _ in parts]
    if signs == ["="] and _NAME.fullmatch(sides[1]) and not _NAME.fullmatch(sides[0]):
        return Named(sides[1].replace(" ", ""), read(sides[0]))
    if signs[0] in ("=", "\\in") and (_NAME.fullmatch(sides[0]) or _is_tuple_of_names(sides[0])):
        value = read(text[text.index(signs[0], len(sides[0])) + len(signs[0]) :].strip())
        name = sides[0].replace(" ", "")
        if signs[0] == "\\in" or isinstance(value, Region):
            return value
        return value if sides[0].startswith(("\\text", "\\mathrm")) or name.startswith("(") else Named(name, value)
    if set(signs) <= {"=", "\\approx", "\\sim"}:
        return _equation(sides, signs)
    if signs == ["\\ne"]:
        left, right = expression(sides[0]), expression(sides[1])
        if left.is_Symbol and not right.free_symbols:
            return all_but([right])
        return Relation("\\ne", left, right)
    return _inequality(sides, signs)


def _is_tuple_of_names(text: str) -> bool:
    inner = text[1:-1].split(",") if text[:1] == "(" and text[-1:] == ")" else []
    return len(inner) > 1 and all(_NAME.fullmatch(part.strip()) for part in inner)


def _equation(sides: list[str], signs: list[str]) -> Any:
    if signs[0] == "\\approx" and _NAME.fullmatch(sides[0]) and len(sides) == 2:
        return Named(sides[0], read(sides[1]))
    values = [read(side) for side in sides]
    if not all(isinstance(value, Quantity) for value in values):
        raise NotUnderstood("an equation of what are no numbers")
    first, last = values[0], values[-1]
    if not any(value.value.free_symbols for value in values):
        computed = bool(re.search(r"[-+*/^!]|\\(?:times|cdot|frac|sqrt|binom)", sides[0].lstrip("-")))
        if "\\approx" in signs:
            place = signs.index("\\approx")
            return Computed(values[place], last)
        exact = all(sympy.simplify(value.value - last.value) == 0 for value in values[:-1])
        if computed and exact:
            return Computed(last, first)
        raise NotUnderstood("an equation that says nothing, or what is wrong")
    if len(sides) > 2:
        raise NotUnderstood("a chain of equations")
    return Relation("=", first.value, last.value)


def _inequality(sides: list[str], signs: list[str]) -> Any:
    if len(sides) > 3 or any(sign not in _ENDS for sign in signs):
        raise NotUnderstood("a chain of relations")
    values = [expression(side) for side in sides]
    if signs[0] in _TURNED:
        values, signs = values[::-1], [_TURNED.get(sign, "?") for sign in signs[::-1]]
    if any(sign not in ("<", "\\le") for sign in signs):
        raise NotUnderstood("relations that point both ways")
    closed = [sign == "\\le" for sign in signs]
    name = [place for place, value in enumerate(values) if value.is_Symbol]
    numbers = [value for value in values if not value.free_symbols]
    if len(name) == 1 and len(numbers) == len(values) - 1:
        if len(values) == 3 and name == [1]:
            return Region(
                ((values[0], closed[0] and values[0].is_finite, values[2], closed[1] and values[2].is_finite),)
            )
        if len(values) == 2 and name == [0]:
            return Region(((-sympy.oo, False, values[1], closed[0]),))
        if len(values) == 2:
            return Region(((values[0], closed[0], sympy.oo, False),))
    if len(values) == 3:
        raise NotUnderstood("a chain of inequalities")
    if not (values[0] - values[1]).free_symbols:
        raise NotUnderstood("an inequality of numbers")
    return _solved(signs[0], values[0], values[1]) or Relation(signs[0], values[0], values[1])


def _solved(sign: str, left: Expr, right: Expr) -> Region | None:
    """Where a linear inequality of one variable holds."""
    difference = sympy.expand(left - right)
    if len(difference.free_symbols) != 1:
        return None
    (variable,) = difference.free_symbols
    if difference.has(sympy.Abs) or (
        difference.is_polynomial(variable) and 2 <= sympy.degree(difference, variable) <= 4
    ):
        return _where(difference <= 0 if sign == "\\le" else difference < 0, variable)
    if not difference.is_polynomial(variable) or sympy.degree(difference, variable) != 1:
        return None
    slope = difference.coeff(variable, 1)
    end = -difference.coeff(variable, 0) / slope
    if slope > 0:
        return Region(((-sympy.oo, False, end, sign == "\\le"),))
    return Region(((end, sign == "\\le", sympy.oo, False),))


def _bracketed(text: str) -> Any:
    if (turned := _TURNED_BRACKETS.fullmatch(text)) and (turned[1] == "]" or turned[3] == "["):
        text = ("(" if turned[1] == "]" else "[") + turned[2] + (")" if turned[3] == "[" else "]")
    if re.match(r"[A-Z]\(", text) and _is_one_bracket(text[1:]) and len(list(pieces(text[2:-1], {","}))) > 1:
        text = text[1:]
    opening = next((sign for sign in ("\\{", "\\langle", "(", "[", "{") if text.startswith(sign)), None)
    closing = next((sign for sign in ("\\}", "\\rangle", ")", "]", "}") if text.endswith(sign)), None)
    if opening is None or closing is None or not _is_one_bracket(text):
        return None
    inner = text[len(opening) : -len(closing)].strip(" ,")
    if opening == "\\{" and re.search(r"\||:", inner) and "=" not in inner.split("|")[0]:
        condition = re.split(r"\||:", inner, maxsplit=1)[1]
        return read(condition)
    parts = [part for part, _ in pieces(inner, {",", ";"})]
    if opening == "\\langle":
        opening, closing = "(", ")"
    if len(parts) == 1:
        if opening == "\\{":
            return Several((read(inner),) if not isinstance(read(inner), Several) else read(inner).items, "{")
        return read(inner) if opening + closing in ("()", "[]", "{}") else None
    items = tuple(read(part) for part in parts)
    if opening == "\\{":
        return Several(items, "{")
    return Several(items, opening if opening + closing in ("()", "[]") else opening + closing)


def _where(holds: Any, variable: Expr) -> Region | None:
    """Where an inequality of one variable holds, None if that is no union of intervals."""
    found = sympy.solve_univariate_inequality(holds, variable, relational=False)
    parts = found.args if isinstance(found, sympy.Union) else (found,)
    if not all(isinstance(part, sympy.Interval) for part in parts):
        return None
    ends = [(part.start, not part.left_open, part.end, not part.right_open) for part in parts]
    return merged([(a, a_in and a.is_finite, b, b_in and b.is_finite) for a, a_in, b, b_in in ends])


def _is_one_bracket(text: str) -> bool:
    """Whether the first bracket closes with the last."""
    depth = 0
    found = tokens(text)
    for place, token in enumerate(found):
        if token.text in ("(", "[", "{", "\\{", "\\langle"):
            depth += 1
        elif token.text in (")", "]", "}", "\\}", "\\rangle"):
            depth -= 1
            if depth == 0:
                return place == len(found) - 1
    return False


def _union(text: str) -> Any:
    if re.fullmatch(r"\\mathbb\{R\}\\setminus ?\\\{.*\\\}", text):
        without = read(text[text.index("\\setminus") + 9 :].strip())
        return all_but([item.value for item in without.items if isinstance(item, Quantity)])
    found = list(pieces(re.sub(r"(?<=[)\]])(?:U|\\text\{or\}| or )(?=[(\[])", r"\\cup", text), {"\\cup"}))
    if len(found) == 1:
        return None
    parts: list[tuple[Expr, bool, Expr, bool]] = []
    for part, _ in found:
        region = as_region(read(part))
        if region is None:
            raise NotUnderstood("a union of what are no intervals")
        parts += region.parts
    return merged(parts)


def _matrix(text: str) -> Any:
    match = _MATRIX.fullmatch(text)
    if match is None:
        if "\\begin" in text:
            raise NotUnderstood("an environment that is no matrix")
        return None
    lines = [line for line in re.split(r"\\\\(?:\[[^\]]*\])?", match[2]) if line.strip()]
    rows = tuple(tuple(read(cell.strip()) for cell in line.split("&")) for line in lines)
    if len({len(row) for row in rows}) != 1:
        raise NotUnderstood("a matrix with rows of several lengths")
    if match[1] in ("vmatrix", "Vmatrix"):
        return Quantity(sympy.Matrix([[cell.value for cell in row] for row in rows]).det())
    return Grid(rows)
