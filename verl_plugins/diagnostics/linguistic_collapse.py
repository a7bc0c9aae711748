"""Linguistic collapse: how near the policy's last hidden states are to neural collapse, and rollouts to each other.

Wu, Papyan, Linguistic Collapse: Neural Collapse in (Large) Language Models, NeurIPS 2024, arXiv 2405.17767. A language
model classifies tokens: x is what the output head gets where it predicts token y, W_y the head's row. With m_c = mu_c -
mu_G of the classes that are frequent enough (`verl_plugins.diagnostics.classes`):

    CDNV (NC1)        mean over pairs of ((v_i + v_j) / 2) / |mu_i - mu_j|^(2p),  p = 2 (analysis) or 1 (library)
    equinorm (NC2)    mean and variance of |m_c|; hyperspherical uniformity (GNC2): variance of log 1/|u_i - u_j|
    duality (NC3)     cosine of W_c and m_c; its variance (UNC3)
    agreement (NC4)   share of held-out tokens whose argmax_c W_c x is the class of the nearest mean

What differs from GRPO: 1. Nothing in training: `observe` measures. 2. In steps that are due the pass for the old
log-probs also returns hidden states. The label modes `uid` (class: the prompt, feature: the mean state of a response;
the quotient is the diversity of a prompt's rollouts) and `outcome` (right or wrong) are ours, as are the sample of
tokens and the classes that stay those of the first step measured.

Degenerate cases. Fewer than two classes: no metric of pairs. Two means in one point: no CDNV, no uniformity. No token
held out: no agreement. Of classes with one feature each CDNV is 0, which says too few samples. Two classes: norms,
uniformity and the distance to a frame say nothing, and are left out.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import normalize

from verl_plugins import Batch, Hidden, Plugin, Run, Wish, hookimpl, setting
from verl_plugins.diagnostics.classes import Classes, by_class, quotient

MODES = ("token", "uid", "outcome")
RESPONSES_PER_CLASS = 2
"""A class of one response has no spread."""


def cdnv(classes: Classes, power: float) -> float:
    """NC1 of at least two classes with features [D]: mean of spread / distance^(2 power) over pairs; NaN or infinite
    where two means are one point.
    """
    i, j = torch.triu_indices(len(classes), len(classes), 1)
    return float(((classes.spread[i] + classes.spread[j]) / 2 / torch.pdist(classes.means) ** (2 * power)).mean())


def geometry(classes: Classes) -> dict[str, float]:
    """NC2 and GNC2: norms (unbiased variance), distance to a simplex, interference and kernel of pairs (biased)."""
    centred, norms = classes.centred, classes.centred.norm(dim=1)
    i, j = torch.triu_indices(len(classes), len(classes), 1)
    gram = centred @ centred.T
    pairs = {"interfere": gram[i, j], "logkernel": -torch.pdist(normalize(centred, dim=1)).log()}
    found = {f"{name}_mean": values.mean() for name, values in pairs.items()}
    found |= {f"{name}_var": values.var(correction=0) for name, values in pairs.items()}
    found |= {"norms_mean": norms.mean(), "norms_var": norms.var(), "norm_cv": norms.std() / norms.mean()}
    found |= {"lognorms_mean": norms.log().mean(), "lognorms_var": norms.log().var(), "etf_error": frame_error(gram)}
    return {name: float(value) for name, value in found.items()}


def duality(classes: Classes, head: Tensor) -> dict[str, float]:
    """NC3 for the head's rows [K,D] of the classes; variances over classes are unbiased."""
    centred, head = classes.centred, head.double()
    directions = normalize(head, dim=1), normalize(centred, dim=1)
    found = {
        "simdot": (head * centred).sum(1),
        "simcos": (directions[0] * directions[1]).sum(1),
        "dists": (directions[0] - directions[1]).norm(dim=1),
    }
    of_all = {"dual_error": float(frame_error(head @ centred.T))}
    means = {f"{name}_mean": float(values.mean()) for name, values in found.items()}
    return of_all | means | {f"{name}_var": float(values.var()) for name, values in found.items()}


def frame_error(gram: Tensor) -> Tensor:
    """|G/|G| - (I - 11^T/K) / sqrt(K - 1)| in the Frobenius norm, G [K,K]."""
    size = len(gram)
    frame = (torch.eye(size, dtype=gram.dtype) - 1 / size) / (size - 1) ** 0.5
    return (gram / gram.norm() - frame).norm()


def agreement(
    classes: Classes, features: Tensor, argmax: Tensor, never_seen: bool = False, vocabulary: int | None = None
) -> float:
    """NC4: share of tokens, features [N,D], whose likeliest token argmax [N] is the class of the nearest mean.

    Args:
        never_seen: as in the authors' code, the rest of the vocabulary is a class at 0 whose first token counts.
        vocabulary: its size; None: larger than the number of classes.
    """
    features = features.double()
    distance, nearest = torch.cdist(features, classes.means).min(1)
    found = classes.ids[nearest]
    if never_seen and (vocabulary is None or vocabulary > len(classes)):
        missing = (classes.ids != torch.arange(len(classes))).nonzero()
        first = int(missing[0]) if len(missing) else len(classes)
        found = torch.where(features.norm(dim=1) < distance, first, found)
    return float((found == argmax).double().mean())


