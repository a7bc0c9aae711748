"""What becomes of each two recipes together, found by composing them: nothing is trained and no model is looked at.

Two recipes *meet* where plugins of both act on one stage; stages that only look (`observe`, the ends of a step, of a
validation and of the training) are none. A plugin that both bring, and a default that gives way, meets nothing.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import combinations

from verl_plugins.composition import manifest, recipe
from verl_plugins.composition.compose import compose
from verl_plugins.composition.needs import check
from verl_plugins.composition.recipe import Disagreement, Recipe
from verl_plugins.errors import CompositionError, nearest
from verl_plugins.hookspecs import STAGES

LOOKING = ("observe", "on_validation_end", "on_step_end", "on_train_end")
"""Stages in which plugins do not change what the others see."""
PLACES = ("data.train_files", "data.val_files", "actor_rollout_ref.model.path")
"""What a preset for GPUs leaves to the user, and no pair depends on."""


@dataclass(frozen=True)
class Pair:
    """Two recipes on a preset."""

    first: str
    second: str
    settled: tuple[str, ...] = ()
    """Overrides that say which value counts where the two set a key differently: the first's, or else the second's."""
    stages: tuple[str, ...] = ()
    """Where they meet."""
    refused: str = ""
    """Why they cannot be together, in a sentence."""

    @property
    def state(self) -> str:
        """`refused`, `meet` or `apart`."""
        return "refused" if self.refused else "meet" if self.stages else "apart"

    def other(self, name: str) -> str:
        """The other of the two."""
        return self.second if name == self.first else self.first


def pairs(name: str | None = None, preset: str | None = None, overrides: Sequence[str] = ()) -> list[Pair]:
    """All pairs of training recipes that are installed, or those with `name`, in alphabetical order.

    Raises:
        CompositionError: there is no such recipe, preset or key.
    """
    installed = manifest.entries()
    known = {one.name: one for one in recipe.recipes(manifest.folders(installed)) if one.kind == "training"}
    if name is not None and name not in known:
        raise CompositionError(f"there is no training recipe {name!r}{nearest(name, known)}")
    made = compose("grpo", preset, overrides).prepare is not None
    words = [*(f"{key}=_" for key in PLACES if not (made or _said(key, overrides))), *overrides]
    acts = {one: _acts(item, installed) for one, item in known.items()}
    wanted = [two for two in combinations(sorted(known), 2) if name is None or name in two]
    logging.disable(logging.WARNING)
    try:
        return [_pair(first, second, preset, words, acts) for first, second in wanted]
    finally:
        logging.disable(logging.NOTSET)


def _said(key: str, overrides: Iterable[str]) -> bool:
    return any(text.lstrip("+").startswith(f"{key}=") for text in overrides)


def _acts(item: Recipe, installed: Sequence[manifest.EntryPoint]) -> dict[str, set[str]]:
    """Plugins of the recipe by stage, without those that look and defaults that give way."""
    found: dict[str, set[str]] = {}
    for name in item.plugins:
        for hook in manifest.find(name, installed).hooks:
            if hook.stage not in LOOKING and hook.kind != "default":
                found.setdefault(hook.stage, set()).add(name)
    return found


def _pair(
    first: str, second: str, preset: str | None, words: Sequence[str], acts: dict[str, dict[str, set[str]]]
) -> Pair:
    tried: list[Sequence[str]] = [()]
    refused: list[str] = []
    for settled in tried:
        try:
            check(compose(f"{first}+{second}", preset, [*words, *settled]))
            break
        except Disagreement as error:
            tried += error.settled
        except CompositionError as error:
            refused.append(str(error))
    else:
        return Pair(first, second, refused=refused[0])
    one, other = acts[first], acts[second]
    met = [stage for stage in one.keys() & other.keys() if one[stage] - other[stage] and other[stage] - one[stage]]
    return Pair(first, second, tuple(settled), tuple(sorted(met, key=STAGES.index)))


def print_pairs(name: str, found: Sequence[Pair]) -> None:
    """A table of what becomes of recipe `name` beside each other one, or of `all` pairs."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("recipes" if name == "all" else f"{name} and", no_wrap=True)
    table.add_column("they", no_wrap=True)
    table.add_column("where, what to say on the command line, or why not", overflow="fold")
    for pair in found:
        why = pair.refused or "; ".join(filter(None, [", ".join(pair.stages), " ".join(pair.settled)]))
        state = {"meet": "meet", "apart": "do not meet", "refused": "are refused"}[pair.state]
        table.add_row(f"{pair.first}+{pair.second}" if name == "all" else pair.other(name), state, why)
    Console(markup=False, highlight=False).print(table)
