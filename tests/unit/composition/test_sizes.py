"""Sizes that do not go into each other: verl asserts them in its workers, here they end before anything starts."""

from __future__ import annotations

import pytest

ACTOR, ROLLOUT, MODEL = "actor_rollout_ref.actor", "actor_rollout_ref.rollout", "actor_rollout_ref.model"
RANKS, GAE = "trainer.n_gpus_per_node", "algorithm.adv_estimator=gae"
FIXED = f"{ACTOR}.use_dynamic_bsz=false"
MICRO, PASSES = f"{ACTOR}.ppo_micro_batch_size_per_gpu", f"{ROLLOUT}.log_prob_micro_batch_size_per_gpu"
ULYSSES, PACKED = "ulysses_sequence_parallel_size", f"{MODEL}.use_remove_padding=True"
SDPA = f"+{MODEL}.override_config.attn_implementation=sdpa"


class TestRows:
    """The rows of an update go into ranks, those of a rank into micro-batches."""

    @pytest.mark.parametrize(("ranks", "fitting"), [(3, 15), (5, 15), (6, 15), (7, 14), (48, 12)])
    def test_ranks_that_cannot_share_an_update(self, refused, ranks, fitting) -> None:
        key = f"{ACTOR}.ppo_mini_batch_size"
        refused("grpo", f"{RANKS}={ranks}", parts=(f"{ranks} ranks", "128 rows"), mended=(f"{key}={fitting}",))

    def test_the_critic_s_updates_too(self, refused) -> None:
        asked = (GAE, f"{RANKS}=3", f"{ACTOR}.ppo_mini_batch_size=15")
        mended = ("critic.ppo_mini_batch_size=15",)
        refused("grpo", *asked, parts=("critic.ppo_mini_batch_size", "3 ranks"), mended=mended)

    @pytest.mark.parametrize("ranks", [1, 2, 4, 8, 16])
    @pytest.mark.parametrize("mini_batch", [16, 8, 4])
    def test_those_that_can(self, run, ranks, mini_batch) -> None:
        run("vade", f"{RANKS}={ranks}", f"{ACTOR}.ppo_mini_batch_size={mini_batch}")

    @pytest.mark.parametrize(("ranks", "size", "fitting"), [(1, 12, 4), (2, 48, 16), (1, 256, 128), (4, 3, 1)])
    def test_micro_batches_of_an_update(self, refused, ranks, size, fitting) -> None:
        asked = (FIXED, f"{RANKS}={ranks}", f"{PASSES}=1", f"{MICRO}={size}")
        refused("grpo", *asked, parts=(f"{MICRO}={size}",), mended=(f"{MICRO}={fitting}",))

    @pytest.mark.parametrize("more", [(), (f"{ACTOR}.use_kl_loss=true",), (GAE,)])
    def test_micro_batches_of_a_forward_pass(self, refused, more) -> None:
        reference = ("actor_rollout_ref.ref.log_prob_micro_batch_size_per_gpu=8",)
        asked = (FIXED, f"{MICRO}=8", f"{PASSES}=5", *reference, "critic.ppo_micro_batch_size_per_gpu=8", *more)
        refused("grpo", *asked, parts=(f"{PASSES}=5", "forward pass"), mended=(f"{PASSES}=1",))

    def test_a_batch_is_filled_up_to_whole_updates(self, run) -> None:
        run("grpo", FIXED, f"{MICRO}=8", f"{PASSES}=96", "data.train_batch_size=20", f"{ACTOR}.ppo_mini_batch_size=12")

    @pytest.mark.parametrize(("given", "missing"), [((), (MICRO, PASSES)), ((f"{MICRO}=8",), (PASSES,))])
    @pytest.mark.parametrize("preset", ["cpu", "1gpu"])
    def test_no_size_at_all(self, refused, given, missing, preset) -> None:
        refused("grpo", FIXED, *given, parts=missing, mended=(f"{ACTOR}.use_dynamic_bsz=True",), preset=preset)

    @pytest.mark.parametrize(
        ("more", "missing"),
        [
            (GAE, "critic.ppo_micro_batch_size_per_gpu"),
            (f"{ACTOR}.use_kl_loss=true", "actor_rollout_ref.ref.log_prob_micro_batch_size_per_gpu"),
        ],
    )
    def test_no_size_for_the_other_models(self, refused, run, more, missing) -> None:
        asked = (FIXED, f"{MICRO}=8", f"{PASSES}=8", more)
        refused("grpo", *asked, parts=(missing,), mended=(f"{ACTOR}.use_dynamic_bsz=True",))
        run("grpo", *asked, f"{missing}=8")

    def test_the_passes_follow_the_updates(self, run, refused) -> None:
        config = run("grpo", FIXED, f"{MICRO}=8", f"{PASSES}=8").config
        assert config.actor_rollout_ref.rollout.log_prob_use_dynamic_bsz is False
        apart = f"{ROLLOUT}.log_prob_use_dynamic_bsz"
        refused("grpo", f"{apart}=false", parts=(apart,), mended=(f"{apart}=True",))


