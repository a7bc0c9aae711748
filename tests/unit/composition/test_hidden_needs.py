"""Hidden states that nobody would see are refused in one sentence, before anything starts."""

from __future__ import annotations

import pytest

RECIPES = ("linguistic_collapse", "nc_perturbation", "nc_deep_linear", "mgt")
MODEL, ACTOR = "actor_rollout_ref.model", "actor_rollout_ref.actor"
BYPASS = "algorithm.rollout_correction.bypass_mode"


@pytest.mark.parametrize("recipe", RECIPES)
class TestRefused:
    def test_where_verl_skips_the_pass(self, refused, recipe) -> None:
        known = "actor_rollout_ref.rollout.calculate_log_probs=true"
        refused(recipe, f"{BYPASS}=true", known, parts=(f"{recipe!r} needs hidden_states", f"{BYPASS}=True"))

    def test_with_fused_kernels(self, refused, recipe) -> None:
        key = f"{MODEL}.use_fused_kernels"
        refused(recipe, f"{key}=true", parts=(f"{recipe!r} needs hidden_states",), mended=(f"{key}=False",))

    def test_with_sequences_that_are_split_over_ranks(self, refused, recipe) -> None:
        key = f"{ACTOR}.fsdp_config.ulysses_sequence_parallel_size"
        split = (f"{key}=2", "trainer.n_gpus_per_node=2")
        parts = (f"{recipe!r} needs hidden_states", f"{key}=2", f"~plugins.{recipe}")
        refused(recipe, *split, parts=parts, mended=(f"{key}=1",))

    def test_with_other_engines(self, refused, recipe) -> None:
        roles = tuple(f"actor_rollout_ref.{role}.strategy=megatron" for role in ("actor", "ref"))
        parts = (f"{recipe!r} needs hidden_states", f"{ACTOR}.strategy is 'megatron'", "model_engine=dp")
        refused(recipe, "model_engine=megatron", *roles, parts=parts, preset="8gpu")


def test_all_together_beside_other_methods(run) -> None:
    run("+".join((*RECIPES, "vade", "clip_cov")), "trainer.n_gpus_per_node=2")
    run("+".join(RECIPES), f"{MODEL}.use_remove_padding=true", preset="1gpu")


@pytest.mark.parametrize("setting", ["freq=0", "layer_step=0", "tokens_per_response=0", "labels=prompt"])
def test_settings_out_of_range(refused, setting) -> None:
    key = f"plugins.nc_perturbation.{setting}"
    refused("nc_perturbation", key, parts=(key.partition("=")[0],))
