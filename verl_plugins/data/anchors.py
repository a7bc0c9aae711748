"""`verl-plugins data anchors`: prompts embedded and clustered, and a column with the number of each prompt's anchor.

arXiv:2601.00543, as far as it could be known (abstract and a summary; no code): anchors are made once, from a teacher's
embeddings, and each input is told which one it is near. The rest is inferred. K anchors come from k-means on directions
(mean of unit vectors), the first ones drawn as k-means++ draws; a prompt belongs to

    argmax_k cos(e, a_k), the lowest k of equal ones; an embedding of zeros to anchor 0.

    geometry consistency   Pearson correlation over i < j of cos(a_i, a_j) and cos(m_i, m_j), m_k the mean embedding of
                           anchor k's prompts by another embedder, over the anchors that have prompts, three and more

Degenerate cases: there are never more anchors than different prompts, which is refused. A cluster that loses its
prompts on the way takes the one that is farthest from its own.
"""

from __future__ import annotations

import os
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from verl_plugins.errors import DataError

ROUNDS = 100
"""Of k-means, at most."""
SMALLEST = 1e-12
"""A shorter embedding has no direction."""
Embed = Callable[[Sequence[str]], np.ndarray]


@dataclass(frozen=True)
class Options:
    """What the user chose; see `verl-plugins data anchors --help`."""

    anchors: int = 16
    seed: int = 0
    column: str = "anchor_id"
    val: Path | None = None
    val_to: Path | None = None


@dataclass(frozen=True)
class Report:
    """What was written."""

    counts: list[int]
    """Prompts of each anchor."""
    val_counts: list[int]
    examples: list[str]
    """Of each anchor, the prompt that is nearest to it."""
    consistency: float | None
    """Of the other embedder, where there is one and three anchors are in use."""


def unit(vectors: np.ndarray) -> np.ndarray:
    """[n,d] -> [n,d] of length 1, zeros where a vector has no direction."""
    norm = np.linalg.norm(vectors, axis=1, keepdims=True)
    return np.where(norm > SMALLEST, vectors / np.maximum(norm, SMALLEST), 0.0)


