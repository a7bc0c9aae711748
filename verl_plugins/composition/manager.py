"""The plugins of one run: from the section `plugins:` of a configuration to stages that can be called.

Every process (driver, agent-loop, reward and actor workers) calls `build` with the same plain section.

Order: plugins act in the order of the section. On each stage `tryfirst` implementations come first and `trylast` ones
last (among several `trylast`, the later in the section comes first, as in pluggy); of wrappers, the first in the
section is the outermost.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import os
import sys
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import pluggy
from packaging.specifiers import InvalidSpecifier, SpecifierSet

from verl_plugins import hookspecs
from verl_plugins.composition import manifest, outcome
from verl_plugins.composition.blame import blame
from verl_plugins.composition.manifest import Manifest
from verl_plugins.composition.settings import typed
from verl_plugins.errors import CompositionError, nearest
from verl_plugins.hookspecs import API_VERSION, FIRST_RESULT, PROJECT, STAGES
from verl_plugins.plugin import Plugin

LATE = ("verl", "ray", "transfer_queue")
"""What a run imports when it has set what they read as they are imported: the platform, the node, the address."""
SCOPED = ("run", "tokens", "distilled", "values", "actor")
"""Arguments of a stage that each plugin receives as its own view, where they have one (`.scoped(plugin name)`)."""


Check = Callable[..., None]
"""Called with stage, what an implementation or wrapper gave, all arguments of the stage, and `wraps`."""

TRACE_VARIABLE = "VERL_PLUGINS_TRACE"
"""Set to 1, each call of a stage is printed: the plugins called, in order, and what came back."""


def build(section: Mapping[str, Any]) -> Plugins:
    """Load, check and configure the plugins of a section `{name: {setting: value}}`."""
    installed = manifest.entries()
    found = {name: manifest.find(name, installed) for name in section}
    plugins = [instance(found[name], settings) for name, settings in section.items()]
    return Plugins(plugins, {name: item.owner for name, item in found.items()}, outcome.check_in_training)


def instance(plugin: Manifest, settings: Mapping[str, Any] | None) -> Plugin:
    """One configured plugin."""
    check_versions(plugin)
    cls = load(plugin)
    return cls(typed(cls.Config, settings, f"plugins.{plugin.name}"))


def check_versions(plugin: Manifest) -> None:
    """Refuse a plugin written for another API version or for other versions of verl."""
    who = f"plugin {plugin.name!r} of {plugin.owner}"
    if plugin.api != API_VERSION:
        age = "newer" if plugin.api > API_VERSION else "older"
        raise CompositionError(
            f"{who} is written for API version {plugin.api}, {age} than this package's {API_VERSION}: "
            f"install a version of {plugin.distribution} for API version {API_VERSION}"
        )
    try:
        installed = version("verl")
        fits = SpecifierSet(plugin.verl).contains(installed, prereleases=True)
    except PackageNotFoundError:
        raise CompositionError(f"{who} needs verl{plugin.verl}, and verl is not installed") from None
    except InvalidSpecifier:
        raise CompositionError(
            f"{who} gives verl versions as {plugin.verl!r}: write them like '>=0.9.1,<0.10'"
        ) from None
    if not fits:
        raise CompositionError(f"{who} works with verl{plugin.verl}, and verl {installed} is installed")


def load(plugin: Manifest) -> type[Plugin]:
    """Import the plugin's class."""
    module, _, name = plugin.target.partition(":")
    before = sys.modules.keys() & {*LATE}
    try:
        cls = functools.reduce(getattr, name.split("."), importlib.import_module(module))
    except Exception as error:
        cause = " ".join(f"{type(error).__name__}: {error}".split())
        raise CompositionError(f"plugin {plugin.name!r} of {plugin.owner} cannot be imported: {cause}") from error
    if not (isinstance(cls, type) and issubclass(cls, Plugin)):
        raise CompositionError(f"plugin {plugin.name!r} of {plugin.owner}: {plugin.target} is not a subclass of Plugin")
    if early := sorted((sys.modules.keys() & {*LATE}) - before):
        raise CompositionError(
            f"plugin {plugin.name!r} of {plugin.owner}: {module} imports {' and '.join(early)}, which must wait "
            "until the run has said on what machine it is: import it inside the function that uses it"
        )
    return cls


