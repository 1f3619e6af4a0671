"""How good is a run? Scores its best checkpoint on a split, with intervals, floors and alarms beside every number.

    python eval.py --ckpt runs/cls_single_domain_01 --split test
    python eval.py --ckpt runs/cls_single_domain_01/best_checkpoint_during_training.pt --split val
    python eval.py --compare runs/cls_single_domain_01 runs/cls_multi_domain     # which is better, by how much, how sure
    python eval.py --leaderboard runs/*                                          # leaderboard.md, .csv, .html in runs/

The first two write eval_SPLIT.json, predictions_SPLIT.csv, plots/*.png and report.html beside the checkpoint; the others read
these. A row of every table is a participant: probabilities are averaged over both eyes and repeated scans.
"""

import argparse
import base64
import contextlib
import csv
import functools
import hashlib
import html
import io
import itertools
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
FEATURES = "v2"  # part of every feature's key: change it with model.ViT3D.forward or model.pool
SCORE_NAMES = {"accuracy": "accuracy", "balanced_accuracy": "balanced accuracy", "macro_f1": "macro F1",
               "auroc_macro_ovr": "AUROC (macro, one vs rest)", "log_loss": "log-loss", "macro_precision": "macro precision",
               "macro_recall": "macro recall", "auprc_macro_ovr": "AUPRC (macro, one vs rest)",
               "quadratic_kappa": "quadratic kappa", "brier": "Brier score", "ece": "expected calibration error"}

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
        raise ValueError(f"model.token_grid={cfg.model.token_grid} is finer than the encoder's tokens, {list(encoder.grid(size))}; "
                         "set at most those")
    return encoder, tuple(size), model.weights_hash(encoder)


def pooled(cfg, tokens, grid):
    """Tokens (B, N, C) of a grid (d, h, w) -> what a head takes: features (B, C), or for an attentive head tokens (B, T, C)
    of model.token_grid."""
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
    """Volume (1, D, H, W) -> its pooled feature (C,) or tokens (T, C) on dev, which may still be computing it."""
    with torch.no_grad(), device.autocast(dev, cfg.train.precision):
        tokens = encoder(device.send(volume[None], dev).float())  # (1, 1, D, H, W) -> (1, N, C)
    feature = pooled(cfg, tokens, encoder.grid(volume.shape[-3:]))[0]
    device.step_done(dev)
    return feature


def encode_all(cfg, encoder, arriving, dev):
    """(i, key, volume (1, D, H, W)) of every volume that arrives -> (i, key, feature (C,) or (T, C) as numpy), in order.

    A feature is waited for when the next volume is on its way, so that an accelerator does not wait for the host.
    """
    begun = ((i, key, encode(cfg, encoder, volume, dev)) for i, key, volume in arriving)
    for (i, key, feature), _ in itertools.pairwise(itertools.chain(begun, [None])):
        yield i, key, feature.cpu().numpy()


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

    def unknown(arriving):
        for i, key, volume in arriving:
            feature = kept(key)  # of the same content under another name or date
            if feature is None:
                yield i, key, volume
            else:
                found[i] = feature

    mine = range(rank, len(samples), world)
    found = {i: feature for i in mine if (feature := kept(volumes.key(i))) is not None}
    todo = [i for i in mine if i not in found]
    encoded, struck_before = 0, len(ledger.unreadable)
    if cfg.model.pool_method == "attentive":
        print_room(folder, sum(device.gather(len(todo), dev)), shape)
    if todo:
        encoder.to(dev)
        with contextlib.closing(data.stream(volumes, ledger, todo, cfg, transform)) as arriving:
            bar = tqdm(arriving, total=len(todo), desc=f"encode view {view}" if view else "encode", unit="volume",
                       mininterval=0.5, disable=rank > 0)
            for i, key, feature in encode_all(cfg, encoder, unknown(bar), dev):
                found[i] = feature.astype(dtype)
                if not np.isfinite(found[i]).all():
                    raise ValueError(f"participant {samples[i].participant_id}: "
                                     f"the encoder's features of {samples[i].path} are not finite")
                data.save_array(os.path.join(folder, key + ".npy"), found[i])
                encoded += 1

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
    print(f"features: {encoded} volumes encoded, {len(rest) - encoded} from {volumes.cache_dir}"
          + (f", {len(lost)} unreadable" if lost else ""))
    return [samples[i] for i in rest], x[rest]


def features_again(cfg, ledger, samples, encoder, size, encoder_hash, dev, view=0):
    """`features` of samples that could all be read before -> their features. ValueError when one cannot be read now."""
    again, x = features(cfg, ledger, samples, encoder, size, encoder_hash, dev, view)
    if len(again) < len(samples):
        raise ValueError(f"a volume that could be read before cannot be read now: {data.unreadable_table(ledger).splitlines()[-1]}")
    return x


