"""EVOL-RL: who is compared with whom, and which reward that gives."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from fakes import FakeRun
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf

from verl_plugins import Batch, CompositionError, Groups
from verl_plugins.reward.evol_rl import EvolRl, after_thinking, banded, novelty
from verl_plugins.reward.ttrl import Ttrl

FEW = settings(max_examples=60, deadline=None)
BOXED = "it is \\boxed{3}"


def in_words(vectors: list[list[float]], agrees: list[bool], valid: list[bool]) -> list[float]:
    """The rewards of one prompt by the sheet's steps, one after another."""
    n = len(vectors)
    if n == 1:
        return [float(agrees[0])]
    here = [i for i in range(n) if valid[i]]
    if len(here) <= 1:
        return [-1.0] * n
    unit = {i: np.array(vectors[i]) / max(np.linalg.norm(vectors[i]), 1e-8) for i in here}
    u = {}
    for i in here:
        others = {j: float(np.clip(unit[i] @ unit[j], 0, 1)) for j in here if j != i}
        side = [value for j, value in others.items() if agrees[j] == agrees[i]] or [*others.values()]
        u[i] = 1 - (0.5 * np.mean(side) + 0.5 * max(others.values()))
    rewards = [-1.0] * n
    for right, low in ((True, 0.5), (False, -1.0)):
        side = [i for i in here if agrees[i] == right]
        values = [u[i] for i in side]
        for i in side:
            spread = max(values) - min(values)
            v = 1.0 if len(side) == 1 else (u[i] - min(values)) / spread if spread > 1e-6 else 0.5
            rewards[i] = low + 0.5 * v
    return rewards


@st.composite
def votes(draw):
    """Groups of votes: embeddings, agreement, validity; some embeddings are the same, some zero."""
    number = st.sampled_from([0.0, 1.0, -1.0, 0.5, 2.0])
    row = st.tuples(st.lists(number, min_size=3, max_size=3), st.booleans(), st.booleans())
    return draw(st.lists(st.lists(row, min_size=1, max_size=5), min_size=1, max_size=4))


def rewards_of(groups, order=None, **options) -> torch.Tensor:
    rows = [(number, *row) for number, group in enumerate(groups) for row in group]
    order = list(range(len(rows))) if order is None else order
    rows = [rows[place] for place in order]
    of = Groups([row[0] for row in rows])
    agrees, valid = (torch.tensor([row[column] for row in rows]) for column in (2, 3))
    u, _ = novelty(torch.tensor([row[1] for row in rows]), agrees, valid, of)
    found = torch.empty(len(rows), dtype=torch.double)
    found[order] = banded(u, agrees, valid, of, **options)
    return found


@FEW
@given(votes())
def test_rewards_are_those_of_the_sheet_s_steps(groups):
    expected = [reward for group in groups for reward in in_words(*map(list, zip(*group, strict=True)))]
    assert rewards_of(groups).tolist() == pytest.approx(expected, abs=1e-6)


@FEW
@given(votes(), st.randoms())
def test_the_order_of_rows_changes_nothing(groups, random):
    count = sum(map(len, groups))
    order = random.sample(range(count), count)
    assert rewards_of(groups, order).tolist() == pytest.approx(rewards_of(groups).tolist(), abs=1e-9)


@FEW
@given(votes(), st.floats(0.1, 30))
def test_the_length_of_embeddings_changes_nothing(groups, scale):
    scaled = [[([scale * value for value in vector], *rest) for vector, *rest in group] for group in groups]
    assert rewards_of(scaled).tolist() == pytest.approx(rewards_of(groups).tolist(), abs=1e-6)


@FEW
@given(votes())
def test_whoever_agrees_beats_whoever_does_not(groups):
    start = 0
    for group in groups:
        found = rewards_of(groups)[start : start + len(group)].tolist()
        start += len(group)
        valid = sum(row[2] for row in group)
        right = [reward for reward, row in zip(found, group, strict=True) if row[1] and row[2]]
        wrong = [reward for reward, row in zip(found, group, strict=True) if not row[1]]
        if valid > 1 and len(group) > 1 and right and wrong:
            assert min(right) >= 0.5 > -0.5 >= max(wrong)


def one(*rows: tuple[list[float], bool, bool], **options) -> list[float]:
    return rewards_of([list(rows)], **options).tolist()


