"""The loss that collapses a posterior, the bounds of the attack, and the lab on a VAE of its own."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lab_page import not_on_page

from verl_plugins.composition.settings import typed
from verl_plugins.errors import CompositionError
from verl_plugins.labs import posterior_collapse_attack
from verl_plugins.labs.posterior_collapse_attack import Effect, Settings, attack, collapse_loss, rectangles, trained

FEW = settings(max_examples=40, deadline=None)
SEED = st.integers(0, 10_000)
V = st.sampled_from([1e-8, 0.1, 1.0, 20.0])


def silent(share: float, what: str) -> None:
    pass


def drawn(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).double()


def linear(seed: int, pixels: int, latents: int):
    of_mean, of_logvar = drawn(seed, pixels, latents), drawn(seed + 1, pixels, latents)
    return lambda images: (images @ of_mean, 0.1 * images @ of_logvar - 1)


@FEW
@given(SEED, V, st.booleans())
def test_the_loss_in_plain_python(seed, v, reverse):
    mean, logvar = drawn(seed, 3, 4), drawn(seed + 1, 3, 4)
    each = [
        math.fsum(0.5 * (1 + s - (m * m + math.exp(s)) / v) for m, s in zip(*row, strict=True)) * (-1 if reverse else 1)
        for row in zip(mean.tolist(), logvar.tolist(), strict=True)
    ]
    assert collapse_loss(mean, logvar, v, reverse, "none").tolist() == pytest.approx(each)
    assert float(collapse_loss(mean, logvar, v, reverse, "sum")) == pytest.approx(math.fsum(each))
    assert float(collapse_loss(mean, logvar, v, reverse)) == pytest.approx(math.fsum(each) / 3)


@FEW
@given(SEED, V)
def test_the_loss_is_highest_where_the_posterior_is_the_target(seed, v):
    """mean 0 and variance v: there its slope is 0, and everywhere else it is lower."""
    best = collapse_loss(torch.zeros(1, 4).double(), torch.full((1, 4), math.log(v)).double(), v)
    assert float(best) == pytest.approx(2 * math.log(v))
    assert collapse_loss(0.3 * drawn(seed, 1, 4), math.log(v) + drawn(seed + 1, 1, 4), v) < best


@FEW
@given(SEED, st.sampled_from([0.0, 0.01, 0.05, 0.3]), st.integers(1, 12), V, st.booleans())
def test_the_change_stays_within_its_bounds(seed, eps, steps, v, reverse):
    images = drawn(seed, 3, 6).sigmoid()
    perturbed, losses = attack(linear(seed, 6, 2), images, eps, 0.01, steps, v, reverse)
    assert len(losses) == steps
    assert float((perturbed - images).abs().max()) <= min(eps, steps * 0.01) + 1e-12
    assert float(perturbed.min()) >= 0 and float(perturbed.max()) <= 1


@FEW
@given(SEED, V)
def test_images_are_attacked_each_on_its_own(seed, v):
    images, encode = drawn(seed, 4, 6).sigmoid(), linear(seed, 6, 3)
    together, _ = attack(encode, images, 0.05, 0.01, 8, v)
    alone = torch.cat([attack(encode, image[None], 0.05, 0.01, 8, v)[0] for image in images])
    assert torch.allclose(together, alone)


@FEW
@given(SEED)
def test_one_step_goes_by_the_sign_of_the_slope(seed):
    images, encode = 0.25 + 0.5 * drawn(seed, 2, 6).sigmoid(), linear(seed, 6, 3)
    perturbed, losses = attack(encode, images, 1.0, 0.01, 1, 0.5)
    least = images.clone()
    for row in range(2):
        for pixel in range(6):
            moved = images.clone()
            moved[row, pixel] += 1e-6
            slope = float(collapse_loss(*encode(moved), 0.5)) - losses[0]
            least[row, pixel] += math.copysign(0.01, slope)
    assert torch.allclose(perturbed, least)


def test_the_gradient_is_taken_at_the_image_that_is_cut_at_the_border_and_delta_is_not_cut():
    """Mean of one pixel x - 0.9: from 0.05 the attack pulls down when reversed, and the pixel stays at 0."""

    def encode(images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return images - 0.9, torch.zeros_like(images)

    perturbed, losses = attack(encode, torch.tensor([[0.05]]).double(), 0.2, 0.1, 4, 1.0, reverse=True)
    assert perturbed.tolist() == [[0.0]]
    assert losses == pytest.approx([0.5 * (0.85**2), 0.5 * 0.81, 0.5 * 0.81, 0.5 * 0.81])


def test_a_pixel_without_a_slope_stays():
    perturbed, _ = attack(lambda x: (x[:, :1], torch.zeros_like(x[:, :1])), torch.full((1, 2), 0.5), 0.1, 0.02, 3)
    assert perturbed.tolist() == [[pytest.approx(0.44), 0.5]]


@FEW
@given(SEED)
def test_without_a_target_it_is_the_clean_posterior_s_variance_element_by_element(seed):
    images, encode = drawn(seed, 3, 6).sigmoid(), linear(seed, 6, 2)
    target = encode(images)[1].exp()
    given_none, losses = attack(encode, images, 0.05, 0.01, 6, None)
    delta, expected = torch.zeros_like(images), images
    for loss in losses:
        point = expected.clone().requires_grad_()
        mean, logvar = encode(point)
        value = (0.5 * (1 + logvar - (mean**2 + logvar.exp()) / target)).sum(1).mean()
        assert float(value.detach()) == pytest.approx(loss)
        delta = (delta + 0.01 * torch.autograd.grad(value, point)[0].sign()).clamp(-0.05, 0.05)
        expected = (images + delta).clamp(0, 1)
    assert torch.allclose(given_none, expected)


def test_the_images_that_are_given_stay_as_they_are():
    images = drawn(0, 2, 6).sigmoid()
    before = images.clone()
    attack(linear(0, 6, 2), images, 0.1, 0.02, 5)
    assert torch.equal(images, before) and not images.requires_grad


@FEW
@given(SEED)
def test_rectangles_are_bright_on_dark_and_wholly_inside(seed):
    for image in rectangles(5, torch.Generator().manual_seed(seed)).view(5, 16, 16):
        values = image.unique()
        assert len(values) == 2 and 0 <= values[0] <= 0.3 and 0.6 <= values[1] <= 1
        rows, columns = (image == values[1]).any(1).nonzero()[:, 0], (image == values[1]).any(0).nonzero()[:, 0]
        sides = [int(side.max() - side.min()) + 1 for side in (rows, columns)]
        assert all(4 <= side <= 10 for side in sides)
        assert int((image == values[1]).sum()) == sides[0] * sides[1]


def test_the_loss_of_the_vae_in_plain_python():
    vae, images = trained(3, 0, silent).double(), rectangles(2, torch.Generator().manual_seed(0)).double()
    noise = drawn(1, 2, 16)
    mean, logvar = vae.encode(images)
    total = 0.0
    for n in range(2):
        moments = list(zip(mean[n].tolist(), logvar[n].tolist(), noise[n].tolist(), strict=True))
        sample = torch.tensor([m + math.sqrt(math.exp(s)) * e for m, s, e in moments]).double()
        total += 10 * float((vae.decoder(sample) - images[n]).square().sum())
        total += sum(0.5 * (m * m + math.exp(s) - 1 - s) for m, s, _ in moments)
    assert float(vae.loss(images, noise)) == pytest.approx(total / 2, rel=1e-5)


@pytest.mark.parametrize("v", [0.0, -1.0])
def test_a_target_variance_that_is_none_is_refused(v):
    with pytest.raises(CompositionError, match="must be greater than 0, or null"):
        typed(Settings, {"v": v}, "posterior_collapse_attack", "lab")


class TestClaims:
    """Each is false on the other side of its threshold."""

    @pytest.mark.parametrize(
        ("error", "length", "holds"),
        [(1.6, 1.9, [True, True]), (1.4, 1.9, [False, True]), (1.6, 2.1, [True, False]), (1.5, 2.0, [True, False])],
    )
    def test_harm(self, error, length, holds):
        found, noise, clean = Effect(error, length), Effect(1.0, 3.0), Effect(0.5, 2.0)
        assert [claim.holds for claim in posterior_collapse_attack._claims(found, noise, clean)] == holds
        swapped = posterior_collapse_attack._claims(found, Effect(1.0, 2.0), Effect(0.5, 3.0))
        assert [claim.holds for claim in swapped] == holds

    @pytest.mark.parametrize(
        ("change", "pixels", "losses", "holds"),
        [
            (16.0, [0.0, 1.0], [1.0, 5.0, 2.0], [True, True]),
            (16.1, [0.0, 1.0], [1.0, 2.0], [False, True]),
            (15.0, [-0.01, 1.0], [1.0, 2.0], [False, True]),
            (15.0, [0.0, 1.01], [1.0, 2.0], [False, True]),
            (16.0, [0.5, 0.5], [1.0, 5.0, 1.0], [True, False]),
        ],
    )
    def test_bounds(self, change, pixels, losses, holds):
        found = posterior_collapse_attack._bounds(change, losses, torch.tensor(pixels), Settings())
        assert [claim.holds for claim in found] == holds


class TestLab:
    @pytest.fixture(scope="class")
    def found(self):
        return posterior_collapse_attack.lab(Settings(), 0, silent)

    def test_every_claim_holds_and_stands_on_the_page(self, found):
        assert found.failed == []
        assert not_on_page("posterior_collapse_attack", found, close=0.25) == []

    def test_harm_grows_with_the_size_of_the_change(self, found):
        error, length = ({curve.label: list(curve.y) for curve in panel.curves} for panel in found.panels)
        assert error["attack"] == sorted(error["attack"])
        assert length["attack"] == sorted(length["attack"], reverse=True)
        assert all(a > b for a, b in zip(error["attack"], error["random noise"], strict=True))

    def test_a_seed_repeats_and_another_does_not(self):
        small = Settings(training_steps=20, images=4)
        one, again, other = (posterior_collapse_attack.lab(small, seed, silent) for seed in (3, 3, 4))
        assert one == again
        assert one.panels != other.panels

    def test_training_leaves_the_global_random_numbers_alone(self):
        before = torch.random.get_rng_state()
        trained(1, 5, silent)
        assert torch.equal(before, torch.random.get_rng_state())

    def test_without_a_change_there_is_no_harm(self):
        found = posterior_collapse_attack.lab(Settings(eps=0, training_steps=20, images=4), 0, silent)
        names = [claim.name for claim in found.failed]
        assert names == [
            "the attack harms the reconstruction more than random noise of the same size",
            "the posterior's mean collapses",
            "the loss is ascended",
        ]
