"""How good is a run? Scores its best checkpoint on a split, with intervals, floors and alarms beside every number.

    python eval.py --ckpt runs/cls_single_domain_01 --split test
    python eval.py --ckpt runs/cls_single_domain_01/best_checkpoint_during_training.pt --split val
    python eval.py --leaderboard runs/*

Writes eval_SPLIT.json, predictions_SPLIT.csv, plots/*.png and report.html beside the checkpoint. A row of every table is
a participant: probabilities are averaged over both eyes and repeated scans.
"""

import argparse
import base64
import contextlib
import csv
import functools
import hashlib
import html
import io
import json
import math
import os
import shutil
import sys
import zipfile

import numpy as np
import torch
from tqdm import tqdm

import b2
import config
import data
import device
import metrics
import model

BEST = "best_checkpoint_during_training.pt"
CHANGEABLE = ("max_missing", "num_workers", "prefetch", "cache_gb", "fetch_deadline")  # keys of data: that do not change a score
FEATURES = "v1"  # part of every feature's key: change it with model.ViT3D.forward or model.pool
SCORE_NAMES = {"accuracy": "accuracy", "balanced_accuracy": "balanced accuracy", "macro_f1": "macro F1",
               "auroc_macro_ovr": "AUROC (macro, one vs rest)", "log_loss": "log-loss"}

# ----------------------------------------------------------------------------------- encoder -> features -> predictions


def open_encoder(cfg):
    """Encoder of the config, checked against it -> (encoder in eval mode, volume size (D, H, W), sha256 of its weights)."""
    try:
        path = b2.local(cfg.paths.checkpoint_path, cfg.paths.cache_dir, cfg.data.fetch_deadline)
    except FileNotFoundError:
        raise FileNotFoundError(f"paths.checkpoint_path={cfg.paths.checkpoint_path} is not there; put the pretrained encoder's file "
                                "there, or set paths.checkpoint_path") from None
    name = cfg.paths.checkpoint_path
    try:
        encoder = model.load_encoder(path, cfg.model.encoder)
    except ValueError as error:
        raise ValueError(str(error).replace(path, name)) from error
    dim = encoder.pos_embed.shape[-1]
    if dim != cfg.model.emb_dim:
        raise ValueError(f"model.emb_dim is {cfg.model.emb_dim}, but the encoder of {name} is {dim} wide; set model.emb_dim={dim}")
    size = cfg.data.image_size or encoder.image_size
    if size is None:
        raise ValueError(f"{name} does not say its image_size; set data.image_size=[depth, height, width]")
    encoder.check_size(size)
    if cfg.model.pool_method == "attentive" and any(n > most for n, most in zip(cfg.model.token_grid, encoder.grid(size))):
        raise ValueError(f"model.token_grid={cfg.model.token_grid} is finer than the encoder's tokens, {list(encoder.grid(size))}; set at most those")
    return encoder, tuple(size), model.weights_hash(encoder)


def pooled(cfg, tokens, grid):
    """Tokens (B, N, C) of a grid (d, h, w) -> what a head takes: features (B, C), or for an attentive head tokens (B, T, C) of model.token_grid."""
    if cfg.model.pool_method == "attentive":
        return model.pool_grid(tokens.float(), grid, cfg.model.token_grid, cfg.model.token_pool)
    return model.pool(tokens.float(), cfg.model.pool_method)


def shape_of(cfg):
    """Shape of what a head takes of a volume: (C,) or (T, C)."""
    return (*([math.prod(cfg.model.token_grid)] if cfg.model.pool_method == "attentive" else []), cfg.model.emb_dim)


def new_head(cfg, num_rows=0):
    """The config's head, not trained. num_rows: of the training features, which a kNN keeps."""
    dim, num_classes = cfg.model.emb_dim, len(data.CLASSES)
    if cfg.model.head.kind == "knn":
        return model.KNN(dim, num_classes, num_rows)
    return model.Head(dim, num_classes, cfg.model.head.hidden, cfg.model.head.dropout, cfg.model.pool_method == "attentive")


