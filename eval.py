"""How good is a run? Scores its best checkpoint on a split, with intervals, floors and alarms.

    python eval.py --ckpt runs/cls_single_domain_01 --split test
    python eval.py --ckpt runs/cls_single_domain_01/last.pt --split val
    python eval.py --compare runs/cls_single_domain_01 runs/cls_multi_domain   # which is better?
    python eval.py --compare runs/A runs/B --power    # how many participants would show it?
    python eval.py --leaderboard runs/*                                        # ranks all runs
    python eval.py --ckpt runs/cls_demo --split all --export features.npz      # for other programs
    python eval.py --ckpt runs/cls_demo --open            # and show the report in a browser
    python eval.py --ckpt runs/cls_demo --no-images       # a report without any image of an eye
    python eval.py --ckpt runs/cls_demo --explain 1001    # where it looks: explain_1001.html

The first two write eval_SPLIT.json, predictions_SPLIT.csv, gallery_SPLIT.json (pictures of eyes:
eval.gallery), plots/ and report.html beside the checkpoint; comparisons read these. --compare also
writes comparison.html in runs/, --leaderboard leaderboard.md, .csv, .html and .tex, with their
figures in runs/comparison/ and runs/leaderboard/.
A row is a participant (or an eye or a volume: data.unit): probabilities are averaged over all
volumes, of both eyes and repeated scans.
"""

if __name__ in ("__main__", "__mp_main__"):
    import begin

    begin.process()

import argparse
import functools
import json
import math
import os
import pathlib
import sys
import webbrowser

import numpy as np

import compare
import confounding
import curve
import device
import explain
import feature_map
import features
import files
import gallery
import given
import heads
import leaderboard
import ledger
import loader
import looks
import losses
import metrics
import prevalence
import references
import report
import results
import runs
import settings
import shortcuts
import stages
import versus


def evaluate_run(ckpt, split, overrides=()):
    """Score a run's checkpoint on a split, in every replica; rank 0 writes all beside it.

    ckpt: the run's folder, a .pt file in it, or what runs.open_checkpoint gave for the same
    overrides. -> (result, the content of eval_SPLIT.json; folder of the results). ValueError when
    checkpoint, encoder and data do not belong together.
    """
    opened, encoder, banks, book, changed = open_run(ckpt, overrides, split, "score")
    saved, cfg = opened.saved, opened.cfg
    samples = book.of(split)
    if not samples:
        raise ValueError(f"no participant of split {split} has a volume")

    stages.plan(ahead(opened, book, split))
    dev = device.get(cfg.device.backend)
    found = features.encode(cfg, book, samples, encoder, dev, earlier=saved["scans"])
    volumes = [heads.predict(bank, found.x)[0] for bank in banks]  # (volumes, K) by each head
    predictions, *of_other_seeds = [heads.by_unit(found.samples, p) for p in volumes]

    table = runs.predictions_csv(predictions)
    result = identity(opened, encoder, book, split) | {
        "volumes": len(found.samples),
        "predictions_sha256": files.hashed(table),
        **score(opened, book, found.samples, volumes[0], predictions),
    }
    if "val_predictions" in saved:  # not in a checkpoint that was saved within an epoch
        result |= calibrate(saved["val_predictions"], predictions)
    if "floors" in saved:
        result["floors"] = score_floors(opened, book, found, split, encoder, dev, predictions)
    if of_other_seeds:
        result["seeds"] = score_seeds(saved["repeats"], [predictions, *of_other_seeds])
    result |= what_else(opened, book, found, encoder, dev, predictions, split)
    others, unreadable = looks.others(opened, result)
    if split == "test":
        result["looks"] = looks.count(others, unreadable, result)
    if "curve" in saved:
        result["learning_curve"] = curve.score(saved["curve"], cfg, found)
    mapped, notes = feature_map.examine(opened, book, found, encoder, dev)
    if mapped:
        result["feature_map"] = mapped.found
    result["notes"] += notes
    result["alarms"] += alarms(opened, book, result, predictions, changed)
    result["unreadable"] = [
        {"participant_id": s.participant_id, "path": s.path, "reason": reason}
        for s, reason in book.unreadable
    ]
    result = results.sealed(result)
    cards = gallery.make(opened, book, samples, found, predictions, encoder, banks[0], dev)
    if device.rank() == 0:
        if mapped:  # first, for the page shows it
            feature_map.write(pathlib.Path(opened.folder), split, mapped)
        write(opened, book, result, table, predictions, cards, others)
    return result, opened.folder


