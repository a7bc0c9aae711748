"""Units of quantities: which words mean the same, and how many of one are the other."""

from __future__ import annotations

import re
from functools import cache

_TABLE = """
length: m 1 m meter metre; km 1000 km kilometer kilometre; cm 1/100 cm centimeter centimetre
length: mm 1/1000 mm millimeter millimetre; dm 1/10 dm decimeter; in 254/10000 in inch inche
length: ft 3048/10000 ft foot feet; yd 9144/10000 yd yard; mi 1609344/1000 mi mile
mass: g 1 g gram gramme; kg 1000 kg kilogram kilo; mg 1/1000 mg milligram; lb 45359237/100000 lb pound
mass: oz 45359237/1600000 oz ounce; ton 1000000 ton tonne t
time: s 1 s sec second; min 60 min minute; h 3600 h hr hour; day 86400 day d; week 604800 week wk
money: dollar 1 dollar usd us$; cent 1/100 cent ¢
euro: euro 1 euro eur €
volume: l 1 l liter litre; ml 1/1000 ml milliliter millilitre; gal 3785/1000 gal gallon
angle: degree 1 degree deg
"""
NEUTRAL = {
    "",
    "unit",
    "square unit",
    "sq unit",
    "cubic unit",
    "unit^2",
    "unit^3",
    "total",
    "in total",
    "altogether",
    "way",
}
"""Words beside a number that say nothing of its size."""


@cache
def _known() -> dict[str, tuple[str, int, int]]:
    """Dimension, numerator and denominator of each unit."""
    found = {}
    for line in _TABLE.strip().splitlines():
        dimension, _, units = line.partition(":")
        for unit in units.split(";"):
            _, size, *names = unit.split()
            above, _, below = size.partition("/")
            for name in names:
                found[name] = (dimension, int(above), int(below or 1))
    return found


def unit(words: str) -> str:
    """One way to write a unit: singular, without marks, powers as ^2."""
    text = re.sub(r"\\(?:text|mathrm|math)\s*|\\cdot|[{}$]", lambda match: " " if "cdot" in match[0] else "", words)
    text = re.sub(r"\s*(?:\bper\b|/)\s*", "/", re.sub(r"\s+", " ", text).strip(" .,;"))
    text = re.sub(r"^(?:square|sq\.?) (\w+)", r"\1^2", re.sub(r"^cubic (\w+)", r"\1^3", text))
    parts = []
    for part in text.split("/"):
        name, mark, power = part.strip(" .").partition("^")
        lower = name.strip() if len(name.strip()) == 1 else name.strip().lower()
        if len(lower) > 3 and lower.endswith("s") and not lower.endswith("ss"):
            lower = lower[:-1]
        parts.append(lower + mark + power.strip("{}() "))
    return "/".join(parts)


def factor(name: str) -> tuple[str, int, int] | None:
    """Dimension and size of a unit in the dimension's own, as a fraction; None for words that are no unit we know."""
    base, mark, power = name.partition("^")
    if "/" in name:
        above, below = (factor(part) for part in name.split("/", 1)) if name.count("/") == 1 else (None, None)
        if above is None or below is None:
            return None
        return f"{above[0]}/{below[0]}", above[1] * below[2], above[2] * below[1]
    found = _known().get(base)
    if found is None or (mark and power not in ("2", "3")):
        return None
    exponent = int(power or 1)
    return f"{found[0]}{mark}{power}", found[1] ** exponent, found[2] ** exponent
