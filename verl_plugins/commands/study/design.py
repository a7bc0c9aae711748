"""What a study trains and measures: read from the command line or from a YAML file, checked before anything starts."""

from __future__ import annotations

import hashlib
import json
import re
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml

from verl_plugins.commands.study.columns import Column, column, function
from verl_plugins.composition.look.words import short
from verl_plugins.errors import CompositionError, nearest

BUDGETS = ("tokens", "steps")
VALIDATIONS = 6
"""Validations of a run where the study does not say how often."""
HERE, RUN = "{here}", "{run}"
"""In overrides: the folder of the study file, and that of the run."""
COLUMNS: Mapping[str, Mapping[str, Any]] = {
    "entropy, last 5": {"metric": "actor/entropy", "steps": "last 5"},
    "mixed groups": {"metric": "health/mixed_groups"},
    "length, last 5": {"metric": "response_length/mean", "steps": "last 5"},
    "truncated, last 5": {"metric": "health/truncated", "steps": "last 5"},
}
"""Measured where a study names no columns."""


@dataclass(frozen=True)
class Study:
    """Variants, each a recipe with overrides, to be trained with every seed."""

    variants: Mapping[str, Sequence[str]]
    """Name -> recipe and overrides; the first is the baseline unless `baseline` names another."""
    preset: str | None = None
    seeds: Sequence[int] = (1, 2, 3, 4, 5)
    steps: int | None = None
    budget: str = "tokens"
    baseline: str = ""
    title: str = ""
    common: Sequence[str] = ()
    """Overrides of every variant, which may say otherwise."""
    columns: Sequence[Column] = ()
    prepare: Callable[[Path], Sequence[str]] | None = None
    """Makes model and data in a folder; gives the overrides that use them."""
    task: str = ""
    """What `prepare` is called in the file."""
    here: Path = field(default_factory=Path)

    def arguments(self, variant: str, made: Sequence[str], run: Path) -> list[str]:
        """Recipe and overrides of a variant, those of all first; an override that is said twice counts as said last."""
        recipe, *said = self._words(variant, made)
        places = {HERE: str(self.here), RUN: str(run.absolute())}
        for name, place in places.items():
            said = [word.replace(name, place) for word in said]
        return [recipe, *said]

    def _words(self, variant: str, made: Sequence[str] = ()) -> list[str]:
        recipe, *own = self.variants[variant]
        said = {_key(word): word for word in (*self._defaults(), *made, *self.common, *own)}
        return [recipe, *said.values()]

    def _defaults(self) -> list[str]:
        words = [] if self.steps is None else [f"trainer.total_training_steps={self.steps}"]
        if self.steps is not None:
            words.append(f"trainer.test_freq={max(self.steps // VALIDATIONS, 1)}")
        return [*words, "trainer.val_before_train=true"]

    def name(self, variant: str, seed: int) -> str:
        """Of the run: the same for the same training, whichever study asks for it and wherever it lies."""
        said = json.dumps([self.preset, self.task, *self._words(variant)])
        slug = re.sub(r"[^A-Za-z0-9_.+-]+", "-", variant)[:40].strip("-.") or "variant"
        return f"{slug}-{hashlib.sha256(said.encode()).hexdigest()[:8]}-seed{seed}"


def _key(word: str) -> str:
    return word.partition("=")[0].lstrip("+~")


def from_options(words: Sequence[str], common: Sequence[str], metrics: Sequence[str], **options: Any) -> Study:
    """The study of a command line: variants, or a file and names of its variants; options that are None say nothing.

    Raises:
        CompositionError: no variant, one that is said twice, or another option that cannot be.
    """
    said = {key: value for key, value in options.items() if value is not None}
    if "seeds" in said:
        said["seeds"] = _seeds(said["seeds"], "--seeds")
    first = Path(words[0]) if words else Path()
    study = _read(first) if first.suffix in (".yaml", ".yml") else _spoken(words)
    study = replace(study, **said, common=(*study.common, *common))
    more = tuple(column(key, {"metric": key}, study.here) for key in metrics)
    study = checked(study, more)
    return _only(study, words[1:], first) if first.suffix in (".yaml", ".yml") else study


