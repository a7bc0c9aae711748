"""SPO-tree: how a tree grows and is published, and what its edges earn."""

from __future__ import annotations

import asyncio
import statistics
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from fakes import FakeDataset, FakeRun
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf
from trees import FIRST, LIMIT, Planted, group, planted, plugin, rows_of, selected, star

from verl_plugins import Batch
from verl_plugins.advantage.spo_tree import (
    ADVANTAGE,
    DEPTH,
    NODE,
    PARENT,
    back_up,
    edge_advantage,
    grown,
    kept,
)

FEW = settings(max_examples=60, deadline=None)
SURE, UNSURE = float(np.log(0.95)), float(np.log(0.4))


def worth(tree: Planted, node: int = 0) -> float:
    below = tree.children(node)
    return statistics.fmean(worth(tree, child) for child in below) if below else tree.reward[node]


def of_nodes(batch: Batch, values: torch.Tensor) -> dict[int, float]:
    """By the number of the planted node."""
    return dict(zip((batch.responses[:, 0] - FIRST).tolist(), values.tolist(), strict=True))


class TestGrowing:
    TREE = Planted([-1, 0, 0, 1, 1, 3, 3], [0, 0, 1, 0, 0.5, 1, 0])

    def test_a_level_is_asked_at_once_and_only_what_was_cut_off_goes_on(self):
        self.TREE.asked.clear()
        group(self.TREE, plugin(branches=[5, 4, 3], segment_tokens=7))
        assert self.TREE.asked == [(5, (), 7), (4, (FIRST + 1,), 7), (3, (FIRST + 1, FIRST + 3), None)]

    def test_all_nodes_of_a_level_wait_together(self):
        waiting, most = 0, 0

        async def sample(n, *, prefix=(), max_tokens=None):
            nonlocal waiting, most
            waiting += 1
            most = max(most, waiting)
            await asyncio.sleep(0)
            waiting -= 1
            return [Planted([-1, 0], [0, 0], inner=[1]).rollout(1) for _ in range(n)]

        asyncio.run(grown(sample, [4, 3], 4, LIMIT))
        assert most == 4

    def test_a_segment_is_no_longer_than_there_is_room(self):
        tree = Planted([-1, 0, 1, 2], [0, 0, 0, 1])
        group(tree, plugin(segment_tokens=5), limit=3)
        assert [most for *_, most in tree.asked] == [3, 2, None]

    def test_without_room_a_segment_that_was_cut_off_is_a_leaf(self):
        tree = Planted([-1, 0, 1, 2], [0, 0, 0.25, 1])
        (leaf,) = group(tree, plugin(), limit=2)
        assert leaf.response_ids == [FIRST + 1, FIRST + 2] and len(tree.asked) == 2

    def test_what_cannot_be_continued_leads_to_no_leaf(self):
        tree = Planted([-1, 0, 0, 1, 1], [0, 0, 1, 0, 0], inner=[3, 4])
        leaves = group(tree, plugin())
        assert [leaf.response_ids for leaf in leaves] == [[FIRST + 2]]
        assert group(Planted([-1, 0], [0, 0], inner=[1]), plugin()) == []

    def test_depth_1_has_no_limit_of_its_own(self):
        tree = star([0, 1])
        group(tree, plugin(branches=[2], segment_tokens=3))
        assert tree.asked == [(2, (), None)]

    def test_a_prompt_s_own_budget_counts(self):
        tree, config = Planted([-1, 0, 1], [0, 0, 1]), OmegaConf.create({"data": {"max_response_length": 9}})
        prompt = SimpleNamespace(max_tokens=1)
        asyncio.run(plugin().rollout_group(run=FakeRun(config=config), prompt=prompt, sample=tree.sample))
        assert tree.asked == [(3, (), 1)]


