"""What is bootstrapped from states that are never trained: a chain with exact dynamics, walked for a few steps.

Sims, Lu, Foerster, Teh, "The Edge-of-Reach Problem in Offline Model-Based RL", arXiv 2402.12527, code
anyasims/edge-of-reach. The paper's: rollouts of k steps from the states of a dataset end in states that occur only as
next states; bootstrapped from those, values grow, whether or not the dynamics are right; the smallest of N members is
not fooled where they disagree.

    y = r + gamma (1 - d) (min_k Q_k(s', a') - alpha log pi(a'|s'))

Ours is the world, small enough to be seen through: states 0 to 9 in a row, steps left, none and right, reward 1 in
state 2, rollouts of 3 steps from the states 0 to 6, so that state 9 is only ever a next state; tables for Q, drawn with
a standard deviation of three times the largest true value, 1 / (1 - gamma) = 20; a greedy policy without the entropy
term. All seeds are computed at once.

Degenerate: rollouts longer than the chain leave no state at the edge, and one member then does as well.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from verl_plugins.advantage.ravl import aggregate, spread
from verl_plugins.lab import Claim, Curve, Findings, Panel, Progress
from verl_plugins.plugin import setting

SEEDS, STATES, STARTS, GOAL, WALKERS, HORIZON = 20, 10, 7, 2, 64, 100
BEST = HORIZON - GOAL
"""Return of 100 steps from state 0."""
GAMMA, RATE, EXPLORING, WIDE = 0.95, 0.5, 0.5, 60.0
MEMBERS = (1, 2, 5, 10)
LONG = 30


@dataclass
class Settings:
    rollout_steps: int = setting(3, "steps after which a rollout is cut", authors=5, ge=1, le=1000)
    sweeps: int = setting(400, "times that all walkers walk and the tables are trained", ge=1, le=100000)


@dataclass(frozen=True)
class Outcome:
    """Of each seed."""

    returns: Tensor
    """[seeds] of the greedy policy from state 0."""
    value: float
    """Mean over starts and seeds of the value the policy believes in."""
    interior: float | None
    """Mean spread of the members where states were trained."""
    edge: float | None
    """The same in the state behind them."""


def td_target(
    rewards: Tensor, dones: Tensor, members: Tensor, log_prob: Tensor, gamma: float = 0.99, alpha: float = 0.0
) -> Tensor:
    """y [...] of rewards, ends, next values of the members [..., N] and log pi(a'|s'); nothing follows a true end."""
    return rewards + gamma * (1 - dones) * (aggregate(members) - alpha * log_prob)


def moves() -> Tensor:
    """[states, 3] where a step leads."""
    return (torch.arange(STATES)[:, None] + torch.tensor([-1, 0, 1])).clamp(0, STATES - 1)


def greedy(tables: Tensor) -> Tensor:
    """[seeds, states] the best action by the smallest member; tables [seeds, states, 3, N]."""
    return aggregate(tables).argmax(-1)


def trained(members: int, steps: int, sweeps: int, seed: int) -> Outcome:
    """Tables of `members` members, rollouts cut after `steps` steps."""
    draw = torch.Generator().manual_seed(seed)
    tables = WIDE * torch.randn(SEEDS, STATES, 3, members, generator=draw, dtype=torch.float64)
    lead, rewards = moves(), (torch.arange(STATES) == GOAL).double()[:, None].expand(STATES, 3)
    nothing = torch.zeros(SEEDS, STATES, 3, dtype=torch.float64)
    reached = torch.zeros(SEEDS, STATES, dtype=torch.bool)
    for _ in range(sweeps):
        seen = walked(greedy(tables), steps, lead, draw)
        best = torch.take_along_dim(tables, greedy(tables)[..., None, None], 2)[:, :, 0]
        target = td_target(rewards, nothing, best[:, lead], nothing, GAMMA)
        tables = torch.where(seen[..., None], tables + RATE * (target[..., None] - tables), tables)
        reached |= seen.any(-1)
    best = torch.take_along_dim(tables, greedy(tables)[..., None, None], 2)[:, :, 0]
    behind = torch.zeros_like(reached)
    behind[:, 1:] = ~reached[:, 1:] & reached[:, :-1]
    spreads = [None if found is None else float(found) for found in (spread(best, reached), spread(best, behind))]
    return Outcome(returns(greedy(tables), lead), float(aggregate(best)[:, :STARTS].mean()), *spreads)


def walked(policy: Tensor, steps: int, lead: Tensor, draw: torch.Generator) -> Tensor:
    """[seeds, states, 3] what the walkers of a sweep did, half of their actions at random."""
    seen = torch.zeros(SEEDS, STATES * 3)
    states = torch.randint(0, STARTS, (SEEDS, WALKERS), generator=draw)
    for _ in range(steps):
        at_random = torch.rand(states.shape, generator=draw) < EXPLORING
        actions = torch.where(at_random, torch.randint(0, 3, states.shape, generator=draw), policy.gather(1, states))
        seen.scatter_(1, states * 3 + actions, 1.0)
        states = lead[states, actions]
    return seen.bool().view(SEEDS, STATES, 3)


def returns(policy: Tensor, lead: Tensor) -> Tensor:
    """[seeds] rewards of 100 steps from state 0."""
    state, total = torch.zeros(len(policy), 1, dtype=torch.int64), torch.zeros(len(policy), 1)
    for _ in range(HORIZON):
        total += (state == GOAL).float()
        state = lead[state, policy.gather(1, state)]
    return total[:, 0]


def lab(settings: Settings, seed: int, progress: Progress) -> Findings:
    found: dict[tuple[int, int], Outcome] = {}
    runs = [*[(members, settings.rollout_steps) for members in MEMBERS], (1, LONG)]
    for place, (members, steps) in enumerate(runs):
        progress(place / len(runs), f"members {members}, rollouts of {steps} steps")
        found[members, steps] = trained(members, steps, settings.sweeps, seed)
    short = [found[members, settings.rollout_steps] for members in MEMBERS]
    means = [float(outcome.returns.mean()) for outcome in short]
    curves = [
        Curve("mean of 20 seeds", MEMBERS, means),
        Curve("best there is", MEMBERS, [BEST] * len(MEMBERS), "dashed"),
    ]
    panel = Panel(f"return after rollouts of {settings.rollout_steps} steps", "members", "return", curves, "x")
    note = "The world is ours; the paper's own figures are of locomotion tasks, which are not run here."
    return Findings(_claims(short, found[1, LONG]), [panel], [note])


def _claims(short: list[Outcome], long: Outcome) -> list[Claim]:
    one, ten = short[0], short[-1]
    mean = {name: float(each.returns.mean()) for name, each in (("one", one), ("ten", ten), ("long", long))}
    edge = "none at the edge" if ten.edge is None else f"{ten.edge:.1f} against {ten.interior:.2f}"
    return [
        Claim(
            "one member fails, though the dynamics are exact",
            f"a mean return below 75 of {BEST}",
            f"{mean['one']:.1f}, {int((one.returns == BEST).sum())} of {SEEDS} seeds at the best",
            mean["one"] < 75,
        ),
        Claim(
            "because values are believed that no policy has",
            "above the largest true value, 20",
            f"{one.value:.1f}",
            one.value > 20,
        ),
        Claim(
            "the smallest of ten members does not fail",
            f"a mean return of at least 95 of {BEST}",
            f"{mean['ten']:.1f}, value {ten.value:.1f}",
            mean["ten"] >= 95 and ten.value < 20,
        ),
        Claim(
            "members differ most in the state at the edge",
            "a spread of at least ten times that of trained states",
            edge,
            ten.edge is not None and ten.interior is not None and ten.edge >= 10 * ten.interior,
        ),
        Claim(
            "rollouts that reach every state need no ensemble",
            f"a mean return of at least 95 of {BEST} with one member",
            f"{mean['long']:.1f}",
            mean["long"] >= 95,
            "derived",
        ),
    ]
