"""LaTeX, as `normal_form` writes it, to sympy, by a grammar of its own: what it does not know is an error.

Nothing is guessed and nothing left out: a sign that is not understood, two numbers side by side or a missing bracket
raise `NotUnderstood`. Text is never evaluated. Sums, integrals, products and limits go to latex2sympy.
"""

from __future__ import annotations

import re

import sympy
from sympy import Expr, Integer, Rational, Symbol

from verl_plugins.reward.tokens import NotUnderstood, Token, tokens

MOST_BITS = 300_000
"""Larger whole numbers are not written out."""
DEEPEST = 60
"""Brackets within brackets."""


_SCIENTIFIC = re.compile(r"(?<![\w\\.])(\d+(?:\.\d+)?|\.\d+)[eE]([-+]?\d{1,3})(?!\w)")
_PERIOD = re.compile(r"(\d*)\.(\d*?)(?:\\(?:overline|bar|dot|overbar)\{?(\d+)\}?|\((\d+)\))")
_GOES_ON = re.compile(r"(\d*)\.(\d*?)(\d{1,6}?)\3{1,}(?:\.\.\.|\\ldots)")

FUNCTIONS = {
    "sin": sympy.sin, "cos": sympy.cos, "tan": sympy.tan, "cot": sympy.cot, "sec": sympy.sec, "csc": sympy.csc,
    "arcsin": sympy.asin, "arccos": sympy.acos, "arctan": sympy.atan, "asin": sympy.asin, "acos": sympy.acos,
    "atan": sympy.atan, "sinh": sympy.sinh, "cosh": sympy.cosh, "tanh": sympy.tanh, "ln": sympy.log,
    "lg": lambda x: sympy.log(x) / sympy.log(10), "log": lambda x: sympy.log(x) / sympy.log(10), "exp": sympy.exp,
    "sqrt": sympy.sqrt, "abs": sympy.Abs, "floor": sympy.floor, "ceil": sympy.ceiling, "arccot": sympy.acot,
}  # fmt: skip
_INVERSE = {"sin": sympy.asin, "cos": sympy.acos, "tan": sympy.atan, "cot": sympy.acot}
_OF_SEVERAL = {"gcd": sympy.gcd, "lcm": sympy.lcm, "max": sympy.Max, "min": sympy.Min}
CONSTANTS = {"pi": sympy.pi, "infty": sympy.oo, "infinity": sympy.oo, "inf": sympy.oo}
_LETTERS = (
    "alpha beta gamma delta epsilon zeta eta theta iota kappa lambda mu nu xi rho sigma tau upsilon phi chi psi omega"
    " Gamma Delta Theta Lambda Xi Pi Sigma Phi Psi Omega ell hbar"
)
GREEK = set(_LETTERS.split())
_CLOSING = {"(": ")", "[": "]", "{": "}", "\\{": "\\}", "|": "|", "\\lfloor": "\\rfloor", "\\lceil": "\\rceil"}
_CALCULUS = re.compile(r"\\(?:sum|int|prod|lim|iint|oint)(?![A-Za-z])")
_CONCRETE = re.compile(r"\\(?:text|mathrm|mathbb|nabla|begin)")
_STARTS = {"(", "[", "{", "\\{", "\\lfloor", "\\lceil"}


def written_out(text: str) -> str:
    """Periods of decimals as fractions, and `1.2e5` as a product."""
    if "." in text:
        text = _PERIOD.sub(lambda match: _fraction(match[1], match[2], match[3] or match[4]), text)
        text = _GOES_ON.sub(lambda match: _fraction(match[1], match[2], match[3]), text)
    return _SCIENTIFIC.sub(r"\1\\times10^{\2}", text)


def _fraction(whole: str, fixed: str, period: str) -> str:
    value = Rational(int((whole or "0") + fixed), 10 ** len(fixed))
    value += Rational(int(period), (10 ** len(period) - 1) * 10 ** len(fixed))
    return rf"(\frac{{{value.p}}}{{{value.q}}})"


def expression(text: str, sign: int = 1) -> Expr:
    r"""The value of an expression in normal form; `\pm` is plus for `sign` 1 and minus for -1.

    Raises:
        NotUnderstood: if it is none.
    """
    text = written_out(text)
    if _CALCULUS.search(text):
        return _calculus(text)
    parser = _Parser(text, sign)
    value = parser.sum()
    if parser.here is not None:
        raise NotUnderstood(f"what {parser.here.text!r} means there")
    return value


def _calculus(text: str) -> Expr:
    from latex2sympy2_extended import latex2sympy
    from latex2sympy2_extended.latex2sympy2 import ConversionConfig

    if _CONCRETE.search(text) or re.search(r"[^\W\d_]{4,}", re.sub(r"\\[A-Za-z]+", "", text)):
        raise NotUnderstood("words in a sum or integral")
    try:
        config = ConversionConfig(lowercase_symbols=False)
        value = latex2sympy(text, is_real=None, normalization_config=None, conversion_config=config)
    except Exception as error:
        raise NotUnderstood(str(error).split("\n")[0]) from None
    if not isinstance(value, Expr):
        raise NotUnderstood("a sum or integral that is no number")
    return value.subs({symbol: _symbol(symbol.name) for symbol in value.free_symbols}).doit()


