r"""What the final answer of a response is: one rule, for `data convert`, the scorer and whoever else asks.

1. Only what stands after `</think>` is read, where there is one. Thinking that never ends has no answer but a box.
2. What the response marks as final, the first of these kinds that it has, and of that kind the last:
   `<answer>…</answer>`; a box (`\boxed`, `\fbox`, `\framebox`, `\bbox`), its end found by counting braces; the line
   after `####`; what follows "the answer is", "Answer:" and the like, up to the end of the sentence; bold; code ticks.
3. Else the last expression.

An empty mark, or one that is never closed, is no answer, and an earlier one does not take its place. Boxes side by
side, or joined by "or" or "and", are one answer with several values. A question is no answer.

Text is only searched, in time linear in its length; nothing is evaluated.
"""

from __future__ import annotations

import re

_BOX = re.compile(r"\\(?:boxed|fbox|framebox|bbox)(?![A-Za-z])\s*(?:\[[^\]\n]{0,40}\]\s*){0,2}")
_BRACE = re.compile(r"\\.|[{}]", re.DOTALL)
_JOINT = re.compile(
    r"[\s$.,;&]*(?:\\[,;!: ]|\\\\|\\q?quad|\\text\s*\{\s*(?:or|and)\s*\}|\\[()\[\]])?[\s$.,;]*"
    r"(?:(?:or|and|maybe|perhaps|possibly|alternatively|or maybe|or perhaps|else)\b)?[\s$.,;]*(?:\\[()\[\]])?\s*[-−]?",
    re.IGNORECASE,
)
_WORD = (
    r"(?:(?:final|correct|right|the)\s+)*(?:answers?|ans|solution|result|value)(?:\s+(?:to|of|for)\b(?:(?!\bif\b)[^.:=\n]){1,80}?)?"
    r"|(?:correct|right|best)\s+(?:ones?|options?|choices?|answers?)(?:\s+choices?)?"
    r"|(?:endgültige\s+)?(?:antwort|lösung|ergebnis)|(?:la\s+)?(?:réponse|solution|résultat)(?:\s+finale?)?"
    r"|(?:la\s+)?(?:respuesta|solución)(?:\s+final)?|(?:la\s+)?risposta(?:\s+finale)?|(?:a\s+)?resposta(?:\s+final)?"
    r"|(?:итоговый\s+)?ответ|відповідь|odpowiedź|odpověď|antwoord|svar|cevap|jawaban|đáp án|الجواب|الإجابة|उत्तर"
)
_SIGN = r"答案|答え|答|解答?|결과|정답|답"
"""Words of scripts that put no space between words."""
_IS = (
    r"\s*(?:\([^()\n]{0,40}\)\s*)?(?:\"\s*)?(?::\s*|：\s*|=\s*|\b(?:is|are)\b(?:\s+that\b)?:?|\b(?:equals|was|would be"
    r"|should be|must be|will be|becomes|comes to|comes out (?:to be|as)|lautet|ist|est|es|è|é)\b:?"
    r"|是|为|為|は|—|–(?=\s))"
)
_SAYS = re.compile(rf"(?:(?<![^\W\d_])(?:{_WORD})|{_SIGN}){_IS}|\bI (?:choose|pick|select|go with)\b:?", re.IGNORECASE)
_HEADING = re.compile(r"(?m)^(?:#{1,6}\s*)?(?:(?:final|the)\s+)*(?:answer|result)\s*:?[ \t]*$", re.IGNORECASE)
_FILLER = re.compile(
    r"(?:\s|[:=]|(?:therefore|thus|then|hence|so|just|simply|now|clearly|indeed|equal to|exactly"
    r"|approximately|about|roughly|around|given by|also|donc"
    r"|somit|daher|as follows|choice|option|the (?:option|choice|letter|number|value)|either)\b|[,：])*",
    re.IGNORECASE,
)
_SENTENCE_END = re.compile(r"[.!?](?=[\s\"')\]*_`]|$)|[。！？\n]|\s\((?=[A-Za-z]{2})|\s[—–]\s")
_CLAUSE = re.compile(
    r",\s*as\b.*|(?:,|\s)\s*(?:since|because|which|as (?:we|the|it)|where|so that|so|as required|as desired|as claimed"
    r"|i hope|when|if|making|meaning|after|by|from|for a total|in total|altogether|rather than"
    r"|instead of|not|of (?:the|a|an|all|his|her|their|its))\b.*",
    re.IGNORECASE | re.DOTALL,
)
_BOLD = re.compile(r"\*\*\s*([^*\n]{1,200}?)\s*\*\*|__([^_\n]{1,200}?)__|<b>([^<\n]{1,200})</b>")
_FENCED = re.compile(r"```[a-z]*[ \t]*\n?([^`]{1,300}?)\n?[ \t]*```")
_TICKS = re.compile(r"`([^`\n]{1,200})`")
_MATH = re.compile(
    r"\$\$(.{1,600}?)\$\$|\\\[(.{1,600}?)\\\]|\\\((.{1,600}?)\\\)|(?<![\\$])\$(?![\s\d.,]*\s[a-z]{2})([^$\n]{1,400}?)(?<!\\)\$",
    re.DOTALL,
)
_ATOM = (
    r"(?:\\(?:frac|dfrac|tfrac|binom)\s*\{[^{}]*(?:\{[^{}]*\}[^{}]*)*\}\s*\{[^{}]*(?:\{[^{}]*\}[^{}]*)*\}"
    r"|\\[A-Za-z]+(?:\[[^\]]*\])?(?:\{[^{}]*(?:\{[^{}]*\}[^{}]*)*\})?|\\[$%,;! {}]|\d+(?:[.,]\d+)*|\.\d+"
    r"|[√∛π∞°%½⅓⅔¼¾⅕⅖⅗⅘⅙⅚⅛⅜⅝⅞²³¹⁰⁴-⁹⁻€£¥$]|(?<![^\W\d_])[a-zA-Z](?![^\W\d_])|[a-z]{1,3}(?=\()|[()\[\]{}|!])"
)
_OPERATOR = r"(?:\s*(?:\*\*|:(?=\d)|[-+*/^_=<>−×·⋅÷≤≥≠≈±,]|\\(?:times|cdot|pm|le|ge|leq|geq|ne|neq|approx|div)\b)\s*)"
_EXPRESSION = re.compile(
    rf"(?:[-−+±]\s*|(?:minus|negative)\s+)?{_ATOM}(?:{_OPERATOR}*(?:(?<=\d)\s(?=\d+/)|\s(?=[\\√π]))?{_ATOM}){{0,80}}"
)
_VALUE = re.compile(r"\d|\\(?:frac|sqrt|pi|infty|emptyset|varnothing|mathbb|binom|log|ln|sin|cos|tan)|[√π∞½¼¾⅓⅔]")
_ASKS = re.compile(
    r"\s*(?:find|determine|compute|calculate|evaluate|solve|what|how|which|when|where|who|prove|show that|express"
    r"|simplify)\b",
    re.IGNORECASE,
)
_UNIT = re.compile(
    r"\s*(?:\\?%|°|percent\b|degrees?\b|(?:square |cubic )?"
    r"(?:mm|cm|dm|km|m|g|kg|mg|ml|l|s|h|min|ft|in|inches|inch|feet|foot"
    r"|miles?|yards?|met(?:er|re)s?|seconds?|minutes?|hours?|days?|weeks?|months?|years?|dollars?|cents?|euros?|pounds?|units?)\b"
    r"(?:\^?[23²³])?)"
)
_UNSURE = re.compile(
    r"\b(?:could be|might be|may be|maybe|perhaps|possibly|not sure|i guess|torn between|either|neither)\b",
    re.IGNORECASE,
)
_CHOICE = re.compile(r"(?:\([A-J]\)|[A-J][.):])\s")
_UNSPACED = re.compile("[\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]")
_MONTH = re.compile("jan|feb|mar|apr|may|jun|jul|aug|sep|oct|nov|dec", re.IGNORECASE)
LAST = 2000
"""Characters from the end in which marks other than boxes and tags are looked for."""
MOST_BOXES = 100
"""Boxes side by side that are read together."""
_SENTENCE = re.compile(rf"{_SAYS.pattern}|[^\W\d_]{{2,}} (?:is|are|equals) ", re.IGNORECASE)
_YES = re.compile(r"(yes|no|true|false)\b[,.;:!]", re.IGNORECASE)
_WORDY = 8
"""More words than this are a sentence, in which the answer is an expression."""