def identity(opened, encoder, book, split):
    """What a result is of: the run, its data and encoder, and the hashes that make it comparable ->
    parts of eval_SPLIT.json."""
    saved, cfg = opened.saved, opened.cfg
    return {
        "split": split,
        "run": cfg.log.run_name,
        "epoch": saved["epoch"],
        "refit": split == "test" and "refit" in saved,
        "data": book.description,
        "task": cfg.data.task or cfg.data.columns.label,
        "ordered": cfg.data.ordered,
        "unit": cfg.data.unit,
        "volumes_asked": ledger.volumes_asked(cfg),
        "encoder": encoder_name(cfg),
        "mode": settings.mode(cfg),
        "encoder_sha256": encoder.sha256,
        "pretrained_sha256": saved["encoder_sha256"],
        "checkpoint_sha256": files.sha256(opened.path),
        "labels_sha256": book.sha256["labels"],
    }


def ahead(opened, book, split):
    """The stages of `evaluate_run`, for stages.plan."""
    numbers = [len(book.of(split))]
    numbers += numbers * ("random encoder" in opened.saved.get("floors", {}))
    numbers += [len(book.of("train"))] * opened.cfg.eval.probes
    encoding = [("encoding", math.ceil(n / device.world())) for n in numbers]
    return [*encoding, ("scores and report", 0)]


# ----------------------------------------------------------------------- the model and its features


def open_run(ckpt, overrides, split, job):
    """-> runs.Opened, the Encoder, the banks of `load_model`, the Ledger, and changed_tables.
    ckpt: as in `evaluate_run`. ValueError where replicas were started for another job."""
    opened = ckpt if isinstance(ckpt, runs.Opened) else runs.open_checkpoint(ckpt, overrides)
    runs.check_config(opened)
    encoder, banks = load_model(opened, split)
    book = ledger.read(opened.cfg)
    ledger.check(book, opened.cfg.data.max_missing)
    dev = device.get(opened.cfg.device.backend)
    runs.agree(opened.cfg, book, encoder, dev, f"{job} {split}", opened.path)
    return opened, encoder, banks, book, changed_tables(opened, book, overrides)


def load_model(opened, split):
    """The Encoder, and a bank of one head for every one of train.seeds, as it scores the split; the
    first is the run's."""
    saved, cfg = opened.saved, opened.cfg
    encoder, trained = features.open_encoder(cfg), saved["encoder_sha256"]
    if encoder.sha256 != trained:
        raise ValueError(
            f"{loader.described(cfg)} is encoder {encoder.sha256[:16]}, the head was "
            f"trained on {trained[:16]}; set paths.checkpoint_path to that one, or train again"
        )
    try:
        if "encoder" in saved:  # fine-tuned
            encoder.module.load_state_dict(saved["encoder"], strict=True)
            encoder.sha256 = loader.hash_of(encoder.module)
        states = [runs.head_of(repeat, split) for repeat in saved.get("repeats", [saved])]
        banks = [references.load(state, cfg) for state in states]
    except RuntimeError as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{opened.path}: not loaded: {reason}") from error
    return encoder, banks


def encoder_name(cfg):
    """What the encoder is called in a table: its file, without folder and ending."""
    path = cfg.paths.features or cfg.paths.checkpoint_path or cfg.model.loader
    name = os.path.splitext(os.path.basename(path.rstrip("/")))[0]
    return f"{name} ({cfg.model.encoder})" if cfg.model.encoder != "context" else name


