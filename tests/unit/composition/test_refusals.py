"""What verl can be asked for and this package cannot do with it ends before anything starts, with the way out."""

from __future__ import annotations

import logging

import pytest

from verl_plugins.composition import manager, manifest, refusals
from verl_plugins.composition.settings import typed
from verl_plugins.services import Answer

RLOO, GAE = "algorithm.adv_estimator=rloo", "algorithm.adv_estimator=gae"
ACTOR, MODEL = "actor_rollout_ref.actor", "actor_rollout_ref.model"


class TestEstimator:
    """`algorithm.adv_estimator` means what it says."""

    @pytest.mark.parametrize(
        ("recipe", "asked"), [("grpo", "rloo"), ("clip_cov", "gae"), ("vade", "opo"), ("dcpo", "grpo_passk")]
    )
    def test_the_default_plugin_gives_way_to_the_estimator_asked_for(self, run, recipe, asked, caplog) -> None:
        with caplog.at_level(logging.WARNING):
            composed = run(recipe, f"algorithm.adv_estimator={asked}")
        assert "grpo" not in composed.config.plugins
        assert composed.config.algorithm.adv_estimator == asked
        assert f"algorithm.adv_estimator={asked}" in caplog.text and "'grpo' gives way" in caplog.text

    @pytest.mark.parametrize(
        ("recipe", "plugin"), [("mc_grpo", "mc_grpo"), ("riskpo", "riskpo"), ("vade+bnpo", "bnpo")]
    )
    @pytest.mark.parametrize("asked", [RLOO, GAE])
    def test_an_estimator_that_is_the_recipe_s_method_is_not_replaced(self, refused, recipe, plugin, asked) -> None:
        refused(recipe, asked, parts=(asked, repr(plugin)), mended=("algorithm.adv_estimator=grpo",))

    def test_settings_of_the_default_on_the_command_line_contradict_another_estimator(self, refused) -> None:
        refused("grpo", RLOO, "plugins.grpo.scale=none", parts=(RLOO, "~plugins.grpo"))

    def test_nobody_asked_for_verls_default(self, site, refused) -> None:
        site.recipes("acme", mine="recipe: {title: A}\nplugins: {grpo: {}}\n")
        refused("mine", parts=("gae, verl's default,", "'grpo'"), mended=("algorithm.adv_estimator=grpo",))

    def test_a_preset_may_ask(self, site, run) -> None:
        preset = "preset: {title: A, base: cpu}\nalgorithm: {adv_estimator: rloo}\n"
        site.recipes("acme", mine="recipe: {title: A}\nplugins: {grpo: {}}\n", presets__ours=preset)
        assert list(run("mine", preset="ours").config.plugins) == ["math_verify"]

    @pytest.mark.parametrize("wrong", ["gpro", "rlo", "reinforce_plus_plus_base"])
    def test_a_misspelt_one(self, refused, wrong) -> None:
        refused("grpo", f"algorithm.adv_estimator={wrong}", parts=("algorithm.adv_estimator", wrong, "did you mean"))

    def test_one_that_is_registered_elsewhere_is_let_through(self, run) -> None:
        run("grpo", "algorithm.adv_estimator=my_own_one")

    def test_the_names_are_verls(self) -> None:
        from verl.trainer.ppo.core_algos import ADV_ESTIMATOR_REGISTRY, AdvantageEstimator

        assert set(refusals.ESTIMATORS) == {item.value for item in AdvantageEstimator} == set(ADV_ESTIMATOR_REGISTRY)


class TestTeacher:
    """Where one is on: what it needs, and what plugins can do beside it."""

    ON, LOSS = "distillation.enabled=true", "distillation.distillation_loss"
    SERVER = "distillation.teacher_models.teacher_model.inference"

    @pytest.mark.parametrize("recipe", ["vade", "clip_cov", "steer", "epo", "dcpo", "perp_grad"])
    def test_plugins_act_beside_it(self, run, recipe) -> None:
        run(recipe, self.ON)

    @pytest.mark.parametrize("recipe", ["clip_cov", "steer", "epo", "dcpo"])
    def test_without_a_reward_there_is_no_policy_loss(self, refused, recipe) -> None:
        off = f"{self.LOSS}.use_task_rewards"
        refused(recipe, self.ON, f"{off}=false", parts=(f"{off}=False", f"~plugins.{recipe}"), mended=(f"{off}=true",))

    @pytest.mark.parametrize("key", ["nnodes", "n_gpus_per_node"])
    def test_devices_of_its_own(self, refused, key) -> None:
        refused("grpo", self.ON, f"distillation.{key}=0", parts=(f"distillation.{key} is 0",))

    def test_each_is_a_logical_gpu_on_a_cpu(self, run, refused) -> None:
        there = "ray_kwargs.ray_init.num_gpus"
        two = (self.ON, "trainer.n_gpus_per_node=2")
        assert run("grpo", *two).config.ray_kwargs.ray_init.num_gpus == 3
        assert run("grpo", "trainer.n_gpus_per_node=2").config.ray_kwargs.ray_init.num_gpus == 2
        refused("grpo", *two, f"{there}=2", parts=(f"{there} is 2",), mended=(f"{there}=3",))

    def test_a_server_of_ours_is_one_device(self, refused) -> None:
        key = f"{self.SERVER}.tensor_model_parallel_size"
        two = "distillation.n_gpus_per_node=2"
        refused("grpo", self.ON, two, f"{key}=2", parts=(f"{key}=2", "transformers"), mended=(f"{key}=1",))

    def test_a_server_that_cannot_tell(self, refused) -> None:
        refused("grpo", self.ON, f"{self.SERVER}.name=trtllm", parts=(f"{self.SERVER}.name is 'trtllm'", "vllm"))


