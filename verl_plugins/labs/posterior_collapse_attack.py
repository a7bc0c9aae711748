"""An image that an encoder cannot read: a perturbation that collapses the posterior of a VAE's encoder.

Guo et al., A Gray-box Attack against Latent Diffusion Model-based Image Editing by Posterior Collapse, arXiv
2408.10901; code ZhongliangGuo/PosteriorCollapseAttack. A lab on a small VAE that it trains itself. RL post-training has
no VAE encoder, and the ViT encoders of vision-language policies have no posterior: the loss is undefined there.

With posterior N(mean, diag exp(logvar)) of the perturbed image, the attack ascends, for each image,

    L = 1/2 sum_d (1 + logvar - (mean^2 + exp(logvar)) / v)

by signed gradients: delta <- clip(delta + alpha sign(dL/dx), -eps, eps), x_adv = clip(x + delta, 0, 1), with the
gradient taken at x_adv and no random start. A small v drives the posterior to a point at 0. As in the authors' code:
`reverse` descends instead, and without v the clean image's posterior variance takes its place, element by element.

Degenerate cases: eps = 0 leaves the image; a pixel whose gradient is 0 stays; delta itself is not cut at the range of
pixels, so that a pixel at the border comes back only when delta has.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from verl_plugins.lab import Claim, Curve, Findings, Panel, Progress
from verl_plugins.plugin import setting

SIDE = 16
"""Pixels of an image's side."""
HIDDEN, LATENTS = 128, 16
"""Of the VAE."""
SWEEP = 2.0, 4.0, 8.0, 16.0, 24.0, 32.0
"""Largest changes in the picture, in 1/255."""
Encoder = Callable[[Tensor], tuple[Tensor, Tensor]]
"""Images [n, ...] -> mean and log variance of the posterior [n, d]."""


@dataclass
class Settings:
    eps: float = setting(16.0, "largest change of a pixel, in 1/255", authors=16, ge=0)
    alpha: float = setting(2.0, "change of a pixel in one step, in 1/255", authors=2, gt=0)
    steps: int = setting(40, "steps of the attack", authors=40, ge=1)
    v: float | None = setting(1e-8, "target variance; null takes the clean image's posterior variance", authors=1e-8)
    images: int = setting(256, "images that are attacked", ge=1)
    training_steps: int = setting(3000, "of the VAE, of 128 images each", ge=1)

    def __post_init__(self) -> None:
        if self.v is not None and not self.v > 0:
            raise ValueError(f"v is {self.v}: it must be greater than 0, or null")


def collapse_loss(
    mean: Tensor,
    logvar: Tensor,
    v: float | Tensor = 1e-8,
    reverse: bool = False,
    reduction: Literal["mean", "sum", "none"] = "mean",
) -> Tensor:
    """What the attack ascends: mean, logvar [n, ...], v a number or [n, ...] -> a scalar, or [n] without reduction."""
    each = 0.5 * (1 + logvar - (mean.square() + logvar.exp()) / v).flatten(1).sum(1)
    each = -each if reverse else each
    return {"mean": each.mean, "sum": each.sum, "none": each.clone}[reduction]()


def attack(
    encode: Encoder,
    images: Tensor,
    eps: float,
    alpha: float,
    steps: int,
    v: float | None = 1e-8,
    reverse: bool = False,
) -> tuple[Tensor, list[float]]:
    """Perturbed `images` [n, ...], in [0, 1] as these, and the loss before each step; eps, alpha in pixel values."""
    with torch.no_grad():
        target = encode(images)[1].exp() if v is None else v
    delta, perturbed, losses = torch.zeros_like(images), images.clone(), []
    for _ in range(steps):
        perturbed.requires_grad_()
        loss = collapse_loss(*encode(perturbed), target, reverse)
        (gradient,) = torch.autograd.grad(loss, perturbed)
        losses.append(float(loss.detach()))
        delta = (delta + alpha * gradient.sign()).clamp(-eps, eps)
        perturbed = (images + delta).clamp(0, 1)
    return perturbed.detach(), losses


