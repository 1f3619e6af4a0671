"""What eval.py found beside the scores, in words and tables: floors, covariates, what the features
know, other class shares, looks at the test set.

    tables(result)       # [(header, rows), ...] of texts; result: what eval_SPLIT.json holds
    sentences(result)

Validation chose head and epoch, so its own score is that of the best of many: an interval around it
would say that it is not. `clean` leaves such intervals out.
"""

from confounding import in_words

CURVES = {"balanced_accuracy": "balanced accuracy", "log_loss": "log-loss"}
CHOSEN = "Head and epoch were chosen on this split, as the best of many"


def number(value):
    return "-" if value is None else f"{value:.3f}"


def span(interval):
    return "-" if interval is None else f"{interval[0]:.3f} to {interval[1]:.3f}"


def clean(result, interval):
    """The interval; None where the run was chosen on what it is of."""
    return None if result["split"] == "val" else interval


def with_span(value, interval):
    """A score in words, with its interval where it has one."""
    return number(value) + (f" ({span(interval)})" if interval else "")


def with_interval(result, value, interval):
    """A score in words, with its interval where that is `clean`."""
    return with_span(value, clean(result, interval))


def units(result):
    """What was scored, in the plural."""
    return result["unit"] + "s"


def covariates(result):
    """The covariates of a result in words."""
    return in_words(result["covariates"]["columns"])


# ----------------------------------------------------------------------------------------- tables


def tables(result, is_brief=False):
    """All that the result has, in order. is_brief: no wider than a terminal."""
    shown = [floor_table(result)] if "floors" in result or "covariates" in result else []
    makers = {"knows": knows_table, "prevalence": prevalence_table, "learning_curve": curve_table}
    shown += [make(result) for name, make in makers.items() if name in result]
    if is_brief and "prevalence" in result:  # without the precision of every class
        header, rows = prevalence_table(result)
        shown[shown.index((header, rows))] = header[:4], [row[:4] for row in rows]
    return shown


def floor_table(result):
    """What the run is to be better than: the probes of eval.floors, and covariates."""
    header = ["compared with", "balanced accuracy", "95 % interval"]
    header += ["this run is above by", "95 % interval", "p"]
    floors = {f"probe on {name}": floor for name, floor in result.get("floors", {}).items()}
    if "covariates" in result:
        floors[f"{covariates(result)} alone"] = result["covariates"]
    rows = [
        [
            name,
            number(floor["balanced_accuracy"]),
            span(clean(result, floor["ci95"]["balanced_accuracy"])),
            number(floor["difference"]),
            span(clean(result, floor["difference_ci95"])),
            "-" if result["split"] == "val" else f"{floor['p_value']:.4f}",
        ]
        for name, floor in floors.items()
    ]
    return header, rows


def knows_table(result):
    """What eval.probes predicted from the features."""
    header = ["predicted from the features", "n", "balanced accuracy", "95 % interval", "chance"]
    rows = [
        [
            f"{what} ({len(found['values'])} values)",
            str(found["n"]),
            number(found["balanced_accuracy"]),
            span(found["ci95"]),
            number(found["chance"]),
        ]
        for what, found in result["knows"].items()
    ]
    return header, rows


def prevalence_table(result):
    """The scores at other class shares."""
    names = {"accuracy": "accuracy", "macro_f1": "macro F1", "log_loss": "log-loss"}
    header = ["at the class shares of", *names.values()]
    header += [f"precision {name}" for name in result["classes"]]
    rows = [
        [
            f"{name} ({percent(found['shares'])})",
            *(number(found[key]) for key in names),
            *map(number, found["precision_per_class"]),
        ]
        for name, found in result["prevalence"].items()
    ]
    return header, rows


def curve_table(result):
    """The score over the number of participants (train.fractions), and as far as the formula goes
    beyond."""
    found = result["learning_curve"]
    header = ["training participants", "subsets"]
    header += ["balanced accuracy", "95 % interval", "log-loss", "95 % interval"]
    rows = []
    for size in found["sizes"]:
        cells = [str(size["participants"]), str(size["subsets"])]
        for score in (size["balanced_accuracy"], size["log_loss"]):
            cells += [number(score["mean"]), span(score["ci95"])]
        rows.append(cells)
    laws = [found[name]["formula"] for name in CURVES]
    beyond = zip(*(law["extrapolated"] if law else [{}] * 2 for law in laws)) if any(laws) else []
    for points in beyond:
        people = next(p["participants"] for p in points if p)
        cells = [f"{people} (extrapolated)", "-"]
        for point in points:
            cells += [number(point.get("value")), span(point.get("ci95"))]
        rows.append(cells)
    return header, rows


def percent(shares):
    return " / ".join(f"{share:.0%}" for share in shares)


# -------------------------------------------------------------------------------------- sentences


def sentences(result):
    """All that the result has, in order; then why other things are left out."""
    makers = {"covariates": adds_line, "label_shift": shift_line, "looks": looks_line}
    lines = [make(result) for name, make in makers.items() if name in result]
    lines += curve_lines(result) if "learning_curve" in result else []
    return [*filter(None, lines), *(f"note: {note}" for note in result.get("notes", []))]


def curve_lines(result):
    """What was fitted to the scores over the number of participants, or why nothing was."""
    found = result["learning_curve"]
    n = found["sizes"][-1]["participants"]
    for name in CURVES:
        law, words = found[name]["formula"], CURVES[name]
        if law:
            sign = "-" if law["b"] >= 0 else "+"
            yield (
                f"{words} of n participants: {law['a']:.3f} {sign} {abs(law['b']):.3f} (n / {n})^"
                f"-{law['c']:.2f}, fitted; beyond {n} participants extrapolated, not measured"
            )
        else:
            yield f"{words}: nothing is extrapolated, for {found[name]['reason']}"


def adds_line(result):
    adds = result["covariates"].get("adds")
    if not adds:
        return ""

    def gain(name):
        found = adds[name]
        return f"{found['difference']:.3f} ({span(found['ci95'])}), p = {found['p_value']:.4f}"

    return (
        f"what the eye adds to {covariates(result)}, in a model of both fitted on validation: "
        f"log-loss (mean over the classes) lower by {gain('log_loss')}; balanced accuracy higher "
        f"by {gain('balanced_accuracy')}"
    )


def shift_line(result):
    shift = result["label_shift"]
    each = zip(result["classes"], shift["estimated"], shift["ci95"], shift["true"])
    estimates = [
        f"{name} {share:.0%} ({low:.0%} to {high:.0%}; true: {true:.0%})"
        for name, share, (low, high), true in each
    ]
    return (
        f"class shares of {result['split']} as the predictions alone tell them (Saerens et al. "
        f"2002, from probabilities calibrated for validation's {percent(shift['validation'])}): "
        f"{', '.join(estimates)}"
    )


def looks_line(result):
    looks = result["looks"]
    unread = f" ({looks['unreadable']} more could not be read)" if looks["unreadable"] else ""
    if looks["runs"] == 1:
        return (
            "when this was written, no other run beside this one was scored on this test set"
            f"{unread}"
        )
    return (
        f"{looks['runs']} runs of this folder were scored on this test set{unread}: were they "
        f"equally good, the best would be above its worth by {looks['optimism']:.3f} on average, "
        "or less, for their errors are related; a run that was chosen by test needs another test "
        "set"
    )