class Sample(NamedTuple):
    """Features [N,D] and labels [N] of a mode; of tokens also what the head says."""

    features: Tensor
    labels: Tensor
    head_row: Tensor | None = None
    argmax: Tensor | None = None


class LinguisticCollapse(Plugin):
    """Measures neural collapse of tokens, diversity of a prompt's rollouts, and how far right and wrong are apart."""

    name = "linguistic_collapse"
    paper = "arXiv:2405.17767"
    needs = frozenset({"hidden_states"})

    @dataclass
    class Config:
        labels: tuple[str, ...] = setting(MODES, "what classes are: token, uid (prompts), outcome (right, wrong)")
        freq: int = setting(10, "steps between two measurements, from the first step on", authors=1, ge=1)
        tokens_per_response: int = setting(8, "generated tokens of each response that are looked at", ge=1)
        max_tokens: int = setting(16384, "tokens of a step that are looked at, at most", ge=1)
        min_per_class: int = setting(4, "tokens from which a class counts", authors=1, ge=1)
        max_classes: int = setting(1024, "classes of tokens, the most frequent", ge=2)
        fixed_classes: bool = setting(True, "the classes of tokens stay those of the first step measured")
        holdout: float = setting(0.2, "share of the tokens that agreement is measured on", ge=0, lt=1)
        ncc_classes: str = setting(
            "observed", "among which classes the nearest mean is sought", authors="all", choices=("observed", "all")
        )

        def __post_init__(self) -> None:
            if not self.labels or (wrong := set(self.labels) - set(MODES)):
                raise ValueError(
                    f"labels is {list(self.labels)}: name some of {', '.join(MODES)}"
                    + (f", not {sorted(wrong)[0]!r}" if self.labels else "")
                )

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.reference: Tensor | None = None
        """Ids of the token classes of the first step measured, ascending."""

    def hidden_wish(self) -> Wish:
        token = "token" in self.config.labels
        tokens = self.config.tokens_per_response if token else 0
        return Wish(tokens=tokens, every=self.config.freq, head_rows=token, argmax=token)

    @hookimpl
    def observe(self, run: Run, batch: Batch) -> None:
        hidden = self.hidden_wish().of(batch.hidden, run.step)
        if hidden is None:
            return
        for mode in self.config.labels:
            found = self._of_tokens(run, hidden) if mode == "token" else of_responses(batch, hidden, mode)
            run.log({f"{mode}_{name}": value for name, value in found.items() if -torch.inf < value < torch.inf})

    def _of_tokens(self, run: Run, hidden: Hidden) -> dict[str, float]:
        chosen = hidden.first(self.config.max_tokens)
        whole = Sample(
            hidden.features[chosen, -1], hidden.label[chosen], hidden.head_row[chosen], hidden.argmax[chosen]
        )
        held_out = torch.from_numpy(run.rng("holdout").random(len(chosen)) < self.config.holdout)
        sample, held = (Sample(*(part[rows] for part in whole)) for rows in (~held_out, held_out))
        observed = by_class(sample.features, sample.labels)
        classes = observed.selected(self.config.min_per_class, most=self.config.max_classes)
        if self.reference is None and self.config.fixed_classes and len(classes) >= 2:
            self.reference = classes.ids
        if self.reference is not None:
            classes = observed.selected(self.config.min_per_class)
            classes = classes.where(torch.isin(classes.ids, self.reference))
        found = measured(classes)
        if len(classes) < 2:
            return found
        head = duality(classes, rows_of(classes, sample.labels, sample.head_row))
        found |= {"simcos_mean": head["simcos_mean"], "unc3": head["simcos_var"], "dual_error": head["dual_error"]}
        if len(held.labels):
            every = self.config.ncc_classes == "all"
            found["agreement"] = agreement(observed if every else classes, held.features, held.argmax, every)
        return found

    def state_dict(self) -> dict[str, Any]:
        return {"reference": self.reference}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.reference = state["reference"]


def rows_of(classes: Classes, labels: Tensor, head_row: Tensor) -> Tensor:
    """[K,D] the head's rows of the classes, from those that came with tokens [N,D] of labels [N]."""
    ids, index = labels.unique(return_inverse=True)
    rows = head_row.new_zeros(len(ids), head_row.shape[1]).index_copy_(0, index, head_row)
    return rows[torch.searchsorted(ids, classes.ids)]


def of_responses(batch: Batch, hidden: Hidden, mode: str) -> dict[str, float]:
    """Metrics of the mode `uid` or `outcome`; each session counts once, by its last output."""
    rows = batch.is_last & batch.response_mask.any(1)
    labels = batch.groups.index if mode == "uid" else batch.correct.long()
    return measured(by_class(hidden.pooled[rows, -1], labels[rows]).selected(RESPONSES_PER_CLASS))


def measured(classes: Classes) -> dict[str, float]:
    """What is logged in every mode."""
    found = {"n_classes": float(len(classes)), "n_samples": float(classes.counts.sum())}
    if len(classes) < 2:
        return found
    found |= {"cdnv": cdnv(classes, 2), "cdnv_p1": cdnv(classes, 1), "quotient": float(quotient(classes))}
    if len(classes) > 2:
        of_all = geometry(classes)
        found |= {"norm_cv": of_all["norm_cv"], "gnc2_var": of_all["logkernel_var"], "etf_error": of_all["etf_error"]}
    return found
