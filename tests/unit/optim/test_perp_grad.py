"""⊥Grad: what is left of a gradient, on one rank and on several."""

from __future__ import annotations

import threading
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf

from verl_plugins import CompositionError
from verl_plugins.optim.perp_grad import PerpGrad, over_shards, project

FEW = settings(max_examples=40, deadline=None)
SEED = st.integers(0, 10_000)
SHAPES = st.lists(st.sampled_from([(3,), (4, 2), (1,), (2, 2, 3)]), min_size=1, max_size=4)


def draw(shapes, seed: int, dtype: torch.dtype = torch.float64) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    rng = torch.Generator().manual_seed(seed)
    return tuple([torch.randn(shape, generator=rng, dtype=dtype) for shape in shapes] for _ in range(2))


@FEW
@given(SHAPES, SEED)
def test_what_is_left_is_orthogonal_and_as_long_as_before(shapes, seed):
    weights, gradients = draw(shapes, seed)
    found = project(weights, gradients)
    for w, g, made in zip(weights, gradients, found.gradients, strict=True):
        if w.numel() > 1:
            assert float((w * made).sum()) == pytest.approx(0, abs=1e-9 * float(w.norm() * g.norm()))
            assert float(made.norm()) == pytest.approx(float(g.norm()))


@FEW
@given(SHAPES, SEED, st.floats(0.01, 100))
def test_the_size_of_the_weights_changes_nothing(shapes, seed, scale):
    weights, gradients = draw([shape for shape in shapes if shape != (1,)] or [(3,)], seed)
    once, again = project(weights, gradients), project([scale * w for w in weights], gradients)
    for one, other in zip(once.gradients, again.gradients, strict=True):
        assert torch.allclose(one, other)


@FEW
@given(SHAPES, SEED)
def test_all_as_one_vector(shapes, seed):
    weights, gradients = draw([*shapes, (3,)], seed)
    found = project(weights, gradients, granularity="global")
    flat = lambda tensors: torch.cat([one.flatten() for one in tensors])  # noqa: E731
    whole = project([flat(weights)], [flat(gradients)])
    assert torch.allclose(flat(found.gradients), whole.gradients[0])
    assert found.cosine.tolist() == pytest.approx([float(whole.cosine[0])] * len(weights))


