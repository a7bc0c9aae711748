"""From a section of settings to stages in a documented order; what does not fit ends in one sentence."""

from __future__ import annotations

import asyncio
import sys
from dataclasses import dataclass

import pytest

from verl_plugins import CompositionError, Plugin, hookimpl, setting
from verl_plugins.composition import manager
from verl_plugins.composition.manager import Plugins, build
from verl_plugins.composition.settings import typed


class View:
    """A service that can be scoped, as the bridge's are."""

    def __init__(self, owner: str = "") -> None:
        self.owner = owner

    def scoped(self, owner: str) -> View:
        return View(owner)


def plugin(plugin_name: str, **members) -> Plugin:
    """An instance of a throw-away class."""
    return type(plugin_name.title(), (Plugin,), {"name": plugin_name, **members})(None)


class TestOrder:
    """Plugins act in the order of the section; trylast last; wrappers outside, the first outermost."""

    def test_all_results_come_in_section_order(self) -> None:
        @hookimpl
        def loss_terms(self, tokens):
            return self.name

        plugins = Plugins([plugin(name, loss_terms=loss_terms) for name in "abc"])
        assert plugins.hook.loss_terms(tokens=None) == ["a", "b", "c"]
        assert plugins.of_stage("loss_terms") == [(name, "implements") for name in "abc"]
        assert [item.name for item in plugins] == ["a", "b", "c"]

    def test_wrappers_go_round_and_defaults_give_way(self) -> None:
        def wrap(letter):
            @hookimpl(wrapper=True)
            def estimate_advantage(self, batch):
                return letter + (yield)

            return estimate_advantage

        def answer(**flags):
            @hookimpl(**flags)
            def estimate_advantage(self, run, batch):
                return self.name

            return estimate_advantage

        members = [
            plugin("default", estimate_advantage=answer(trylast=True)),
            plugin("outer", estimate_advantage=wrap("o")),
            plugin("method", estimate_advantage=answer()),
            plugin("inner", estimate_advantage=wrap("i")),
        ]
        plugins = Plugins(members)
        plugins.add_fallback(plugin("verl", estimate_advantage=answer(trylast=True)))
        assert plugins.hook.estimate_advantage(run=None, batch=None) == "oimethod"
        assert plugins.of_stage("estimate_advantage") == [
            ("outer", "wraps"),
            ("inner", "wraps"),
            ("method", "implements"),
            ("default", "default"),
            ("verl", "default"),
        ]

    def test_the_fallback_answers_when_no_plugin_does(self) -> None:
        @hookimpl(trylast=True)
        def policy_loss(self, tokens):
            return "verl"

        plugins = Plugins([])
        assert not plugins.implements("policy_loss")
        plugins.add_fallback(plugin("verl", policy_loss=policy_loss))
        assert plugins.hook.policy_loss(tokens=None) == "verl"


class TestScope:
    """Each implementation sees its own view of the services, whatever its kind, and errors say whose they are."""

    def test_plain_and_wrapper(self) -> None:
        @hookimpl
        def observe(self, batch, run):
            seen.append((self.name, run.owner))

        @hookimpl(wrapper=True)
        def around(self, run):
            seen.append((self.name, run.owner))
            return (yield)

        seen: list = []
        around.__name__ = "observe"
        plugins = Plugins([plugin("inner", observe=observe), plugin("outer", observe=around)])
        plugins.hook.observe(run=View(), batch=None)
        assert seen == [("outer", "outer"), ("inner", "inner")]

    def test_coroutine(self) -> None:
        @hookimpl
        async def rollout_group(self, run, sample):
            await asyncio.sleep(0)
            return [run.owner, await sample(2)]

        async def sample(count):
            return count

        plugins = Plugins([plugin("groups", rollout_group=rollout_group)])
        result = asyncio.run(plugins.hook.rollout_group(run=View(), prompt=None, sample=sample))
        assert result == ["groups", 2]

    def test_an_error_names_the_plugin_that_raised_it_and_not_those_around(self) -> None:
        @hookimpl
        def policy_loss(self, tokens):
            raise ValueError("bad")

        @hookimpl(wrapper=True)
        def wrapper(self):
            return (yield)

        wrapper.__name__ = "policy_loss"
        plugins = Plugins([plugin("inner", policy_loss=policy_loss), plugin("outer", policy_loss=wrapper)])
        with pytest.raises(ValueError, match="bad") as error:
            plugins.hook.policy_loss(tokens=View())
        line = policy_loss.__code__.co_firstlineno + 2
        assert error.value.__notes__ == [f"raised by plugin 'inner' in policy_loss, {__file__}:{line}"]

    def test_a_service_without_views_is_passed_as_it_is(self) -> None:
        @hookimpl
        def loss_terms(self, tokens):
            return tokens

        assert Plugins([plugin("a", loss_terms=loss_terms)]).hook.loss_terms(tokens=3) == [3]


