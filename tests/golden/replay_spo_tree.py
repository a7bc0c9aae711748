"""SPO-tree: a tree is sampled, published and backed up; segments wait in the store and are drawn."""

import torch
from cases import Case, NotOffered
from fakes import FakeDataset, FakeRun
from trees import FIRST, Planted, group, rows_of, star

from verl_plugins import Batch
from verl_plugins.advantage.spo_tree import ADVANTAGE, EPSILON, SpoTree, back_up


def replay(case: Case, expected: dict) -> dict:
    return edges(case) if case.has("parent") else replayed(case, expected)


def edges(case: Case) -> dict:
    if case.param("grpo_eps", EPSILON) != EPSILON or case.param("std", "population") != "population":
        raise NotOffered("eps is 1e-8 and the deviation that of the population")
    parent, depth, leaf = (case.input(name) for name in ("parent", "depth", "is_leaf"))
    reward = [value * flag for value, flag in zip(case.input("leaf_reward"), leaf, strict=True)]
    levels = max(case.param("max_depth", 1), *depth, 1)
    value, spread = back_up(torch.tensor(parent), torch.tensor(depth), torch.tensor(reward))
    found = {"node_value": value, "children_std": spread}
    inner = [node for node, flag in enumerate(leaf) if not flag]
    for name, by_std in (("advantage_unnormalised", False), ("advantage_normalised", True)):
        tree = Planted(parent, reward, inner=inner)
        plugin = SpoTree(SpoTree.Config(branches=[1] * levels, by_std=by_std, rows_per_prompt=10**6))
        found[name], found["kept"] = torch.zeros(len(parent)).double(), torch.zeros(len(parent))
        if not (rollouts := group(tree, plugin)):
            continue
        batch = rows_of({"0-1-0": rollouts})
        node = batch.responses[:, 0] - FIRST
        plugin.select_rows(FakeRun(dataset=FakeDataset(1)), batch)
        found[name][node] = batch.written[ADVANTAGE].double()
        found["kept"][node] = (~batch.dropped & ~torch.tensor(batch.update_skipped)).float()
    return found


def replayed(case: Case, expected: dict) -> dict:
    """Every edge of a question is a leaf of a tree of depth 1 whose rewards are not all the same."""
    plugin = SpoTree(
        SpoTree.Config(
            branches=[1],
            max_age=case.param("max_staleness_iterations", 8),
            rows_per_prompt=case.param("max_edges_per_question", 32),
        )
    )
    added = case.input("edges_added_per_question")
    names = sorted({name for step in added for name in step})
    used, discarded, left = [], [], []
    for step, edges_of in enumerate(added, 1):
        groups = {f"{names.index(name)}-{step}-0": with_edges(count) for name, count in edges_of.items() if count}
        groups |= {f"{len(names)}-{step}-1": star([1.0, 1.0])}  # a question that teaches nothing
        run = FakeRun(step=step, dataset=FakeDataset(len(names) + 1))
        batch = rows_of({uid: group(tree, plugin) for uid, tree in groups.items()})
        plugin.select_rows(run, batch)
        used.append(counted(names, trained(batch)))
        discarded.append(run.metrics["replay_discarded"])
        left.append(counted(names, plugin.store.facts["prompt_id"].tolist()))
    for ours, theirs in zip(used + left, expected["used_per_question"] + expected["left_per_question"], strict=True):
        assert ours.keys() == theirs.keys(), "no question more, and none less"
    return {"used_per_question": used, "discarded": discarded, "left_per_question": left}


def with_edges(count: int) -> Planted:
    """So many segments with an advantage: the leaves, one of which has no token and none."""
    return star([0.0] + [1.0] * count, empty=[1])


def trained(batch: Batch) -> list[int]:
    """The prompts of the rows that are trained on."""
    if batch.update_skipped:
        return []
    return [*batch.prompt_id[~batch.dropped].tolist(), *[new.past.prompt_id for new in batch.additions]]


def counted(names: list[str], prompts: list[int]) -> dict:
    return {name: prompts.count(number) for number, name in enumerate(names) if number in prompts}
