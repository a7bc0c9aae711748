"""What a critic says of a batch, for the driver's stages, and `Values`, one micro-batch of its loss in a critic worker.

Notation: B or rows, T the longest response, N heads of the value model, D its hidden size. A value at a token is that
of the state in which the token was chosen.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from verl_plugins.errors import DataError
from verl_plugins.fields import version


class HasValues:
    """The part of a `Batch` that is about the critic; a plugin that reads it declares `values` in `needs`."""

    _fields: Any
    _assigned: dict[str, Tensor]
    """`values` and `bootstrap`, if a plugin has assigned them."""
    _estimated = False
    """Whether verl's estimator has been asked: what is assigned then changes nothing."""

    @property
    def values(self) -> Tensor:
        """[B,T] the critic's values, the mean of its heads; assign [B,T] to have GAE, loss and metrics use others."""
        return self._field("values")

    @values.setter
    def values(self, values: Tensor) -> None:
        self._assign("values", values, self.values.shape)
        self._fields["values"] = values

    @property
    def head_values(self) -> Tensor:
        """[B,T,N] the values of each head."""
        return self._field("head_values")

    @property
    def bootstrap_values(self) -> Tensor:
        """[B,N] each head's value of the state behind the row's last token, which verl's GAE does not look at."""
        return self._field("bootstrap_values")

    @property
    def bootstrap(self) -> Tensor:
        """[B] what GAE takes for the value behind a row's last token: 0, or what was assigned."""
        return self._assigned.get("bootstrap", self.bootstrap_values.new_zeros(len(self.bootstrap_values)))

    @bootstrap.setter
    def bootstrap(self, values: Tensor) -> None:
        self._assign("bootstrap", values, self.bootstrap_values.shape[:1])

    def _assign(self, name: str, values: Any, shape: torch.Size) -> None:
        if self._estimated:
            raise DataError(f"{name}: too late, the advantage is estimated: assign it before the wrapper's yield")
        if not isinstance(values, Tensor) or values.shape != shape or not values.is_floating_point():
            found = f"{values.dtype} {tuple(values.shape)}" if isinstance(values, Tensor) else type(values).__name__
            raise DataError(f"{name}: {found}, expected floating numbers {tuple(shape)}")
        if not bool(torch.isfinite(values).all()):
            raise DataError(f"{name}: a value is not finite")
        self._assigned[name] = values

    def take_assigned(self) -> dict[str, Tensor]:
        """What was assigned, for the estimator that is asked now."""
        self._estimated = True
        return self._assigned


class Values:
    """One micro-batch in the critic's loss, in a critic worker. Padding rows are present with an empty mask."""

    def __init__(
        self,
        *,
        values: Tensor,
        old_values: Tensor,
        returns: Tensor,
        response_mask: Tensor,
        config: Any,
        head_weight: Tensor | None = None,
        log: Callable[[str, Mapping[str, float], str], None] | None = None,
        step: int = 0,
        mini_batch: int = 0,
        micro_batch: int = 0,
        owner: str = "",
    ) -> None:
        self.values = values
        """[rows,T,N] of the heads being trained, with gradient."""
        self.old_values = old_values
        """[rows,T,N] before the step's update."""
        self.returns = returns
        """[rows,T] what they are to predict: advantages before whitening, plus the values that were used for them."""
        self.response_mask = response_mask.bool()
        """[rows,T] bool: tokens that count."""
        self.head_weight = head_weight
        """[N,D] weights of the heads, linear in the last hidden state, with gradient; None where there is one head."""
        self.config = config
        """verl's critic settings: cliprange_value, loss_agg_mode, …"""
        self.step, self.mini_batch, self.micro_batch = step, mini_batch, micro_batch
        self._log, self._owner = log, owner
        self._given = {name: version(value) for name, value in vars(self).items() if isinstance(value, Tensor)}

    def scoped(self, owner: str) -> Values:
        """The same values in the hands of plugin `owner`, whose metrics are its own."""
        other = object.__new__(Values)
        other.__dict__.update(self.__dict__, _owner=owner)
        return other

    def changed_in_place(self) -> list[str]:
        """Names of the tensors that were written into: others read them, too."""
        return [name for name, known in self._given.items() if version(getattr(self, name)) != known]

    def log(self, metrics: Mapping[str, float], reduce: str = "mean") -> None:
        """Add metrics as `plugins/<plugin>/<key>`; `reduce` as in `Tokens.log`."""
        if self._log is not None:
            self._log(self._owner, metrics, reduce)
