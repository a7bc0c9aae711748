"""`check_plugin` passes a sound plugin, and finds what is wrong with each unsound one.

Every unsound plugin breaks one law; the check must name just that law, and say why in one sentence.
"""

from __future__ import annotations

import json
import random
import subprocess
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from verl_plugins import CompositionError, DataError, Plugin, Segment, Verdict, hookimpl, setting
from verl_plugins.composition.needs import NEEDS
from verl_plugins.replay import RowStore
from verl_plugins.testing import PluginCheckError, Scenario, check_plugin
from verl_plugins.testing.record import generator_states


class Sound(Plugin):
    """Takes part in every stage, keeps state in two processes, draws random numbers, reads every field."""

    name = "sound"
    needs = frozenset(NEEDS)

    @dataclass
    class Config:
        scale: float = setting(1.0, "of everything", authors=2.0, gt=0)
        mode: str | None = setting(None, "unused", choices=("a", None))
        sizes: list[int] | None = setting(None, "unused")

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.seen, self.steps, self.norms = np.zeros(100, dtype=np.int64), 0, torch.zeros(1)

    @hookimpl
    def select_prompts(self, run, count):
        free = np.setdiff1d(np.arange(len(run.dataset)), run.in_flight())
        chance = 1 / (1 + self.seen[free])
        return run.rng("choice").choice(free, count, replace=False, p=chance / chance.sum())

    @hookimpl
    def prepare_prompts(self, run, prompts):
        for prompt in prompts:
            prompt.max_tokens = 8 + prompt.id % 3
            prompt.row["hint"] = f"h{prompt.id}"
            prompt.row["noise"] = float(run.rng("noise").random())

    @hookimpl
    async def rollout_group(self, run, prompt, sample):
        rollouts = await sample(2)
        more = await sample(3, temperature=0.5, max_tokens=4)
        run.log({"draw": run.rng().random()})
        return rollouts + more

    @hookimpl
    def score_answer(self, answer):
        correct = answer.text.strip() == answer.ground_truth
        return Verdict(float(correct), correct, {"length": len(answer.text)})

    @hookimpl
    def shape_rewards(self, run, batch):
        batch.rewards = batch.scores + 0.1 * batch.truncated + 0.01 * torch.tensor([len(text) for text in batch.text])

    @hookimpl
    def select_rows(self, run, batch):
        batch.put("number", batch.prompt_id.float())
        batch.drop(batch.session == 1)

    @hookimpl
    def estimate_advantage(self, run, batch):
        fields = (batch.entropy, batch.old_log_probs, batch.rollout_log_probs, batch.ref_log_probs)
        total = sum((field * batch.response_mask).sum(1) for field in fields) + batch.prompt_log_probs.sum(1)
        centred = batch.full.scores - batch.full.groups.mean(batch.full.scores)
        asked = run.log_probs(batch).sum(1) + torch.stack([row.sum() for row in run.score(batch.text, batch.text)])
        several = batch.from_full(batch.full.groups.count() > 1)
        return batch.to_tokens(several * (self.config.scale * batch.from_full(centred) + 0.01 * (total + asked)))

    @hookimpl
    def observe(self, run, batch):
        np.add.at(self.seen, batch.full.prompt_id.numpy(), 1)
        batch.put("weight", batch.full.groups.std(batch.full.scores)[: len(batch)] * 0 + batch.scores)
        batch.put("copied", batch.advantages + 1)

    @hookimpl
    def shape_logits(self, logits):
        return logits * self.config.scale + logits.logsumexp(-1, keepdim=True)

    @hookimpl(wrapper=True)
    def distillation_loss(self, distilled):
        losses = yield
        distilled.log({"tokens": len(losses)}, "sum")
        return self.config.scale * losses + distilled.logits(detached=True).square().mean(1)

    @hookimpl(wrapper=True)
    def policy_loss(self, tokens):
        losses = yield
        tokens.log({"rows": len(losses)}, "sum")
        return losses * (1 + tokens.extra("weight")[:, None]) * (2 - tokens.extra("copied")).sigmoid()

    @hookimpl
    def loss_terms(self, tokens):
        gap = tokens.log_probs - tokens.extra("ref_log_prob")
        prompts = torch.tensor([float(uid.split("-")[0]) if uid[0] != "p" else 0.0 for uid in tokens.extra("uid")])
        weight = (1 + tokens.extra("verdict") + 0.01 * prompts)[:, None] + tokens.extra("rm_scores")
        return {"pull": weight * gap**2, "entropy": -1e-3 * tokens.entropy * tokens.extra("entropy")}

    @hookimpl(wrapper=True)
    def optimizer_step(self, actor):
        norm = yield
        self.norms = self.norms + norm
        actor.log({"mean_norm": float(self.norms)})
        return norm

    @hookimpl
    def on_step_end(self, run, metrics):
        self.steps += 1
        run.log({"steps": self.steps, "accuracy": metrics["health/accuracy"]})

    @hookimpl
    def on_train_end(self, run):
        run.log({"steps": self.steps})

    def state_dict(self):
        return {"seen": self.seen, "steps": self.steps, "norms": self.norms}

    def load_state_dict(self, state):
        self.seen, self.steps, self.norms = state["seen"].copy(), state["steps"], state["norms"].clone()