def encode(cfg, encoder, volume, dev):
    """Volume (1, D, H, W) -> its pooled feature (C,) or tokens (T, C), as numpy."""
    with torch.no_grad(), device.autocast(dev, cfg.train.precision):
        tokens = encoder(volume[None].to(dev).float())  # (1, 1, D, H, W) -> (1, N, C)
    feature = pooled(cfg, tokens, encoder.grid(volume.shape[-3:]))[0]
    device.step_done(dev)
    return feature.cpu().numpy()


def features(cfg, ledger, samples, encoder, size, encoder_hash, dev, view=0):
    """Pooled features -> (those of the samples that could be read, float32 (their number, C) or (their number, T, C) on the CPU), in order.

    Each volume is encoded once for ever: its feature is kept under cache_dir, keyed by encoder weights, pooling, precision,
    preprocessing and the volume's content. One volume at a time, so that a feature does not depend on its neighbours.
    Replicas share the work, and each ends with all features. view: 0 is the volume as it is, others are augmented.
    """
    rank, world = device.rank(), device.world()
    model.Attention.kernel = staticmethod(device.attention(dev, model.attend))
    volumes = data.Volumes(samples, size, cfg.paths.cache_dir, cfg.data.cache_gb, cfg.data.fetch_deadline)
    shape, dtype, pooling = shape_of(cfg), np.float32, cfg.model.pool_method
    if pooling == "attentive":  # tokens take a hundred times the room
        dtype, pooling = np.float16, f"tokens{'x'.join(map(str, cfg.model.token_grid))}{cfg.model.token_pool}"
    folder = os.path.join(volumes.cache_dir, "features", f"{encoder_hash[:16]}-{pooling}-{cfg.train.precision}-{FEATURES}")
    strength, transform = data.strengths(cfg), None
    if view:
        folder = os.path.join(folder, hashlib.sha256(f"{data.AUGMENTATION} {strength} {cfg.seed} {view}".encode()).hexdigest()[:16])
        transform = lambda key, volume: data.augment(volume, strength, f"{cfg.seed} view {view} {key}")

    b2.remove_abandoned(folder, 60)  # nobody takes so long to write a feature

    def kept(key):
        return None if key is None else data.load_array(os.path.join(folder, key + ".npy"), dtype, shape)

    mine = range(rank, len(samples), world)
    found = {i: feature for i in mine if (feature := kept(volumes.key(i))) is not None}
    todo = [i for i in mine if i not in found]
    encoded, struck_before = 0, len(ledger.unreadable)
    if cfg.model.pool_method == "attentive":
        print_room(folder, sum(device.gather(len(todo), dev)), shape)
    if todo:
        encoder.to(dev)
        with contextlib.closing(data.stream(volumes, ledger, todo, cfg, transform)) as arriving:
            for i, key, volume in tqdm(arriving, total=len(todo), desc=f"encode view {view}" if view else "encode", unit="volume", mininterval=0.5, disable=rank > 0):
                feature = kept(key)  # known, under another name or date
                if feature is None:
                    feature = encode(cfg, encoder, volume, dev).astype(dtype)
                    if not np.isfinite(feature).all():
                        raise ValueError(f"participant {samples[i].participant_id}: the encoder's features of {samples[i].path} are not finite")
                    data.save_array(os.path.join(folder, key + ".npy"), feature)
                    encoded += 1
                found[i] = feature

    # what the other replicas found: features, and volumes that cannot be read
    own = ledger.unreadable[struck_before:]
    index_of = {s.path: i for i, s in enumerate(samples)}
    lost = {}
    for part in device.gather([[index_of[s.path], reason] for s, reason in own], dev):
        lost |= {i: reason for i, reason in part}
    for i in sorted(lost):
        if samples[i].path not in {s.path for s, _ in own}:
            ledger.strike(samples[i], lost[i])
    data.check_missing(ledger, cfg.data.max_missing)
    x, count = torch.zeros(len(samples), *shape), torch.zeros(len(samples))
    for i, feature in found.items():
        x[i], count[i] = torch.from_numpy(feature), 1
    x, count = device.all_sum(x.to(dev)).cpu(), device.all_sum(count.to(dev)).cpu()
    rest = [i for i in range(len(samples)) if i not in lost]
    if not rest:
        raise ValueError("none of the volumes could be read")
    if count.tolist() != [float(i not in lost) for i in range(len(samples))]:
        raise RuntimeError("features and unreadable volumes do not add up to the volumes that were asked for")
    encoded = sum(device.gather(encoded, dev))
    print(f"features: {encoded} volumes encoded, {len(rest) - encoded} from {volumes.cache_dir}" + (f", {len(lost)} unreadable" if lost else ""))
    return [samples[i] for i in rest], x[rest]


