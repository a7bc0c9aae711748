"""Two actor ranks, several micro-batches each: all diagnostics of hidden states in one training, every second step."""

from __future__ import annotations

from pathlib import Path

import pytest
from training import SHORT, Training, healthy, ours, train

pytestmark = pytest.mark.e2e

DIAGNOSTICS = ("linguistic_collapse", "nc_perturbation", "nc_deep_linear", "mgt")
OF_EVERY_LAYER = {"nc_perturbation": ("quotient_layer_1", "quotient_layer_2"), "mgt": ("eff_rank_1", "eff_rank_2")}
ALWAYS = {
    "linguistic_collapse": ("token_cdnv", "token_simcos_mean", "token_agreement", "uid_quotient", "outcome_quotient"),
    "nc_perturbation": ("min_ratio", "fraction_decreasing"),
    "nc_deep_linear": ("of_error", "norm_slope_feature", "norm_slope_head", "predicted_collapse"),
    "mgt": ("eff_rank_last", "min_layer_cos"),
}


@pytest.fixture(scope="module")
def training(third_party: Path, out: Path) -> Training:
    return train(
        "+".join(DIAGNOSTICS),
        out / "hidden",
        *SHORT,
        "trainer.total_training_steps=3",
        "trainer.n_gpus_per_node=2",
        "actor_rollout_ref.rollout.log_prob_max_token_len_per_gpu=512",
        "plugins.linguistic_collapse.tokens_per_response=4",
        "plugins.nc_perturbation.layer_step=1",
        "plugins.nc_deep_linear.feature_decay=50.0",
        "plugins.mgt.layer_step=1",
        *(f"plugins.{name}.freq=2" for name in DIAGNOSTICS),
        "+plugins.left_over={}",
        site=third_party,
    )


def test_measured_in_every_second_step(training: Training) -> None:
    healthy(training, 3)
    for name in DIAGNOSTICS:
        first, second, third = (ours(step, name) for step in training.steps)
        assert second == {}, name
        for step in (first, third):
            assert {*ALWAYS[name], *OF_EVERY_LAYER.get(name, ())} <= step.keys()


def test_what_is_measured_is_in_its_range(training: Training) -> None:
    for step in (training.steps[0], training.steps[2]):
        collapse, geometry = ours(step, "linguistic_collapse"), ours(step, "mgt")
        assert collapse["uid_n_classes"] == 16 and collapse["uid_n_samples"] == 128
        assert collapse["token_cdnv"] > 0 and collapse["outcome_quotient"] > 0
        assert 0.05 < collapse["token_agreement"] <= 1
        assert 1 < geometry["eff_rank_last"] <= geometry["n_tokens"] == 256
        assert -1 <= geometry["min_layer_cos"] <= 1
        assert 0 < ours(step, "nc_deep_linear")["of_error"] <= 1
        depth = ours(step, "nc_perturbation")
        assert depth["min_ratio"] == pytest.approx(depth["quotient_layer_2"] / depth["quotient_layer_1"])
        assert depth["quotient_layer_2"] == pytest.approx(collapse["uid_quotient"], rel=1e-6)


def test_the_policy_in_between_has_moved_the_states(training: Training) -> None:
    first, third = (ours(training.steps[place], "linguistic_collapse") for place in (0, 2))
    assert first["token_n_classes"] >= third["token_n_classes"] >= 2
    assert first["token_cdnv"] != third["token_cdnv"]


def test_the_queue_is_rid_of_them(training: Training) -> None:
    left = [ours(step, "left_over") for step in training.steps]
    assert [step["columns"] for step in left] == [7, 0, 7]
    assert left[0]["bytes_of_a_row"] == left[2]["bytes_of_a_row"] <= 7 * 8
