"""The training that `check_plugin` invents: prompts, responses, rewards, and what a policy would say of them.

Every batch has a group that is all wrong, one that is all right, mixed ones, one with a response missing, one response
cut off by its budget, and one with a token that the policy did not generate (as tool output is).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from omegaconf import DictConfig, OmegaConf, open_dict
from torch import Tensor

from verl_plugins.composition.compose import changeable, verl_config
from verl_plugins.services import Answer, Prompt, Rollout, Verdict
from verl_plugins.testing.fakes import FakeTokenizer
from verl_plugins.testing.table import Table, pad, uids

TOKENIZER = FakeTokenizer()
POLICY_FIELDS = ("old_log_probs", "entropy", "prompt_log_probs", "rollout_log_probs", "ref_log_probs")
POLICY_FIELDS += ("sum_pi_squared", "top2_gap")
"""As `needs` calls them; all but the first are in a batch only if the plugin needs them."""


def stored_as(need: str) -> str:
    """The queue's name of a field that `needs` names."""
    return "ref_log_prob" if need == "ref_log_probs" else need


@dataclass(frozen=True)
class Scenario:
    """What a plugin is checked with; change what your method must have otherwise."""

    prompts: int = 6
    """Prompts per step, at least 4."""
    group_size: int = 4
    """Responses per prompt."""
    tokens: int = 12
    """Response budget, at least 4."""
    scores: tuple[float, float] = (0.0, 1.0)
    """Scores of a wrong and of a right response."""
    columns: Mapping[str, Callable[[int], Any]] = field(default_factory=dict)
    """Further columns of the dataset: name -> function of the prompt id."""
    overrides: Mapping[str, Any] = field(default_factory=dict)
    """Settings of verl by dotted key, in the place of its defaults."""
    seed: int = 0

    def __post_init__(self) -> None:
        if self.prompts < 4 or self.group_size < 1 or self.tokens < 4:
            raise ValueError(
                f"a scenario has at least 4 prompts, 1 response per prompt and 4 tokens, this one {self.prompts}, "
                f"{self.group_size} and {self.tokens}"
            )

    def config(self, plugins: Mapping[str, Any]) -> DictConfig:
        """verl's own configuration with the sizes and overrides of this scenario and a section `plugins`, read-only."""
        config = changeable(verl_config())
        sizes = {
            "data.train_batch_size": self.prompts,
            "data.max_response_length": self.tokens,
            "data.seed": self.seed,
            "actor_rollout_ref.rollout.n": self.group_size,
            "actor_rollout_ref.actor.ppo_mini_batch_size": self.prompts // 2,
            "actor_rollout_ref.actor.use_dynamic_bsz": True,
        }
        with open_dict(config):
            for key, value in {**sizes, **self.overrides}.items():
                OmegaConf.update(config, key, value, force_add=True)
            config.plugins = dict(plugins)
            config.actor_rollout_ref.actor.global_batch_info = {"dp_size": 1, "loss_scale_factor": None}
        OmegaConf.set_readonly(config, True)
        of_mini_batch = config.actor_rollout_ref.actor.global_batch_info  # filled in for each
        OmegaConf.set_readonly(of_mini_batch, False)
        OmegaConf.set_struct(of_mini_batch, False)
        return config


class Questions:
    """The dataset: sums with an answer, and the scenario's columns."""

    fingerprint = "sums"

    def __init__(self, scenario: Scenario) -> None:
        self._scenario = scenario

    def __len__(self) -> int:
        return 8 * self._scenario.prompts

    def __getitem__(self, prompt_id: int) -> dict[str, Any]:
        prompt_id = int(prompt_id)
        return {
            "raw_prompt": [{"role": "user", "content": f"What is {prompt_id}+7?"}],
            "data_source": "sums",
            "reward_model": {"style": "rule", "ground_truth": str(prompt_id + 7)},
            "extra_info": {"index": prompt_id},
            **{name: column(prompt_id) for name, column in self._scenario.columns.items()},
        }


