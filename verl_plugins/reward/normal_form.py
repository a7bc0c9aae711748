r"""One way to write an answer: Unicode mathematics, spacing, fonts and delimiters make no difference after it.

Text to text, without reading what it means: `½` and `\dfrac12` become `\frac{1}{2}`, but 0.5 stays 0.5. Two answers
with one normal form are equal; `ttrl` counts votes by it.
"""

from __future__ import annotations

import re
from functools import lru_cache

from verl_plugins.reward.final_answer import last_boxed

_SUPERSCRIPT = dict(zip("⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻⁼⁽⁾ⁿⁱˣ", "0123456789+-=()nix", strict=True))
_SUBSCRIPT = dict(zip("₀₁₂₃₄₅₆₇₈₉₊₋₌₍₎ₙₓᵢ", "0123456789+-=()nxi", strict=True))
_FRACTIONS = {
    "½": "12", "⅓": "13", "⅔": "23", "¼": "14", "¾": "34", "⅕": "15", "⅖": "25", "⅗": "35", "⅘": "45", "⅙": "16",
    "⅚": "56", "⅛": "18", "⅜": "38", "⅝": "58", "⅞": "78", "⅐": "17", "⅑": "19",
}  # fmt: skip
_SIGNS = {
    "−": "-", "‐": "-", "‑": "-", "‒": "-", "–": "-", "—": "-", "×": r"\times ", "✕": r"\times ", "·": r"\cdot ",
    "⋅": r"\cdot ", "∙": r"\cdot ", "•": r"\cdot ", "÷": "/", "⁄": "/", "∕": "/", "π": r"\pi ", "∞": r"\infty ",
    "°": r"^\circ ", "º": r"^\circ ", "≤": r"\le ", "⩽": r"\le ", "≥": r"\ge ", "⩾": r"\ge ", "≠": r"\ne ",
    "≈": r"\approx ", "±": r"\pm ", "∓": r"\mp ", "∪": r"\cup ", "∩": r"\cap ", "∈": r"\in ", "∅": r"\emptyset ",
    "⌀": r"\emptyset ", "Ø": r"\emptyset ", "ℝ": r"\mathbb{R}", "ℤ": r"\mathbb{Z}", "ℕ": r"\mathbb{N}",
    "ℚ": r"\mathbb{Q}", "ℂ": r"\mathbb{C}", "′": "'", "’": "'", "‘": "'", "“": '"', "”": '"', "″": "''", "√": r"\sqrt",
    "∠": r"\angle ", "△": r"\triangle ", "α": r"\alpha ", "β": r"\beta ", "γ": r"\gamma ", "δ": r"\delta ",
    "ε": r"\epsilon ", "θ": r"\theta ", "λ": r"\lambda ", "μ": r"\mu ", "σ": r"\sigma ", "τ": r"\tau ", "φ": r"\phi ",
    "ϕ": r"\phi ", "ω": r"\omega ", "ρ": r"\rho ", "⟨": r"\langle ", "⟩": r"\rangle ", "〈": r"\langle ",
    "〉": r"\rangle ", "⌊": r"\lfloor ", "⌋": r"\rfloor ", "⌈": r"\lceil ", "⌉": r"\rceil ", "∖": r"\setminus ",
    "→": r"\to ", "∶": ":", "，": ", ", "、": ", ", "。": ".", "…": r"\ldots ", "⋯": r"\ldots ", "∑": r"\sum ",
    "∫": r"\int ", "𝑖": "i", "ⅈ": "i", "ℯ": "e", "µ": r"\mu ",
}  # fmt: skip
_SPACES = dict.fromkeys(
    "\u00a0\u2000\u2001\u2002\u2003\u2004\u2005\u2006\u2007\u2008\u2009\u200a\u202f\u205f\u3000", " "
)
_NOTHING = dict.fromkeys("\u200b\u200c\u200d\u2060\ufeff\u00ad\u2061\u2062\u2063", "")
_NOTHING |= dict.fromkeys("\u0332✓✔✅🎉", "")
_FULL_WIDTH = {chr(code): chr(code - 0xFEE0) for code in range(0xFF01, 0xFF5F)}
_ONE_SIGN = str.maketrans({**_FULL_WIDTH, **_SPACES, **_NOTHING, **_SIGNS})
_ROOTS = re.compile(r"([√∛∜])\s*(\((?:[^()]|\([^()]*\))*\)|\{[^{}]*\}|\d+(?:\.\d+)?|[a-zA-Zπ]|\\[a-z]+)")
_UPPER = re.compile(f"[{''.join(_SUPERSCRIPT)}]+")
_LOWER = re.compile(f"[{''.join(_SUBSCRIPT)}]+")