def print_room(folder, number, shape):
    """Say how much disk the tokens of so many volumes will take; ValueError when that is not there."""
    need, there = number * 2 * math.prod(shape), os.path.dirname(folder)
    os.makedirs(there, exist_ok=True)
    free = shutil.disk_usage(there).free
    print(f"tokens: {number} volumes to encode, {shape[0]} x {shape[1]} float16 each: {need / 1e9:.2g} GB in {there}, {free / 1e9:.3g} GB free")
    if need > free:
        raise ValueError(f"{there} has no room for {need / 1e9:.3g} GB of tokens; set a smaller model.token_grid, or paths.cache_dir elsewhere")


def features_now(cfg, samples, encoder, size, dev, desc):
    """Pooled features (num_volumes, C), or (num_volumes, T, C), by an encoder that is being trained: nothing is kept, and every volume must be readable."""
    volumes = data.Volumes(samples, size, cfg.paths.cache_dir, cfg.data.cache_gb, cfg.data.fetch_deadline)
    mine = range(device.rank(), len(samples), device.world())
    x = torch.zeros(len(samples), *shape_of(cfg))
    encoder.eval()
    with contextlib.closing(data.stream(volumes, None, mine, cfg)) as arriving:
        for i, _, volume in tqdm(arriving, total=len(mine), desc=desc, unit="volume", mininterval=0.5, leave=False, disable=device.rank() > 0):
            x[i] = torch.from_numpy(encode(cfg, encoder, volume, dev))
    x = device.all_sum(x.to(dev)).cpu()
    if not torch.isfinite(x).all():
        raise ValueError(f"{desc}: the encoder's features are not finite any more; lower train.lr_encoder={cfg.train.lr_encoder}")
    return x


def predict(head, x):
    """Class probabilities (num_volumes, 4) of features x (num_volumes, C), as numpy."""
    head.eval()
    with torch.no_grad():
        return torch.softmax(head(x).float().cpu().double(), dim=1).numpy()


def by_participant(samples, probabilities):
    """Mean probability over a participant's volumes -> (ids, y_true (n,), probabilities (n, 4)), participants in order."""
    labels, places = {}, []
    for sample in samples:
        labels.setdefault(sample.participant_id, sample.label)
        places.append(sample.participant_id)
    place = {i: n for n, i in enumerate(labels)}
    places = [place[i] for i in places]
    sums = np.zeros((len(labels), probabilities.shape[1]))
    np.add.at(sums, places, probabilities)
    return list(labels), np.array(list(labels.values())), sums / np.bincount(places)[:, None]


def predictions_csv(ids, y_true, probabilities):
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(["participant_id", "y_true", *(f"p{k}" for k in range(probabilities.shape[1]))])
    writer.writerows([i, y, *p] for i, y, p in zip(ids, y_true.tolist(), probabilities.tolist()))
    return out.getvalue()


# ------------------------------------------------------------------------------------------------------- score a run


def open_run(ckpt, overrides=()):
    """A run's checkpoint (folder or .pt file) -> (its content, its configuration with overrides, path, folder for the results)."""
    fixed = [o for o in overrides if not o.startswith(("paths.", "device.", *(f"data.{key}=" for key in CHANGEABLE)))]
    if fixed:
        raise ValueError(f"{fixed[0]} would score something else than what was trained; only paths.*, device.* and "
                         f"{', '.join('data.' + key for key in CHANGEABLE)} can change now")
    path = os.path.join(ckpt, BEST) if os.path.isdir(ckpt) else ckpt
    if not os.path.isfile(path):
        raise FileNotFoundError(f"--ckpt {ckpt}: {path} is not there; train first, or name a run folder or its {BEST}")
    folder = os.path.dirname(os.path.abspath(path))
    if os.path.basename(path) != BEST:  # last.pt, say: its results must not pass for those of the best checkpoint
        folder = os.path.join(folder, os.path.splitext(os.path.basename(path))[0])
    saved = read_saved(path, {"config", "encoder_sha256", "train_participants", "labels_sha256", "head", "epoch", "val_predictions"})
    return saved, config.resolve(saved["config"], overrides, path), path, folder