def final_answer(text: str, last: int = LAST) -> str | None:
    """The final answer as the response writes it, None where there is none.

    `last` is how many characters from the end are searched for marks other than boxes and tags.
    """
    marked, answer = marked_answer(text, last)
    return answer if marked else _last_expression(_after_thinking(text)[0][-last:].strip())


def marked_answer(text: str, last: int = LAST) -> tuple[bool, str | None]:
    """Whether the response marks something as final, and what: None where the mark is empty or never closed."""
    text, thinking = _after_thinking(text)
    tag, content = in_tags(text)
    if tag:
        return True, _inside(content)
    boxes = last_boxes(text)
    if boxes is not None:
        return True, ", ".join(boxes) if all(boxes) else None
    if thinking:
        return True, None
    text = text[-last:].strip()
    if (after := after_hashes(text)) is not None:
        return True, after or None
    for find in (_said, _bold, _code):
        found, answer = find(text)
        if found:
            return True, answer
    return False, None


def after_thinking(text: str) -> str:
    """The response without its thinking; "" if that never ends."""
    rest, thinking = _after_thinking(text)
    return "" if thinking else rest


def last_boxed(text: str) -> str | None:
    r"""Content of the last box, of `\boxed 5` as well; None if there is none or it never ends."""
    starts = list(_BOX.finditer(text))
    return _content(text, starts[-1].end())[0] if starts else None


