"""A plugin that is another one in every step, so that one training runs through all that act in the actor.

`COMPARED` come first: for them the split into micro-batches and ranks does not matter, and one rank says so.
"""

from __future__ import annotations

from collections.abc import Generator, Mapping
from typing import Any

from torch import Tensor

from verl_plugins import Batch, Plugin, Prompts, Run, Tokens, hookimpl
from verl_plugins.composition import manifest
from verl_plugins.composition.manager import Plugins, instance

COMPARED: list[tuple[str, dict[str, Any]]] = [
    ("clip_cov", {"scope": "batch", "clip_cov_ratio": 0.05, "clip_cov_lb": 0.05}),
    ("kl_cov", {"scope": "batch", "kl_cov_ratio": 0.05}),
    ("steer", {"scope": "batch", "map": "linear"}),
    ("epo", {"gate_turn": 0, "gate_scope": "row", "history": "per_turn", "max_ratio": 1.2, "min_ratio": 0.8}),
    ("dcpo", {"entropy_source": "previous_mc"}),
    ("copo", {"form": "two_losses"}),
    ("r3", {"l_max": 16}),
    ("prob_mask", {"rho": 0.6}),
]
DEPENDENT: list[tuple[str, dict[str, Any]]] = [
    ("drpo", {}),
    ("clip_cov", {"clip_cov_ratio": 0.05, "clip_cov_lb": 0.3}),
    ("kl_cov", {"kl_cov_ratio": 0.002}),
]
TURNS = COMPARED + DEPENDENT


class Given:
    """What stands behind the plugin whose turn it is: what the stage gives without it."""

    value: Tensor | None = None

    @hookimpl(trylast=True)
    def policy_loss(self) -> Tensor | None:
        return self.value

    @hookimpl(trylast=True)
    def estimate_advantage(self) -> Tensor | None:
        return self.value


class InTurn(Plugin):
    """Delegates every stage to the plugin of the step."""

    name = "in_turn"
    needs = frozenset({"current_entropy", "entropy", "old_log_probs", "rollout_log_probs"})

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        entries = manifest.entries()
        made = [instance(manifest.find(name, entries), settings) for name, settings in TURNS]
        self._turns = [Plugins([plugin]) for plugin in made]
        self._given = Given()
        for plugins in self._turns:
            plugins.add_fallback(self._given)

    def _of(self, step: int) -> Plugins:
        return self._turns[step - 1]

    def _around(self, stage: str, value: Tensor, step: int, **arguments: Any) -> Tensor:
        self._given.value = value
        return getattr(self._of(step).hook, stage)(**arguments)

    @hookimpl
    def prepare_prompts(self, run: Run, prompts: Prompts) -> None:
        self._of(run.step).hook.prepare_prompts(run=run, prompts=prompts)

    @hookimpl
    def shape_rewards(self, run: Run, batch: Batch) -> None:
        self._of(run.step).hook.shape_rewards(run=run, batch=batch)

    @hookimpl
    def select_rows(self, run: Run, batch: Batch) -> None:
        self._of(run.step).hook.select_rows(run=run, batch=batch)

    @hookimpl(wrapper=True)
    def estimate_advantage(self, run: Run, batch: Batch) -> Generator[None, Tensor, Tensor]:
        return self._around("estimate_advantage", (yield), run.step, run=run, batch=batch)

    @hookimpl
    def observe(self, run: Run, batch: Batch) -> None:
        self._of(run.step).hook.observe(run=run, batch=batch)

    @hookimpl(wrapper=True)
    def policy_loss(self, tokens: Tokens) -> Generator[None, Tensor, Tensor]:
        return self._around("policy_loss", (yield), tokens.step, tokens=tokens)

    @hookimpl
    def loss_terms(self, tokens: Tokens) -> dict[str, Tensor]:
        named = self._of(tokens.step).hook.loss_terms(tokens=tokens)
        return {name: values for terms in named for name, values in (terms or {}).items()}

    @hookimpl
    def on_step_end(self, run: Run, metrics: Mapping[str, float]) -> None:
        self._of(run.step).hook.on_step_end(run=run, metrics=metrics)