def read_saved(path, keys):
    """What train.py saved, tensors mapped. ValueError when it is damaged (every byte is verified), or lacks one of the keys."""
    try:
        damaged = zipfile.ZipFile(path).testzip()
        if damaged:
            raise zipfile.BadZipFile(f"{damaged} is damaged")
        saved = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        missing = sorted(keys - set(saved))
        if missing:
            raise KeyError(", ".join(missing))
    except OSError:
        raise
    except Exception as error:  # torch, zip and pickle raise a dozen types for a file that is none of ours
        raise ValueError(f"{path} is not a checkpoint of this train.py: {type(error).__name__} {' '.join(str(error).split())[:200]}") from error
    return saved


def evaluate_run(ckpt, split, overrides=()):
    """Score a run's checkpoint (folder or .pt file) on a split, in every replica; rank 0 writes all beside it -> (result, folder)."""
    saved, cfg, path, folder = open_run(ckpt, overrides)
    check_config(saved["config"], os.path.join(os.path.dirname(os.path.abspath(path)), "config.yaml"))
    trained, trained_on = saved["encoder_sha256"], set(saved["train_participants"])
    encoder, size, encoder_hash = open_encoder(cfg)
    if encoder_hash != trained:
        raise ValueError(f"{cfg.paths.checkpoint_path} holds encoder {encoder_hash[:16]}, the head was trained on {trained[:16]}; "
                         "set paths.checkpoint_path to that one, or train again")
    try:
        if "encoder" in saved:  # fine-tuned
            encoder.load_state_dict(saved["encoder"], strict=True)
            encoder_hash = model.weights_hash(encoder)
        heads = [new_head(cfg, len(saved["head"].get("features", ()))) for _ in saved.get("repeats", [0])]
        for head, state in zip(heads, [repeat["head"] for repeat in saved.get("repeats", [saved])]):  # the first is the run's
            head.load_state_dict(state, strict=True)
    except RuntimeError as error:
        raise ValueError(f"{path}: not loaded: {' '.join(str(error).split())}") from error
    ledger = data.read_ledger(cfg)
    data.check_missing(ledger, cfg.data.max_missing)
    elsewhere = any(o.startswith("paths.data=") for o in overrides)
    if ledger.sha256[data.LABELS] != saved["labels_sha256"] and not elsewhere:
        raise ValueError(f"{data.LABELS} in {cfg.paths.data} is not the file that {path} was trained with; put that back, train again, or name the other data: paths.data=...")
    samples = ledger.of(split)
    if not samples:
        raise ValueError(f"no participant of split {split} has a volume")
    dev = device.get(cfg.device.backend)
    samples, x = features(cfg, ledger, samples, encoder, size, encoder_hash, dev)
    of_volumes, *other_heads = [predict(head, x) for head in heads]
    (ids, y_true, probabilities), *others = [by_participant(samples, p) for p in (of_volumes, *other_heads)]

    row_of = {r.participant_id: r for r in ledger.rows}
    labels_trained = [r.label for r in ledger.rows if r.participant_id in trained_on]
    prior = np.bincount(labels_trained, minlength=len(data.CLASSES)) / len(labels_trained) if labels_trained else None
    groups = {"site": [row_of[i].site for i in ids], "age": [age_band(row_of[i].age) for i in ids], "scanner": [cfg.data.scanner] * len(ids)}
    result = metrics.evaluate(y_true, probabilities, len(data.CLASSES), ids, prior, groups)
    volume_ids, volume_labels = [s.participant_id for s in samples], np.array([s.label for s in samples])
    result["subgroups"]["laterality"] = metrics.subgroups(volume_labels, of_volumes, [s.laterality for s in samples], ids=volume_ids)
    per_volume = metrics.evaluate(volume_labels, of_volumes, len(data.CLASSES), volume_ids)
    result["per_volume"] = {name: per_volume[name] for name in ("n", "participants", *metrics.SCORES, *metrics.MORE_SCORES, "ci95")}
    T = metrics.temperature(np.array(saved["val_predictions"]["y_true"]), saved["val_predictions"]["p"].numpy())
    flatter = metrics.rescale(probabilities, T)
    result |= {"temperature": T, "calibrated": {**{name: metrics.score(y_true, flatter)[name] for name in ("log_loss", "brier", "ece")},
                                                "reliability": metrics.reliability(y_true, flatter)}}
    if saved.get("train_balanced_accuracy") is not None:
        result["alarms"] += metrics.gap_alarm(saved["train_balanced_accuracy"], saved["val_balanced_accuracy"])
    if "floors" in saved:
        add_floors(result, saved["floors"], cfg, ledger, samples, size, dev, x, ids, y_true, probabilities)
    seen = sorted(trained_on & set(ids))
    if seen:
        result["alarms"].append(f"{len(seen)} participants of {split} were trained on: {data.few(seen)}")
    if ledger.missing(split):
        result["alarms"].append(f"{len(ledger.missing(split))} labelled participants of {split} have no volume and are not scored")
    partly = [r.participant_id for r in ledger.rows if r.split == split and r.status == "used" and r.reason]
    if partly:
        result["alarms"].append(f"{len(partly)} participants of {split} lack some of their volumes: {data.few(partly)}")
    if "optimizer" in saved and "val_loss" not in saved:
        result["alarms"].append(f"this checkpoint was saved within epoch {saved['epoch']}, after step {saved['step']}")
    if ledger.sha256[data.LABELS] != saved["labels_sha256"]:
        result["alarms"].append(f"{data.LABELS} is not the file that this run was trained with")
    predictions = predictions_csv(ids, y_true, probabilities)
    result |= {"labels_sha256": ledger.sha256[data.LABELS], "predictions_sha256": hashlib.sha256(predictions.encode()).hexdigest()}
    result = {"split": split, "run": cfg.log.run_name, "epoch": saved["epoch"], "volumes": len(samples),
              "data": ledger.description, "encoder_sha256": encoder_hash, **result}
    if others:
        each = [metrics.score(y_true, p) for p in (probabilities, *(p for _, _, p in others))]
        values = {name: [score[name] for score in each] for name in metrics.SCORES}
        result["seeds"] = {"seeds": [repeat["seed"] for repeat in saved["repeats"]],
                           **{name: {"mean": float(np.mean(v)), "sd": float(np.std(v, ddof=1)), "each": v} for name, v in values.items() if None not in v}}
    result["unreadable"] = [{"participant_id": s.participant_id, "path": s.path, "reason": reason} for s, reason in ledger.unreadable]
    if device.rank() == 0:
        update_ledger(os.path.join(folder, "ledger.csv"), ledger, split)
        b2.write(os.path.join(folder, f"predictions_{split}.csv"), predictions)
        b2.write(os.path.join(folder, f"eval_{split}.json"), json.dumps(result, indent=1) + "\n")
        write_plots(folder, result)
        write_report(folder)
    return result, folder