class TestLogits:
    """Shaped on all sides or on none, and looked at where they are made."""

    SERVER, FUSED = "actor_rollout_ref.rollout.name", f"{MODEL}.use_fused_kernels"
    ANY = "plugins.stablemax.allow_pretrained=true"

    @pytest.mark.parametrize("server", ["vllm", "sglang"])
    def test_other_servers_would_sample_from_unshaped_ones(self, refused, server) -> None:
        name = f"{self.SERVER}={server}"
        refused("stablemax", name, parts=("'stablemax' shapes logits", name), mended=(f"{self.SERVER}=transformers",))

    def test_on_a_gpu_too_the_server_of_this_package_serves_them(self, run, refused) -> None:
        refused("stablemax", self.ANY, parts=(f"{self.SERVER}=vllm", "~plugins.stablemax"), preset="1gpu")
        run("stablemax", self.ANY, f"{self.SERVER}=transformers", preset="1gpu")

    @pytest.mark.parametrize(
        ("recipe", "who"),
        [("stablemax", "'stablemax' shapes logits"), ("ghosts_of_softmax", "'ghosts_of_softmax' needs logits")],
    )
    def test_fused_kernels_make_none(self, refused, recipe, who) -> None:
        on = f"{self.FUSED}=true"
        refused(recipe, on, parts=(who, f"{self.FUSED}=True"), mended=(f"{self.FUSED}=False",))

    def test_other_engines_do_not_show_them(self, refused) -> None:
        roles = tuple(f"actor_rollout_ref.{role}.strategy=megatron" for role in ("actor", "ref"))
        parts = ("'saturation' needs logits", "actor_rollout_ref.actor.strategy is 'megatron'", "model_engine=dp")
        refused("grpo", "model_engine=megatron", *roles, "+plugins.saturation={}", parts=parts, preset="8gpu")

    def test_counting_saturated_tokens_needs_none(self, run) -> None:
        counting = ("+plugins.saturation.probe_tokens=0", f"{self.FUSED}=true")
        run("grpo", *counting, preset="1gpu")

    def test_distillation_would_see_the_student_s_only(self, refused) -> None:
        refused("stablemax", "distillation.enabled=true", parts=("stage shape_logits", "~plugins.stablemax"))

    def test_a_model_of_the_user_s(self, refused) -> None:
        refused("stablemax", f"{MODEL}.path=/models/mine", parts=("/models/mine", "softmax"), mended=(self.ANY,))

    def test_measuring_tokens_of_any_model(self, run) -> None:
        run("grpo", "+plugins.saturation={}", preset="smollm2")
        run("ghosts_of_softmax", preset="smollm2")


class TestEngines:
    """The choice of an engine, and the keys verl reads it from, agree."""

    MEGATRON = tuple(f"actor_rollout_ref.{role}.strategy=megatron" for role in ("actor", "ref"))

    @pytest.mark.parametrize(("recipe", "preset"), [("grpo", "1gpu"), ("clip_cov", "8gpu")])
    def test_megatron_on_a_gpu_preset(self, refused, recipe, preset) -> None:
        parts = ("actor_rollout_ref.actor.strategy", "model_engine=megatron")
        refused(recipe, "model_engine=megatron", parts=parts, mended=self.MEGATRON, preset=preset)

    def test_megatron_s_strategy_without_its_engine(self, refused) -> None:
        refused("grpo", f"{ACTOR}.strategy=megatron", parts=(f"{ACTOR}.strategy", "model_engine=dp"), preset="1gpu")

    @pytest.mark.parametrize("engine", ["megatron", "veomni", "torchtitan"])
    @pytest.mark.parametrize("recipe", ["grpo", "clip_cov+vade"])
    def test_other_engines_do_not_go_with_the_cpu(self, refused, recipe, engine) -> None:
        refused(recipe, f"model_engine={engine}", parts=(f"model_engine={engine}", "preset 'cpu'", "--preset 1gpu"))

    @pytest.mark.parametrize(("engine", "meant"), [("megatrn", "megatron"), ("veomnni", "veomni"), ("fsdp", "dp")])
    def test_an_engine_verl_does_not_have(self, refused, engine, meant) -> None:
        for preset in ("cpu", "1gpu"):
            refused("grpo", f"model_engine={engine}", parts=(repr(engine), meant), preset=preset)

    @pytest.mark.parametrize(
        "key",
        [f"{ACTOR}.strategy", f"{ACTOR}.fsdp_config.strategy", "actor_rollout_ref.ref.strategy", "critic.strategy"],
    )
    def test_the_first_fsdp_on_the_cpu(self, refused, key) -> None:
        refused("grpo", f"{key}=fsdp", parts=(key, "CPU"), mended=(f"{key}=fsdp2",))

    @pytest.mark.parametrize("strategy", ["fsdp", "fsdp2"])
    def test_both_on_gpus(self, run, strategy) -> None:
        run("grpo", f"{ACTOR}.strategy={strategy}", preset="1gpu")


