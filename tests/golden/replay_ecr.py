"""ECR: prompts at their nearest anchors, and how alike two maps of the anchors are."""

import numpy as np
from cases import Case

from verl_plugins.data.anchors import assign, geometry_consistency


def replay(case: Case, expected: dict) -> dict:
    assert case.param("mode", "anchors") == "anchors"
    anchors, embeddings = table(case.input("anchors")), table(case.input("teacher_embeddings"))
    of, cosine = assign(embeddings, anchors)
    found = {
        "anchor_ids": of,
        "cosine": cosine,
        "anchors_in_use": np.unique(of),
        "counts": np.bincount(of, minlength=len(anchors)),
    }
    students = table(case.input("student_embeddings", []))
    return found | {"geometry_consistency": geometry_consistency(of, anchors, students) if len(students) else None}


def table(rows: list) -> np.ndarray:
    return np.array(rows, dtype=np.float64).reshape(len(rows), -1 if rows else 0)