def print_room(folder, number, shape):
    """Say how much disk the tokens of so many volumes will take; ValueError when that is not there."""
    need, there = number * 2 * math.prod(shape), os.path.dirname(folder)
    os.makedirs(there, exist_ok=True)
    free = shutil.disk_usage(there).free
    print(f"tokens: {number} volumes to encode, {shape[0]} x {shape[1]} float16 each: "
          f"{need / 1e9:.2g} GB in {there}, {free / 1e9:.3g} GB free")
    if need > free:
        raise ValueError(f"{there} has no room for {need / 1e9:.3g} GB of tokens; "
                         "set a smaller model.token_grid, or paths.cache_dir elsewhere")


def features_now(cfg, samples, encoder, size, dev, desc):
    """Pooled features (num_volumes, C), or (num_volumes, T, C), by an encoder that is being trained: nothing is kept, and every
    volume must be readable."""
    volumes = data.Volumes(samples, size, cfg.paths.cache_dir, cfg.data.cache_gb, cfg.data.fetch_deadline)
    mine = range(device.rank(), len(samples), device.world())
    x = torch.zeros(len(samples), *shape_of(cfg))
    encoder.eval()
    with contextlib.closing(data.stream(volumes, None, mine, cfg)) as arriving:
        bar = tqdm(arriving, total=len(mine), desc=desc, unit="volume", mininterval=0.5, leave=False, disable=device.rank() > 0)
        for i, _, feature in encode_all(cfg, encoder, bar, dev):
            x[i] = torch.from_numpy(feature)
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
    saved = read_saved(path, {"config", "encoder_sha256", "train_participants", "labels_sha256", "manifest_sha256", "head", "epoch"})
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
        raise ValueError(f"{path} is not a checkpoint of this train.py: "
                         f"{type(error).__name__} {' '.join(str(error).split())[:200]}") from error
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
    changed = [name for name, key in ((data.LABELS, "labels_sha256"), (data.MANIFEST, "manifest_sha256"))
               if ledger.sha256[name] != saved[key]]
    if changed and not any(o.startswith("paths.data=") for o in overrides):
        raise ValueError(f"{' and '.join(changed)} in {cfg.paths.data} changed since {path} was trained; "
                         "put that back, train again, or name the other data: paths.data=...")
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
    groups = {"site": [row_of[i].site for i in ids], "age": [age_band(row_of[i].age) for i in ids],
              "scanner": [cfg.data.scanner] * len(ids)}
    result = metrics.evaluate(y_true, probabilities, len(data.CLASSES), ids, prior, groups)
    volume_ids, volume_labels = [s.participant_id for s in samples], np.array([s.label for s in samples])
    result["subgroups"]["laterality"] = metrics.subgroups(volume_labels, of_volumes, [s.laterality for s in samples], ids=volume_ids)
    per_volume = metrics.score_with_intervals(volume_labels, of_volumes, len(data.CLASSES), volume_ids)
    result["per_volume"] = {name: per_volume[name] for name in ("n", "participants", *metrics.SCORES, *metrics.MORE_SCORES, "ci95")}
    if "val_predictions" in saved:  # not in what was saved within an epoch
        T = metrics.temperature(np.array(saved["val_predictions"]["y_true"]), saved["val_predictions"]["p"].numpy())
        flatter = metrics.rescale(probabilities, T)
        score = metrics.score(y_true, flatter)
        result |= {"temperature": T, "calibrated": {**{name: score[name] for name in ("log_loss", "brier", "ece")},
                                                    "reliability": metrics.reliability(y_true, flatter)}}
    else:
        result["alarms"].append(f"this checkpoint was saved within epoch {saved['epoch']}, after step {saved['step']}")
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
    if changed:
        result["alarms"].append(f"{' and '.join(changed)} of {cfg.paths.data} {'is' if len(changed) == 1 else 'are'} "
                                "not what this run was trained with")
    predictions = predictions_csv(ids, y_true, probabilities)
    result = {"split": split, "run": cfg.log.run_name, "epoch": saved["epoch"], "volumes": len(samples), "data": ledger.description,
              "scanner": cfg.data.scanner, "anatomic_region": cfg.data.anatomic_region, "encoder_sha256": encoder_hash,
              "checkpoint_sha256": b2.sha256(path), "labels_sha256": ledger.sha256[data.LABELS],
              "predictions_sha256": hashlib.sha256(predictions.encode()).hexdigest(), **result}
    if others:
        each = [metrics.score(y_true, p) for p in (probabilities, *(p for _, _, p in others))]
        values = {name: [score[name] for score in each] for name in metrics.SCORES}
        result["seeds"] = {"seeds": [repeat["seed"] for repeat in saved["repeats"]],
                           **{name: {"mean": float(np.mean(v)), "sd": float(np.std(v, ddof=1)), "each": v}
                              for name, v in values.items() if None not in v}}
    result["unreadable"] = [{"participant_id": s.participant_id, "path": s.path, "reason": reason} for s, reason in ledger.unreadable]
    if device.rank() == 0:
        update_ledger(os.path.join(folder, "ledger.csv"), ledger, split)
        b2.write(os.path.join(folder, f"predictions_{split}.csv"), predictions)
        b2.write(os.path.join(folder, f"eval_{split}.json"), json.dumps(result, indent=1) + "\n")
        write_plots(folder, result, y_true, probabilities)
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
        other = model.ViT3D(encoder.pos_embed.shape[-1], len(encoder.blocks), encoder.pos_embed.shape[1],
                            encoder.blocks[0].mlp.fc1.out_features, encoder.patch_size)
    return other.eval(), size, model.weights_hash(other)


