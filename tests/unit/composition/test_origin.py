"""What is broken is mended from where it was installed; its name is not asked for at an index."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from verl_plugins.commands import doctor
from verl_plugins.composition import manifest, recipe
from verl_plugins.composition.origin import install, reinstall
from verl_plugins.errors import CompositionError


def installed_from(site, text: str, name: str = "ghost") -> None:
    site.distribution(name, phantom="no_such_module:Method")
    site.write(f"{name}-1.0.dist-info/direct_url.json", text)


@pytest.mark.parametrize("editable", [True, False])
@pytest.mark.parametrize("folder", ["package", "a package", "it's (new)"])
def test_from_its_folder(site, tmp_path: Path, editable: bool, folder: str) -> None:
    (tmp_path / folder).mkdir()
    url = (tmp_path / folder).as_uri()
    installed_from(site, json.dumps({"url": url, "dir_info": {"editable": editable}}))
    said = reinstall("ghost")
    assert ("pip install -e " in said) == editable
    assert "package" in said or "new" in said
    assert "pip install -U" not in said and "pip install ghost" not in said
    assert "[extra]" in install("ghost[extra]")


@pytest.mark.parametrize("text", ["", "{}", "[]", "null", "no json", json.dumps({"url": "https://example.org/x.whl"})])
def test_of_others_it_says_whose_it_is(site, text: str) -> None:
    installed_from(site, text)
    said = reinstall("ghost")
    assert "the package ghost" in said and "pip uninstall ghost" in said and "pip install" not in said


def test_a_folder_that_is_gone(site, tmp_path: Path) -> None:
    installed_from(site, json.dumps({"url": (tmp_path / "gone").as_uri(), "dir_info": {"editable": True}}))
    assert "is gone" in reinstall("ghost") and "pip install" not in reinstall("ghost")


def test_doctor_says_so_of_plugins_and_of_recipes(site) -> None:
    site.distribution("ghost", phantom="no_such_module:Method", recipes="no_such_module:RECIPES")
    broken = [finding for finding in doctor._plugins() if finding.state == doctor.BROKEN]
    assert {finding.what for finding in broken} == {"plugin phantom", "recipes"}
    assert all("the package ghost" in finding.mend and "pip install" not in finding.mend for finding in broken)


def test_what_is_broken_is_not_proposed(site) -> None:
    site.distribution("ghost", vadex="no_such_module:Method")
    site.recipes("cookbook", vadex="recipe: {titel: burnt}")
    for look in (
        lambda: manifest.find("vadexx", manifest.entries()),
        lambda: recipe.combine(["vadexx"], manifest.folders(manifest.entries())),
    ):
        with pytest.raises(CompositionError) as error:
            look()
        assert "did you mean 'vadex'" not in str(error.value)
