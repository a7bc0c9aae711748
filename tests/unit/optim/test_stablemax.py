"""StableMax as a transform of logits, and the tokens from which no gradient comes."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf
from verl.utils import torch_functional

from verl_plugins import Batch, CompositionError
from verl_plugins.optim.stablemax import Saturation, StableMax, symlog
from verl_plugins.testing import FakeActor, FakeRun

FEW = settings(max_examples=50, deadline=None)
LOGITS = st.lists(st.floats(-1e6, 1e6, width=32), min_size=2, max_size=6)


def authors(logits: list[float]) -> list[float]:
    """The paper's s(z) over its sum."""
    s = [z + 1 if z >= 0 else 1 / (1 - z) for z in logits]
    return [one / sum(s) for one in s]


def shaped(logits: torch.Tensor, **config: Any) -> torch.Tensor:
    return StableMax(StableMax.Config(**config)).shape_logits(logits)


class TestFunction:
    @FEW
    @given(LOGITS)
    def test_its_softmax_is_stablemax(self, logits):
        expected = torch.tensor(authors(logits), dtype=torch.float64)
        for dtype, close in ((torch.float64, 1e-12), (torch.float32, 1e-5)):
            found = shaped(torch.tensor(logits, dtype=dtype)).softmax(-1).double()
            torch.testing.assert_close(found, expected, rtol=close, atol=1e-12)

    @FEW
    @given(LOGITS, st.integers(0, 1))
    def test_its_gradient_is_that_of_the_formula(self, logits, label):
        leaf = torch.tensor(logits, dtype=torch.float64, requires_grad=True)
        shaped(leaf).log_softmax(-1)[label].backward()
        probs = authors(logits)
        expected = [((place == label) - probs[place]) / (1 + abs(z)) for place, z in enumerate(logits)]
        assert leaf.grad.tolist() == pytest.approx(expected, rel=1e-9, abs=1e-15)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    def test_where_the_authors_form_has_no_gradient(self, dtype):
        leaf = torch.tensor([0.0, 1.0, -0.0, -1.0], dtype=dtype, requires_grad=True)
        symlog(leaf).sum().backward()
        assert leaf.grad.tolist() == [1, 0.5, 1, 0.5]

    def test_odd_and_in_order(self):
        values = torch.tensor([-1e6, -3.0, -0.5, 0.0, 0.5, 3.0, 1e6])
        assert torch.equal(symlog(-values), -symlog(values))
        assert symlog(values).diff().gt(0).all()

    def test_a_constant_added_to_all_logits_matters(self):
        logits = torch.tensor([1.0, 2.0])
        assert not torch.allclose(shaped(logits).softmax(-1), shaped(logits + 5).softmax(-1))

    def test_a_vocabulary_of_one(self):
        assert shaped(torch.tensor([[7.0], [-7.0]])).log_softmax(-1).tolist() == [[0], [0]]

    def test_what_is_banned_has_no_probability_and_leaves_the_entropy_finite(self):
        leaf = torch.tensor([[3.0, -torch.inf, 0.5]], requires_grad=True)
        made = shaped(leaf)
        assert made.softmax(-1).tolist() == [[pytest.approx(4 / 5.5), 0, pytest.approx(1.5 / 5.5)]]
        entropy = torch_functional.entropy_from_logits(made)
        entropy.sum().backward()
        assert entropy.isfinite().all() and leaf.grad.isfinite().all() and leaf.grad[0, 1] == 0

    def test_a_ban_by_a_large_number_is_none(self):
        """As the page says: such masks belong behind the transform."""
        assert float(shaped(torch.tensor([0.0, -1e4])).softmax(-1)[1]) > 9e-5

    def test_softmax_loses_the_gradient_where_stablemax_keeps_it(self):
        leaf = torch.tensor([200.0, 0.0, 0.0], requires_grad=True)
        assert leaf.log_softmax(-1)[0] == 0
        log_prob = shaped(leaf).log_softmax(-1)[0]
        log_prob.backward()
        assert log_prob < 0 and leaf.grad[1] < -1e-3

    @pytest.mark.parametrize(
        ("given", "asked", "made"),
        [
            (torch.bfloat16, "float32", torch.float32),
            (torch.float32, "float32", torch.float32),
            (torch.float32, "float64", torch.float64),
            (torch.float64, "float32", torch.float64),
        ],
    )
    def test_precision_is_never_lost(self, given, asked, made):
        assert shaped(torch.ones(2, dtype=given), dtype=asked).dtype == made