_SAME = {
    "dfrac": "frac", "tfrac": "frac", "cfrac": "frac", "leq": "le", "leqslant": "le", "geq": "ge", "geqslant": "ge",
    "neq": "ne", "dbinom": "binom", "tbinom": "binom", "varnothing": "emptyset", "lbrace": "{", "rbrace": "}",
    "lvert": "|", "rvert": "|", "vert": "|", "mid": "|", "textbf": "text", "textrm": "text", "textit": "text",
    "textsf": "text", "texttt": "text", "emph": "text", "mbox": "text", "hbox": "text", "operatorname": "mathrm",
    "mathbf": "math",
    "underline": "math", "mathit": "math", "mathsf": "math", "boldsymbol": "math", "bm": "math", "mathnormal": "math",
    "ast": "times", "dots": "ldots", "cdots": "ldots", "lor": "vee", "iff": "Leftrightarrow", "degree": "^\\circ",
    "degrees": "^\\circ", "textdegree": "^\\circ", "rightarrow": "to", "colon": ":", "R": "mathbb{R}",
    "pounds": "text{pounds}", "euro": "text{euros}", "euros": "text{euros}", "lt": "<", "gt": ">", "div": "/",
    "varphi": "phi", "varepsilon": "epsilon", "imath": "i", "lgroup": "(", "rgroup": ")", "ang": "angle", "Re": "Re",
    "bigcup": "cup", "bigcap": "cap", "textdollar": "$", "dollar": "$", "percent": "%",
}  # fmt: skip
_DROPPED = (
    "left|right|big|Big|bigg|Bigg|bigl|bigr|Bigl|Bigr|biggl|biggr|Biggl|Biggr|displaystyle|textstyle|limits|nolimits|bf|rm|it"
    "|boldmath|tt|sf|large|Large|huge|Huge|LARGE|small|normalsize|hfill|centering|strut|middle"
)
_LAYOUT = re.compile(rf"\\(?:{_DROPPED})(?![A-Za-z])(?:(?<=left)\.|(?<=right)\.)?\s*")
_COMMAND = re.compile(r"\\([A-Za-z]+)\*?")
_GAP = re.compile(
    r"(?<!\\)\\[,;:> ]|~|\\(?:quad|qquad|thinspace|enspace|medspace)(?![A-Za-z])|\\[hv]space\*?\{[^{}]*\}"
    r"|\\phantom\{[^{}]*\}|\\color\{[^{}]*\}|\\textcolor\{[^{}]*\}"
)
_DIGIT_GAP = re.compile(r"(?<=\d)(?:\\[,;:> !]|\{,\}|\{\\,\}|\{\s\}|\\thinspace)+(?=\d{3}(?!\d))")
_FONT = re.compile(r"\\math\s*\{((?:[^{}]|\{[^{}]*\})*)\}")
_ROMAN = re.compile(r"\\mathrm\s*\{([^{}]*)\}")
_POWERS = {"thousand": 3, "million": 6, "billion": 9, "trillion": 12}
_LARGE = re.compile(r"(?<=\d)(?:\\text\{)?\s*(thousand|million|billion|trillion)\b\}?")
_UNIT_FRACTION = re.compile(r"\\frac\s*\{\s*\\text\{([^{}]*)\}\s*\}\s*\{\s*\\text\{([^{}]*)\}\s*\}")
_MINUS = re.compile(r"\b(?:minus|negative) (?=\d|\\frac|\\sqrt)")
_TIMES = re.compile(r"(?<=\d) ?x ?(?=10\^)|(?<=\d) x (?=\d)")
_EQUALS = re.compile(r"\s*\b(?:equals|is equal to)\b\s*")
_OPERATORS = {
    "sin",
    "cos",
    "tan",
    "cot",
    "sec",
    "csc",
    "arcsin",
    "arccos",
    "arctan",
    "ln",
    "log",
    "lg",
    "exp",
    "gcd",
    "lcm",
    "max",
    "min",
}
_PLAIN_TEXT = re.compile(
    r"\\text\s*\{\s*([-+]?[\d.,]+(?:/\d+)?|\\?%|\$?[\d.,]+|(?<=^\\text\{)[a-zA-Z]|(?<=[=(,+\-{]\\text\{)[a-zA-Z]|\([A-Za-z]\)|[-+=,.;:()]*)\s*\}"
)
_FRAC = re.compile(
    r"\\frac\s*(?:(\d)|\{\s*([^{}]*?)\s*\}|([a-zA-Z])(?![a-zA-Z]))\s*(?:(\d)|\{\s*([^{}]*?)\s*\}|([a-zA-Z])(?![a-zA-Z]))"
)
_SQRT = re.compile(r"\\sqrt\s*(?:(\d|(?<=\s)[a-zA-Z])|\{\s*([^{}]*?)\s*\})")
_SCRIPT = re.compile(r"([\^_])\s*\{\s*([0-9A-Za-z]|\\circ)\s*\}(?![0-9])")
_SPACED = re.compile(r"-?(?:\\\$)?[1-9]\d{0,2}(?: \d{3})+(?:\.\d+)?(?: ?(?:\\%|\\text\{.*\}|[a-z]+))?")
_LOOSE = re.compile(r"\s*([-+*/^_=<>()\[\]{}|:;!&])\s*")
_AFTER_COMMAND = re.compile(r"(\\[A-Za-z]+) (?![A-Za-z])")