def add_floors(result, floors, cfg, ledger, samples, size, dev, x, ids, y_true, probabilities):
    """Score the heads of eval.floors beside the run's -> result["floors"], and an alarm where the run is not shown to be better."""
    result["floors"] = {}
    for name, state in floors.items():
        head = new_head(cfg, len(state.get("features", ())))
        head.load_state_dict(state, strict=True)
        if name == "random encoder":
            encoder, _, encoder_hash = random_encoder(cfg)
            x_floor = features_again(cfg, ledger, samples, encoder, size, encoder_hash, dev)
        else:
            x_floor = x
        p = by_participant(samples, predict(head, x_floor))[2]
        score = metrics.score_with_intervals(y_true, p, len(data.CLASSES), ids)
        pair = metrics.compare(y_true, probabilities, p, ids)
        result["floors"][name] = {**{key: score[key] for key in metrics.SCORES + metrics.MORE_SCORES},
                                  "ci95": {key: score["ci95"][key] for key in metrics.SCORES},
                                  "difference": pair["difference"], "difference_ci95": pair["ci95"], "p_value": pair["p_value"]}
        if pair["p_value"] >= 0.05 or pair["difference"] <= 0:
            result["alarms"].append("not shown to be better than the same probe on "
                                    f"{'a random encoder' if name == 'random encoder' else name}: balanced accuracy "
                                    f"{result['balanced_accuracy']:.3f} against {score['balanced_accuracy']:.3f}, "
                                    f"p = {pair['p_value']:.3f}")


def update_ledger(path, ledger, split):
    """Write what was found of the split's participants into the run's ledger; the other rows stay as training left them."""
    earlier = {row["participant_id"]: list(row.values()) for row in read_csv(path)} if os.path.exists(path) else {}
    out = io.StringIO()
    rows = csv.reader(io.StringIO(data.ledger_csv(ledger)))
    csv.writer(out, lineterminator="\n").writerows(row if row[1] == split else earlier.get(row[0], row) for row in rows)
    b2.write(path, out.getvalue())


def read_csv(path):
    with open(path, encoding="utf-8", newline="") as f:
        return list(csv.DictReader(f))


# ------------------------------------------------------------------------------------------------------- compare runs


def open_results(folder, split):
    """What eval.py wrote of a run on a split -> {"result", "ids", "y_true", "probabilities"}.

    ValueError when the files do not belong together.
    """
    again = f"run eval.py --ckpt {folder} --split {split}"
    path = os.path.join(folder, f"eval_{split}.json")
    if not os.path.isfile(path):
        raise FileNotFoundError(f"{folder} has no eval_{split}.json; {again}")
    with open(path, encoding="utf-8") as f:
        try:
            result = json.load(f)
        except ValueError as error:
            raise ValueError(f"{path} is damaged ({error}); {again}") from error
    if result.get("split") != split:
        raise ValueError(f"{path} is about split {result.get('split')}; {again}")
    table, checkpoint = os.path.join(folder, f"predictions_{split}.csv"), os.path.join(folder, BEST)
    if not os.path.isfile(table) or b2.sha256(table) != result.get("predictions_sha256"):
        raise ValueError(f"{table} is not what {path} was computed from; {again}")
    if os.path.isfile(checkpoint) and b2.sha256(checkpoint) != result.get("checkpoint_sha256"):
        raise ValueError(f"{checkpoint} is not the checkpoint that {path} is about; {again}")
    rows = read_csv(table)
    return {"result": result, "ids": [row["participant_id"] for row in rows], "y_true": [int(row["y_true"]) for row in rows],
            "probabilities": np.array([[float(row[f"p{k}"]) for k in range(len(data.CLASSES))] for row in rows])}


def unlike(name_a, a, name_b, b):
    """How the participants or labels of two results of open_results differ, in words; None: they can be compared."""
    label_a, label_b = (dict(zip(run["ids"], run["y_true"])) for run in (a, b))
    only = [(name, sorted(mine.keys() - other.keys()))
            for name, mine, other in ((name_a, label_a, label_b), (name_b, label_b, label_a)) if mine.keys() - other.keys()]
    if only:
        return "other participants: " + "; ".join(f"{len(ids)} only in {name} ({data.few(ids, 3)})" for name, ids in only)
    relabelled = sorted(i for i in label_a if label_a[i] != label_b[i])
    if relabelled:
        return (f"other labels: participant {relabelled[0]} is of class {label_a[relabelled[0]]} in {name_a} "
                f"and {label_b[relabelled[0]]} in {name_b} ({len(relabelled)} such)")
    if a["result"]["labels_sha256"] != b["result"]["labels_sha256"]:
        return (f"other labels: {data.LABELS} of {name_a} (sha256 {a['result']['labels_sha256'][:12]}) "
                f"is not that of {name_b} ({b['result']['labels_sha256'][:12]})")
    return None


