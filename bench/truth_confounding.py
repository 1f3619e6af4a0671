"""Are the answers to "what could be known without the eye?" true? On drawn participants of whom all
is known.

    .venv/bin/python bench/truth_confounding.py alarms       # five minutes on a quiet core
    .venv/bin/python bench/truth_confounding.py adds         # ten minutes
    .venv/bin/python bench/truth_confounding.py shift        # two minutes
    .venv/bin/python bench/truth_confounding.py power        # two minutes

As many participants as AI-READI has (743, 159 and 159).
alarms: how often the covariate floor and the chance band within site and age raise an alarm: on a
model that sees a real effect, which is a false alarm, and on one that knows site and age alone,
which must not escape.
adds: how often the eye is said to add something, where the run is noise, noise that is the best of
1,000 on validation, or learned site and age from the same participants (and, without a limit, where
it knows all that site and age tell, which nobody could learn from these).
shift: error and coverage of the class shares that EM finds.
power: how often the number of participants that eval.py --power asks for shows the difference.
"""

import numpy as np
from measure import bench, figure

# isort: split
from helpers import COUNTS, SITES, draw_people
from scipy.special import softmax
from sklearn.linear_model import LogisticRegression

import confounding
import intervals
import metrics
import power
import prevalence
import resampling

ROLES = {"age": "age", "site": "site"}


def split_in_three(rng, effect, confounded):
    """-> {split: as helpers.draw_people}, and the covariate floor."""
    drawn = {name: draw_people(rng, counts, effect, confounded) for name, counts in COUNTS.items()}
    (y, table, *_), (y_val, table_val, *_) = drawn["train"], drawn["val"]
    return drawn, confounding.fit_floor(ROLES, table, y, table_val, y_val)


def alarms_of(y, table, p, floor):
    """Does the floor raise an alarm, does the band? -> two booleans."""
    pair = metrics.compare(y, p, floor.p(table))
    ages = confounding.quarters([row["age"] for row in table])
    groups = [f"{row['site']} {age}" for row, age in zip(table, ages)]
    score = metrics.quick_scores(y, p[None])[0][0]
    not_better = pair["p_value"] >= 0.05 or pair["difference"] <= 0
    return not_better, score <= confounding.within(y, p, groups)[1]


def alarms(runs=200):
    for effect, confounded in ((0.5, False), (0.9, False), (0.9, True)):
        found, scores = [], []
        for seed in range(runs):
            drawn, floor = split_in_three(np.random.default_rng(seed), effect, confounded)
            y, table, eye, _ = drawn["test"]
            found.append(alarms_of(y, table, eye, floor))
            scores.append(metrics.quick_scores(y, eye[None])[0][0])
        name = f"a real effect (balanced accuracy {np.mean(scores):.2f})"
        name += ", site and age differ between the classes" if confounded else ""
        rates, is_strong = np.mean(found, axis=0), effect > 0.5 and not confounded
        figure(f"{name}: floor's alarm", rates[0], at_most=0.05 if is_strong else None)
        figure(f"{name}: band's alarm", rates[1], at_most=0.05)
    found, scores = [], []
    for seed in range(runs):
        drawn, floor = split_in_three(np.random.default_rng(seed), 0, True)
        y, table, _, known = drawn["test"]
        found.append(alarms_of(y, table, known, floor))
        band = intervals.percentiles(permuted(y, known))
        score = metrics.quick_scores(y, known[None])[0][0]
        scores.append((score, score > band[1]))
    score, above = np.mean(scores, axis=0)
    name = f"site and age alone (balanced accuracy {score:.2f})"
    figure(f"{name}: above the free chance band", above)
    floor, band = 1 - np.mean(found, axis=0)
    figure(f"{name}: escapes the floor's alarm", floor)
    figure(f"{name}: escapes the band's alarm", band)
    figure(f"{name}: escapes both", 1 - np.mean(np.any(found, axis=1)), at_most=0.05)


def permuted(y, p):
    """Balanced accuracy of p under resampling.permuted_labels (R,)."""
    counts, labels = np.bincount(y), resampling.permuted_labels(y)
    return ((labels == p.argmax(axis=1)) / counts[labels]).sum(axis=1) / len(counts)


def noise(rng, y_val, y, tried):
    """Noise on validation and test: of so many, the best on validation."""
    p = softmax(rng.normal(size=(tried, len(y_val) + len(y), 4)), axis=2)
    best = np.argmax(metrics.quick_scores(y_val, p[:, : len(y_val)])[0])
    return p[best, : len(y_val)], p[best, len(y_val) :]


def learned(rng, drawn):
    """What a probe says of validation and test that learned on train from features in which site
    and age show, with noise beside them."""

    def features(table):
        sites = [[row["site"] == name for name in SITES] for row in table]
        ages = np.array([float(row["age"]) for row in table]) / 11
        shown = np.c_[np.array(sites) * 3, ages] + rng.normal(0, 0.3, (len(table), 4))
        return np.c_[shown, rng.normal(size=(len(table), 20))]

    probe = LogisticRegression(C=0.1, class_weight="balanced", max_iter=1000)
    probe.fit(features(drawn["train"][1]), drawn["train"][0])
    return [probe.predict_proba(features(drawn[name][1])) for name in ("val", "test")]


