"""How exploration breaks cooperation: many players, one network, and a stable bad end.

Weng, Lee, How Exploration Breaks Cooperation in Shared-Policy Multi-Agent Reinforcement Learning, arXiv 2601.05509. By
the authors' code (the shared network; nothing else is public), shortened here to 40,000 steps: 900 players on a torus
of 30 x 30 play a prisoner's dilemma with their four neighbours, all with one deep Q-network,

    payoff against each neighbour   C-C 1,  C-D -Dr,  D-C 1 + Dr,  D-D 0;   the reward is their mean
    state                           the last actions of the four neighbours and one's own, 5 bits
    exploration                     softmax(Q / tau), tau falling linearly from tau_init to 0.10, then 0.10 to the end
    learning                        double DQN over 5 steps (1 where the memory does not reach so far), discount 0.99

What is left of it: cooperation over the last steps, which are played at tau 0.10 without learning, and the action-value
gap |Q(C) - Q(D)|, averaged over the states that are visited there.

Ours: with 32 states the network is evaluated on all of them and batches pick from the table, which changes no number;
the target network is copied every 800 steps, as often for the shorter run as theirs. `groups` > 1 gives each of so many
random parts of the players a network of its own, our guess of the paper's grouped variant, whose code is not public.

Degenerate cases: without a collapsed or without a cooperating run nothing can be said of their gaps, and the claim
about them does not hold.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from verl_plugins.lab import Claim, Curve, Findings, Panel, Progress
from verl_plugins.plugin import setting

SIDE, PLAYERS, HIDDEN, ACTIONS = 30, 900, 96, 2
MEMORY, BATCH, HORIZON, EVERY = 100, 256, 5, 4
"""Steps that are remembered, transitions of an update, steps of a return, steps between two updates."""
DISCOUNT, LEARNING_RATE, DECAY, MOST_GRADIENT = 0.99, 1e-4, 1e-4, 0.5
LAST_TAU, ANNEALED, EVALUATED, COPIES = 0.10, 0.95, 0.05, 50
"""The last temperature; shares of the steps until it is reached and that are only played; copies of the target."""
POINTS = 100
"""Of a curve."""
STATES = torch.tensor([[state >> bit & 1 for bit in range(5)] for state in range(32)], dtype=torch.float32)
AROUND = ((1, 1), (-1, 2), (-1, 1), (1, 2))
"""Shift and axis of [runs, 30, 30] that bring the neighbour above, right, below and left to a player's place."""
TAUS = (0.127, 0.727)
"""The authors' least and most exploration."""
COOPERATES, COLLAPSED, SMALLER = 0.95, 0.10, 50.0


@dataclass
class Settings:
    steps: int = setting(40_000, "steps of each run; the authors' have 100,000", ge=400, le=1_000_000)
    runs: int = setting(4, "runs for each of the two tau_init", ge=1, le=30)
    dilemma: float = setting(0.25, "Dr, what defecting against a cooperator gains", ge=0, le=1)
    groups: int = setting(
        1, "networks of grouped runs beside the shared ones, which are only reported; a divisor of 900; 1: none", ge=1
    )

    def __post_init__(self) -> None:
        if PLAYERS % self.groups:
            raise ValueError(f"groups={self.groups} does not divide {PLAYERS} players evenly: choose 2, 5, 10 or 30")


@dataclass(frozen=True)
class Outcome:
    """Of each run."""

    cooperation: np.ndarray
    """[runs] share of cooperating players over the steps that are only played."""
    gap: np.ndarray
    """[runs] |Q(C) - Q(D)| over the states visited there."""
    course: np.ndarray
    """[runs, points] cooperation while learning, in means over equal parts of the steps."""


def rewards(defects: np.ndarray, dilemma: float) -> np.ndarray:
    """[runs, 30, 30] bool -> mean payoff of each player over its four neighbours, float32."""
    cooperating = 4 - sum(np.roll(defects, by, axis).astype(np.uint8) for by, axis in AROUND)
    share = np.arange(5, dtype=np.float32) / 4
    payoff = np.stack([share - (1 - share) * np.float32(dilemma), share * np.float32(1 + dilemma)])
    return payoff.ravel()[cooperating + 5 * defects.astype(np.uint8)]


def state_of(defects: np.ndarray) -> np.ndarray:
    """[runs, 30, 30] bool -> number of each player's state: the neighbours' actions are bits 0 to 3, its own bit 4."""
    state = defects.astype(np.uint8) << 4
    for bit, (by, axis) in enumerate(AROUND):
        state |= np.roll(defects, by, axis).astype(np.uint8) << bit
    return state