def names_of(folders):
    """{name: folder}: the last part of each path, or the whole path where two share that."""
    lasts = [os.path.basename(os.path.abspath(folder)) for folder in folders]
    return {last if lasts.count(last) == 1 else folder: folder for last, folder in zip(lasts, folders)}


def paired(runs):
    """metrics.compare_all of {name: what open_results gives}, all of the same participants."""
    first = next(iter(runs.values()))
    row = {name: {i: n for n, i in enumerate(run["ids"])} for name, run in runs.items()}  # in the first run's order
    return metrics.compare_all(first["y_true"], {name: run["probabilities"][[row[name][i] for i in first["ids"]]]
                                                 for name, run in runs.items()}, first["ids"])


def compare(folders, split):
    """Is one run better than another? -> text: the runs, and a sentence for every pair.

    ValueError when they were not scored on the same.
    """
    if len(set(map(os.path.realpath, folders))) < max(2, len(folders)):
        raise ValueError("--compare needs two or more different run folders")
    runs = {name: open_results(folder, split) for name, folder in names_of(folders).items()}
    (first_name, first), *rest = runs.items()
    for name, run in rest:
        difference = unlike(first_name, first, name, run)
        if difference:
            raise ValueError(f"{first_name} and {name} cannot be compared on {split}, for they have {difference}")
    pairs, results = paired(runs), {name: run["result"] for name, run in runs.items()}
    lines = [f"{split}, {len(first['ids'])} participants, {first['result']['data']}", "",
             *table_lines(["", "balanced accuracy", "95 % interval", "chance band", "alarms"],
                          [[name, number(r["balanced_accuracy"]), span(r["ci95"]["balanced_accuracy"]), span(r["chance_band"]),
                            str(len(r["alarms"]))] for name, r in results.items()]), ""]
    seen_through = {(r["scanner"], r["anatomic_region"]) for r in results.values()}
    if len(seen_through) > 1:
        lines.append("note: these runs saw other volumes of the same participants: "
                     f"{'; '.join(sorted(', '.join(pair) for pair in seen_through))}")
    for pair in pairs:
        lines += [f"{pair['sentence']}.",
                  (f"    McNemar's test of accuracy: {pair['only_a_right']} right only by {pair['a']}, "
                   f"{pair['only_b_right']} only by {pair['b']}, p = {pair['mcnemar_p']:.4f}")]
    lines += [f"ALARM: {name}: {alarm}" for name, r in results.items() for alarm in r["alarms"]]
    return "\n".join(lines)


def leaderboard(folders, split):
    """Rank the runs by balanced accuracy; writes leaderboard.md, .csv and .html beside the first -> text. ValueError without any."""
    absent = [folder for folder in folders if not os.path.exists(folder)]
    if absent:
        raise FileNotFoundError(f"--leaderboard: {absent[0]} is not there; name run folders")
    folders = [folder for folder in folders if os.path.isdir(folder)]  # runs/* also has leaderboard.md and the like
    scored = [folder for folder in folders if os.path.exists(os.path.join(folder, f"eval_{split}.json"))]
    if not scored:
        raise ValueError(f"--leaderboard: no folder holds an eval_{split}.json; run eval.py --ckpt RUN --split {split} first")
    runs = {name: open_results(folder, split) for name, folder in names_of(scored).items()}
    runs = dict(sorted(runs.items(), key=lambda run: (-run[1]["result"]["balanced_accuracy"], run[1]["result"]["log_loss"])))
    # one run of other participants does not end the comparison of all others
    alike = max(({name: run for name, run in runs.items() if not unlike(one, runs[one], name, run)} for one in runs), key=len)
    best = next(iter(alike))
    apart = {name: unlike(best, runs[best], name, run) for name, run in runs.items() if name not in alike}
    results = {name: runs[name]["result"] for name in (*alike, *apart)}
    pairs = paired(alike) if len(alike) > 1 else []
    p_holm = {pair["b"]: pair["p_holm"] for pair in pairs if pair["a"] == best}
    tied = [name for name, p in p_holm.items() if p >= 0.05]
    place = {name: "not compared" if name in apart else "best" if name == best and not tied
             else "tied for best" if name in (best, *tied) else "worse" for name in results}
    floors = [name for name in ("random encoder", "shuffled labels")
              if any(name in r.get("floors", {}) for r in results.values())]
    header = ["run", "balanced accuracy", "95 % interval", "place", "p (Holm)", "majority class, random answers", "chance band",
              *floors, "log-loss", "participants", "alarms", "encoder"]
    rows = []
    for name, r in results.items():
        rows.append([name, number(r["balanced_accuracy"]), span(r["ci95"]["balanced_accuracy"]), place[name],
                     f"{p_holm[name]:.4f}" if name in p_holm else "-",
                     f"{number(r['majority']['balanced_accuracy'])}, {number(r['random']['balanced_accuracy'])}", span(r["chance_band"]),
                     *(number(r.get("floors", {}).get(floor, {}).get("balanced_accuracy")) for floor in floors),
                     number(r["log_loss"]), str(r["n"]), str(len(r["alarms"])), r["encoder_sha256"][:12]])
    score = f"balanced accuracy {number(results[best]['balanced_accuracy'])} on {split}"
    if not p_holm:
        verdict = f"{best}: {score}; there is no other run to compare it with."
    elif tied:
        verdict = f"{best} leads with {score}, but is not shown to be better than {', '.join(tied)}."
    else:
        verdict = (f"{best} is the best of {len(alike)} runs: {score}, better than every other "
                   f"(p at most {max(p_holm.values()):.4f}, Holm over {len(pairs)} pairs).")
    about = [verdict, (f"{', '.join(dict.fromkeys(r['data'] for r in results.values()))}. "
                       "Tied: the difference from the best is not significant at 5 % "
                       "(paired bootstrap over the same participants, Holm-corrected over all pairs).")]
    notes = [f"{name}: not compared, for it has {difference}" for name, difference in apart.items()]
    notes += [f"{name}: ALARM: {alarm}" for name, r in results.items() for alarm in r["alarms"]]
    notes += [f"not scored on {split}: {folder}" for folder in folders if folder not in scored]
    text = "\n".join([*about, "", *("| " + " | ".join(row) + " |" for row in [header, ["---"] * len(header), *rows]), "",
                      *(f"- {note}" for note in notes)]).rstrip() + "\n"
    beside, csv_table = os.path.dirname(os.path.abspath(folders[0])), io.StringIO()
    csv.writer(csv_table, lineterminator="\n").writerows([header, *rows])
    b2.write(os.path.join(beside, "leaderboard.csv"), csv_table.getvalue())
    b2.write(os.path.join(beside, "leaderboard.md"), text)
    b2.write(os.path.join(beside, "leaderboard.html"),
             leaderboard_page(f"leaderboard on {split}", about, results, header, rows, notes, pairs))
    return text


