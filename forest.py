"""Figures of several runs beside each other, and the same in words for who cannot see them.

    drawn = {"scores": draw_scores({"A": result}), "differences": draw_differences(pairs, ["A"])}
    pictures = write("runs/comparison", drawn)    # PNG, SVG and PDF of each -> {name: SVG}

A pair is what metrics.compare_all says of two runs. The style is that of figures.py.
"""

import math
import pathlib

import numpy as np

from figures import BLUE, GUIDE, KINDS, ORANGE, WIDTH, label, new_figure, save, style
from findings import clean, span, with_span

# the figures of `write`; of several tasks, each has its number
NAMES = ("scores", "differences", "ranking", "agreement", "mean_ranks")
MOST_PAIRS = 15  # of a figure: all of 6 runs
MOST_RUNS = 12  # of a matrix, whose cells can be read
MOST_GROUPS = 12  # bars of a ranking


def write(folder, drawn):
    """Write figures {name: figure} into a folder -> {name: bytes of the SVG}. What an earlier call
    left there is removed, for it would be taken for a part of this one."""
    folder = pathlib.Path(folder)
    for path in folder.glob("*"):
        if path.suffix.lstrip(".") in KINDS and path.stem.rstrip("0123456789_") in NAMES:
            path.unlink()
    for name, figure in drawn.items():
        save(folder, name, figure)
    return {name: (folder / f"{name}.svg").read_bytes() for name in drawn}


def labels(names, longest=44):
    """Names as a figure can hold them, all different, in the same order -> list. `longest`: of a
    name, in letters; one that is cut as another is has its number."""
    short = [label(name, longest) for name in names]
    return [
        f"{label(names[n], longest - 5)} ({n + 1})" if short.count(text) > 1 else text
        for n, text in enumerate(short)
    ]


def broken(text, line=22):
    """A label on two lines where it is longer than `line` letters, so that a figure has room beside
    its ticks. It is cut after a sign between words, or in the middle."""
    if len(text) <= line:
        return text
    cut = max(text.rfind(sign, 0, line) + 1 for sign in " _-.")
    if len(text) - cut > line:
        cut = math.ceil(len(text) / 2)
    return f"{text[:cut]}\n{text[cut:]}"


def beside(axis, row, text):
    """Numbers at the right of a row."""
    place = {"transform": axis.get_yaxis_transform(), "ha": "left", "va": "center"}
    axis.text(1.05, row, text, fontsize=8, **place)


def finish(axis, names, title):
    """Names and title of an axis whose rows 0, 1, ... go from above to below, and light lines."""
    axis.set_yticks(range(len(names)), names, fontsize=8)
    axis.set_ylim(len(names) - 0.4, -0.6)
    axis.set_title(title, loc="left")
    axis.grid(axis="x", color="0.9", linewidth=0.6)
    axis.set_axisbelow(True)


# ------------------------------------------------------------------------------ scores, differences


@style()
def draw_scores(results):
    """results {name: result}: balanced accuracy with its interval, on each run's chance band."""
    figure, axis = new_figure(WIDTH, 1 + 0.36 * len(results))
    for n, r in enumerate(results.values()):
        low, high = r["chance_band"]
        name = "" if n else "chance band"
        axis.barh(n, high - low, left=low, color="0.85", height=0.8, label=name, zorder=0)
        interval = clean(r, r["ci95"]["balanced_accuracy"])
        if interval:
            bar = {"color": BLUE, "linestyle": "-", "marker": "|", "linewidth": 1.8}
            axis.plot(interval, [n, n], **bar, clip_on=False)
        axis.plot(r["balanced_accuracy"], n, color=BLUE, marker="o", markersize=6, clip_on=False)
        beside(axis, n, with_span(r["balanced_accuracy"], interval))
    axis.set(xlim=(0, 1), xlabel="balanced accuracy")
    first = next(iter(results.values()))
    how = "chosen on it: no interval" if first["split"] == "val" else "95 % interval"
    finish(axis, [broken(name) for name in labels(list(results))], f"{first['split']}, {how}")
    figure.legend(loc="outside lower center")
    return figure


def scores_in_words(results):
    rows = (
        f"{name} {with_span(r['balanced_accuracy'], interval)}, chance {span(r['chance_band'])}"
        for name, r in results.items()
        for interval in [clean(r, r["ci95"]["balanced_accuracy"])]
    )
    return f"Balanced accuracy of each run (95 % interval) and its chance band: {'; '.join(rows)}"