class TestDegenerateCases:
    def test_the_only_valid_one(self):
        rows = (([1.0, 0.0], True, True), ([1.0, 0.0], True, False), ([0.0, 1.0], False, False))
        assert one(*rows) == [-1, -1, -1]
        assert one(*rows, single_valid="band") == [1, -1, -1]
        assert one(*[(vector, not right, there) for vector, right, there in rows], single_valid="band")[0] == -0.5

    def test_nobody_valid(self):
        assert one(([1.0], True, False), ([1.0], False, False)) == [-1, -1]

    def test_a_response_alone_keeps_what_it_had(self):
        assert one(([1.0], True, False)) == [1] and one(([1.0], False, True)) == [0]

    def test_copies_get_the_middle_of_their_band(self):
        same = [0.3, 0.7, 0.1]
        assert one((same, True, True), (same, True, True), (same, False, True), (same, False, True)) == [
            0.75,
            0.75,
            -0.75,
            -0.75,
        ]

    def test_small_differences_count_from_where_it_is_said(self):
        rows = (([1.0, 0.0], True, True), ([1.0, 0.1], True, True), ([1.0, 0.3], True, True))
        assert sorted(one(*rows))[0] == 0.5 and sorted(one(*rows))[-1] == 1.0
        assert one(*rows, min_spread=0.5) == [0.75] * 3

    def test_opposite_embeddings_are_as_new_as_unrelated_ones(self):
        rows = lambda third: (([1.0, 0.0], True, True), ([1.0, 0.0], True, True), (third, True, True))  # noqa: E731
        assert one(*rows([-1.0, 0.0])) == one(*rows([0.0, 1.0])) == [0.5, 0.5, 1.0]


@pytest.mark.parametrize(
    ("text", "rule", "takes_part"),
    [
        ("\\boxed{3}", "boxed_digit", True),
        ("\\boxed{x} and \\boxed{12}", "boxed_digit", True),
        ("\\boxed{\\frac{1}{2}}", "boxed_digit", True),
        ("\\boxed{x+y}", "boxed_digit", False),
        ("\\boxed{x+y}", "boxed", True),
        ("3", "boxed_digit", False),
        ("\\boxed{} 3", "boxed_digit", False),
        ("\\boxed{3", "boxed_digit", False),
        ("\\boxed{3}</think> three", "boxed_digit", False),
        ("wait</think> \\boxed{3}", "boxed_digit", True),
    ],
)
def test_who_is_valid(text, rule, takes_part):
    import pandas as pd

    plugin = EvolRl(EvolRl.Config(valid=rule))
    assert plugin.valid(None, pd.Series([text], dtype=object).map(after_thinking)).tolist() == [takes_part]


def batch_of(texts: list[str], scores: list[float], **fields) -> Batch:
    n = len(texts)
    rewards = torch.zeros(n, 2)
    rewards[:, 1] = torch.tensor(scores)
    return Batch.from_tensors(
        **{
            "uid": [f"{row // 2}-1-0" for row in range(n)],
            "session": [row % 2 for row in range(n)],
            "rm_scores": rewards,
            "response_mask": torch.ones(n, 2, dtype=torch.bool),
            "responses": torch.arange(n)[:, None].expand(n, 2),
            "response_lengths": torch.full((n,), 2),
            "acc": [float(score > 0) for score in scores],
            "tokenizer": SimpleNamespace(batch_decode=lambda ids, **_: [texts[row[0]] for row in ids]),
        }
        | fields
    )