class TestPublishing:
    @FEW
    @given(planted())
    def test_every_segment_is_one_row_behind_its_parent_s_text(self, tree):
        leaves = group(tree, plugin())
        rows = [part for leaf in leaves for part in leaf.segments]
        nodes = [part.rollout.outputs for part in rows]
        assert sorted(nodes) == list(range(1, len(tree.parent)))
        for part, node in zip(rows, nodes, strict=True):
            path = [FIRST + one for one in tree.path(node)]
            assert part.rollout.response_ids[: part.start] == path[:-1]
            assert part.rollout.response_ids[part.start : part.end] == path[-1:]
            assert part.rollout.mask[part.start : part.end] == [1] and part.fields[DEPTH] == len(path)

    @FEW
    @given(planted())
    def test_a_leaf_is_a_response_and_its_segments_stand_before_it(self, tree):
        leaves = group(tree, plugin())
        assert sorted(leaf.outputs for leaf in leaves) == [
            n for n in range(1, len(tree.parent)) if not tree.children(n)
        ]
        for leaf in leaves:
            ends = [part.end for part in leaf.segments]
            assert ends == sorted(ends) and ends[-1] == len(leaf.response_ids)
            for part in leaf.segments:
                assert leaf.response_ids[: part.end] == part.rollout.response_ids[: part.end]

    def test_parents_are_named_before_their_children(self):
        tree = Planted([-1, 0, 0, 1, 2], [0, 0, 0, 1, 0])
        rows = [part.fields for leaf in group(tree, plugin()) for part in leaf.segments]
        assert [(row[NODE], row[PARENT], row[DEPTH]) for row in rows] == [(1, 0, 1), (2, 1, 2), (3, 0, 1), (4, 3, 2)]

    def test_the_tree_is_walked_in_depth(self):
        root = asyncio.run(grown(TestGrowing.TREE.sample, [3, 3, 3], 4, LIMIT))
        assert [node.rollout.outputs for node in kept(root)] == [1, 3, 5, 6, 4, 2]


