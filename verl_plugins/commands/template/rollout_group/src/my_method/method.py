"""My method: a group without a right response is rolled out again.

At most `attempts` groups are generated for a draw of a prompt; the first with a right response is trained on, or the
last. Against a plain group: all-wrong groups are rarer, and accuracy in training is higher than the policy's own.
"""

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass

from verl_plugins import Plugin, Prompt, Rollout, Run, hookimpl, setting


def solved(group: Sequence[Rollout]) -> bool:
    """Whether any response is right."""
    return any(rollout.correct for rollout in group)


class MyMethod(Plugin):
    """Another attempt."""

    name = "my_method"

    @dataclass
    class Config:
        attempts: int = setting(2, "groups generated for a prompt at most; 1: a plain group", ge=1)

    @hookimpl
    async def rollout_group(
        self, run: Run, prompt: Prompt, sample: Callable[..., Awaitable[list[Rollout]]]
    ) -> list[Rollout]:
        group, attempts = await sample(), 1
        while not solved(group) and attempts < self.config.attempts:
            group, attempts = await sample() or group, attempts + 1  # a response that fails is missing
        run.log({"attempts": attempts})
        return group
