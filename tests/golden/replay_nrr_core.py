"""NRR-Core: the controller of the plugin, the answers in bits, and the lab's forward pass, by `mode`."""

import numpy as np
import pandas as pd
from cases import Case

from verl_plugins.entropy.nrr_core import NrrCore, answer_entropy
from verl_plugins.labs.nrr_core import bits, classify, softmax, turn1_vector

USUAL = NrrCore.Config()
"""For settings that a case leaves out."""


def replay(case: Case, expected: dict) -> dict:
    mode = case.param("mode")
    return {"retention_controller": controller, "answer_entropy_bits": answers, "nrr_lite_forward": forward}[mode](case)


def controller(case: Case) -> dict:
    plugin = NrrCore(
        NrrCore.Config(
            reference=case.param("reference", USUAL.reference),
            epsilon=case.param("epsilon", USUAL.epsilon),
            decay=case.param("decay", USUAL.decay),
            kappa=case.param("step", USUAL.kappa),
            max_coeff=case.param("coef_max", USUAL.max_coeff),
            initial_coeff=case.param("coef_init", USUAL.initial_coeff),
        )
    )
    found = [plugin.retention.step(float(entropy)) for entropy in case.input("entropy")]
    names = ("entropy_coeff", "violation", "reference")
    return {name: [step[place] for step in found] for place, name in enumerate(names)}


def answers(case: Case) -> dict:
    uid, given = np.array([str(name) for name in case.input("uid")], dtype=object), case.input("answers")
    real = [not name.startswith("pad") for name in uid]  # as in training, where padding rows are not in the batch
    group, names = pd.factorize(uid[real])
    texts = pd.Series(given, dtype=object).map(lambda answer: answer if answer is None else str(answer))
    codes = pd.factorize(texts[real])[0]
    found, normalised = answer_entropy(group, codes, len(names), case.param("missing", USUAL.missing))
    return {
        "bits": dict(zip(names, found.tolist(), strict=True)),
        "normalized": dict(zip(names, normalised.tolist(), strict=True)),
        "mean_bits": found.mean() if len(found) else 0.0,
    }


def forward(case: Case) -> dict:
    names = ("embedding", "gate_W", "gate_b", "W1", "b1", "W2", "b2")
    given = {name: np.array(case.input(name), dtype=float) for name in names}
    senses = np.array([case.input("sense_a"), case.input("sense_b")], dtype=float)
    turn1, turn2 = (np.array(case.input(name), dtype=np.int64) for name in ("turn1_ids", "turn2_ids"))
    second = given["embedding"][turn2].mean(1)
    gates = softmax(second @ given["gate_W"] + given["gate_b"])
    first = turn1_vector(given["embedding"], turn1, case.param("ambiguous_id"), senses, gates)
    _, probs = classify(np.concatenate([first, second], 1), given)
    return {"probs": probs, "gates": gates, "turn1_vec": first, "entropy_bits": bits(probs)}
