"""The heat map of a sweep: a cell for every head, the chosen one outlined."""

import csv
import itertools
import math

import pytest
from matplotlib.colors import to_hex
from matplotlib.patches import Rectangle

import figures
import sweep

RATES, DECAYS = (0.0003, 0.001, 0.003), (0.01, 10.0)


def write(folder, settings, losses, chosen=0, seeds=(42,), **columns):
    """sweep.csv of every combination of settings {name: values}, with these losses."""
    rows = []
    for seed in seeds:
        for n, values in enumerate(itertools.product(*settings.values())):
            scores = {"best_epoch": 3, "val_balanced_accuracy": 0.5, "val_loss": losses[n]}
            row = {"seed": seed, **dict(zip(settings, values)), **columns, **scores}
            rows.append(row | {"chosen": n == chosen})
    with open(folder / "sweep.csv", "w", newline="") as f:
        table = csv.DictWriter(f, rows[0])
        table.writeheader()
        table.writerows(rows)


def cells(figure):
    """{panel: [(text, value)]} and [(panel, x, y)] of what is outlined."""
    texts, outlined = {}, []
    for axis in figure.axes:
        texts[axis.get_title()] = [text.get_text() for text in axis.texts]
        for patch in axis.patches:
            if (
                isinstance(patch, Rectangle)
                and to_hex(patch.get_edgecolor()) == figures.RED.lower()
            ):
                outlined.append((axis.get_title(), round(patch.get_x()), round(patch.get_y())))
    return texts, outlined


def test_every_head_has_a_cell_and_the_chosen_one_is_outlined(tmp_path):
    settings = {"loss": ["ce"], "ordinal": [True, False], "lr_head": RATES, "weight_decay": DECAYS}
    losses = [0.9 + 0.01 * n for n in range(12)]
    losses[8] = 0.512  # ordinal False, lr_head 0.001, weight_decay 0.01
    write(tmp_path, settings, losses, chosen=8, seeds=(1, 2))
    rows = sweep.read(tmp_path)
    assert len(rows) == 12  # of the first seed
    figure = sweep.draw(rows)
    texts, outlined = cells(figure)
    expected = {"ordinal True": losses[:6], "ordinal False": losses[6:]}
    for panel, of_panel in expected.items():
        assert sorted(texts[panel]) == sorted(f"{loss:.3f}" for loss in of_panel)
    assert outlined == [("ordinal False", 1, 0)]
    axis = figure.axes[0]
    assert (axis.get_xlabel(), axis.get_ylabel()) == ("lr_head", "weight_decay")
    assert [tick.get_text() for tick in axis.get_xticklabels()] == ["0.0003", "0.001", "0.003"]
    assert figure.get_figwidth() <= figures.WIDTH
    words = sweep.in_words(rows)
    assert words.startswith("Log-loss on validation of 12 heads") and "0.512 to 1.010" in words
    assert "ordinal False" in words and "lr_head 0.001" in words and "diverged" not in words


def test_a_head_that_diverged_is_hatched(tmp_path):
    write(tmp_path, {"lr_head": RATES}, [0.7, 0.8, math.nan])
    rows = sweep.read(tmp_path)
    figure = sweep.draw(rows)
    texts, outlined = cells(figure)
    assert texts[""] == ["0.700", "0.800", "–"] and outlined == [("", 0, 0)]  # a single row
    assert [bool(patch.get_hatch()) for patch in figure.axes[0].patches].count(True) == 1
    assert "1 diverged" in sweep.in_words(rows)


def test_the_score_that_chose_is_shown(tmp_path):
    write(tmp_path, {"lr_head": RATES}, [0.7, 0.8, 0.9], chosen=1)
    assert "Balanced accuracy on validation" in sweep.in_words(sweep.read(tmp_path))


def test_many_values_of_a_single_setting_are_a_curve(tmp_path):
    strengths = [10.0**k for k in range(-8, 8)]
    write(tmp_path, {"C": strengths}, [1 + abs(k) for k in range(-8, 8)], chosen=8, converged=True)
    rows = sweep.read(tmp_path)
    axis = sweep.draw(rows).axes[0]
    curve, chosen = axis.get_lines()
    assert len(curve.get_xdata()) == 16 and list(chosen.get_xdata()) == [1.0]
    assert axis.get_xscale() == "log"


def test_of_many_panels_the_best_are_shown(tmp_path):
    settings = {"loss": list("abc"), "ordinal": [True, False], "lr_head": RATES}
    settings["weight_decay"] = [*DECAYS, 0.1, 1]
    write(tmp_path, settings, [2 - 0.01 * n for n in range(72)], chosen=71)
    rows = sweep.read(tmp_path)
    assert len(sweep.draw(rows).axes) == 6 and "panels" not in sweep.in_words(rows)
    settings["class_weights"] = ["auto", "none"]
    write(tmp_path, settings, [2 - 0.01 * n for n in range(144)], chosen=143)
    rows = sweep.read(tmp_path)
    texts, outlined = cells(sweep.draw(rows))
    assert len(texts) == 6 and len(outlined) == 1  # the chosen one is among them
    assert "The best 6 of 12 panels are shown" in sweep.in_words(rows)


@pytest.mark.parametrize("settings", [None, {"lr_head": [0.1]}])
def test_without_a_sweep_there_is_nothing(tmp_path, settings):
    if settings:
        write(tmp_path, settings, [0.7])
    assert sweep.read(tmp_path) == []


@pytest.mark.parametrize(
    "losses, chosen, message",
    [
        (["x", 1, 2], 0, "a score is no number"),
        ([1, 2, 3], 7, "one chosen head"),
        (["nan"] * 3, 0, "chosen head is no number"),
    ],
)
def test_a_damaged_table_is_one_sentence(tmp_path, losses, chosen, message):
    write(tmp_path, {"lr_head": RATES}, losses, chosen)
    with pytest.raises(ValueError, match=f"sweep.csv is damaged .*{message}"):
        sweep.read(tmp_path)