class Plugins:
    """Configured plugins, registered and ready to be called: `plugins.hook.<stage>(…)`."""

    def __init__(
        self, plugins: Sequence[Plugin], owners: Mapping[str, str] | None = None, check: Check | None = None
    ) -> None:
        """Register the plugins.

        Args:
            plugins: in the order of the section.
            owners: which distribution and version brings each plugin, for messages.
            check: looks at what each implementation gives (`verl_plugins.composition.outcome.check`).
        """
        self._check = check
        self.order = tuple(plugins)
        """In the order of the section."""
        self.owners = {plugin.name: (owners or {}).get(plugin.name, "") for plugin in plugins}
        self._manager = pluggy.PluginManager(PROJECT)
        self._manager.add_hookspecs(hookspecs)
        for plugin in reversed(self.order):  # pluggy calls the last registered first
            self._register(plugin, plugin.name, f"plugin {plugin.name!r}")
        for stage in FIRST_RESULT:
            self._refuse_conflict(stage)
        if os.environ.get(TRACE_VARIABLE, "") not in ("", "0"):
            self._manager.add_hookcall_monitoring(_note_call, _note_result)

    @property
    def hook(self) -> pluggy.HookRelay:
        """The stages, to be called with keyword arguments."""
        return self._manager.hook

    def __iter__(self) -> Iterator[Plugin]:
        return iter(self.order)

    def __len__(self) -> int:
        return len(self.order)

    def implements(self, stage: str) -> bool:
        """Whether any plugin implements or wraps the stage."""
        return bool(self._implementations(stage))

    def of_stage(self, stage: str) -> list[tuple[str, str]]:
        """(plugin name, kind) in call order; kind is `wraps`, `implements` or `default`. Wrappers come first."""
        return [(impl.plugin_name, _kind(stage, impl)) for impl in self._implementations(stage)]

    def add_fallback(self, plugin: object, name: str = "verl") -> None:
        """Register what acts where no plugin does: an object whose implementations are marked `trylast`."""
        self._register(plugin, name, f"{name} itself")

    def _implementations(self, stage: str) -> list[pluggy.HookImpl]:
        return getattr(self._manager.hook, stage).get_hookimpls()[::-1]

    def _register(self, plugin: object, name: str, blamed: str) -> None:
        who = f"plugin {name!r}" + (f" of {self.owners[name]}" if self.owners.get(name) else "")
        for method, options in self._hooks(plugin):
            _check_hook(method, options, who)
        try:
            self._manager.register(plugin, name)
            self._manager.check_pending()
        except (pluggy.PluginValidationError, ValueError) as error:
            raise CompositionError(f"{who} cannot be registered: {' '.join(str(error).split())}") from error
        for caller in self._manager.get_hookcallers(plugin) or []:
            for impl in caller.get_hookimpls():
                if impl.plugin is plugin:
                    impl.function = _scoped(impl, name, caller.name, blamed, self._check)
                    impl.argnames = _arguments(caller.name)

    def _hooks(self, plugin: object) -> Iterator[tuple[Callable[..., Any], Mapping[str, Any]]]:
        for attribute in dir(plugin):
            if options := self._manager.parse_hookimpl_opts(plugin, attribute):
                yield getattr(plugin, attribute), options

    def _refuse_conflict(self, stage: str) -> None:
        """A first-result stage takes one plugin's answer; defaults (`trylast`) give way to one that is not."""
        impls = [impl for impl in self._implementations(stage) if not (impl.wrapper or impl.hookwrapper)]
        rivals = [impl for impl in impls if not impl.trylast] or impls
        if len(rivals) < 2:
            return
        names = [impl.plugin_name for impl in rivals]
        who = " and ".join(f"{name!r} ({self.owners[name]})" if self.owners[name] else repr(name) for name in names)
        raise CompositionError(
            f"plugins {who} both implement {stage}, which takes the answer of one: leave one out, "
            f"as in ~plugins.{names[-1]}"
        )


