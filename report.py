"""Results as people see them: tables for the terminal, pictures, report.html, leaderboard.html.

    print_result(result)                     # result: what eval_SPLIT.json holds
    write_plots(folder, result, y_true, p)   # folder/plots/*.png
    write_report(folder)                     # folder/report.html, of what the folder holds
    render(template, **values)               # text of a page of templates/

A table is a pair (header, rows) of lists of texts. The HTML of the pages is in templates/. A page
is one file, with its pictures inside, which opens offline and on a phone.
"""

import base64
import io
import itertools
import json
import pathlib
import re
import sys

import numpy as np

import files
import metrics
from findings import clean, number, sentences, span, tables, with_interval
from labels import SPLITS
from results import read_result

SCORE_NAMES = {
    "accuracy": "accuracy",
    "balanced_accuracy": "balanced accuracy",
    "macro_f1": "macro F1",
    "auroc_macro_ovr": "AUROC (macro, one vs rest)",
    "log_loss": "log-loss",
    "macro_precision": "macro precision",
    "macro_recall": "macro recall",
    "auprc_macro_ovr": "AUPRC (macro, one vs rest)",
    "quadratic_kappa": "quadratic kappa",
    "brier": "Brier score",
    "ece": "expected calibration error",
}

# ------------------------------------------------------------------------------------------- tables


def score_table(result, names=SCORE_NAMES):
    """Each score with its interval and its floors."""
    header = ["", "score", "95 % interval", "majority class", "random answers", "chance band"]
    header += ["covariates"] if "covariates" in result else []
    rows = [
        [
            SCORE_NAMES[name],
            number(result[name]),
            span(clean(result, result["ci95"][name])),
            number(result["majority"][name]),
            number(result["random"][name]),
            span(result["chance"][name]),
            *([number(result["covariates"][name])] if "covariates" in result else []),
        ]
        for name in score_names(result, names)
    ]
    return header, rows


def score_names(result, names=SCORE_NAMES):
    """Those of the names that mean something: of classes without an order, none is further away."""
    return [name for name in names if result["ordered"] or name != "quadratic_kappa"]


def class_table(result):
    """Every class: its participants, how many were predicted, its F1 with the interval."""
    columns = zip(
        result["classes"],
        result["true_counts"],
        result["predicted_counts"],
        result["f1_per_class"],
        result["ci95"]["f1_per_class"],
    )
    rows = [
        [name, str(true), str(predicted), with_interval(result, f1, interval)]
        for name, true, predicted, f1, interval in columns
    ]
    return ["class", units(result), "predicted", "F1"], rows


def group_table(result):
    """Every subgroup: site, age, scanner, side."""
    rows = [
        [
            f"{name} {group['group']}",
            f"{group['n']}{' (small)' if group['small'] else ''}",
            number(group["balanced_accuracy"]),
            span(clean(result, group["ci95"])),
            number(group["rest"]),
        ]
        for name, groups in result["subgroups"].items()
        for group in groups
    ]
    return ["group", "participants", "balanced accuracy", "95 % interval", "all others"], rows


def units(result):
    """What was scored, in the plural."""
    return result["unit"] + "s"


def counted(result):
    """How much was scored, in words."""
    number = f"{result['n']} {units(result)}"
    people = f" of {result['participants']} participants" if result["unit"] != "participant" else ""
    return f"{number}{people}, {result['volumes']} volumes"


def text_table(header, rows):
    """A table for the terminal: the first column to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(header, *rows)]
    lines = []
    for first, *rest in [header, *rows]:
        cells = [cell.rjust(width) for cell, width in zip(rest, widths[1:])]
        lines.append("  ".join([first.ljust(widths[0]), *cells]))
    return "\n".join(lines)


def sentence(result):
    """The result in one sentence, with what data and which checkpoint it is of."""
    interval = clean(result, result["ci95"]["balanced_accuracy"])
    how = f"95 % interval {span(interval)}" if interval else "chosen on this split: no interval"
    chance = f"chance band {span(result['chance_band'])}"
    if "within" in result:
        within = result["within"]
        chance += f", within {within['groups']} {span(within['band'])}"
    return (
        f"{result['run']} on {result['split']}: "
        f"balanced accuracy {result['balanced_accuracy']:.3f} "
        f"({how}; {chance}), "
        f"{counted(result)}, "
        f"checkpoint of epoch {result['epoch']}{how_fitted(result)}, {result['data']}."
    )


def how_fitted(result):
    """What an epoch's number does not say of the head."""
    words = ["the start, before training"] if result["epoch"] == 0 else []
    words += ["refitted on train and val"] if result["refit"] else []
    return f" ({', '.join(words)})" if words else ""


