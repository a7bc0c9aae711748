"""The entropy law: the fit, as the diagnostic calls it, to the first complete points."""

import numpy as np
from cases import Case

from verl_plugins.diagnostics.entropy_law import complete, fit


def replay(case: Case, expected: dict) -> dict:
    entropy = np.array(case.input("entropy"), dtype=np.float64)
    known = complete(entropy, case.input("performance"))
    used = [values[: case.param("n_fit")] for values in known]
    law = fit(*used)
    found = {"n_used": len(used[0]), "law_applies": law is not None and law.applies}
    if law is None:
        return found | dict.fromkeys(("a", "b", "ceiling", "rmse_fit", "r2", "predicted", "rmse_all"))
    error = known[1] - law.predicted(known[0])
    return found | {
        "a": law.a,
        "b": law.b,
        "ceiling": law.ceiling,
        "rmse_fit": law.rmse,
        "r2": law.r2,
        "predicted": law.predicted(entropy[np.isfinite(entropy)]),
        "rmse_all": np.sqrt(np.mean(error**2)),
    }