class Cuts(Plugin):
    """Every response in two segments, behind the first of which another response stands as well."""

    name = "cuts"

    @hookimpl
    async def rollout_group(self, run, prompt, sample):
        found = []
        for begun in await sample(3, max_tokens=3):
            first = Segment(begun, 0, len(begun.response_ids), {"value": 0.5})
            ends = await sample(2, prefix=begun.response_ids) if begun.truncated else [begun]
            for end in ends:
                end.segments = [Segment(end, first.end, len(end.response_ids), {"value": 1.0})]
            if begun.truncated and ends:
                ends[0].segments.insert(0, first)
            elif ends:
                begun.segments = [first]
            found += ends
        return found

    @hookimpl
    def estimate_advantage(self, run, batch):
        centred = (batch.scores - batch.groups.mean(batch.scores)) * torch.as_tensor(batch.extra("value"))
        run.log({"rows_of_a_response": len(batch) / len(batch.sessions), "length": batch.ends.float().mean()})
        return batch.to_tokens(centred / batch.ends)


def test_a_plugin_that_publishes_segments():
    check_plugin(Cuts)
    check_plugin(Cuts, scenario=Scenario(tokens=5, seed=3))


class Returns(Plugin):
    """Half of the rows wait a step, with the log-probs they then have; in step 3 the weights stay."""

    name = "returns"

    def __init__(self, config):
        super().__init__(config)
        self.store = RowStore(["age"])

    @hookimpl
    def select_rows(self, run, batch):
        batch.put("age", torch.zeros(len(batch)))
        late = batch.session % 2 == 1
        rows = late.nonzero()[:, 0].numpy()
        whole = rows[(batch.response_mask.sum(1) == batch.lengths)[late].numpy()]
        old = run.log_probs(batch)
        log_probs = [old[row, : batch.lengths[row]] for row in whole.tolist()]
        batch.bring_back(self.store.take(np.ones(len(self.store), bool)))
        self.store.add(batch, whole, run.step, log_probs, {"age": np.ones(len(whole))})
        batch.drop(late)
        if run.step == 3:
            batch.skip_update()

    @hookimpl
    def estimate_advantage(self, run, batch):
        age = batch.extra("age")
        run.log({"old": age.mean(), "drift": float((batch.old_log_probs * batch.response_mask).sum())})
        several = batch.from_full(batch.full.groups.count() > 1) | (age > 0)
        return batch.to_tokens(several * (batch.scores - 0.5) / (1 + age))

    @hookimpl
    def policy_loss(self, tokens):
        ratio = (tokens.log_probs - tokens.old_log_probs).exp()
        return -ratio * tokens.advantages * (1 + tokens.extra("age"))[:, None] * tokens.response_mask

    def state_dict(self):
        return self.store.state_dict()

    def load_state_dict(self, state):
        self.store.load_state_dict(state)


@pytest.mark.parametrize("scenario", [Scenario(), Scenario(prompts=4, group_size=2, tokens=7, seed=1)])
def test_a_plugin_that_brings_rows_back(scenario):
    check_plugin(Returns, scenario=scenario)


@pytest.mark.parametrize(
    "scenario",
    [
        Scenario(),
        Scenario(prompts=5, group_size=3, tokens=9, scores=(-1.0, 1.0), seed=5),
        Scenario(group_size=2, overrides={"actor_rollout_ref.actor.clip_ratio": 0.1}),
    ],
)
def test_a_sound_plugin_passes(scenario: Scenario) -> None:
    check_plugin(Sound, config={"scale": 0.5}, scenario=scenario)