class Vae(nn.Module):
    """Images [n, pixels] to a posterior [n, latents] and back."""

    def __init__(self) -> None:
        super().__init__()
        pixels = SIDE * SIDE
        self.encoder = nn.Sequential(nn.Linear(pixels, HIDDEN), nn.SiLU(), nn.Linear(HIDDEN, 2 * LATENTS))
        self.decoder = nn.Sequential(nn.Linear(LATENTS, HIDDEN), nn.SiLU(), nn.Linear(HIDDEN, pixels), nn.Sigmoid())

    def encode(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log variance [n, latents]."""
        mean, logvar = self.encoder(images).chunk(2, 1)
        return mean, logvar

    def loss(self, images: Tensor, noise: Tensor) -> Tensor:
        """Ten times the squared error of a sample, made with noise [n, latents], plus KL to N(0, I): mean over images."""
        mean, logvar = self.encode(images)
        error = (self.decoder(mean + (logvar / 2).exp() * noise) - images).square().sum(1)
        kl = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).sum(1)
        return (10 * error + kl).mean()

    def reconstruct(self, images: Tensor) -> Tensor:
        """From the posterior's mean."""
        return self.decoder(self.encode(images)[0])


def rectangles(count: int, generator: torch.Generator) -> Tensor:
    """Images [count, pixels] of one bright rectangle each on a dark ground."""

    def span() -> Tensor:
        length = torch.randint(4, 11, (count, 1), generator=generator)
        start = (torch.rand(count, 1, generator=generator) * (SIDE - length + 1)).long()
        places = torch.arange(SIDE)
        return (places >= start) & (places < start + length)

    inside = span()[:, :, None] & span()[:, None, :]
    ground = 0.3 * torch.rand(count, 1, 1, generator=generator)
    bright = 0.6 + 0.4 * torch.rand(count, 1, 1, generator=generator)
    return torch.where(inside, bright, ground).flatten(1)


def trained(steps: int, seed: int, progress: Progress) -> Vae:
    """A VAE on rectangles."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        vae = Vae()
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam(vae.parameters(), lr=2e-3)
    for step in range(steps):
        if step % 100 == 0:
            progress(0.8 * step / steps, "training a VAE")
        loss = vae.loss(rectangles(128, generator), torch.randn(128, LATENTS, generator=generator))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return vae.requires_grad_(False)


@dataclass(frozen=True)
class Effect:
    """What a change of the images does: means over images."""

    error: float
    """Squared error per pixel of the reconstruction against the clean image."""
    length: float
    """Of the posterior's mean."""


def lab(settings: Settings, seed: int, progress: Progress) -> Findings:
    """The attack on a VAE that was trained for it, against random noise of the same size."""
    vae = trained(settings.training_steps, seed, progress)
    generator = torch.Generator().manual_seed(seed + 1)
    images = rectangles(settings.images, generator)
    signs = torch.randint(0, 2, images.shape, generator=generator) * 2.0 - 1

    def effect(changed: Tensor) -> Effect:
        error = (vae.reconstruct(changed) - images).square().mean()
        return Effect(float(error), float(vae.encode(changed)[0].norm(dim=1).mean()))

    def attacked(eps: float) -> tuple[Tensor, list[float]]:
        return attack(vae.encode, images, eps / 255, settings.alpha / 255, settings.steps, settings.v)

    def noisy(eps: float) -> Tensor:
        return (images + eps / 255 * signs).clamp(0, 1)

    progress(0.85, "attacks")
    perturbed, losses = attacked(settings.eps)
    found, noise, clean = effect(perturbed), effect(noisy(settings.eps)), effect(images)
    change = float((perturbed - images).abs().max()) * 255
    swept = {"attack": [effect(attacked(eps)[0]) for eps in SWEEP], "random noise": [effect(noisy(e)) for e in SWEEP]}
    claims = [*_claims(found, noise, clean), *_bounds(change, losses, perturbed, settings)]
    notes = ["The paper attacks the VAE of Stable Diffusion on photographs: its figures cannot be compared with these."]
    return Findings(claims, _panels(swept, clean), notes)


def _claims(found: Effect, noise: Effect, clean: Effect) -> list[Claim]:
    times = found.error / noise.error
    return [
        Claim(
            "the attack harms the reconstruction more than random noise of the same size",
            "squared error at least 1.5 times that of noise",
            f"{found.error:.4f} against {noise.error:.4f} (clean {clean.error:.4f}): {times:.1f} times",
            found.error >= 1.5 * noise.error,
        ),
        Claim(
            "the posterior's mean collapses",
            "shorter than of the clean images and of noisy ones",
            f"{found.length:.2f} against {clean.length:.2f} and {noise.length:.2f}",
            found.length < min(clean.length, noise.length),
        ),
    ]


def _bounds(change: float, losses: list[float], perturbed: Tensor, settings: Settings) -> list[Claim]:
    inside = bool(perturbed.min() >= 0 and perturbed.max() <= 1)
    return [
        Claim(
            "the change stays within its bounds",
            f"at most {settings.eps:g}/255, pixels in [0, 1]",
            f"{change:.2f}/255, {'inside' if inside else 'outside'}",
            inside and change <= settings.eps + 1e-3,
            "ours",
        ),
        Claim(
            "the loss is ascended",
            "higher at the last step than at the first",
            f"{losses[0]:.2e} to {losses[-1]:.2e}",
            losses[-1] > losses[0],
            "ours",
        ),
    ]


def _panels(swept: dict[str, list[Effect]], clean: Effect) -> list[Panel]:
    x = list(SWEEP)

    def panel(title: str, y: str, value: Callable[[Effect], float]) -> Panel:
        curves = [Curve(name, x, [value(one) for one in effects]) for name, effects in swept.items()]
        return Panel(
            title,
            "largest change of a pixel (1/255)",
            y,
            [*curves, Curve("clean", x, [value(clean)] * len(x), "dashed")],
        )

    return [
        panel("reconstruction against the clean image", "squared error per pixel", lambda one: one.error),
        panel("length of the posterior's mean", "|mean|", lambda one: one.length),
    ]