def last_boxes(text: str) -> list[str] | None:
    """Contents of the last box and of those side by side with it, [""] if it never ends; None without a box."""
    starts = list(_BOX.finditer(text))
    if not starts:
        return None
    last = starts.pop()
    content, _ = _content(text, last.end())
    if not content:
        return [""]
    found, begin = [content], last.start()
    while starts and len(found) < MOST_BOXES:
        other = starts.pop()
        content, end = _content(text, other.end())
        if content is None or end > begin or not _JOINT.fullmatch(text, end, min(begin, end + 60)) or begin - end > 60:
            break
        found.append(content)
        begin = other.start()
    return list(dict.fromkeys(reversed(found)))


def after_hashes(text: str) -> str | None:
    """What stands in the line after the last `####`; None where there is no such mark (a heading is none)."""
    _, mark, rest = text.rpartition("####")
    if not mark or rest.startswith("#"):
        return None
    line, _, more = rest.strip(" \t").partition("\n")
    said = _SAYS.match(line.strip(" *"))
    line = (line.strip(" *")[said.end() :] if said else line).strip(" \t*:")
    heading = len(line.split()) > 1 and line[:1].isalpha() and more.strip()
    return None if heading or (said and not line) else line.strip()


def _content(text: str, start: int) -> tuple[str | None, int]:
    """What a box holds and where it ends; None if it never ends."""
    if not text.startswith("{", start):
        end = re.compile(r"\\[A-Za-z]+|[^$\s\\]*").match(text, start).end()
        return text[start:end].rstrip(".,;"), end
    depth = 0
    for match in _BRACE.finditer(text, start):
        depth += {"{": 1, "}": -1}.get(match[0], 0)
        if depth == 0:
            return text[start + 1 : match.start()].strip(), match.end()
    return None, len(text)


def _after_thinking(text: str) -> tuple[str, bool]:
    """What follows the thinking, and whether the thinking never ended."""
    _, end, after = text.rpartition("</think>")
    return (after, False) if end else (text, "<think>" in text)


