"""How the score grows with participants: heads on shares of training, scored, and a formula.

    entries = fit(fit_once, cfg, fits, train, val)   # train.fractions: what a checkpoint keeps
    found = score(entries, cfg, features)            # of a split: what eval_SPLIT.json keeps
    write(folder, result)                            # learning_curve_SPLIT.csv, and its picture

A share is drawn by class, and a smaller one is part of every larger one of the same seed. All of it
is on the features of a frozen encoder, and validation, which is whole, chooses every head. None of
these heads is refitted on validation: the number of participants is that of training.
"""

import pathlib

import numpy as np

import figures
import files
import heads
import intervals
import metrics
import references
import resampling
import settings

SUBSETS = 5  # draws of each share, where train.seeds does not say
FEWEST = 2  # participants of a class: of one, nothing can be left out to judge the rest by
FEWEST_SIZES = 4  # the formula has three numbers, and three points lie on it whatever they are
EXPONENTS = np.geomspace(0.05, 2, 400)  # c that are tried: from nearly a logarithm to a quick end
TIMES = (2, 4)  # of all participants, to which the formula is extended
REFITS = 1000  # resamples to which the formula is fitted again, for its intervals
SCORES = ("balanced_accuracy", "log_loss")


# -------------------------------------------------------------------------------------- in training


def drawn(samples, fraction, seed):
    """Indices of the volumes of a share of the participants, drawn among those with the same
    classes; part of what a larger fraction draws with the same seed."""
    labels_of, alike = {}, {}
    for sample in samples:
        labels_of.setdefault(sample.participant_id, set()).add(sample.label)
    for person, labels in labels_of.items():
        alike.setdefault(tuple(sorted(labels)), []).append(person)
    rng, kept = np.random.default_rng(seed), set()
    for _, people in sorted(alike.items()):
        order = rng.permutation(len(people))
        kept |= {people[i] for i in order[: round(fraction * len(people))]}
    return [i for i, sample in enumerate(samples) if sample.participant_id in kept]


def check(cfg, samples):
    """ValueError where a share of the training samples leaves a class with too few participants."""
    for fraction in cfg.train.fractions or []:
        people = [set() for _ in settings.class_names(cfg)]
        for i in drawn(samples, fraction, cfg.seed):  # the numbers are those of every seed
            people[samples[i].label].add(samples[i].participant_id)
        for name, of_class in zip(settings.class_names(cfg), people):
            if len(of_class) < FEWEST:
                raise ValueError(
                    f"train.fractions={cfg.train.fractions}: a share of {fraction:g} leaves class "
                    f"{name} with {len(of_class)} training participants, fewer than {FEWEST}; "
                    "set larger shares"
                )


def fit(fit_once, cfg, fits, train, val):
    """A head for every share and seed -> [{fraction, seed, participants, head, val_...}]. fit_once:
    as train.fit; fits {seed: Fitted}: the run's own, which are those of the whole."""
    check(cfg, train.samples)
    found = []
    for fraction in cfg.train.fractions:
        for seed in cfg.train.seeds or range(cfg.seed, cfg.seed + SUBSETS):
            own_seed = seed if cfg.train.seeds else cfg.seed  # of the head; the other is the draw's
            if fraction == 1 and seed != own_seed:
                continue  # the same head
            rows = drawn(train.samples, fraction, seed)
            part = train.rows(rows)
            fitted = fits[own_seed] if fraction == 1 else fit_once(cfg, own_seed, part, val)
            found.append(
                {
                    "fraction": float(fraction),
                    "seed": seed,
                    "participants": len({s.participant_id for s in part.samples}),
                    "head": fitted.head.state_dict(),
                    "val_balanced_accuracy": fitted.best["val_balanced_accuracy"],
                }
            )
    return found


def lines(entries):
    """What training says of them."""
    for fraction in dict.fromkeys(entry["fraction"] for entry in entries):
        own = [entry for entry in entries if entry["fraction"] == fraction]
        scores = [entry["val_balanced_accuracy"] for entry in own]
        yield (
            f"share {fraction:g} of training, {own[0]['participants']} participants: val balanced "
            f"accuracy {np.mean(scores):.3f}, of {len(own)} subsets"
        )


# --------------------------------------------------------------------------------------- in scoring