class TestPlugin:
    def test_rewards_metrics_and_what_is_embedded(self):
        texts = [BOXED, "no box", f"so be it, {BOXED}", f"thought</think> {BOXED} "]
        plugin, run, asked = EvolRl(EvolRl.Config(single_valid="band")), FakeRun(), []

        def embed(given):
            asked.extend(given)
            return np.array([[1.0, 0.0], [1.0, 0.0], [0.0, 2.0]])

        plugin.embed = embed
        batch = batch_of(texts, [1, 0, 1, 0])
        plugin.shape_rewards(run, batch)
        assert asked == [BOXED, f"so be it, {BOXED}", BOXED]
        assert batch.scores.tolist() == [1.0, -1.0, 1.0, -0.5]
        expected = {"valid_share": 0.75, "majority_ratio": 0.5, "reward_mean": 0.125, "similarity_mean": 0.0}
        expected |= {"novelty_majority_mean": (1 + 1) / 2, "novelty_minority_mean": 1.0, "similarity_max": 0.0}
        assert {key: run.metrics[key] for key in expected} == pytest.approx(expected)
        assert run.metrics["reward_std"] == pytest.approx(np.std([1.0, -1.0, 1.0, -0.5]))

    def test_novelty_is_that_of_valid_responses(self):
        run, plugin = FakeRun(), EvolRl(EvolRl.Config())
        plugin.embed = lambda given: np.array([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0], [0.0, 1.0], [1.0, 1.0]])
        texts = [BOXED, "no box", BOXED, BOXED, "none", BOXED, BOXED]
        rows = batch_of(texts, [1, 1, 1, 0, 0, 0, 0], uid=["0-1-0"] * 7, session=[*range(7)])
        plugin.shape_rewards(run, rows)
        # both of the majority are alike; of the minority two are, and the third is near all of them
        near = 2**-0.5
        alone = [1 - ((1 + near) / 2 + 1) / 2, 1 - ((1 + near) / 2 + 1) / 2, 1 - (near + near) / 2]
        assert run.metrics["novelty_majority_mean"] == pytest.approx(0)
        assert run.metrics["novelty_minority_mean"] == pytest.approx(np.mean(alone))

    @pytest.mark.parametrize(("score", "there", "missing"), [(1, "majority", "minority"), (0, "minority", "majority")])
    def test_a_side_that_nobody_is_on_has_no_novelty(self, score, there, missing):
        run = FakeRun()
        EvolRl(EvolRl.Config()).shape_rewards(run, batch_of([BOXED, BOXED, "no box", "none"], [score, score, 1, 0]))
        assert f"novelty_{there}_mean" in run.metrics and f"novelty_{missing}_mean" not in run.metrics

    def test_it_needs_no_labels(self):
        assert EvolRl.label_free

    def test_an_empty_embedding_is_like_nothing(self):
        found = one(([0.0, 0.0], True, True), ([1.0, 0.0], True, True), ([1.0, 0.0], True, True))
        assert found == [1.0, 0.5, 0.5]
        u, similar = novelty(
            torch.tensor([[0.0, 0.0], [1e-5, 0.0]]),
            torch.tensor([True, True]),
            torch.tensor([True, True]),
            Groups([0, 0]),
        )
        assert u.tolist() == [1.0, 1.0] and similar.tolist() == [0.0, 0.0]
        u, similar = novelty(
            torch.tensor([[1e-5, 0.0], [0.2, 0.0]]),
            torch.tensor([True, True]),
            torch.tensor([True, True]),
            Groups([0, 0]),
        )
        assert similar.tolist() == pytest.approx([1.0, 1.0])

    def test_with_labels_the_scorer_decides(self):
        batch = batch_of([BOXED, BOXED], [0.3, 0.3], acc=[1.0, 0.0])
        EvolRl(EvolRl.Config(anchor="ground_truth")).shape_rewards(FakeRun(), batch)
        assert batch.scores.tolist() == [1.0, -0.5]

    def test_answers_that_the_scorer_found(self):
        batch = batch_of(["four", "", "five"], [1, 1, 0], uid=["0-1-0"] * 3, session=[0, 1, 2], answer=["4", None, "5"])
        EvolRl(EvolRl.Config(valid="answer_extracted")).shape_rewards(FakeRun(), batch)
        assert batch.scores.tolist() == [1.0, -1.0, -0.5]

    def test_nobody_valid_embeds_nothing(self):
        batch, run = batch_of(["a", "b"], [1, 0]), FakeRun()
        EvolRl(EvolRl.Config()).shape_rewards(run, batch)
        assert batch.scores.tolist() == [-1, -1] and "similarity_mean" not in run.metrics

    @pytest.mark.parametrize(("anchor", "plugins"), [("majority", {}), ("ground_truth", {"ttrl": {}})])
    def test_the_vote_and_the_anchor_go_together(self, anchor, plugins, sentence):
        with pytest.raises(CompositionError) as refusal:
            EvolRl(EvolRl.Config(anchor=anchor)).check(OmegaConf.create({"plugins": plugins}))
        sentence(refusal.value, "plugins.evol_rl.anchor", "ttrl")

    def test_it_works_on_the_votes_of_ttrl(self):
        import pluggy

        from verl_plugins import hookspecs

        manager = pluggy.PluginManager("verl_plugins")
        manager.add_hookspecs(hookspecs)
        for plugin in (EvolRl(EvolRl.Config(valid="answer_extracted")), Ttrl(Ttrl.Config(n_votes=3, grader="exact"))):
            manager.register(plugin)
        batch = batch_of(
            ["a 7 b", "c 7 d", "8"],
            [0, 0, 0],
            uid=["0-1-0"] * 3,
            session=[0, 1, 2],
            answer=["7", "7", "8"],
            responses=torch.tensor([[0, 2], [1, 2], [2, 2]]),
            budget=2,
            reward_model=[{"ground_truth": ""}] * 3,
        )
        batch._tokenizer.eos_token_id = 2
        manager.hook.shape_rewards(run=FakeRun(), batch=batch)
        assert min(batch.scores[:2].tolist()) >= 0.5 and batch.scores[2] == -0.5
