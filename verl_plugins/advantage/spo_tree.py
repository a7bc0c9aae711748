"""SPO-tree: responses grow as a tree of segments, rewards are backed up, and a segment earns what it changed.

arXiv:2505.23564, section 5 and appendices C to E. With depth D and branch factors B_1 .. B_D:

    grow    a node above depth D has B children, continuations of at most M tokens (at depth D: as long as they may be)
            a child that ends is a leaf, one that is cut off is continued in its turn, or at depth D a leaf as well
    values  V(leaf) = reward of the whole response;  V(node) = mean of its children's V;  S(node) = their std
    A(n)    V(n) - V(parent), or that / (S(parent) + 1e-8), on the tokens of segment n
    rows    segments with A != 0, their parent's text as context. They wait until they are drawn, at most 32 of a
            question in a step, and no longer than 8 steps; their ratio is against the policy that wrote them

What differs from GRPO: (1) a tree in the place of a group, and a row for each of its segments, sampled once and shared;
(2) the advantage: a mean of means as baseline, the segment itself in it; (3) rows of up to 7 steps ago are trained on,
with the old log-probs of then; (4) the loss of SPO-chain: tokens surer than rho are left out (the plugin `prob_mask`),
no dual clip, a KL term summed over a row. `whiten: batch`, which the authors' code does per micro-batch and the paper
does not have, brings the advantages of the step's unsure tokens to mean 0 and variance 1.

Degenerate cases: where all leaves are equal no row is left, and a step without any makes no update; an only child has
A = 0; with D = 1 it is GRPO without the scale; a response cut off at depth D, or without room for a further token, is
a leaf and graded as it stands; what could not be continued because all continuations failed is left out of the tree.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from omegaconf import DictConfig
from torch import Tensor

from verl_plugins import Batch, CompositionError, Groups, Plugin, Rollout, Run, Segment, Tokens, hookimpl, setting
from verl_plugins.advantage.spo_chain import ROUNDING, check_continued, check_kl, segment_kl, segment_loss, whitened
from verl_plugins.replay import RowStore, chances, row_numbers
from verl_plugins.services import Prompt

NODE, PARENT, DEPTH = "spo_node", "spo_parent", "spo_depth"
"""Fields of a row: the number of its segment in the tree, that of its parent (0: the prompt), its depth from 1."""
ADVANTAGE, AGE = "spo_advantage", "spo_age"
"""Put for each row: its edge's advantage, and the steps since it was rolled out."""
LEAST, EPSILON = 1e-8, 1e-8
BY_GROUP = ("adora", "progrpo", "ttrl")
"""Plugins that say of a row what its group in this step says; a row of an earlier step has none."""
Sample = Callable[..., Awaitable[list[Rollout]]]


@dataclass
class Node:
    """A segment of the tree; the root has none."""

    rollout: Rollout | None = None
    parent: Node | None = None
    depth: int = 0
    final: bool = False
    """Whether it is not continued: its response is whole."""
    children: list[Node] = field(default_factory=list)

    @property
    def ids(self) -> list[int]:
        """Tokens of the response up to its end."""
        return self.rollout.response_ids if self.rollout else []


async def grown(sample: Sample, branches: Sequence[int], size: int, limit: int) -> Node:
    """The root of a tree: all nodes of a level are continued at once.

    Args:
        sample: as `rollout_group` has it.
        branches: children of a node, level by level.
        size: tokens of a segment at most, on all levels but the last.
        limit: tokens of a response at most.
    """
    root = Node()
    level = [root]
    for depth, width in enumerate(branches, 1):
        last = depth == len(branches)
        room = [None if last else min(size, limit - len(node.ids)) for node in level]
        asked = [sample(width, prefix=node.ids, max_tokens=most) for node, most in zip(level, room, strict=True)]
        found = await asyncio.gather(*asked)
        for node, rollouts in zip(level, found, strict=True):
            node.children = [
                Node(one, node, depth, last or not one.truncated or len(one.response_ids) >= limit) for one in rollouts
            ]
        level = [child for node in level for child in node.children if not child.final]
    return root


def kept(node: Node) -> Iterator[Node]:
    """The segments below a node, each before what continues it, without those that lead to no leaf."""
    for child in node.children:
        below = list(kept(child))
        if child.final or below:
            yield child
            yield from below


def published(root: Node) -> list[Rollout]:
    """The leaves' responses in segments; what several share is published with the first of them."""
    leaves: list[Rollout] = []
    numbers, waiting = {id(root): 0}, []
    for number, node in enumerate(kept(root), 1):
        numbers[id(node)] = number
        place = {NODE: number, PARENT: numbers[id(node.parent)], DEPTH: node.depth}
        waiting.append(Segment(node.rollout, len(node.parent.ids), len(node.ids), place))
        if node.final:
            node.rollout.segments, waiting = waiting, []
            leaves.append(node.rollout)
    return leaves