def in_tags(text: str) -> tuple[bool, str]:
    """Whether there is an `<answer>`, and what is in the last one, "" if it never ends."""
    _, tag, after = text.rpartition("<answer>")
    content, end, _ = after.partition("</answer>")
    return bool(tag), content.strip() if tag and end else ""


def _inside(content: str) -> str | None:
    """The answer in `<answer>` tags: what is marked in them, or all of it."""
    boxes = last_boxes(content)
    if boxes is not None:
        return ", ".join(boxes) if all(boxes) else None
    if len(content.split()) <= _WORDY and "\n" not in content and not _SENTENCE.search(content):
        return content.strip("*` ") or None
    return final_answer(content.replace("<answer>", " "))


def _said(text: str) -> tuple[bool, str | None]:
    """What follows the last "the answer is"."""
    plain = re.sub(r"\*\*|__(?=\S)|(?<=\S)__", "", text)
    plain = _HEADING.sub("Answer:", plain)
    match = None
    for found in _SAYS.finditer(plain):
        if not _ASKS.match(plain, _start_of_sentence(plain, found.start())):
            match = found
    if match is None:
        return False, None
    if re.search(r"\b(?:or|maybe|perhaps)\s*$", plain[: match.start()], re.IGNORECASE):
        return True, None
    rest = plain[match.end() :]
    rest = rest[_FILLER.match(rest).end() :]
    return True, _of_sentence(rest)


def _start_of_sentence(text: str, place: int) -> int:
    return max(text.rfind(sign, 0, place) for sign in ("\n", ". ", "! ", "? ", ", ")) + 1


def _of_sentence(rest: str) -> str | None:
    """The answer at the beginning of a text, up to the end of its sentence."""
    rest = rest.lstrip()
    if rest.startswith(("$$", "\\[", "```")):
        close = {"$$": "$$", "\\[": "\\]", "```": "```"}[rest[:3] if rest[:3] == "```" else rest[:2]]
        inner, _, _ = rest[len(close) :].partition(close)
        return inner.strip() or None
    end = _end_of_sentence(rest)
    sentence, stop = rest[:end].strip(), rest[end : end + 1]
    if said := _YES.match(sentence):
        return said[1]
    if stop == "?" or not sentence:
        return None
    short = _CLAUSE.sub("", sentence).strip(" ,;*`\"'}") if not sentence.startswith("{") else sentence
    short = re.sub("(?:です|となります|になります|である|입니다|이다)$", "", short)
    short = short + "}" * max(0, short.count("{") - short.count("}"))
    if len(re.findall(r"[^\W\d_]{2,}", re.sub(r"\\[A-Za-z]+", "", short))) <= _WORDY and short:
        return short
    return _last_in(sentence)


def _end_of_sentence(text: str) -> int:
    """Where the first sentence ends; not inside dollars."""
    covered = [match.span() for match in _MATH.finditer(text)]
    for match in _SENTENCE_END.finditer(text):
        place = match.start()
        if any(start < place < end - 1 for start, end in covered):
            continue
        if (
            re.search(r"\b[ap]\.m$|\b[ap]$|(?:^|\s)[A-J]$|\bDr$|\bSt$", text[:place])
            and match[0] == "."
            and re.match(r"\s*(?:m\.|[A-Za-z\d\\$(-])", text[place + 1 :])
        ):
            continue
        return place
    return len(text)


def _bold(text: str) -> tuple[bool, str | None]:
    """The last bold text that can be an answer: a heading or a remark cannot."""
    found = [match for match in _BOLD.finditer(text) if not text.startswith((":", " :"), match.end())]
    return _marked(text, [match for match in found if not _inner(match).endswith(":")])


def _code(text: str) -> tuple[bool, str | None]:
    """The last code between ticks that is one line."""
    found = [*_FENCED.finditer(text)]
    covered = [match.span() for match in found]
    inline = (match for match in _TICKS.finditer(text) if not any(a <= match.start() < b for a, b in covered))
    found = [match for match in found if "\n" not in _inner(match)]
    return _marked(text, sorted([*found, *inline], key=lambda match: match.start()))


