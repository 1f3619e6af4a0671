"""The heat map of a sweep: how well the head of every setting did on validation, the chosen one
outlined.

    rows = read(folder)          # of RUN/sweep.csv: Tried, [] where there is no sweep
    draw(rows); in_words(rows)   # its figure, and what that shows, in words
"""

import dataclasses
import math
import pathlib

import numpy as np

import figures
import files

# columns of sweep.csv that are no settings of a head
NO_SETTINGS = ("seed", "best_epoch", "val_balanced_accuracy", "val_loss", "chosen", "converged")
AXES = ("lr_head", "weight_decay")  # before others with as many values
MOST_PANELS = 6  # those with the best heads, where there are more
MOST_CELLS = 12  # in a row of a heat map; more values of a single setting are drawn as a curve
SCORES = {"val_loss": "log-loss", "val_balanced_accuracy": "balanced accuracy"}


@dataclasses.dataclass
class Tried:
    """A head of a sweep. settings {name: text} and scores {name: number}, NaN where it diverged."""

    settings: dict
    scores: dict
    is_chosen: bool


def read(folder):
    """sweep.csv -> the heads of the first seed, as Tried; [] of a single head. ValueError where it
    holds anything else."""
    path, again = pathlib.Path(folder, "sweep.csv"), "remove it, and it is not shown"
    if not path.exists():
        return []
    table = files.read_csv(path, ["seed", *SCORES, "chosen"], again)
    found = []
    for row in table:
        try:
            scores = {name: float(row[name]) for name in SCORES}
        except ValueError:
            raise ValueError(f"{path} is damaged (a score is no number); {again}") from None
        settings = {name: text for name, text in row.items() if name not in NO_SETTINGS}
        if row["seed"] == table[0]["seed"]:
            found.append(Tried(settings, scores, row["chosen"] == "True"))
    chosen = [tried.scores for tried in found if tried.is_chosen]
    if len(chosen) != 1:
        raise ValueError(f"{path} is damaged (it must have one chosen head a seed); {again}")
    if not all(map(math.isfinite, chosen[0].values())):  # it did not diverge
        raise ValueError(f"{path} is damaged (a score of the chosen head is no number); {again}")
    return found if varied(found) else []


def varied(rows):
    """{setting: its values, in order} of those with several: first those that become axes."""
    values_of = {name: {row.settings[name] for row in rows} for name in rows[0].settings}
    several = {name: in_order(values) for name, values in values_of.items() if len(values) > 1}
    names = sorted(several, key=lambda name: (-len(several[name]), name not in AXES))
    return {name: several[name] for name in names}


def number(text):
    """A setting as a number; None where it is none."""
    try:
        return float(text)
    except ValueError:
        return None


def in_order(values):
    """Texts by their size, where all are numbers."""
    numbers = {value: number(value) for value in values}
    return sorted(values, key=None if None in numbers.values() else numbers.get)


def shown(text):
    return text if number(text) is None else f"{number(text):g}"


def chosen_of(rows):
    return next(row for row in rows if row.is_chosen)


def score_shown(rows):
    """The score that chose the head: the loss, if the chosen head has the least."""
    least = np.nanmin([row.scores["val_loss"] for row in rows])
    is_least = chosen_of(rows).scores["val_loss"] <= least + 1e-9
    return "val_loss" if is_least else "val_balanced_accuracy"


def goodness(score, value):
    """The value of a score, or its negative, so that more is better."""
    return -value if score == "val_loss" else value


def panels_of(rows, names, score):
    """The rows by their values of the settings `names`: those with the best heads, and how many
    there are in all -> {values: rows}, number."""
    panels = {}
    for row in rows:
        panels.setdefault(tuple(row.settings[name] for name in names), []).append(row)

    def best(values):
        found = [goodness(score, row.scores[score]) for row in panels[values]]
        return np.nan_to_num(found, nan=-np.inf).max()

    kept = sorted(panels, key=best, reverse=True)[:MOST_PANELS]
    return {values: panels[values] for values in sorted(kept)}, len(panels)


def in_words(rows):
    """What the figure shows, for who cannot see it."""
    settings, score = varied(rows), score_shown(rows)
    values = [row.scores[score] for row in rows if not math.isnan(row.scores[score])]
    chosen = chosen_of(rows).settings
    of_chosen = ", ".join(f"{name} {shown(chosen[name])}" for name in settings)
    words = (
        f"{SCORES[score]} on validation of {len(rows)} heads, by {', '.join(settings)}: "
        f"{min(values):.3f} to {max(values):.3f}. Marked is the chosen one: {of_chosen}."
    )
    if len(values) < len(rows):
        words += f" {len(rows) - len(values)} diverged, and are hatched."
    _, number_of_panels = panels_of(rows, list(settings)[2:], score)
    if number_of_panels > MOST_PANELS:
        words += f" The best {MOST_PANELS} of {number_of_panels} panels are shown."
    return words[0].upper() + words[1:]