def adds(runs=150):
    ways = {
        "noise": lambda rng, drawn: noise(rng, drawn["val"][0], drawn["test"][0], 1),
        "noise, the best of 1,000": lambda rng, drawn: noise(
            rng, drawn["val"][0], drawn["test"][0], 1000
        ),
        "site and age, learned": learned,
        "site and age, all known": lambda rng, drawn: (drawn["val"][3], drawn["test"][3]),
    }
    for what, way in ways.items():
        for confounded in (False, True):
            found = []
            for seed in range(runs):
                rng = np.random.default_rng(seed)
                drawn, floor = split_in_three(rng, 0, confounded)
                (y_val, table_val, *_), (y, table, *_) = drawn["val"], drawn["test"]
                run_val, run = way(rng, drawn)
                found.append(
                    confounding.what_the_eye_adds(
                        (y_val, floor.p(table_val), run_val, None), (y, floor.p(table), run, None)
                    )
                )
            where = "site and age tell of the class" if confounded else "site and age do not"
            limit = None if "all known" in what else 0.05
            for name in ("log_loss", "balanced_accuracy"):
                gains = [f[name]["difference"] > 0 and f[name]["p_value"] < 0.05 for f in found]
                figure(f"{what}; {where}: said to add to {name}", np.mean(gains), at_most=limit)
    found = []
    for seed in range(runs // 4):
        drawn, floor = split_in_three(np.random.default_rng(seed), 0.9, True)
        (y_val, table_val, eye_val, _), (y, table, eye, _) = drawn["val"], drawn["test"]
        known = y_val, floor.p(table_val), eye_val, None
        gain = confounding.what_the_eye_adds(known, (y, floor.p(table), eye, None))["log_loss"]
        found.append(gain["difference"] > 0 and gain["p_value"] < 0.05)
    figure("a real effect of 0.9 SD: said to add to log_loss", np.mean(found), at_least=0.8)


def shift(runs=100):
    for effect, counts in (
        (1.3, (64, 48, 32, 15)),
        (1.3, (640, 480, 320, 150)),
        (0.9, COUNTS["test"]),
    ):
        true, errors, covered, naive = np.array(counts) / sum(counts), [], [], []
        for seed in range(runs):
            rng = np.random.default_rng(seed)
            y_val, _, p_val, _ = draw_people(rng, COUNTS["val"], effect)
            y, _, p, _ = draw_people(rng, counts, effect)
            # a head that is too sure of itself, and leans towards a class
            p_val, p = (softmax(2 * np.log(q) + [0.8, 0, 0, 0], axis=1) for q in (p_val, p))
            found = prevalence.label_shift((y_val, p_val, range(len(y_val))), (y, p, range(len(y))))
            errors.append(found["estimated"] - true)
            low, high = np.transpose(found["ci95"])
            covered.append((low <= true) & (true <= high))
            naive.append(np.bincount(p.argmax(axis=1), minlength=4) / len(y) - true)
        name = f"{sum(counts)} participants, effect {effect} SD"
        figure(f"{name}: bias of EM, largest of four", np.abs(np.mean(errors, axis=0)).max(), 0.05)
        figure(f"{name}: mean error of EM", np.abs(errors).mean())
        figure(f"{name}: mean error of counting answers", np.abs(naive).mean())
        figure(f"{name}: intervals that hold the true share", np.mean(covered), at_least=0.9)


def power_(runs=200, gaps=(0.08, 0.15)):
    for gap in gaps:
        for agree in (0.0, 0.6):

            def draw(rng, counts, gap=gap, agree=agree):
                """A is right in 55 %, B in `gap` less; `agree`: how often one draw decides both."""
                y, luck = np.repeat(range(4), counts), rng.random(sum(counts))
                other = np.where(rng.random(len(y)) < agree, luck, rng.random(len(y)))
                right = luck < 0.55, other < 0.55 - gap
                return y, *(np.eye(4)[np.where(r, y, (y + 1) % 4)] for r in right)

            # the formula on so many that their difference is the true one
            y, p_a, p_b = draw(np.random.default_rng(0), [50_000] * 4)
            count = power.needed(y, p_a, p_b)["needed"]
            counts = [count // 4 + 1] * 4
            found = [
                metrics.compare(*draw(np.random.default_rng(1 + seed), counts))["p_value"] < 0.05
                for seed in range(runs)
            ]
            name = f"a gap of {gap} with {agree:.0%} in common: shown with {count}"
            figure(name, np.mean(found), at_least=0.75, at_most=0.86)


if __name__ == "__main__":
    bench(__doc__, alarms=alarms, adds=adds, shift=shift, power=power_)
