"""State augmentation: each role is told how much exploration there is, and how far training has come.

arXiv:2601.05509: players that share a network see observations that do not say why the others behave as they do; with
exploration strength and learning progress in their state, cooperation lasts longer (authors, on a lattice game). The
language-model form is ours: one line, written into the role's system prompt,

    [explore=high step=3/10]

with the temperature of sampling as `low` (below `low`), `medium` or `high` (from `high` on), and the tenth of training
that the step lies in. Validation has the values of training's end: the same temperature, step 10/10.

Against GRPO: (1) a line in the prompt, nothing else.

Degenerate cases: the temperature is one number for the whole run, unless something changes it, and then the first word
is the same in every prompt. A prompt that is drawn again is written into anew, never twice.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from omegaconf import DictConfig

from verl_plugins import CompositionError, DataError, Plugin, Prompt, Prompts, Run, hookimpl, setting

TENTHS = 10


def exploration(temperature: float, low: float, high: float) -> str:
    """The word for a temperature."""
    return "low" if temperature < low else "high" if temperature >= high else "medium"


def tenth(step: int, steps: int) -> int:
    """1 to 10: the tenth of training in which a step from 1 to `steps` lies; 10 behind the end."""
    return min(TENTHS, (max(step, 1) - 1) * TENTHS // max(steps, 1) + 1)


class StateAugmentation(Plugin):
    """Writes exploration and progress into prompts."""

    name = "state_augmentation"
    paper = "arXiv:2601.05509"

    @dataclass
    class Config:
        place: str = setting(
            "system", "which message gets the line, at its end: the system's, or the last of the user's",
            choices=("system", "user"),
        )  # fmt: skip
        low: float = setting(0.5, "temperatures below are called low", ge=0)
        high: float = setting(0.9, "temperatures from here on are called high", ge=0)
        steps: int | None = setting(None, "steps of training; default: trainer.total_training_steps", ge=1)

    def check(self, config: DictConfig) -> None:
        where = "plugins.state_augmentation"
        if self.config.low > self.config.high:
            raise CompositionError(
                f"{where}.low={self.config.low} is above {where}.high={self.config.high}: set it to that or less"
            )
        if self._steps(config) is None:
            raise CompositionError(
                f"{where} tells how far training has come, and trainer.total_training_steps is not set: set it, or "
                f"{where}.steps"
            )

    def _steps(self, config: DictConfig) -> int | None:
        return self.config.steps or config.trainer.get("total_training_steps")

    @hookimpl
    def prepare_prompts(self, run: Run, prompts: Prompts) -> None:
        part = tenth(run.step, self._steps(run.config))
        self._write(run, prompts, part)
        run.log({"tenth": part})

    @hookimpl
    def prepare_validation(self, run: Run, prompts: Prompts) -> None:
        self._write(run, prompts, TENTHS)

    def _write(self, run: Run, prompts: Prompts, part: int) -> None:
        word = exploration(float(run.config.actor_rollout_ref.rollout.temperature), self.config.low, self.config.high)
        line = f"\n[explore={word} step={part}/{TENTHS}]"
        for prompt in prompts:
            prompt.messages = with_line(prompt, self.config.place, line)


def with_line(prompt: Prompt, role: str, line: str) -> list[dict[str, Any]]:
    """The prompt's messages, the last one of `role` with `line` at its end.

    Raises:
        DataError: there is no such message.
    """
    messages = list(prompt.messages)
    places = [place for place, message in enumerate(messages) if message["role"] == role]
    if not places:
        raise DataError(
            f"state_augmentation: prompt {prompt.id} has no message of the role {role!r} to write into; set "
            "plugins.state_augmentation.place to a role that all prompts have"
        )
    messages[places[-1]] = added(messages[places[-1]], line)
    return messages


def added(message: Mapping[str, Any], line: str) -> dict[str, Any]:
    """A message with text behind what it has, be that text or parts with images among them."""
    content = message["content"]
    longer = content + line if isinstance(content, str) else [*content, {"type": "text", "text": line}]
    return {**message, "content": longer}