def changed_tables(opened, book, overrides):
    """Names of the tables that are not what the run was trained with. ValueError when there are any
    and the user did not ask for other data."""
    cfg, saved = opened.cfg.data, opened.saved
    names = {"labels": cfg.labels, "manifest": cfg.manifest}
    changed = [n for key, n in names.items() if book.sha256[key] != saved[f"{key}_sha256"]]
    others = ("paths.data=", "data.labels=", "data.participants=", "data.manifest=")
    if changed and not any(override.startswith(others) for override in overrides):
        raise ValueError(
            f"{' and '.join(changed)} in {opened.cfg.paths.data} changed since {opened.path} was "
            "trained; put that back, train again, or name the other data: paths.data=..."
        )
    return changed


# ------------------------------------------------------------------------------------------- scores


def score(opened, book, samples, volumes, predictions):
    """Scores with intervals, floors, groups and alarms, of the participants; and of the volumes.

    samples, volumes (n, K): of the volumes, which predictions average over the participants.
    """
    cfg, num_classes = opened.cfg, len(book.classes)
    row_of = {row.unit: row for row in book.rows}
    trained = [row_of[i].label for i in opened.saved["train_participants"] if i in row_of]
    prior = asked = None  # the shares of the classes in training, and those that it asks for
    if trained:
        prior = np.bincount(trained, minlength=num_classes) / len(trained)
        chosen = opened.saved.get("sweep", {})  # settings of the head, of those that were tried
        scheme, loss = (
            chosen.get(name, getattr(cfg.train, name)) for name in ("class_weights", "loss")
        )
        asked = losses.asked_shares(trained, num_classes, scheme, loss, cfg.data.sampler)
    groups = {}
    if cfg.data.columns.site is not None:
        groups["site"] = [row_of[i].site for i in predictions.ids]
    if cfg.data.columns.age is not None:
        groups["age"] = [age_band(row_of[i].age) for i in predictions.ids]
    if cfg.data.manifest is not None and cfg.data.scanner is not None:
        groups["scanner"] = [cfg.data.scanner] * len(predictions.ids)
    people = predictions.participants
    result = metrics.evaluate(
        predictions.y_true, predictions.p, num_classes, people, prior, groups, book.classes, asked
    )
    ids, labels = [s.participant_id for s in samples], np.array([s.label for s in samples])
    if cfg.data.columns.eye is not None:
        sides = [s.laterality for s in samples]
        of_sides = metrics.subgroups(labels, volumes, sides, num_classes, ids)
        result["subgroups"]["laterality"] = of_sides
    scores = metrics.score_with_intervals(labels, volumes, num_classes, ids)
    names = ("n", "participants", *report.SCORE_NAMES, "ci95")
    result["per_volume"] = {name: scores[name] for name in names}
    return result


def age_band(age):
    """Age in years, as text -> its decade as text; "unknown" where it is no number."""
    try:
        decade = int(float(age)) // 10 * 10
    except (ValueError, OverflowError):  # the latter of an infinite number
        return "unknown"
    return f"{decade} to {decade + 9}"


def calibrate(validation, predictions):
    """Fit a temperature to the checkpoint's validation, and score the predictions with it."""
    T = metrics.temperature(np.array(validation["y_true"]), validation["p"].numpy())
    p = metrics.rescale(predictions.p, T)
    scores = metrics.score(predictions.y_true, p, p.shape[1])
    calibrated = {name: scores[name] for name in ("log_loss", "brier", "ece")}
    calibrated["reliability"] = metrics.reliability(predictions.y_true, p)
    return {"temperature": T, "calibrated": calibrated}


