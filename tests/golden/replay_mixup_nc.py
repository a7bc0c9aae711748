"""Mixed features under mixup: logits and features of the optimum, and their angles to the classifier."""

import pytest
import torch
from cases import Case

from verl_plugins.labs.mixup_nc import cosines, mixed_target, optimal_features, simplex_etf


def replay(case: Case, expected: dict) -> dict:
    norm, classes = case.param("classifier_norm", 1.0), case.param("num_classes", None)
    classifier = case.tensor("classifier") if case.has("classifier") else simplex_etf(classes, norm)
    assert len(classifier) == (classes or len(classifier))
    assert float(classifier[0].norm()) == pytest.approx(norm, rel=1e-6)
    i, j = case.param("class_i", 0), case.param("class_j", 0)
    mix = torch.tensor(case.param("mix_lambda", 1.0), dtype=torch.float64)
    features, logits = optimal_features(
        classifier, mixed_target(len(classifier), i, j, mix), case.param("feature_l2", 1e-3)
    )
    return {
        "logits": logits.tolist(),
        "features": features.tolist(),
        "probs": logits.softmax(-1).tolist(),
        "cos_to_rows": cosines(features, classifier).tolist(),
    }
