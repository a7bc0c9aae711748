"""Neural collapse of features by label, the head's rows and held-out tokens being optional."""

import torch
from cases import Case

from verl_plugins.diagnostics.classes import by_class, quotient
from verl_plugins.diagnostics.linguistic_collapse import agreement, cdnv, duality, geometry, rows_of


def replay(case: Case, expected: dict) -> dict:
    labels = torch.tensor(case.input("labels"), dtype=torch.int64)
    features = case.tensor("features").reshape(len(labels), -1 if len(labels) else 1)
    observed = by_class(features, labels)
    classes = observed.selected(case.param("min_per_class", 1), case.param("max_per_class", None))
    found = {"class_ids": classes.ids.tolist(), "counts": classes.counts.tolist(), "n_classes": len(classes)}
    power = case.param("dist_exp", 2.0)
    if len(classes) >= 2:
        found |= nc1(classes, power) | nc2(classes)
    if case.has("lm_head"):
        found |= against_head(case, observed, classes, labels)
    return found


def nc1(classes, power: float) -> dict:
    return {
        "nc1_cdnv": cdnv(classes, power),
        "nc1_cdnv_exp1": cdnv(classes, 1),
        "nc1_quotient": float(quotient(classes)),
    }


def nc2(classes) -> dict:
    values = geometry(classes)
    names = ("norms_mean", "norms_var", "lognorms_mean", "lognorms_var", "etf_error", "interfere_mean", "interfere_var")
    found = {f"nc2_{name}": values[name] for name in names}
    return found | {f"gnc2_{name}": values[name] for name in ("logkernel_mean", "logkernel_var")}


def against_head(case: Case, observed, classes, labels: torch.Tensor) -> dict:
    head = case.tensor("lm_head")
    found = {}
    if len(classes) >= 2:
        values = duality(classes, rows_of(classes, labels, head[labels]))
        found = {f"nc3_{name}": value for name, value in values.items()}
        found["unc3_simcos_var"] = values["simcos_var"]
    if case.has("val_features") and not case.input("val_features"):
        case.input("val_labels", None)
    elif case.has("val_features"):
        case.input("val_labels", None)  # recorded, but agreement is about what the head says
        features = case.tensor("val_features")
        argmax = (features @ head.T).argmax(1)
        found["nc4_agreement_all_classes"] = agreement(observed, features, argmax, True, len(head))
        found["nc4_agreement"] = agreement(classes, features, argmax)
    return found