def assign(embeddings: np.ndarray, anchors: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """[n,d] embeddings, [K,d] anchors -> [n] anchor of each, [n] its cosine."""
    if not len(embeddings):
        return np.zeros(0, dtype=np.int64), np.zeros(0)
    cosines = unit(embeddings) @ unit(anchors).T
    found = cosines.argmax(1)
    return found, cosines[np.arange(len(found)), found]


def geometry_consistency(anchor_of: np.ndarray, anchors: np.ndarray, embeddings: np.ndarray) -> float | None:
    """How alike the angles between anchors are to those between their prompts' means by another embedder.

    Args:
        anchor_of: [n] anchor of each prompt.
        anchors: [K,d].
        embeddings: [n,e] by the other embedder.

    Returns:
        The correlation; None with less than three anchors in use, or where all angles of one side are equal.
    """
    used = np.unique(anchor_of)
    if len(used) < 3:
        return None
    means = np.stack([embeddings[anchor_of == anchor].mean(0) for anchor in used])
    upper = np.triu_indices(len(used), 1)
    pairs = [(vectors @ vectors.T)[upper] for vectors in (unit(anchors[used]), unit(means))]
    if min(np.ptp(one) for one in pairs) <= SMALLEST:
        return None
    return float(np.corrcoef(*pairs)[0, 1])


def cluster(embeddings: np.ndarray, count: int, seed: int) -> np.ndarray:
    """[n,d] embeddings -> [count,d] anchors of length 1, in the order in which prompts first meet them.

    Raises:
        DataError: there are fewer different directions than anchors.
    """
    points = unit(embeddings)
    points = points[points.any(1)]
    centres = _first(points, count, np.random.default_rng(seed))
    of = None
    for _ in range(ROUNDS):
        before, (of, cosine) = of, assign(points, centres)
        for empty in np.setdiff1d(np.arange(count), of):
            far = int(cosine.argmin())
            of[far], cosine[far] = empty, 1.0
        if before is not None and (of == before).all():
            break
        centres = unit(np.stack([points[of == anchor].mean(0) for anchor in range(count)]))
    order = assign(points, centres)[0]
    met = list(dict.fromkeys(order.tolist()))
    return centres[met + [anchor for anchor in range(count) if anchor not in met]]


def _first(points: np.ndarray, count: int, rng: np.random.Generator) -> np.ndarray:
    """k-means++: each next centre is a point, drawn by its distance from the nearest so far."""
    chosen: list[int] = []
    distance = np.ones(len(points))
    while len(chosen) < count:
        if not distance.any():
            raise DataError(
                f"--anchors {count}: only {len(chosen)} prompts differ in what the embedder sees, ask for fewer anchors"
            )
        chosen.append(int(rng.choice(len(points), p=distance / distance.sum())))
        distance = np.minimum(distance, 1 - points @ points[chosen[-1]])
        distance[distance < SMALLEST] = 0
    return points[chosen]


def write(file: Path, to: Path, embed: Embed, options: Options = Options(), compared: Embed | None = None) -> Report:
    """Write `to` with the column, and `options.val_to`, whose prompts go to the same anchors.

    Raises:
        DataError: a file is not in verl's schema, has such a column already, or asks for too many anchors.
    """
    pairs = [(file, to)]
    if (options.val is None) != (options.val_to is None):
        raise DataError("--val and --val-to are the file of held-out prompts and what is written of it: give both")
    if options.val is not None and options.val_to is not None:
        pairs.append((options.val, options.val_to))
    tables = [_read(source, target, options.column) for source, target in pairs]
    texts = [_texts(table, source) for table, (source, _) in zip(tables, pairs, strict=True)]
    embeddings = embed(texts[0])
    anchors = cluster(np.asarray(embeddings, dtype=np.float64), options.anchors, options.seed)
    found = [assign(embeddings, anchors), *(assign(embed(part), anchors) for part in texts[1:])]
    for table, (of, _), (_, target) in zip(tables, found, pairs, strict=True):
        _write(table, options.column, of, target)
    of, cosine = found[0]
    nearest = [int(np.where(of == anchor, cosine, -np.inf).argmax()) for anchor in range(options.anchors)]
    counts = [np.bincount(one, minlength=options.anchors).tolist() for one, _ in found]
    consistency = None if compared is None else geometry_consistency(of, anchors, compared(texts[0]))
    return Report(counts[0], counts[1] if len(counts) > 1 else [], [texts[0][row] for row in nearest], consistency)


def _read(source: Path, target: Path, column: str) -> Any:
    import pyarrow
    import pyarrow.parquet

    if target.suffix != ".parquet":
        raise DataError(f"{target}: the name must end in .parquet")
    if target.resolve() == source.resolve():
        raise DataError(f"{target} is the file that is read; give another name")
    if not source.is_file():
        raise DataError(f"{source}: there is no such file")
    try:
        table = pyarrow.parquet.read_table(source)
    except (OSError, pyarrow.ArrowException) as error:
        reason = (str(error).splitlines() or [""])[0].rstrip(". ")
        raise DataError(
            f"{source} cannot be read as parquet ({reason}); verl-plugins data convert makes it from other formats"
        ) from error
    if "prompt" not in table.column_names:
        raise DataError(
            f"{source} has no column 'prompt' with the messages of each prompt, as verl reads it; verl-plugins data "
            "convert makes one"
        )
    if column in table.column_names:
        raise DataError(f"{source} has a column {column!r} already; choose another name with --column")
    return table


def _texts(table: Any, source: Path) -> list[str]:
    """What the users' messages of each row say."""
    found = [_said(messages) for messages in table.column("prompt").to_pylist()]
    if "" in found:
        raise DataError(f"row {found.index('') + 1} of {source}: its prompt has no text of a user's to embed")
    return found


def _said(messages: Any) -> str:
    contents = [message.get("content") for message in messages or () if message.get("role") == "user"]
    texts = [
        part if isinstance(part, str) else str((part or {}).get("text") or "")
        for content in contents
        for part in (content if isinstance(content, list) else [content or ""])
    ]
    return "\n".join(filter(None, texts)).strip()


def _write(table: Any, column: str, values: np.ndarray, target: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    target.parent.mkdir(parents=True, exist_ok=True)
    unfinished = target.with_name(f".{target.name}.{uuid.uuid4().hex}")
    try:
        pyarrow.parquet.write_table(table.append_column(column, pyarrow.array(values, pyarrow.int64())), unfinished)
        os.replace(unfinished, target)
    finally:
        unfinished.unlink(missing_ok=True)
