"""SAGE: groups through the hook that generates them, with rewards that are given; transitions; the hint parser."""

import asyncio
import json

import numpy as np
from cases import Case
from fakes import FakeDataset, FakeRun
from omegaconf import OmegaConf

from verl_plugins.sampling.sage import Sage, parse_hint, question_of
from verl_plugins.services import Generated, Prompt, Prompts, Rollout

CONFIG = {"data": {"max_prompt_length": 4096, "max_response_length": 4096}}

SETTINGS = ("max_level", "raise_at_or_below", "lower_above")


def replay(case: Case, expected: dict) -> dict:
    op = case.param("op")
    assert op in OPS, f"unknown op {op!r}"
    return OPS[op](case)


class Servers:
    """Rollout servers that answer as the case says: rewards by level, and an object of hints or nothing to read."""

    def __init__(
        self, hints: object, rewards: dict[int, list[float]], fallback: dict | None = None, threshold: float = 0
    ) -> None:
        self.rewards, self.asked, self.threshold = rewards, [], threshold
        self.run = FakeRun(config=OmegaConf.create(CONFIG), dataset=FakeDataset(1))
        self.run.generate = self.generate
        self.answer = json.dumps(hints) if hints else "no idea"
        self.payloads = [payload for payload in (hints, fallback) if isinstance(payload, dict)]
        self.prompt: Prompt | None = None

    async def generate(self, messages, n=1, temperature=None, max_tokens=None):
        return [Generated([0], [0.0], self.answer)]

    async def sample(self, n=None, *, messages=None):
        level = self.prompt.row["hint_used"] if messages else 0
        if messages:
            texts = [payload.get(f"level_{level}") for payload in self.payloads]
            assert any(question_of(messages).endswith(f"\n{text.strip()}") for text in texts if text)
        self.asked.append(level)
        scores = self.rewards[level]
        return [Rollout("", [], score, score > self.threshold, False, {}, {"level": level}) for score in scores]


def drawn(plugin: Sage, run: FakeRun) -> Prompt:
    """The prompt as the driver sends it."""
    row = {
        "raw_prompt": [{"role": "user", "content": "2+2?"}],
        "reward_model": {"ground_truth": "4"},
        "extra_info": {"solution": "2+2 is 4"},
    }
    prompt = Prompt(0, row)
    plugin.prepare_prompts(run, Prompts([prompt]))
    return prompt


def play(
    plugin: Sage, hints: dict | None, rewards: dict[int, list[float]], threshold: float
) -> tuple[Prompt, list[float], Servers]:
    servers = Servers(hints, rewards, threshold=threshold)
    servers.prompt = prompt = drawn(plugin, servers.run)
    rollouts = asyncio.run(plugin.rollout_group(servers.run, prompt, servers.sample))
    assert {rollout.outputs["level"] for rollout in rollouts} == {prompt.row["hint_used"]}
    return prompt, [rollout.score for rollout in rollouts], servers


def escalate(case: Case) -> dict:
    threshold, size = case.param("success_threshold", 0), case.param("group_size", None)
    by_level, last = case.input("rewards_by_level"), case.param("max_level", Sage.Config().max_level)
    found = {"level": [], "rewards": [], "accuracy": [], "prompts_rolled_out_at_level": np.zeros(last, dtype=int)}
    for place, hints in enumerate(case.input("hints")):
        rewards = {level: groups[place] for level, groups in enumerate(by_level)}
        prompt, kept, servers = play(Sage(Sage.Config(max_level=last)), hints, rewards, threshold)
        assert len(kept) == (size or len(kept))
        found["level"].append(prompt.row["hint_used"])
        found["rewards"].append(kept)
        found["accuracy"].append(np.mean(np.array(kept) > threshold))
        found["prompts_rolled_out_at_level"] += np.bincount(servers.asked, minlength=last + 1)[1:]
    return found


def light_step(case: Case) -> dict:
    found = {"wanted_level": [], "effective_level": [], "new_level": [], "new_accuracy": []}
    names = ("last_level", "last_accuracy", "hints", "fallback_hints", "rewards")
    usual = Sage.Config()
    settings = {name: case.param(name, getattr(usual, name)) for name in SETTINGS}
    for level, accuracy, hints, fallback, rewards in zip(*[case.input(name) for name in names], strict=True):
        assert len(rewards) == case.param("group_size", len(rewards))
        plugin = Sage(Sage.Config(variant="sage-light", **settings))
        plugin._prepare(1)
        if level is not None:
            plugin.level[0], plugin.accuracy[0] = level, accuracy
        if fallback:
            plugin.hints["0"] = json.dumps(fallback)
        servers = Servers(hints, dict.fromkeys(range(4), rewards), fallback)
        servers.prompt = prompt = drawn(plugin, servers.run)
        kept = asyncio.run(plugin.rollout_group(servers.run, prompt, servers.sample))
        found["wanted_level"].append(prompt.row["hint_level"])
        found["effective_level"].append(prompt.row["hint_used"])
        found["new_level"].append(servers.asked[-1])
        found["new_accuracy"].append(np.mean([rollout.correct for rollout in kept]))
    return found


OPS = {
    "escalate": escalate,
    "light_step": light_step,
    "parse_hint": lambda case: {"payload": [parse_hint(text) for text in case.input("text")]},
}