def test_what_runs_in_a_real_training_runs_here(tmp_path, monkeypatch) -> None:
    """The plugin of the end-to-end tests reads and writes everything that training offers, in every stage."""
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "e2e"))
    from every_stage import IMPLEMENTED, EveryStage

    check_plugin(
        EveryStage,
        config={"folder": str(tmp_path)},
        scenario=Scenario(group_size=8, columns={"data_source": lambda prompt_id: "verl_plugins/arithmetic"}),
        except_for={
            "result.select_prompts": "it draws from all prompts, whatever is in flight",
            "row_order.select_rows": "it numbers the rows",
            "padding.policy_loss": "it takes a maximum over tokens where there are none",
        },
    )
    stages = {json.loads(line)["stage"] for path in tmp_path.glob("*.jsonl") for line in path.read_text().splitlines()}
    assert stages == set(IMPLEMENTED)


def test_settings_and_columns_reach_the_plugin() -> None:
    def estimate_advantage(self, run, batch):
        assert run.config.data.max_response_length == 10
        assert run.config.plugins.broken.bound == 3.0
        return torch.tensor(batch.extra("level"))[:, None] * centred(batch)

    class Config:
        bound: float = setting(1.0, "a bound")

    columns = {"level": lambda prompt_id: prompt_id / 10}
    plugin = broken(estimate_advantage=estimate_advantage, Config=dataclass(Config))
    check_plugin(plugin, config={"bound": 3}, scenario=Scenario(tokens=10, columns=columns))


def test_a_check_that_refuses_the_scenario_says_how_to_change_it() -> None:
    def check(self, config):
        if config.actor_rollout_ref.rollout.n < 8:
            raise CompositionError("plugins.broken needs groups of 8")

    plugin = broken(observe=lambda self, batch: None, check=check)
    with pytest.raises(PluginCheckError, match=r"check: refuses the scenario; .*: plugins.broken needs groups of 8"):
        check_plugin(plugin)
    check_plugin(plugin, scenario=Scenario(group_size=8))


def test_the_global_generators_are_left_as_they_were() -> None:
    torch.manual_seed(3), np.random.seed(3), random.seed(3)
    before = generator_states()
    check_plugin(Sound)
    assert generator_states() == before


def test_a_group_of_one_may_be_refused() -> None:
    def estimate_advantage(self, batch):
        if int(batch.groups.count().min()) < 2:
            raise DataError("groups of one response cannot be compared")
        return centred(batch)

    check_plugin(broken(estimate_advantage=estimate_advantage))


@pytest.mark.parametrize("score", [1.0, 0.25, -1.0])
def test_a_lone_response_gets_nothing(score: float) -> None:
    def estimate_advantage(self, batch):
        alone = batch.groups.count() == 1
        return torch.where(alone[:, None], batch.to_tokens(torch.full((len(batch),), score)), centred(batch))

    plugin = broken(estimate_advantage=estimate_advantage)
    told = rf"lonely_group.estimate_advantage: gives an advantage of size {abs(score):g} to a response that has none"
    with pytest.raises(PluginCheckError, match=told):
        check_plugin(plugin)
    check_plugin(plugin, except_for={"lonely_group.estimate_advantage": "it is compared with the prompt"})


