"""Building what hooks take from a case; reading one so that nothing is overlooked is `verl_plugins.testing.Case`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from verl.trainer.ppo.core_algos import agg_loss

from verl_plugins import Batch, Tokens
from verl_plugins.testing import Case

__all__ = ["Case", "NotOffered", "Rows", "actor_config", "aggregate", "in_order_of", "make_tokens"]


class NotOffered(Exception):
    """A recorded case is about a variant that the plugin does not have; the test skips it and says so."""


def in_order_of(expected: Sequence[Any] | None, found: Sequence[Any]) -> list[int]:
    """Places of `found` in the order in which the case lists the same ids; as they are where those are others."""
    found, expected = np.asarray(found).tolist(), list(expected or [])
    same = sorted(map(str, found)) == sorted(map(str, expected)) and len(set(found)) == len(found)
    return [found.index(name) for name in expected] if same else list(range(len(found)))


class Rows:
    """The batch of an advantage case, without synthetic padding rows (uid `pad…`): `on_all` puts them back."""

    def __init__(self, case: Case) -> None:
        uid = [str(name) for name in case.input("uid")]
        self.real = torch.tensor([not name.startswith("pad") for name in uid])
        places = self.real.nonzero()[:, 0].tolist()
        optional = {"session": case.input("session_id", None), "turn": case.input("output_index", None)}
        self.mask = torch.tensor(case.input("response_mask")).bool()
        self.batch = Batch.from_tensors(
            uid=[uid[row] for row in places],
            rm_scores=case.tensor("token_level_rewards")[self.real],
            response_mask=self.mask[self.real],
            **{name: [values[row] for row in places] for name, values in optional.items() if values is not None},
        )

    def on_all(self, values: torch.Tensor, padding: float = 0.0) -> torch.Tensor:
        """[rows of the batch, …] -> [rows of the case, …]."""
        whole = torch.full((len(self.real), *values.shape[1:]), padding, dtype=torch.float64)
        whole[self.real] = values.double()
        return whole

    def with_lone(self, found: torch.Tensor, authors: torch.Tensor, expected: Mapping[str, Any], key: str) -> Any:
        """Ours [rows of the batch, …] for the case's rows, a lone response with the authors' value [rows of the batch].

        A lone response gets 0 here and not there (see the guide); that ours is 0 is checked. A case may have either.
        """
        lone = self.batch.groups.count() == 1
        assert not found[lone].any(), "a lone response has nothing to compare with"
        wide = authors.double().view(-1, *[1] * (found.dim() - 1)).expand(found.shape)
        wide = wide * self.batch.response_mask if found.dim() == 2 else wide
        theirs = torch.tensor(expected[key], dtype=torch.float64)[self.real] != 0 if key in expected else found != 0
        return self.on_all(torch.where(lone.view(wide[:, :1].shape if found.dim() == 2 else -1) & theirs, wide, found))


def make_tokens(case: Case, rng_seed: int | None = None, rows: torch.Tensor | None = None, **fields: Any) -> Tokens:
    """The micro-batch of a loss case, log-probs with gradient; `advantages` and `config` come in `fields`."""
    pick = slice(None) if rows is None else rows
    tokens = Tokens(
        log_probs=case.tensor("log_prob")[pick].requires_grad_(),
        old_log_probs=case.tensor("old_log_probs")[pick],
        response_mask=torch.tensor(case.input("response_mask"))[pick],
        **fields,
    )
    if rng_seed is not None:
        tokens.rng = lambda name="": torch.Generator().manual_seed(rng_seed)
    return tokens


def actor_config(case: Case, batch_num_tokens: int | None = None) -> SimpleNamespace:
    """The settings of a loss case, as verl's actor config has them; `horizon` is the length some modes divide by."""
    clip, dual = case.param("clip_ratio", 0.2), case.param("dual_clip", None)
    settings = {
        "clip_ratio": clip,
        "clip_ratio_low": case.param("clip_ratio_low", clip),
        "clip_ratio_high": case.param("clip_ratio_high", clip),
        "clip_ratio_c": case.param("clip_ratio_c", dual) or 1e30,
        "loss_agg_mode": case.param("loss_agg_mode", "token-mean"),
        "global_batch_info": {
            "batch_num_tokens": case.param("batch_num_tokens", batch_num_tokens),
            "global_batch_size": case.param("global_batch_size", None),
            "loss_scale_factor": case.param("loss_scale_factor", case.param("horizon", None)),
            "dp_size": case.param("dp_size", 1),
        },
    }
    return SimpleNamespace(**settings, get=settings.get)


def aggregate(losses: torch.Tensor, mask: torch.Tensor, config: SimpleNamespace) -> torch.Tensor:
    """verl's aggregation of a loss per token."""
    return agg_loss(losses, mask, config.loss_agg_mode, **config.global_batch_info)