class TestRefusals:
    """What cannot be composed."""

    def refuse(self, sentence, members, *parts) -> None:
        with pytest.raises(CompositionError) as error:
            Plugins(members, {member.name: f"{member.name}-dist 1.0" for member in members})
        sentence(error.value, *parts)

    def test_two_answers_to_one_stage(self, sentence) -> None:
        @hookimpl
        def select_prompts(self, run, count): ...

        members = [plugin(name, select_prompts=select_prompts) for name in ("one", "two")]
        self.refuse(sentence, members, "'one' (one-dist 1.0)", "'two' (two-dist 1.0)", "select_prompts", "~plugins.two")

    def test_two_defaults_and_no_answer(self, sentence) -> None:
        @hookimpl(trylast=True)
        def select_prompts(self, run, count): ...

        members = [plugin(name, select_prompts=select_prompts) for name in ("one", "two")]
        self.refuse(sentence, members, "'one'", "'two'", "select_prompts")

    def test_unknown_stage(self, sentence) -> None:
        @hookimpl
        def select_promts(self): ...

        members = [plugin("one", select_promts=select_promts)]
        self.refuse(sentence, members, "'one' of one-dist 1.0", "'select_promts'", "did you mean 'select_prompts'?")

    def test_unknown_argument(self, sentence) -> None:
        @hookimpl
        def observe(self, run, batches): ...

        members = [plugin("one", observe=observe)]
        self.refuse(sentence, members, "'one' of one-dist 1.0", "observe", "'batches'", "did you mean 'batch'?")

    def test_wrapper_that_does_not_yield(self, sentence) -> None:
        @hookimpl(wrapper=True)
        def observe(self, run): ...

        self.refuse(sentence, [plugin("one", observe=observe)], "'one'", "observe", "yield")

    def test_plain_function_on_an_async_stage(self, sentence) -> None:
        @hookimpl
        def rollout_group(self, run): ...

        self.refuse(sentence, [plugin("one", rollout_group=rollout_group)], "'one'", "rollout_group", "async def")


class TestBuild:
    """Selected plugins are imported, versions checked, settings typed."""

    def test_settings_arrive_typed(self, site) -> None:
        site.plugin("rated", "@dataclass\nclass Config:\n    rate: float = setting(1.0)\n    size: int = 3")
        (made,) = build({"rated": {"rate": 2}})
        assert (made.config.rate, made.config.size) == (2.0, 3)
        assert type(made.config.rate) is float
        assert build({"rated": None}).order[0].config.rate == 1.0

    @pytest.mark.parametrize(
        ("body", "parts"),
        [
            ("api = 99", ["API version 99", "newer", "acme"]),
            ("api = 0", ["API version 0", "older", "acme"]),
            ("verl = '>=7'", ["verl>=7", "acme 1.0", "is installed"]),
            ("verl = 'seven'", ["'seven'", "acme 1.0"]),
        ],
    )
    def test_versions_are_checked(self, site, sentence, body: str, parts: list[str]) -> None:
        site.plugin("dated", body)
        with pytest.raises(CompositionError) as error:
            build({"dated": {}})
        sentence(error.value, "'dated'", *parts)

    def test_a_plugin_that_does_not_import(self, site, sentence) -> None:
        site.plugin("late", "from verl_plugins import nothing_like_this")
        with pytest.raises(CompositionError) as error:
            build({"late": {}})
        sentence(error.value, "'late'", "acme 1.0", "nothing_like_this")

    @pytest.mark.parametrize("name", ["verl", "ray", "transfer_queue"])
    def test_a_module_that_loads_what_a_run_prepares_first(self, site, sentence, monkeypatch, name) -> None:
        site.plugin("hasty")
        file = site.path / "acme_hasty.py"
        file.write_text(f"import {name}.of_acme\n{file.read_text()}")
        for module in [module for module in sys.modules if module.partition(".")[0] == name]:
            monkeypatch.delitem(sys.modules, module)
        site.write(f"{name}/__init__.py", "")
        site.write(f"{name}/of_acme.py", "")
        with pytest.raises(CompositionError) as refused:
            build({"hasty": {}})
        sentence(refused.value, "'hasty' of acme", f"acme_hasty imports {name}", "inside the function")

    def test_a_class_that_is_no_plugin(self, site, sentence) -> None:
        site.write("odd_module.py", "class Plugin: ...\nclass Method(Plugin):\n    name = 'odd'\n")
        site.distribution("odd-dist", odd="odd_module:Method")
        with pytest.raises(CompositionError) as error:
            build({"odd": {}})
        sentence(error.value, "'odd'", "odd-dist 1.0", "not a subclass of Plugin")

    def test_verl_must_be_installed(self, site, sentence, monkeypatch) -> None:
        def missing(name):
            raise manager.PackageNotFoundError(name)

        site.plugin("alone")
        monkeypatch.setattr(manager, "version", missing)
        with pytest.raises(CompositionError) as error:
            build({"alone": {}})
        sentence(error.value, "'alone'", "verl is not installed")


