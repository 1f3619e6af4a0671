"""The figures of a result, in one style, as PNG, SVG and PDF.

    @style()
    def draw_mine(result): figure, axis = new_figure(4.8, 3); ...; return figure
    save(folder / "plots", "mine", draw_mine(result))        # mine.png, mine.svg, mine.pdf

Colours are those of Okabe and Ito (jfly.uni-koeln.de/color, 2008), which people with any colour
vision tell apart; lines differ in their dashes and points in their shapes, too, so that figures
survive a grey printer. Fonts stay text, which a drawing program can edit. A figure is at most 5.2
inches wide: a phone shows it whole, and its text can be read.
"""

import contextlib
import io

import numpy as np

import device
import files
from findings import clean, covariates, units

WIDTH = 5.2  # inches
BLUE, ORANGE, GREEN, PINK, SKY, RED = (
    "#0072B2",
    "#E69F00",
    "#009E73",
    "#CC79A7",
    "#56B4E9",
    "#D55E00",
)
KINDS = ("svg", "png", "pdf")  # the first is laid out, and the others are as it is
COLOURS = (BLUE, ORANGE, GREEN, PINK, RED, SKY)
DASHES = ("-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)), (0, (8, 2)))
MARKERS = ("o", "s", "^", "D", "v", "P")
MOST_CURVES = len(COLOURS)  # in a figure, so that no two look alike
GUIDE = {"color": "0.45", "linewidth": 0.8, "linestyle": ":"}  # lines to compare a curve with


@contextlib.contextmanager
def style():
    """The style of all figures, within a `with` block or, as a decorator, within a function."""
    import matplotlib
    from cycler import cycler

    settings = {
        "font.size": 9,
        "axes.titlesize": 9,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "legend.frameon": False,
        "legend.fontsize": 8,
        "axes.prop_cycle": cycler(color=COLOURS, linestyle=DASHES, marker=MARKERS),
        "lines.markersize": 3.5,
        "image.cmap": "Blues",
        "svg.fonttype": "none",  # text, not outlines
        "svg.hashsalt": "octprobe",  # the same file for the same figure
        "pdf.fonttype": 42,  # TrueType, which can be edited
        "text.parse_math": False,  # a run's name with two dollar signs is no mathematics
    }
    with matplotlib.rc_context(settings):
        yield


def new_figure(width, height, rows=1, columns=1):
    """A matplotlib figure of so many inches, and its axes. Without pyplot there is no window, and
    nothing to close."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots(rows, columns)


def new_panels(number, height, columns):
    """A figure of WIDTH x height inches, and the axes of its panels (number,), so many a row. The
    places that are left in the last row stay empty."""
    figure, axes = new_figure(WIDTH, height, -(-number // columns), columns)
    axes = np.array(axes).ravel()
    for axis in axes[number:]:
        axis.set_axis_off()
    return figure, axes[:number]


@style()
def picture(figure, kind, dpi=110):
    """The bytes of a figure as "png", "svg" or "pdf". Every figure of the project is written here,
    so that every text stands in it as it is, not as mathematics between dollar signs. No date is in
    it: the same figure gives the same bytes."""
    from matplotlib.text import Text

    out = io.BytesIO()
    for text in figure.findobj(Text):
        text.set_parse_math(False)
    undated = {"svg": {"Date": None}, "pdf": {"CreationDate": None}}
    figure.savefig(out, format=kind, dpi=dpi, metadata=undated.get(kind))
    return out.getvalue()


def save(folder, name, figure):
    """Write a figure as folder/NAME.png, .svg and .pdf."""
    for kind in KINDS:
        files.write(folder / f"{name}.{kind}", picture(figure, kind))
        figure.set_layout_engine("none")  # it is laid out now, and need not be again


def label(text, longest=32):
    """A text from data as a figure can hold it: printable, and cut in its middle where it is
    long."""
    text = device.printable(str(text), keep="")
    if text.startswith("_"):  # matplotlib would leave it out of a legend
        text = f" {text}"
    half = longest // 2
    return text if len(text) <= longest else f"{text[: half - 1]}…{text[-half:]}"


# ----------------------------------------------------------------------------- the whole result


@style()
def draw_summary(result, others):
    """All that one score must be seen beside: balanced accuracy of the run with its interval; what
    needs no encoder (one class for all, covariates), encoders that learned nothing, and chance
    bands. others {name: result}: of runs of the same task."""
    rows = [(label(result["run"]), result, RED, "D")]
    rows += [(label(name), other, BLUE, "o") for name, other in others.items()]
    if "covariates" in result:
        rows.append((label(f"{covariates(result)} alone"), result["covariates"], GREEN, "s"))
    floors = result.get("floors", {}).items()
    rows += [(label(f"probe on {name}"), floor, ORANGE, "^") for name, floor in floors]
    rows.append(("one class for all", result["majority"], "0.25", "v"))
    figure, axis = new_figure(WIDTH, 1.25 + 0.27 * len(rows))
    low, high = result["chance_band"]
    axis.axvspan(low, high, color="0.88", label="chance band", zorder=0)
    if "within" in result:
        low, high = result["within"]["band"]
        hatched = {"facecolor": "none", "edgecolor": "0.55", "linewidth": 0, "hatch": "///"}
        name = label(f"chance band within {result['within']['groups']}", 60)
        axis.axvspan(low, high, **hatched, label=name, zorder=0.5)
    for n, (_, scored, colour, marker) in enumerate(rows):
        look = {"color": colour, "clip_on": False}
        interval = clean(result, scored.get("ci95", {}).get("balanced_accuracy"))
        if interval:
            axis.plot(interval, [n, n], linestyle="-", marker="|", linewidth=1.6, **look)
        axis.plot(scored["balanced_accuracy"], n, marker=marker, markersize=6, **look)
    axis.set_yticks(range(len(rows)), [name for name, *_ in rows])
    axis.get_yticklabels()[0].set_fontweight("bold")
    axis.set(xlim=(0, 1), ylim=(len(rows) - 0.4, -0.6), xlabel="balanced accuracy")
    axis.set_title(f"{result['split']}, {result['n']} {units(result)}")
    axis.grid(axis="x", color="0.9", linewidth=0.6)
    axis.set_axisbelow(True)
    figure.legend(loc="outside lower center", ncols=2)
    return figure


# ------------------------------------------------------------------------------------- of a split


@style()
def draw_confusion(result):
    """The confusion matrix: numbers, and their shares of the true class, which give the colour."""
    from sklearn.metrics import ConfusionMatrixDisplay

    counts = np.array(result["confusion_matrix"])  # rows: true
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    size = max(4.2, 0.6 * len(shares))
    figure, axis = new_figure(size + 0.6, size)
    names = [label(name) for name in result["classes"]]
    display = ConfusionMatrixDisplay(shares, display_labels=names)
    # up to the middle of the colours, on which black text is easy to read
    colours = {"cmap": "Blues", "im_kw": {"vmin": 0, "vmax": 2}, "text_kw": {"color": "black"}}
    display.plot(ax=axis, xticks_rotation=20 if len(shares) < 6 else 90, colorbar=False, **colours)
    for cell, text in np.ndenumerate(display.text_):
        text.set_text(f"{counts[cell]}\n{shares[cell]:.0%}")
    title = f"{result['split']}: {units(result)}, share of the row"
    axis.set(xlabel="predicted", ylabel="true", title=title)
    return figure


@style()
def draw_roc(result, y_true, p):
    """A curve for each class against the rest; y_true (n,), p (n, K). Of many classes, the legend
    is beside the curves."""
    from sklearn.metrics import roc_curve

    many = len(result["classes"]) > 8
    figure, axis = new_figure(8 if many else 4.8, 4.4)
    for k, name in enumerate(result["classes"]):
        auroc = result["auroc_per_class"][k]
        if auroc is not None:
            false_rate, true_rate, _ = roc_curve(y_true == k, p[:, k])
            # a point for every participant would be a stripe
            axis.plot(false_rate, true_rate, marker="", label=f"{label(name)}: {auroc:.3f}")
    axis.plot([0, 1], [0, 1], **GUIDE, marker="")
    axis.set(
        xlabel="false positives, share of the other classes",
        ylabel="true positives, share of the class",
        title=f"{result['split']}: ROC, each class against the rest",
    )
    beside = {"loc": "center left", "bbox_to_anchor": (1, 0.5), "fontsize": 7}
    if axis.get_legend_handles_labels()[0]:  # a class that is absent has no curve
        axis.legend(title="AUROC", **(beside if many else {"loc": "lower right"}))
    return figure


@style()
def draw_reliability(result):
    """Share of right answers over the probability of the answer, before and after calibration; the
    area of a point grows with the number of those in its bin."""
    curves = {"as predicted": result["reliability"]}
    if "calibrated" in result:
        curves[f"temperature {result['temperature']:.2f}"] = result["calibrated"]["reliability"]
    figure, axis = new_figure(4.8, 4.4)
    axis.plot([0, 1], [0, 1], **GUIDE, marker="")
    for name, bins in curves.items():
        points = [[b[key] for b in bins] for key in ("confidence", "accuracy")]
        [line] = axis.plot(*points, label=name, linewidth=1)
        areas = [8 + 4 * b["count"] for b in bins]
        shape = {"color": line.get_color(), "marker": line.get_marker()}
        axis.scatter(*points, s=np.minimum(areas, 400), alpha=0.6, **shape)
    axis.set(
        xlim=(0, 1.03),
        ylim=(-0.03, 1.03),
        xlabel="probability of the answer",
        ylabel="share of right answers",
        title=f"{result['split']}: reliability (area: {units(result)})",
    )
    axis.legend(loc="upper left")
    return figure


# --------------------------------------------------------------------------------------- training


def draw_epochs(axis, epochs, names):
    """Curves over the records of metrics.jsonl. names {label of the curve: key of the records};
    a record that lacks a key, for another version wrote it, leaves a gap."""
    for name, key in names.items():
        x, y = ([epoch.get(k, np.nan) for epoch in epochs] for k in ("epoch", key))
        y = [np.nan if value is None else value for value in y]
        axis.plot(x, y, label=label(name), markevery=max(len(x) // 12, 1))
    axis.xaxis.get_major_locator().set_params(integer=True)


@style()
def draw_training(epochs, best_epoch, result):
    """Loss and balanced accuracy over the epochs, with the epoch that validation chose, and what
    is had without looking at an eye."""
    figure, axes = new_figure(WIDTH, 5, rows=2)
    many = len(result["classes"])
    floors = (("loss", np.log(many)), ("balanced_accuracy", 1 / many))
    for axis, (name, floor) in zip(axes, floors):
        draw_epochs(axis, epochs, {part: f"{part}/{name}" for part in ("train", "val")})
        axis.axvline(best_epoch, **GUIDE | {"linestyle": "--"}, marker="", label="chosen epoch")
        what = "floor: equal chances, one class for all"
        axis.axhline(floor, **GUIDE, marker="", label=what)
        axis.set(ylabel=name.replace("_", " "))
    axes[1].set_xlabel("epoch")
    # outside, where it hides no curve
    figure.legend(handles=axes[0].get_lines(), loc="outside lower center", ncols=2)
    return figure


@style()
def draw_shares(epochs, classes):
    """How often each class is answered on validation over the epochs: a collapse is seen here. Of
    many classes, the most frequent answers alone, and the sum of the others."""
    keys = {name: f"val/predicted_share_{k}" for k, name in enumerate(classes)}
    most = {name: max(epoch.get(key) or 0 for epoch in epochs) for name, key in keys.items()}
    if len(keys) > MOST_CURVES:
        kept = sorted(most, key=most.get, reverse=True)[: MOST_CURVES - 1]
        others = [key for name, key in keys.items() if name not in kept]
        sums = [{"others": sum(epoch.get(key) or 0 for key in others)} for epoch in epochs]
        epochs = [epoch | summed for epoch, summed in zip(epochs, sums)]
        keys = {name: keys[name] for name in keys if name in kept}
        keys[f"the other {len(others)} together"] = "others"
    figure, axis = new_figure(WIDTH, 2.4 + 0.15 * len(keys))
    draw_epochs(axis, epochs, keys)
    axis.set(xlabel="epoch", ylim=(-0.03, 1.03), ylabel="share of the answers")
    figure.legend(loc="outside lower center", ncols=2)
    return figure