@pytest.mark.parametrize("granularity", ["per_tensor", "global"])
def test_ranks_that_hold_parts_make_what_one_rank_makes(granularity):
    weights, gradients = draw([(4, 3), (6,), (2, 5)], 3)
    whole = project(weights, gradients, granularity=granularity, min_orth_ratio=1e-4)
    barrier, sums, made = threading.Barrier(2), {}, {}

    def rank(number: int) -> None:
        def total(own: torch.Tensor) -> torch.Tensor:
            sums[number] = own
            barrier.wait()
            both = sums[0] + sums[1]
            barrier.wait()
            return both

        parts = [[one.chunk(2)[number] for one in tensors] for tensors in (weights, gradients)]
        made[number] = project(*parts, granularity=granularity, min_orth_ratio=1e-4, total=total)

    threads = [threading.Thread(target=rank, args=(number,)) for number in range(2)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    for place, one in enumerate(whole.gradients):
        assert torch.allclose(torch.cat([made[number].gradients[place] for number in range(2)]), one)
    assert torch.allclose(made[0].cosine, whole.cosine) and torch.allclose(made[1].removed, whole.removed)


class TestDegenerateCases:
    def test_no_weights_and_no_gradient(self):
        zero, some = torch.zeros(3), torch.tensor([1.0, 2.0, 2.0])
        assert project([zero], [some]).gradients[0].tolist() == some.tolist()
        assert project([some], [zero]).gradients[0].tolist() == [0, 0, 0]

    def test_a_gradient_along_the_weights_leaves_nothing_and_not_noise(self):
        along = torch.tensor([0.3, 0.1, 0.7])
        small = project([along], [1e-3 * along], min_orth_ratio=1e-4)
        assert float(small.gradients[0].norm()) < 1e-9 and small.guarded.tolist() == [True]
        found = project([along], [3 * along], min_orth_ratio=1e-4)
        assert float(found.gradients[0].norm()) < 1e-6 and found.guarded.tolist() == [True]
        assert float(found.removed) == pytest.approx(1)

    def test_the_little_that_is_left_stays_as_little(self):
        found = project([torch.tensor([1.0, 0.0])], [torch.tensor([10.0, 1e-4])], min_orth_ratio=1e-4)
        assert found.guarded.tolist() == [True]
        assert found.gradients[0].tolist() == [pytest.approx(0, abs=1e-6), pytest.approx(1e-4)]

    def test_without_rescaling_it_is_shorter(self):
        weight, gradient = torch.tensor([1.0, 0.0]), torch.tensor([3.0, 4.0])
        found = project([weight], [gradient], rescale=False)
        assert found.gradients[0].tolist() == [0, 4]
        assert found.cosine.tolist() == [pytest.approx(0.6)] and found.removed.tolist() == [pytest.approx(0.6)]

    def test_half_precision_is_worked_out_in_single(self):
        weights, gradients = draw([(64, 64)], 1, torch.float32)
        half = project([w.bfloat16() for w in weights], [1e-4 * g.bfloat16() for g in gradients])
        assert half.gradients[0].dtype == torch.bfloat16 and bool(half.gradients[0].isfinite().all())
        assert float(half.gradients[0].float().norm()) == pytest.approx(1e-4 * float(gradients[0].norm()), rel=0.02)


def step(plugin: PerpGrad, module: torch.nn.Module) -> dict[str, float]:
    logged: dict[str, float] = {}
    wrapped = plugin.optimizer_step(SimpleNamespace(module=module, log=logged.update))
    next(wrapped)
    with pytest.raises(StopIteration) as end:
        wrapped.send(1.5)
    assert end.value.value == 1.5
    return logged


class TestPlugin:
    def module(self) -> torch.nn.Linear:
        module = torch.nn.Linear(3, 2)
        module(torch.ones(1, 3)).square().sum().backward()
        return module

    def test_matrices_only_unless_told_otherwise(self):
        module = self.module()
        before = module.weight.grad.clone(), module.bias.grad.clone()
        logged = step(PerpGrad(PerpGrad.Config()), module)
        assert not torch.equal(module.weight.grad, before[0]) and torch.equal(module.bias.grad, before[1])
        assert float((module.weight.detach() * module.weight.grad).sum()) == pytest.approx(0, abs=1e-5)
        assert abs(logged["cos_w_g_mean"]) == pytest.approx(logged["cos_w_g_max_abs"])
        step(PerpGrad(PerpGrad.Config(min_ndim=0)), module)
        assert not torch.equal(module.bias.grad, before[1])

    def test_measuring_changes_nothing(self):
        module = self.module()
        before = module.weight.grad.clone()
        logged = step(PerpGrad(PerpGrad.Config(project=False)), module)
        assert torch.equal(module.weight.grad, before)
        assert logged["removed_norm_share"] == pytest.approx(abs(logged["cos_w_g_mean"]), rel=1e-4)
        assert logged["guarded_tensors"] == 0

    def test_parameters_without_gradient_are_left_out(self):
        assert step(PerpGrad(PerpGrad.Config()), torch.nn.Linear(3, 2)) == {}

    @pytest.mark.parametrize(
        ("actor", "says"),
        [
            ({"strategy": "fsdp", "fsdp_config": {"use_orig_params": False}}, "fsdp2"),
            ({"strategy": "fsdp", "fsdp_config": {"use_orig_params": True}}, "fsdp2"),
            ({"strategy": "megatron", "fsdp_config": {}}, "Megatron"),
        ],
    )
    def test_engines_that_keep_parameters_in_pieces_are_refused(self, actor, says, sentence):
        plugin = PerpGrad(PerpGrad.Config())
        with pytest.raises(CompositionError) as refusal:
            plugin.check(OmegaConf.create({"actor_rollout_ref": {"actor": actor}}))
        sentence(refusal.value, "plugins.perp_grad", says)
        plugin.check(OmegaConf.create({"actor_rollout_ref": {"actor": {"strategy": "fsdp2", "fsdp_config": {}}}}))

    def test_sums_go_over_the_ranks_between_which_a_parameter_is_split(self, monkeypatch):
        """Two dimensions of ranks: split over the second, copied over the first."""
        asked = []
        monkeypatch.setattr(torch.distributed, "all_reduce", lambda sums, group: asked.append(group))
        split, whole = (SimpleNamespace(is_shard=lambda answer=answer: answer) for answer in (True, False))
        parameter = SimpleNamespace(
            placements=(whole, split), device_mesh=SimpleNamespace(get_group=lambda dim: f"group {dim}")
        )
        assert over_shards(parameter)(torch.tensor([2.0])).tolist() == [2.0] and asked == ["group 1"]

    def test_a_parameter_that_is_whole_needs_no_other_rank(self):
        assert over_shards(torch.nn.Linear(2, 2).weight)(torch.tensor([2.0])).tolist() == [2.0]
