"""Further cases of SPO-tree: means of means and edges once more in plain Python, and which rows are too old."""

from __future__ import annotations

import statistics
from typing import Any


def tree(name: str, parent: list[int], leaf: list[float | None], depth: list[int], params: dict) -> dict[str, Any]:
    """`leaf` has the reward of each leaf, None for the others."""
    nodes = range(len(parent))
    below = {node: [child for child in nodes if parent[child] == node and child] for node in nodes}

    def worth(node: int) -> float:
        return leaf[node] if leaf[node] is not None else statistics.fmean(map(worth, below[node]))

    value = [worth(node) for node in nodes]
    spread = [statistics.pstdev([value[child] for child in below[node]]) if below[node] else 0.0 for node in nodes]
    plain = [0.0 if parent[node] < 0 else value[node] - value[parent[node]] for node in nodes]
    scaled = [0.0 if parent[node] < 0 else plain[node] / (spread[parent[node]] + 1e-8) for node in nodes]
    inputs = {"parent": parent, "depth": depth, "is_leaf": [one is not None for one in leaf]}
    expected = {"node_value": value, "children_std": spread, "advantage_unnormalised": plain}
    expected |= {"advantage_normalised": scaled, "kept": [int(abs(one) > 1e-8) for one in plain]}
    inputs["leaf_reward"] = [one or 0.0 for one in leaf]
    return {"name": name, "inputs": inputs, "params": params, "expected": expected, "rtol": 1e-5, "atol": 1e-6}


def waiting(name: str, added: list[dict], params: dict, used: list, discarded: list, left: list) -> dict[str, Any]:
    expected = {"used_per_question": used, "discarded": discarded, "left_per_question": left}
    inputs = {"edges_added_per_question": added}
    return {"name": name, "inputs": inputs, "params": params, "expected": expected, "rtol": 0, "atol": 0}


def cases() -> list[dict[str, Any]]:
    by_level = [-1, 0, 0, 1, 1, 2, 3, 3]
    few = {"max_staleness_iterations": 2, "max_edges_per_question": 1}
    return [
        tree("level_by_level", by_level, [None, None, None, None, -2.0, 1.0, 0.5, 0], [0, 1, 1, 2, 2, 2, 3, 3], {}),
        tree("depth_1", [-1, 0, 0, 0], [None, 1, 0, 0], [0, 1, 1, 1], {"max_depth": 1}),
        tree("only_children", [-1, 0, 1], [None, None, 1.0], [0, 1, 2], {"max_depth": 2, "std": "population"}),
        tree("all_alike", [-1, 0, 0, 1, 1], [None, None, 0.1, 0.1, 0.1], [0, 1, 1, 2, 2], {"grpo_eps": 1e-8}),
        tree("nothing_grown", [-1], [1.0], [0], {"max_depth": 3}),
        waiting(
            "too_old",
            [{"q": 3}, {"p": 2}, {}, {}],
            few,
            [{"q": 1}, {"p": 1, "q": 1}, {"p": 1}, {}],
            [0, 0, 1, 0],
            [{"q": 2}, {"p": 1, "q": 1}, {}, {}],
        ),
        waiting("no_step", [], {}, [], [], []),
        waiting("one_row", [{"z": 1}], {}, [{"z": 1}], [0], [{}]),
    ]