def _kind(stage: str, impl: pluggy.HookImpl) -> str:
    return manifest.Hook(stage, wrapper=impl.wrapper or impl.hookwrapper, trylast=impl.trylast).kind


def _check_hook(method: Callable[..., Any], options: Mapping[str, Any], who: str) -> None:
    """Name, arguments and nature of one implementation must be those of a stage."""
    stage = options.get("specname") or method.__name__
    if stage not in STAGES:
        raise CompositionError(f"{who} implements {stage!r}, which is not a stage{nearest(stage, STAGES)}")
    spec = getattr(hookspecs, stage)
    known = list(inspect.signature(spec).parameters)
    for argument in inspect.signature(method).parameters:
        if argument not in known:
            raise CompositionError(
                f"{who}: {stage} has an argument {argument!r} that the stage does not give{nearest(argument, known)}"
            )
    if options.get("wrapper") or options.get("hookwrapper"):
        if not inspect.isgeneratorfunction(method):
            raise CompositionError(f"{who}: {stage} is a wrapper and must yield exactly once")
    elif inspect.iscoroutinefunction(method) != inspect.iscoroutinefunction(spec):
        word = "async def" if inspect.iscoroutinefunction(spec) else "a plain def"
        raise CompositionError(f"{who}: {stage} must be {word}")


def _arguments(stage: str) -> tuple[str, ...]:
    return tuple(inspect.signature(getattr(hookspecs, stage)).parameters)


def _scoped(impl: pluggy.HookImpl, owner: str, stage: str, blamed: str, check: Check | None) -> Callable[..., Any]:
    """The implementation, given all arguments of the stage: called with those it asks for, as its plugin sees them.

    Errors say whose they are, and what it gives is checked.
    """
    function, wanted, names = impl.function, impl.argnames, _arguments(stage)
    wraps = bool(impl.wrapper or impl.hookwrapper)

    def views(arguments: Mapping[str, Any]) -> list[Any]:
        given = [(name, arguments[name]) for name in wanted]
        return [arg.scoped(owner) if name in SCOPED and hasattr(arg, "scoped") else arg for name, arg in given]

    def checked(result: Any, arguments: Mapping[str, Any]) -> Any:
        if check is not None:
            check(stage, result, arguments, wraps=wraps)
        return result

    async def awaited(result: Awaitable[Any], arguments: Mapping[str, Any]) -> Any:
        with blame(blamed, stage, function):
            return checked(await result, arguments)

    def wrapper(*args: Any) -> Iterator[Any]:
        arguments = dict(zip(names, args, strict=True))
        with blame(blamed, stage, function):
            result = yield from function(*views(arguments))
            return awaited(result, arguments) if inspect.isawaitable(result) else checked(result, arguments)

    async def coroutine(*args: Any) -> Any:
        arguments = dict(zip(names, args, strict=True))
        with blame(blamed, stage, function):
            return checked(await function(*views(arguments)), arguments)

    def plain(*args: Any) -> Any:
        arguments = dict(zip(names, args, strict=True))
        with blame(blamed, stage, function):
            return checked(function(*views(arguments)), arguments)

    if wraps:
        return wrapper
    return coroutine if inspect.iscoroutinefunction(function) else plain


def _note_call(stage: str, impls: Sequence[pluggy.HookImpl], arguments: Mapping[str, Any]) -> None:
    order = " > ".join(f"{impl.plugin_name} ({_kind(stage, impl)})" for impl in reversed(impls)) or "no plugin"
    step = getattr(next((arguments[name] for name in SCOPED if name in arguments), None), "step", None)
    print(f"trace: process {os.getpid()}{'' if step is None else f' step {step}'}: {stage} calls {order}", flush=True)


def _note_result(outcome: pluggy.Result, stage: str, impls: Sequence[pluggy.HookImpl], _: Mapping[str, Any]) -> None:
    if outcome.exception is not None:
        result = f"{type(outcome.exception).__name__}: {outcome.exception}"
    else:
        value = outcome.get_result()
        shape = getattr(value, "shape", None)
        result = type(value).__name__ if shape is None else f"{type(value).__name__} {list(shape)}"
    print(f"trace: process {os.getpid()}: {stage} gave {result}", flush=True)
