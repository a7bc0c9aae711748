"""The task with a tool: questions that the prompt does not answer, conversations to learn from, tool and parser."""

from __future__ import annotations

import asyncio
import random
import re
from pathlib import Path

import pandas as pd
import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st
from verl.experimental.agent_loop.tool_parser import ToolParser
from verl.tools.schemas import OpenAIFunctionToolSchema

from verl_plugins.cpu.lookup import (
    LETTERS,
    TOOL,
    TOOLS,
    Lessons,
    LessonSettings,
    LookupSettings,
    draw,
    questions,
    reply,
    write_task,
)
from verl_plugins.cpu.lookup_tool import UNKNOWN, Lookup
from verl_plugins.cpu.model import make_tokenizer


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()


@given(seed=st.integers(0, 999), letters=st.integers(0, 3))
def test_a_question_with_its_digits_is_its_answer(seed, letters):
    question = draw(random.Random(seed), letters)
    assert len(question.digits) == letters
    assert list(question.digits) == [character for character in question.prompt if character in LETTERS]
    known = re.sub("[a-j]", lambda letter: str(question.digits[letter[0]]), question.prompt)
    assert sum(map(int, known.rstrip("=").split("+"))) == question.answer


def test_rows_differ_and_levels_are_even():
    train, val = questions(LookupSettings(train_rows=90, val_rows=30))
    assert (len(train), len(val)) == (90, 30)
    asked = [(question.prompt, tuple(question.digits.values())) for question in train + val]
    assert len(set(asked)) == 120
    assert [sum(len(question.digits) == level for question in train + val) for level in range(3)] == [40] * 3
    assert questions(LookupSettings(train_rows=90, val_rows=30)) == (train, val)


@pytest.mark.parametrize("wrong", [{"letters": 0}, {"letters": 4}, {"train_rows": 0}])
def test_settings_out_of_range(wrong):
    with pytest.raises(ValueError, match="Out of range"):
        LookupSettings(**wrong)


@pytest.mark.parametrize("wrong", [{"steps": 0}, {"lr": 0}, {"asks": 1.5}, {"exact_until": -1}])
def test_lessons_out_of_range(wrong):
    with pytest.raises(ValueError, match="must be positive|between 0 and 1"):
        LessonSettings(**wrong)


def test_the_data_hides_the_digits_from_the_prompt(tmp_path: Path):
    write_task(tmp_path, LookupSettings(train_rows=30, val_rows=6))
    rows = pd.read_parquet(tmp_path / "train.parquet")
    for row in rows.itertuples():
        given = row.extra_info["tools_kwargs"][TOOL]["create_kwargs"]["digits"]
        letters = [character for character in row.prompt[0]["content"] if character in LETTERS]
        assert [pair[0] for pair in given.split(",") if pair] == letters
        assert row.extra_info["level"] == len(letters)
    schema = yaml.safe_load((tmp_path / "tools.yaml").read_text())["tools"][0]
    assert schema["class_name"] == "verl_plugins.cpu.lookup_tool.Lookup"
    OpenAIFunctionToolSchema.model_validate(schema["tool_schema"])


def conversations(lessons: Lessons, step: int, tokenizer) -> list[tuple[str, str]]:
    """Of a batch: the whole text, and what the policy is taught to say in it."""
    ids, targets = lessons.batch(step)
    said = targets.sum(-1).roll(1, 1).bool()
    assert not said[:, 0].any()
    assert torch.equal(targets.argmax(-1)[targets.sum(-1) > 0], ids.roll(-1, 1)[targets.sum(-1) > 0])
    decode = lambda row: tokenizer.decode(row, skip_special_tokens=False).replace("<|endoftext|>", "")  # noqa: E731
    return [(decode(row), decode(row[mask])) for row, mask in zip(ids, said, strict=True)]


END = "<|im_end|>"


def test_a_teacher_that_always_asks_is_always_right(tokenizer):
    lessons = Lessons(tokenizer, LessonSettings(steps=10, batch=50), questions(LookupSettings())[1], 2)
    for whole, said in conversations(lessons, 0, tokenizer):
        question, _, rest = whole.partition("=")
        digits = dict(re.findall(rf"\?([a-j]){re.escape(END)}\n(\d)\n", rest))
        known = re.sub("[a-j]", lambda letter, digits=digits: digits[letter[0]], question)
        answer = str(sum(map(int, known.split("+"))))
        assert rest.endswith(answer + END)
        assert said == "".join(f"?{letter}{END}" for letter in digits) + answer + END


def test_a_teacher_that_never_asks_guesses(tokenizer):
    settings = LessonSettings(steps=10, batch=200, asks=0.0, exact_until=0.5)
    lessons = Lessons(tokenizer, settings, [], 2)
    later = conversations(lessons, 9, tokenizer)
    assert not any("?" in whole for whole, _ in later)
    with_letters = [(whole, said) for whole, said in later if re.search("[a-j]", whole.partition("=")[0])]
    assert len({said for _, said in with_letters}) > 10


def test_held_out_sums_are_not_taught(tokenizer):
    held_out = questions(LookupSettings())[1]
    lessons = Lessons(tokenizer, LessonSettings(steps=4, batch=400), held_out, 2)
    kept = {question.prompt for question in held_out if not question.digits}
    assert kept and not kept & {whole.partition("=")[0] + "=" for whole, _ in conversations(lessons, 0, tokenizer)}


class TestTool:
    def asked(self, digits: str, *letters: str | None) -> list[str]:
        schema = OpenAIFunctionToolSchema.model_validate(yaml.safe_load(TOOLS)["tools"][0]["tool_schema"])
        tool = Lookup({"type": "native"}, schema)

        async def talk() -> list[str]:
            name, _ = await tool.create(create_kwargs={"digits": digits})
            other, _ = await tool.create(create_kwargs={"digits": "a=9"})
            said = [(await tool.execute(name, {"letter": letter} if letter else {}))[0].text for letter in letters]
            await tool.release(name)
            await tool.release(other)
            await tool.release(other)
            return said

        return asyncio.run(talk())

    def test_it_knows_the_letters_of_its_question(self):
        assert self.asked("a=7,c=0", "a", "c") == [reply(7), reply(0)]

    @pytest.mark.parametrize("letter", ["b", "", "ab", None])
    def test_other_letters_have_no_digit(self, letter):
        assert self.asked("a=7", letter) == [UNKNOWN]
        assert self.asked("", letter) == [UNKNOWN]


@pytest.mark.parametrize(
    ("said", "letter"), [("?a", "a"), ("?cd", "c"), ("??", "?"), ("14", None), ("", None), ("?", None), ("a?b", None)]
)
def test_what_asks_for_the_tool(tokenizer, said, letter):
    parser = ToolParser.get_tool_parser(TOOL, tokenizer)
    ids = [*tokenizer(said).input_ids, tokenizer.eos_token_id]
    _, calls = asyncio.run(parser.extract_tool_calls(ids, []))
    assert [call.arguments for call in calls] == ([f'{{"letter": "{letter}"}}'] if letter else [])