def back_up(parent: Tensor, depth: Tensor, reward: Tensor) -> tuple[Tensor, Tensor]:
    """[N] nodes of trees -> [N] float64 values, and [N] population stds of the children's values, 0 without children.

    Args:
        parent: [N] place of each node's parent among the nodes; of a root any.
        depth: [N] from 0, the roots'.
        reward: [N] read of nodes without children.
    """
    value, spread = reward.double().clone(), torch.zeros(len(reward), dtype=torch.double)
    for level in range(int(depth.max()) if len(depth) else 0, 0, -1):
        nodes = (depth == level).nonzero()[:, 0]
        above = parent[nodes]
        value[above], spread[above] = Groups(above).moments(value[nodes], unbiased=False)
    return value, spread


def edge_advantage(
    value: Tensor, spread: Tensor, parent: Tensor, depth: Tensor, by_std: bool = False
) -> tuple[Tensor, Tensor]:
    """[N] advantage of each node over its parent, 0 of roots; and [N] bool: whether there is one."""
    above = parent.clamp(min=0)
    change = (value - value[above]).masked_fill(depth == 0, 0.0)
    return change / (spread[above] + EPSILON) if by_std else change, change.abs() > LEAST


def in_trees(batch: Batch) -> tuple[Tensor, Tensor]:
    """[B + groups] place of each row's parent, and depth; the trees' roots stand behind the rows, in their order."""
    group, (node, above, depth) = batch.groups.index, (batch.numbers(name).long() for name in (NODE, PARENT, DEPTH))
    size = int(node.max()) + 1
    code, order = torch.sort(group * size + node)
    place = order[torch.searchsorted(code, group * size + above)]
    roots = torch.zeros(len(batch.groups), dtype=torch.int64)
    return torch.cat([torch.where(above > 0, place, len(batch) + group), roots]), torch.cat([depth, roots])


def drawn(question: np.ndarray, row: np.ndarray, most: int, salt: int) -> np.ndarray:
    """[k] questions and numbers of rows -> [k] bool: all rows of a question, or `most` of them drawn at random."""
    return (Groups(question).rank(torch.from_numpy(chances(row, salt))) < most).numpy()