class TestCritic:
    @pytest.mark.parametrize("preset", ["cpu", "1gpu", "8gpu"])
    def test_every_preset_brings_its_model(self, run, preset) -> None:
        run("grpo", GAE, preset=preset)

    def test_verls_example_of_a_path_is_nobody_s_model(self, refused) -> None:
        example = "critic.model.path='~/models/deepseek-llm-7b-chat'"
        refused("grpo", GAE, example, parts=("critic.model.path", "algorithm.adv_estimator"), preset="1gpu")


@pytest.mark.parametrize(
    ("asked", "part"),
    [
        (f"{MODEL}.use_fused_kernels=true", f"{MODEL}.use_fused_kernels=True"),
        ("algorithm.rollout_correction.bypass_mode=true", "bypass_mode=True"),
    ],
)
def test_gaps_need_logits_in_the_pass_before_the_update(refused, asked, part) -> None:
    refused("grpo", "+plugins.role_metrics={}", asked, parts=("'role_metrics'", part))


@pytest.mark.parametrize("lora", [f"{MODEL}.lora_rank=8", f"{MODEL}.lora_adapter_path=adapter"])
def test_lora_is_merged_for_the_server_of_the_cpu(refused, lora) -> None:
    refused("grpo", lora, parts=(lora.partition("=")[0],), mended=(f"{MODEL}.lora.merge=true",))


def test_full_determinism_is_not_sglang_s(refused) -> None:
    chosen = ("actor_rollout_ref.rollout.name=sglang", "actor_rollout_ref.rollout.full_determinism=true")
    refused("grpo", *chosen, parts=("full_determinism", "sglang"), preset="1gpu")


@pytest.mark.parametrize(
    ("asked", "part"),
    [
        (("ray_kwargs.timeline_json_file=t.json",), "ray_kwargs.timeline_json_file"),
        (("global_profiler.tool=nsys", "global_profiler.steps=[1]"), "global_profiler.tool"),
    ],
)
def test_what_verls_own_command_does_around_a_training(refused, asked, part) -> None:
    refused("grpo", *asked, parts=(part,))


@pytest.mark.parametrize("preset", ["1gpu", "8gpu"])
def test_gpu_presets_bound_the_checkpoints_that_are_kept(run, preset) -> None:
    trainer = run("grpo", preset=preset).config.trainer
    assert trainer.save_freq > 0
    assert (
        2 <= trainer.max_actor_ckpt_to_keep <= 5 and trainer.max_critic_ckpt_to_keep == trainer.max_actor_ckpt_to_keep
    )


class TestFilteredGroups:
    """`algorithm.filter_groups`: verl looks for its metric when the first groups have been rolled out."""

    ON = "algorithm.filter_groups.enable=true"

    @pytest.mark.parametrize("metric", ["seq_reward", "accuracy", "seq_final_reward", "reason", "answer", "null"])
    def test_by_something_the_reward_does_not_have(self, refused, metric) -> None:
        refused("grpo", self.ON, f"algorithm.filter_groups.metric={metric}", parts=("algorithm.filter_groups.metric",))

    @pytest.mark.parametrize("metric", ["reward", "acc", "score", "not_understood"])
    def test_by_something_it_has(self, run, metric) -> None:
        run("grpo", self.ON, f"algorithm.filter_groups.metric={metric}")

    @pytest.mark.parametrize("scorer", ["reward.custom_reward_function.path=mine.py", "~plugins.math_verify"])
    def test_what_another_scorer_gives_is_not_known(self, run, scorer) -> None:
        run("grpo", self.ON, "algorithm.filter_groups.metric=seq_reward", scorer)

    def test_a_bound_that_nothing_reads(self, refused) -> None:
        bound = "algorithm.filter_groups.max_num_gen_batches"
        refused("grpo", self.ON, f"{bound}=10", parts=(f"{bound}=10",), mended=(f"{bound}=0",))

    def test_the_parts_are_those_of_the_default_scorer(self) -> None:
        cls = manager.load(manifest.find("math_verify", manifest.entries()))
        scorer = cls(typed(cls.Config, {}, "plugins.math_verify"))
        verdict = scorer.score_answer(Answer(text="7", ground_truth="7", data_source="", extra_info={}))
        numbers = {name for name, value in verdict.parts.items() if isinstance(value, float)}
        assert set(refusals.PARTS) == numbers | {"acc", "score"}