class TestValues:
    @FEW
    @given(planted())
    def test_means_of_means(self, tree):
        depth = [len(tree.path(node)) for node in range(len(tree.parent))]
        value, spread = back_up(torch.tensor(tree.parent), torch.tensor(depth), torch.tensor(tree.reward))
        for node in range(len(tree.parent)):
            assert value[node] == pytest.approx(worth(tree, node), abs=1e-12)
            below = [worth(tree, child) for child in tree.children(node)]
            assert spread[node] == pytest.approx(statistics.pstdev(below) if below else 0, abs=1e-12)

    @FEW
    @given(planted(), st.randoms())
    def test_the_order_of_the_nodes_does_not_matter(self, tree, random):
        count = len(tree.parent)
        order = random.sample(range(count), count)
        place = {node: new for new, node in enumerate(order)}
        depth = torch.tensor([len(tree.path(node)) for node in range(count)])
        parent, reward = torch.tensor([max(one, 0) for one in tree.parent]), torch.tensor(tree.reward)
        mixed = torch.tensor([place[int(parent[node])] for node in order])
        one, other = back_up(parent, depth, reward), back_up(mixed, depth[order], reward[order])
        for given_order, found in zip(one, other, strict=True):
            assert found.tolist() == pytest.approx(given_order[order].tolist(), abs=1e-12)

    @FEW
    @given(planted(), st.booleans())
    def test_edges(self, tree, by_std):
        """Through the stage, in any number of trees."""
        batch, _ = selected([star([1, 0]), tree], by_std=by_std)
        found = of_nodes(batch, batch.written[ADVANTAGE])
        second = torch.from_numpy(batch.uid == "1-1-1")
        found = dict(
            zip((batch.responses[second, 0] - FIRST).tolist(), batch.written[ADVANTAGE][second].tolist(), strict=True)
        )
        for node in range(1, len(tree.parent)):
            above = tree.parent[node]
            change = worth(tree, node) - worth(tree, above)
            spread = statistics.pstdev([worth(tree, child) for child in tree.children(above)])
            assert found[node] == pytest.approx(change / (spread + 1e-8) if by_std else change, rel=1e-5, abs=1e-6)

    @FEW
    @given(st.lists(st.sampled_from([0.0, 1.0, 0.5, -2.0]), min_size=1, max_size=6), st.booleans())
    def test_depth_1_is_grpo_with_the_mean_and_the_population_s_std(self, scores, by_std):
        batch, _ = selected([star(scores)], by_std=by_std)
        mean, std = np.mean(scores), np.std(scores)
        expected = (np.array(scores) - mean) / (std + 1e-8 if by_std else 1)
        assert [*of_nodes(batch, batch.written[ADVANTAGE]).values()] == pytest.approx(expected, abs=1e-5)

    @FEW
    @given(planted(scores=st.just(0.1)))
    def test_equal_leaves_give_no_row(self, tree):
        batch, run = selected([tree])
        assert batch.update_skipped and not batch.additions and int((~batch.dropped).sum()) == 1
        assert run.metrics["kept_edge_frac"] == 0 and run.metrics["replay_size"] == 0

    def test_an_only_child_has_no_advantage_and_its_children_may(self):
        batch, _ = selected([Planted([-1, 0, 1, 1], [0, 0, 1, 0])])
        assert of_nodes(batch, batch.written[ADVANTAGE]) == {1: 0, 2: 0.5, 3: -0.5}
        assert of_nodes(batch, batch.dropped) == {1: True, 2: False, 3: False}

    def test_an_early_end_weighs_as_much_as_a_subtree(self):
        """One of the prompt's children is right at once; the other has four leaves, all wrong."""
        batch, _ = selected([Planted([-1, 0, 0, 2, 2, 2, 2], [0, 1, 0, 0, 0, 0, 0])])
        assert of_nodes(batch, batch.written[ADVANTAGE]) == {1: 0.5, 2: -0.5, 3: 0, 4: 0, 5: 0, 6: 0}

    def test_a_response_that_was_cut_off_is_graded_as_it_stands_and_trains(self):
        batch, run = selected([star([0, 1], cut=[1])], branches=[2])
        assert of_nodes(batch, batch.written[ADVANTAGE]) == {1: -0.5, 2: 0.5} and not batch.dropped.any()
        assert run.metrics["trunc_leaf_frac"] == 0.5

    def test_a_segment_without_a_token_counts_as_a_child_and_is_no_row(self):
        batch, _ = selected([star([0, 1], empty=[1])])
        assert batch.written[ADVANTAGE].tolist() == [-0.5, 0.5] and batch.dropped.tolist() == [True, False]

    def test_children_of_equal_value_are_left_out_and_what_stands_below_them_trains(self):
        tree = Planted([-1, 0, 0, 1, 1, 2, 2], [0, 0, 0, 1, 0, 0, 1])
        batch, _ = selected([tree])
        assert of_nodes(batch, batch.dropped) == {1: True, 2: True, 3: False, 4: False, 5: False, 6: False}

    def test_what_rewards_were_shaped_to_is_what_is_backed_up(self):
        made = plugin()
        batch = rows_of({"0-1-0": group(star([1, 0]), made)})
        batch.rewards = torch.tensor([3.0, 1.0])
        made.select_rows(FakeRun(dataset=FakeDataset(1)), batch)
        assert batch.written[ADVANTAGE].tolist() == [1, -1]

    def test_what_is_hardly_anything_is_nothing(self):
        value = torch.tensor([0.5, 0.5 + 2e-8, 0.5 + 0.5e-8], dtype=torch.double)
        spread, above, depth = torch.zeros(3).double(), torch.tensor([0, 0, 0]), torch.tensor([0, 1, 1])
        _, moved = edge_advantage(value, spread, above, depth)
        assert moved.tolist() == [False, True, False]