def test_needs_no_verl() -> None:
    """Neither does a plugin's own test then; what verl, Ray and the queue would take seconds to import is left out."""
    code = (
        "import sys; from verl_plugins.testing import check_plugin; check_plugin('grpo')\n"
        "print(*sys.modules, file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not {"verl", "ray", "transfer_queue", "transformers"} & set(done.stderr.split())


# What is wrong


def broken(**members: Any) -> type[Plugin]:
    """A plugin class; functions named like stages become hooks."""
    for name, member in members.items():
        if isinstance(member, Hook):
            member.function.__name__ = name
            members[name] = hookimpl(**member.options)(member.function)
        elif callable(member) and not isinstance(member, type) and not name.startswith(("_", "check", "state", "load")):
            member.__name__ = name
            members[name] = hookimpl(member)
    return type("Broken", (Plugin,), {"name": "broken", "__module__": __name__, **members})


class Hook:
    """A hook with options of its own."""

    def __init__(self, function: Callable, **options: Any) -> None:
        self.function, self.options = function, options


def config_of(**fields: Any) -> type:
    """A dataclass; fields are (type, value) or a type."""
    pairs = {name: field if isinstance(field, tuple) else (field,) for name, field in fields.items()}
    members = {name: pair[1] for name, pair in pairs.items() if len(pair) > 1}
    return dataclass(
        type("Config", (), {"__annotations__": {name: pair[0] for name, pair in pairs.items()}, **members})
    )


def centred(batch) -> torch.Tensor:
    return batch.to_tokens(batch.scores - batch.groups.mean(batch.scores))


def surrogate(tokens) -> torch.Tensor:
    return -tokens.advantages * (tokens.log_probs - tokens.old_log_probs).exp()


def drawing(draw: Callable[[], Any]) -> Callable:
    """An estimator that also draws."""

    def estimate_advantage(self, batch):
        draw()
        return centred(batch)

    return estimate_advantage


def scaling_in_place(self, batch):
    batch.scores.mul_(2)
    return centred(batch)


def through_the_object(self, tokens):
    return surrogate(tokens) * getattr(self, "weight", 1.0)


def remember(self, batch):
    self.weight = 1 + float(batch.scores.mean())


def by_position(self, batch):
    several = batch.groups.count() > 1
    return batch.to_tokens(several * batch.scores[torch.arange(len(batch)) // 2])


def counting(self, run, batch):
    self.calls = getattr(self, "calls", 0) + 1
    return centred(batch) * self.calls


def reading_config(self, run, batch):
    run.config.data.seed = 3
    return centred(batch)


def half_the_prompts(self, prompts):
    for prompt in prompts[:2]:
        prompt.row["hint"] = 1


async def nothing(self, sample):
    return []


def unbiased(self, batch):
    counts = batch.groups.count()
    spread = batch.groups.sum((batch.scores - batch.groups.mean(batch.scores)) ** 2) / (counts - 1)
    return centred(batch) * spread[:, None]


def undeclared_extra(self, tokens):
    return surrogate(tokens) + 0 * tokens.extra("rollout_log_probs")


def asking_for_logits(self, actor):
    actor.logits(8)
    return (yield)


def leaning_on_the_token_before(self, logits):
    before = torch.nn.functional.pad(logits, (0, 0, 1, 0))[:, :-1]
    return logits + before - before.detach()


def restart(self, state):
    self.calls = 0


def keep(self):
    return {"calls": getattr(self, "calls", 0)}


UNSOUND: list[tuple[str, str, dict[str, Any]]] = [
    # the class
    ("config", "is not a dataclass", {"Config": type("Config", (), {})}),
    ("config", "plugins.broken.a has no explanation", {"Config": config_of(a=(int, 1))}),
    ("config", "plugins.broken.a has no value", {"Config": config_of(a=int)}),
    (
        "config",
        "the default is refused: plugins.broken.a is 1.0",
        {"Config": config_of(a=(float, setting(1.0, "a", gt=1)))},
    ),
    ("config", "the default is refused: plugins.broken.a is 'x'", {"Config": config_of(a=(int, setting("x", "a")))}),
    (
        "config",
        "the authors' value is refused: plugins.broken.a is 3.0",
        {"Config": config_of(a=(float, setting(1.0, "a", authors=3.0, le=2)))},
    ),
    ("config", "which a value in YAML cannot have", {"Config": config_of(a=(set, setting(None, "a")))}),
    ("name", "class attribute name is ''", {"name": ""}),
    (
        "needs",
        "'entropie', which verl cannot be asked for; did you mean 'entropy'?",
        {"needs": frozenset({"entropie"}), "observe": lambda self: None},
    ),
    ("hooks", "an argument 'batches'", {"observe": lambda self, batches: None}),
    ("hooks", "'obsevre', which is not a stage; did you mean 'observe'?", {"obsevre": lambda self, batch: None}),
    ("hooks", "no method is marked", {}),
    ("hooks", "must be async def", {"rollout_group": lambda self, sample: None}),
    ("hooks", "API version 99", {"api": 99}),
    ("hooks", "works with verl<0.1", {"verl": "<0.1"}),
    # ordinary data
    ("runs.observe", "raises KeyError: 'x'", {"observe": lambda self, batch: {}["x"]}),
    (
        "runs.observe",
        "'entropy' is not in the batch; a plugin that reads it declares needs",
        {"observe": lambda self, batch: batch.entropy},
    ),
    (
        "runs.policy_loss",
        "'rollout_log_probs' did not reach the loss; declare it in needs",
        {"policy_loss": undeclared_extra},
    ),
    (
        "runs.shape_rewards",
        "'old_log_probs' is not in the batch",
        {"shape_rewards": lambda self, batch: batch.old_log_probs},
    ),
    ("runs.estimate_advantage", "read-only", {"estimate_advantage": reading_config}),
    (
        "result.estimate_advantage",
        "returned shape (23,), expected [rows, tokens]",
        {"estimate_advantage": lambda self, batch: batch.scores},
    ),
    (
        "result.estimate_advantage",
        "returned a list, expected a tensor",
        {"estimate_advantage": lambda self, batch: [1.0]},
    ),
    (
        "result.policy_loss",
        "policy_loss returned shape ()",
        {"policy_loss": lambda self, tokens: surrogate(tokens).sum()},
    ),
    (
        "result.loss_terms",
        "loss_terms 'a' returned shape ()",
        {"loss_terms": lambda self, tokens: {"a": tokens.log_probs.sum()}},
    ),
    (
        "result.loss_terms",
        "returned a Tensor, expected a dict of terms by name",
        {"loss_terms": lambda self, tokens: tokens.log_probs},
    ),
    (
        "result.select_prompts",
        "returned 1 distinct prompt ids; 6 are asked",
        {"select_prompts": lambda self, count: [3] * count},
    ),
    (
        "result.select_prompts",
        "outside the 48 rows of the dataset",
        {"select_prompts": lambda self, count: range(43, 43 + count)},
    ),
    ("result.prepare_prompts", "'hint' was set on 2 of 6 prompts", {"prepare_prompts": half_the_prompts}),
    ("runs.rollout_group", "gives no rollouts", {"rollout_group": nothing}),
    ("result.score_answer", "returned a bool, expected a Verdict", {"score_answer": lambda self, answer: True}),
    ("result.score_answer", "the score nan", {"score_answer": lambda self, answer: Verdict(float("nan"), False)}),
    ("result.optimizer_step", "returned a str, expected the norm", {"optimizer_step": lambda self, actor: "x"}),
    (
        "result.shape_logits",
        "expected that of the logits",
        {"shape_logits": lambda self, logits: logits[..., :-1]},
    ),
    (
        "runs.optimizer_step",
        "declare logits in needs",
        {"optimizer_step": Hook(asking_for_logits, wrapper=True)},
    ),
    # results
    (
        "result.shape_logits",
        "logits that are not finite",
        {"shape_logits": lambda self, logits: logits.log()},
    ),
    (
        "result.estimate_advantage",
        "estimate_advantage returned nan at token",
        {"estimate_advantage": lambda self, batch: centred(batch) / 0 * 0},
    ),
    (
        "result.estimate_advantage",
        "not 0 outside the response mask",
        {"estimate_advantage": lambda self, batch: centred(batch) + 1},
    ),
    (
        "result.estimate_advantage",
        "returned torch.int64",
        {"estimate_advantage": lambda self, batch: centred(batch).long()},
    ),
    (
        "result.select_prompts",
        "gives 46, which run.in_flight() names",
        {"select_prompts": lambda self, count: range(41, 41 + count)},
    ),
    (
        "result.policy_loss",
        "policy_loss returned inf at token",
        {"policy_loss": lambda self, tokens: surrogate(tokens) + tokens.old_log_probs.abs().pow(-1)},
    ),
    (
        "result.optimizer_step",
        "weights that are not finite",
        {"optimizer_step": lambda self, actor: actor.module.lm_head.weight.data.fill_(float("nan")) is None or 1.0},
    ),
    ("metrics.observe", "logs 'a' as nan", {"observe": lambda self, run: run.log({"a": float("nan")})}),
    (
        "metrics.policy_loss",
        "logs 'a' as 'high'",
        {"policy_loss": lambda self, tokens: tokens.log({"a": "high"}) or surrogate(tokens)},
    ),
    (
        "metrics.policy_loss",
        "logged with reduce='median'",
        {"policy_loss": lambda self, tokens: tokens.log({"a": 1.0}, "median") or surrogate(tokens)},
    ),
    (
        "gradient.shape_logits",
        "no gradient reaches the policy",
        {"shape_logits": lambda self, logits: logits.detach()},
    ),
    (
        "gradient.shape_logits",
        "that depends on logits outside the response mask",
        {"shape_logits": leaning_on_the_token_before},
    ),
    (
        "gradient.distillation_loss",
        "no gradient reaches the policy",
        {"distillation_loss": lambda self, distilled: distilled.logits().detach()[:, 0] + distilled.weight.sum() * 0},
    ),
    (
        "result.distillation_loss",
        "expected [tokens]",
        {"distillation_loss": lambda self, distilled: distilled.logits()},
    ),
    (
        "in_place.distillation_loss",
        "changes teacher_log_probs in place",
        {
            "distillation_loss": lambda self, distilled: (
                distilled.logits()[:, 0] * distilled.teacher_log_probs.exp_().sum(1)
            )
        },
    ),
    (
        "micro_batches.distillation_loss",
        "one micro-batch instead of two",
        {"distillation_loss": lambda self, distilled: distilled.logits()[:, 0] * len(distilled.hidden)},
    ),
    (
        "gradient.policy_loss",
        "no gradient reaches the policy",
        {"policy_loss": lambda self, tokens: surrogate(tokens).detach()},
    ),
    (
        "gradient.loss_terms",
        "the term 'a' with a gradient by log_probs that is not finite",
        {"loss_terms": lambda self, tokens: {"a": (tokens.log_probs * 0).sqrt()}},
    ),
    # randomness
    (
        "global_rng.estimate_advantage",
        "global generator of torch",
        {"estimate_advantage": drawing(lambda: torch.rand(1))},
    ),
    (
        "global_rng.estimate_advantage",
        "global generator of numpy",
        {"estimate_advantage": drawing(lambda: np.random.rand())},
    ),
    (
        "global_rng.score_answer",
        "global generator of random",
        {"score_answer": lambda self, answer: __import__("random").random() and None},
    ),
    (
        "repeat.estimate_advantage",
        "when the same run is made again",
        {"estimate_advantage": lambda self, batch: centred(batch) * np.random.default_rng().random()},
    ),
    # inputs
    ("in_place.estimate_advantage", "changes batch.scores in place", {"estimate_advantage": scaling_in_place}),
    (
        "in_place.observe",
        "changes batch.response_mask in place",
        {"observe": lambda self, batch: list(batch.response_mask.fill_(True))},
    ),
    (
        "in_place.observe",
        "changes batch.advantages in place",
        {"observe": lambda self, batch: list(batch.advantages.zero_())},
    ),
    (
        "in_place.policy_loss",
        "changes tokens.old_log_probs in place",
        {"policy_loss": lambda self, tokens: surrogate(tokens) * tokens.old_log_probs.mul_(1.1)},
    ),
    (
        "in_place.shape_logits",
        "changes logits in place",
        {"shape_logits": lambda self, logits: logits.add_(1)},
    ),
    # laws
    (
        "micro_batches.shape_logits",
        "one micro-batch instead of two",
        {"shape_logits": lambda self, logits: logits * logits.detach().flatten(1).any(1).sum()},
    ),
    ("processes.policy_loss", "in training each has its own", {"observe": remember, "policy_loss": through_the_object}),
    ("row_order.estimate_advantage", "the advantage of row", {"estimate_advantage": by_position}),
    (
        "row_order.select_rows",
        "the mark for dropping row",
        {"select_rows": lambda self, batch: batch.drop(torch.arange(len(batch)) < 2)},
    ),
    (
        "padding.estimate_advantage",
        "with more padding",
        {"estimate_advantage": lambda self, batch: centred(batch) / batch.response_mask.shape[1]},
    ),
    (
        "padding.estimate_advantage",
        "with more padding",
        {"estimate_advantage": lambda self, batch: centred(batch) * batch.old_log_probs.sum(1, keepdim=True)},
    ),
    (
        "padding.policy_loss",
        "which holds padding rows only",
        {
            "policy_loss": lambda self, tokens: (
                surrogate(tokens) / tokens.response_mask.sum() ** 0.0 + 0 / tokens.response_mask.any().float()
            )
        },
    ),
    (
        "micro_batches.policy_loss",
        "one micro-batch instead of two",
        {"policy_loss": lambda self, tokens: surrogate(tokens) * tokens.response_mask.sum()},
    ),
    (
        "lonely_group.estimate_advantage",
        ", when all but one response of a group have failed",
        {"estimate_advantage": unbiased},
    ),
    # state
    ("state.estimate_advantage", "in step 3", {"estimate_advantage": counting}),
    (
        "state.estimate_advantage",
        "after a resume from step 2",
        {"estimate_advantage": counting, "state_dict": lambda self: {}},
    ),
    (
        "state",
        "cannot be saved: StateError: state driver/broken/calls: set",
        {"estimate_advantage": counting, "state_dict": lambda self: {"calls": {1}}},
    ),
    (
        "state",
        "'calls' of the driver is not restored by load_state_dict",
        {"estimate_advantage": counting, "state_dict": keep},
    ),
    (
        "state",
        "cannot be loaded: KeyError: 'count'",
        {"estimate_advantage": counting, "state_dict": keep, "load_state_dict": lambda self, state: state["count"]},
    ),
]


@pytest.mark.parametrize(
    ("name", "part", "members"), UNSOUND, ids=[f"{i}-{name}" for i, (name, *_) in enumerate(UNSOUND)]
)
def test_an_unsound_plugin_is_found_out(name: str, part: str, members: dict[str, Any], sentence: Callable) -> None:
    with pytest.raises(PluginCheckError) as error:
        check_plugin(broken(**dict(members)))
    faults = {fault.name: fault.text for fault in error.value.faults}
    assert set(faults) == {name}, error.value
    sentence(faults[name].replace("verl<0.", "verl<0"), part.replace("verl<0.", "verl<0"))
    assert f"  {name}: {faults[name]}" in str(error.value).splitlines()


def since_the_last(self, tokens):
    """A baseline that a rank keeps from one micro-batch to the next."""
    before, self.last = getattr(self, "last", 0.0), float(tokens.advantages.mean())
    return surrogate(tokens) * (1 + (before if tokens.micro_batch else 0.0))


def in_the_second(self, tokens):
    """A metric that every rank but the first logs, and counts by where a micro-batch is."""
    if tokens.micro_batch:
        tokens.log({"late": float(tokens.advantages.mean())})
    return surrogate(tokens)


def test_what_a_rank_keeps_between_micro_batches_is_found_out() -> None:
    with pytest.raises(PluginCheckError) as error:
        check_plugin(broken(policy_loss=since_the_last))
    assert "ranks.policy_loss" in {fault.name for fault in error.value.faults}
    assert "spread over two ranks" in str(error.value)


def test_metrics_may_be_logged_by_one_rank_only() -> None:
    check_plugin(broken(policy_loss=in_the_second))


def test_the_traceback_of_what_the_plugin_raised_is_the_cause() -> None:
    def shape_rewards(self, batch):
        batch.rewards = batch.scores / 0

    with pytest.raises(
        PluginCheckError, match=r"runs.shape_rewards: raises DataError: rewards: .*test_testing.py:\d+"
    ) as error:
        check_plugin(broken(shape_rewards=shape_rewards))
    assert isinstance(error.value.__cause__, DataError)
    frames = traceback.extract_tb(error.value.__cause__.__traceback__)
    assert shape_rewards.__code__.co_firstlineno + 1 in [frame.lineno for frame in frames if frame.filename == __file__]


def test_all_broken_laws_are_listed() -> None:
    plugin = broken(observe=remember, policy_loss=through_the_object, estimate_advantage=by_position)
    with pytest.raises(PluginCheckError, match=r"^plugin 'broken' breaks 2 laws") as error:
        check_plugin(plugin)
    assert {fault.name for fault in error.value.faults} == {"processes.policy_loss", "row_order.estimate_advantage"}


class TestNames:
    """A plugin can be given by the name of its entry point, which must be its own."""

    def test_installed(self, site) -> None:
        site.plugin("fine", "@hookimpl\ndef observe(self, batch): pass")
        check_plugin("fine")

    def test_not_installed(self) -> None:
        with pytest.raises(PluginCheckError, match="name: plugin 'vadee' is not installed; did you mean 'vade'?"):
            check_plugin("vadee")

    def test_entry_point_of_another_name(self, site) -> None:
        site.plugin("one", "@hookimpl\ndef observe(self, batch): pass")
        site.distribution("acme", other="acme_one:Method")
        from acme_one import Method

        for plugin in (Method, "other"):
            with pytest.raises(PluginCheckError, match=r"name: .*'one'.*'other'|name: .*'other'.*'one'"):
                check_plugin(plugin)

    def test_no_idea(self, site) -> None:
        site.plugin("mute", "@hookimpl\ndef observe(self, batch): pass", idea="")
        with pytest.raises(PluginCheckError, match="name: neither module nor class has a docstring"):
            check_plugin("mute")

    def test_not_a_plugin(self) -> None:
        with pytest.raises(PluginCheckError, match="is not a subclass of Plugin"):
            check_plugin(dict)


class TestExceptions:
    """A law is broken on purpose only with a reason, and only as long as it is broken."""

    NAME = "row_order.estimate_advantage"

    def test_excused(self) -> None:
        check_plugin(broken(estimate_advantage=by_position), except_for={self.NAME: "rows are sorted by length before"})

    @pytest.mark.parametrize(
        ("name", "reason", "text"),
        [
            ("row_ordre.observe", "why", "'row_ordre.observe' is not a law; did you mean 'row_order'?"),
            ("row_order.observe", "why", "'row_order.observe' is kept; leave the exception out"),
            (NAME, " ", f"'{NAME}' has no reason; say why the method breaks this law"),
        ],
    )
    def test_refused(self, name: str, reason: str, text: str) -> None:
        excused = {self.NAME: "sorted by length"} | {name: reason}
        with pytest.raises(PluginCheckError) as error:
            check_plugin(broken(estimate_advantage=by_position), except_for=excused)
        assert [fault.text for fault in error.value.faults] == [text]

    def test_only_that_law_is_excused(self) -> None:
        members = {"estimate_advantage": by_position, "observe": lambda self, run: run.log({"a": np.inf})}
        with pytest.raises(PluginCheckError) as error:
            check_plugin(broken(**members), except_for={self.NAME: "sorted by length"})
        assert [fault.name for fault in error.value.faults] == ["metrics.observe"]


class TestGolden:
    """Recorded cases are replayed with the author's function, and nothing in them is overlooked."""

    CASE = {
        "name": "one",
        "inputs": {"x": [1.0, 2.0]},
        "params": {"k": 3},
        "expected": {"y": [3.0, 6.0]},
        "rtol": 1e-6,
        "atol": 0,
    }

    @staticmethod
    def replay(case, expected):
        return {"y": case.param("k") * case.tensor("x")}

    def check(self, tmp_path, replay=None, **changes) -> None:
        file = tmp_path / "golden.json"
        file.write_text(json.dumps({"id": "broken", "produced_by": "hand", "cases": [{**self.CASE, **changes}]}))
        check_plugin(broken(observe=lambda self, batch: None), golden=file, replay=replay or self.replay)

    def test_equal(self, tmp_path) -> None:
        self.check(tmp_path)

    @pytest.mark.parametrize(
        ("changes", "text"),
        [
            ({"expected": {"y": [3.0, 7.0]}}, "y[1] is 6 instead of 7 (1 of 2 values differ)"),
            ({"expected": {"y": [[3.0, 6.0]]}}, "y has shape (2,) instead of (1, 2)"),
            ({"expected": {"y": [3.0, 6.0], "z": 1}}, "the replay computes nothing called 'z'"),
            ({"expected": {"y": {"a": 3.0}}}, "y has no entry 'a'"),
            ({"expected": {"y": [3.0, [6.0, 6.0]]}}, "y.1 has shape () instead of (2,)"),
            ({"expected": {"y": {}}}, "y has an entry 0 too many; y has an entry 1 too many"),
            ({"inputs": {"x": [1.0, 2.0], "w": 1}}, "the replay does not read input 'w'"),
            ({"params": {"k": 3, "j": 1}}, "the replay does not read parameter 'j'"),
            ({"params": {}}, "the replay raises AssertionError: the case has no parameter 'k'"),
        ],
    )
    def test_different(self, tmp_path, changes, text) -> None:
        with pytest.raises(PluginCheckError) as error:
            self.check(tmp_path, **changes)
        assert [(fault.name, fault.text) for fault in error.value.faults] == [("golden.one", text)]

    def test_text(self, tmp_path) -> None:
        def replay(case, expected):
            return {"y": [case.input("x") and case.param("k") and "a"]}

        self.check(tmp_path, replay, expected={"y": ["a"]})
        with pytest.raises(PluginCheckError, match=r"y is \['a'\] instead of \['b'\]"):
            self.check(tmp_path, replay, expected={"y": ["b"]})

    def test_files(self, tmp_path) -> None:
        (tmp_path / "empty.json").write_text('{"id": "broken", "cases": []}')
        plugin = broken(observe=lambda self, batch: None)
        for file, text in (("none.json", "cannot be read: FileNotFoundError"), ("empty.json", "has no cases")):
            with pytest.raises(PluginCheckError, match=text):
                check_plugin(plugin, golden=tmp_path / file, replay=self.replay)
        with pytest.raises(ValueError, match="together"):
            check_plugin(plugin, golden=tmp_path / "empty.json")
