"""`check_plugin`: the laws every plugin must keep, in one call from its author's own tests.

About the class:
    config        every setting has a type and an explanation, defaults and authors' values are accepted
    name          the class is called as its entry point, and says in its docstring what it does
    needs         names fields verl can be asked for
    hooks         stages and their arguments exist, versions of API and verl fit
    check         accepts the configuration of the scenario
About each stage (the law is then called `law.stage`, as in `row_order.select_rows`):
    runs          on ordinary data, without an error
    result        right shape, finite, within range; 0 outside the response mask
    metrics       finite numbers are logged
    gradient      of a loss: reaches the policy, is finite, and is 0 outside the response mask
    global_rng    no global generator is used
    in_place      what was handed over is left as it was
    repeat        the same seed gives the same, whatever the global generators hold
    processes     nothing passes from one process to another through the object
    row_order     rows in another order give the same, row by row
    padding       more padding, and what stands at tokens the policy did not generate, change nothing
    micro_batches the loss of a row does not depend on what else is in its micro-batch
    ranks         nor on which rank computes the micro-batch, and metrics, logged by some ranks only, are the same
    state         state_dict, a checkpoint and load_state_dict: as if nothing had been interrupted
    lonely_group  a group of one response has advantage 0, or is refused with a PluginError
About recorded cases:
    golden.<case> the replay gives what is expected
"""

from __future__ import annotations

import copy
import dataclasses
import tempfile
import types
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin

from omegaconf import DictConfig

from verl_plugins.bridge import checkpoint
from verl_plugins.composition import manager, manifest
from verl_plugins.composition.needs import NEEDS
from verl_plugins.composition.settings import typed
from verl_plugins.errors import CompositionError, PluginError, ResultError, nearest
from verl_plugins.hookspecs import PROJECT, STAGES
from verl_plugins.plugin import Plugin
from verl_plugins.testing import golden as recorded
from verl_plugins.testing.episode import Episode
from verl_plugins.testing.record import Fault, StageFailed, differences, global_seed, same
from verl_plugins.testing.scenario import Change, Scenario

BEFORE, AFTER = (1, 2), (3, 4)
"""Steps before and after the interruption."""
CLASS_LAWS = ("config", "name", "needs", "hooks", "check")
CALL_LAWS = ("runs", "result", "metrics", "gradient", "global_rng", "in_place", "state", "lonely_group")
VARIANTS: Mapping[str, tuple[dict[str, Any], str]] = {
    "repeat": ({}, "when the same run is made again"),
    "processes": ({"shared": True}, "when one object serves all processes; in training each has its own"),
    "row_order": ({"change": Change(shuffle=True)}, "when the rows come in another order"),
    "padding": ({"change": Change(pad=True)}, "with more padding"),
    "micro_batches": ({"change": Change(split=True)}, "when a mini-batch is one micro-batch instead of two"),
    "ranks": ({"change": Change(ranks=2)}, "when the micro-batches are spread over two ranks"),
}
EXACT = ("repeat", "processes", "ranks")
OF_THE_LOSS = ("micro_batches", "ranks")

LOSS_STAGES = ("shape_logits", "value_loss", "distillation_loss", "policy_loss", "loss_terms")

Maker = Callable[[], Plugin]


class PluginCheckError(AssertionError):
    """Laws that do not hold, one sentence each."""

    def __init__(self, name: str, faults: list[Fault]) -> None:
        lines = [f"  {fault.name}: {fault.text}" for fault in faults]
        laws = "a law" if len(faults) == 1 else f"{len(faults)} laws"
        super().__init__("\n".join([f"plugin {name!r} breaks {laws} of verl_plugins.testing.check:", *lines]))
        self.faults = faults