# ------------------------------------------------------------------------------------------------------------ tables


def number(value):
    return "-" if value is None else f"{value:.3f}"


def span(pair):
    return "-" if pair is None else f"{pair[0]:.3f} to {pair[1]:.3f}"


def score_table(result, names):
    """-> header and rows, as text: each score with its interval and its floors."""
    header = ["", "score", "95 % interval", "majority class", "random answers", "chance band"]
    return header, [[SCORE_NAMES[name], number(result[name]), span(result["ci95"][name]), number(result["majority"][name]),
                     number(result["random"][name]), span(result["chance"][name])] for name in names]


def floor_table(result):
    """-> header and rows, as text, of the probes that eval.floors asked for."""
    rows = [[name, number(f["balanced_accuracy"]), span(f["ci95"]["balanced_accuracy"]), number(f["difference"]),
             span(f["difference_ci95"]), f"{f['p_value']:.4f}"] for name, f in result["floors"].items()]
    return ["the same probe on", "balanced accuracy", "95 % interval", "this run is above by", "95 % interval", "p"], rows


def class_table(result, names):
    """-> header and rows, as text, of every class: participants, answers, and scores with their intervals."""
    rows = [[name, str(result["true_counts"][k]), str(result["predicted_counts"][k]),
             *(f"{number(result[f'{of}_per_class'][k])} ({span(result['ci95'][f'{of}_per_class'][k])})" for of in names)]
            for k, name in enumerate(data.CLASS_NAMES)]
    return ["class", "participants", "predicted", *({"f1": "F1", "auroc": "AUROC", "auprc": "AUPRC"}.get(of, of) for of in names)], rows


def group_table(result):
    """-> header and rows, as text, of every subgroup."""
    rows = [[f"{name} {g['group']}", f"{g['n']}{' (small)' if g['small'] else ''}", number(g["balanced_accuracy"]),
             span(g["ci95"]), number(g["rest"])] for name, groups in result["subgroups"].items() for g in groups]
    return ["group", "participants", "balanced accuracy", "95 % interval", "all others"], rows


def table_lines(header, rows):
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
    return ["  ".join(cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths)))
            for row in [header, *rows]]


def sentence(result):
    return (f"{result['run']} on {result['split']}: balanced accuracy {result['balanced_accuracy']:.3f} "
            f"(95 % interval {span(result['ci95']['balanced_accuracy'])}; chance band {span(result['chance_band'])}), "
            f"{result['n']} participants, {result['volumes']} volumes, checkpoint of epoch {result['epoch']}, {result['data']}.")


def seeds_line(result):
    spread = result["seeds"]["balanced_accuracy"]
    return (f"over seeds {', '.join(map(str, result['seeds']['seeds']))}: balanced accuracy {spread['mean']:.3f} ± {spread['sd']:.3f} "
            f"({', '.join(f'{v:.3f}' for v in spread['each'])}); the table is of the first")


def print_result(result):
    print(f"\n{sentence(result)}\n")
    tables = [score_table(result, metrics.SCORES), *([floor_table(result)] if "floors" in result else []),
              class_table(result, ("f1",)), group_table(result)]
    for header, rows in tables:
        print("\n".join([*table_lines(header, rows), ""]))
    if "seeds" in result:
        print(seeds_line(result))
    for lost in result["unreadable"]:
        print(f"unreadable: participant {lost['participant_id']}: {lost['reason']}")
    for alarm in result["alarms"]:
        print(f"ALARM: {alarm}")
    if not result["alarms"]:
        print("no alarms")


