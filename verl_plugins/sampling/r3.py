"""R3: where a whole group is right, or wrong, old answers of the other kind join it; failures are shown and ranked.

arXiv:2601.19620 (no code was published). Three parts, in the order of a step:

    reflect  a prompt that was mostly wrong so far (mean outcome below tau) is asked a second time, with a failed answer
             of its own and an instruction to find the error; this is a group of its own
    replay   an all wrong group gets up to k stored right answers of its prompt, an all right one k stored wrong ones
    rank     truncated answers of an all wrong group are paid r_max (1 - place/(N-1)) by structural entropy: i dominates
             j if its peak entropy is higher and its mean entropy lower, and who dominates more stands before the others

    R = 1 + max(0, 1 - length/l_max) if right, else 0 or what the ranking pays
    A = (R - mean) / (alpha std + lambda) over group and replayed answers; alpha = 1 in groups without any

Against GRPO: the reward's length term, alpha, and the three parts. Groups are judged by correctness, since length and
ranking make equal outcomes unequal. A step is stored after it has been served, so that it never replays itself.

Ours, where the paper is silent: all settings but l_max; ties share the mean of their rungs; replayed answers take the
prompt of the group they join, and log-probs of the current policy (`old_log_probs: stored`: of the policy that wrote
them); by default they replace as many answers of the group, drawn at random, so that the batch keeps its size, and a
second draw takes the place of another prompt. The mean outcome counts all answers ever seen, not only those stored.

Degenerate cases: nothing stored, the group stays as it is; one ranked answer gets 0; so does a single answer
with none replayed beside it.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from string import Template
from typing import Any

import numpy as np
import torch
import yaml
from omegaconf import DictConfig, OmegaConf
from torch import Tensor

from verl_plugins import (
    Batch,
    CompositionError,
    Groups,
    Plugin,
    Prompt,
    Prompts,
    Run,
    StateError,
    Tokens,
    hookimpl,
    setting,
)
from verl_plugins.replay import Entry, ReplayStore
from verl_plugins.reward.structural_entropy import dominance, ranking_reward, structural_entropy
from verl_plugins.sampling.prompt_augmentation import prompt_tokens
from verl_plugins.sampling.vade import count_outcomes

REPLAYED, REFLECTIVE = "r3_replayed", "r3_reflective"
WORDING = Path(__file__).with_suffix(".yaml")
ELLIPSIS = " … "
LEAST_SHOWN = 8
"""Tokens of a failed answer that must fit into the prompt to be worth showing."""


def outcome_reward(correct: Tensor, lengths: Tensor, l_max: int) -> Tensor:
    """[B] verdicts and lengths in tokens -> R = 1 + max(0, 1 - length/l_max) of right answers, 0 of wrong ones."""
    return correct.float() * (2 - lengths.float() / l_max).clamp(min=1)


def mixed_advantage(
    scores: Tensor, replayed: Tensor, groups: Groups, alpha: float, epsilon: float, scope: str = "group"
) -> Tensor:
    """[B] scores -> (R - mean) / (alpha std + epsilon), alpha only in groups (or rows: scope) with replayed answers.

    Args:
        scores: [B] rewards of answers, replayed ones with their stored reward.
        replayed: [B] bool.
        groups: answers of one draw together with those replayed for it; a group of one gets 0.
    """
    mean, std = groups.moments(scores)
    damped = groups.any(replayed) if scope == "group" else replayed
    return (scores - mean) / (torch.where(damped, alpha * std, std) + epsilon)


def is_hard(right: np.ndarray, seen: np.ndarray, tau: float, epoch: int) -> np.ndarray:
    """[N] right and all outcomes so far -> bool: mean below tau, something failed, and not in the first epoch."""
    return (right < seen) & (right / np.maximum(seen, 1) < tau) & (epoch >= 2)


def collapsed(correct: Tensor, groups: Groups) -> tuple[Tensor, Tensor]:
    """[B] verdicts -> [B] bool each: rows of all wrong groups, rows of all right ones."""
    return ~groups.any(correct), groups.all(correct)


def ranking_set(batch: Batch, which: str) -> Tensor:
    """[B] bool: responses of all wrong groups, neither replayed nor empty: the truncated ones, or all_failed."""
    own = batch.is_last & ~batch.is_added
    wrong, _ = collapsed(batch.correct, Groups(batch.uid, counted=own))
    ranked = wrong & own & batch.response_mask.any(1)
    return ranked & batch.truncated if which == "truncated" else ranked


def read_instruction(path: Path) -> Template:
    """The text `instruction` of a YAML file, which may name $problem.

    Raises:
        CompositionError: if the file has no such text, or names something else.
    """
    texts = yaml.safe_load(path.read_text(encoding="utf-8")) if path.is_file() else None
    template = Template(str(texts.get("instruction", ""))) if isinstance(texts, dict) else Template("")
    names = {
        match["named"] or match["braced"] or match["invalid"] for match in template.pattern.finditer(template.template)
    }
    if not template.template or not names <= {"problem", None}:
        raise CompositionError(
            f"plugins.r3.wording={str(path)!r} must be a YAML file with a text `instruction`, where $problem may stand"
        )
    return template


class R3(Plugin):
    """Replay, reflection and ranking rewards on GRPO's advantage."""

    name = "r3"
    paper = "arXiv:2601.19620"
    needs = frozenset({"entropy", "rollout_log_probs"})

    @dataclass
    class Config:
        l_max: int = setting(32768, "length in tokens from which a right answer gets no bonus", authors=32768, ge=1)
        replay: int = setting(2, "k, stored answers that join a collapsed group; 0: none", ge=0)
        strategy: str = setting("recent", "which of the stored ones", choices=("recent", "random"))
        mix: str = setting(
            "replace", "they replace answers of the group, or are appended", choices=("replace", "append")
        )
        capacity: int = setting(4, "answers kept per prompt and outcome", ge=1)
        old_log_probs: str = setting(
            "current", "of replayed answers: current policy, or stored", choices=("current", "stored")
        )
        alpha: float = setting(1.0, "factor on the std of groups with replayed answers", gt=0)
        alpha_scope: str = setting(
            "group", "alpha for the whole group, or replayed answers", choices=("group", "replay_rows")
        )
        epsilon: float = setting(1e-6, "lambda, added to the std", gt=0)
        tau: float = setting(0.25, "prompts with a lower mean outcome are reflected on", ge=0, le=1)
        reflect_share: float = setting(0.25, "largest share of a draw that is reflection; 0: none", ge=0, le=0.5)
        top_ratio: float = setting(0.2, "p, share of a response's tokens that make its peak entropy", gt=0, le=1)
        r_max: float = setting(0.5, "reward of the best ranked failure; 0: no ranking", ge=0, lt=1)
        rank_set: str = setting("truncated", "failures that are ranked", choices=("truncated", "all_failed"))
        ties: str = setting("average", "equal ranks share their rungs, or go by row", choices=("average", "stable"))
        wording: str | None = setting(None, "YAML file with the instruction to reflect; default: ours")
        singleton: str = setting("zero", "reward of an only ranked failure", choices=("zero", "max"))

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.instruction = read_instruction(Path(config.wording) if config.wording else WORDING)
        self.store = ReplayStore(config.capacity)
        self.right = self.seen = np.zeros(0)
        """[N] outcomes of every prompt so far; sized on first use."""

    def check(self, config: DictConfig) -> None:
        rollout = config.actor_rollout_ref.rollout
        if OmegaConf.select(config, "algorithm.filter_groups.enable"):
            raise CompositionError(
                "plugins.r3 mends the groups that algorithm.filter_groups throws away; set "
                "algorithm.filter_groups.enable=false"
            )
        if OmegaConf.select(config, "algorithm.use_kl_in_reward"):
            raise CompositionError(
                "plugins.r3 stores rewards, in which a step's algorithm.use_kl_in_reward=true would stay; set it to "
                "false and actor_rollout_ref.actor.use_kl_loss=true"
            )
        if OmegaConf.select(config, "distillation.enabled"):
            raise CompositionError(
                "plugins.r3 replays answers, for which there are no log-probs of a teacher; set "
                "distillation.enabled=false"
            )
        if self.config.mix == "replace" and self.config.replay >= rollout.n:
            raise CompositionError(
                f"plugins.r3.replay={self.config.replay} would replace whole groups of "
                f"actor_rollout_ref.rollout.n={rollout.n}; it must be smaller, or plugins.r3.mix=append"
            )

    # Reflection

    @hookimpl
    def prepare_prompts(self, run: Run, prompts: Prompts) -> None:
        self._prepare(len(run.dataset))
        for prompt in prompts:
            prompt.row[REFLECTIVE] = 0.0
        ids, rng = np.array([prompt.id for prompt in prompts]), run.rng("reflect")
        # As verl's loader counts, which leaves out the rest of an epoch that does not fill a batch.
        epoch = 1 + (run.step - 1) // max(1, len(run.dataset) // run.config.data.train_batch_size)
        hard = is_hard(self.right[ids], self.seen[ids], self.config.tau, epoch)
        asked, easy = rng.permutation(np.flatnonzero(hard)), rng.permutation(np.flatnonzero(~hard))
        count = int(self.config.reflect_share * len(ids))
        wishes, found = self.store.pick(ids[asked], np.zeros(len(asked), bool), np.ones(len(asked)), rng)
        numbers = self.store.facts["number"][found]
        shown = {
            place: self._shown(run, prompts[place], number)
            for place, number in zip(asked[wishes].tolist(), numbers.tolist(), strict=True)
        }
        fitting = [place for place, messages in shown.items() if messages is not None][:count]
        others = [*easy.tolist(), *asked[~np.isin(asked, fitting)].tolist()]
        for place, instead_of in zip(fitting, others[: len(fitting)], strict=True):
            second = prompts.repeat(place, instead_of)
            second.messages, second.row[REFLECTIVE] = shown[place], 1.0
        too_long = sum(messages is None for messages in shown.values())
        run.log({"isr_prompts": len(fitting), "isr_hard": int(hard.sum()), "isr_too_long": too_long})

    def _shown(self, run: Run, prompt: Prompt, number: int) -> list[dict[str, str]] | None:
        """The prompt, a failed answer, cut in the middle to what fits, and the instruction; None if too little fits."""
        failed = run.tokenizer.decode(self.store[number].response.tolist(), skip_special_tokens=True)
        ids = run.tokenizer(failed, add_special_tokens=False)["input_ids"]
        instruction = self.instruction.safe_substitute(problem=prompt.messages[-1]["content"])

        def ask(answer: str) -> list[dict[str, str]]:
            told = [{"role": "assistant", "content": answer}, {"role": "user", "content": instruction}]
            return [*prompt.messages, *told]

        limit = run.config.data.max_prompt_length
        room = limit - prompt_tokens(run, ask(""), prompt.prefill)
        if len(ids) > room:
            room -= len(run.tokenizer(ELLIPSIS, add_special_tokens=False)["input_ids"])
            if room < LEAST_SHOWN:
                return None
            head, tail = run.tokenizer.decode(ids[: room // 2]), run.tokenizer.decode(ids[len(ids) - room // 2 :])
            failed = head + ELLIPSIS + tail
        return ask(failed) if prompt_tokens(run, ask(failed), prompt.prefill) <= limit else None

    # Rewards and replay

    @hookimpl(tryfirst=True)
    def shape_rewards(self, run: Run, batch: Batch) -> None:
        batch.rewards = outcome_reward(batch.correct, batch.ends, self.config.l_max)

    @hookimpl
    def select_rows(self, run: Run, batch: Batch) -> None:
        groups = batch.groups
        wrong, right = collapsed(batch.correct, groups)
        wishes = groups.first(wrong | right).numpy().nonzero()[0]
        wishes = wishes[np.argsort(batch.uid[wishes])]
        limit = np.full(len(wishes), self.config.replay)
        if self.config.mix == "replace":
            limit = np.minimum(limit, groups.count().numpy()[wishes] - 1)
        rng = run.rng("replay")
        drawn = rng if self.config.strategy == "random" else None
        wish, found = self.store.pick(batch.prompt_id.numpy()[wishes], wrong.numpy()[wishes], limit, drawn)
        joined, facts = wishes[wish], {name: values[found].tolist() for name, values in self.store.facts.items()}
        for row, number, reward, correct in zip(
            joined.tolist(), facts["number"], facts["reward"], facts["correct"], strict=True
        ):
            entry = self.store[number]
            batch.add(row, entry.response, reward=reward, correct=correct, rollout_log_probs=entry.log_probs)
        if self.config.mix == "replace":
            chance = torch.empty(len(batch), dtype=torch.float64)
            chance[np.argsort(np.asarray(batch.keys))] = torch.from_numpy(rng.random(len(batch)))
            given = torch.from_numpy(np.bincount(groups.index.numpy()[joined], minlength=len(groups)))
            batch.drop(batch.of_session(groups.rank(chance) < given[groups.index]))
        served = len(np.unique(wish))
        run.log(
            {
                "groups_all_wrong": int(groups.per_group(wrong).sum()),
                "groups_all_right": int(groups.per_group(right).sum()),
                "groups_mixed": int(groups.per_group(~wrong & ~right).sum()),
                "replayed_rows": len(joined),
                "replay_hit_rate": served / len(wishes) if len(wishes) else 0.0,
                "truncated_fraction": float(batch.truncated.float().mean()),
            }
        )
        if len(joined):
            run.log({"replay_age_steps": run.step - float(np.mean(facts["step"]))})

    @hookimpl
    def estimate_advantage(self, run: Run, batch: Batch) -> Tensor:
        scores, replayed = batch.scores, batch.is_added
        if self.config.r_max > 0:
            scores = scores + self._ranked(run, batch)
        config = self.config
        advantage = mixed_advantage(scores, replayed, batch.groups, config.alpha, config.epsilon, config.alpha_scope)
        batch.put(REPLAYED, replayed.float())
        return batch.to_tokens(advantage)

    def _ranked(self, run: Run, batch: Batch) -> Tensor:
        """[B] what the ranking pays."""
        ranked = ranking_set(batch, self.config.rank_set)
        run.log({"serr_ranked": int(ranked.sum())})
        if not ranked.any():
            return torch.zeros(len(batch))
        peak, mean = structural_entropy(batch.entropy[ranked], batch.response_mask[ranked], self.config.top_ratio)
        of_ranked = Groups(batch.uid[ranked.numpy()])
        dominated = dominance(peak, mean, of_ranked)
        paid = torch.zeros(len(batch))
        paid[ranked] = ranking_reward(
            dominated, of_ranked, self.config.r_max, self.config.ties, self.config.singleton
        ).float()
        tied = Groups(np.stack([of_ranked.index, dominated], 1) @ [len(batch) + 1, 1]).count() > 1
        run.log(
            {
                "serr_tie_fraction": float(tied.float().mean()),
                "peak_entropy_mean": float(peak.mean()),
                "global_entropy_mean": float(mean.mean()),
            }
        )
        return batch.of_session(paid)

    # Memory

    @hookimpl
    def observe(self, run: Run, batch: Batch) -> None:
        if self.config.old_log_probs == "stored":
            stored = batch.is_added[:, None] & batch.response_mask
            batch.put("old_log_probs", torch.where(stored, batch.rollout_log_probs, batch.old_log_probs))
        self._prepare(len(run.dataset))
        full = batch.full
        ids, right, n = count_outcomes(full.prompt_id.numpy(), full.correct.numpy(), full.is_last.numpy())
        self.right[ids] += right
        self.seen[ids] += n
        self._store(run, full)
        reflective = torch.as_tensor(full.extra(REFLECTIVE)) > 0
        if reflective.any():
            run.log({"isr_success_rate": float(full.correct[reflective].float().mean())})
        outcomes = self.store.facts["correct"]
        run.log(
            {
                "buffer_right": int(outcomes.sum()),
                "buffer_wrong": int((~outcomes).sum()),
                "buffer_queries": len(np.unique(self.store.facts["prompt_id"])),
            }
        )

    def _store(self, run: Run, batch: Batch) -> None:
        """Keep the answers that are one output, with tokens of the policy only; others cannot be replayed."""
        order = np.argsort(np.asarray(batch.keys))
        whole = (batch.response_mask.sum(1) == batch.lengths) & (batch.lengths > 0)
        single = torch.from_numpy(batch.sessions.count().numpy() == 1)
        rows = order[(whole & single).numpy()[order]]
        log_probs = batch.rollout_log_probs.float()
        entries = [
            Entry(batch.responses[row, :n].numpy().astype(np.int32), log_probs[row, :n].numpy().copy())
            for row, n in zip(rows.tolist(), batch.lengths[rows].tolist(), strict=True)
        ]
        facts = (batch.prompt_id, batch.correct, batch.scores)
        self.store.add(run.step, *(values.numpy()[rows] for values in facts), entries)
        run.log({"not_stored": len(batch) - len(rows)})

    @hookimpl(wrapper=True)
    def policy_loss(self, tokens: Tokens) -> Tensor:
        losses = yield
        replayed = tokens.extra(REPLAYED).bool()[:, None] & tokens.response_mask
        if replayed.any():
            ratio, config = (tokens.log_probs.detach() - tokens.old_log_probs).exp()[replayed], tokens.config
            low = config.clip_ratio if config.clip_ratio_low is None else config.clip_ratio_low
            high = config.clip_ratio if config.clip_ratio_high is None else config.clip_ratio_high
            up = tokens.advantages[replayed] > 0
            clipped = torch.where(up, ratio > 1 + high, ratio < 1 - low)
            tokens.log({"replay_ratio_clipfrac": float(clipped.float().mean())})
        return losses

    # State

    def _prepare(self, prompts: int) -> None:
        if not len(self.seen):
            self.right, self.seen = np.zeros(prompts), np.zeros(prompts)
        if len(self.seen) != prompts:
            raise StateError(f"r3: the saved state has {len(self.seen)} prompts, the dataset {prompts}")

    def state_dict(self) -> dict[str, Any]:
        return {"right": self.right, "seen": self.seen, **self.store.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.right, self.seen = np.array(state["right"], np.float64), np.array(state["seen"], np.float64)
        self.store.load_state_dict(state)
