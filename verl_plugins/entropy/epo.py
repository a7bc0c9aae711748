"""EPO: an entropy bonus over all turns of an agent, and a pull back into a band around each turn's usual entropy.

arXiv:2509.22576. With H the policy's entropy at a token, Hbar(s) the mean entropy of turn s over the steps of the
training so far (each step one number per turn, the current step included), w a schedule:

    L = L_pg - lambda (mean H - beta w mean P)       lambda = verl's actor.entropy_coeff, beta = smooth_coeff
    hinge      P = c (relu(min_ratio Hbar - H) + relu(H - max_ratio Hbar))    ours, the default
    indicator  P = 0 if min_ratio Hbar < H < max_ratio Hbar else c            as published: it has no gradient
    mask_pg    no P; L_pg times c outside the band                            in the authors' code, never called

Against GRPO: verl's entropy bonus, and P where the gate is open: in micro-batches that reach turn `gate_turn`.

As published, P is piecewise constant: it changes the loss that is logged and nothing else, so that the released method
is the entropy bonus. The hinge is what the paper describes. The published history also pads short episodes on the
left, which moves turns and mixes zeros in (`history: left_padded`).

Degenerate cases. Hbar is 0: no penalty at that turn. lambda = 0 turns everything off, as published, and is refused.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from omegaconf import DictConfig
from torch import Tensor

from verl_plugins import Batch, CompositionError, DataError, Plugin, Run, Tokens, hookimpl, setting

REFERENCE, GATE = "epo_reference", "epo_gate"
"""Fields: Hbar at each token [B,T], 0 where it is not defined; w if the row reaches `gate_turn`, else 0 [B]."""


def turn_index(mask: Tensor, session: Tensor, output: Tensor) -> Tensor:
    """[B,T] number of each token's turn: runs of generated tokens, counted on through the outputs of a session.

    `session` and `output` [B] number the sessions and the outputs within them.
    """
    starts = mask.clone()
    starts[:, 1:] &= ~mask[:, :-1]
    order = (session * (output.max() + 1) + output).argsort()
    turns = starts.sum(1).clamp(min=1)[order]
    before = turns.cumsum(0) - turns
    first = torch.empty_like(before)
    first[order] = before - before[torch.searchsorted(session[order], session[order])]
    return (starts.cumsum(1) - 1).clamp(min=0) + first[:, None]


def turn_means(entropy: Tensor, mask: Tensor, turns: Tensor) -> Tensor:
    """[S] float64 mean entropy of each turn's tokens, NaN for a turn without any."""
    total = torch.bincount(turns[mask], weights=entropy[mask].double())
    return total / torch.bincount(turns[mask], minlength=len(total))


def left_padded(means: Tensor, length: int) -> Tensor:
    """The published form of one step's means: the last `length`, with zeros before them."""
    kept = means[-length:]
    return torch.nn.functional.pad(kept, (length - len(kept), 0))


class History:
    """Hbar: per turn, the mean over the steps that reached it."""

    def __init__(self, total: Tensor | None = None, steps: Tensor | None = None) -> None:
        self.total = torch.zeros(0, dtype=torch.float64) if total is None else total
        self.steps = torch.zeros(0, dtype=torch.float64) if steps is None else steps

    def add(self, means: Tensor) -> None:
        """One step's means [S], NaN for a turn that was not reached."""
        longer = max(len(means) - len(self.total), 0)
        self.total, self.steps = (torch.nn.functional.pad(values, (0, longer)) for values in (self.total, self.steps))
        reached = ~means.isnan()
        self.total[: len(means)] += means.nan_to_num(0)
        self.steps[: len(means)] += reached

    def means(self) -> Tensor:
        """[S] float64, 0 for a turn that no step reached."""
        return self.total / self.steps.clamp(min=1)


def phase_weight(step: int, steps: int) -> float:
    """w of the authors' code: 1 to 0.83 in the first half, then 0.77 to 0.04; `step` from 0, the last one is kept."""
    step, half = min(max(step, 0), max(steps, 0)), steps // 2
    if steps <= 0 or step <= half == 0:
        return 1.0
    if step <= half:
        return 1 - 0.2 * (1 - math.exp(-2 * step / half))
    return 0.8 * math.exp(-3 * (step - half) / (steps - half))


def for_the_loss(usual: Tensor, turns: Tensor, mask: Tensor, gate: int, weight: float) -> tuple[Tensor, Tensor]:
    """Hbar of each token's turn, 0 outside the mask [B,T]; w if the row has a token of turn `gate` or later [B]."""
    return usual[turns.clamp(max=len(usual) - 1)] * mask, weight * ((turns >= gate) & mask).any(1)


