r"""Where question, answer and worked solution are in a row of a known shape.

gsm8k  `question`; `answer` is the worked solution, then `#### 42`
math   `problem`; the answer is in `answer`, or else in the last `\boxed{…}` of the worked `solution`
dapo   verl's own schema: `prompt` (messages or text), `reward_model.ground_truth`, or else the answer in `solution`
plain  `question`, `problem` or `prompt`; `answer` is the answer and nothing else
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from numbers import Number
from typing import Any

from verl_plugins.data.answers import is_answer
from verl_plugins.errors import DataError, nearest
from verl_plugins.reward.final_answer import after_hashes, last_boxed

SHAPES = ("gsm8k", "math", "dapo", "plain")
MARK = "####"
QUESTIONS = ("question", "problem", "prompt")
_THOUSANDS = re.compile(r"(?<=\d),(?=\d{3}(?!\d))")
_CALCULATION = re.compile(r"<<[^<>]*>>")

Messages = list[tuple[str, str]]
"""(role, content) of each chat message."""


class Unusable(Exception):
    """A row without question or answer; the text says why."""


@dataclass(frozen=True)
class Columns:
    """Which column holds what; `a.b` is the key b inside column a."""

    shape: str
    question: str
    answer: str | None
    solution: str | None

    def __str__(self) -> str:
        used = (self.question, self.answer, self.solution)
        return f"{self.shape} ({', '.join(name for name in used if name)})"


@dataclass(frozen=True)
class Problem:
    """What a row asks, the answer to it, and the worked solution where there is one."""

    messages: Messages
    answer: str
    solution: str | None


def value(row: Mapping[str, Any], column: str) -> Any:
    """Value of a column, None where the row has none; a column whose name has a dot is found as well."""
    if column in row or "." not in column:
        return row.get(column)
    outer, _, inner = column.partition(".")
    inside = row.get(outer)
    return inside.get(inner) if isinstance(inside, Mapping) else None


def columns_of(rows: Iterable[Mapping[str, Any]]) -> list[str]:
    """The columns of these rows and the keys inside them, in the order they appear."""
    found: dict[str, None] = {}
    for row in rows:
        for name, held in row.items():
            found[name] = None
            if isinstance(held, Mapping):
                found.update(dict.fromkeys(f"{name}.{key}" for key in held))
    return list(found)


def recognise(
    rows: list[dict[str, Any]],
    where: object,
    *,
    shape: str | None = None,
    question: str | None = None,
    answer: str | None = None,
    solution: str | None = None,
    unlabelled: bool = False,
) -> Columns:
    """The columns of these rows of file `where` that hold question, answer and solution; what is given is not guessed.

    Raises:
        DataError: if a column is not there, or neither names nor content tell the shape.
    """
    there = columns_of(rows)
    if shape is not None and shape not in SHAPES:
        raise DataError(f"--shape {shape} is not a known shape{nearest(shape, SHAPES)}")
    for flag, name in (("question", question), ("answer", answer), ("solution", solution)):
        if name is not None and name not in there:
            raise DataError(f"--{flag} {name}: {where} has no such column{nearest(name, there)}")
    question = question or next((name for name in QUESTIONS if name in there), None)
    if question is None:
        raise DataError(
            f"{where} has columns {', '.join(there)}, none of them {', '.join(QUESTIONS)}: name the one with the "
            "question with --question"
        )
    shape = shape or _shape(rows, there, question, answer, solution)
    defaults = {
        "gsm8k": (("answer",), ()),
        "math": (("answer",), ("solution",)),
        "dapo": (("reward_model.ground_truth", "solution"), ("extra_info.solution",)),
        "plain": (("answer",), ()),
    }
    answers, solutions = defaults[shape]
    answer = answer or next((name for name in answers if name in there), None)
    solution = solution or next((name for name in solutions if name in there and name != answer), None)
    if answer is None and not (shape == "math" and solution) and not unlabelled:
        raise DataError(
            f"{where} has columns {', '.join(there)}: which holds the answer is not clear for shape {shape}; name it "
            "with --answer, or with --solution where it is in a \\boxed{…}; --unlabelled keeps questions without any"
        )
    if shape == "gsm8k" and solution:
        raise DataError(f"--solution {solution}: in shape gsm8k the solution is in column {answer}, before {MARK}")
    return Columns(shape, question, answer, solution)


def _shape(
    rows: list[dict[str, Any]], there: list[str], question: str, answer: str | None, solution: str | None
) -> str:
    answer_alone = "solution" in there and "answer" not in there
    if question == "prompt" and not (answer or solution) and (answer_alone or "reward_model.ground_truth" in there):
        return "dapo"
    answers = (value(row, answer or "answer") for row in rows)
    if not solution and any(MARK in held for held in answers if isinstance(held, str)):
        return "gsm8k"
    return "math" if solution or "solution" in there else "plain"


def problem(row: Mapping[str, Any], columns: Columns, unlabelled: bool = False) -> Problem:
    """Question, answer and worked solution of one row; with `unlabelled` the answer may be missing, and is "" then.

    Raises:
        Unusable: if the row has no question or no answer.
    """
    messages = _messages(value(row, columns.question), columns.question)
    try:
        return Problem(messages, *_answered(row, columns))
    except Unusable:
        if not unlabelled:
            raise
        return Problem(messages, "", None)


def _answered(row: Mapping[str, Any], columns: Columns) -> tuple[str, str | None]:
    """Answer and worked solution."""
    answer = _text(value(row, columns.answer), columns.answer) if columns.answer else ""
    solution = _text(value(row, columns.solution), columns.solution) if columns.solution else ""
    if columns.shape == "gsm8k":
        solution, answer = _split(answer, columns.answer)
    elif columns.shape == "math" and not answer:
        answer = _boxed_answer(solution, columns.solution)
    if not answer:
        raise Unusable(f"column {columns.answer} is empty" if columns.answer else "no column holds an answer")
    if not is_answer(answer):
        raise Unusable(f"{answer!r} in column {columns.answer or columns.solution} stands for no answer")
    return answer, solution or None


def _split(text: str, column: str | None) -> tuple[str, str]:
    """Worked solution and answer of a text of GSM8K, without calculator annotations and thousands separators."""
    if not text:
        raise Unusable(f"column {column} is empty")
    answer = after_hashes(text)
    if answer is None:
        raise Unusable(f"no {MARK} in column {column}")
    if not answer:
        raise Unusable(f"nothing after {MARK} in column {column}")
    return _CALCULATION.sub("", text.rpartition(MARK)[0]).strip(), _THOUSANDS.sub("", answer)


def _boxed_answer(solution: str, column: str | None) -> str:
    if not solution:
        raise Unusable(f"column {column} is empty")
    answer = last_boxed(solution)
    if answer is None:
        raise Unusable(rf"no \boxed{{…}} in column {column}")
    if not answer:
        raise Unusable(rf"the last \boxed{{…}} in column {column} is empty")
    return answer


def _messages(held: Any, column: str) -> Messages:
    """The chat messages of a question: text becomes one message of the user."""
    if not isinstance(held, list):
        text = _text(held, column)
        if not text:
            raise Unusable(f"column {column} is empty")
        return [("user", text)]
    messages = [(_part(message, "role"), _part(message, "content")) for message in held]
    if not all(role and content for role, content in messages) or "user" not in dict(messages):
        raise Unusable(f"column {column} is not a list of messages with role and content, one of them the user's")
    return messages


def _part(message: Any, key: str) -> str:
    held = message.get(key) if isinstance(message, Mapping) else None
    return _text(held, key) if isinstance(held, str) else ""


def _text(held: Any, column: str | None) -> str:
    """A text or number as text; empty if there is none."""
    if isinstance(held, str):
        try:
            held.encode()
        except UnicodeEncodeError:
            raise Unusable(f"column {column} is not valid Unicode") from None
        return held.strip()
    if held is None or (isinstance(held, float) and math.isnan(held)):
        return ""
    if isinstance(held, bool) or not isinstance(held, Number):
        raise Unusable(f"column {column} holds a {type(held).__name__}, not text or a number")
    return str(int(held)) if isinstance(held, float) and held.is_integer() else str(held)