def oriented(pair, split):
    """A pair with the higher score first -> names of the higher and the lower run, difference,
    interval (None of val, on which the runs were chosen). As paired.verdict says it."""
    interval = clean({"split": split}, pair["ci95"])
    if pair["difference"] >= 0:
        return pair["a"], pair["b"], abs(pair["difference"]), interval
    low, high = pair["ci95"]
    return pair["b"], pair["a"], abs(pair["difference"]), interval and [-high, -low]


def shown_pairs(pairs, order):
    """The pairs that a figure has room for: all, or those of the best run alone. order: names of
    the runs, the best first."""
    if len(pairs) <= MOST_PAIRS:
        return pairs
    return [pair for pair in pairs if order[0] in (pair["a"], pair["b"])]


@style()
def draw_differences(pairs, order, split):
    """Forest plot of `shown_pairs`: the difference of two balanced accuracies with its interval,
    and p (Holm). Filled where the two are shown to differ, by p (Holm) at 5 %: the interval is of
    the one pair, without a correction."""
    pairs = shown_pairs(pairs, order)
    short = dict(zip(order, labels(order, 26)))
    figure, axis = new_figure(WIDTH, 1 + 0.42 * len(pairs))
    axis.axvline(0, **GUIDE | {"linestyle": "--"}, marker="")
    ticks = []
    for n, pair in enumerate(pairs):
        higher, lower, difference, interval = oriented(pair, split)
        if interval:
            bar = {"color": BLUE, "linestyle": "-", "marker": "|", "linewidth": 1.6}
            axis.plot(interval, [n, n], **bar)
        filled = {"markerfacecolor": BLUE if pair["p_holm"] < 0.05 else "white"}
        axis.plot(difference, n, color=BLUE, marker="D", markersize=6, **filled)
        beside(axis, n, f"{with_span(difference, interval)}\np (Holm) {pair['p_holm']:.4f}")
        ticks.append(f"{short[higher]}\n− {short[lower]}")
    axis.set(xlabel="difference of balanced accuracy")
    axis.locator_params(axis="x", nbins=5)
    finish(axis, ticks, f"{split}; filled: shown to differ, p (Holm) < 0.05")
    return figure


def differences_in_words(pairs, order, split):
    rows = (
        f"{higher} minus {lower} {with_span(difference, interval)}, p (Holm) {p:.4f}"
        for p, (higher, lower, difference, interval) in (
            (pair["p_holm"], oriented(pair, split)) for pair in shown_pairs(pairs, order)
        )
    )
    return f"Differences of balanced accuracy (95 % interval): {'; '.join(rows)}"


# ---------------------------------------------------------------------------------------- agreement


@style()
def draw_agreement(names, found, units):
    """A matrix of an agreement.Agreement, of at most MOST_RUNS runs. Below the diagonal: same
    answer, and Cohen's kappa, which gives the colour; above it: both right, and exactly one right;
    on it: right."""
    names = labels(names[:MOST_RUNS], 30)
    m, size = len(names), 8 if len(names) <= 8 else 6
    shade = np.where(np.tri(m, k=-1), np.nan_to_num(found.kappa[:m, :m]).clip(0), np.nan)
    figure, axis = new_figure(WIDTH, 1.7 + max(0.4 * m, 1))
    # up to the middle of the colours, on which black text is easy to read
    axis.imshow(shade, vmin=0, vmax=2, aspect="auto")
    for i, j in np.ndindex(m, m):
        if i > j:
            text = f"{found.same[i, j]:.0%}\nκ {kappa_text(found.kappa[i, j])}"
        elif i < j:
            text = f"{found.both_right[i, j]:.0%}\n{found.one_right[i, j]:.0%}"
        else:
            text = f"{found.both_right[i, i]:.0%}"
        bold = "bold" if i == j else "normal"
        axis.text(j, i, text, ha="center", va="center", fontsize=size, fontweight=bold)
    for n in range(1, m):  # lines between the cells
        axis.axhline(n - 0.5, color="0.8", linewidth=0.6, linestyle="-", marker="")
        axis.axvline(n - 0.5, color="0.8", linewidth=0.6, linestyle="-", marker="")
    ticks = [broken(name, 16) for name in names]
    axis.set_xticks(range(m), ticks, fontsize=7, rotation=0 if m <= 3 else 90)
    axis.set_yticks(range(m), ticks, fontsize=7)
    figure.suptitle(
        f"Share of {units}. Below the diagonal: same answer, Cohen's κ;\n"
        "above it: both right, exactly one right; on it: right.",
        fontsize=8,
    )
    return figure