def check_plugin(
    plugin: str | type[Plugin],
    *,
    config: Mapping[str, Any] | None = None,
    scenario: Scenario | None = None,
    except_for: Mapping[str, str] | None = None,
    golden: str | Path | None = None,
    replay: recorded.Replay | None = None,
) -> None:
    """Play a few training steps with a plugin in several ways, and refuse what would not hold in a real training.

    Args:
        plugin: its class, or the name of its entry point.
        config: its settings; those left out have their defaults.
        scenario: the invented data and verl's settings, where the method must have others.
        except_for: laws the method breaks on purpose, each with the reason. One that holds after all is refused.
        golden: a file of recorded cases (`verl_plugins.testing.golden`), replayed with `replay`.

    Raises:
        PluginCheckError: all laws that do not hold; its cause is the first error that the plugin raised.
        ValueError: `golden` without `replay`, or the other way round.
    """
    if (golden is None) != (replay is None):
        raise ValueError("check_plugin takes golden=…, a file, and replay=…, a function, together")
    check = _Check(except_for or {})
    cls = check.loaded(plugin)
    if cls is not None:
        check.about_class(cls, config or {})
        if not check.open():
            with tempfile.TemporaryDirectory() as folder:
                own = {"trainer.default_local_dir": folder}  # where plugins put files
                world = scenario or Scenario()
                world = dataclasses.replace(world, overrides={**own, **world.overrides})
                check.play(lambda: cls(typed(cls.Config, config, f"plugins.{cls.name}")), world, Path(folder))
        if golden is not None:
            check.replay(Path(golden), replay)
    if faults := [*check.open(), *check.about_exceptions()]:
        name = plugin if isinstance(plugin, str) else getattr(plugin, "name", plugin.__name__)
        raise PluginCheckError(name, faults) from next((fault.error for fault in faults if fault.error), None)