def score(entries, cfg, found):
    """Score the heads of `fit` on the Features of a split -> {"sizes": [of every share: mean, SD
    over subsets and 95 % interval of each score], score: what `formula` says}.

    An interval is of the mean over subsets. It spans two: that of resamples, each of which draws
    participants of the split within each class, and subsets; and the mean of the intervals that
    each subset's head has by itself, which also hold where nearly all are right.
    """
    resampled = {name: [] for name in SCORES}  # of every entry (R,)
    values = {name: [] for name in SCORES}
    alone = {name: [] for name in SCORES}  # [low, high] of every entry
    for entry in entries:
        bank = references.load(entry["head"], cfg)
        own = heads.by_unit(found.samples, heads.predict(bank, found.x)[0])
        weights = resampling.resample(own.y_true, own.participants)  # (R, n)
        right = own.p.argmax(axis=1) == own.y_true
        losses = metrics.negative_log(own.p[np.arange(len(own.y_true)), own.y_true])
        accuracies, _ = metrics.quick_scores(own.y_true, own.p[None])
        values["balanced_accuracy"] += accuracies
        values["log_loss"].append(losses.mean())
        given = own.y_true, own.p.argmax(axis=1), own.p.shape[1], own.participants
        ends = intervals.of_answers(*given, ["accuracy", "balanced_accuracy"])
        ends["log_loss"] = intervals.of_mean(losses, own.y_true, own.participants) or [0.0, 0.0]
        ends |= intervals.with_rare_errors(ends, own.y_true, own.p)
        for name in SCORES:
            alone[name].append(ends[name])
        resampled["balanced_accuracy"].append(
            resampling.balanced_accuracy(own.y_true, right, weights)
        )
        sums = resampling.weighted_sums(weights, np.stack([losses, np.ones(len(losses))], axis=1))
        resampled["log_loss"].append(sums[:, 0] / sums[:, 1])
    fractions, rng = np.array([entry["fraction"] for entry in entries]), np.random.default_rng(0)
    sizes, curves = [], {name: [] for name in SCORES}
    for fraction in np.unique(fractions):
        own = np.flatnonzero(fractions == fraction)
        people = [entries[i]["participants"] for i in own]
        size = {"fraction": float(fraction), "participants": people[0], "subsets": len(own)}
        drawn_subsets = rng.integers(len(own), size=(len(resampled["log_loss"][0]), len(own)))
        for name in SCORES:
            of_size = np.array([resampled[name][i] for i in own])  # (subsets, R)
            mean = of_size[drawn_subsets, np.arange(of_size.shape[1])[:, None]].mean(axis=1)  # (R,)
            curves[name].append(mean)
            each = [values[name][i] for i in own]
            size[name] = {
                "mean": float(np.mean(each)),
                "sd": float(np.std(each, ddof=1)) if len(own) > 1 else None,
                "ci95": intervals.spanned(
                    [
                        intervals.percentiles(mean),
                        np.mean([alone[name][i] for i in own], axis=0).tolist(),
                    ]
                ),
            }
        sizes.append(size)
    n = np.array([size["participants"] for size in sizes])
    formulas = {
        name: formula(n, np.array([s[name]["mean"] for s in sizes]), np.array(curves[name]), name)
        for name in SCORES
    }
    return {"sizes": sizes, **formulas}


def formula(n, y, resampled, name):
    """Fit y = a - b (n / N)^-c, N the largest n, to a score y (F,) at n participants (F,) -> dict:
    formula (a, b, c and what it says of TIMES as many participants) or None, with the reason.

    resampled (F, R): the score in every resample; the formula is fitted to REFITS of them again.
    The inverse power law is what learning curves mostly follow (Hestness et al. 2017, arXiv
    1712.00409); here c is searched, and a and b are least squares.
    """
    if len(n) < FEWEST_SIZES:
        return no_formula(f"needs {FEWEST_SIZES} shares or more; there are {len(n)}")
    sign = -1 if name == "log_loss" else 1  # so that more is better
    gain = sign * (resampled[-1] - resampled[0])
    if np.percentile(gain, 2.5) <= 0:
        return no_formula("the score is not better with more participants by more than chance")
    m = n / n[-1]
    (a, b, c), error = least_squares(m, y[:, None])
    if error[0] > 0.2 * ((y - y.mean()) ** 2).sum():
        return no_formula("the scores do not follow an inverse power law")
    a_, b_, c_ = least_squares(m, resampled[:, :REFITS])[0]
    extrapolated = []
    for times in TIMES:
        value = (a - b * times**-c)[0]
        if value < 0 or sign * value > 1:
            return no_formula(f"the formula leaves what is possible at {times} times as many")
        interval = intervals.percentiles(a_ - b_ * float(times) ** -c_)
        people = int(times * n[-1])
        extrapolated.append({"times": times, "participants": people, "value": float(value)})
        extrapolated[-1]["ci95"] = interval
    numbers = dict(zip("abc", (float(v[0]) for v in (a, b, c))))
    return {"formula": numbers | {"extrapolated": extrapolated}, "reason": None}


