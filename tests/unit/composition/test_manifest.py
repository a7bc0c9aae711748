"""Plugins are known by their source, without executing it; what cannot be read or used is `broken`, with its cause."""

from __future__ import annotations

import sys
from dataclasses import MISSING

import pytest

from verl_plugins.composition import manifest
from verl_plugins.composition.manifest import Hook
from verl_plugins.errors import CompositionError

RICH = """
paper, version = "arXiv:1234.56789", "3"
needs = frozenset({"entropy"})

@dataclass
class Config:
    rate: float = setting(0.5, "how fast", authors=0.25, ge=0, lt=1)
    mode: str = setting("fast", choices=MODES)
    offset: int = setting(-2)
    plain: bool = True
    given: int

@hookimpl
def observe(self, run, batch): ...

@hookimpl(wrapper=True)
def estimate_advantage(self, batch):
    return (yield)

@hookimpl(trylast=True, specname="policy_loss")
def loss(self, tokens): ...

def helper(self): ...
"""


def read(name: str) -> manifest.Manifest:
    return next(item for item in manifest.manifests(manifest.entries()) if item.name == name)


def failing_module(site, name: str, body: str) -> None:
    """A module that may be read but not executed."""
    site.plugin(name, body)
    path = site.path / f"acme_{name}.py"
    path.write_text(path.read_text() + "\nMODES = ('fast', 'slow')\nraise RuntimeError('executed')\n")


def test_everything_is_read_without_executing_the_module(site) -> None:
    failing_module(site, "rich", RICH)
    found = read("rich")
    assert found.broken == ""
    assert (found.paper, found.version, found.idea) == ("arXiv:1234.56789", "3", "An idea.")
    assert found.owner == "acme 1.0"
    assert found.needs == {"entropy"}
    assert found.hooks == (
        Hook("estimate_advantage", wrapper=True),
        Hook("observe"),
        Hook("policy_loss", trylast=True),
    )
    assert [hook.kind for hook in found.hooks] == ["wraps", "implements", "default"]


def test_settings_keep_defaults_authors_and_bounds(site) -> None:
    failing_module(site, "rich", RICH)
    settings = {setting.name: setting for setting in read("rich").settings}
    rate = settings["rate"]
    assert (rate.type, rate.default, rate.doc, rate.authors) == ("float", 0.5, "how fast", 0.25)
    assert rate.bounds == {"ge": 0, "lt": 1}
    assert settings["mode"].bounds == {"choices": ("fast", "slow")}
    assert settings["offset"].default == -2
    assert settings["plain"].authors is MISSING
    assert settings["given"].default is MISSING
    assert "given" not in read("rich").defaults


def test_import_gives_the_same_manifest(site) -> None:
    """The fall-back for sources that are not literal must agree with reading."""
    site.plugin("twin", RICH.replace("MODES", "('fast', 'slow')").replace("    given: int\n", ""))
    entry = next(entry for entry in manifest.entries() if entry.name == "twin")
    imported = manifest.from_class(entry.load(), manifest._owned(entry))
    assert imported == read("twin")


@pytest.mark.parametrize(
    "body",
    [
        "@dataclass\nclass Config:\n    rate: float = 1 / 4",
        "@dataclass\nclass Config:\n    rate: float = setting(sum([0.125, 0.125]))",
        "from dataclasses import make_dataclass\nConfig = make_dataclass('Config', [('rate', float, 0.25)])",
    ],
)
def test_what_is_not_literal_is_imported(site, body: str) -> None:
    site.plugin("computed", body)
    assert read("computed").defaults == {"rate": 0.25}


def test_inherited_hooks_are_found_by_import(site) -> None:
    site.plugin("child")
    path = site.path / "acme_child.py"
    base = "class Base(Plugin):\n    @hookimpl\n    def observe(self, run): ...\n"
    path.write_text(path.read_text().replace("class Method(Plugin)", f"{base}class Method(Base)"))
    assert read("child").hooks == (Hook("observe"),)


@pytest.mark.parametrize(
    ("source", "cause"),
    [
        ("class Other: ...", "has no class Method"),
        ("class Method(Plugin:", "SyntaxError"),
        ("import no_such_package\nfrom verl_plugins import Plugin\nclass Method(Plugin): ...", "no_such_package"),
        ("class Method(object):\n    name = len('x')", "AttributeError"),
        ("from verl_plugins import Plugin\nclass Method(Plugin):\n    name = 'other'", "'other'"),
        ("from verl_plugins import Plugin\nclass Method(Plugin):\n    name = str(1 / 0)", "ZeroDivisionError"),
    ],
)
def test_a_plugin_that_cannot_be_used_is_broken_and_the_others_go_on(site, sentence, source: str, cause: str) -> None:
    site.write("bad_module.py", source)
    site.distribution("bad-dist", "2.0", bad="bad_module:Method")
    site.plugin("good")
    assert cause in read("bad").broken
    assert read("good").broken == ""
    with pytest.raises(CompositionError) as error:
        manifest.find("bad", manifest.entries())
    sentence(error.value, "'bad'", "bad-dist 2.0", cause)


def test_a_missing_module_is_broken(site) -> None:
    site.distribution("ghost", ghost="no_such_module.inside:Method")
    assert "no_such_module" in read("ghost").broken


def test_parent_packages_are_not_executed(site) -> None:
    site.write("parent/__init__.py", "raise RuntimeError('executed')")
    site.write("parent/inner.py", "from verl_plugins import Plugin\nclass Method(Plugin):\n    name = 'inner'\n")
    site.distribution("parent-dist", inner="parent.inner:Method")
    assert read("inner").broken == ""
    assert "parent" not in sys.modules


def test_same_name_twice_names_both_owners(site, sentence) -> None:
    site.plugin("twice", distribution="one")
    site.plugin("twice", distribution="two")
    with pytest.raises(CompositionError) as error:
        manifest.find("twice", manifest.entries())
    sentence(error.value, "'twice'", "one 1.0", "two 1.0", "uninstall one")


def test_unknown_name_gives_the_nearest(site, sentence) -> None:
    site.plugin("momentum")
    with pytest.raises(CompositionError) as error:
        manifest.find("momentun", manifest.entries())
    sentence(error.value, "'momentun'", "did you mean 'momentum'?")


def test_folders_of_recipes_are_told_from_plugins(site) -> None:
    site.recipes("cookbook")
    site.distribution("extra", **{"extra.recipes": "no_module:RECIPES"})
    site.distribution("other", **{"my-recipes": "cookbook_recipes:NOTHING"})
    folders = {folder.distribution: folder for folder in manifest.folders(manifest.entries())}
    assert folders["verl-plugins"].broken == ""
    assert "there is no folder" in folders["cookbook"].broken
    assert "no_module" in folders["extra"].broken
    assert "NOTHING" in folders["other"].broken
