"""The store of answers: what stays, what is picked, and that a checkpoint changes nothing."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from verl_plugins import StateError
from verl_plugins.replay import Entry, ReplayStore

PROMPTS = 4


def entry(number: int) -> Entry:
    """One that can be told from all others."""
    size = 1 + number % 3
    return Entry(np.full(size, number, np.int32), np.full(size, -number / 8, np.float32))


class Storing(RuleBasedStateMachine):
    """Against lists per prompt and outcome."""

    @initialize(capacity=st.integers(1, 3))
    def start(self, capacity):
        self.store, self.capacity = ReplayStore(capacity), capacity
        self.model: dict[tuple[int, bool], list[tuple[int, int]]] = {}
        self.step = self.stored = 0

    @rule(answers=st.lists(st.tuples(st.integers(0, PROMPTS - 1), st.booleans()), max_size=8))
    def add(self, answers):
        self.step += 1
        entries = [entry(self.stored + place) for place in range(len(answers))]
        prompts, correct = (
            np.array([answer[part] for answer in answers], dtype) for part, dtype in ((0, int), (1, bool))
        )
        self.store.add(self.step, prompts, correct, prompts + 0.5, entries)
        for answer in answers:
            kept = self.model.setdefault(answer, [])
            kept.append((self.stored, self.step))
            del kept[: -self.capacity]
            self.stored += 1

    @rule()
    def restart(self):
        other = ReplayStore(self.capacity)
        other.load_state_dict(self.store.state_dict())
        self.store = other

    @rule(wishes=st.lists(st.tuples(st.integers(0, PROMPTS - 1), st.booleans(), st.integers(0, 3)), max_size=5))
    def pick_newest(self, wishes):
        prompts, correct, limit = (
            (np.array(part) for part in zip(*wishes, strict=True)) if wishes else [np.zeros(0)] * 3
        )
        places, entries = self.store.pick(prompts, correct, limit)
        numbers = self.store.facts["number"][entries]
        expected = [
            (place, number)
            for place, (prompt, right, most) in enumerate(wishes)
            for number, _ in self.model.get((prompt, right), [])[::-1][:most]
        ]
        assert list(zip(places.tolist(), numbers.tolist(), strict=True)) == expected

    @rule(prompt=st.integers(0, PROMPTS - 1), right=st.booleans(), limit=st.integers(0, 4), seed=st.integers(0, 9))
    def pick_at_random(self, prompt, right, limit, seed):
        wish = (np.array([prompt]), np.array([right]), np.array([limit]))
        _, entries = self.store.pick(*wish, np.random.default_rng(seed))
        numbers = self.store.facts["number"][entries]
        known = {number for number, _ in self.model.get((prompt, right), [])}
        assert len(numbers) == min(limit, len(known)) and set(numbers.tolist()) <= known
        assert entries.tolist() == self.store.pick(*wish, np.random.default_rng(seed))[1].tolist()

    @invariant()
    def agrees(self):
        kept = {number: (*key, step) for key, entries in self.model.items() for number, step in entries}
        assert self.store.facts["number"].tolist() == sorted(kept)
        for number in set(range(self.stored)) - set(kept):
            with pytest.raises(KeyError):  # no memory is held for it
                self.store[number]
        facts = self.store.facts
        for place, number in enumerate(sorted(kept)):
            prompt, right, step = kept[number]
            fact = {name: values[place] for name, values in facts.items()}
            assert (fact["prompt_id"], fact["correct"], fact["step"], fact["reward"]) == (
                prompt,
                right,
                step,
                prompt + 0.5,
            )
            np.testing.assert_array_equal(self.store[number].response, entry(number).response)
            np.testing.assert_array_equal(self.store[number].log_probs, entry(number).log_probs)


TestStoring = Storing.TestCase
TestStoring.settings = settings(max_examples=40, stateful_step_count=12, deadline=None)


def test_a_random_pick_takes_every_entry_equally_often():
    store = ReplayStore(4)
    store.add(1, np.zeros(4, int), np.ones(4, bool), np.ones(4), [entry(number) for number in range(4)])
    rng, one = np.random.default_rng(0), (np.array([0]), np.array([True]), np.array([1]))
    counts = np.bincount([store.pick(*one, rng)[1][0] for _ in range(2000)], minlength=4)
    np.testing.assert_allclose(counts / 2000, 0.25, atol=0.04)


def test_numbers_go_on_after_a_restart():
    store, other = ReplayStore(1), ReplayStore(1)
    for number in range(3):
        store.add(number, np.array([0]), np.array([True]), np.array([1.0]), [entry(number)])
    other.load_state_dict(store.state_dict())
    other.add(3, np.array([0]), np.array([False]), np.array([0.0]), [entry(3)])
    assert other.facts["number"].tolist() == [2, 3] and other.facts["correct"].tolist() == [True, False]


@pytest.mark.parametrize(
    ("part", "kept", "told"),
    [
        ("tokens", 2, "2 tokens and 3 log-probs are saved, 3 belong to its 1 responses"),
        ("log_probs", 2, "3 tokens and 2 log-probs are saved, 3 belong to its 1 responses"),
        ("length", 0, "3 tokens and 3 log-probs are saved, 0 belong to its 0 responses"),
    ],
)
def test_a_damaged_state_is_refused(part, kept, told):
    store = ReplayStore(2)
    store.add(1, np.array([0]), np.array([True]), np.array([1.0]), [entry(2)])
    state = store.state_dict()
    state[part] = state[part][:kept]
    with pytest.raises(StateError, match=told):
        ReplayStore(2).load_state_dict(state)
