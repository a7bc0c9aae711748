"""What becomes of each two recipes: where they meet, what has to be said, and why not."""

from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner

from verl_plugins import CompositionError
from verl_plugins.commands import cli, pairs


@pytest.fixture(scope="module")
def vade() -> dict[str, pairs.Pair]:
    """vade beside every other recipe."""
    return {pair.other("vade"): pair for pair in pairs.pairs("vade", "cpu")}


def test_two_that_choose_the_prompts_are_refused(vade: dict[str, pairs.Pair]) -> None:
    assert vade["mopps"].state == "refused"
    assert "both implement select_prompts" in vade["mopps"].refused


def test_methods_of_different_stages_do_not_meet(vade: dict[str, pairs.Pair]) -> None:
    """Also where both recipes bring grpo, and where only one has another estimator."""
    assert {vade[name].state for name in ("clip_cov", "bnpo", "steer", "perp_grad")} == {"apart"}


@pytest.mark.parametrize(
    ("first", "second", "stages"),
    [
        ("clip_cov", "steer", ("policy_loss",)),
        ("adora", "mc_grpo", ("estimate_advantage",)),
        ("evol_rl", "siri", ("prepare_prompts", "shape_rewards")),
    ],
)
def test_where_they_meet(first: str, second: str, stages: tuple[str, ...]) -> None:
    (found,) = [pair for pair in pairs.pairs(first, "cpu") if pair.other(first) == second]
    assert (found.state, found.stages) == ("meet", stages)


def test_what_has_to_be_said_is_said_for_all_keys_at_once() -> None:
    (found,) = [pair for pair in pairs.pairs("progrpo", "cpu") if pair.second == "vcpo"]
    assert len(found.settled) > 1 and all("=" in word for word in found.settled)


def test_presets_that_leave_data_and_model_to_the_user_need_neither() -> None:
    assert {pair.state for pair in pairs.pairs("perp_grad", "1gpu")} == {"apart", "meet", "refused"}


def test_the_command() -> None:
    done = CliRunner().invoke(cli.app, ["pairs", "vade", "--json"], catch_exceptions=False)
    listed = json.loads(done.output)
    assert {"vade"} < {one["first"] for one in listed} | {one["second"] for one in listed}
    assert all(
        "vade" in (one["first"], one["second"]) and one["state"] in ("meet", "apart", "refused") for one in listed
    )
    shown = CliRunner().invoke(cli.app, ["pairs", "vade"], catch_exceptions=False).output
    assert "mopps" in shown and "are refused" in shown


@pytest.mark.parametrize(("name", "words"), [("vaed", ()), ("mixup_nc", ()), ("vade", ("trainer.nnodez=2",))])
def test_mistakes(name: str, words: tuple[str, ...], sentence) -> None:
    with pytest.raises(CompositionError) as error:
        pairs.pairs(name, "cpu", words)
    sentence(error.value, name if not words else words[0])