def score_floors(opened, book, found, split, encoder, dev, predictions):
    """The probes of eval.floors, each compared with the run -> {name: scores}."""
    cfg, y_true, people = opened.cfg, predictions.y_true, predictions.participants
    floors = {}
    for name, floor in opened.saved["floors"].items():
        x, state = found.x, runs.head_of(floor, split)
        if name == "random encoder":
            other = features.random_encoder(encoder, cfg.seed)
            x = features.encode(cfg, book, found.samples, other, dev, again=True).x
        p = heads.by_unit(found.samples, heads.predict(references.load(state, cfg), x)[0]).p
        scores = metrics.score_with_intervals(y_true, p, p.shape[1], people)
        pair = metrics.compare(y_true, predictions.p, p, people)
        floors[name] = {
            **{key: scores[key] for key in report.SCORE_NAMES},
            "ci95": {key: scores["ci95"][key] for key in metrics.SCORES},
            "difference": pair["difference"],
            "difference_ci95": pair["ci95"],
            "p_value": pair["p_value"],
        }
    return floors


def what_else(opened, book, found, encoder, dev, predictions, split):
    """What a reader asks of the scores: how much can be known without the eye; what else the
    features tell; the scores at other class shares -> parts of eval_SPLIT.json."""
    parts = [
        confounding.examine(opened, book, predictions, split),
        prevalence.examine(opened, book, predictions, split),
    ]
    if opened.cfg.eval.probes:
        parts.append(shortcuts.examine(opened, book, found, encoder, dev))
    more = {"notes": [note for _, notes in parts for note in notes]}
    for part, _ in parts:
        more |= part
    return more


def score_seeds(repeats, predictions):
    """Mean and standard deviation of the scores over train.seeds, of the Predictions of each."""
    scores = [
        metrics.score(of_seed.y_true, of_seed.p, of_seed.p.shape[1]) for of_seed in predictions
    ]
    seeds = {"seeds": [repeat["seed"] for repeat in repeats]}
    for name in metrics.SCORES:
        values = [of_seed[name] for of_seed in scores]
        if None not in values:
            mean, sd = float(np.mean(values)), float(np.std(values, ddof=1))
            seeds[name] = {"mean": mean, "sd": sd, "each": values}
    return seeds


def alarms(opened, book, result, predictions, changed):
    """What a reader must know besides the alarms of metrics.evaluate -> list of sentences."""
    saved, split, found = opened.saved, result["split"], []
    if "val_predictions" not in saved:
        step = f"epoch {saved['epoch']}, after step {saved['step']}"
        found.append(f"this checkpoint was saved within {step}")
    found += training_alarms(saved)
    for name, floor in result.get("floors", {}).items():
        if floor["p_value"] >= 0.05 or floor["difference"] <= 0:
            what = "a random encoder" if name == "random encoder" else name
            found.append(
                f"not shown to be better than the same probe on {what}: balanced accuracy "
                f"{result['balanced_accuracy']:.3f} against {floor['balanced_accuracy']:.3f}, "
                f"p = {floor['p_value']:.3f}"
            )
    found += confounding.alarms(result)
    person_of = {row.unit: row.participant_id for row in book.rows}
    trained = {person_of.get(unit, unit) for unit in saved["train_participants"]}
    scored = [saved, *saved.get("repeats", []), *saved.get("floors", {}).values()]
    if split == "test" and any("refit" in entry for entry in scored):
        trained |= set(saved["val_predictions"]["participant_id"])
    seen = sorted(trained & set(predictions.participants))
    if seen:
        names = files.first_few(seen)
        found.append(f"{len(seen)} participants of {split} were trained on: {names}")
    found += book.near_copies
    missing = book.missing(split)
    if missing:
        found.append(
            f"{len(missing)} labelled participants of {split} have no volume and are not scored"
        )
    used = [row for row in book.rows if row.split == split and row.status == "used"]
    partly = [row.unit for row in used if row.reason]
    if partly:
        names = files.first_few(partly)
        found.append(f"{len(partly)} participants of {split} lack some of their volumes: {names}")
    if changed:
        found.append(
            f"{' and '.join(changed)} of {opened.cfg.paths.data} "
            f"{'is' if len(changed) == 1 else 'are'} not what this run was trained with"
        )
    return found