def no_formula(reason):
    return {"formula": None, "reason": reason}


def least_squares(m, y):
    """Fit a - b m^-c to each column of y (F, R) -> (a, b, c), each (R,), and the squared errors
    (R,)."""
    best, error = np.zeros((3, y.shape[1])), np.full(y.shape[1], np.inf)
    for c in EXPONENTS:
        powers = np.stack([np.ones(len(m)), -(m**-c)], axis=1)  # (F, 2)
        a_and_b = np.linalg.pinv(powers) @ y  # (2, R)
        now = ((powers @ a_and_b - y) ** 2).sum(axis=0)
        better = now < error
        best[:2, better], best[2, better], error[better] = a_and_b[:, better], c, now[better]
    return best, error


# ------------------------------------------------------------------------------------ what is shown


def write(folder, result):
    """learning_curve_SPLIT.csv and plots/learning_curve_SPLIT.png, of a result of eval.py."""
    folder, split, found = pathlib.Path(folder), result["split"], result["learning_curve"]
    header = ["what", "share_of_training", "participants", "subsets"]
    header += [f"{name}{part}" for name in SCORES for part in ("", "_low", "_high", "_sd")]
    rows = []
    for size in found["sizes"]:
        cells = [[s["mean"], *s["ci95"], s["sd"]] for s in (size[name] for name in SCORES)]
        whose = [size[name] for name in ("fraction", "participants", "subsets")]
        rows.append(["measured", *whose, *(cell for part in cells for cell in part)])
    for i, times in enumerate(TIMES):
        cells = []
        for formula_ in (found[name]["formula"] for name in SCORES):
            point = formula_ and formula_["extrapolated"][i]
            cells += [point["value"], *point["ci95"], None] if point else [None] * 4
        people = times * found["sizes"][-1]["participants"]
        rows.append(["extrapolated", times * found["sizes"][-1]["fraction"], people, None, *cells])
    blank = [["" if cell is None else cell for cell in row] for row in rows]
    files.write(folder / f"learning_curve_{split}.csv", files.csv_text([header, *blank]))
    picture = draw(found, len(result["classes"]))
    figures.save(folder / "plots", f"learning_curve_{split}", picture)


@figures.style()
def draw(found, num_classes):
    """Both scores over the number of participants: measured, and as the formula has them, dashed
    where it is extrapolated."""
    figure, axes = figures.new_figure(figures.WIDTH, 6, rows=2)
    n = np.array([size["participants"] for size in found["sizes"]])
    floor = {"balanced_accuracy": 1 / num_classes, "log_loss": np.log(num_classes)}
    for axis, name in zip(axes, SCORES):
        axis.axhline(floor[name], **figures.GUIDE, marker="", label="equal chances")
        points = [size[name] for size in found["sizes"]]
        y, low, high = np.array([[p["mean"], *p["ci95"]] for p in points]).T
        bars = np.maximum([y - low, high - y], 0)
        axis.errorbar(n, y, bars, fmt="o", capsize=3, label="measured, 95 % interval")
        law = found[name]["formula"]
        if law:
            x = np.geomspace(n[0], TIMES[-1] * n[-1], 100)
            curve = law["a"] - law["b"] * (x / n[-1]) ** -law["c"]
            inside = x <= n[-1]
            axis.plot(
                x[inside],
                curve[inside],
                color=figures.ORANGE,
                linestyle="-",
                marker="",
                label="fitted a - b n^-c",
            )
            beyond = {"color": figures.ORANGE, "linestyle": "--", "marker": ""}
            axis.plot(x[~inside], curve[~inside], **beyond, label="extrapolated")
            points = law["extrapolated"]
            low, high = np.array([point["ci95"] for point in points]).T
            axis.vlines(
                [p["participants"] for p in points], low, high, color=figures.ORANGE, linestyle="--"
            )
        axis.set(xscale="log", xlabel="training participants", ylabel=name.replace("_", " "))
        axis.set_xticks(n, [str(v) for v in n])
        axis.minorticks_off()
        axis.legend()
    return figure
