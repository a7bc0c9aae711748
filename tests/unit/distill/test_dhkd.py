"""Two heads: the losses by the paper's formulas, what reaches which weights, and an auxiliary head's life."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from verl_plugins import CompositionError, Distilled, StateError
from verl_plugins.composition import needs
from verl_plugins.composition.compose import compose
from verl_plugins.distill.dhkd import DHKD, align, binary_kl, binary_kl_norm
from verl_plugins.distilled import forward_kl, of_teacher
from verl_plugins.testing import FakeActor

VOCABULARY, WIDTH = 11, 6
FEW = settings(max_examples=50, deadline=None)
NUMBERS = st.lists(st.tuples(st.floats(-8, 8), st.floats(-8, 8)), min_size=1, max_size=5)


def made(tokens: int = 4, top: int = 3, bias: bool = False, told: list | None = None, seed: int = 0) -> Distilled:
    """Tokens with gradients at `hidden`, `weight` and `bias`."""
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=generator).requires_grad_()  # noqa: E731
    values, ids = (2 * draw(tokens, VOCABULARY)).detach().log_softmax(-1).topk(top, -1)
    return Distilled(
        hidden=draw(tokens, WIDTH),
        weight=draw(VOCABULARY, WIDTH),
        bias=draw(VOCABULARY) if bias else None,
        teacher_ids=ids,
        teacher_log_probs=values,
        temperature=torch.linspace(0.5, 1.5, tokens),
        config=SimpleNamespace(log_prob_min_clamp=None),
        log=lambda owner, metrics, reduce: None if told is None else told.append(metrics),
    )


def plugin(**settings: Any) -> DHKD:
    return DHKD(DHKD.Config(**settings))


class TestLosses:
    @FEW
    @given(NUMBERS, st.floats(0.5, 4))
    def test_binary_kl_norm_by_the_formula(self, pairs, temperature) -> None:
        total = 0.0
        for s, t in pairs:
            d = min(max(1 / (1 + math.exp(-(s - t) / temperature)), 1e-8), 1 - 1e-8)
            total += 0.5 * (math.log(0.5) - math.log(d)) + 0.5 * (math.log(0.5) - math.log(1 - d))
        student, teacher = torch.tensor(pairs, dtype=torch.float64).unbind(1)
        assert float(binary_kl_norm(student, teacher, temperature)) == pytest.approx(
            temperature**2 * total, rel=1e-6, abs=1e-9
        )

    @FEW
    @given(NUMBERS, st.floats(0.5, 4))
    def test_binary_kl_by_the_formula(self, pairs, temperature) -> None:
        total = 0.0
        for s, t in pairs:
            q, p = (1 / (1 + math.exp(-value / temperature)) for value in (s, t))
            total += p * math.log(p / q) + (1 - p) * math.log((1 - p) / (1 - q))
        student, teacher = torch.tensor(pairs, dtype=torch.float64).unbind(1)
        assert float(binary_kl(student, teacher, temperature)) == pytest.approx(temperature**2 * total, abs=1e-6)

    @pytest.mark.parametrize("loss", [binary_kl_norm, binary_kl])
    def test_equal_numbers_give_0_and_a_constant_shift_does_not(self, loss) -> None:
        teacher = torch.tensor([[-1.0, -2.5, -7.0]])
        assert float(loss(teacher, teacher)) == pytest.approx(0, abs=1e-6)
        assert float(loss(teacher + 1, teacher)) > 0.01

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    def test_beyond_the_clamp_it_is_finite_and_flat(self, dtype) -> None:
        student = torch.tensor([[100.0, -100.0, 0.5]], dtype=dtype, requires_grad=True)
        loss = binary_kl_norm(student, torch.zeros(1, 3, dtype=dtype))
        loss.sum().backward()
        assert torch.isfinite(loss).all()
        assert student.grad[0, :2].tolist() == [0, 0] and float(student.grad[0, 2]) > 0

    def test_one_token_told(self) -> None:
        assert binary_kl_norm(torch.ones(3, 1), torch.zeros(3, 1)).shape == (3,)

    def test_forward_kl_with_verls_floor(self) -> None:
        log_probs, teacher = torch.tensor([[-1.0, -30.0]]), torch.tensor([[-0.5, -1.0]])
        plain = math.exp(-0.5) * 0.5 + math.exp(-1) * 29
        assert float(forward_kl(log_probs, teacher)) == pytest.approx(plain, rel=1e-5)
        assert float(forward_kl(log_probs, teacher, -10.0)) == pytest.approx(math.exp(-0.5) * 0.5 + math.exp(-1) * 9)


class TestAlign:
    def test_a_contradiction_is_taken_out_of_the_second(self) -> None:
        first, second = (
            [torch.tensor([2.0, 0.0]), torch.tensor([0.0])],
            [torch.tensor([-1.0, 3.0]), torch.tensor([5.0])],
        )
        found = align(first, second)
        assert found.projected and float(found.dot) == -2
        assert_close(found.merged, [torch.tensor([2.0, 3.0]), torch.tensor([5.0])])

    def test_what_agrees_is_added(self) -> None:
        found = align([torch.tensor([1.0])], [torch.tensor([2.0])])
        assert not found.projected and found.merged[0].item() == 3

    def test_one_product_over_all_tensors(self) -> None:
        first, second = [torch.tensor([1.0]), torch.tensor([3.0])], [torch.tensor([-1.0]), torch.tensor([1.0])]
        assert not align(first, second).projected

    def test_no_reward_gradient_or_none_at_all(self) -> None:
        assert align([torch.zeros(2)], [torch.ones(2)]).merged[0].tolist() == [1, 1]
        assert align([], []).merged == []

    def test_sums_are_those_of_all_ranks(self) -> None:
        found = align([torch.tensor([1.0])], [torch.tensor([-1.0])], lambda sums: sums * torch.tensor([-1.0, 1.0]))
        assert not found.projected


@pytest.mark.parametrize("loss", ["forward_kl", "binary_kl_norm", "binary_kl"])
@pytest.mark.parametrize("head", ["detached", "lowrank", "full"])
@pytest.mark.parametrize("bias", [False, True])
def test_the_policy_s_head_gets_nothing_and_what_it_reads_something(head, loss, bias) -> None:
    told: list[dict] = []
    distilled = made(bias=bias, told=told)
    losses = plugin(head=head, loss=loss, rank=2).distillation_loss(distilled)
    assert losses.shape == (4,)
    losses.sum().backward()
    assert distilled.weight.grad is None and (not bias or distilled.bias.grad is None)
    assert distilled.hidden.grad.norm() > 0
    own = {} if head == "detached" else {"head_vs_aux_kl": pytest.approx(0, abs=1e-6)}
    assert {key: value for one in told for key, value in one.items()} == {
        "aux_loss": pytest.approx(losses.mean().item()),
        **own,
    }


@pytest.mark.parametrize("head", ["detached", "lowrank", "full"])
def test_at_first_every_head_is_the_policy_s(head) -> None:
    distilled = made(bias=True)
    expected = forward_kl(of_teacher(distilled.logits(), distilled.teacher_ids), distilled.teacher_log_probs)
    assert_close(plugin(head=head).distillation_loss(distilled), expected)


@pytest.mark.parametrize("head", ["detached", "lowrank", "full"])
def test_no_token_that_counts(head) -> None:
    told: list[dict] = []
    distilled = made(tokens=0, told=told)
    losses = plugin(head=head).distillation_loss(distilled)
    losses.sum().backward()
    assert losses.shape == (0,) and told == []
    assert distilled.hidden.grad.shape == (0, WIDTH)


class TestOwnHead:
    def steps(self, made_plugin: DHKD, numbers: range) -> None:
        for number in numbers:
            distilled = made(seed=number)
            distilled.weight = made(seed=0).weight
            made_plugin.distillation_loss(distilled).sum().backward()
            actor = FakeActor()
            actor.accumulate()
            step = made_plugin.optimizer_step(actor)
            next(step)
            with pytest.raises(StopIteration):
                step.send(1.0)

    @pytest.mark.parametrize("head", ["lowrank", "full"])
    def test_it_is_trained_with_the_actor_s_learning_rate(self, head) -> None:
        one = plugin(head=head, rank=2)
        self.steps(one, range(1))
        name = "b" if head == "lowrank" else "weight"
        start = torch.zeros(VOCABULARY, 2) if head == "lowrank" else made().weight.detach()
        moved = (one.head.parameters[name].detach() - start).abs()
        assert float(moved.max()) == pytest.approx(FakeActor().optimizer.param_groups[0]["lr"], rel=0.05)

    @pytest.mark.parametrize("head", ["lowrank", "full"])
    def test_a_resumed_one_goes_on_as_if_nothing_had_happened(self, head) -> None:
        whole, first, second = (plugin(head=head, rank=2) for _ in range(3))
        self.steps(whole, range(4))
        self.steps(first, range(2))
        state = first.state_dict()
        assert all(isinstance(value, torch.Tensor) for value in state.values())
        second.load_state_dict(state)
        self.steps(second, range(2, 4))
        assert_close(second.state_dict(), whole.state_dict(), rtol=0, atol=0)

    @pytest.mark.parametrize("other", [{"head": "full"}, {"head": "lowrank", "rank": 3}])
    def test_another_head_s_state(self, other, sentence) -> None:
        one = plugin(head="lowrank", rank=2)
        self.steps(one, range(1))
        with pytest.raises(StateError) as error:
            plugin(**other).load_state_dict(one.state_dict())
        sentence(error.value, f"plugins.dhkd.head={other['head']}", "lowrank of rank 2")

    def test_nothing_is_saved_of_a_head_that_is_not_there(self) -> None:
        assert plugin().state_dict() == plugin(head="full").state_dict() == {}
        plugin(head="full").load_state_dict({})

    @pytest.mark.parametrize("norm", [math.nan, math.inf])
    def test_a_step_that_verl_skips_is_skipped_here(self, norm) -> None:
        one = plugin(head="full")
        one.distillation_loss(made()).sum().backward()
        step = one.optimizer_step(FakeActor())
        next(step)
        with pytest.raises(StopIteration):
            step.send(norm)
        assert torch.equal(one.head.parameters["weight"], made().weight)


def test_the_actor_s_gradients_are_merged() -> None:
    actor, one = FakeActor(), plugin(align_gradients=True)
    actor.accumulate()
    primary = [parameter.grad.clone() for parameter in actor.module.parameters()]
    actor.distillation_gradient = lambda: [-2 * grad for grad in primary]  # so the reward's is 3 times what is there
    next(one.optimizer_step(actor))
    for parameter, grad in zip(actor.module.parameters(), primary, strict=True):
        assert_close(parameter.grad, 3 * grad, rtol=1e-4, atol=1e-5)
    assert actor.metrics == {"grad_dot_sign": -1.0}


class TestRefused:
    @pytest.mark.parametrize(
        ("override", "key"),
        [
            ("distillation.distillation_loss.use_task_rewards=false", "use_task_rewards=False"),
            ("distillation.enabled=false", "distillation.enabled=True"),
            ("distillation.distillation_loss.loss_mode=k3", "loss_mode=forward_kl_topk"),
            ("distillation.distillation_loss.use_policy_gradient=true", "use_policy_gradient=False"),
            ("actor_rollout_ref.model.use_fused_kernels=true", "use_fused_kernels=False"),
            ("actor_rollout_ref.model.lora_rank=8", "actor_rollout_ref.model.lora"),
        ],
    )
    def test_what_it_cannot_work_with(self, override, key, sentence) -> None:
        merged = ["actor_rollout_ref.model.lora.merge=true"] if "lora" in override else []
        with pytest.raises(CompositionError) as error:
            needs.check(compose("dhkd", "cpu", [override, *merged]))
        sentence(error.value, key)

    def test_alignment_with_the_first_fsdp(self, sentence) -> None:
        config = compose("dhkd", "cpu").config
        config.actor_rollout_ref.actor.strategy = "fsdp"
        plugin().check(config)
        with pytest.raises(CompositionError) as error:
            plugin(align_gradients=True).check(config)
        sentence(error.value, "plugins.dhkd.align_gradients", "strategy=fsdp2")