# --------------------------------------------------------------------------------------------------- plots and report


def png(figure):
    import matplotlib.pyplot as plt

    out = io.BytesIO()
    figure.savefig(out, format="png", dpi=110, bbox_inches="tight")
    plt.close(figure)
    return out.getvalue()


def new_figure(*args, **options):
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt.subplots(*args, **options)


def write_plots(folder, result, y_true, probabilities):
    """plots/: confusion, ROC and reliability of the split, and what metrics.jsonl says of training, where the folder has one."""
    def save(figure, name):
        b2.write(os.path.join(folder, "plots", name), png(figure))

    counts, split = np.array(result["confusion_matrix"]), result["split"]
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    figure, axis = new_figure(figsize=(5.2, 4.6))
    image = axis.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    for (i, j), count in np.ndenumerate(counts):
        axis.text(j, i, f"{count}\n{shares[i, j]:.0%}", ha="center", va="center", color="white" if shares[i, j] > 0.5 else "black")
    axis.set(xticks=range(len(counts)), yticks=range(len(counts)), xlabel="predicted", ylabel="true",
             title=f"{split}: participants, share of the row")
    axis.set_xticklabels(data.CLASS_NAMES, rotation=20)
    axis.set_yticklabels(data.CLASS_NAMES)
    figure.colorbar(image, fraction=0.046)
    save(figure, f"confusion_{split}.png")

    from sklearn.metrics import roc_curve
    figure, axis = new_figure(figsize=(4.8, 4.6))
    for k, name in enumerate(data.CLASS_NAMES):
        if result["auroc_per_class"][k] is not None:
            axis.plot(*roc_curve(y_true == k, probabilities[:, k])[:2], label=f"{name}: {result['auroc_per_class'][k]:.3f}")
    axis.plot([0, 1], [0, 1], color="grey", linewidth=0.8, linestyle=":")
    axis.set(xlabel="false positives, share of the other classes", ylabel="true positives, share of the class",
             title=f"{split}: ROC, each class against the rest")
    axis.legend(frameon=False, title="AUROC", loc="lower right")
    save(figure, f"roc_{split}.png")

    figure, axis = new_figure(figsize=(4.8, 4.6))
    axis.plot([0, 1], [0, 1], color="grey", linewidth=0.8, linestyle=":")
    calibrated = [("temperature " + f"{result['temperature']:.2f}", result["calibrated"]["reliability"])] if "calibrated" in result else []
    for (label, bins), color in zip([("as predicted", result["reliability"]), *calibrated], ("C0", "C1")):
        axis.plot([b["confidence"] for b in bins], [b["accuracy"] for b in bins], color=color, linewidth=1)
        axis.scatter([b["confidence"] for b in bins], [b["accuracy"] for b in bins], s=[8 + 4 * b["count"] for b in bins],
                     color=color, alpha=0.6, label=label)
    axis.set(xlim=(0, 1.03), ylim=(-0.03, 1.03), xlabel="probability of the answer", ylabel="share of right answers",
             title=f"{split}: reliability (area: participants)")
    for handle in axis.legend(frameon=False, loc="upper left").legend_handles:
        handle.set_sizes([30])
    save(figure, f"reliability_{split}.png")

    history = os.path.join(folder, "metrics.jsonl")
    if not os.path.exists(history):
        return
    with open(history, encoding="utf-8") as f:
        epochs = [json.loads(line) for line in f]
    style = {"marker": "o"} if len(epochs) == 1 else {}  # a line of one point would not be seen
    figure, axes = new_figure(1, 2, figsize=(9, 3.4))
    for axis, name, title in ((axes[0], "loss", "loss"), (axes[1], "balanced_accuracy", "balanced accuracy")):
        for part in ("train", "val"):
            axis.plot([e["epoch"] for e in epochs], [e[f"{part}/{name}"] for e in epochs], label=part, **style)
        axis.axvline(result["epoch"], color="grey", linewidth=0.8, linestyle="--", label="best checkpoint")
        axis.set(xlabel="epoch", title=title)
    axes[1].axhline(1 / len(data.CLASSES), color="grey", linewidth=0.8, linestyle=":", label="one class for all")
    axes[1].legend(frameon=False)
    save(figure, "training.png")

    figure, axis = new_figure(figsize=(9, 3))
    for k, name in enumerate(data.CLASS_NAMES):
        axis.plot([e["epoch"] for e in epochs], [e[f"val/predicted_share_{k}"] for e in epochs], label=name, **style)
    axis.set(xlabel="epoch", ylim=(-0.03, 1.03), title="validation: share of the participants that each class is answered for")
    axis.legend(frameon=False, ncols=len(data.CLASS_NAMES))
    save(figure, "shares.png")


def leaderboard_plot(results):
    figure, axis = new_figure(figsize=(7, 1.2 + 0.4 * len(results)))
    for n, r in enumerate(results.values()):
        axis.barh(n, r["chance_band"][1] - r["chance_band"][0], left=r["chance_band"][0], color="0.88", height=0.8)
        axis.plot(r["ci95"]["balanced_accuracy"], [n, n], color="C0", linewidth=2)
        axis.plot(r["balanced_accuracy"], n, "o", color="C0")
    axis.set(yticks=range(len(results)), xlabel="balanced accuracy", xlim=(0, 1))
    axis.set_yticklabels(results)
    axis.invert_yaxis()
    return png(figure)


