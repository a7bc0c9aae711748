"""Portfolio mixture: draw prompts from several data sources, each as often as its accumulated "wealth" says.

arXiv:2406.03652, as far as it could be known: neither text nor code was at hand. The paper's, by its abstract and a
secondary source, is to mix strategies by their past cumulative wealth, uniform at the start, in two levels where there
are many. Cover's universal mixture is the usual form of that; its reading as a sampler of prompts is ours. The paper's
accelerated variant is not here. Source k of K has the weight w_k; x_k is its price relative in a step:

    x_k       exp(scale (u_k - mean of u over the observed sources)), exactly 1 if unobserved; u: `utility`
    wealth    w_k ~ w0_k prod_s x_sk
    universal w   ~ sum_g mu_g g prod_s (g . x_s), over the lattice of the simplex with denominator q
    eg        w_k <- w_k exp(eta x_k / (w . x)), normalised
    hierarchical: one of these inside each group, whose growth w_g . x_g is that of a component of the same one above
    floor     w <- (1 - K floor) w + floor;    combined wealth S <- S (w . x), w known before x

Against GRPO only the choice of prompts differs:
 1. Of `count` prompts each source is given w_k count, by largest remainder, equal ones by lower index; what rounding
    kept from it is owed to it in the next draw (ours), so that a floor below one prompt, or draws of one, still count.
 2. Within a source, a shuffled pass keyed by (seed, source, epoch), epoch after epoch.

Degenerate cases: one source has weight 1; equal utilities move no weight; a source with too few prompts that are not in
flight leaves the rest to the others. Wealths are logarithms in float64.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from omegaconf import DictConfig, OmegaConf

from verl_plugins import Batch, CompositionError, DataError, Plugin, Run, StateError, hookimpl, setting
from verl_plugins.sampling.mixture import Mixture, log_relatives, make_level, within
from verl_plugins.sampling.vade import refuse_unknown

MOST_OF_LATTICE, MOST_GROUPS, MOST_SOURCES = 4, 6, 64
"""Components of one lattice, groups above them, and sources at all, each of which has metrics of its own."""


class PortfolioMixture(Plugin):
    """Chooses how many of the next prompts come from each data source."""

    name = "portfolio_mixture"
    paper = "arXiv:2406.03652"

    @dataclass
    class Config:
        mode: str = setting(
            "universal", "how wealth makes weights", choices=("universal", "eg", "wealth", "hierarchical")
        )
        column: str = setting("data_source", "column of the dataset, or key of its extra_info, that names the source")
        utility: str = setting(
            "abs_advantage",
            "what a source is worth in a step: mean |advantage|, share of mixed groups, or change of accuracy",
            choices=("abs_advantage", "mixed_groups", "accuracy_change"),
        )
        scale: float = setting(1.0, "how far utilities move wealth", ge=0)
        floor: float = setting(0.02, "smallest weight of a source", ge=0, le=1)
        forgetting: float = setting(1.0, "share of all log-wealth kept at each step; 1 is the paper's", gt=0, le=1)
        q: int = setting(10, "denominator of the lattice (universal)", ge=1, le=20)
        prior: str = setting("uniform", "prior on the lattice (universal)", choices=("uniform", "dirichlet_half"))
        eta: float = setting(0.1, "learning rate (eg)", gt=0)
        initial_weights: list[float] | None = setting(
            None, "w0 of the sources in the order of their names (eg, wealth); default: equal"
        )
        groups: list[list[str | int]] | None = setting(None, "names of the sources in groups (hierarchical)")
        inner: str = setting(
            "universal", "mode inside and across groups (hierarchical)", choices=("universal", "eg", "wealth")
        )

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.sources: list[str] = []
        """Names, in order; empty until the dataset has been read."""
        self.epochs = self.owed = self.accuracy = np.zeros(0)
        """[K] passes begun; prompts owed; accuracy when last seen, -1 if never."""
        self.order_seed = 0
        self._saved: dict[str, Any] = {}

    def check(self, config: DictConfig) -> None:
        settings, where = self.config, "plugins.portfolio_mixture"
        if OmegaConf.select(config, "algorithm.filter_groups.enable"):
            raise CompositionError(
                f"{where} learns from the groups that algorithm.filter_groups throws away before they reach it; "
                "set algorithm.filter_groups.enable=false"
            )
        if (settings.mode == "hierarchical") != bool(settings.groups):
            raise CompositionError(
                f"{where}.groups={settings.groups} and mode={settings.mode}: hierarchical, and nothing else, takes "
                "groups, as in groups=[[a,b],[c]]"
            )
        names = [str(name) for group in settings.groups or () for name in group]
        if len(set(names)) < len(names) or not all(settings.groups or ()):
            raise CompositionError(f"{where}.groups={settings.groups}: each source is to be in one group, none empty")
        if settings.initial_weights is not None and settings.mode in ("universal", "hierarchical"):
            raise CompositionError(
                f"{where}.initial_weights is for mode eg and wealth, and mode is {settings.mode}; leave it out"
            )
        if min(settings.initial_weights or [1.0]) <= 0:
            raise CompositionError(
                f"{where}.initial_weights={settings.initial_weights}: each is to be above 0; floor holds sources up"
            )

    @hookimpl
    def select_prompts(self, run: Run, count: int) -> np.ndarray:
        self._prepare(run)
        if not self.order_seed:
            self.order_seed = int(run.rng("order").integers(1, 2**53))
        busy = np.zeros(len(self.source_of), dtype=bool)
        busy[run.in_flight()] = True
        available = np.bincount(self.source_of[~busy], minlength=len(self.sources))
        if available.sum() < count:
            raise DataError(
                f"portfolio_mixture: {count} prompts are to be selected, and only {available.sum()} of {len(busy)} are "
                "not in flight"
            )
        owed = self.owed + self.mixture.weights() * count
        counts = within(owed, available, count)
        self.owed = np.clip(owed - counts, -1, 1)  # what a small source cannot give is not owed for ever
        ids = np.concatenate([self._draw(source, need, busy) for source, need in enumerate(counts.tolist())])
        run.log({f"epoch_{name}": epoch for name, epoch in zip(self.sources, self.epochs.tolist(), strict=True)})
        return ids

    def _draw(self, source: int, need: int, busy: np.ndarray) -> np.ndarray:
        """The next `need` prompts of a source that are not busy [N], which they then are; begins a new pass if due."""
        order = self._order(source)
        found = order[~(self.asked[order] | busy[order])][:need]
        self.asked[found] = busy[found] = True
        if len(found) == need:
            return found
        self.epochs[source] += 1
        self.asked[order] = False
        return np.concatenate([found, self._draw(source, need - len(found), busy)])

    def _order(self, source: int) -> np.ndarray:
        """Prompt ids of a source in the order of its current pass."""
        key = self.order_seed, zlib.crc32(self.sources[source].encode()), int(self.epochs[source])
        if self._orders.get(source, ((), None))[0] != key:
            rows = np.flatnonzero(self.source_of == source)
            self._orders[source] = key, np.random.default_rng(key).permutation(rows)
        return self._orders[source][1]

    @hookimpl
    def observe(self, run: Run, batch: Batch) -> None:
        self._prepare(run)
        refuse_unknown(self.name, np.unique(batch.full.prompt_id.numpy()), len(self.source_of))
        utility, observed = getattr(self, f"_{self.config.utility}")(batch)
        weights = self.mixture.weights()
        self.mixture.add(log_relatives(utility, observed, self.config.scale))
        one_each = self._per_source(batch.full, batch.full.groups.first(torch.ones(len(batch.full))))
        run.log({"combined_log_wealth": self.mixture.combined})
        columns = {"weight": weights, "log_wealth": self.mixture.log_wealth, "prompts": one_each, "utility": utility}
        for name, values in columns.items():
            shown = observed if name == "utility" else np.ones(len(values), dtype=bool)
            run.log({f"{name}_{self.sources[k]}": values[k] for k in np.flatnonzero(shown)})

    def _per_source(self, batch: Batch, values: torch.Tensor) -> np.ndarray:
        """[K] sums of values [B] over the rows of each source."""
        source = self.source_of[batch.prompt_id.numpy()]
        return np.bincount(source, values.double().numpy(), minlength=len(self.sources))

    def _abs_advantage(self, batch: Batch) -> tuple[np.ndarray, np.ndarray]:
        """[K] mean |A| over the rolled-out rows, a row that was dropped having none; which sources were observed."""
        mask = batch.response_mask.double()
        signal = (batch.advantages.double().abs() * mask).sum(1) / mask.sum(1).clamp(min=1)
        rows = self._per_source(batch.full, torch.ones(len(batch.full)))
        return self._per_source(batch, signal * ~batch.is_added) / np.maximum(rows, 1), rows > 0

    def _mixed_groups(self, batch: Batch) -> tuple[np.ndarray, np.ndarray]:
        """[K] share of groups with right and wrong responses; which sources were observed."""
        batch = batch.full
        one = batch.groups.first(torch.ones(len(batch)))
        mixed = batch.groups.any(batch.correct) & ~batch.groups.all(batch.correct) & one
        groups = self._per_source(batch, one)
        return self._per_source(batch, mixed) / np.maximum(groups, 1), groups > 0

    def _accuracy_change(self, batch: Batch) -> tuple[np.ndarray, np.ndarray]:
        """[K] accuracy against that when the source was last seen; which sources had been seen, and are now."""
        last = batch.full.is_last
        sessions = self._per_source(batch.full, last)
        accuracy = self._per_source(batch.full, last & batch.full.correct) / np.maximum(sessions, 1)
        known, before = (sessions > 0) & (self.accuracy >= 0), self.accuracy
        self.accuracy = np.where(sessions > 0, accuracy, before)
        return np.where(known, accuracy - before, 0.0), known

    def _prepare(self, run: Run) -> None:
        """Read the sources from the dataset, once, and go on from the saved state if there is one."""
        if self.sources:
            return
        names = source_names(run, self.config.column)
        sources, self.source_of = np.unique(names, return_inverse=True)
        self.mixture = self._mixture(sources.tolist())
        self.epochs, self.owed = np.ones(len(sources), dtype=np.int64), np.zeros(len(sources))
        self.accuracy, self.asked = np.full(len(sources), -1.0), np.zeros(len(names), dtype=bool)
        self._orders: dict[int, tuple[tuple, np.ndarray]] = {}
        if self._saved:
            self._restore(sources.tolist())
        self.sources = sources.tolist()

    def _mixture(self, sources: list[str]) -> Mixture:
        settings, count = self.config, len(sources)
        self._refuse_sources(sources)
        groups = [[str(name) for name in group] for group in settings.groups or [sources]]
        method = settings.inner if settings.groups else settings.mode
        start = settings.initial_weights
        level = make_level(method, settings.q, settings.prior, settings.eta, start)
        places = [np.array([sources.index(name) for name in group]) for group in groups]
        if start is not None and len(start) != count:
            raise DataError(
                f"portfolio_mixture: initial_weights has {len(start)} numbers, and there are {count} sources: {sources}"
            )
        return Mixture(places, level, settings.floor, settings.forgetting)

    def _refuse_sources(self, sources: list[str]) -> None:
        settings, count = self.config, len(sources)
        who, named = "portfolio_mixture", [str(name) for group in settings.groups or () for name in group]
        if count > MOST_SOURCES:
            raise DataError(
                f"{who}: column {settings.column!r} names {count} sources, at most {MOST_SOURCES} can be mixed; choose "
                "another column"
            )
        if count * settings.floor > 1:
            raise DataError(
                f"{who}: floor={settings.floor} for each of {count} sources is more than 1 in all; set at most "
                f"{1 / count:.3g}"
            )
        if named and sorted(named) != sources:
            raise DataError(f"{who}: groups names {sorted(named)}, column {settings.column!r} of the data {sources}")
        lattices = {"universal": [sources], "hierarchical": settings.groups or ()}.get(settings.mode, ())
        if settings.mode == "hierarchical" and settings.inner != "universal":
            lattices = ()
        largest = max(map(len, lattices), default=0)
        if largest > MOST_OF_LATTICE or (lattices and len(lattices) > MOST_GROUPS):
            raise DataError(
                f"{who}: the lattice of universal takes {MOST_OF_LATTICE} sources, and {MOST_GROUPS} groups of them; "
                f"here are {largest} in one, {len(lattices)} in all: set mode=hierarchical with groups, or mode=eg"
            )

    def _restore(self, sources: list[str]) -> None:
        saved = self._saved
        if saved["sources"] != sources or len(saved["asked"]) != len(self.asked):
            raise StateError(f"portfolio_mixture: the saved state is of the sources {saved['sources']}, here {sources}")
        self.mixture.load_state_dict(saved)
        self.owed, self.accuracy = np.array(saved["owed"]), np.array(saved["accuracy"])
        self.epochs, self.asked = np.array(saved["epochs"]), np.array(saved["asked"]).astype(bool)
        self.order_seed = int(saved["order_seed"])

    def state_dict(self) -> dict[str, Any]:
        if not self.sources:
            return self._saved
        changing = {"epochs": self.epochs.copy(), "asked": self.asked.astype(np.uint8)}
        names = ("sources", "owed", "accuracy", "order_seed")
        return {**self.mixture.state_dict(), **changing, **{name: getattr(self, name) for name in names}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._saved, self.sources = state, []


def source_names(run: Run, column: str) -> np.ndarray:
    """[N] the source of each row of the dataset, as text.

    Raises:
        DataError: if a row has no such column.
    """
    rows = (run.dataset[prompt_id] for prompt_id in range(len(run.dataset)))
    found = [row.get(column, (row.get("extra_info") or {}).get(column)) for row in rows]
    if None in found:
        raise DataError(
            f"portfolio_mixture: row {found.index(None)} of the dataset has no {column!r}, neither as a column nor in "
            "extra_info; set plugins.portfolio_mixture.column to what names the source"
        )
    return np.array([str(name) for name in found])