def normal_form(answer: str) -> str:
    """The answer in its normal form."""
    return _normal_form(answer) if len(answer) <= 4000 else answer.strip()


@lru_cache(maxsize=4096)
def _normal_form(answer: str) -> str:
    text = unicode_to_latex(answer).strip()
    text = _without_delimiters(text)
    text = re.sub(r"\\\\(?=(?:frac|sqrt|text|pi|cdot|times|dfrac|left|right|infty|boxed)\b)", r"\\", text)
    text = _DIGIT_GAP.sub(",", text).replace("{,}", ",").replace("\\!", "")
    text = _LAYOUT.sub("", re.sub(r"(?<=\d)\{\.\}(?=\d)", ".", text))
    text = _GAP.sub(" ", text)
    text = _COMMAND.sub(lambda match: _renamed(match[1]), text)
    text = _ROMAN.sub(_roman, text)
    text = _LARGE.sub(lambda match: rf"\times10^{{{_POWERS[match[1]]}}}", text)
    text = _UNIT_FRACTION.sub(r"\\text{\1/\2}", text)
    text = _MINUS.sub("-", _TIMES.sub(r"\\times ", _EQUALS.sub("=", text)))
    for _ in range(2):
        text = _FONT.sub(r"\1", text)
        text = _PLAIN_TEXT.sub(r"\1", text)
    text = _FRAC.sub(lambda match: rf"\frac{{{_of(match, 1)}}}{{{_of(match, 4)}}}", text)
    text = _SQRT.sub(lambda match: rf"\sqrt{{{match[1] or match[2] or ''}}}", text)
    text = _SCRIPT.sub(r"\1\2", text)
    text = re.sub(r"(?<=[0-9)])\*\*(?=[-\d(a-z])|(?<=[a-z])\*\*(?=[-\d(])", "^", text)
    text = _LOOSE.sub(r"\1", re.sub(r"\s+", " ", text))
    text = re.sub(r"(?<!\d),\s+|,\s+(?!\d)", ",", re.sub(r"\s+,", ",", text))
    text = _AFTER_COMMAND.sub(r"\1", text)
    text = re.sub(r" (?=\\)", "", text)
    text = re.sub(r"(?<!\\)%", r"\\%", text)
    if _SPACED.fullmatch(text):
        text = re.sub(r"(?<=\d) (?=\d{3}(?!\d))", ",", text)
    return _trimmed(text)


