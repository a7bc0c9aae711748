"""Numbers and terms with what stands beside them, and words."""

from __future__ import annotations

import re
from typing import Any

from sympy import Rational

from verl_plugins.reward import units, words
from verl_plugins.reward.expression import CONSTANTS, FUNCTIONS, expression
from verl_plugins.reward.tokens import NotUnderstood
from verl_plugins.reward.values import Quantity, Words

_CURRENCY = re.compile(r"^(-?)(?:US)?(\\\$|€|£|¥|\\text\{\\?\$\}|\\text\{(?:pounds|euros)\}|Rs\.? ?)\s*(-?)")
_MONEY = {"\\$": "dollar", "€": "euro", "£": "pound sterling", "¥": "yen", "R": "rupee",
          "\\text{\\$}": "dollar", "\\text{$}": "dollar",
          "\\text{pounds}": "pound sterling", "\\text{euros}": "euro"}  # fmt: skip
_DECIMAL = re.compile(r"-?\+?(?:\d{1,3}(?:,\d{3})+|\d*)\.(\d+)(?:\.\.\.|\\ldots)?")
_TAIL = re.compile(r"(?:\\(?:text|mathrm)\{(?P<text>[^{}]*)\}|(?<=[\d)}\]!i ])(?P<plain>(?<!\\)[A-Za-zµ][A-Za-z.]*))")
_UNIT_WORDS = re.compile(r"[A-Za-zµ²³^0-9{}\\/.\- ()]+")
_NO_UNITS = "or and not is but if the because since are either maybe isn't no times choose over plus minus cases case"
_PROSE = set(_NO_UNITS.split())
_LETTER_UNITS = set("mgshlLJNWVAKCF")


def quantity_or_words(text: str) -> Any:
    if _looks_like_words(text):
        return as_words(text)
    try:
        return _quantity(text)
    except NotUnderstood:
        if (number := words.number(text)) is not None:
            return Quantity(Rational(number))
        if is_prose(text) or re.search(r"\\text\{[^{}]*[A-Za-z]{2}", text) and not re.search(r"\d|\\frac|\\sqrt", text):
            return as_words(text)
        raise


def as_words(text: str) -> Any:
    if (number := words.number(text)) is not None:
        return Quantity(Rational(number))
    return Words(words.meaning(text))


def _looks_like_words(text: str) -> bool:
    bare = re.sub(r"\\text\{([^{}]*)\}", r"\1", text)
    if not re.fullmatch(r"[^\W\d_]+", bare) or bare in FUNCTIONS or bare in CONSTANTS:
        return False
    return (
        len(bare) > 3
        or not bare.isascii()
        or (len(bare) > 1 and bool(re.search("[eiouEIOU]", bare)))
        or (text.startswith("\\text") and len(bare) > 1)
    )


def is_prose(text: str) -> bool:
    """Words with nothing but words, numbers and their punctuation."""
    bare = re.sub(r"\\text\{([^{}]*)\}", r"\1", text)
    return bool(re.fullmatch(r"[\w\s\-'.,:;/&()\"!]+", bare) and re.search(r"[^\W\d_]{3,}", bare) and "_" not in bare)


def _quantity(text: str) -> Quantity:
    unit = ""
    if money := _CURRENCY.match(text):
        text = money[1] + money[3] + text[money.end() :]
        unit = _MONEY.get(money[2], _MONEY.get(money[2][0], "dollar"))
    if text.endswith("\\%"):
        unit, text = "%", text[:-2].strip()
    elif re.search(r"\^\{?\\circ\}?(?:\\?(?:text|mathrm)?\{?([CF])\}?)?$", text) and not re.search(
        r"\\?(?:sin|cos|tan)", text
    ):
        text, _, scale = text.rpartition("^")
        unit = {"C": "celsius", "F": "fahrenheit"}.get(scale.strip("{}")[-1:], "degree")
    else:
        text, tail = split_unit(text)
        unit = f"{unit}/{tail.lstrip('/')}" if unit and tail and tail != unit else unit or tail
        if tail in ("percent", "pct"):
            unit = "%"
        if tail == "degree/celsiu" or tail.startswith("degree c"):
            unit = "celsius"
    text = text.strip()
    comma = re.fullmatch(r"(-?)(\d+),(\d+)", text)
    if comma and comma[2] == "0":
        return Quantity(Rational(f"{comma[1]}0.{comma[3]}"), unit, len(comma[3]))
    decimal = _DECIMAL.fullmatch(text)
    if text.endswith(("...", "\\ldots")):
        try:
            value = expression(text)
        except NotUnderstood:
            value = expression(re.sub(r"\.\.\.$|\\ldots$", "", text))
            return Quantity(value, unit, len(decimal[1]) if decimal else 0)
        return Quantity(value, unit)
    return Quantity(expression(text), unit, len(decimal[1]) if decimal else None)


def split_unit(text: str) -> tuple[str, str]:
    """An expression and the unit behind it, "" if there is none."""
    ordinal = re.fullmatch(r"(\d+)\^?\{?(?:\\text\{)?(?:st|nd|rd|th)\}?\}?", text)
    if ordinal:
        return ordinal[1], ""
    for match in _TAIL.finditer(text):
        body, tail = text[: match.start()].strip(), text[match.start() :]
        plain = match["plain"]
        if (
            not body
            or body.endswith(("+", "-", "*", "/", "^", "=", "_", "{", "("))
            or tail.count("}") < tail.count("{")
        ):
            continue
        if plain is not None:
            name = plain.rstrip(".")
            spaced = match.start() > 0 and text[match.start() - 1] == " "
            known = units.factor(units.unit(tail)) is not None
            if (
                name in FUNCTIONS
                or name in CONSTANTS
                or (len(name) == 1 and not (spaced and name in _LETTER_UNITS and known))
            ):
                continue
            if not spaced and not known:
                continue
        said = re.sub(r"\\(?:text|mathrm)", "", tail)
        listed = re.findall(r"[A-Za-z]+", said)
        if not _UNIT_WORDS.fullmatch(said) or len(listed) > 4 or _PROSE & {word.lower() for word in listed}:
            raise NotUnderstood(f"the words {said.strip()!r}")
        if re.search(r"(?<![\^{A-Za-z])-?\d", re.sub(r"\^\{?-?\d+\}?", "", said)):
            raise NotUnderstood("a number among the words")
        return body, units.unit(tail)
    return text, ""
