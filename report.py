"""Results as people see them: tables for the terminal, and the pages of templates/.

    print_result(result)                     # result: what eval_SPLIT.json holds
    write_plots(folder, result, y_true, p, others)   # folder/plots/: PNG, SVG and PDF
    write_report(folder)                     # folder/report.html, of what the folder holds
    render(template, **values)               # text of a page of templates/

A table is a pair (header, rows) of lists of texts. The HTML of the pages is in templates/. A page
is one file, with its pictures inside, which opens offline and on a phone.
"""

import base64
import functools
import itertools
import json
import pathlib
import re
import sys

import device
import feature_map
import figures
import files
import gallery
import metrics
import settings
import sweep
from findings import clean, number, sentences, span, tables, units, with_interval
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
    """The names without quadratic kappa where the classes have no order: it weighs a wrong answer
    by its distance from the true class."""
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
    """Balanced accuracy of every site, age band, scanner and eye, and of all others."""
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


def counted(result):
    """How much was scored, in words."""
    people = f" of {result['participants']} participants" if result["unit"] != "participant" else ""
    return f"{result['n']} {units(result)}{people}, {result['volumes']} volumes"


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
        f"{fitted(result)}{how_fitted(result)}, {result['data']}."
    )


def fitted(result):
    """Which of a run's heads it is."""
    has_epochs = result["mode"] not in settings.REFERENCES.values()
    return f"checkpoint of epoch {result['epoch']}" if has_epochs else result["mode"]


def how_fitted(result):
    """What else to know of the head of an epoch: that it was not trained, or refitted; or ""."""
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
    """What eval.py shows in a terminal: the sentence, the tables, what else was found, alarms."""
    printed = [score_table(result, metrics.SCORES), *tables(result, is_brief=True)]
    printed.append(class_table(result))
    printed += [group_table(result)] if result["subgroups"] else []
    print(f"\n{sentence(result)}\n")
    for table in printed:
        print(text_table(*table), end="\n\n")
    if "seeds" in result:
        print(seeds_line(result))
    for line in sentences(result):
        print(line)
    for volume in result["unreadable"]:
        print(f"unreadable: participant {volume['participant_id']}: {volume['reason']}")
    print("\n".join(f"ALARM: {alarm}" for alarm in result["alarms"]) or "no alarms")


# ---------------------------------------------------------------------------------------- pictures


def write_plots(folder, result, y_true, p, others):
    """plots/: the whole result in one figure, confusion matrix, ROC and reliability of the split;
    and the course of training and the sweep, where the folder has metrics.jsonl and sweep.csv.
    y_true (n,) and p (n, K): of the participants; others {name: result}: of looks.best."""
    folder, split = pathlib.Path(folder), result["split"]
    drawn = {
        f"summary_{split}": figures.draw_summary(result, others),
        f"confusion_{split}": figures.draw_confusion(result),
        f"roc_{split}": figures.draw_roc(result, y_true, p),
        f"reliability_{split}": figures.draw_reliability(result),
    }
    if (folder / "metrics.jsonl").exists():
        drawn |= draw_course(folder, result)
    if tried := sweep.read(folder):
        drawn["sweep"] = sweep.draw(tried)
    for name, figure in drawn.items():
        figures.save(folder / "plots", name, figure)


def draw_course(folder, result):
    """The figures of metrics.jsonl, the course of training -> {name: figure}; {} of kNN and
    logistic regression, which have none."""
    epochs = read_history(folder / "metrics.jsonl")
    if len(epochs) < 2:
        return {}
    return {
        "training": figures.draw_training(epochs, result["epoch"], result),
        "shares": figures.draw_shares(epochs, result["classes"]),
    }


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


def shown(value, keep=""):
    """A value as pages show it: without letters that turn the order of others, or are no text.
    keep: of these, those that stay."""
    is_text = isinstance(value, str) and not hasattr(value, "__html__")  # not a macro's HTML
    return device.printable(value, keep) if is_text else value


def render(template, **values):
    """A page of templates/. A value that is missing raises an error; HTML escapes every text."""
    import jinja2

    # in Markdown, what a macro gives is a text of several lines
    finalize = functools.partial(shown, keep="" if template.endswith(".html") else "\n\t")
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(pathlib.Path(__file__).parent / "templates"),
        autoescape=jinja2.select_autoescape(),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=finalize,
    )
    in_base64 = lambda image: base64.b64encode(image).decode()
    environment.filters |= {"number": number, "span": span, "json": json.dumps, "base64": in_base64}
    environment.filters |= {"markdown": markdown, "markdown_cell": markdown_cell}
    return environment.get_template(template).render(values, report=sys.modules[__name__])


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


# what an alarm is about, by its words: the section of the page that shows it
SHOWN_IN = {
    r"class .*(predicted|of the probability|in this split)|most frequent class": "classes",
    r"carries the result": "groups",
    r"not shown to be better|chance band within": "compared",
    r"training's participants|on training is|was saved within": "training",
    r"were trained on|have no volume|lack some|lateral differences|trained with": "participants",
}


def shown_in(alarm, split):
    """The id of the section that shows what an alarm of the split is about."""
    for words, section in SHOWN_IN.items():
        if re.search(words, alarm):
            return section if section in ("training", "participants") else f"{section}-{split}"
    return f"scores-{split}"


def summary_in_words(result):
    """What the figure of the whole result shows, for who cannot see it."""
    rows = {"one class for all": result["majority"]}
    rows |= {"covariates alone": result["covariates"]} if "covariates" in result else {}
    rows |= {f"probe on {name}": floor for name, floor in result.get("floors", {}).items()}
    beside = [f"{name} {number(row['balanced_accuracy'])}" for name, row in rows.items()]
    return f"{sentence(result)} Beside it: {', '.join(beside)}, and other runs of the task."


def pictures_of(folder):
    """{name: the bytes of plots/NAME.svg}. ValueError where one is no file."""
    again = "remove it, and run eval.py again"
    paths = sorted(folder.glob("plots/*.svg"))
    return {path.stem: files.content_of(path, again) for path in paths}


def write_report(folder):
    """report.html: every eval_SPLIT.json of the folder with its plots, the gallery of the first
    one, the course of training, the ledger and the provenance."""
    folder = pathlib.Path(folder)
    results = [
        read_result(folder, split)
        for split in ("test", "val")
        if (folder / f"eval_{split}.json").exists()
    ]
    # Results of last.pt are in a folder of their own, below the run's.
    provenances = [path / "provenance.json" for path in (folder, folder.parent)]
    provenances = [path for path in provenances if path.exists()]
    of_main = gallery.read(folder, results[0])
    columns = ["participant_id", "split", "label", "volumes", "status", "reason"]
    tried = sweep.read(folder)
    page = render(
        "report.html",
        title=results[0]["run"],
        feature_map=feature_map,
        swept=sweep.in_words(tried) if tried else "",
        results=results,
        pictures=pictures_of(folder),
        classes=tuple(results[0]["classes"]),
        splits=SPLITS,
        gallery=of_main,
        contents=gallery.contents(of_main) if of_main else "",
        ledger=files.read_csv(folder / "ledger.csv", columns, "remove it, and run eval.py again"),
        provenance=files.read_json(provenances[0], "remove it") if provenances else {},
    )
    files.write(folder / "report.html", page)
