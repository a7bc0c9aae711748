"""SAGE with several things at once, against its rules written out once more: levels, room, retries and old hints."""

from __future__ import annotations

import json
import re

import pytest
from fakes import FakeDataset, FakeRun
from hypothesis import given, settings
from hypothesis import strategies as st
from test_sage import ROW, Worker, method, play
from test_vade import make_batch

from verl_plugins.sampling.prompt_augmentation import prompt_tokens
from verl_plugins.services import Prompt

LEVELS, ROOM = 3, 1500
MESSAGES = [
    {"role": "user", "content": "What is 1+1?"},
    {"role": "assistant", "content": "It is 2."},
    {"role": "user", "content": "And 2+2?"},
]
SHORT, LONG, TIGHT = "look closer", "look closer " * 200, "so " * 300
"""The second never fits into the prompt, the third does without a prefill."""
TEXTS = st.sampled_from([None, "", SHORT, LONG, TIGHT, "it is 4"])
GROUP = st.lists(st.booleans(), max_size=3)
FEW = settings(max_examples=80, deadline=None)


@st.composite
def hints(draw) -> dict[str, str]:
    texts = {f"level_{level}": draw(TEXTS) for level in range(1, LEVELS + 1)}
    return {name: text for name, text in texts.items() if text is not None}


def readable(payload: dict[str, str] | None) -> bool:
    return bool(payload) and any(payload.values())


def fits(text: str, prefill: str) -> bool:
    return text != LONG and not (text == TIGHT and prefill)


def leaks(texts: list[str]) -> bool:
    return any(re.search(r"\b4\b", text) for text in texts)


@FEW
@given(
    st.lists(st.one_of(st.none(), hints()), min_size=2, max_size=2),
    st.lists(GROUP, min_size=LEVELS + 1, max_size=LEVELS + 1),
    st.integers(0, LEVELS),
    st.sampled_from(["", "x" * 900]),
)
def test_escalation(answers, groups, most, prefill):
    """Levels in order, those without a text or without room left out, until a group has a right response."""
    worker = Worker([json.dumps(answer) if answer else "no" for answer in answers], groups, ROOM)
    plugin = method(max_level=most, hint_attempts=2, hint_max_tokens=50)
    row = {"raw_prompt": MESSAGES, "hint_question": "And 2+2?", "__prefill__": prefill, "hints": json.dumps({"a": 1})}
    prompt, rollouts = play(plugin, worker, **row)

    left, used, shown, too_long, extra = list(groups), 0, [], 0, 0
    final, asked = left.pop(0), [None]
    needs = bool(final) and not any(final)
    attempts = 1 if readable(answers[0]) else 2
    payload = answers[attempts - 1] if readable(answers[attempts - 1]) else {}
    for level in range(1, most + 1) if needs else ():
        text = payload.get(f"level_{level}")
        if any(final) or not text:
            continue
        if not fits(text, prefill):
            too_long += 1
            continue
        used = level
        shown.append(text)
        asked.append(text.strip())
        tried = left.pop(0)
        extra += len(tried)
        final = tried or final
    assert prompt.row["hint_used"] == used
    assert prompt.messages == MESSAGES
    assert [rollout.correct for rollout in rollouts] == final
    assert [told and told.removeprefix("And 2+2?").rpartition("\n")[2] for told in worker.asked] == asked
    logged = worker.run.metrics
    assert logged["needing_hint"] == needs
    assert len(worker.requests) == (attempts if needs and most else 0)
    for messages, _, _ in worker.requests:
        assert "And 2+2?" in messages[-1]["content"] and "1+1" not in messages[-1]["content"]
    if needs:
        assert (logged["rescued"], logged["still_unsolved"]) == (any(final), not any(final))
        assert (logged["extra_rollouts"], logged["hint_too_long"]) == (extra, too_long)
    assert logged.get("answer_leak") == (leaks(shown) if shown else None)


@FEW
@given(
    st.one_of(st.none(), hints()),
    st.one_of(st.none(), hints().filter(readable)),
    st.integers(0, LEVELS),
    st.sampled_from(["", "x" * 900]),
)
def test_one_visit(fresh, old, wanted, prefill):
    """Fresh hints if they can be read, else the last ones; without a text or room for the level, the plain prompt."""
    worker = Worker([json.dumps(fresh) if fresh else "no"], [[False, True]], ROOM)
    row = {"hint_level": wanted, "hints": json.dumps(old) if old else "", "__prefill__": prefill}
    plugin = method(variant="sage-light", hint_attempts=1, hint_max_tokens=50)
    prompt, _ = play(plugin, worker, raw_prompt=MESSAGES, hint_question="And 2+2?", **row)

    payload = (fresh if readable(fresh) else old) or {}
    text = payload.get(f"level_{wanted}") if wanted else None
    given_ = bool(text) and fits(text, prefill)
    assert prompt.row["hint_used"] == (wanted if given_ else 0)
    (told,) = worker.asked
    assert (told is not None) == given_ and (not given_ or told.endswith(text.strip()))
    logged = worker.run.metrics
    assert logged["needing_hint"] == (wanted > 0)
    if wanted:
        assert json.loads(prompt.row["hints"] or "{}") == payload, "what is kept for the next visit"
        assert logged["hint_fallback"] == (not readable(fresh) and old is not None)
        assert logged["hint_too_long"] == (bool(text) and not fits(text, prefill))
        assert logged["hint_parse_failed"] == (not readable(fresh))
    assert logged.get("answer_leak") == (leaks([text]) if given_ else None)


