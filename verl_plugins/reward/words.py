"""Answers that are words: which mean the same, and which are numbers."""

from __future__ import annotations

import re

_ONES = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen"
    " seventeen eighteen nineteen"
)
_TENS = "twenty thirty forty fifty sixty seventy eighty ninety"
_ORDINALS = "first second third fourth fifth sixth seventh eighth ninth tenth eleventh twelfth"
_NUMBERS = {word: number for number, word in enumerate(_ONES.split())}
_NUMBERS |= {word: 10 * number for number, word in enumerate(_TENS.split(), 2)}
_NUMBERS |= {word: number for number, word in enumerate(_ORDINALS.split(), 1)}
_NUMBERS |= {"dozen": 12, "thirteenth": 13, "fourteenth": 14, "fifteenth": 15, "twentieth": 20}

_MEANINGS = {
    "no solution": "no solution;no solutions;no real solution;no real solutions"
    ";there is no solution;there are no solutions;has no solution"
    ";no such value;no such number;no roots;no real roots;no such number exists;none exist"
    ";none exists;there is no such number;there are none;no values;no integer solutions;inconsistent;emptyset"
    ";the empty set;empty set",
    "does not exist": "does not exist;dne;doesn't exist;the limit does not exist;limit does not exist",
    "undefined": "undefined;not defined",
    "infinitely many": "infinitely many;infinitely many solutions;infinite solutions;infinite"
    ";infinite number of solutions;there are infinitely many;there are infinitely many solutions"
    ";an infinite number;infinitely many of them",
    "reals": "all real numbers;all reals;all real x;every real number;the real numbers;any real number;all real values",
    "yes": "yes;yes it is;yes it does;yes they are",
    "no": "no;no it is not;no it does not;nope;no they are not",
    "true": "true;correct;the statement is true",
    "false": "false;incorrect;the statement is false",
}
_MEANING = {phrase: meaning for meaning, phrases in _MEANINGS.items() for phrase in phrases.split(";")}
_MONTHS = "january february march april may june july august september october november december"
_MONTH = {month[:length]: month for month in _MONTHS.split() for length in (3, len(month))} | {"sept": "september"}

SENTINELS = frozenset(
    (
        *("n/a", "n.a", "#n/a", "<na>", "none", "null", "nil", "nan", "unknown", "unanswered", "no answer", "missing"),
        *("not available", "not applicable", "not given", "not provided", "not known", "no answer available"),
        *("no answer provided", "no answer given", "answer not available", "no ground truth", "tbd", "todo", "omitted"),
        *("to be determined", "to be added", "empty", "placeholder", "[none]", "[]", "{}", "()", "proof", "see proof"),
        *("see solution", "see the solution", "see the proof above"),
    )
)
"""What stands in data sets where there is no answer, in small letters. "Undefined" and "no solution" are answers."""
_WRAPPED = re.compile(r"\\(?:boxed|fbox|text|textbf|mathrm|texttt)\s*\{(.*)\}", re.DOTALL)
_MARKS = re.compile(r"[\s.?!…_*\-–—]*")


def is_answer(text: str) -> bool:
    r"""Whether the text answers anything: not empty, no mere dashes or question marks, no sentinel (`\text{N/A}`).

    Na, the element, does; NA does not.
    """
    text = text.strip().strip("$\"'`").strip()
    while inside := _WRAPPED.fullmatch(text):
        text = inside[1].strip()
    plain = " ".join(text.rstrip(".").split())
    return not (_MARKS.fullmatch(plain) or plain == "NA" or plain.lower() in SENTINELS)


def meaning(text: str) -> str:
    """One way to write these words: small letters, no articles, no punctuation; a phrase of a known meaning as that."""
    text = re.sub(r"\\(?:text|mathrm)\s*", " ", text).replace("\\ ", " ")
    text = re.sub(r"[{}\"$*`]|(?<=\w)\.(?=\s|$)", "", text.casefold())
    text = re.sub(r"[\s,;:!.]+", " ", text).strip(" .")
    text = _MEANING.get(text.lstrip("\\"), text)
    words = [word for word in text.replace("-", " ").split() if word not in ("the", "a", "an") or " " not in text]
    if any(word in _MONTH for word in words) and any(re.match(r"\d", word) for word in words):
        dated = (re.sub(r"^(\d+)(?:st|nd|rd|th)$", r"\1", word) for word in words if word not in ("of", "on"))
        return " ".join(sorted(_MONTH.get(word, word.lstrip("0")) for word in dated))
    return " ".join(words)


def number(text: str) -> int | None:
    """The number that number words say, as in "twenty-one"; None where they are no number."""
    words = [word for word in meaning(text).split() if word != "and"]
    if not words or len(words) > 6:
        return None
    total = part = 0
    for word in words:
        if word in ("hundred", "thousand", "million"):
            part = max(part, 1) * {"hundred": 100, "thousand": 1000, "million": 10**6}[word]
            if word != "hundred":
                total, part = total + part, 0
        elif word in _NUMBERS:
            part += _NUMBERS[word]
        else:
            return None
    return total + part