def check_config(trained, path):
    """ValueError when the run's config.yaml is not what its checkpoint was trained with."""
    if not os.path.exists(path):
        return
    with open(path, encoding="utf-8") as f:
        written = config.parse(f.read(), path)
    old, new = config.flatten(trained), config.flatten(written if isinstance(written, dict) else {})
    changed = [f"{key} {old.get(key)} -> {new.get(key)}" for key in {**old, **new} if old.get(key) != new.get(key)]
    if changed:
        raise ValueError(f"{path} is not what this checkpoint was trained with: {'; '.join(changed[:5])}; set that back, or train again")


def age_band(age):
    """Age in years, as text -> its decade as text; "unknown" where it is no number."""
    try:
        decade = int(float(age)) // 10 * 10
    except ValueError:
        return "unknown"
    return f"{decade} to {decade + 9}"


def random_encoder(cfg):
    """An encoder of the pretrained one's shape with random weights, its size and hash, as open_encoder gives them."""
    encoder, size, _ = open_encoder(cfg)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(cfg.seed)
        other = model.ViT3D(encoder.pos_embed.shape[-1], len(encoder.blocks), encoder.pos_embed.shape[1], encoder.blocks[0].mlp.fc1.out_features, encoder.patch_size)
    return other.eval(), size, model.weights_hash(other)