class _Check:
    """The faults found so far."""

    def __init__(self, except_for: Mapping[str, str]) -> None:
        self._except_for = except_for
        self._faults: dict[str, Fault] = {}
        """The first of each name."""
        self._complete = False

    def open(self) -> list[Fault]:
        """Faults that are not excused."""
        return [fault for name, fault in self._faults.items() if name not in self._except_for]

    def _add(self, law: str, text: str, stage: str = "", error: BaseException | None = None) -> None:
        fault = Fault(law, stage, text, error)
        self._faults.setdefault(fault.name, fault)

    def about_exceptions(self) -> Iterator[Fault]:
        laws = (*CLASS_LAWS, *CALL_LAWS, *VARIANTS, "golden")
        for name, reason in self._except_for.items():
            law, _, stage = name.partition(".")
            if law not in laws:
                yield Fault("except_for", "", f"{name!r} is not a law{nearest(law, laws)}")
            elif not isinstance(reason, str) or not reason.strip():
                yield Fault("except_for", "", f"{name!r} has no reason; say why the method breaks this law")
            elif self._complete and name not in self._faults:
                hint = nearest(stage, STAGES) if stage and law != "golden" and stage not in STAGES else ""
                yield Fault("except_for", "", f"{name!r} is kept; leave the exception out{hint}")

    # The class

    def loaded(self, plugin: str | type[Plugin]) -> type[Plugin] | None:
        """The class, if there is one, called as its entry point."""
        entries = manifest.entries()
        if isinstance(plugin, str):
            try:
                return manager.load(manifest.find(plugin, entries))
            except CompositionError as error:
                return self._add("name", str(error))
        if not (isinstance(plugin, type) and issubclass(plugin, Plugin)):
            return self._add("name", f"{plugin!r} is not a subclass of Plugin")
        target = f"{plugin.__module__}:{plugin.__qualname__}"
        for entry in entries:
            if entry.value == target and entry.name != getattr(plugin, "name", None):
                self._add(
                    "name", f"the class is called {getattr(plugin, 'name', None)!r}, its entry point {entry.name!r}"
                )
        return plugin

    def about_class(self, cls: type[Plugin], given: Mapping[str, Any]) -> None:
        name = getattr(cls, "name", None)
        if not (isinstance(name, str) and name.isidentifier()):
            return self._add("name", f"the class attribute name is {name!r}, expected a text such as 'my_method'")
        for text in _about_config(cls.Config, given, f"plugins.{name}"):
            self._add("config", text)
        if "config" in self._faults:
            return None
        described = manifest.from_class(
            cls, {"name": name, "target": "", "distribution": "", "distribution_version": ""}
        )
        if not described.idea:
            self._add("name", "neither module nor class has a docstring; `verl-plugins list` shows its first sentence")
        for need in sorted(set(cls.needs) - set(NEEDS)):
            self._add("needs", f"names {need!r}, which verl cannot be asked for{nearest(need, NEEDS)}")
        try:
            instance = cls(typed(cls.Config, given, f"plugins.{name}"))
        except Exception as error:
            return self._add("config", f"the plugin cannot be made with it: {_one_line(error)}", error=error)
        try:
            manager.check_versions(described)
            manager.Plugins([instance])
        except CompositionError as error:
            self._add("hooks", str(error))
        for stage in STAGES:
            if callable(getattr(cls, stage, None)) and not hasattr(getattr(cls, stage), f"{PROJECT}_impl"):
                self._add("hooks", f"{stage} is not marked with @hookimpl, so nothing calls it")
        if not described.hooks:
            self._add("hooks", f"no method is marked with @hookimpl; the stages are {', '.join(STAGES)}")
        return None

    # Episodes

    def play(self, make: Maker, scenario: Scenario, folder: Path) -> None:
        """All laws about stages."""
        name = make().name
        config = scenario.config({name: dataclasses.asdict(make().config)})
        try:
            make().check(config)
        except PluginError as error:
            return self._add("check", f"refuses the scenario; change it with scenario=Scenario(overrides=…): {error}")
        except Exception as error:
            return self._add("check", f"raises {_one_line(error)}", error=error)
        with global_seed(1):
            base = Episode(make, scenario, config, watch=True)
            try:
                base.play(BEFORE)
                saved = self._save(base, folder)
                base.play(AFTER, end=True)
            except StageFailed as failure:
                self._add(failure.law, str(failure), failure.stage, failure.error)
            except Exception as error:
                self._add("runs", f"ends with {_one_line(error)}, after what the plugin left behind", error=error)
            for fault in base.recorder.faults:
                self._add(fault.law, fault.text, fault.stage)
            if any(fault.error is not None or fault.law == "runs" for fault in self._faults.values()):
                return None
            self._vary(make, scenario, config, base)
            if any(fault.law == "repeat" for fault in self.open()):
                return None
            if saved is not None:
                self._resume(Episode(make, scenario, config), saved, base)
            self._lonely(Episode(make, scenario, config, change=Change(lonely=True)), base)
        self._complete = True
        return None

    def _vary(self, make: Maker, scenario: Scenario, config: DictConfig, base: Episode) -> None:
        for law, (options, words) in VARIANTS.items():
            stages = LOSS_STAGES if law in OF_THE_LOSS else ()
            if stages and not any(base.implements(stage) for stage in stages):
                continue
            if any(fault.law == "repeat" for fault in self.open()):
                return  # then nothing can be compared
            varied = Episode(make, scenario, config, follow=base, **options)
            try:
                with global_seed(2):
                    varied.play(BEFORE).play(AFTER, end=True)
            except StageFailed as failure:
                self._add(law, f"{failure}, {words}", failure.stage, failure.error)
                continue
            self._new_faults(law, varied, base, f", {words}")
            found = differences(base.recorder, varied.recorder, exact=law in EXACT, stages=stages)
            for stage, text in found.items():
                self._add(law, f"{text}, {words}", stage)

    def _new_faults(self, law: str, episode: Episode, base: Episode, words: str) -> None:
        """Faults of single calls that the plain run did not have."""
        known = {fault.name for fault in base.recorder.faults}
        for fault in episode.recorder.faults:
            if fault.name not in known:
                self._add(law, f"{fault.text}{words}", fault.stage)

    def _lonely(self, episode: Episode, base: Episode) -> None:
        words = ", when all but one response of a group have failed"
        try:
            episode.play(BEFORE)
        except StageFailed as failure:
            if not isinstance(failure.error, PluginError) or isinstance(failure.error, ResultError):
                self._add("lonely_group", f"{failure}{words}", failure.stage, failure.error)
        if not any(fault.stage == "estimate_advantage" for fault in self.open()):
            self._new_faults("lonely_group", episode, base, words)

    def _save(self, episode: Episode, folder: Path) -> _Saved | None:
        """A checkpoint, as the trainer writes it and reads it again."""
        name = episode.plugins["driver"].name
        saved = {process: episode.plugins[process] for process in checkpoint.PROCESSES}
        try:
            states = {process: {name: copy.deepcopy(plugin.state_dict())} for process, plugin in saved.items()}
            checkpoint.save(folder, BEFORE[-1], "", saved.values(), states)
            found = checkpoint.load(folder, BEFORE[-1], "", saved.values())
        except Exception as error:
            return self._add("state", f"cannot be saved: {_one_line(error)}", error=error)
        return _Saved(found, {process: state[name] for process, state in states.items()}, episode.weights())

    def _resume(self, episode: Episode, saved: _Saved, base: Episode) -> None:
        words = f"after a resume from step {BEFORE[-1]}"
        episode.set_weights(saved.weights)
        try:
            for process, by_name in saved.found.items():
                plugin = episode.plugins[process]
                if plugin.name in by_name:
                    plugin.load_state_dict(by_name[plugin.name])
                for key, value in plugin.state_dict().items():
                    if not same(value, saved.states[process].get(key)):
                        return self._add("state", f"{key!r} of the {process} is not restored by load_state_dict")
        except Exception as error:
            return self._add("state", f"cannot be loaded: {_one_line(error)}", error=error)
        try:
            episode.play(AFTER, end=True)
        except StageFailed as failure:
            return self._add("state", f"{failure}, {words}", failure.stage, failure.error)
        for stage, text in differences(base.recorder, episode.recorder, exact=True, since=AFTER[0]).items():
            self._add("state", f"{text}, {words}", stage)
        return None

    # Recorded cases

    def replay(self, path: Path, replay: recorded.Replay) -> None:
        """Every case of the file."""
        try:
            _, cases = recorded.read_cases(path)
        except (OSError, ValueError, KeyError) as error:
            return self._add("golden", f"{path} cannot be read: {_one_line(error)}")
        if not cases:
            return self._add("golden", f"{path} has no cases")
        for case in cases:
            try:
                wrong = recorded.differences(case, replay)
            except Exception as error:
                wrong = [f"the replay raises {_one_line(error)}"]
            if wrong:
                self._add("golden", "; ".join(wrong), case["name"])
        return None