@dataclass(frozen=True)
class Change:
    """What a law says does not matter."""

    shuffle: bool = False
    """Rows come in another order."""
    pad: bool = False
    """More padding, other values at tokens the policy did not generate, and micro-batches filled up."""
    split: bool = False
    """Each mini-batch in one micro-batch instead of two."""
    ranks: int = 1
    """Actor workers over which micro-batches are spread."""
    lonely: bool = False
    """All responses but one of the last group failed; that one, which is right, has nothing to compare with."""


class World:
    """Answers and rewards of one scenario; every number is a function of (seed, step, prompt, response)."""

    def __init__(self, scenario: Scenario) -> None:
        self.scenario = scenario
        self.dataset = Questions(scenario)

    def rng(self, *key: int) -> np.random.Generator:
        return np.random.default_rng([self.scenario.seed, *key])

    def default_choice(self, step: int, count: int) -> list[int]:
        """What is asked where no plugin chooses."""
        return self.rng(step).choice(len(self.dataset), count, replace=False).tolist()

    def respond(
        self,
        prompt: Prompt,
        place: int,
        step: int,
        number: int,
        budget: int,
        score: Callable[[Answer], Verdict | None],
        prefix: list[int],
    ) -> Rollout:
        """Response `number` to the prompt at `place` of the step, of at most `budget` tokens after the prefix."""
        size = self.scenario.group_size
        rng = self.rng(step, prompt.id, number)
        right = place != 0 and (place == 1 or number % size < 1 + place % max(size - 1, 1))
        truth = prompt.row["reward_model"]["ground_truth"]
        text = " " * int(rng.integers(0, 4)) + (truth if right else str(int(truth) + 1 + number % 2))
        ids = [*TOKENIZER(text)["input_ids"], TOKENIZER.eos_token_id]
        if place == 2 and number == size - 1:  # never ends
            right, ids = False, TOKENIZER("1" * budget)["input_ids"]
        ids = prefix + ids[:budget]
        answer = Answer(TOKENIZER.decode(ids), truth, prompt.row["data_source"], dict(prompt.row["extra_info"]))
        verdict = score(answer) or Verdict(self.scenario.scores[right], right, {"answer": answer.text.strip()})
        info = {**verdict.parts, "score": float(verdict.score), "acc": float(verdict.correct)}
        mask = [0] * len(prefix) + [1] * (len(ids) - len(prefix))
        if place == 3 and number == 0 and len(ids) > 1:
            mask[0] = 0
        said = self._said(step, prompt.id, number, len(ids)) + self.rng(step, prompt.id, number, 2).normal(
            0, 0.01, len(ids)
        )
        return Rollout(
            text=answer.text,
            response_ids=ids,
            score=float(verdict.score),
            correct=bool(verdict.correct),
            truncated=ids[-1] != TOKENIZER.eos_token_id and len(ids) == len(prefix) + budget,
            info=info,
            outputs={"prompt": prompt, "mask": mask, "number": number},
            log_probs=[value * here for value, here in zip(said.tolist(), mask, strict=True)],
            mask=mask,
        )

    def _said(self, step: int, prompt: int, number: int, size: int) -> np.ndarray:
        """[size] log-probs of a response's tokens under the policy before the update."""
        return -self.rng(step, prompt, number, 1).exponential(1.0, size)

    def table(self, step: int, groups: Sequence[Sequence[Rollout]]) -> Table:
        """The scored rows of a step in the trainer's order: sorted by key. A group of which all failed has none."""
        pieces = {
            f"{rollout.outputs['prompt'].id}-{step}-{place}_{session}_{turn}": piece
            for place, group in enumerate(groups)
            for session, rollout in enumerate(group)
            for turn, piece in enumerate(_pieces(rollout))
        }
        keys = sorted(pieces)
        rows = [pieces[key] for key in keys]
        prompts = [piece.of.outputs["prompt"] for piece in rows]
        questions = [
            torch.tensor(TOKENIZER.apply_chat_template(prompt.messages) + piece.before)
            for prompt, piece in zip(prompts, rows, strict=True)
        ]
        ids = [torch.tensor(piece.ids) for piece in rows]
        rewards = [torch.zeros(len(row)) for row in ids]
        for row, piece in zip(rewards, rows, strict=True):
            row[-1] = piece.of.score
        columns = {
            "uid": uids(keys),
            "responses": pad(ids),
            "response_mask": pad([torch.tensor(piece.cut(piece.rollout.outputs["mask"], [0])) for piece in rows]),
            "response_lengths": torch.tensor([len(row) for row in ids]),
            "prompts": pad(questions),
            "prompt_lengths": torch.tensor([len(row) for row in questions]),
            "rm_scores": pad(rewards),
            "verdict": torch.tensor([float(piece.of.correct) for piece in rows]),
            "extra_fields": [{"reward_extra_info": piece.of.info, **piece.of.fields, **piece.fields} for piece in rows],
        }
        if any(piece.of.segments for piece in rows):
            columns["__offset__"] = torch.tensor([piece.start for piece in rows])
            columns["__truncated__"] = torch.tensor([piece.of.truncated for piece in rows])
        names = {name for prompt in prompts for name in prompt.row if name != "__rollout_n__"}
        columns |= {name: [prompt.row.get(name) for prompt in prompts] for name in sorted(names)}
        return Table(keys, columns | self._policy(step, rows, columns["prompt_lengths"]))

    def _policy(self, step: int, rows: Sequence[_Piece], prompt_lengths: Tensor) -> dict[str, Tensor]:
        """What a policy, and a reference, would say of the responses; `log_probs` is the policy after some updates."""
        found: dict[str, list[Tensor]] = {}
        for piece, prompt_length in zip(rows, prompt_lengths.tolist(), strict=True):
            rollout = piece.rollout
            size, place = len(rollout.response_ids), (rollout.outputs["prompt"].id, rollout.outputs["number"])
            old, rng = self._said(step, *place, size), self.rng(step, *place, 3)
            values = {
                "old_log_probs": old,
                "log_probs": np.minimum(old + rng.normal(0, 0.3, size), -1e-3),
                "entropy": rng.uniform(0.05, 2.0, size),
                "current_entropy": rng.uniform(0.05, 2.0, size),
                "sum_pi_squared": np.exp(2 * np.asarray(old)) + rng.uniform(0.0, 0.1, size),
                "rollout_log_probs": rollout.log_probs,
                "ref_log_prob": np.minimum(old + rng.normal(0, 0.5, size), -1e-3),
                "top2_gap": self.rng(step, *place, 4).exponential(1.0, size),
            }
            values = {name: piece.cut(list(value), [0.0]) for name, value in values.items()}
            values["prompt_log_probs"] = -rng.exponential(1.0, prompt_length - 1)
            for name, value in values.items():
                found.setdefault(name, []).append(torch.tensor(value, dtype=torch.float32))
        return {name: pad(rows) for name, rows in found.items()}


@dataclass(frozen=True)
class _Piece:
    """The tokens of a row: those of `rollout` from `start` to `end`, published for the response `of`."""

    of: Rollout
    rollout: Rollout
    start: int
    end: int
    fields: Mapping[str, Any]

    @property
    def before(self) -> list[int]:
        return self.rollout.response_ids[: self.start]

    @property
    def ids(self) -> list[int]:
        return self.cut(self.rollout.response_ids, [TOKENIZER.eos_token_id])

    def cut(self, values: Sequence[Any], otherwise: list[Any]) -> list[Any]:
        """One value per token; an empty row has one token that the policy did not generate."""
        return list(values[self.start : self.end]) or otherwise


def _pieces(rollout: Rollout) -> list[_Piece]:
    """The rows of a response."""
    whole = _Piece(rollout, rollout, 0, len(rollout.response_ids), {})
    return [_Piece(rollout, part.rollout, part.start, part.end, part.fields) for part in rollout.segments] or [whole]