def leaderboard_page(title, about, results, header, rows, notes, pairs):
    body = [f"<p><b>{html.escape(about[0])}</b></p><p>{html.escape(about[1])}</p>",
            html_figure(leaderboard_plot(results),
                        "Balanced accuracy of each run with its 95 % interval: "
                        + "; ".join(f"{row[0]} {row[1]} ({row[2]})" for row in rows),
                        "Balanced accuracy and 95 % interval; grey: each run's chance band."),
            html_table(header, rows, "cards"), html_list(notes)]
    if pairs:
        pair_rows = []
        for pair in pairs:
            a, b, sign = ("a", "b", 1) if pair["difference"] >= 0 else ("b", "a", -1)
            pair_rows.append([pair[a], pair[b], number(sign * pair["difference"]), span(sorted(sign * end for end in pair["ci95"])),
                              *(f"{pair[p]:.4f}" for p in ("p_value", "p_holm", "mcnemar_p"))])
        body += ["<h2>Every pair</h2>",
                 html_table(["higher", "lower", "difference", "95 % interval", "p", "p (Holm)", "McNemar p"], pair_rows, "cards")]
    return html_page(title, "".join(body))


def html_table(header, rows, kind=""):
    """kind: "cards" shows a row as a list on a phone, for tables of many columns; "long" breaks long words."""
    header, *rows = [[html.escape(cell) for cell in row] for row in [header, *rows]]
    body = "".join(f"<tr><th>{first}</th>"
                   + "".join(f'<td data-label="{name}">{cell}</td>' for name, cell in zip(header[1:], rest)) + "</tr>"
                   for first, *rest in rows)
    return f'<div class="wide {kind}"><table><thead><tr>{"".join(f"<th>{name}</th>" for name in header)}</tr></thead>{body}</table></div>'


def html_figure(content, alt, caption=""):
    image = base64.b64encode(content).decode()
    return (f'<figure><img alt="{html.escape(alt)}" src="data:image/png;base64,{image}">'
            f'<figcaption>{html.escape(caption)}</figcaption></figure>')


def html_list(lines):
    return ("<ul>" + "".join(f"<li{' class=alarm' if 'ALARM' in line else ''}>{html.escape(line)}</li>" for line in lines) + "</ul>"
            if lines else "")


def html_page(title, body):
    return f"""<!doctype html><html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{html.escape(title)}</title><style>
body {{ font: 16px/1.5 system-ui, sans-serif; max-width: 76rem; margin: auto; padding: 1rem; color: #222; background: #fff;
overflow-wrap: anywhere }}
table {{ border-collapse: collapse; margin: 1rem 0; font-size: .9rem; overflow-wrap: normal }}
th, td {{ padding: .2rem .6rem; border-bottom: 1px solid #ddd; text-align: right; vertical-align: top }}
th:first-child {{ text-align: left }}
figure {{ margin: 1rem 0; display: inline-block; max-width: 100%; vertical-align: top }} img {{ max-width: 100%; height: auto }}
figcaption {{ font-size: .85rem; color: #555 }}
.wide {{ overflow-x: auto }} .alarm {{ color: #a00; font-weight: bold }}
.long td, .cards th:first-child {{ text-align: left; overflow-wrap: anywhere }}
.cards th:first-child {{ min-width: 9rem }} .cards table {{ font-size: .8rem }}
@media (max-width: 600px) {{ body {{ font-size: 15px; padding: .6rem }} table {{ font-size: .7rem }} th, td {{ padding: .15rem .2rem }}
.cards thead {{ display: none }} .cards table {{ width: 100%; font-size: .85rem }}
.cards tr, .cards tr > * {{ display: block; text-align: left }}
.cards tr {{ margin-bottom: 1rem }} .cards td::before {{ content: attr(data-label) ": "; color: #555 }} }}
@media print {{ body {{ max-width: none; font-size: 10pt }} .wide {{ overflow: visible }} figure, tr {{ break-inside: avoid }}
h2 {{ break-after: avoid }} table {{ font-size: 8pt }} }}
</style><h1>{html.escape(title)}</h1>{body}</html>
"""