def seeds_line(result):
    """Mean and standard deviation over train.seeds."""
    seeds, spread = result["seeds"]["seeds"], result["seeds"]["balanced_accuracy"]
    return (
        f"over seeds {', '.join(map(str, seeds))}: "
        f"balanced accuracy {spread['mean']:.3f} ± {spread['sd']:.3f} "
        f"({', '.join(map(number, spread['each']))}); the table is of the first"
    )


def print_result(result):
    shown = [score_table(result, metrics.SCORES), *tables(result, is_brief=True)]
    shown.append(class_table(result))
    shown += [group_table(result)] if result["subgroups"] else []
    print(f"\n{sentence(result)}\n")
    for table in shown:
        print(text_table(*table), end="\n\n")
    if "seeds" in result:
        print(seeds_line(result))
    for line in sentences(result):
        print(line)
    for volume in result["unreadable"]:
        print(f"unreadable: participant {volume['participant_id']}: {volume['reason']}")
    print("\n".join(f"ALARM: {alarm}" for alarm in result["alarms"]) or "no alarms")


# ----------------------------------------------------------------------------------------- pictures

GUIDE = {"color": "grey", "linewidth": 0.8, "linestyle": ":"}  # lines to compare a curve with


def new_figure(width, height, columns=1):
    """A matplotlib figure of so many inches, and its axes. Without pyplot there is no window, and
    nothing to close."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height))
    return figure, figure.subplots(1, columns)


def png(figure, dpi=110, margins="tight"):
    """The bytes of a PNG. Every picture of the project is made here, so that every text stands in
    it as it is: matplotlib would read a run's name with two dollar signs as mathematics."""
    import matplotlib
    from matplotlib.text import Text

    out = io.BytesIO()
    for text in figure.findobj(Text):
        text.set_parse_math(False)
    with matplotlib.rc_context({"text.parse_math": False}):  # of texts that drawing adds
        figure.savefig(out, format="png", dpi=dpi, bbox_inches=margins)
    return out.getvalue()


def draw_confusion(result):
    from sklearn.metrics import ConfusionMatrixDisplay

    counts = np.array(result["confusion_matrix"])  # rows: true
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    size = max(4.6, 0.6 * len(shares))
    figure, axis = new_figure(size + 0.6, size)
    display = ConfusionMatrixDisplay(shares, display_labels=result["classes"])
    # up to the middle of the colours, on which black text is easy to read
    colours = {"cmap": "Blues", "im_kw": {"vmin": 0, "vmax": 2}, "text_kw": {"color": "black"}}
    display.plot(ax=axis, xticks_rotation=20 if len(shares) < 6 else 90, colorbar=False, **colours)
    for cell, text in np.ndenumerate(display.text_):
        text.set_text(f"{counts[cell]}\n{shares[cell]:.0%}")
    title = f"{result['split']}: {units(result)}, share of the row"
    axis.set(xlabel="predicted", ylabel="true", title=title)
    return figure


def draw_roc(result, y_true, p):
    from sklearn.metrics import roc_curve

    many = len(result["classes"]) > 8
    figure, axis = new_figure(8 if many else 4.8, 4.6)
    for k, name in enumerate(result["classes"]):
        auroc = result["auroc_per_class"][k]
        if auroc is not None:
            false_rate, true_rate, _ = roc_curve(y_true == k, p[:, k])
            axis.plot(false_rate, true_rate, label=f"{name}: {auroc:.3f}")
    axis.plot([0, 1], [0, 1], **GUIDE)
    axis.set(
        xlabel="false positives, share of the other classes",
        ylabel="true positives, share of the class",
        title=f"{result['split']}: ROC, each class against the rest",
    )
    beside = {"loc": "center left", "bbox_to_anchor": (1, 0.5), "fontsize": 7}
    if axis.get_legend_handles_labels()[0]:  # a class that is absent has no curve
        axis.legend(frameon=False, title="AUROC", **(beside if many else {"loc": "lower right"}))
    return figure