@pytest.mark.parametrize(("spare", "asked"), [(0, 1), (-1, 0), (40, 1), (-40, 0)])
def test_room_for_the_request_and_its_answer(spare, asked):
    """Prompt and response together hold the request and `hint_max_tokens` of answer."""
    answer, plugin = 300, method(hint_attempts=1, hint_max_tokens=300)
    texts = plugin.wording
    request = [
        {"role": "system", "content": texts["tutor"].substitute()},
        {"role": "user", "content": texts["request"].substitute(problem="2+2?", solution="2 and 2 are 4")},
    ]
    worker = Worker(["no"], [[False]])
    longest = worker.run.config.data.max_prompt_length
    needed = prompt_tokens(worker.run, request) + answer
    worker.run.config.data.max_response_length = needed - longest + spare
    play(plugin, worker)
    assert len(worker.requests) == asked
    assert worker.run.metrics["hint_request_too_long"] == (not asked)


@FEW
@given(st.lists(st.tuples(st.integers(0, LEVELS), st.integers(0, 4)), min_size=1, max_size=8))
def test_levels_of_a_step(prompts):
    """Share of prompts at each level, and the mean accuracy of those at it."""
    run = FakeRun(dataset=FakeDataset(len(prompts)))
    groups = [(number, [1.0] * right + [0.0] * (4 - right)) for number, (_, right) in enumerate(prompts)]
    batch = make_batch(*groups, hint_used=[level for level, _ in prompts for _ in range(4)])
    method().observe(run, batch)
    for level in range(LEVELS + 1):
        accuracies = [right / 4 for at, right in prompts if at == level]
        assert run.metrics[f"level_{level}"] == pytest.approx(len(accuracies) / len(prompts))
        expected = sum(accuracies) / len(accuracies) if accuracies else None
        assert run.metrics.get(f"acc_level_{level}") == pytest.approx(expected)


@pytest.mark.parametrize(("spare", "used"), [(0, 1), (-1, 2)])
def test_a_hint_may_just_fill_the_prompt(spare, used):
    plugin, worker = method(), Worker([json.dumps({"level_1": "look closer", "level_2": "look"})], [[0], [1]])
    worker.run.config.data.max_prompt_length = spare + prompt_tokens(
        worker.run, plugin._hinted(Prompt(0, ROW), "look closer")
    )
    assert play(plugin, worker)[0].row["hint_used"] == used


@pytest.mark.parametrize("most", [1, 2])
def test_from_level_1_to_the_highest_that_is_set(most):
    """Whatever other levels the policy writes hints for."""
    texts = {f"level_{level}": f"hint {level}" for level in range(LEVELS + 2)}
    worker = Worker([json.dumps(texts)], [[0]] * (LEVELS + 2))
    play(method(max_level=most), worker)
    assert [told[-6:] for told in worker.asked[1:]] == ["hint 1", "hint 2"][:most]


def test_what_is_logged_and_remembered_of_a_step():
    """Eleven prompts with 0 to 10 right responses of 10, at levels 0 to 2; a twelfth was not drawn."""
    level, run, plugin = [0] * 5 + [1] * 3 + [2] * 3, FakeRun(dataset=FakeDataset(12)), method()
    groups = [(right, [1.0] * right + [0.0] * (10 - right)) for right in range(11)]
    plugin.observe(run, make_batch(*groups, hint_used=[one for one in level for _ in range(10)]))
    fifths = dict(enumerate([1, 1, 2, 2, 2, 2, 1]))  # none right; 1; 2 and 3; 4 and 5; 6 and 7; 8 and 9; all
    assert run.metrics == pytest.approx(
        {"level_0": 5 / 11, "level_1": 3 / 11, "level_2": 3 / 11, "level_3": 0}
        | {"acc_level_0": 0.2, "acc_level_1": 0.6, "acc_level_2": 0.9}
        | {f"mean_reward_bucket_{k}": count / 11 for k, count in fifths.items()}
    )
    state = plugin.state_dict()
    assert state["level"].tolist() == [*level, -1]
    assert state["right"].tolist() == [*range(11), 0] and state["asked"].tolist() == [10] * 11 + [0]


@pytest.mark.parametrize("wanted", [0, 2])
def test_without_room_for_the_request_the_last_hints_are_taken(wanted):
    old = {"level_1": "one", "level_2": "two"}
    worker = Worker(groups=[[False]])
    solution = {"extra_info": {"solution": "so " * 9000}}
    row = {"hint_level": wanted, "hints": json.dumps(old)} | solution
    prompt, _ = play(method(variant="sage-light"), worker, **ROW | row)
    assert worker.requests == []
    assert prompt.row["hint_used"] == wanted
    assert (worker.asked[0] or "").endswith("two" if wanted else "")
    assert worker.run.metrics.get("hint_fallback") == (True if wanted else None)
