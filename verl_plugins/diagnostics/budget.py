"""What a step's rollouts cost: responses and tokens that the policy generated, whether they are trained on or not.

Methods that generate more than they train on (groups rolled out again, hints, votes) are compared at equal cost by
these numbers. Every group is counted in its agent-loop worker, answers asked aside included; the account travels in the
extra fields of one row of the group, and what plugins generate on the driver is added here. Not counted: validation,
tool output, responses that failed, and groups that verl throws away before the step sees them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass

import pandas as pd

from verl_plugins.batch import Batch

ACCOUNT_FIELD = "rollout_account"
"""The part of a row's extra fields with its group's account, as a mapping of the names below to numbers."""


@dataclass
class Account:
    """What was generated."""

    responses: int = 0
    tokens: int = 0
    """Of the policy, tool output left out."""

    def add(self, tokens: Sequence[int]) -> None:
        """Count responses by the number of tokens of each."""
        self.responses += len(tokens)
        self.tokens += sum(tokens)

    def take(self) -> Account:
        """What was counted since the last call."""
        taken = Account(self.responses, self.tokens)
        self.responses = self.tokens = 0
        return taken

    def as_field(self) -> dict[str, int]:
        """For the extra fields of a row."""
        return asdict(self)


def rollout_budget(batch: Batch, aside: Account) -> dict[str, float]:
    """Sums over the step, `aside` (what the driver generated) included, and means over its prompts, without it.

    Args:
        batch: the step's rows as they were rolled out.
        aside: belongs to no prompt.
    """
    rows = zip(batch.prompt_id.tolist(), batch.extra("extra_fields"), strict=True)
    told = [{"prompt": prompt} | fields[ACCOUNT_FIELD] for prompt, fields in rows if ACCOUNT_FIELD in fields]
    cost = pd.DataFrame(told, columns=["prompt", "responses", "tokens"]).groupby("prompt").sum()
    return {
        "rollout/responses": float(cost["responses"].sum() + aside.responses),
        "rollout/tokens": float(cost["tokens"].sum() + aside.tokens),
        "rollout/responses_per_prompt": float(cost["responses"].mean()),
        "rollout/tokens_per_prompt": float(cost["tokens"].mean()),
        "rollout/tokens_per_prompt_max": float(cost["tokens"].max()),
    }