class Networks:
    """Q-networks [nets], each with its own players, temperature and random numbers; none knows of the others."""

    def __init__(self, rngs: Sequence[np.random.Generator], groups: int) -> None:
        self.count, self.groups = len(rngs) * groups, groups
        order = np.stack([rng.permutation(PLAYERS) if groups > 1 else np.arange(PLAYERS) for rng in rngs])
        own = order + PLAYERS * np.arange(len(rngs))[:, None]
        self.players = own.reshape(self.count, -1)
        """[nets, players of each], numbered over all runs."""
        self.weights = []
        for rows, columns in ((5, HIDDEN), (HIDDEN, ACTIONS)):
            for shape in ((groups, rows, columns), (groups, 1, columns)):
                drawn = np.concatenate([rng.uniform(-(rows**-0.5), rows**-0.5, shape) for rng in rngs])
                self.weights.append(torch.from_numpy(drawn).float().requires_grad_())
        self.copy_target()
        self.optimizer = torch.optim.AdamW(self.weights, LEARNING_RATE, weight_decay=DECAY)
        net = np.empty(len(rngs) * PLAYERS, dtype=np.int32)
        net[self.players] = np.arange(self.count)[:, None]
        self.offset = len(STATES) * net.reshape(-1, SIDE, SIDE)
        """[runs, 30, 30] where the states of each player's network begin in a table of all networks'."""

    def table(self, weights: Sequence[Tensor]) -> Tensor:
        """Q [nets, states, actions]."""
        first, first_bias, second, second_bias = weights
        return torch.relu(STATES @ first + first_bias) @ second + second_bias

    @torch.no_grad()
    def difference(self) -> np.ndarray:
        """Q(D) - Q(C) [nets, states]."""
        table = self.table(self.weights)
        return (table[..., 1] - table[..., 0]).double().numpy()

    def copy_target(self) -> None:
        """The target network is the network as it is."""
        self.target = [weight.detach().clone() for weight in self.weights]

    def learn(self, states: Tensor, actions: Tensor, returns: Tensor, later: Tensor, discount: Tensor) -> None:
        """One update from transitions [nets, BATCH]: Huber loss against the double-DQN target."""
        net = torch.arange(self.count)[:, None]
        online = self.table(self.weights)
        with torch.no_grad():
            best = online.argmax(-1)
            wanted = returns + discount * self.table(self.target)[net, later, best[net, later]]
        loss = torch.nn.functional.smooth_l1_loss(online[net, states, actions], wanted, reduction="none")
        self.optimizer.zero_grad()
        loss.mean(1).sum().backward()
        with torch.no_grad():
            norm = torch.stack([weight.grad.flatten(1).square().sum(1) for weight in self.weights]).sum(0).sqrt()
            scale = (MOST_GRADIENT / (norm + 1e-6)).clamp(max=1)[:, None, None]
            for weight in self.weights:
                weight.grad.mul_(scale)
        self.optimizer.step()


class Memory:
    """The last `MEMORY` steps of all players, in a ring: [steps, runs * players]."""

    def __init__(self, runs: int) -> None:
        shape = MEMORY, runs * PLAYERS
        self.states, self.actions, self.later = (np.zeros(shape, dtype=np.uint8) for _ in range(3))
        self.rewards = np.zeros(shape, dtype=np.float32)
        self.steps = 0

    def add(self, states: np.ndarray, actions: np.ndarray, paid: np.ndarray, later: np.ndarray) -> None:
        """A step of all players, [runs, 30, 30] each."""
        place = self.steps % MEMORY
        self.states[place], self.actions[place] = states.ravel(), actions.ravel()
        self.rewards[place], self.later[place] = paid.ravel(), later.ravel()
        self.steps += 1

    def draw(self, networks: Networks, rngs: Sequence[np.random.Generator]) -> tuple[Tensor, ...]:
        """Transitions [nets, BATCH] of each network's own players, with returns over as many steps as there are."""
        known, shape = min(self.steps, MEMORY), (networks.groups, BATCH)
        step = np.concatenate([rng.integers(self.steps - known, self.steps, shape) for rng in rngs])
        who = np.concatenate([rng.integers(0, networks.players.shape[1], shape) for rng in rngs])
        player = np.take_along_axis(networks.players, who, 1)
        length = np.where((step + HORIZON <= self.steps) & (known > HORIZON), HORIZON, 1)
        ahead = np.arange(HORIZON)
        paid = self.rewards[(step[..., None] + ahead) % MEMORY, player[..., None]]
        paid = (paid * DISCOUNT**ahead * (ahead < length[..., None])).sum(-1)
        first, last = step % MEMORY, (step + length - 1) % MEMORY
        found = (self.states[first, player], self.actions[first, player], self.later[last, player])
        states, actions, later = (torch.from_numpy(one.astype(np.int64)) for one in found)
        return states, actions, torch.from_numpy(paid).float(), later, torch.from_numpy(DISCOUNT**length).float()