def cut_or_repeated(row: np.ndarray, count: int | None, salt: int) -> np.ndarray:
    """[k] numbers of rows -> [k] how often each is trained on: once, or so that there are `count` rows in all.

    More are cut to a random part; fewer are repeated as a whole, shuffled and cut.
    """
    if count is None or not len(row):
        return np.ones(len(row), dtype=np.int64)
    copies = -(-count // len(row))
    chance = chances(np.repeat(row, copies), salt + 1 + np.tile(np.arange(copies), len(row)))
    return np.bincount(np.argsort(chance)[:count] // copies, minlength=len(row))


class SpoTree(Plugin):
    """Grows trees and trains on their edges."""

    name = "spo_tree"
    paper = "arXiv:2505.23564"
    needs = frozenset({"old_log_probs"})

    @dataclass
    class Config:
        branches: tuple[int, ...] = setting((6, 6, 6), "children of a node, level by level", authors=(6, 6, 6))
        segment_tokens: int = setting(600, "M, of a segment at most; not on the last level", authors=600, ge=1)
        by_std: bool = setting(False, "divide by the std of the parent's children", authors=False)
        rho: float = setting(0.9, "a token less probable than this is an unsure one", authors=0.9, gt=0, lt=1)
        whiten: str = setting(
            "batch", "bring advantages to mean 0, variance 1", authors="batch", choices=("batch", "none")
        )
        kl_coef: float = setting(0.0, "of a KL term summed over each row, in place of verl's", authors=1e-4, ge=0)
        max_age: int = setting(8, "steps after which a row is thrown away", authors=8, ge=1)
        rows_per_prompt: int = setting(32, "rows of a question that are trained on in a step", authors=32, ge=1)
        rows: int | None = setting(
            None, "rows of a step, cut or repeated to that many; default: as there are", authors=512, ge=1
        )

        def __post_init__(self) -> None:
            if not self.branches or min(self.branches) < 1:
                raise ValueError(f"branches={list(self.branches)} must name the children of every level, from 1 on")

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.store = RowStore([ADVANTAGE])

    def check(self, config: DictConfig) -> None:
        check_continued(self.name, config)
        check_kl(self.name, self.config.kl_coef, config)
        if config.algorithm.use_kl_in_reward:
            raise CompositionError(
                "plugins.spo_tree knows its values before algorithm.use_kl_in_reward=true lowers rewards: set it to "
                "false and actor_rollout_ref.actor.use_kl_loss=true"
            )
        if config.distillation.enabled:
            raise CompositionError(
                "plugins.spo_tree trains on segments, for which there are no log-probs of a teacher; set "
                "distillation.enabled=false"
            )
        for other in [name for name in BY_GROUP if name in config.plugins]:
            raise CompositionError(
                f"plugins.{other} goes by the groups of a step, and plugins.spo_tree brings back rows of earlier ones, "
                f"which have none: leave it out with ~plugins.{other}"
            )

    @hookimpl
    async def rollout_group(self, run: Run, prompt: Prompt, sample: Sample) -> list[Rollout]:
        limit = prompt.max_tokens or run.config.data.max_response_length
        return published(await grown(sample, self.config.branches, self.config.segment_tokens, limit))

    @hookimpl
    def select_rows(self, run: Run, batch: Batch) -> None:
        parent, depth = in_trees(batch)
        rewards = torch.cat([batch.scores.double(), torch.zeros(len(batch.groups), dtype=torch.double)])
        value, spread = back_up(parent, depth, rewards)
        advantage, moved = edge_advantage(value, spread, parent, depth, self.config.by_std)
        advantage, moved, depth = advantage[: len(batch)], moved[: len(batch)], depth[: len(batch)]
        batch.put(ADVANTAGE, advantage.float())
        batch.put(AGE, torch.zeros(len(batch)))
        self._log(run, batch, value[len(batch) :], advantage, moved, depth)
        self._exchange(run, batch, moved & batch.response_mask.any(1), advantage)

    def _exchange(self, run: Run, batch: Batch, fresh: Tensor, advantage: Tensor) -> None:
        """The step's rows go into the store, and those that are trained on come out of it."""
        step, settings, rows = run.step, self.config, fresh.nonzero()[:, 0]
        run.log({"replay_discarded": self.store.forget(step - settings.max_age + 1)})
        if len(rows):
            self.store.add(batch, rows.numpy(), step, self._log_probs(run, batch, rows), {ADVANTAGE: advantage[rows]})
        facts, salt = self.store.facts, int(run.rng("replay").integers(2**62))
        taken = drawn(facts["prompt_id"], facts["row"], settings.rows_per_prompt, salt)
        number, ages = facts["row"][taken], step - facts["step"][taken]
        times = cut_or_repeated(number, settings.rows, salt)
        stay = torch.from_numpy(np.isin(row_numbers(batch), number[(ages == 0) & (times > 0)]))
        again = times - (ages == 0)  # a row of this step is there already
        back = [
            replace(row, columns={**row.columns, AGE: float(age)})
            for row, age in zip(self.store.take(taken), ages.tolist(), strict=True)
        ]
        batch.bring_back([row for row, count in zip(back, again.tolist(), strict=True) for _ in range(count)])
        if not len(number):
            stay[min(range(len(batch)), key=batch.keys.__getitem__)] = True
            batch.skip_update()
        batch.drop(~stay)
        run.log({"replay_size": len(self.store)})
        if len(number):
            trained = np.repeat(ages, times)
            run.log({"replay_age_mean": float(trained.mean()), "replay_age_max": int(trained.max())})

    def _log_probs(self, run: Run, batch: Batch, rows: Tensor) -> list[Tensor]:
        """Of each row, under the policy before this step's update."""
        prompts, ends, lengths = batch.extra("prompts"), batch.prompt_lengths.tolist(), batch.lengths.tolist()
        places = rows.tolist()
        contexts = [prompts[row, : ends[row]].tolist() for row in places]
        return run.score(contexts, [batch.responses[row, : lengths[row]].tolist() for row in places])

    def _log(self, run: Run, batch: Batch, roots: Tensor, advantage: Tensor, moved: Tensor, depth: Tensor) -> None:
        leaf = batch.is_last
        run.log(
            {
                "tree_leaves": int(leaf.sum()) / len(batch.groups),
                "tree_depth_mean": float(depth[leaf].double().mean()),
                "early_stop_frac": float((depth[leaf] < len(self.config.branches)).double().mean()),
                "trunc_leaf_frac": float(batch.truncated[leaf].double().mean()),
                "root_value": float(roots.mean()),
                "kept_edge_frac": float(moved.double().mean()),
            }
        )
        mean = Groups(depth).mean(advantage.abs())
        of_depth = dict(zip(depth.tolist(), mean.tolist(), strict=True))
        run.log({f"advantage_abs_depth_{level}": value for level, value in of_depth.items()})

    @hookimpl
    def estimate_advantage(self, run: Run, batch: Batch) -> Tensor:
        mask, advantages = batch.response_mask, batch.to_tokens(batch.numbers(ADVANTAGE))
        unsure = mask & (batch.old_log_probs.double().exp() < self.config.rho - ROUNDING)
        if mask.any():
            run.log({"masked_token_frac": int(unsure.sum()) / int(mask.sum())})
        return whitened(advantages, unsure, mask) if self.config.whiten == "batch" else advantages

    @hookimpl
    def policy_loss(self, tokens: Tokens) -> Tensor:
        (loss, bound), mask = segment_loss(tokens), tokens.response_mask
        ages = tokens.extra(AGE).long()[:, None].expand_as(mask)[mask]
        count, clipped = torch.bincount(ages), torch.bincount(ages, bound[mask].double())
        share = (clipped / count.clamp(min=1)).tolist()
        tokens.log({f"clip_frac_age_{age}": share[age] for age in count.nonzero()[:, 0].tolist()})
        return loss

    @hookimpl
    def loss_terms(self, tokens: Tokens) -> dict[str, Tensor] | None:
        return segment_kl(tokens, self.config.kl_coef)

    def state_dict(self) -> dict[str, Any]:
        return self.store.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.store.load_state_dict(state)