def draw_reliability(result):
    curves = {"as predicted": result["reliability"]}
    if "calibrated" in result:
        curves[f"temperature {result['temperature']:.2f}"] = result["calibrated"]["reliability"]
    figure, axis = new_figure(4.8, 4.6)
    axis.plot([0, 1], [0, 1], **GUIDE)
    for label, bins in curves.items():
        points = [[b[name] for b in bins] for name in ("confidence", "accuracy")]
        [line] = axis.plot(*points, label=label, linewidth=1)
        areas = [8 + 4 * b["count"] for b in bins]
        axis.scatter(*points, s=areas, color=line.get_color(), alpha=0.6)
    axis.set(
        xlim=(0, 1.03),
        ylim=(-0.03, 1.03),
        xlabel="probability of the answer",
        ylabel="share of right answers",
        title=f"{result['split']}: reliability (area: {units(result)})",
    )
    axis.legend(frameon=False, loc="upper left")
    return figure


def draw_epochs(axis, epochs, names):
    """Curves over the records of metrics.jsonl. names {label of the curve: key of the records};
    a record that lacks a key, for another version wrote it, leaves a gap."""
    for label, name in names.items():
        x, y = ([epoch.get(key, np.nan) for epoch in epochs] for key in ("epoch", name))
        axis.plot(x, y, label=label, marker=".")


def draw_training(epochs, best_epoch, num_classes):
    """Loss and balanced accuracy over the epochs."""
    figure, axes = new_figure(9, 3.4, columns=2)
    for axis, name in zip(axes, ("loss", "balanced_accuracy")):
        draw_epochs(axis, epochs, {part: f"{part}/{name}" for part in ("train", "val")})
        axis.axvline(best_epoch, **GUIDE | {"linestyle": "--"}, label="best checkpoint")
        axis.set(xlabel="epoch", title=name.replace("_", " "))
    axes[1].axhline(1 / num_classes, **GUIDE, label="one class for all")
    axes[1].legend(frameon=False)
    return figure


def draw_shares(epochs, classes):
    """How often each class is answered on validation over the epochs: a collapse is seen here."""
    figure, axis = new_figure(9, 3)
    draw_epochs(axis, epochs, {name: f"val/predicted_share_{k}" for k, name in enumerate(classes)})
    title = "validation: how often each class is answered, as a share"
    axis.set(xlabel="epoch", ylim=(-0.03, 1.03), title=title)
    axis.legend(frameon=False, ncols=min(len(classes), 5))
    return figure


def draw_leaderboard(results):
    """results {name: result}: balanced accuracy with its interval, on each run's chance band."""
    figure, axis = new_figure(7, 1.2 + 0.4 * len(results))
    for n, r in enumerate(results.values()):
        low, high = r["chance_band"]
        axis.barh(n, high - low, left=low, color="0.88")
        if clean(r, r["ci95"]["balanced_accuracy"]):
            axis.plot(r["ci95"]["balanced_accuracy"], [n, n], color="C0", linewidth=2)
        axis.plot(r["balanced_accuracy"], n, "o", color="C0")
    axis.set(xlabel="balanced accuracy", xlim=(0, 1))
    axis.set_yticks(range(len(results)), list(results))
    axis.invert_yaxis()
    return figure


def write_plots(folder, result, y_true, p):
    """plots/: confusion matrix, ROC and reliability of the split; and the course of training, where
    the folder has a metrics.jsonl. y_true (n,) and p (n, K): of the participants."""
    folder, split = pathlib.Path(folder), result["split"]
    figures = {
        f"confusion_{split}": draw_confusion(result),
        f"roc_{split}": draw_roc(result, y_true, p),
        f"reliability_{split}": draw_reliability(result),
    }
    if (folder / "metrics.jsonl").exists():
        epochs = read_history(folder / "metrics.jsonl")
        figures["training"] = draw_training(epochs, result["epoch"], len(result["classes"]))
        figures["shares"] = draw_shares(epochs, result["classes"])
    for name, figure in figures.items():
        files.write(folder / "plots" / f"{name}.png", png(figure))