def training_alarms(saved):
    """What a checkpoint's counts of training's answers (progress.training_tables) say -> list of
    sentences."""
    tables, found = saved.get("training", {}), []
    if "left_out" in tables:
        y, p = np.array(saved["val_predictions"]["y_true"]), saved["val_predictions"]["p"].numpy()
        of_validation = metrics.confusion(y, p.argmax(axis=1), p.shape[1])
        found += metrics.gap_alarm(tables["left_out"], of_validation)
    if "trained" in tables:
        found += metrics.below_chance(np.array(tables["trained"]))
    return found


# ------------------------------------------------------------------------------------------ writing


def write(opened, book, result, table, predictions, cards, others):
    """All files of a result in the run's folder. table: predictions_SPLIT.csv, of predictions;
    cards: of gallery.make; others: runs of looks.others."""
    folder, split = pathlib.Path(opened.folder), result["split"]
    # should the rest fail, for it is of another result
    (folder / "report.html").unlink(missing_ok=True)
    update_ledger(folder / "ledger.csv", book, split)
    files.write(folder / f"predictions_{split}.csv", table)
    files.write(folder / f"eval_{split}.json", json.dumps(result, indent=1) + "\n")
    gallery.save(folder, result, cards)
    beside = looks.best(others, split)
    report.write_plots(folder, result, predictions.y_true, predictions.p, beside)
    if "learning_curve" in result:
        curve.write(folder, result)
    report.write_report(folder)


def update_ledger(path, book, split):
    """Write what was found of the split's participants into the run's ledger; the other rows stay
    as training left them."""
    header, *rows = ledger.rows_for_csv(book)
    earlier, key = {}, "unit" if "unit" in header else "participant_id"
    if path.exists():
        table = files.read_csv(path, header, "remove it, and it is made anew")
        earlier = {row[key]: [row[name] for name in header] for row in table}
    key_at, split_at = header.index(key), header.index("split")
    rows = [row if row[split_at] == split else earlier.get(row[key_at], row) for row in rows]
    files.write(path, files.csv_text([header, *rows]))


def export(rank, cfg, ckpt, split, path, overrides):
    """Write the features of a run's volumes (split "all": of every split) to a features.npz, in
    every replica."""
    opened, encoder, _, book, _ = open_run(ckpt, overrides, split, "export")
    samples = [s for s in book.samples if split in ("all", s.split)]
    dev = device.get(opened.cfg.device.backend)
    found = features.encode(opened.cfg, book, samples, encoder, dev)
    if rank == 0:
        given.write(path, found.samples, found.x.numpy(), opened.cfg)
    print(f"exported: {path}, {len(found.samples)} volumes, x {tuple(found.x.shape)}")


def explain_participant(rank, cfg, ckpt, split, participant, overrides):
    """Write explain_PARTICIPANT.html into the run's folder, in every replica. split: the one that
    the participant must be in; "all": any."""
    opened, encoder, _, book, _ = open_run(ckpt, overrides, split, f"explain {participant}")
    path = explain.write(opened, book, encoder, participant, split)
    print(f"explained: {os.path.relpath(path)}")


def main(rank, cfg, ckpt, split, overrides):
    """Score a run's checkpoint on a split and print the result, in every replica: the job that
    device.launch calls with rank and cfg, as it calls `export` and `explain_participant`."""
    result, folder = evaluate_run(ckpt, split, overrides)
    report.print_result(result)
    print(f"report: {os.path.join(os.path.relpath(folder), 'report.html')}")
    compare_with = ["--compare", os.path.relpath(folder), "OTHER_RUN", "--split", split]
    print(f"next: {runs.command_line('eval.py', *compare_with)}")