def kappa_text(kappa):
    return "-" if np.isnan(kappa) else f"{kappa:.2f}"


def agreement_in_words(names, found, units):
    names = names[:MOST_RUNS]
    rows = (
        f"{names[i]} and {names[j]}: same answer {found.same[i, j]:.0%}, kappa "
        f"{kappa_text(found.kappa[i, j])}, both right {found.both_right[i, j]:.0%}, exactly one "
        f"right {found.one_right[i, j]:.0%}"
        for i in range(len(names))
        for j in range(i)
    )
    return f"Agreement of the runs, in shares of the {units}. {'; '.join(rows)}"


# ------------------------------------------------------------------------------------------ ranking


@style()
def draw_ranking(values, groups, what, low_is_best=False):
    """A critical-difference diagram, after Demsar (2006): the runs on an axis, better to the right,
    and a bar for each group of runs that are not shown to differ.

    values {name: value}, the best first; groups: of agreement.groups; what: the axis. A bar has a
    dot at each run of its group, for it may pass over a run that is not of the group: there is no
    single critical difference, as the tests of two runs do not depend on their distance alone.
    """
    names, groups = list(values), groups[:MOST_GROUPS]
    short = {name: broken(text) for name, text in zip(names, labels(names))}
    top, deep = 0.35 + 0.3 * len(groups), math.ceil(len(names) / 2)
    tallest = max(text.count("\n") for text in short.values())
    figure, axis = new_figure(WIDTH, 0.9 + (0.36 + 0.12 * tallest) * (top + deep))
    room = 0.05 * (max(values.values()) - min(values.values())) or 0.05
    ends = min(values.values()) - room, max(values.values()) + room
    axis.set_xlim(ends[::-1] if low_is_best else ends)
    (left, right), digits = axis.get_xlim(), 2 if low_is_best else 3
    thin = {"color": "0.35", "linewidth": 0.8, "linestyle": "-", "marker": "", "clip_on": False}
    for n, (name, value) in enumerate(values.items()):
        is_right = n < deep  # the best at the right, the others at the left, the worst above
        row = top + (n if is_right else len(names) - 1 - n)
        axis.plot([value, value, right if is_right else left], [0, row, row], **thin)
        text = f"{short[name]}\n{value:.{digits}f}"
        place = {"ha": "left" if is_right else "right", "va": "center", "fontsize": 8}
        axis.annotate(
            text,
            (right if is_right else left, row),
            (4 if is_right else -4, 0),
            textcoords="offset points",
            **place,
        )
    for n, group in enumerate(groups):
        x, row = [values[name] for name in group], 0.35 + 0.3 * n
        dots = {"marker": "o", "markersize": 5, "markerfacecolor": ORANGE}
        axis.plot(x, [row] * len(x), color="black", linestyle="-", linewidth=2.5, **dots)
    axis.set_ylim(top + deep - 0.4, 0)
    axis.spines[["left", "bottom"]].set_visible(False)
    axis.spines["top"].set_visible(True)
    axis.set_yticks([])
    axis.xaxis.tick_top()
    axis.xaxis.set_label_position("top")
    axis.set_xlabel(what)
    axis.locator_params(axis="x", nbins=5)
    return figure


def ranking_in_words(values, groups, what):
    rows = ", ".join(f"{name} {value:.3f}" for name, value in values.items())
    bars = "; ".join(", ".join(group) for group in groups[:MOST_GROUPS])
    bars = f"Not shown to differ: {bars}" if bars else "Every two are shown to differ"
    return f"{what}, the best first: {rows}. {bars}."


def ranking_note(groups):
    """What the bars of a ranking are."""
    if not groups:
        return "Better to the right. Every two runs are shown to differ, so no bar joins any."
    drawn = f" The figure has {MOST_GROUPS} of {len(groups)} bars." * (len(groups) > MOST_GROUPS)
    return (
        "Better to the right. A bar joins runs of which no two are shown to differ (p (Holm) of "
        "5 % or more), with a dot at each; it may pass over one that is not of them. Not to be "
        f"shown to differ is not to be equal.{drawn}"
    )