def add_floors(result, floors, cfg, ledger, samples, size, dev, x, ids, y_true, probabilities):
    """Score the heads of eval.floors beside the run's -> result["floors"], and an alarm where the run is not shown to be better."""
    result["floors"] = {}
    for name, state in floors.items():
        head = new_head(cfg, len(state.get("features", ())))
        head.load_state_dict(state, strict=True)
        if name == "random encoder":
            encoder, _, encoder_hash = random_encoder(cfg)
            again, x_floor = features(cfg, ledger, samples, encoder, size, encoder_hash, dev)
            if len(again) < len(samples):
                raise ValueError(f"a volume that could be read before cannot be read now: {data.unreadable_table(ledger).splitlines()[-1]}")
        else:
            x_floor = x
        p = by_participant(samples, predict(head, x_floor))[2]
        score = metrics.evaluate(y_true, p, len(data.CLASSES), ids)
        pair = metrics.compare(y_true, probabilities, p, ids)
        result["floors"][name] = {**{key: score[key] for key in metrics.SCORES}, "ci95": {key: score["ci95"][key] for key in metrics.SCORES},
                                  "difference": pair["difference"], "difference_ci95": pair["ci95"], "p_value": pair["p_value"]}
        if pair["p_value"] >= 0.05 or pair["difference"] <= 0:
            result["alarms"].append(f"not shown to be better than the same probe on {'a random encoder' if name == 'random encoder' else name}: balanced accuracy "
                                    f"{result['balanced_accuracy']:.3f} against {score['balanced_accuracy']:.3f}, p = {pair['p_value']:.3f}")


def update_ledger(path, ledger, split):
    """Write what was found of the split's participants into the run's ledger; the other rows stay as training left them."""
    earlier = {}
    if os.path.exists(path):
        with open(path, encoding="utf-8", newline="") as f:
            earlier = {row[0]: row for row in csv.reader(f)}
    out = io.StringIO()
    rows = csv.reader(io.StringIO(data.ledger_csv(ledger)))
    csv.writer(out, lineterminator="\n").writerows(row if row[1] == split else earlier.get(row[0], row) for row in rows)
    b2.write(path, out.getvalue())


def score_rows(result):
    """[name, score, 95 % interval, majority class, chance band] of every score, as text."""
    def number(value):
        return "-" if value is None else f"{value:.3f}"

    def span(pair):
        return "-" if pair is None else f"{pair[0]:.3f} to {pair[1]:.3f}"

    return [[SCORE_NAMES[name], number(result[name]), span(result["ci95"][name]), number(result["majority"][name]), span(result["chance"][name])]
            for name in metrics.SCORES]


def class_rows(result):
    """[class, participants, predicted, F1] of every class, as text."""
    return [[name, str(result["true_counts"][k]), str(result["predicted_counts"][k]), f"{result['f1_per_class'][k]:.3f}"]
            for k, name in enumerate(data.CLASS_NAMES)]


SCORE_HEADER = ["", "score", "95 % interval", "majority class", "chance band"]
CLASS_HEADER = ["class", "participants", "predicted", "F1"]


def sentence(result):
    return (f"{result['run']} on {result['split']}: balanced accuracy {result['balanced_accuracy']:.3f} "
            f"(95 % interval {result['ci95']['balanced_accuracy'][0]:.3f} to {result['ci95']['balanced_accuracy'][1]:.3f}; "
            f"chance band {result['chance_band'][0]:.3f} to {result['chance_band'][1]:.3f}), "
            f"{result['n']} participants, {result['volumes']} volumes, checkpoint of epoch {result['epoch']}, {result['data']}.")


