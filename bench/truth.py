"""Do intervals hold the truth, and are alarms and tests quiet where nothing is wrong?

    .venv/bin/python bench/truth.py intervals   # coverage of every printed interval; 40 minutes
    .venv/bin/python bench/truth.py alarms      # false alarms of every alarm; ten minutes
    .venv/bin/python bench/truth.py pairs       # p-values of comparisons; two minutes

Data sets are drawn from a model whose scores are known: four Gaussian classes, all equally far from
each other, and the answers of the best classifier, calibrated or overconfident (logits times 3).
The distance makes its balanced accuracy; at 0.25, where nothing is known, the logits are noise.
Classes are even, or have AI-READI's shares of training (39, 22, 31, 8 %). With 1,000 resamples in
place of 10,000, which changes no coverage, only its noise.

intervals prints a row for every score, with the lowest and the highest of its cells, and a row for
every cell that is not within 90 to 99.5 %. docs/trust.md has the table, and names what is outside
of 92 to 98 %.
"""

import functools
import itertools
from collections import defaultdict
from concurrent.futures import ProcessPoolExecutor

import numpy as np
from measure import bench, figure, row

import groups
import intervals
import metrics
import paired
import resampling
import scores

PRIOR = np.array([0.39, 0.22, 0.31, 0.08])
SHARES = {"even": np.full(4, 0.25), "imbalanced": PRIOR}
SKILLS = 0.25, 0.35, 0.7, 0.96
SHARPNESS = {"calibrated": 1, "overconfident": 3}


def fewer_resamples():
    for module in (resampling, groups, metrics):
        module.RESAMPLES = 1000
    intervals.DRAWS = 1000


@functools.cache
def distance(skill):
    """How far apart the classes are for this balanced accuracy, by bisection."""
    x, low, high = np.random.default_rng(1).standard_normal((400_000, 4)), 0.0, 12.0
    if skill <= 0.25:
        return 0.0
    for _ in range(30):
        middle = (low + high) / 2
        hit = (x[:, 0] + middle > x[:, 1:].max(axis=1)).mean()
        low, high = (middle, high) if hit < skill else (low, middle)
    return low


def model(rng, y, skill, sharpness):
    """Probabilities (n, 4) of the best classifier for rows of classes y (n,)."""
    d = distance(skill)
    x = rng.standard_normal((len(y), 4))
    x[np.arange(len(y)), y] += d
    logits = x * (d or 0.3) * sharpness
    p = np.exp(logits - logits.max(axis=1, keepdims=True))
    return p / p.sum(axis=1, keepdims=True)


def labels(n, shares):
    """n labels whose classes have these shares."""
    counts = np.floor(shares * n).astype(int)
    for k in np.argsort(counts - shares * n)[: n - counts.sum()]:
        counts[k] += 1
    return np.repeat(np.arange(4), counts)