def unicode_to_latex(text: str) -> str:
    """Mathematical signs as LaTeX commands, digits and letters of full width as plain ones."""
    if text.isascii():
        return text
    text = _ROOTS.sub(_root, text)
    text = _UPPER.sub(lambda match: "^{" + "".join(_SUPERSCRIPT[sign] for sign in match[0]) + "}", text)
    text = _LOWER.sub(lambda match: "_{" + "".join(_SUBSCRIPT[sign] for sign in match[0]) + "}", text)
    for sign, (over, under) in _FRACTIONS.items():
        if sign in text:
            text = text.replace(sign, rf"\frac{{{over}}}{{{under}}}")
    text = re.sub(r"(?<=\d)[\u00a0\u2009\u202f](?=\d{3}(?!\d))", ",", text)
    return text.translate(_ONE_SIGN)


def _root(match: re.Match) -> str:
    inside = match[2][1:-1] if match[2][0] in "({" else match[2]
    return {"√": r"\sqrt", "∛": r"\sqrt[3]", "∜": r"\sqrt[4]"}[match[1]] + "{" + inside + "}"


def _roman(match: re.Match) -> str:
    inside = match[1].strip()
    if inside in ("i", "e", "d") or not any(sign.isalpha() for sign in inside):
        return inside
    return f"\\{inside} " if inside in _OPERATORS else rf"\text{{{match[1]}}}"


def _renamed(name: str) -> str:
    other = _SAME.get(name, name)
    if not other[0].isalpha():
        return ("\\" if other in "{}$%" else "") + other + (" " if other[-1].isalpha() else "")
    return ("" if other in ("i", "Re") else "\\") + other


def _of(match: re.Match, first: int) -> str:
    return next((match[place] for place in range(first, first + 3) if match[place] is not None), "")


def _without_delimiters(text: str) -> str:
    """Without the dollars, boxes and braces around it; a dollar that is money stays, as `\\$`."""
    for _ in range(6):
        before = text
        text = text.strip().strip("`")
        for left, right in (("$$", "$$"), ("\\(", "\\)"), ("\\[", "\\]"), ("**", "**"), ("__", "__"), ('"', '"')):
            if text.startswith(left) and text.endswith(right) and len(text) > len(left) + len(right):
                text = text[len(left) : -len(right)]
        if re.fullmatch(r"\\(?:boxed|fbox|framebox|bbox)\b.*", text, re.DOTALL):
            content = last_boxed(text)
            text = content if content else text
        if text.startswith("{") and text.endswith("}") and _closes_at_end(text):
            text = text[1:-1]
        if text == before:
            break
    plain = re.sub(r"\\[()]", " ", text).replace("$$", "$")
    if len(re.findall(r"(?<!\\)\$", plain)) % 2 == 0 and not re.match(
        r"\$\d[\d.,]*(?:\s*[-,]| (?:and|or) )\s*\$", plain
    ):
        plain = re.sub(r"(?<!\\)\$", " ", plain)
    return re.sub(r"(?<!\\)\$", r"\\$", plain).strip()


def _closes_at_end(text: str) -> bool:
    depth = 0
    for place, sign in enumerate(text):
        if sign in "{}" and text[place - 1 : place] != "\\":
            depth += 1 if sign == "{" else -1
            if depth == 0:
                return place == len(text) - 1
    return False


def _trimmed(text: str) -> str:
    text = text.strip(" \n;*")
    text = re.sub(r"^(?:\\approx|\\therefore|\\implies|\\Rightarrow|=|:)\s*", "", text)
    if not text.endswith(("...", r"\ldots")):
        text = re.sub(r"(?<!\\)[.,;:\s]+$", "", text)
    return text.strip()
