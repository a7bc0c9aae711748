"""Where features of mixed examples sit: with mixup they are no convex mixes of the features of their classes.

Fisher, Meng, Papyan, Pushing Boundaries: Mixup's Influence on Neural Collapse, arXiv 2402.06171. A lab: RL
post-training has no convex combination of two prompts, so nothing here trains a policy.

The setting of the abstract, with free features h and the classifier fixed to a simplex ETF W [K, d] of row norm m, so
that W W^T = a (I - 1 1^T / K), a = m^2 K / (K - 1). The loss of a mixed example of classes i and j is

    CE(W h, y) + mu/2 |h|^2,    y = lambda e_i + (1 - lambda) e_j

and is strictly convex. Derived here, the paper's theorem was not read: its optimum is h = W^T z / a, where the logits z
solve softmax(z) - y + (mu / a) z = 0.

Degenerate cases: i = j or lambda = 1 gives h parallel to w_i. Two classes and lambda = 1/2 give h = 0, which points
nowhere: its cosines are 0. Classes other than i and j share one logit, so h lies in the plane of w_i and w_j.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity, cross_entropy, one_hot

from verl_plugins.lab import Claim, Curve, Findings, Panel, Progress
from verl_plugins.plugin import setting

SHOWN = (1.0, 0.9, 0.7, 0.5)
"""lambda of the lengths in the table."""
NEWTON_STEPS = 200
TOLERANCE = 1e-12


@dataclass
class Settings:
    num_classes: int = setting(10, "classes K", ge=2)
    classifier_norm: float = setting(1.0, "length m of each row of the classifier", gt=0)
    feature_l2: float = setting(1e-3, "weight mu of the features' squared length", gt=0)
    descent_steps: int = setting(5000, "steps of the gradient descent that the optimum is compared with", ge=1)


def simplex_etf(classes: int, norm: float) -> Tensor:
    """Rows w_k [classes, classes] of length `norm` with equal angles between them, float64."""
    identity = torch.eye(classes, dtype=torch.float64)
    return norm * (classes / (classes - 1)) ** 0.5 * (identity - 1 / classes)


def mixed_target(classes: int, i: int, j: int, mix: Tensor) -> Tensor:
    """lambda [...] -> label y [..., classes]; for i = j it is e_i."""
    first, second = one_hot(torch.tensor([i, j]), classes).double()
    return mix[..., None] * first + (1 - mix[..., None]) * second


def optimal_logits(target: Tensor, ratio: float) -> Tensor:
    """The root z of softmax(z) - y + ratio z = 0 for y [..., classes], by damped Newton steps; ratio is mu / a.

    Raises:
        ValueError: ratio is not positive, which leaves no finite optimum.
    """
    if not ratio > 0:
        raise ValueError(f"mu / a is {ratio}: it must be greater than 0")

    def loss(z: Tensor) -> Tensor:
        return z.logsumexp(-1) - (target * z).sum(-1) + ratio / 2 * z.square().sum(-1)

    z = torch.zeros_like(target)
    for _ in range(NEWTON_STEPS):
        probs = z.softmax(-1)
        gradient = probs - target + ratio * z
        if float(gradient.abs().max()) < TOLERANCE:
            break
        curvature = torch.diag_embed(probs + ratio) - probs[..., :, None] * probs[..., None, :]
        step = torch.linalg.solve(curvature, gradient[..., None])[..., 0]
        size, decrease = torch.ones_like(z[..., :1]), (gradient * step).sum(-1)
        for _ in range(60):
            worse = loss(z - size * step) > loss(z) - 1e-4 * size[..., 0] * decrease + 1e-15
            if not worse.any():
                break
            size = torch.where(worse[..., None], size / 2, size)
        z = z - size * step
    return z


def optimal_features(classifier: Tensor, target: Tensor, feature_l2: float) -> tuple[Tensor, Tensor]:
    """Classifier [classes, d], an ETF, and labels [..., classes] -> features h [..., d], logits z [..., classes]."""
    classes = len(classifier)
    scale = classifier[0].square().sum() * classes / (classes - 1)
    z = optimal_logits(target, float(feature_l2 / scale))
    return z @ classifier / scale, z


def cosines(features: Tensor, classifier: Tensor) -> Tensor:
    """Of features [..., d] with each row of the classifier: [..., classes]; 0 for the zero vector."""
    return cosine_similarity(features[..., None, :], classifier, dim=-1)


def descended(classifier: Tensor, target: Tensor, feature_l2: float, steps: int) -> Tensor:
    """Labels [n, classes] -> features [n, d] after plain gradient descent from 0; its step size never overshoots."""
    largest = float(torch.linalg.matrix_norm(classifier, 2) ** 2) / 2 + feature_l2
    features = target.new_zeros(len(target), classifier.shape[1])
    for _ in range(steps):
        gradient = ((features @ classifier.T).softmax(1) - target) @ classifier + feature_l2 * features
        features = features - gradient / largest
    return features


def minimised(classifier: Tensor, target: Tensor, feature_l2: float, seed: int) -> Tensor:
    """Features [n, d] of a square classifier where L-BFGS ends, from random ones, on the loss itself."""
    start = torch.randn(target.shape, generator=torch.Generator().manual_seed(seed)).double()
    features = start.requires_grad_()
    optimizer = torch.optim.LBFGS(
        [features], max_iter=5000, tolerance_grad=1e-11, tolerance_change=0, line_search_fn="strong_wolfe"
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = cross_entropy(features @ classifier.T, target, reduction="sum")
        loss = loss + feature_l2 / 2 * features.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    return features.detach()


def lab(settings: Settings, seed: int, progress: Progress) -> Findings:
    """Features of mixes of classes 0 and 1 against straight mixes of their class features."""
    classifier = simplex_etf(settings.num_classes, settings.classifier_norm)
    mix = torch.tensor([*SHOWN, *torch.linspace(0, 1, 101).tolist()], dtype=torch.float64)
    target = mixed_target(settings.num_classes, 0, 1, mix)
    features, logits = optimal_features(classifier, target, settings.feature_l2)
    ends = features[mix.argmax()], features[mix.argmin()]
    straight = mix[:, None] * ends[0] + (1 - mix[:, None]) * ends[1]
    shown = len(SHOWN)
    progress(0.1, "L-BFGS from random features")
    searched = minimised(classifier, target[:shown], settings.feature_l2, seed)
    progress(0.3, "gradient descent")
    walked = descended(classifier, target[:shown], settings.feature_l2, settings.descent_steps)
    gaps = [float((found - features[:shown]).abs().max()) for found in (searched, walked)]
    claims = [
        _same("L-BFGS on the loss ends where the formula says", gaps[0]),
        _same("gradient descent on the loss ends there, too", gaps[1]),
        _aligned(features[0], classifier),
        *_shape(features[:shown], straight[:shown], logits[:shown]),
    ]
    return Findings(claims, _panels(mix[shown:], features[shown:], straight[shown:], classifier))


def _same(name: str, gap: float) -> Claim:
    return Claim(name, "features differ by less than 1e-6", f"by {gap:.0e}", gap < 1e-6, "derived")


def _aligned(features: Tensor, classifier: Tensor) -> Claim:
    cosine = float(cosines(features, classifier)[0])
    return Claim(
        "a mix within one class is aligned with the classifier", "cosine 1", f"{cosine:.6f}", cosine > 1 - 1e-9, "paper"
    )


def _shape(features: Tensor, straight: Tensor, logits: Tensor) -> list[Claim]:
    """Of mixes of two classes, at `SHOWN`: away from the straight mix, longer, and near the decision boundary."""
    away = ((features - straight).norm(dim=1) / features.norm(dim=1).clamp_min(1e-9))[1:]
    lengths, plain = features.norm(dim=1), straight.norm(dim=1)
    margin = float(logits[1, 0] - logits[1, 1])
    usual = (2 * SHOWN[1] - 1) * float(logits[0, 0] - logits[0, 1])
    return [
        Claim(
            "mixes of two classes are no convex mixes of class features",
            "away from the straight mix by over 10 % of their length",
            f"by {100 * away.min():.0f} to {100 * away.max():.0f} %",
            bool(away.min() > 0.1),
        ),
        Claim(
            "they bend into a channel along the decision boundary",
            "logits of the two classes, 0.9 to 0.1, less than half as far apart as in the straight mix",
            f"{margin:.2f} against {usual:.2f}",
            margin < usual / 2,
        ),
        Claim(
            "they are longer than the straight mix",
            "at lambda 0.9, 0.7 and 0.5",
            f"{', '.join(f'{one:.2f}' for one in lengths[1:])} against {', '.join(f'{one:.2f}' for one in plain[1:])}",
            bool((lengths > plain)[1:].all()),
            "derived",
        ),
    ]


def _panels(mix: Tensor, features: Tensor, straight: Tensor, classifier: Tensor) -> list[Panel]:
    axes = classifier[0] - classifier[1], classifier[0] + classifier[1]
    across, along = (axis / axis.norm().clamp_min(1e-12) for axis in axes)
    pair = {"mixed features": features, "straight mix": straight}
    styles = dict(zip(pair, ("line", "dashed"), strict=True))
    plane = [Curve(name, (h @ across).tolist(), (h @ along).tolist(), styles[name]) for name, h in pair.items()]
    length = [Curve(name, mix.tolist(), h.norm(dim=1).tolist(), styles[name]) for name, h in pair.items()]
    return [
        Panel("features of mixes of two classes", "along w_i - w_j", "along w_i + w_j", plane),
        Panel("their length", "lambda", "|h|", length),
    ]