def _inner(match: re.Match) -> str:
    return next(filter(None, match.groups()), "").strip()


def _marked(text: str, found: list[re.Match]) -> tuple[bool, str | None]:
    """The last of the marks that is short enough for an answer, with those that "or" joins to it."""
    can_be = [(match, _LABEL.sub("", _inner(match))) for match in found if not _STEP.match(_inner(match))]
    can_be = [(match, item.strip("*` ").rstrip(".")) for match, item in can_be if item and len(item.split()) <= 5]
    if not can_be:
        return False, None
    match, answer = can_be.pop()
    while can_be and re.fullmatch(r"\s*,?\s*(?:or|and)\s*|\s*,\s*", text[can_be[-1][0].end() : match.start()]):
        match, item = can_be.pop()
        answer = f"{item}, {answer}"
    return True, answer


_LABEL = re.compile(r"[^\W\d_][^\W\d_][\w ]{0,30}:\s*(?=\S)")
_STEP = re.compile(r"(?:step|part|case|note|verification|check|example|problem|question)\b", re.IGNORECASE)


def _last_expression(text: str) -> str | None:
    """A text that is nothing but an answer, or the last expression of a longer one."""
    text = text[_FILLER.match(text).end() :].strip()
    words = re.findall(r"[^\W\d_]{2,}", re.sub(r"\\[A-Za-z]+", "", text))
    if said := _YES.match(text):
        return said[1]
    if _CHOICE.match(text) and len(words) <= 3 and "\n" not in text:
        return text
    alone = len(_sentences(text)) == 1 and not text.rstrip("$*) ").endswith("?") and not _UNSPACED.search(text)
    if alone and words:
        opens_with_words = re.match(r"[^\W\d_]{2,}", text) and re.search(r"\d|\$", text) and not _MONTH.match(text)
        alone = len(text.split()) <= 3 and not opens_with_words
    return text.rstrip(".") or None if alone else _last_in(text)


def _last_in(text: str) -> str | None:
    """The last expression; with the one before it where "and" or "or" joins them. None in a question."""
    for sentence in reversed(_sentences(text)):
        found = _expressions(sentence)
        if (
            sentence.rstrip().endswith(("?", "？"))
            or (found and _UNSURE.search(sentence))
            or (found and _ASKS.match(sentence) and "=" in found[-1][2])
        ):
            return None
        if found:
            last = found.pop()
            answer = last[2]
            computed = "=" in answer and not re.match(r"[a-zA-Z]\w?\s*=", answer)
            while (
                found
                and not computed
                and re.fullmatch(r"[,\s]*(?:and|or)\s+|\s*,\s*", sentence[found[-1][1] : last[0]])
            ):
                last = found.pop()
                answer = f"{last[2]}, {answer}"
            return answer
    return None


def _sentences(text: str) -> list[str]:
    parts, start = [], 0
    for match in re.finditer(r"[.!?](?=\s|$)|[。！？\n]", text):
        parts.append(text[start : match.end()].strip())
        start = match.end()
    return [part for part in [*parts, text[start:].strip()] if part]


def _expressions(sentence: str) -> list[tuple[int, int, str]]:
    """Start, end and text of each expression, with a unit right after it."""
    found: list[tuple[int, int, str]] = []
    math = [(match.start(), match.end(), next(filter(None, match.groups()))) for match in _MATH.finditer(sentence)]
    masked = list(sentence)
    for start, end, _ in math:
        masked[start:end] = "\n" * (end - start)
    plain = "".join(masked)
    for match in _EXPRESSION.finditer(plain):
        text = match[0].strip(" ,=:+*/(" if match[0].count("(") > match[0].count(")") else " ,=:+*/")
        if _VALUE.search(text):
            found.append((match.start(), match.end(), text))
    found = [(start, end, text.strip()) for start, end, text in sorted(found + math) if text.strip()]
    return [
        (start, end + len(unit[0]), text + unit[0]) if (unit := _UNIT.match(sentence, end)) else (start, end, text)
        for start, end, text in found
    ]