def print_table(result):
    def lines(header, rows):
        widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
        return ["  ".join(cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths))) for row in [header, *rows]]

    print(f"\n{sentence(result)}\n")
    print("\n".join([*lines(SCORE_HEADER, score_rows(result)), "", *lines(CLASS_HEADER, class_rows(result))]))
    if "seeds" in result:
        spread = result["seeds"]["balanced_accuracy"]
        print(f"\nover seeds {', '.join(map(str, result['seeds']['seeds']))}: balanced accuracy {spread['mean']:.3f} ± {spread['sd']:.3f} "
              f"({', '.join(f'{v:.3f}' for v in spread['each'])}); the table is of the first")
    for lost in result["unreadable"]:
        print(f"unreadable: participant {lost['participant_id']}: {lost['reason']}")
    for alarm in result["alarms"]:
        print(f"ALARM: {alarm}")
    if not result["alarms"]:
        print("no alarms")


# --------------------------------------------------------------------------------------------------- plots and report


def write_plots(folder, result):
    """plots/confusion_SPLIT.png and plots/training.png (from metrics.jsonl, where the folder has one)."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    def save(figure, name):
        out = io.BytesIO()
        figure.savefig(out, format="png", dpi=110, bbox_inches="tight")
        plt.close(figure)
        b2.write(os.path.join(folder, "plots", name), out.getvalue())

    counts = np.array(result["confusion_matrix"])
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    figure, axis = plt.subplots(figsize=(5.2, 4.6))
    image = axis.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    for (i, j), count in np.ndenumerate(counts):
        axis.text(j, i, f"{count}\n{shares[i, j]:.0%}", ha="center", va="center", color="white" if shares[i, j] > 0.5 else "black")
    axis.set(xticks=range(len(counts)), yticks=range(len(counts)), xlabel="predicted", ylabel="true",
             title=f"{result['split']}: participants, share of the row")
    axis.set_xticklabels(data.CLASS_NAMES, rotation=20)
    axis.set_yticklabels(data.CLASS_NAMES)
    figure.colorbar(image, fraction=0.046)
    save(figure, f"confusion_{result['split']}.png")

    history = os.path.join(folder, "metrics.jsonl")
    if not os.path.exists(history):
        return
    with open(history, encoding="utf-8") as f:
        epochs = [json.loads(line) for line in f]
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.4))
    for axis, name, title in ((axes[0], "loss", "loss"), (axes[1], "balanced_accuracy", "balanced accuracy")):
        for part in ("train", "val"):
            axis.plot([e["epoch"] for e in epochs], [e[f"{part}/{name}"] for e in epochs], label=part)
        axis.axvline(result["epoch"], color="grey", linewidth=0.8, linestyle="--", label="best checkpoint")
        axis.set(xlabel="epoch", title=title)
    axes[1].axhline(1 / len(data.CLASSES), color="grey", linewidth=0.8, linestyle=":", label="one class for all")
    axes[1].legend(frameon=False)
    save(figure, "training.png")


def write_report(folder):
    """report.html: every eval_SPLIT.json of the folder, with its plots inside; opens offline."""
    def table(header, rows):
        cells = [[html.escape(cell) for cell in row] for row in [header, *rows]]
        head = "".join(f"<th>{c}</th>" for c in cells[0])
        body = "".join(f"<tr><th>{row[0]}</th>" + "".join(f"<td>{c}</td>" for c in row[1:]) + "</tr>" for row in cells[1:])
        return f'<div class="wide"><table><tr>{head}</tr>{body}</table></div>'

    def picture(name, alt):
        path = os.path.join(folder, "plots", name)
        if not os.path.exists(path):
            return ""
        with open(path, "rb") as f:
            return f'<img alt="{html.escape(alt)}" src="data:image/png;base64,{base64.b64encode(f.read()).decode()}">'

    parts = []
    for split in ("test", "val"):
        path = os.path.join(folder, f"eval_{split}.json")
        if not os.path.exists(path):
            continue
        with open(path, encoding="utf-8") as f:
            result = json.load(f)
        alarms = "".join(f'<li class="alarm">{html.escape(a)}</li>' for a in result["alarms"]) or "<li>no alarms</li>"
        parts += [f"<h2>{split}</h2><p><b>{html.escape(sentence(result))}</b></p><ul>{alarms}</ul>",
                  table(SCORE_HEADER, score_rows(result)), table(CLASS_HEADER, class_rows(result)),
                  picture(f"confusion_{split}.png", f"confusion matrix of {split}: {result['confusion_matrix']}")]
        name = result["run"]
    page = f"""<!doctype html><html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{html.escape(name)}</title><style>
