"""Dual-head distillation: the authors' losses and gradients, and the merged gradient of two losses."""

import torch
from cases import Case, NotOffered

from verl_plugins.distill.dhkd import BINARY, align


def replay(case: Case, expected: dict) -> dict:
    mode = case.param("mode")
    if mode == "gradient_alignment":
        return merged(case)
    if case.param("eps", 1e-8) != 1e-8:
        raise NotOffered("the clamp is at 1e-8")
    temperature, of_tokens = case.param("temperature", 2.0), mode.startswith("token_")
    names = ("aux_logits_topk", "teacher_logits_topk") if of_tokens else ("student_logits", "teacher_logits")
    student, teacher = (torch.tensor(case.input(name), dtype=torch.float64) for name in names)
    student, teacher = (values if values.dim() > 1 else values.reshape(0, 1) for values in (student, teacher))
    student.requires_grad_()
    losses = BINARY[mode.removeprefix("token_")](student, teacher, temperature)
    mask = torch.ones_like(losses)
    if of_tokens:
        mask = torch.tensor(case.input("response_mask"), dtype=torch.float64).reshape(losses.shape)
    loss = (losses * mask).sum() / mask.sum().clamp(min=1)
    loss.backward()
    found = {"loss": loss.item(), f"grad_{names[0]}": student.grad.tolist()}
    return found | ({"token_losses": (losses * mask).tolist()} if of_tokens else {})


def merged(case: Case) -> dict:
    """A parameter without a gradient of a loss counts as 0 there; without any it has none."""
    both = list(zip(case.input("grad_primary"), case.input("grad_secondary"), strict=True))
    pairs = []
    for pair in both:
        there = [None if one is None else torch.tensor(one, dtype=torch.float64) for one in pair]
        shape = next((one for one in there if one is not None), None)
        pairs.append([torch.zeros_like(shape) if one is None else one for one in there] if shape is not None else None)
    given = [pair for pair in pairs if pair is not None]
    found = align([pair[0] for pair in given], [pair[1] for pair in given])
    made = iter(found.merged)
    return {
        "merged": [None if pair is None else next(made).tolist() for pair in pairs],
        "dot": float(found.dot),
        "projected": found.projected,
    }