@dataclass
class Config:
    required: int
    rate: float = setting(0.5, ge=0, lt=1)
    above: float = setting(0.5, gt=0, le=2)
    mode: str = setting("fast", choices=("fast", "slow"))
    limit: float | None = setting(None, ge=1)
    count: int | float = 1
    steps: list[int] = None
    pair: tuple[float, float] = (0.0, 1.0)
    on: bool = True

    def __post_init__(self):
        if self.required == 13:
            raise ValueError("required must not be 13")


@pytest.mark.parametrize(
    ("given", "parts"),
    [
        ({"ratee": 1}, ["plugins.x.ratee", "did you mean 'rate'?"]),
        ({"rate": 1}, ["plugins.x.rate is 1.0", "less than 1"]),
        ({"rate": -0.5}, ["plugins.x.rate is -0.5", "at least 0"]),
        ({"above": 0}, ["plugins.x.above is 0.0", "greater than 0"]),
        ({"above": 2.5}, ["plugins.x.above is 2.5", "at most 2"]),
        ({"rate": "0.1"}, ["plugins.x.rate is '0.1'", "a number"]),
        ({"rate": float("nan")}, ["plugins.x.rate is nan", "a number"]),
        ({"rate": True}, ["plugins.x.rate is true", "a number"]),
        ({"required": 1.5}, ["plugins.x.required is 1.5", "a whole number"]),
        ({"required": 13}, ["plugins.x: required must not be 13"]),
        ({"mode": "quick"}, ["plugins.x.mode is 'quick'", "'fast', 'slow'"]),
        ({"limit": "no"}, ["plugins.x.limit is 'no'", "a number or null"]),
        ({"steps": [1, "two"]}, ["plugins.x.steps[1] is 'two'", "a whole number"]),
        ({"pair": [1.0]}, ["plugins.x.pair has 1 values", "must have 2"]),
        ({"on": "yes"}, ["plugins.x.on is 'yes'", "true or false"]),
        ({"on": None}, ["plugins.x.on is null"]),
    ],
)
def test_a_wrong_setting_is_named_with_its_value(sentence, given: dict, parts: list[str]) -> None:
    with pytest.raises(CompositionError) as error:
        typed(Config, {"required": 1, **given}, "plugins.x")
    sentence(error.value, *parts)


def test_a_required_setting_must_be_given(sentence) -> None:
    with pytest.raises(CompositionError) as error:
        typed(Config, {}, "plugins.x")
    sentence(error.value, "plugins.x.required has no value")


def test_settings_that_fit() -> None:
    config = typed(Config, {"required": 2, "limit": 3, "steps": [1, 2], "pair": [1, 2], "count": 2}, "plugins.x")
    assert (config.limit, config.steps, config.pair, config.count) == (3.0, [1, 2], (1.0, 2.0), 2)
    assert type(config.count) is int