class TestSequenceParallel:
    """verl spreads sequences over ranks inside of flash attention, of packed sequences."""

    @pytest.mark.parametrize("key", [f"{ACTOR}.{ULYSSES}", f"{ACTOR}.fsdp_config.{ULYSSES}"])
    def test_other_attention_would_see_parts_of_sequences(self, refused, key) -> None:
        asked = (f"{key}=2", PACKED, f"{RANKS}=2")
        refused("grpo", *asked, parts=(f"{key}=2", "'sdpa'"), mended=(f"{key}=1",))
        refused("grpo", *asked, SDPA, parts=(f"{key}=2", "'sdpa'"), mended=(f"{key}=1",), preset="8gpu")

    def test_of_the_critic_and_the_reference(self, refused) -> None:
        on_gpus = {"preset": "8gpu"}
        attention = "+critic.model.override_config.attn_implementation=eager"
        refused("grpo", GAE, f"critic.{ULYSSES}=2", attention, parts=("critic", "'eager'"), **on_gpus)
        reference = (f"actor_rollout_ref.ref.{ULYSSES}=2", f"{ACTOR}.use_kl_loss=true", SDPA)
        refused("grpo", *reference, parts=("actor_rollout_ref.ref", "'sdpa'"), **on_gpus)

    def test_without_packing(self, refused) -> None:
        asked = (f"{ACTOR}.{ULYSSES}=2", f"{MODEL}.use_remove_padding=false")
        refused("grpo", *asked, parts=(f"{MODEL}.use_remove_padding=True",), mended=(PACKED,), preset="8gpu")

    @pytest.mark.parametrize("size", [2, 4, 8])
    def test_as_verl_has_it(self, run, size) -> None:
        run("grpo", f"{ACTOR}.{ULYSSES}={size}", preset="8gpu")

    def test_ranks_that_do_not_go_into_it(self, refused) -> None:
        refused("grpo", f"{ACTOR}.{ULYSSES}=3", parts=("8 ranks",), mended=(f"{RANKS}=6",), preset="8gpu")

    def test_megatron_s_ranks_share_rows_too(self, refused) -> None:
        megatron = ("model_engine=megatron", f"{ACTOR}.strategy=megatron", "actor_rollout_ref.ref.strategy=megatron")
        size = f"{ACTOR}.megatron.tensor_model_parallel_size=3"
        refused("grpo", *megatron, size, parts=("megatron", "8 ranks"), mended=(f"{RANKS}=6",), preset="8gpu")


class TestRay:
    def test_more_ranks_than_logical_gpus(self, refused) -> None:
        gpus = "ray_kwargs.ray_init.num_gpus"
        refused("grpo", f"{RANKS}=2", f"{gpus}=1", parts=(f"{gpus} is 1",), mended=(f"{gpus}=2",))

    def test_the_preset_cpu_has_as_many_as_ranks(self, run) -> None:
        assert run("grpo", f"{RANKS}=4").config.ray_kwargs.ray_init.num_gpus == 4

    def test_a_cluster_has_resources_of_its_own(self, refused) -> None:
        nothing = tuple(f"ray_kwargs.ray_init.{key}=null" for key in ("num_cpus", "num_gpus", "include_dashboard"))
        cluster = ("trainer.nnodes=2", "+ray_kwargs.ray_init.address=auto")
        refused("grpo", *cluster, parts=("ray_kwargs.ray_init.address",), mended=nothing)


@pytest.mark.parametrize(("size", "fitting"), [(2, 1), (4, 1)])
def test_servers_that_need_more_ranks_than_there_are(refused, size, fitting) -> None:
    key = f"{ROLLOUT}.tensor_model_parallel_size"
    refused("grpo", f"{key}={size}", parts=(f"{key}={size}",), mended=(f"{key}={fitting}",), preset="1gpu")
    refused("grpo", f"{key}=3", parts=(f"{key}=3", "8"), mended=(f"{key}=1",), preset="8gpu")
