"""The task with two roles: questions, lessons that say what the loop asks, and the loop itself."""

from __future__ import annotations

import asyncio
from pathlib import Path
from types import SimpleNamespace

import pandas as pd
import pytest
import torch
import yaml
from verl.experimental.agent_loop.single_turn_agent_loop import SingleTurnAgentLoop

from verl_plugins.cpu.model import make_tokenizer
from verl_plugins.cpu.roles import LOOP, Lessons, LessonSettings, RolesSettings, questions, write_task
from verl_plugins.cpu.roles_loop import Relay, handed_on, total_of

SMALL = RolesSettings(train_rows=30, val_rows=10)


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()


def test_rows_differ_and_the_seed_decides():
    train, val = questions(SMALL)
    assert (len(train), len(val), len({*train, *val})) == (30, 10, 40)
    assert questions(SMALL) == (train, val) != questions(RolesSettings(30, 10, seed=1))


@pytest.mark.parametrize("wrong", [{"train_rows": 0}, {"val_rows": 0}, {"train_rows": 1000}])
def test_settings_out_of_range(wrong):
    with pytest.raises(ValueError, match="Out of range"):
        RolesSettings(**wrong)


@pytest.mark.parametrize("wrong", [{"steps": 0}, {"lr": 0}, {"right": 1.5}, {"noted": -1}, {"exact_until": 2}])
def test_lessons_out_of_range(wrong):
    with pytest.raises(ValueError, match="must be positive|between 0 and 1"):
        LessonSettings(**wrong)


def test_the_data_is_in_verls_schema(tmp_path: Path):
    write_task(tmp_path, SMALL)
    rows = pd.read_parquet(tmp_path / "train.parquet")
    for row in rows.itertuples():
        system, user = row.prompt
        assert (system["role"], system["content"], user["role"]) == ("system", "plan", "user")
        assert total_of(user["content"]) == int(row.reward_model["ground_truth"])
    (loop,) = yaml.safe_load((tmp_path / "loops.yaml").read_text())
    assert loop == {"name": LOOP, "_target_": f"{Relay.__module__}.{Relay.__qualname__}"}


def lessons(tokenizer, step: int, **settings) -> list[tuple[str, str]]:
    """Prompts and answers of a batch."""
    made = Lessons(tokenizer, LessonSettings(batch=200, **settings), SMALL)
    ids, targets = made.batch(step)
    assert targets.shape == (*ids.shape, len(tokenizer))
    said = targets.any(-1)
    found = []
    for row, mask in zip(ids, said, strict=True):
        first, last = int(mask.nonzero()[0]) + 1, int(mask.nonzero()[-1]) + 1
        assert torch.equal(targets[len(found)][mask].argmax(-1), row[first : last + 1])
        assert row[last] == tokenizer.eos_token_id
        found.append((tokenizer.decode(row[:first]), tokenizer.decode(row[first:last])))
    return found


def test_at_first_the_teacher_is_right(tokenizer):
    words = {"plan": 0, "solve": 0}
    held_out = {"+".join(map(str, terms)) + "=" for terms in questions(SMALL)[1]}
    for prompt, answer in lessons(tokenizer, 0, noted=0.0):
        word = "plan" if prompt.startswith("plan") else "solve"
        words[word] += 1
        question = prompt.removeprefix(word)
        assert question not in held_out
        if word == "plan":
            assert total_of(answer) == total_of(question) and answer.count("+") == 1
        else:
            assert answer == str(total_of(question))
    assert min(words.values()) > 60


def test_later_it_is_right_as_often_as_it_should(tokenizer):
    found = lessons(tokenizer, 500, noted=0.0, right=0.6)
    right = [total_of(answer + "=") == total_of(prompt) for prompt, answer in ((p, a.rstrip("=")) for p, a in found)]
    assert 0.5 < sum(right) / len(right) < 0.7


def test_notes_stand_before_the_question(tokenizer):
    found = [prompt for prompt, _ in lessons(tokenizer, 0, noted=1.0)]
    for prompt in found:
        assert prompt[prompt.rfind("\n") :] or prompt.rstrip().endswith("=")
        assert prompt.endswith("=") and ("[" in prompt or "<" in prompt)
    assert {"[", "<"} <= {character for prompt in found for character in prompt}


@pytest.mark.parametrize(
    ("text", "total"), [("3+4+9=", 16), ("<topic_07>\n12+9=", 21), ("5=", 5), ("5", None), ("", None)]
)
def test_totals(text: str, total: int | None):
    assert total_of(text) == total


def test_the_solver_sees_the_plan_and_what_plugins_wrote():
    asked = [
        {"role": "system", "content": "plan\n[explore=high step=1/10]"},
        {"role": "user", "content": "<topic_07>\n3+4+9="},
    ]
    assert handed_on(asked, "7+9=") == [
        {"role": "system", "content": "solve\n[explore=high step=1/10]"},
        {"role": "user", "content": "<topic_07>\n7+9="},
    ]
    assert handed_on(asked, r"\1")[1]["content"] == "<topic_07>\n\\1"


@pytest.mark.parametrize(
    ("plan", "answer", "decisions"),
    [("7+9=", "16", [1, 1]), ("8+9=", "17", [0, 1]), ("7+9=", "17", [1, 0]), ("none", "16", [0, 0])],
)
def test_a_session_has_two_outputs_with_a_role_each(plan, answer, decisions, monkeypatch, tokenizer):
    heard = []

    async def run(self, params, priority=0, **columns):
        heard.append((params, columns["raw_prompt"]))
        ids = tokenizer((plan, answer)[len(heard) - 1]).input_ids
        return SimpleNamespace(response_ids=[*ids, tokenizer.eos_token_id], extra_fields={"turn_scores": []})

    monkeypatch.setattr(SingleTurnAgentLoop, "run", run)
    loop = object.__new__(Relay)
    loop.tokenizer = tokenizer
    asked = [{"role": "system", "content": "plan"}, {"role": "user", "content": "3+4+9="}]
    outputs = asyncio.run(loop.run({"seed": 5, "temperature": 1.0}, raw_prompt=asked, session_id=1))
    assert [output.extra_fields["role"] for output in outputs] == ["planner", "solver"]
    assert [output.extra_fields["decision"] for output in outputs] == decisions
    assert [params for params, _ in heard] == [{"seed": 5, "temperature": 1.0}, {"seed": 6, "temperature": 1.0}]
    assert heard[1][1][1]["content"] == plan