def _spoken(words: Sequence[str]) -> Study:
    """`'grpo plugins.grpo.scale=none'` is a recipe with an override."""
    variants: dict[str, list[str]] = {}
    for word in words:
        name = " ".join(word.split())
        if name in variants:
            raise CompositionError(f"the variant {name!r} is said twice: leave one out")
        variants[name] = _split(word, f"the variant {word!r}")
    return Study(variants=variants)


def _split(words: Any, where: str) -> list[str]:
    try:
        found = [str(word) for word in words] if isinstance(words, list) else shlex.split(words)
    except (ValueError, TypeError, AttributeError) as error:
        raise CompositionError(f"{where} cannot be read ({short(error)}): write a recipe and overrides") from error
    if not found:
        raise CompositionError(f"{where} is empty: write a recipe and overrides, as in 'grpo plugins.grpo.scale=none'")
    return found


def _read(path: Path) -> Study:
    """A study file."""
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
        said = dict(tree["study"])
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise CompositionError(f"{path} cannot be read ({short(error)})") from error
    except (KeyError, TypeError, ValueError):
        raise CompositionError(f"{path} is no study: it needs a key `study` with `variants` in it") from None
    known = [name for name in Study.__dataclass_fields__ if name not in ("here", "task")]
    if unknown := [key for key in said if key not in known]:
        raise CompositionError(f"{path}: study.{unknown[0]} is not known{nearest(str(unknown[0]), known)}")
    variants, columns = (_mapping(said.get(key), f"{path}: study.{key}") for key in ("variants", "columns"))
    return Study(
        **said
        | {
            "variants": {name: _split(value, f"{path}: study.variants.{name}") for name, value in variants.items()},
            "columns": tuple(column(title, what, path.parent) for title, what in columns.items()),
            "common": _split(said["common"], f"{path}: study.common") if said.get("common") else (),
            "prepare": function(said["prepare"], path.parent) if said.get("prepare") else None,
            "task": str(said.get("prepare") or ""),
            "seeds": _seeds(said.get("seeds", 5), f"{path}: study.seeds"),
            "here": path.parent.absolute(),
        }
    )


def _mapping(said: Any, where: str) -> dict[str, Any]:
    if said is None or isinstance(said, dict):
        return {str(key): value for key, value in (said or {}).items()}
    raise CompositionError(f"{where} is {said!r}: it must be a mapping of names")


def _only(study: Study, names: Sequence[str], path: Path) -> Study:
    """The study with some of its variants, the baseline always."""
    for name in names:
        if name not in study.variants:
            raise CompositionError(f"{path} has no variant {name!r}{nearest(name, study.variants)}")
    kept = {key: value for key, value in study.variants.items() if not names or key in (study.baseline, *names)}
    return replace(study, variants=kept)


def _seeds(said: Any, where: str) -> tuple[int, ...]:
    if isinstance(said, int) and not isinstance(said, bool):
        return tuple(range(1, said + 1))
    if isinstance(said, list) and all(isinstance(seed, int) for seed in said):
        return tuple(said)
    raise CompositionError(f"{where} is {said!r}: it must be how many, or a list of whole numbers")


def checked(study: Study, more: Sequence[Column] = ()) -> Study:
    """The study with its baseline and columns named, and some more of these.

    Raises:
        CompositionError: something that it says cannot be.
    """
    if not study.variants:
        raise CompositionError("a study needs variants: name recipes, as in study grpo vade, or a YAML file")
    if study.budget not in BUDGETS:
        raise CompositionError(f"--budget {study.budget}: it must be tokens or steps{nearest(study.budget, BUDGETS)}")
    if not study.seeds or min(study.seeds) < 0 or len({*study.seeds}) < len(study.seeds):
        raise CompositionError(f"seeds are {list(study.seeds)}: there must be one or more, different and not negative")
    if study.steps is not None and (not isinstance(study.steps, int) or study.steps < 1):
        raise CompositionError(f"steps are {study.steps!r}: they must be a whole number from 1")
    baseline = study.baseline or next(iter(study.variants))
    if baseline not in study.variants:
        raise CompositionError(f"the baseline {baseline!r} is no variant{nearest(baseline, study.variants)}")
    columns = study.columns or tuple(column(title, what, study.here) for title, what in COLUMNS.items())
    return replace(study, baseline=baseline, columns=(*columns, *more))
