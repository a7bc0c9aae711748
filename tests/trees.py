"""Trees of segments for the tests of SPO-tree: sampled as a trainer would, and as the rows of a step."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from fakes import FakeDataset, FakeRun, FakeTokenizer
from hypothesis import strategies as st
from omegaconf import OmegaConf

from verl_plugins import Batch, Rollout
from verl_plugins.advantage.spo_tree import SpoTree

QUESTION, FIRST, OLD = [1, 2], 10, -0.5
LIMIT = 50


@dataclass
class Planted:
    """A tree that is known before it is sampled: node 0 is the prompt, segment k is the one token FIRST + k."""

    parent: Sequence[int]
    reward: Sequence[float]
    """Of leaves; of the others it is not read."""
    cut: Sequence[int] = ()
    """Leaves that were cut off."""
    inner: Sequence[int] = ()
    """Nodes that are cut off and whose continuations all fail."""
    empty: Sequence[int] = ()
    """Leaves with nothing behind what they continue."""
    asked: list[tuple[int, tuple[int, ...], int | None]] = field(default_factory=list)
    """Of each call of `sample`: how many, after which tokens, at most how long."""

    def children(self, node: int) -> list[int]:
        return [child for child in range(1, len(self.parent)) if self.parent[child] == node]

    def path(self, node: int) -> list[int]:
        """The nodes from the first segment to this one."""
        return [] if node == 0 else [*self.path(self.parent[node]), node]

    @property
    def depth(self) -> int:
        return max((len(self.path(node)) for node in range(len(self.parent))), default=0)

    async def sample(self, n: int, *, prefix: Sequence[int] = (), max_tokens: int | None = None) -> list[Rollout]:
        self.asked.append((n, tuple(prefix), max_tokens))
        node = prefix[-1] - FIRST if prefix else 0
        return [self.rollout(child) for child in self.children(node)]

    def rollout(self, node: int) -> Rollout:
        ids = [FIRST + one for one in self.path(node) if one not in self.empty]
        mask = [0] * (len(ids) - (node not in self.empty)) + [1] * (node not in self.empty)
        goes_on = bool(self.children(node)) or node in self.inner
        score = 9.0 if goes_on else self.reward[node]
        logs = [OLD * one for one in mask]
        return Rollout("", ids, score, score > 0.5, goes_on or node in self.cut, {}, node, logs, mask)


def group(tree: Planted, plugin: SpoTree, limit: int = LIMIT) -> list[Rollout]:
    """What the plugin publishes of it."""
    run = FakeRun(config=OmegaConf.create({"data": {"max_response_length": limit}}))
    prompt: Any = type("Prompt", (), {"max_tokens": None})
    return asyncio.run(plugin.rollout_group(run=run, prompt=prompt, sample=tree.sample))


def rows_of(groups: Mapping[str, Sequence[Rollout]], **fields: Any) -> Batch:
    """The rows of a step, the groups by their uid."""
    rows = [
        (uid, session, turn, one, part)
        for uid, rollouts in groups.items()
        for session, one in enumerate(rollouts)
        for turn, part in enumerate(one.segments)
    ]
    ids = [part.rollout.response_ids[part.start : part.end] or [FakeTokenizer.eos_token_id] for *_, part in rows]
    contexts = [[*QUESTION, *part.rollout.response_ids[: part.start]] for *_, part in rows]
    mask = [part.rollout.mask[part.start : part.end] or [0] for *_, part in rows]
    pad = lambda values: torch.nn.utils.rnn.pad_sequence([*map(torch.tensor, values)], batch_first=True)  # noqa: E731
    scores = torch.tensor([float(one.score) for *_, one, _ in rows])
    lengths = torch.tensor([*map(len, ids)])
    known = {
        "uid": [uid for uid, *_ in rows],
        "session": [session for _, session, *_ in rows],
        "turn": [turn for _, _, turn, *_ in rows],
        "responses": pad(ids),
        "response_mask": pad(mask),
        "response_lengths": lengths,
        "prompts": pad(contexts),
        "prompt_lengths": torch.tensor([*map(len, contexts)]),
        "rm_scores": torch.zeros(len(rows), int(lengths.max())).scatter_(1, lengths[:, None] - 1, scores[:, None]),
        "acc": torch.tensor([float(one.correct) for *_, one, _ in rows]),
        "truncated": torch.tensor([one.truncated for *_, one, _ in rows]),
        "offset": torch.tensor([part.start for *_, part in rows]),
        "extra_fields": [part.fields for *_, part in rows],
        "budget": LIMIT,
    }
    return Batch.from_tensors(**{**known, **fields})


def star(scores: Sequence[float], **options: Any) -> Planted:
    """A tree of depth 1."""
    return Planted([-1] + [0] * len(scores), [0.0, *scores], **options)


@st.composite
def planted(draw: Any, deepest: int = 3, scores: Any = None) -> Planted:
    """Up to three children of each node, some of which end early."""
    scores = st.sampled_from([0.0, 1.0, 0.25, -2.0]) if scores is None else scores
    parent, reward, level = [-1], [0.0], [0]
    for depth in range(1, deepest + 1):
        below = []
        for node in level:
            for _ in range(draw(st.integers(1, 3))):
                parent.append(node)
                reward.append(draw(scores))
                below.append(len(parent) - 1)
        level = [node for node in below if draw(st.booleans())] if depth < deepest else []
    return Planted(parent, reward)


def plugin(**options: Any) -> SpoTree:
    return SpoTree(SpoTree.Config(**{"branches": [3, 3, 3], **options}))


def selected(trees: list[Planted], step: int = 1, made: SpoTree | None = None, **options: Any) -> tuple[Batch, FakeRun]:
    """The rows of a step, one tree for each prompt, after the plugin has chosen."""
    made = made or plugin(**options)
    run = FakeRun(step=step, dataset=FakeDataset(9))
    batch = rows_of({f"{place}-{step}-{place}": group(tree, made) for place, tree in enumerate(trees)})
    made.select_rows(run, batch)
    return batch, run
