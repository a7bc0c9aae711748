"""Which responses are equivalent, against sets and chains in plain Python."""

from __future__ import annotations

import itertools
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from verl_plugins import Batch, DataError, Groups
from verl_plugins.reward.equivalence import chained, given_answers, tool_calls

FEW = settings(max_examples=60, deadline=None)
ROWS = st.lists(st.tuples(st.integers(0, 2), st.lists(st.integers(1, 5), max_size=5)), min_size=1, max_size=8)
LEAST = st.sampled_from([0.2, 1 / 3, 0.5, 0.6, 0.75, 0.8, 1.0])


def padded(rows: list[list[int]], width: int = 5, filler: int = 9) -> tuple[torch.Tensor, torch.Tensor]:
    tokens = torch.full((len(rows), width), filler)
    for place, row in enumerate(rows):
        tokens[place, : len(row)] = torch.tensor(row, dtype=torch.int64)
    return tokens, torch.tensor([[at < len(row) for at in range(width)] for row in rows])


def chains(rows: list[tuple[int, list[int]]], least: float) -> list[int]:
    """Of each row the smallest row that a chain of similar rows leads to; -1 for a row without tokens."""
    label = [place if row else -1 for place, (_, row) in enumerate(rows)]
    for _ in rows:
        for (i, (group, one)), (j, (other_group, other)) in itertools.product(enumerate(rows), repeat=2):
            if group == other_group and one and other:
                shared = len({*one} & {*other}) / len({*one} | {*other})
                if shared >= least - 1e-9:
                    label[i] = label[j] = min(label[i], label[j])
    return label


def same_parts(one: list[int], other: list[int]) -> bool:
    return all(
        (a == b) == (c == d)
        for (a, c), (b, d) in itertools.product(zip(one, other, strict=True), repeat=2)
        if a >= 0 and b >= 0
    )


class TestChained:
    @FEW
    @given(ROWS, LEAST)
    def test_against_sets(self, rows, least):
        tokens, mask = padded([row for _, row in rows])
        found = chained(tokens, mask, Groups([group for group, _ in rows]), least).tolist()
        expected = chains(rows, least)
        assert [label < 0 for label in found] == [label < 0 for label in expected]
        assert same_parts(found, expected)

    @FEW
    @given(ROWS, LEAST, st.randoms())
    def test_order_repetition_and_padding_make_no_difference(self, rows, least, random):
        order = random.sample(range(len(rows)), len(rows))
        groups = Groups([group for group, _ in rows])
        found = chained(*padded([row for _, row in rows]), groups, least).tolist()
        again = [random.sample(row, len(row)) + row[:1] for _, row in rows]
        shuffled = Groups([rows[place][0] for place in order])
        other = chained(*padded([again[place] for place in order], 7, 3), shuffled, least).tolist()
        assert same_parts([found[place] for place in order], other)

    def test_a_chain_joins_what_is_not_similar_itself(self):
        rows = [[1, 2, 3], [2, 3, 4], [3, 4, 5], [4, 5, 6], [5, 6, 7]]
        found = chained(*padded(rows), Groups([0] * 5), 0.5)
        assert len(set(found.tolist())) == 1
        assert len(set(chained(*padded(rows[:2] + rows[3:]), Groups([0] * 4), 0.5).tolist())) == 2

    def test_rows_of_other_prompts_are_others(self):
        found = chained(*padded([[1], [1], [1]]), Groups(["a", "b", "a"]), 0.5).tolist()
        assert found[0] == found[2] != found[1]

    def test_a_share_that_is_just_enough_is_enough(self):
        rows = [list(range(1, 8)), list(range(1, 11))]
        for least, joined in ((0.7, True), (0.71, False)):
            one, other = chained(*padded(rows, 10), Groups([0, 0]), least).tolist()
            assert (one == other) is joined

    def test_nobody_wrote_anything(self):
        tokens, mask = padded([[], [], []])
        assert chained(tokens, mask, Groups([0, 0, 1]), 0.8).tolist() == [-1, -1, -1]


class TestToolCalls:
    def test_order_of_keys_and_space_make_no_difference(self):
        one, other, third = tool_calls(
            [
                'Let me see. <tool_call>{"name": "add", "arguments": {"a": 1, "b": [2, 3]}}</tool_call>',
                '<tool_call>\n{"arguments":{"b":[2,3],"a":1},\n"name":"add"}\n</tool_call> And then?',
                '<tool_call>{"name": "add", "arguments": {"a": 1, "b": [3, 2]}}</tool_call>',
            ]
        )
        assert one == other != third

    def test_all_calls_count_and_their_order(self):
        one, two = (f'<tool_call>{{"name": "{name}"}}</tool_call>' for name in "fg")
        assert len({*tool_calls([one, two, one + two, two + one, one + one])}) == 5

    def test_none_is_empty_and_what_is_no_json_stands_for_itself(self):
        deep = "[" * 100_000
        texts = ["no call", "<tool_call>f(1,\n 2)</tool_call>", "<tool_call> f(1, 2) </tool_call>", "<tool_call>{}"]
        found = tool_calls([*texts, f"<tool_call>{deep}</tool_call>", f"<tool_call>{'9' * 5000}</tool_call>"])
        assert found.tolist() == ["", "f(1, 2)", "f(1, 2)", "", deep, "9" * 5000]


def answered(answers: list, cut: bool = False) -> Batch:
    n = len(answers)
    return Batch.from_tensors(
        uid=["1-1-0"] * n,
        rm_scores=torch.zeros(n, 2),
        response_mask=torch.ones(n, 2),
        responses=torch.full((n, 2), 7 if cut else 2),
        response_lengths=torch.full((n,), 2),
        answer=answers,
        budget=2,
        tokenizer=SimpleNamespace(eos_token_id=2),
    )


class TestGivenAnswers:
    def test_in_normal_form(self):
        found = given_answers(answered([r"\dfrac12", " ½", "", None, "7"]), "answer")
        assert found[0] == found[1] != found[4]
        assert found[2:4].tolist() == ["", ""]

    def test_what_was_cut_off_has_none(self):
        assert given_answers(answered(["7", "8"], cut=True), "answer").tolist() == ["", ""]
        assert given_answers(answered(["7", "8"], cut=True), "answer", cut_off=True).tolist() == ["7", "8"]

    def test_no_part(self):
        with pytest.raises(DataError, match="'final'"):
            given_answers(answered(["7"]), "final")