def write_report(folder):
    """report.html: every eval_SPLIT.json of the folder with its plots, training, ledger and provenance inside; opens offline."""
    def picture(name, alt):
        path = os.path.join(folder, "plots", name)
        if not os.path.exists(path):
            return ""
        with open(path, "rb") as f:
            return html_figure(f.read(), alt)

    parts, made = [], {}
    for split in ("test", "val"):
        path = os.path.join(folder, f"eval_{split}.json")
        if not os.path.exists(path):
            continue
        with open(path, encoding="utf-8") as f:
            result = json.load(f)
        made |= {f"{name} of {split}": result[name] for name in ("checkpoint_sha256", "labels_sha256", "predictions_sha256")}
        names = metrics.SCORES + metrics.MORE_SCORES
        header, by_class = class_table(result, ("precision", "recall", "f1", "auroc", "auprc"))
        columns = list(zip(header, *by_class))  # a column for each class: narrow enough for a phone
        matrix = "; ".join(f"{name}: {', '.join(map(str, row))}" for name, row in zip(data.CLASS_NAMES, result["confusion_matrix"]))
        parts += [f"<h2>{split}</h2><p><b>{html.escape(sentence(result))}</b></p>",
                  html_list([f"ALARM: {alarm}" for alarm in result["alarms"]] or ["no alarms"]),
                  html_table(*score_table(result, names)), html_table(*floor_table(result)) if "floors" in result else "",
                  f"<p>{html.escape(seeds_line(result))}</p>" if "seeds" in result else "",
                  html_table(columns[0], columns[1:]),
                  picture(f"confusion_{split}.png",
                          f"Confusion matrix of {split}, rows true, columns predicted ({', '.join(data.CLASS_NAMES)}). {matrix}"),
                  picture(f"roc_{split}.png",
                          f"ROC curves of {split}, each class against the rest. AUROC "
                          + ", ".join(f"{name} {number(value)}" for name, value in zip(data.CLASS_NAMES, result["auroc_per_class"]))),
                  picture(f"reliability_{split}.png",
                          f"Reliability of {split}: probability of the answer against share of right answers; "
                          f"expected calibration error {number(result['ece'])}"),
                  "<h3>Groups</h3>", html_table(*group_table(result)), "<h3>Volumes</h3>",
                  html_table([f"of {result['per_volume']['n']} volumes", "score", "95 % interval"],
                             [[SCORE_NAMES[name], number(result["per_volume"][name]), span(result["per_volume"]["ci95"][name])]
                              for name in names])]
        if "calibrated" in result:
            parts += [f"<h3>Calibration</h3><p>Temperature {result['temperature']:.3f}, fitted on validation.</p>",
                      html_table(["", "as predicted", "calibrated"],
                                 [[SCORE_NAMES[name], number(result[name]), number(result["calibrated"][name])]
                                  for name in ("log_loss", "brier", "ece")])]
    parts += (["<h2>Training</h2>",
               picture("training.png", "Loss and balanced accuracy of training and validation over the epochs; "
                                       f"the best checkpoint is of epoch {result['epoch']}"),
               picture("shares.png", "Share of the validation participants that each class is answered for, over the epochs")]
              if os.path.exists(os.path.join(folder, "plots", "training.png")) else [])
    rows = read_csv(os.path.join(folder, "ledger.csv"))

    def share(split, labels):
        here = [row for row in rows if row["split"] == split and int(row["label"]) in labels and row["status"] != "no_oct"]
        return f"{sum(row['status'] == 'used' for row in here)}/{len(here)}"

    classes = [*((name, [k]) for k, name in enumerate(data.CLASS_NAMES)), ("all", range(len(data.CLASSES)))]
    volumes = [str(sum(int(row["volumes"]) for row in rows if row["split"] == split)) for split in data.SPLITS]
    parts += ["<h2>Participants</h2><p>With a volume / labelled.</p>",
              html_table(["", *data.SPLITS], [*([name, *(share(split, labels) for split in data.SPLITS)] for name, labels in classes),
                                              ["volumes", *volumes]]),
              html_list([f"{row['participant_id']} ({row['split']}): {row['reason']}" for row in rows if row["reason"]])]
    for place in (folder, os.path.dirname(folder)):  # results of last.pt lie in a folder of their own, within the run's
        provenance = os.path.join(place, "provenance.json")
        if os.path.exists(provenance):
            with open(provenance, encoding="utf-8") as f:
                made = json.load(f) | made
            break
    shown = [[name, value if isinstance(value, str) else json.dumps(value)] for name, value in made.items()]
    parts += ["<h2>Provenance</h2>", html_table(["", ""], shown, "long")]
    b2.write(os.path.join(folder, "report.html"), html_page(result["run"], "".join(parts)))


def main(rank, cfg, ckpt, split, overrides):
    """The job, in every replica."""
    result, folder = evaluate_run(ckpt, split, overrides)
    print_result(result)
    print(f"report: {os.path.join(os.path.relpath(folder), 'report.html')}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--ckpt", help="run folder, or a checkpoint file in it")
    what.add_argument("--compare", nargs="+", metavar="RUN", help="two or more run folders: is one better than another?")
    what.add_argument("--leaderboard", nargs="+", metavar="RUN", help="run folders, to rank by balanced accuracy")
    parser.add_argument("--split", choices=("val", "test"), default="test")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="of --ckpt, such as paths.data=ELSEWHERE")
    args = parser.parse_intermixed_args()
    sys.stdout.reconfigure(line_buffering=True)  # in step with the progress bar also where the output is a file

    def job():
        if not args.ckpt:
            print(compare(args.compare, args.split) if args.compare else leaderboard(args.leaderboard, args.split))
            return
        cfg = open_run(args.ckpt, args.overrides)[1]
        device.launch(functools.partial(main, ckpt=args.ckpt, split=args.split, overrides=args.overrides), cfg)
    device.run(job)
