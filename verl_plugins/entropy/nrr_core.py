"""NRR-Core: raise the entropy coefficient when an update has lost more entropy than it may, and let it fall otherwise.

arXiv:2512.13478. The paper states that a transformation T of a state S should keep H(T(S)) >= H(S) - epsilon, and shows
a small classifier that does (`verl_plugins.labs.nrr_core`). It has no policy. Ours: T is one update of a policy, H its
token-mean entropy, measured before each update, and the condition is held by its multiplier (dual ascent):

    gap_t = H_ref - epsilon - H_t,      c_t = clip(c_{t-1} + kappa gap_t, 0, max_coeff),     first step: c = c_0
    H_ref   prev: the entropy of the step before;  ema: their moving average;  initial: that of the first step
    L       = L_pg - c_t mean H         H of the policy being trained, with gradient, aggregated like the policy loss

Against GRPO: 1. verl's entropy bonus with a coefficient that the driver sets anew in each step and ships with the rows;
2. a diagnostic: the entropy in bits of the answers to each prompt, which is the paper's own measure (the ambiguity that
is left), over log2 of their number.

Degenerate cases. The first step has nothing to compare with: no gap above -epsilon. Entropy that does not fall faster
than epsilon takes c to 0, and the loss is the run's own. Fewer than two answers to a prompt have 0 bits.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from omegaconf import DictConfig
from torch import Tensor

from verl_plugins import Batch, CompositionError, Plugin, Run, Tokens, hookimpl, setting
from verl_plugins.reward.normal_form import normal_form

COEFFICIENT = "nrr_entropy_coeff"
"""Field with c_t, [B]; padding rows have 0."""
MISSING = -1


class Retention:
    """c and H_ref over the steps."""

    def __init__(self, kind: str, epsilon: float, kappa: float, most: float, first: float, decay: float) -> None:
        self.kind, self.epsilon, self.kappa, self.most, self.decay = kind, epsilon, kappa, most, decay
        self.coefficient = first
        self.reference: float | None = None
        """What the next step is compared with; None before the first."""

    def step(self, entropy: float) -> tuple[float, float, float]:
        """Entropy before the update, in nats -> c of this update, max(gap, 0), and the reference it is of."""
        reference = entropy if self.reference is None else self.reference
        gap = reference - self.epsilon - entropy
        if self.reference is not None:
            self.coefficient = min(max(self.coefficient + self.kappa * gap, 0.0), self.most)
        kept = {"prev": 0.0, "ema": self.decay, "initial": 1.0}[self.kind]
        self.reference = kept * reference + (1 - kept) * entropy
        return self.coefficient, max(gap, 0.0), reference


def answer_entropy(
    group: np.ndarray, answer: np.ndarray, groups: int, missing: str = "class"
) -> tuple[np.ndarray, np.ndarray]:
    """Bits [G] of the answers to each prompt, and bits over log2 of their number.

    Args:
        group: [R] number of each response's prompt.
        answer: [R] number of its answer; MISSING for none, which is one more answer ("class") or none at all ("drop").
        groups: G.
    """
    if missing == "drop":
        group, answer = group[answer != MISSING], answer[answer != MISSING]
    pairs, count = np.unique(np.stack([group, answer]), axis=1, return_counts=True)
    total = np.bincount(group, minlength=groups)
    share = count / total[pairs[0]]
    bits = 0.0 - np.bincount(pairs[0], share * np.log2(share), minlength=groups)
    return bits, bits / np.log2(np.maximum(total, 2))


class NrrCore(Plugin):
    """An entropy coefficient that answers to the loss of entropy."""

    name = "nrr_core"
    paper = "arXiv:2512.13478"
    needs = frozenset({"entropy", "current_entropy"})

    @dataclass
    class Config:
        reference: str = setting(
            "prev", "entropy to keep: the last step's, a moving average, the first", choices=("prev", "ema", "initial")
        )
        epsilon: float | None = setting(
            None, "entropy in nats that a step may lose; none: 0.02 (prev) or 0.1 (others)", ge=0
        )
        decay: float = setting(0.9, "share of the moving average that is kept (ema)", ge=0, lt=1)
        kappa: float = setting(0.05, "change of the coefficient per nat of gap", gt=0)
        max_coeff: float = setting(0.02, "largest coefficient", gt=0)
        initial_coeff: float = setting(0.0, "coefficient of the first step", ge=0)
        answer: str | None = setting("answer", "part of the reward that holds the answer; none: answers are not read")
        missing: str = setting(
            "class", "responses without an answer are one more answer, or left out", choices=("class", "drop")
        )

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        usual = 0.02 if config.reference == "prev" else 0.1
        epsilon = usual if config.epsilon is None else config.epsilon
        self.retention = Retention(
            config.reference, epsilon, config.kappa, config.max_coeff, config.initial_coeff, config.decay
        )

    def check(self, config: DictConfig) -> None:
        given = config.actor_rollout_ref.actor.entropy_coeff
        if given:
            raise CompositionError(
                f"actor_rollout_ref.actor.entropy_coeff={given} would be added to the coefficient that "
                "plugins.nrr_core sets: set it to 0, and plugins.nrr_core.initial_coeff to where it begins"
            )
        if self.config.initial_coeff > self.config.max_coeff:
            raise CompositionError(
                f"plugins.nrr_core.initial_coeff={self.config.initial_coeff} is above "
                f"max_coeff={self.config.max_coeff}; set it to that or less"
            )

    @hookimpl
    def observe(self, run: Run, batch: Batch) -> None:
        entropy = float(batch.entropy[batch.response_mask].double().mean())
        coefficient, violation, reference = self.retention.step(entropy)
        batch.put(COEFFICIENT, batch.entropy.new_full((len(batch),), coefficient))
        run.log({"entropy_coeff": coefficient, "violation": violation, "reference": reference})
        if self.config.answer:
            bits, normalised = self.answer_bits(batch.full)
            run.log({"answer_bits": float(bits.mean()), "answer_bits_norm": float(normalised.mean())})

    def answer_bits(self, batch: Batch) -> tuple[np.ndarray, np.ndarray]:
        """[G] of each prompt drawn, see `answer_entropy`; a response speaks by its last output."""
        part = batch.extra(self.config.answer)
        part = part.tolist() if isinstance(part, Tensor) else part
        answers = pd.Series(part, dtype="string").fillna("").map(normal_form).replace("", None)
        last, codes = batch.is_last.numpy(), pd.factorize(answers)[0]
        return answer_entropy(batch.groups.index.numpy()[last], codes[last], len(batch.groups), self.config.missing)

    @hookimpl
    def loss_terms(self, tokens: Tokens) -> dict[str, Tensor] | None:
        coefficient = tokens.extra(COEFFICIENT).max()
        return {"nrr_entropy": tokens.entropy * -coefficient} if coefficient else None

    def state_dict(self) -> dict[str, Any]:
        return {"coefficient": self.retention.coefficient, "reference": self.retention.reference}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.retention.coefficient, self.retention.reference = state["coefficient"], state["reference"]