def outside_by(entropy: Tensor, reference: Tensor, low: float, high: float) -> Tensor:
    """relu(low Hbar - H) + relu(H - high Hbar), 0 where Hbar is 0."""
    # By the distance from the middle of the band: one relu, half of the passes.
    beyond = torch.relu((entropy - (low + high) / 2 * reference).abs() - (high - low) / 2 * reference)
    return beyond * reference.sign()


def outside(entropy: Tensor, reference: Tensor, low: float, high: float) -> Tensor:
    """1 where not low Hbar < H < high Hbar, else 0; 0 where Hbar is 0."""
    inside = (entropy > low * reference) & (entropy < high * reference)
    return (1 - inside.to(reference.dtype)) * reference.sign()


class Epo(Plugin):
    """A pull of each turn's entropy into a band around its history, beside verl's entropy bonus."""

    name = "epo"
    paper = "arXiv:2509.22576"
    version = "2"
    needs = frozenset({"entropy", "current_entropy"})

    @dataclass
    class Config:
        smooth_form: str = setting(
            "hinge", "what is done outside the band", authors="indicator", choices=("hinge", "indicator", "mask_pg")
        )
        smooth_coeff: float = setting(1.0, "beta, weight of P in the bonus", authors=1.0, ge=0)
        smooth_mode: str = setting(
            "token", "compare every token, or the mean of each response", authors="token", choices=("token", "sequence")
        )
        min_ratio: float = setting(0.0, "lower end of the band, times Hbar", authors=0.0, ge=0)
        max_ratio: float = setting(2.0, "upper end of the band, times Hbar", authors=2.0, gt=0)
        out_range_penalty: float = setting(0.1, "c; authors: 0.05 and 0.1, by task", authors=0.1, ge=0)
        gate_turn: int | None = setting(
            None, "turn from 0 from which P is on; none: half of those a rollout may have", authors=25, ge=0
        )
        gate_scope: str = setting(
            "micro_batch",
            "what a row at the gate's turn turns P on for",
            authors="micro_batch",
            choices=("micro_batch", "row"),
        )
        history: str = setting(
            "per_turn",
            "how episodes of unequal length are averaged",
            authors="left_padded",
            choices=("per_turn", "left_padded"),
        )
        schedule: str = setting(
            "code",
            "w: as in the authors' code, 1, or 1 + exp(-gamma k / k_mid), k the step from 0",
            authors="code",
            choices=("code", "constant", "exp"),
        )
        schedule_steps: int = setting(150, "steps of the schedule; k_mid is half of them", authors=150, ge=1)
        gamma: float = setting(1.0, "of the schedule exp; ours", ge=0)

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self._history = History()
        self._entropies: list[float] = []

    def check(self, config: DictConfig) -> None:
        settings, actor = self.config, config.actor_rollout_ref.actor
        if settings.min_ratio >= settings.max_ratio:
            raise CompositionError(
                f"plugins.epo.min_ratio={settings.min_ratio} is not below max_ratio={settings.max_ratio}: "
                "the band is empty, set a smaller min_ratio"
            )
        if actor.entropy_coeff <= 0 and settings.smooth_form != "mask_pg":
            raise CompositionError(
                f"actor_rollout_ref.actor.entropy_coeff={actor.entropy_coeff} multiplies all that plugin 'epo' does: "
                "set it above 0 (authors: 0.001)"
            )
        if self._needs_most_turns and most_turns(config) is None:
            raise CompositionError(
                "plugins.epo.gate_turn and history=left_padded need the number of turns: set "
                "actor_rollout_ref.rollout.multi_turn.max_assistant_turns, or gate_turn and history=per_turn"
            )

    @hookimpl
    def observe(self, run: Run, batch: Batch) -> None:
        mask, entropy, most = batch.response_mask, batch.entropy, most_turns(run.config)
        turns = turn_index(mask, batch.sessions.index, batch.turn)
        means = turn_means(entropy, mask, turns)
        if most is not None and len(means) > most and self._needs_most_turns:
            raise DataError(
                f"plugin 'epo': a response has {len(means)} turns, and the settings allow {most}: set "
                "actor_rollout_ref.rollout.multi_turn.enable=true and multi_turn.max_assistant_turns, or "
                "plugins.epo.gate_turn and history=per_turn"
            )
        self._history.add(left_padded(means.nan_to_num(0), most) if self.config.history == "left_padded" else means)
        usual, weight = self._history.means(), self._weight(run.step - 1)
        gate = most // 2 if self.config.gate_turn is None else self.config.gate_turn
        reference, gates = for_the_loss(usual, turns, mask, gate, weight)
        batch.put(REFERENCE, reference.to(entropy.dtype))
        batch.put(GATE, gates.to(entropy.dtype))
        self._entropies.append(float(entropy[mask].double().mean()))
        run.log(
            {
                "phase_weight": weight,
                "rows_at_gate": float((gates > 0).float().mean()),
                "entropy_variance": float(np.var(self._entropies)),
            }
        )
        run.log({f"entropy/turn_{turn}": value for turn, value in enumerate(means.tolist()) if not math.isnan(value)})
        run.log({f"history/turn_{turn}": value for turn, value in enumerate(usual.tolist())})

    @property
    def _needs_most_turns(self) -> bool:
        return self.config.gate_turn is None or self.config.history == "left_padded"

    def _weight(self, step: int) -> float:
        steps = self.config.schedule_steps
        if self.config.schedule == "exp":
            return 1 + math.exp(-self.config.gamma * step / (steps / 2))
        return phase_weight(step, steps) if self.config.schedule == "code" else 1.0

    @hookimpl
    def loss_terms(self, tokens: Tokens) -> dict[str, Tensor] | None:
        if self.config.smooth_form == "mask_pg":
            return None
        measure = outside_by if self.config.smooth_form == "hinge" else outside
        distance = self._compared(measure, tokens, tokens.entropy)
        weight = self.config.out_range_penalty * self._gate(tokens)
        self._log_loss(tokens, distance, weight)
        return {"epo_smooth": distance * (tokens.config.entropy_coeff * self.config.smooth_coeff * weight)}

    @hookimpl(wrapper=True)
    def policy_loss(self, tokens: Tokens) -> Generator[None, Tensor, Tensor]:
        losses = yield
        if self.config.smooth_form != "mask_pg":
            return losses
        return losses * self.share_kept(tokens)

    def share_kept(self, tokens: Tokens) -> Tensor:
        """[rows,T] what `mask_pg` multiplies the policy loss by: c outside the band where the gate is open, else 1."""
        far, opened = self._compared(outside, tokens, tokens.entropy.detach()), self._gate(tokens).sign()
        self._log_loss(tokens, far, opened)
        return 1 - (1 - self.config.out_range_penalty) * opened * far

    def _compared(self, measure: Callable[..., Tensor], tokens: Tokens, entropy: Tensor) -> Tensor:
        """`outside` or `outside_by` of every token, or of the means of its response, [rows,T]."""
        reference, mask = tokens.extra(REFERENCE), tokens.response_mask
        if self.config.smooth_mode == "token":
            return measure(entropy, reference, self.config.min_ratio, self.config.max_ratio)
        count = mask.sum(1, keepdim=True).clamp(min=1)
        means = ((values * mask).sum(1, keepdim=True) / count for values in (entropy, reference))
        return measure(*means, self.config.min_ratio, self.config.max_ratio).expand_as(entropy)

    def _gate(self, tokens: Tokens) -> Tensor:
        """w where P is on, else 0: [rows,1], or [] for the whole micro-batch."""
        gate = tokens.extra(GATE)
        return gate[:, None] if self.config.gate_scope == "row" else gate.max()

    @torch.no_grad()
    def _log_loss(self, tokens: Tokens, distance: Tensor, weight: Tensor) -> None:
        mask = tokens.response_mask.view(torch.uint8).to(distance.dtype)
        count, beyond = mask.sum(1), distance * mask
        weight = weight.expand(len(mask), 1)[:, 0]
        values = (
            count.sum(),
            beyond.sign().sum(),
            (beyond.sum(1) * weight).sum(),
            count.sign().sum(),
            (count * weight).sign().sum(),
        )
        # One transfer from the device for all of them.
        count, far, penalty, rows, opened = torch.stack([value.double() for value in values]).tolist()
        if count:
            tokens.log(
                {"within_band_fraction": 1 - far / count, "penalty": penalty / count, "gate_open_share": opened / rows}
            )

    def state_dict(self) -> dict[str, Any]:
        return {"total": self._history.total, "reached": self._history.steps, "entropies": np.array(self._entropies)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._history = History(state["total"].clone(), state["reached"].clone())
        self._entropies = state["entropies"].tolist()


def most_turns(config: DictConfig) -> int | None:
    """Turns a rollout may have: 1 without verl's multi-turn rollout; None where that has no limit."""
    multi_turn = config.actor_rollout_ref.rollout.multi_turn
    return multi_turn.max_assistant_turns if multi_turn.enable else 1