def arguments():
    """The arguments of the command, with `split` filled in. ValueError where two contradict each
    other."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--ckpt", help="run folder, or a checkpoint file in it")
    what.add_argument("--compare", nargs="+", metavar="RUN", help="two or more run folders")
    what.add_argument("--leaderboard", nargs="+", metavar="RUN", help="run folders, to be ranked")
    parser.add_argument("--power", action="store_true", help="of --compare: how many are needed")
    parser.add_argument(
        "--split",
        choices=("val", "test", "train", "all"),
        help="which participants, by default test; of --explain, by default any",
    )
    parser.add_argument("--export", metavar="FILE", help="write the features of --ckpt, .npz")
    parser.add_argument("--open", action="store_true", help="of --ckpt: report.html in a browser")
    parser.add_argument(
        "--explain",
        metavar="PARTICIPANT",
        help="write explain_PARTICIPANT.html: what speaks for the answer of --ckpt, and where",
    )
    parser.add_argument(
        "--no-images",
        action="store_true",
        help="of --ckpt: leave no image of an eye in report.html and gallery_SPLIT.json, as "
        "eval.gallery=0 does; of --compare: none in comparison.html",
    )
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="section.key=value",
        help="of --ckpt, such as paths.data=ELSEWHERE",
    )
    args = parser.parse_intermixed_args()
    for name, what in {"export": "a file", "explain": "a participant"}.items():
        if getattr(args, name) == "":
            raise ValueError(f"--{name} is empty; name {what}")
    args.split = args.split or ("all" if args.explain else "test")
    if args.split in ("train", "all") and not (args.export or args.explain):
        raise ValueError(f"--split {args.split} is for --export and --explain; score val or test")
    for name in ("export", "explain", "open"):
        if getattr(args, name) and not args.ckpt:
            raise ValueError(f"--{name} is about one run; name it with --ckpt")
    if args.no_images and args.leaderboard:
        raise ValueError("--no-images is of --ckpt or --compare: no leaderboard has images of eyes")
    if bool(args.export) + bool(args.explain) + args.no_images > 1:
        raise ValueError("--export, --explain and --no-images are different jobs; give one of them")
    if args.open and (args.export or args.explain):
        raise ValueError("--open opens report.html, which --export and --explain do not write")
    if args.power and not args.compare:
        raise ValueError("--power is of a comparison; name two runs with --compare")
    return args


def command():
    args = arguments()
    sys.stdout.reconfigure(line_buffering=True)  # in step with the progress bar in a file, too
    if device.rank() and not args.ckpt:
        return  # of the replicas that torchrun started, one compares what is written
    if args.compare:
        found = compare.open_runs(args.compare, args.split, args.power)
        print(compare.in_words(found))
        print(f"written: {versus.write(found, not args.no_images)}")
    elif args.leaderboard:
        print(leaderboard.leaderboard(args.leaderboard, args.split))
    else:
        overrides = args.overrides + (["eval.gallery=0"] if args.no_images else [])
        opened = runs.open_checkpoint(args.ckpt, overrides)
        cfg = opened.cfg
        # A single process goes on with what is open. Several are spawned, and open the checkpoint
        # for themselves: its tensors are mapped from the file, which is cheaper than sending them.
        is_alone = cfg.device.processes == 1 and device.choose(cfg.device.backend) != "xla"
        ckpt = opened if is_alone else args.ckpt
        what = {"ckpt": ckpt, "split": args.split, "overrides": overrides}
        job = functools.partial(main, **what)
        if args.export:
            job = functools.partial(export, path=args.export, **what)
        if args.explain:
            job = functools.partial(explain_participant, participant=args.explain, **what)
        device.launch(job, cfg)
        if args.open and device.rank() == 0:
            show(os.path.join(opened.folder, "report.html"))


def show(page):
    """Open a page in the user's browser, which is theirs to choose (BROWSER)."""
    if not webbrowser.open(pathlib.Path(page).absolute().as_uri()):
        raise ValueError(f"--open: no browser could be started; set BROWSER, or open {page}")


if __name__ == "__main__":
    device.run(command)
