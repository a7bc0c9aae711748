"""The stores of answers and of rows: what stays, what is picked, and that a checkpoint changes nothing."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from verl_plugins import Batch, StateError
from verl_plugins.replay import Entry, ReplayStore, RowStore, StoredRow, chances
from verl_plugins.tokens import row_number

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


KINDS = ("gain", "depth")


def rows_of(step: int, sizes: list[tuple[int, int, int]]) -> Batch:
    """Rows of one step: (prompt, tokens of context, tokens) each."""
    width, room = max(n for *_, n in sizes), max(n for _, n, _ in sizes)
    lengths, prompts = torch.tensor([n for *_, n in sizes]), torch.tensor([n for _, n, _ in sizes])
    mask = torch.arange(width) < lengths[:, None]
    return Batch.from_tensors(
        uid=[f"{prompt}-{step}-{place}" for place, (prompt, *_) in enumerate(sizes)],
        session=[0] * len(sizes),
        response_mask=mask,
        rm_scores=torch.nn.functional.one_hot(lengths - 1, width) * (0.5 + torch.arange(len(sizes)))[:, None],
        responses=(100 * step + torch.arange(len(sizes))[:, None]) * mask,
        response_lengths=lengths,
        prompts=(7 * step + torch.arange(room)).expand(len(sizes), room) * (torch.arange(room) < prompts[:, None]),
        prompt_lengths=prompts,
        acc=torch.arange(len(sizes)) % 2,
        truncated=torch.arange(len(sizes)) % 3 == 0,
        offset=torch.arange(len(sizes)),
    )


SIZES = st.lists(st.tuples(st.integers(0, 3), st.integers(1, 3), st.integers(1, 4)), min_size=1, max_size=5)


class Waiting(RuleBasedStateMachine):
    """Against a list of what was added."""

    @initialize()
    def start(self):
        self.store, self.step = RowStore(KINDS), 0
        self.model: list[dict] = []

    @rule(sizes=SIZES, data=st.data())
    def add(self, sizes, data):
        self.step += 1
        batch = rows_of(self.step, sizes)
        rows = data.draw(st.permutations(range(len(sizes))))[: data.draw(st.integers(0, len(sizes)))]
        logs = [-torch.arange(1, sizes[row][2] + 1) / 8 for row in rows]
        gains = {name: np.array([row + part for row in rows], float) for part, name in enumerate(KINDS)}
        self.store.add(batch, np.array(rows, int), self.step, logs, gains)
        for row in sorted(rows, key=lambda row: batch.keys[row]):
            prompt, m, n = sizes[row]
            self.model.append(
                {
                    "uid": f"{prompt}-{self.step}-{row}",
                    "step": self.step,
                    "context": [7 * self.step + place for place in range(m)],
                    "offset": row,
                    "response": [100 * self.step + row] * n,
                    "old_log_probs": [-place / 8 for place in range(1, n + 1)],
                    "reward": row + 0.5,
                    "correct": row % 2 == 1,
                    "truncated": row % 3 == 0,
                    "columns": {"gain": row, "depth": row + 1},
                }
            )

    @rule(age=st.integers(0, 3))
    def forget(self, age):
        stale = [row for row in self.model if row["step"] < self.step - age]
        assert self.store.forget(self.step - age) == len(stale)
        self.model = [row for row in self.model if row not in stale]

    @rule(data=st.data())
    def take(self, data):
        flags = [data.draw(st.booleans()) for _ in self.model]
        taken = self.store.take(np.array(flags, bool))
        assert [as_lists(row) for row in taken] == [row for row, gone in zip(self.model, flags, strict=True) if gone]
        self.model = [row for row, gone in zip(self.model, flags, strict=True) if not gone]

    @rule()
    def restart(self):
        other = RowStore(KINDS)
        other.load_state_dict(self.store.state_dict())
        self.store = other

    @invariant()
    def agrees(self):
        assert len(self.store) == len(self.model)
        facts = self.store.facts
        assert facts["prompt_id"].tolist() == [int(row["uid"].split("-")[0]) for row in self.model]
        assert facts["row"].tolist() == [row_number(f"{row['uid']}_0_0") for row in self.model]


def as_lists(row: StoredRow) -> dict:
    return {name: value.tolist() if isinstance(value, np.ndarray) else value for name, value in vars(row).items()}


TestWaiting = Waiting.TestCase
TestWaiting.settings = settings(max_examples=40, stateful_step_count=12, deadline=None)


def test_what_is_kept_is_a_copy():
    store, batch = RowStore(), rows_of(1, [(0, 2, 3)])
    store.add(batch, np.array([0]), 1, [torch.zeros(3)], {})
    batch.responses.zero_()
    (row,) = store.take(np.array([True]))
    assert row.response.tolist() == [100] * 3 and row.response.dtype == row.context.dtype == np.int32


@pytest.mark.parametrize(
    ("part", "kept", "told"),
    [
        ("response", 2, "2 values of response are saved, and 3 belong to 1 of its 1 rows"),
        ("old_log_probs", 2, "2 values of old_log_probs are saved, and 3 belong to 1 of its 1 rows"),
        ("context", 1, "1 values of context are saved, and 2 belong to 1 of its 1 rows"),
        ("context_length", 0, "2 values of context are saved, and 0 belong to 0 of its 1 rows"),
        ("uid", 0, "0 values of uid are saved for 1 rows"),
        ("gain", 0, "0 values of gain are saved for 1 rows"),
    ],
)
def test_damaged_rows_are_refused(part, kept, told):
    store = RowStore(KINDS)
    store.add(rows_of(1, [(0, 2, 3)]), np.array([0]), 1, [torch.zeros(3)], {name: np.zeros(1) for name in KINDS})
    state = store.state_dict()
    state[part] = state[part][:kept]
    with pytest.raises(StateError, match=told):
        RowStore(KINDS).load_state_dict(state)


class TestChances:
    @settings(max_examples=50, deadline=None)
    @given(st.lists(st.integers(0, 2**63 - 1), unique=True, max_size=20), st.integers(0, 2**63 - 1))
    def test_of_a_row_whatever_stands_beside_it(self, rows, salt):
        whole = chances(np.array(rows, np.int64), salt)
        assert ((whole >= 0) & (whole < 1)).all()
        assert [chances(np.array([row]), salt)[0] for row in rows] == whole.tolist()
        assert chances(np.array(rows[::-1], np.int64), salt).tolist() == whole.tolist()[::-1]

    def test_even_and_apart(self):
        rows = np.arange(1, 20001)
        one, other = chances(rows, 5), chances(rows, 6)
        np.testing.assert_allclose(np.histogram(one, 10, (0, 1))[0] / len(rows), 0.1, atol=0.01)
        assert abs(np.corrcoef(one, other)[0, 1]) < 0.02 and abs(np.corrcoef(one[1:], one[:-1])[0, 1]) < 0.02
        assert len(set(one)) == len(rows)
