"""Every recorded case of every method, replayed through the functions and hooks that training calls.

A case file is JSON: id, produced_by, cases with name, inputs, params, expected, rtol, atol. `replay_<id>.py` turns one
case into a dict of what our code computes; every expected key must be in it. A file, input, parameter or expectation
that nothing here knows is a failure. VERL_PLUGINS_GOLDEN names another folder of such files.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
from pathlib import Path

import numpy as np
import pytest
from cases import Case

FOLDER = Path(os.environ.get("VERL_PLUGINS_GOLDEN") or Path(__file__).parent / "data")
FILES = sorted(FOLDER.glob("*.json"))
CASES = [(data["id"], case) for data in (json.loads(path.read_text()) for path in FILES) for case in data["cases"]]


def test_there_are_cases():
    assert CASES, f"no cases in {FOLDER}"


@pytest.mark.parametrize(("method", "case"), CASES, ids=[f"{method}-{case['name']}" for method, case in CASES])
def test_golden(method, case):
    assert importlib.util.find_spec(f"replay_{method}"), f"no replay_{method}.py: method {method!r} is unknown here"
    read = Case(case["inputs"], case["params"])
    found = importlib.import_module(f"replay_{method}").replay(read, case["expected"])
    read.check_all_read()
    unknown = set(case["expected"]) - set(found)
    assert not unknown, f"replay_{method}.py computes nothing called {sorted(unknown)}"
    for key, expected in case["expected"].items():
        np.testing.assert_allclose(
            np.asarray(found[key], dtype=np.float64), expected, rtol=case["rtol"], atol=case["atol"], err_msg=key
        )