class TestGuard:
    def config(self, path: str | None, **sections: Any) -> Any:
        model = {"path": "???" if path is None else path}
        return OmegaConf.create({"actor_rollout_ref": {"model": model}, **sections})

    @pytest.mark.parametrize(
        ("path", "sections", "named"),
        [
            ("Qwen/Qwen2.5-0.5B", {"cpu": {"warmup": {}}}, "Qwen/Qwen2.5-0.5B"),
            ("Qwen/Qwen2.5-0.5B", {}, "Qwen/Qwen2.5-0.5B"),
            (None, {}, "the preset's model"),
            (None, {"cpu": None, "smollm2": {}}, "the preset's model"),
        ],
    )
    def test_a_model_that_learnt_with_softmax_is_refused(self, path, sections, named, sentence):
        with pytest.raises(CompositionError) as refusal:
            StableMax(StableMax.Config()).check(self.config(path, **sections))
        sentence(refusal.value, "plugins.stablemax", named, "plugins.stablemax.allow_pretrained=true")
        StableMax(StableMax.Config(allow_pretrained=True)).check(self.config(path, **sections))

    def test_the_preset_s_own_model_is_made_with_it(self):
        StableMax(StableMax.Config()).check(self.config(None, cpu={"warmup": {}}))


class TestSaturation:
    def batch(self, log_probs: list[list[float]], mask: list[list[int]]) -> Batch:
        return Batch.from_tensors(
            uid=[f"{row}-1-0" for row in range(len(mask))],
            rm_scores=torch.zeros(len(mask), len(mask[0])),
            response_mask=torch.tensor(mask),
            old_log_probs=torch.tensor(log_probs),
        )

    def share(self, log_probs: list[list[float]], mask: list[list[int]]) -> dict[str, float]:
        run = FakeRun()
        Saturation(Saturation.Config()).observe(run, self.batch(log_probs, mask))
        return run.metrics

    def test_generated_tokens_whose_log_prob_is_exactly_zero(self):
        told = self.share([[0.0, -1e-7, 0.0], [-2.0, 0.0, 0.0]], [[1, 1, 1], [1, 1, 0]])
        assert told == {"sc_token_share": pytest.approx(3 / 5)}

    def test_none_were_generated(self):
        assert self.share([[0.0, 0.0]], [[0, 0]]) == {}

    def looked(self, actor: Any, **config: Any) -> dict[str, float]:
        wrapped = Saturation(Saturation.Config(**config)).optimizer_step(actor)
        next(wrapped)
        with pytest.raises(StopIteration) as end:
            wrapped.send(1.5)
        assert end.value.value == 1.5
        return actor.metrics

    def test_logits_once_a_step(self):
        actor = FakeActor()
        sizes = actor.logits(16).abs()
        told = self.looked(actor)
        assert told == {
            "logit_abs_max": pytest.approx(float(sizes.max())),
            "logit_abs_mean": pytest.approx(float(sizes.mean()), rel=1e-5),
        }
        actor.mini_batch, actor.metrics = 1, {}
        assert self.looked(actor) == {}

    def test_logits_of_all_ranks(self):
        actor = FakeActor()
        other = torch.tensor([100.0])
        actor.gather = lambda values: torch.cat([values, other])
        assert self.looked(actor)["logit_abs_max"] == 100

    def test_a_number_of_each_token_is_told(self):
        logits = torch.tensor([[1.0, -5.0], [2.0, 0.0], [-3.0, 3.0]])
        told: list[list[float]] = []
        actor = FakeActor()
        actor.logits, actor.gather = lambda tokens: logits, lambda values: told.append(values.tolist()) or values
        assert self.looked(actor) == {"logit_abs_max": 5, "logit_abs_mean": pytest.approx(14 / 6)}
        assert told == [[5, 2, 3], [3, 1, 3]]

    def test_no_token_or_no_probe(self):
        actor = SimpleNamespace(
            logits=lambda tokens: torch.zeros(0, 4), gather=lambda values: values, metrics={}, mini_batch=0
        )
        assert self.looked(actor) == {}
        actor.logits = None
        assert self.looked(actor, probe_tokens=0) == {}

    def test_logits_are_needed_only_where_they_are_looked_at(self):
        assert Saturation(Saturation.Config()).needs == {"old_log_probs", "logits"}
        assert Saturation(Saturation.Config(probe_tokens=0)).needs == {"old_log_probs"}
        assert Saturation.needs == {"old_log_probs"}