body {{ font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: auto; padding: 1rem; color: #222; background: #fff }}
table {{ border-collapse: collapse; margin: 1rem 0 }} th, td {{ padding: .25rem .7rem; border-bottom: 1px solid #ddd; text-align: right }}
th:first-child {{ text-align: left }} img {{ max-width: 100%; height: auto }} .wide {{ overflow-x: auto }} .alarm {{ color: #a00; font-weight: bold }}
</style><h1>{html.escape(name)}</h1>{"".join(parts)}
<h2>training</h2>{picture("training.png", "loss and balanced accuracy of train and val over the epochs")}</html>
"""
    b2.write(os.path.join(folder, "report.html"), page)


def leaderboard(folders):
    """Rank the runs by balanced accuracy on test; writes leaderboard.md and .csv beside the first -> text of the table. ValueError without any."""
    scored, without = [], []
    for folder in folders:
        path = os.path.join(folder, "eval_test.json")
        if os.path.exists(path):
            with open(path, encoding="utf-8") as f:
                scored.append((os.path.basename(os.path.abspath(folder)), json.load(f)))
        elif os.path.isdir(folder):
            without.append(folder)
    if not scored:
        raise ValueError(f"--leaderboard: none of {', '.join(folders)} holds an eval_test.json; run eval.py --ckpt RUN --split test first")
    scored.sort(key=lambda run: (-run[1]["balanced_accuracy"], run[1]["log_loss"]))
    header = ["run", "balanced accuracy", "95 % interval", "chance band", "majority class", "log-loss", "participants", "alarms", "encoder", "data"]
    rows = [[name, f"{r['balanced_accuracy']:.3f}", *(" to ".join(f"{v:.3f}" for v in pair) for pair in (r["ci95"]["balanced_accuracy"], r["chance_band"])),
             f"{r['majority']['balanced_accuracy']:.3f}", f"{r['log_loss']:.3f}", str(r["n"]), str(len(r["alarms"])), r["encoder_sha256"][:12], r["data"]] for name, r in scored]
    text = "\n".join("| " + " | ".join(row) + " |" for row in [header, ["---"] * len(header), *rows]) + "\n"
    text += "".join(f"\n{name}: ALARM: {alarm}" for name, r in scored for alarm in r["alarms"]) + "".join(f"\nnot scored on test: {folder}" for folder in without)
    beside = os.path.dirname(os.path.abspath(folders[0]))
    table = io.StringIO()
    csv.writer(table, lineterminator="\n").writerows([header, *rows])
    b2.write(os.path.join(beside, "leaderboard.csv"), table.getvalue())
    b2.write(os.path.join(beside, "leaderboard.md"), text.rstrip() + "\n")
    return text


def main(rank, cfg, ckpt, split, overrides):
    """The job, in every replica."""
    result, folder = evaluate_run(ckpt, split, overrides)
    print_table(result)
    print(f"report: {os.path.join(os.path.relpath(folder), 'report.html')}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--ckpt", help="run folder, or a checkpoint file in it")
    what.add_argument("--leaderboard", nargs="+", metavar="RUN", help="run folders, to rank by balanced accuracy on test")
    parser.add_argument("--split", choices=("val", "test"), default="test")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="such as paths.data=ELSEWHERE")
    args = parser.parse_intermixed_args()
    sys.stdout.reconfigure(line_buffering=True)  # in step with the progress bar also where the output is a file

    def job():
        if args.leaderboard:
            print(leaderboard(args.leaderboard))
            return
        cfg = open_run(args.ckpt, args.overrides)[1]
        device.launch(functools.partial(main, ckpt=args.ckpt, split=args.split, overrides=args.overrides), cfg)
    device.run(job)
