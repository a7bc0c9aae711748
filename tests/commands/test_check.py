"""The laws of one plugin, asked for on the command line."""

from __future__ import annotations

import pytest
from click.testing import Result
from typer.testing import CliRunner

from verl_plugins import CompositionError
from verl_plugins.commands import cli

NAN = """
@hookimpl
def shape_rewards(self, run, batch):
    batch.rewards = batch.rewards * float("nan")
"""


def check(*words: str) -> Result:
    return CliRunner().invoke(cli.app, ["check", *words])


def test_a_plugin_that_keeps_them() -> None:
    done = check("vade", "--set", "lambda_selected=0.3")
    assert done.exit_code == 0, done.output
    assert done.output.startswith("plugin 'vade' of verl-plugins") and "row_order" in done.output


def test_verl_s_settings_are_those_of_its_recipe() -> None:
    """ravl refuses estimators other than gae, which its recipe sets; behind a cut a lone response has an advantage."""
    done = check("ravl")
    assert (done.exit_code, done.output.count("lonely_group")) == (1, 1)
    assert check("ravl", "--except", "lonely_group.estimate_advantage").exit_code == 0


def test_a_plugin_that_breaks_one(site) -> None:
    site.plugin("bad", NAN)
    done = check("bad")
    assert done.exit_code == 1
    assert "shape_rewards" in done.output and "finite" in done.output


@pytest.mark.parametrize("words", [("vaed",), ("vade", "--set", "+x=1")])
def test_mistakes_are_one_sentence(words: tuple[str, ...], sentence) -> None:
    done = check(*words)
    assert isinstance(done.exception, CompositionError)
    sentence(done.exception, words[-1])