def read_history(path):
    """metrics.jsonl -> the records of the epochs, dicts of numbers (None: undefined). ValueError
    where it holds anything else."""
    lines = files.content_of(path, "remove it").splitlines()
    records = [files.json_object(line, path, "remove it") for line in lines]
    for value in itertools.chain.from_iterable(record.values() for record in records):
        # an integer may be too large to be drawn
        if not (value is None or isinstance(value, int | float) and abs(value) < 1e100):
            raise ValueError(f"{path} is damaged ({str(value)[:40]} is no number); remove it")
    return records


# -------------------------------------------------------------------------------------------- pages


def render(template, **values):
    """A page of templates/. A value that is missing raises an error; HTML escapes every text."""
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(pathlib.Path(__file__).parent / "templates"),
        autoescape=jinja2.select_autoescape(),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    in_base64 = lambda image: base64.b64encode(image).decode()
    environment.filters |= {"number": number, "span": span, "json": json.dumps, "base64": in_base64}
    environment.filters |= {"markdown": markdown, "markdown_cell": markdown_cell}
    page = environment.get_template(template).render(values, report=sys.modules[__name__])
    # half of a surrogate pair, from a path whose bytes are no UTF-8, could not be written
    return page.encode(errors="backslashreplace").decode()


def markdown(text):
    """A text that Markdown shows as it is, also where a run's name has signs of markup, or begins
    as a heading, a list or a quotation does."""
    return re.sub(r"(\A[#>+=-]|[\\`*<&$|~\[\]])", r"\\\1", text)


def markdown_cell(text):
    """A cell of a Markdown table. A text with signs of markup stands in a code span, as it is but
    for the | that would end the cell."""
    if not re.search(r"[\\`*<&$|~\[\]]", text):
        return text
    longest = max(map(len, re.findall("`+", text)), default=0)
    fence, space = "`" * (longest + 1), " " * bool(longest)
    return fence + space + text.replace("|", "\\|") + space + fence


def latex(header, rows, caption):
    """A table for a paper, in the style of the package booktabs."""
    line = lambda cells: " & ".join(map(latex_text, cells)) + r" \\"
    return "\n".join(
        [
            r"\begin{table}",
            r"\centering",
            rf"\caption{{{latex_text(caption)}}}",
            rf"\begin{{tabular}}{{l{'c' * (len(header) - 1)}}}",
            r"\toprule",
            line(header),
            r"\midrule",
            *map(line, rows),
            r"\bottomrule",
            r"\end{tabular}",
            r"\end{table}",
            "",
        ]
    )


def latex_text(text):
    """A text that LaTeX shows as it is."""
    special = {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}
    special |= {sign: "\\" + sign for sign in "&%$#_{}"}
    special |= {"<": r"\textless{}", ">": r"\textgreater{}", "±": r"$\pm$"}
    return "".join(special.get(letter, letter) for letter in text)


def write_report(folder):
    """report.html: every eval_SPLIT.json of the folder with its plots, the course of training, the
    ledger and the provenance."""
    folder = pathlib.Path(folder)
    results = [
        read_result(folder, split)
        for split in ("test", "val")
        if (folder / f"eval_{split}.json").exists()
    ]
    # Results of last.pt are in a folder of their own, below the run's.
    provenances = [path / "provenance.json" for path in (folder, folder.parent)]
    provenances = [path for path in provenances if path.exists()]
    columns = ["participant_id", "split", "label", "volumes", "status", "reason"]
    page = render(
        "report.html",
        title=results[-1]["run"],
        results=results,
        pictures={path.stem: path.read_bytes() for path in folder.glob("plots/*.png")},
        classes=tuple(results[-1]["classes"]),
        splits=SPLITS,
        ledger=files.read_csv(folder / "ledger.csv", columns, "remove it, and run eval.py again"),
        provenance=files.read_json(provenances[0], "remove it") if provenances else {},
    )
    files.write(folder / "report.html", page)