@dataclasses.dataclass(frozen=True)
class _Saved:
    """State of all processes at the interruption."""

    found: checkpoint.States
    """As read from the checkpoint."""
    states: Mapping[str, Mapping[str, Any]]
    """As `state_dict` gave it, by process."""
    weights: Any


def _one_line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


def _about_config(config: type, given: Mapping[str, Any], where: str) -> Iterable[str]:
    """What is wrong with a Config, a sentence each."""
    if not dataclasses.is_dataclass(config):
        yield f"{config.__qualname__} is not a dataclass"
        return
    try:
        typed(config, given, where)
        hints = typing.get_type_hints(config)
    except (CompositionError, TypeError) as error:
        yield str(error)
        return
    for field in dataclasses.fields(config):
        key = f"{where}.{field.name}"
        if not _is_plain(hints[field.name]):
            yield (
                f"{key} has the type {hints[field.name]}, which a value in YAML cannot have; use bool, int, float, "
                "str, None, unions and Literal of these, lists and tuples"
            )
        if field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            continue
        if not field.metadata.get("doc"):
            yield f"{key} has no explanation; declare it as setting(default, 'what it does')"
        default = field.default_factory() if field.default is dataclasses.MISSING else field.default
        for whose, value in (("default", default), ("authors' value", field.metadata.get("authors", default))):
            try:
                typed(config, {**given, field.name: value}, where)
            except CompositionError as error:
                yield f"the {whose} is refused: {error}"


def _is_plain(hint: Any) -> bool:
    """Whether the type is one that settings may have."""
    if get_origin(hint) in (Union, types.UnionType, list, tuple):
        return all(arg is Ellipsis or _is_plain(arg) for arg in get_args(hint))
    return hint in (bool, int, float, str, type(None), list, tuple) or get_origin(hint) is Literal