def play(
    taus: Sequence[float], seeds: Sequence[Sequence[int]], settings: Settings, groups: int, progress: Progress
) -> Outcome:
    """Runs side by side, which do not depend on each other."""
    rngs, runs, steps = [np.random.default_rng(seed) for seed in seeds], len(seeds), settings.steps
    networks, memory = Networks(rngs, groups), Memory(runs)
    start, learning = np.array(taus), steps - round(steps * EVALUATED)
    actions = np.stack([rng.integers(0, 2, (SIDE, SIDE)) for rng in rngs]).astype(bool)
    states, difference = state_of(actions), networks.difference()
    course, visits = np.empty((steps, runs), dtype=np.float32), np.zeros(difference.shape)
    for step in range(steps):
        learns = step < learning
        tau = start + (LAST_TAU - start) * min(1.0, step / (steps * ANNEALED)) if learns else np.full(runs, LAST_TAU)
        chance = 1 / (1 + np.exp(-(difference / tau.repeat(groups)[:, None]).clip(-60, 60)))
        place = networks.offset + states
        drawn = np.stack([rng.random((SIDE, SIDE), dtype=np.float32) for rng in rngs])
        actions, before = drawn < chance.ravel().astype(np.float32)[place], states
        states = state_of(actions)
        course[step] = 1 - actions.mean((1, 2))
        if not learns:
            visits += np.bincount(place.ravel(), minlength=visits.size).reshape(visits.shape)
            continue
        memory.add(before, actions, rewards(actions, settings.dilemma), states)
        if step % EVERY == 0:
            networks.learn(*memory.draw(networks, rngs))
            difference = networks.difference()
        if (step + 1) % max(1, steps // COPIES) == 0:
            networks.copy_target()
        if step % 500 == 0:
            progress(step / steps, f"{runs} runs with {groups} network{'s' * (groups > 1)} each")
    of_run = visits.reshape(runs, -1)
    gap = (of_run * np.abs(difference).reshape(runs, -1)).sum(1) / of_run.sum(1)
    points = course[: steps // POINTS * POINTS].reshape(POINTS, -1, runs).mean(1).T
    return Outcome(course[learning:].mean(0), gap, points)


def claims(shared: Outcome, runs: int) -> list[Claim]:
    """The table of the lab; `shared` has `runs` runs of the first tau_init and then as many of the second."""
    worth, gap = shared.cooperation, shared.gap
    fell, held = worth < COLLAPSED, worth > COOPERATES
    few, many = int(fell[:runs].sum()), int(fell[runs:].sum())
    ratio = float(gap[held].min() / gap[fell].max()) if held.any() and fell.any() else None
    return [
        Claim(
            "every shared run ends all or nothing",
            f"cooperation above {COOPERATES} or below {COLLAPSED}",
            ", ".join(f"{one:.2f}" for one in worth),
            bool((fell | held).all()),
            "ours",
        ),
        Claim(
            "more runs collapse with more exploration",
            f"more of {runs} at tau_init {TAUS[1]} than at {TAUS[0]}",
            f"{many} and {few}",
            many > few,
        ),
        Claim(
            "a collapsed run has lost its action-value gap",
            f"more than {SMALLER:g} times smaller than of any cooperating run",
            "no runs of both kinds" if ratio is None else f"{ratio:.0f} times",
            ratio is not None and ratio > SMALLER,
        ),
    ]


def lab(settings: Settings, seed: int, progress: Progress) -> Findings:
    """Shared runs at two strengths of exploration, and grouped ones if they are asked for."""
    taus = [tau for tau in TAUS for _ in range(settings.runs)]
    seeds = [(seed, run, round(1000 * tau)) for tau in TAUS for run in range(settings.runs)]
    kinds = [1] if settings.groups == 1 else [1, settings.groups]
    found = []
    for number, groups in enumerate(kinds):

        def part(done: float, what: str, number: int = number) -> None:
            progress((number + done) / len(kinds), what)

        found.append(play(taus, seeds, settings, groups, part))
    notes = ["which runs collapse depends on the seed: fractions of a few runs say little of how often they do"]
    if settings.groups > 1:
        ends = [", ".join(f"{one:.2f}" for one in part) for part in np.split(found[1].cooperation, len(TAUS))]
        notes.append(
            f"with {settings.groups} networks for random parts of the players (our guess of the paper's grouping, no "
            f"claim is made) cooperation ends at {ends[0]} (tau_init {TAUS[0]}) and {ends[1]} ({TAUS[1]})"
        )
    return Findings(claims(found[0], settings.runs), [panel(found[0], settings)], notes)


def panel(shared: Outcome, settings: Settings) -> Panel:
    """Cooperation over steps, a colour for each tau_init."""
    x = (np.arange(POINTS) + 0.5) * settings.steps / POINTS
    curves = [
        Curve(f"tau_init {TAUS[run // settings.runs]}" if run % settings.runs == 0 else "", x, course)
        for run, course in enumerate(shared.course)
    ]
    return Panel("900 players share a Q-network", "step", "share that cooperates", curves)