def coverage(cell, datasets):
    """-> {score: (share of the data sets whose interval holds the truth, no interval at all)}."""
    fewer_resamples()
    n, skill, sharp, shares = cell
    y = labels(n, SHARES[shares])
    many = np.repeat(y, 400_000 // n)
    p = model(np.random.default_rng(9), many, skill, SHARPNESS[sharp])
    truth, held = scores.of_data(many, p), defaultdict(list)
    for seed in range(datasets):
        p = model(np.random.default_rng([seed, 5]), y, skill, SHARPNESS[sharp])
        for name, found in intervals.of_scores(y, p, 4).items():
            values = truth[name] if name in scores.PER_CLASS else [truth[name]]
            for k, (value, ends) in enumerate(zip(values, found if len(values) > 1 else [found])):
                name_of = f"{name}, class {k}" if len(values) > 1 else name
                if ends is not None:
                    held[name_of].append(ends[0] - 1e-9 <= value <= ends[1] + 1e-9)
    return {name: np.mean(inside) for name, inside in held.items()}


def in_processes(job, cells, *args):
    """job(cell, *args) of every cell, in two processes -> results in order."""
    with ProcessPoolExecutor(2) as pool:
        return list(pool.map(job, cells, *(itertools.repeat(arg) for arg in args)))


def truth_intervals(datasets=400, participants=(30, 60, 159)):
    cells = list(itertools.product(participants, SKILLS, SHARPNESS, SHARES))
    found = in_processes(coverage, cells, datasets)
    row("interval of", "cells within 92 to 98 %", "lowest", "in", "highest", "in")
    for name in found[0]:
        held = np.array([of_cell[name] for of_cell in found])
        worst, best = held.argmin(), held.argmax()
        described = [" ".join(map(str, cells[i])) for i in (worst, best)]
        inside = f"{((held >= 0.92) & (held <= 0.98)).sum()} of {len(cells)}"
        row(name, inside, f"{held[worst]:.3f}", described[0], f"{held[best]:.3f}", described[1])
        for cell, share in zip(cells, held):
            if not 0.9 <= share <= 0.995:
                row("", "", f"{share:.3f}", " ".join(map(str, cell)))
    lowest = min(min(of_cell.values()) for of_cell in found)
    figure("the lowest coverage of any cell", lowest, at_least=0.85)


KINDS = {
    "never predicted": "model collapse",
    "never rightly": "never rightly",
    "shares far apart": "shares far apart",
    "carries the result": "a group carries the result",
    "always answering that class": "majority",
    "chance band": "chance",
}


def false_alarms(cell, datasets):
    """-> {kind of alarm: share of the data sets in which it is raised}."""
    fewer_resamples()
    n, skill, sharp, shares = cell
    y, found = labels(n, SHARES[shares]), dict.fromkeys(KINDS.values(), 0.0)
    for seed in range(datasets):
        rng = np.random.default_rng([seed, 5])
        p = model(rng, y, skill, SHARPNESS[sharp])
        members = {"site": rng.choice(list("abc"), n), "age": rng.choice(list("3456"), n)}
        result = metrics.evaluate(y, p, 4, groups=members, asked=np.full(4, 0.25))
        for sign, kind in KINDS.items():
            found[kind] += any(sign in alarm for alarm in result["alarms"]) / datasets
    return found


def alarms(datasets=200, participants=(30, 60, 159)):
    """Nothing is wrong with these models, so an alarm is false; where little is known, those that
    say so (chance, majority) are not."""
    skills = [skill for skill in SKILLS if skill > 0.25] + [0.82, 0.9]
    cells = list(itertools.product(participants, skills, SHARPNESS, SHARES))
    found = in_processes(false_alarms, cells, datasets)
    for kind in KINDS.values():
        rates = np.array([of_cell[kind] for of_cell in found])
        is_fault = kind not in ("majority", "chance")
        counted = [is_fault or cell[1] > 0.35 for cell in cells]
        worst = np.where(counted, rates, -1).argmax()
        # 5 % and two standard errors of the simulation
        most = 0.05 + 2 * np.sqrt(0.05 * 0.95 / datasets)
        figure(f"{kind}: most false alarms, {cells[worst]}", rates[worst], at_most=most)


def pairs(datasets=2000):
    """Two models of which neither is better, right about different ones of 159 participants."""
    y = labels(159, SHARES["even"])
    for discordant in (2, 4, 8, 16, 30, 50):
        p_values = []
        for seed in range(datasets):
            rng = np.random.default_rng([seed, discordant])
            differ = rng.choice(len(y), discordant, replace=False)
            right = np.repeat([rng.random(len(y)) < 0.7], 2, axis=0)
            right[0, differ] = rng.random(discordant) < 0.5
            right[1, differ] = ~right[0, differ]
            p_values.append(paired.swap_test(y, *right))
        for level in (0.05, 0.2, 0.5):
            # an exact test of few participants has few p-values, and errs towards larger ones
            rate = np.mean(np.array(p_values) <= level)
            most = level + 2 * np.sqrt(level * (1 - level) / datasets)
            figure(f"{discordant} discordant: p at most {level}", rate, at_most=most)


if __name__ == "__main__":
    bench(__doc__, intervals=truth_intervals, alarms=alarms, pairs=pairs)