def _symbol(name: str) -> Symbol:
    return Symbol(name, real=True)


class _Parser:
    """Recursive descent over the tokens of one expression."""

    def __init__(self, text: str, sign: int) -> None:
        self.tokens, self.place, self.sign, self.depth = tokens(text), 0, sign, 0
        self.bars = 0

    @property
    def here(self) -> Token | None:
        return self.tokens[self.place] if self.place < len(self.tokens) else None

    def ahead(self, by: int = 1) -> str:
        place = self.place + by
        return self.tokens[place].text if place < len(self.tokens) else ""

    def take(self) -> Token:
        if self.here is None:
            raise NotUnderstood("it ends too early")
        self.place += 1
        return self.tokens[self.place - 1]

    def skip(self, *texts: str) -> str:
        """Take the next token if it is one of these."""
        if self.here is not None and self.here.text in texts:
            return self.take().text
        return ""

    def expect(self, text: str) -> None:
        if not self.skip(text):
            raise NotUnderstood(f"{text!r} is missing")

    def sum(self) -> Expr:
        self.depth += 1
        if self.depth > DEEPEST:
            raise NotUnderstood("too many brackets within brackets")
        terms = [self.signed(self.skip("+", "-", "\\pm", "\\mp"))]
        while operator := self.skip("+", "-", "\\pm", "\\mp"):
            terms.append(self.signed(operator))
        self.depth -= 1
        return sympy.Add(*terms) if len(terms) > 1 else terms[0]

    def signed(self, operator: str) -> Expr:
        factor = {"-": -1, "\\pm": self.sign, "\\mp": -self.sign}.get(operator, 1)
        return -self.product() if factor < 0 else self.product()

    def product(self) -> Expr:
        value = self.factor()
        while True:
            if self.skip("*", "\\times", "\\cdot"):
                value = value * self.signed_factor()
            elif self.skip("/"):
                value = _over(value, self.signed_factor())
            elif self.starts_factor():
                if self.here.kind == "number":
                    raise NotUnderstood("a number right after another factor")
                value = value * self.factor()
            else:
                return value

    def signed_factor(self) -> Expr:
        return -self.factor() if self.skip("-") else self.factor()

    def starts_factor(self) -> bool:
        here = self.here
        if here is None or (here.text == "|" and self.bars):
            return False
        if here.kind in ("number", "letters") or here.text in _STARTS or here.text == "|":
            return True
        return here.kind == "command" and here.text[1:] in _COMMANDS

    def factor(self) -> Expr:
        value = self.atom()
        while True:
            if self.skip("!"):
                if self.ahead(0) == "!":
                    raise NotUnderstood("two exclamation marks")
                value = _factorial(value)
            elif self.skip("^"):
                if self.skip("\\circ"):
                    value = value * sympy.pi / 180
                elif self.ahead(0) == "{" and self.ahead() == "\\circ":
                    self.take(), self.take(), self.expect("}")
                    value = value * sympy.pi / 180
                else:
                    value = _power(value, self.exponent())
            else:
                return value

    def exponent(self) -> Expr:
        if self.skip("-"):
            return -self.exponent()
        value = self.atom()
        return _power(value, self.exponent()) if self.skip("^") else value

    def atom(self) -> Expr:
        token = self.take()
        if token.kind == "number":
            return self.number(token)
        if token.kind == "letters":
            return self.letters(token)
        if token.text in _CLOSING:
            return self.bracket(token.text)
        if token.kind == "command":
            return self.command(token.text[1:])
        raise NotUnderstood(f"what {token.text!r} means there")

    def number(self, token: Token) -> Expr:
        value = Rational(token.text.replace(",", ""))
        if value.is_Integer and (part := self.fraction_part()) is not None:
            return value + part
        return value

    def fraction_part(self) -> Expr | None:
        r"""The `3/8` or `\frac{3}{8}` of a mixed number."""
        texts = [token.text for token in self.tokens[self.place : self.place + 7]]
        plain = len(texts) >= 3 and texts[1] == "/" and self.here.spaced and texts[0].isdigit() and texts[2].isdigit()
        if plain:
            above, below, length = texts[0], texts[2], 3
        elif texts[:2] == ["\\frac", "{"] and len(texts) == 7 and texts[2].isdigit() and texts[5].isdigit():
            above, below, length = texts[2], texts[5], 7
        else:
            return None
        if int(below) == 0:
            raise NotUnderstood("a division by zero")
        self.place += length
        return Rational(int(above), int(below))

    def letters(self, token: Token) -> Expr:
        name = token.text
        if name in FUNCTIONS:
            return self.function(name)
        if name in _OF_SEVERAL:
            return self.of_several(name)
        if name in CONSTANTS:
            return CONSTANTS[name]
        if len(name) > 3 or not name.isascii():
            raise NotUnderstood(f"the word {name!r}")
        if len(name) > 1:  # a product: its last letter may have an exponent of its own
            self.place -= 1
            start = token.start
            split = [Token("letters", sign, False, start + at, start + at + 1) for at, sign in enumerate(name)]
            self.tokens[self.place : self.place + 1] = split
            return self.letters(self.take())
        if name in ("f", "g", "h", "F", "G", "H") and self.ahead(0) == "(":
            self.take()
            return sympy.Function(name, real=True)(*self.arguments(")"))
        return self.named(name)

    def named(self, name: str) -> Expr:
        """A letter with its index and primes; e and i alone are the numbers."""
        plain = True
        while mark := self.skip("_", "'"):
            plain = False
            name += mark if mark == "'" else f"_{self.index()}"
        constants = {"e": sympy.E, "i": sympy.I}
        return constants[name] if plain and name in constants else _symbol(name)

    def index(self) -> str:
        if not self.skip("{"):
            return self.take().text
        found = []
        while not self.skip("}"):
            found.append(self.take().text)
            if found[-1] == "{":
                raise NotUnderstood("an index within an index")
        return "".join(found)

    def bracket(self, opening: str) -> Expr:
        self.bars += opening == "|"
        bars, self.bars = self.bars, self.bars if opening == "|" else 0
        value = self.sum()
        self.expect(_CLOSING[opening])
        self.bars = bars - (opening == "|")
        wrap = {"|": sympy.Abs, "\\lfloor": sympy.floor, "\\lceil": sympy.ceiling}.get(opening)
        return wrap(value) if wrap else value

    def arguments(self, closing: str) -> list[Expr]:
        found = [self.sum()]
        while self.skip(","):
            found.append(self.sum())
        self.expect(closing)
        return found

    def group(self) -> Expr:
        self.expect("{")
        return self.bracket("{")

    def command(self, name: str) -> Expr:
        if name == "frac":
            return _over(self.group(), self.group())
        if name == "sqrt":
            degree = self.bracket("[") if self.skip("[") else Integer(2)
            value = self.group() if self.ahead(0) == "{" else self.atom()
            return _power(value, _over(Integer(1), degree))
        if name == "binom":
            above, below = self.group(), self.group()
            if above.is_Integer and abs(above) > 5000:
                raise NotUnderstood("a binomial that is too large")
            return sympy.binomial(above, below)
        if name in FUNCTIONS:
            return self.function(name)
        if name in _OF_SEVERAL:
            return self.of_several(name)
        if name in CONSTANTS:
            return CONSTANTS[name]
        if name in GREEK:
            return self.named(name)
        if name in ("overline", "vec", "hat", "bar", "angle", "triangle", "tilde", "widehat", "overrightarrow"):
            return _symbol(name + self.index())
        raise NotUnderstood(f"the command \\{name}")

    def of_several(self, name: str) -> Expr:
        self.expect("(")
        return _OF_SEVERAL[name](*self.arguments(")"))

    def function(self, name: str) -> Expr:
        function, power, base = FUNCTIONS[name], None, None
        while mark := self.skip("^", "_"):
            if mark == "^":
                power = self.exponent()
            else:
                base = self.group() if self.ahead(0) == "{" else self.atom()
        if power == -1 and name in _INVERSE:
            function, power = _INVERSE[name], None
        value = function(self.argument())
        if base is not None:
            if name != "log":
                raise NotUnderstood(f"an index of {name}")
            value = value * sympy.log(10) / sympy.log(base)
        return value if power is None else _power(value, power)

    def argument(self) -> Expr:
        """What a function is applied to: a bracket, or the factors up to the next sign or function."""
        if self.ahead(0) in ("(", "{", "["):
            return self.factor()
        value = self.signed_factor()
        while self.starts_factor() and self.ahead(0).lstrip("\\") not in FUNCTIONS and self.here.kind != "number":
            value = value * self.factor()
        if self.ahead(0) == "/" and value.has(sympy.pi) and self.ahead().isdigit():
            self.take()
            value = _over(value, self.factor())
        return value


_COMMANDS = (
    {"frac", "sqrt", "binom", "overline", "vec", "hat", "bar", "angle", "triangle"}
    | set(FUNCTIONS) | set(CONSTANTS) | GREEK | set(_OF_SEVERAL)
)  # fmt: skip


def _over(above: Expr, below: Expr) -> Expr:
    if below == 0:
        raise NotUnderstood("a division by zero")
    return above / below


def _factorial(value: Expr) -> Expr:
    if value.is_Integer and not 0 <= value <= 5000:
        raise NotUnderstood("a factorial that is too large")
    return sympy.factorial(value)


def _power(base: Expr, exponent: Expr) -> Expr:
    if base.is_Rational and exponent.is_Rational:
        if base == 0 and exponent <= 0:
            raise NotUnderstood("a division by zero, or 0^0")
        if abs(exponent) * max(base.p.bit_length(), base.q.bit_length()) > MOST_BITS and abs(base) != 1:
            raise NotUnderstood("a power that is too large")
    return sympy.Pow(base, exponent)