# -------------------------------------------------------------------------------------- the figure


@figures.style()
def draw(rows):
    """A panel for every combination of the settings beyond two; one row where one setting varies,
    and a curve where that has many values."""
    settings, score = varied(rows), score_shown(rows)
    x, *rest = settings
    y, names = (rest[0] if rest else None), rest[1:]
    better = "lower" if score == "val_loss" else "higher"
    if y is None and len(settings[x]) > MOST_CELLS and None not in map(number, settings[x]):
        return draw_curve(rows, x, score)
    panels, _ = panels_of(rows, names, score)
    columns = 2 if len(panels) > 1 and len(settings[x]) <= 6 else 1
    height = 0.65 + 0.3 * (len(settings[y]) if y else 1) + 0.15 * len(names)  # of a panel
    height = 0.35 + height * -(-len(panels) // columns)
    figure, axes = figures.new_panels(len(panels), height, columns)
    figure.suptitle(f"validation: {SCORES[score]}, {better} is better (darker)", fontsize=9)
    good = [goodness(score, r.scores[score]) for r in rows if not math.isnan(r.scores[score])]
    # what is far worse than most would make all others alike
    span = np.quantile(good, 0.1), max(good)
    for axis, (values, heads) in zip(axes, panels.items()):
        draw_cells(axis, heads, x, settings[x], y, settings.get(y, [None]), score, span)
        title = [figures.label(f"{name} {shown(value)}", 28) for name, value in zip(names, values)]
        axis.set_title("\n".join(title), fontsize=8)
    return figure


def draw_cells(axis, rows, x, columns, y, lines, score, span):
    """A heat map of rows over the settings x and y (None: there is none), whose values are columns
    and lines. span: the goodness of the lightest colour, and of the darkest."""
    from matplotlib import colormaps
    from matplotlib.patches import Rectangle

    size = 8 if len(columns) <= 8 else 6
    for row in rows:
        column, line = (
            values.index(row.settings[name] if name else None)
            for name, values in ((x, columns), (y, lines))
        )
        value, corner = row.scores[score], (column - 0.5, line - 0.5)
        if math.isnan(value):
            look = {"facecolor": "white", "edgecolor": "0.6", "hatch": "////", "linewidth": 0}
        else:
            share = (goodness(score, value) - span[0]) / max(span[1] - span[0], 1e-9)
            # up to the middle of the colours, on which black text is easy to read
            look = {"facecolor": colormaps["Blues"](0.05 + 0.5 * np.clip(share, 0, 1))}
        axis.add_patch(Rectangle(corner, 1, 1, **look))
        if len(columns) <= MOST_CELLS:
            weight = "bold" if row.is_chosen else "normal"
            text = "–" if math.isnan(value) else f"{value:.3f}"
            axis.text(column, line, text, ha="center", va="center", fontsize=size, weight=weight)
        if row.is_chosen:
            inner = (corner[0] + 0.03, corner[1] + 0.03)
            outline = {"fill": False, "edgecolor": figures.RED, "linewidth": 2, "zorder": 3}
            axis.add_patch(Rectangle(inner, 0.94, 0.94, **outline))
    axis.set(
        xlim=(-0.5, len(columns) - 0.5), ylim=(-0.5, len(lines) - 0.5), xlabel=figures.label(x)
    )
    axis.set_xticks(range(len(columns)), [figures.label(shown(v), 12) for v in columns])
    axis.set_yticks(range(len(lines)), [figures.label(shown(v), 12) if y else "" for v in lines])
    axis.set_ylabel(figures.label(y) if y else "")
    axis.tick_params(length=0, labelsize=size)


def draw_curve(rows, x, score):
    """The score over the one setting x, whose values are numbers."""
    figure, axis = figures.new_figure(figures.WIDTH, 2.6)
    rows = sorted(rows, key=lambda row: number(row.settings[x]))
    points = [(number(row.settings[x]), row.scores[score]) for row in rows]
    axis.plot(*zip(*points), linewidth=1)
    chosen = chosen_of(rows)
    look = {"color": figures.RED, "marker": "D", "markersize": 7, "fillstyle": "none"}
    place = number(chosen.settings[x]), chosen.scores[score]
    axis.plot(*place, linestyle="", label="chosen", **look)
    if points[0][0] > 0:
        axis.set_xscale("log")
        axis.xaxis.set_major_formatter("{x:g}")
    axis.set(xlabel=figures.label(x), ylabel=f"validation {SCORES[score]}")
    axis.legend()
    return figure
