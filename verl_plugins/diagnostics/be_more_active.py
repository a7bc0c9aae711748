"""Active, mixed and passive slots: which templates, hints or roles the policy's rewards depend on. It only measures.

The rule is that of arXiv:2109.12679 for the latents of a VAE, by its authors' code: with the mean m and the population
variance s of the posterior's variance u over examples,

    passive: s < t_v and |m - 1| <= t_m        the latent has the variance of the prior: nothing is in it
    active:  s < t_v and m <= t_m              it always has little variance left
    mixed:   all else                          it is used for some examples

Its use here is an analogy of ours. A slot is what a prompt may be conditioned on, in a column of the rows. For a prompt
p with n responses under v >= 2 values of the slot, and a statistic y of responses,

    u_p = min(1, (SS_within / (n - v)) / (SS_total / (n - 1)))

with the sums of squares of y about the means of the values and about the prompt's mean: 1 where the slot explains
nothing, 0 where it decides. The rule is applied to u_p over prompts.

What differs from GRPO: nothing, no reward, row or loss is changed.

Degenerate cases. Prompts whose y do not vary (SS_total <= 1e-12), with one value of the slot or with n = v are no
evidence; without any other there is no kind. Responses of one draw often share the slot's value, so draws of a prompt
in the last `steps` steps are put together, whose policies differ: a policy that learns looks like a slot that matters.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch
from omegaconf import DictConfig
from torch import Tensor

from verl_plugins import Batch, CompositionError, Groups, Plugin, Run, hookimpl, setting

COLUMNS = {"prompt_augmentation": "format_name", "sage": "hint_used"}
"""The columns that these plugins leave on rows: the template's name, the level of the hint."""
NO_SPREAD = 1e-12
SLOT = "slot:"
"""Before the name of a slot, among the columns of the rows that are kept."""


@dataclass(frozen=True)
class Kinds:
    """[slots] what each slot is, and by what."""

    mean: np.ndarray
    variance: np.ndarray
    passive: np.ndarray
    active: np.ndarray

    @property
    def mixed(self) -> np.ndarray:
        """[slots] bool: neither passive nor active."""
        return ~(self.passive | self.active)


def classify(u: np.ndarray, var_threshold: float, mean_error_range: float) -> Kinds:
    """[examples, slots] variances left, at least one example -> kinds."""
    mean, variance = u.mean(0), u.var(0)
    steady = variance < var_threshold
    passive = steady & (np.abs(mean - 1) <= mean_error_range)
    return Kinds(mean, variance, passive, steady & (mean <= mean_error_range))


def residual_share(statistic: Tensor, slot: Sequence[Any], prompts: Groups) -> tuple[Tensor, Tensor]:
    """[B] statistic of responses, values of the slot, prompts -> [G] u_p, and [G] bool which prompts are evidence."""
    pairs = np.stack([prompts.index.numpy(), pd.factorize(np.asarray(slot, dtype=object))[0]], 1)
    parts = Groups(np.unique(pairs, axis=0, return_inverse=True)[1].ravel())
    y = statistic.double()
    within, total = (prompts.sum((y - of.mean(y)).square()) for of in (parts, prompts))
    count, kinds = prompts.count(), prompts.sum(parts.first(torch.ones(len(y))).long())
    evidence = (total > NO_SPREAD) & (kinds >= 2) & (count > kinds)
    share = torch.where(evidence, (within / (count - kinds)) / (total / (count - 1)), 1.0)
    return prompts.per_group(share.clamp(max=1)), prompts.per_group(evidence)


class BeMoreActive(Plugin):
    """Says of conditioning slots whether rewards depend on them: active, mixed or passive."""

    name = "be_more_active"
    paper = "arXiv:2109.12679"

    @dataclass
    class Config:
        slots: tuple[str, ...] = setting((), "columns that are slots; none: those of prompt_augmentation and sage")
        statistic: str = setting(
            "reward", "what of a response is compared", choices=("reward", "correct", "log_length")
        )
        steps: int = setting(100, "draws of a prompt within so many steps are put together", ge=1)
        var_threshold: float = setting(0.1, "t_v: least variance over prompts of a mixed slot", authors=0.1, gt=0)
        mean_error_range: float = setting(
            0.2, "t_m: how far from 1 or 0 the mean may be; below 16 responses 0.1 is too narrow", authors=0.1, gt=0
        )

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self._rows = pd.DataFrame({"prompt": pd.Series(dtype=np.int64), "step": pd.Series(dtype=np.int64)})

    def check(self, config: DictConfig) -> None:
        if not self.slots(config):
            raise CompositionError(
                "plugins.be_more_active.slots names no column, and neither prompt_augmentation nor sage is there to "
                "leave one: name a column, or add one of these recipes (prompt_augmentation+be_more_active)"
            )

    def slots(self, config: DictConfig) -> tuple[str, ...]:
        """The columns that are looked at."""
        return tuple(self.config.slots) or tuple(column for name, column in COLUMNS.items() if name in config.plugins)

    @hookimpl
    def observe(self, run: Run, batch: Batch) -> None:
        full, slots = batch.full, self.slots(run.config)
        new = pd.DataFrame({"prompt": full.prompt_id.numpy(), "step": run.step, "y": self._statistic(full).numpy()})
        for slot in slots:
            values = full.extra(slot)
            new[SLOT + slot] = list(map(str, values.tolist() if isinstance(values, Tensor) else values))
        kept = self._rows[self._rows["step"] > run.step - self.config.steps]
        self._rows = pd.concat([kept, new[full.is_last.numpy()]])
        run.log({"responses": len(self._rows)})
        for slot in slots:
            run.log({f"slot/{slot}/{what}": value for what, value in self._measured(slot).items()})

    def _statistic(self, batch: Batch) -> Tensor:
        if self.config.statistic == "log_length":
            return batch.ends.clamp(min=1).double().log()
        return (batch.scores if self.config.statistic == "reward" else batch.correct).double()

    def _measured(self, slot: str) -> dict[str, float]:
        """Metrics of a slot; no kind where no prompt is evidence."""
        y = torch.tensor(self._rows["y"].to_numpy(np.float64))
        share, evidence = residual_share(y, self._rows[SLOT + slot], Groups(self._rows["prompt"].to_numpy()))
        found: dict[str, float] = {"n_prompts": int(evidence.sum())}
        if not evidence.any():
            return found
        kinds = classify(share[evidence][:, None].numpy(), self.config.var_threshold, self.config.mean_error_range)
        of_kind = {kind: float(getattr(kinds, kind)[0]) for kind in ("passive", "active", "mixed")}
        return found | of_kind | {"u_mean": float(kinds.mean[0]), "u_var": float(kinds.variance[0])}

    def state_dict(self) -> dict[str, Any]:
        state: dict[str, Any] = {"names": {}}
        for column in self._rows:
            values = self._rows[column].to_numpy()
            if str(column).startswith(SLOT):
                values, names = pd.factorize(values)
                state["names"][column] = names.tolist()
            state[str(column)] = values
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        names = state["names"]
        self._rows = pd.DataFrame(
            {
                column: np.array(names[column], dtype=object)[values] if column in names else values
                for column, values in state.items()
                if column != "names"
            }
        )
