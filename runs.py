"""A run's folder: what a run is known by, how it is saved, resumed and opened again.

    check_folder(cfg)                            # may results go there? before anything is computed
    run = start(cfg, book, encoder, ...)         # with train.resume=auto: what an earlier run left
    run.prepare()                                # provenance, config, ledger; an earlier run goes
    run.begin(...); run.save_epoch(...)          # a run with a single head is saved as it goes
    run.finish()                                 # what was left out, and W&B's summary
    opened = open_checkpoint("runs/cls_demo")    # its content, configuration, path, folder

Rank 0 alone writes. docs/run_folder.md lists the files.
"""

import contextlib
import glob
import importlib.metadata
import json
import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import zipfile
from dataclasses import dataclass

import torch
import yaml

import b2
import config
import device
import facts
import files
import ledger
import loader
import settings
import tracking
from progress import epoch_lines, epoch_record, training_tables

BEST, LAST = "best_checkpoint_during_training.pt", "last.pt"
# what else to do where a run cannot be resumed
INSTEAD = "set train.resume=never to replace the run, or paths.run_dir to another one"
# what a run is known by
IDENTITY = "config", "encoder_sha256", "labels_sha256", "manifest_sha256", "train_participants"
# what a checkpoint holds of each key
KINDS = {"config": dict, "scans": dict, "head": dict, "encoder": dict, "optimizer": dict}
KINDS |= {"progress": dict, "val_predictions": dict, "floors": dict, "repeats": list}
KINDS |= {"train_participants": list, "epoch": int, "step": int, "refit": dict, "training": dict}
KINDS |= {"curve": list}
# of a split
PLOTS = "summary", "confusion", "roc", "reliability", "learning_curve", "features", "umap"
KINDS |= dict.fromkeys(("encoder_sha256", "labels_sha256", "manifest_sha256"), str)
# the beginnings of keys that do not change what a run computes: they may differ when it is resumed
HARMLESS = ("paths.", "log.", "device.", "demo.", "project_name", "train.resume")
HARMLESS += ("train.save_every", "train.micro_batch", "train.activation_checkpointing")
# read when a run is scored
HARMLESS += ("eval.covariates", "eval.probes", "eval.prevalence", "eval.gallery")
HARMLESS += ("data.num_workers", "data.prefetch", "data.cache_gb", "data.fetch_deadline")
# the content of tables is known by its hash
HARMLESS += ("data.max_missing", "data.labels", "data.participants", "data.manifest")
# those that may differ when it is scored
CHANGEABLE = ("paths.*", "device.*", "data.max_missing", "data.num_workers", "data.prefetch")
CHANGEABLE += ("data.cache_gb", "data.fetch_deadline")
CHANGEABLE += ("data.labels", "data.participants", "data.manifest")
CHANGEABLE += ("eval.covariates", "eval.probes", "eval.prevalence", "eval.gallery")


def check_folder(cfg):
    """ValueError when results must not or cannot go to paths.run_dir."""
    folder = files.local_folder(cfg.paths.run_dir, "paths.run_dir")
    is_file = os.path.exists(folder) and not os.path.isdir(folder)
    inside = set() if is_file or not os.path.exists(folder) else {*os.listdir(folder)} - {"wandb"}
    if is_file or inside and "provenance.json" not in inside:
        raise ValueError(
            f"paths.run_dir={folder} is not a run's folder and not empty; "
            "set paths.run_dir to another one"
        )
    cache = os.path.realpath(os.path.expanduser(cfg.paths.cache_dir))
    if f"{os.path.realpath(folder)}{os.sep}".startswith(cache + os.sep):
        raise ValueError(
            f"paths.run_dir={folder} lies in paths.cache_dir={cfg.paths.cache_dir}, which may be "
            "removed at any time; set paths.run_dir to another one"
        )
    encoder = cfg.paths.checkpoint_path
    path = encoder and os.path.realpath(os.path.expanduser(encoder))
    if encoder and not b2.is_remote(encoder) and path.startswith(os.path.realpath(folder) + os.sep):
        raise ValueError(
            f"paths.checkpoint_path={encoder} lies in paths.run_dir={folder}, where an earlier run "
            "is replaced; set paths.run_dir to another one"
        )


@contextlib.contextmanager
def locked(cfg):
    """The run's folder, for this process and its replicas alone. ValueError says who holds it."""
    if device.rank():  # torchrun's: rank 0 holds it for all
        yield
        return
    folder = os.path.abspath(files.local_folder(cfg.paths.run_dir, "paths.run_dir"))
    path = os.path.join(os.path.dirname(folder), f".{os.path.basename(folder)}.lock")
    at_once = threading.Event()
    at_once.set()
    try:
        with files.locked(path, at_once) as file:
            since = time.strftime("%Y-%m-%d %H:%M:%S")
            file.truncate(0)
            file.write(f"process {os.getpid()} on {socket.gethostname()} since {since}".encode())
            try:
                yield
            finally:
                os.unlink(path)
    except files.Stopped:
        with open(path, encoding="utf-8") as f:
            raise ValueError(
                f"paths.run_dir={cfg.paths.run_dir} is being written by {f.read()}; wait until it "
                "has ended, or set paths.run_dir to another folder"
            ) from None
    except OSError as error:
        if error.filename != path:
            raise
        raise ValueError(
            f"paths.run_dir={cfg.paths.run_dir} cannot be written ({error.strerror}); set "
            "paths.run_dir to another folder"
        ) from error


@dataclass
class Run:
    """A run in training. identity: what it is known by, in every checkpoint; scans: facts.summary
    of its volumes; earlier: the last.pt that it goes on from, None for a new run."""

    folder: str
    cfg: object
    book: ledger.Ledger
    identity: dict
    scans: dict
    dev: torch.device
    wandb: object
    earlier: dict

    def write(self, name, content):
        if device.rank() == 0:
            files.write(os.path.join(self.folder, name), content)

    def save(self, name, content):
        """A checkpoint: the run's identity and content, with all tensors on the CPU."""
        whole = device.to_host({**self.identity, "scans": self.scans, **content})
        self.write(name, lambda file: torch.save(whole, file))

    def prepare(self):
        """Write what this run is. An earlier run's results go, unless this one goes on from it."""
        if device.rank():
            return
        files.remove_abandoned(self.folder, 0)
        if self.earlier:
            path = os.path.join(self.folder, "provenance.json")
            provenance = files.read_json(path, INSTEAD)
            if not isinstance(provenance.setdefault("resumed", []), list):
                raise ValueError(f"{path} is damaged (resumed is no list); {INSTEAD}")
            after = {"after_epoch": self.earlier["epoch"], "after_step": self.earlier["step"]}
            provenance["resumed"].append(after | where_it_runs(self.dev))
        else:
            names = BEST, LAST, "metrics.jsonl", "predictions_val.csv", "sweep.csv", "cv.csv"
            if remove(self.folder, [*names, "predictions_cv.csv", "config.yaml", "ledger.csv"]):
                print(f"{self.folder}: replacing an earlier run")
            remove_evaluations(self.folder)
            provenance = provenance_of(self)
        # first, for a run's folder is known by it
        self.write("provenance.json", json.dumps(provenance, indent=1) + "\n")
        if not self.earlier:
            self.write("config.yaml", yaml.safe_dump(config.to_dict(self.cfg), sort_keys=False))
            self.write("ledger.csv", files.csv_text(ledger.rows_for_csv(self.book)))

    def save_best(self, record, predictions, content):
        """The best checkpoint, with the record of its epoch and its Predictions of validation."""
        if device.rank() == 0:
            remove_evaluations(self.folder)  # of the best before
        self.save(BEST, {"epoch": record["epoch"], **content, **scores_of(record, predictions)})
        self.write("predictions_val.csv", predictions_csv(predictions))

    def write_history(self, history):
        self.write("metrics.jsonl", "".join(json.dumps(record) + "\n" for record in history))

    # A run with a single head is saved as it goes:

    def begin(self, bank, module, optimizer, progress):
        """Go on from last.pt where there is one, and prepare the folder. module: None if frozen."""
        self.bank, self.module, self.optimizer = bank, module, optimizer.adamw
        self.progress = progress
        if self.earlier:
            try:
                bank.load_state_dict(self.earlier["head"])
                if "encoder" in self.earlier:
                    module.load_state_dict(self.earlier["encoder"])
                optimizer.load(self.earlier["optimizer"])
            except (RuntimeError, ValueError) as error:
                reason = " ".join(str(error).split())[:200]
                raise ValueError(
                    f"{self.folder}: last.pt does not fit this model: {reason}; {INSTEAD}"
                ) from error
            vars(progress).update(self.earlier["progress"])
            print(f"resuming after {self.position()} of {self.folder}")
        self.prepare()
        self.write_history(progress.history)
        self.stopping = device.sigterm()
        weights = [round(w, 3) for w in bank.class_weights[0].tolist()]
        for name, part in (("head", bank), ("encoder", module)):
            if part:
                print(f"{name}: {sum(p.numel() for p in part.parameters())} parameters train")
        print(f"class weights {weights}")

    def position(self):
        epoch, step = self.progress.epoch, self.progress.step
        is_whole = step == self.progress.steps_per_epoch
        return f"epoch {epoch}" if is_whole else f"step {step} of epoch {epoch}"

    def is_due(self, step):
        """Is last.pt to be written after this step, by train.save_every or because of SIGTERM?"""
        is_due = self.cfg.train.save_every and step % self.cfg.train.save_every == 0
        if device.world() == 1 or step % 10 == 0:  # asking each other costs the replicas time
            is_due = device.any_replica(self.stopping.is_set(), self.dev) or is_due
        return is_due

    def save_within_epoch(self, epoch):
        """Save after a step in the middle of an Epoch."""
        so_far = epoch.summed()
        self.check_finite(torch.isfinite(so_far["losses"] + so_far["norms"]).all())
        self.save_last({"so_far": so_far})

    def save_epoch(self, epoch, train, refit=None):
        """Save, log and print an Epoch; best first, so that last.pt knows of no best that is not
        on the disk. train: its Features. refit: state of the head fitted on validation too."""
        self.check_finite(epoch.is_finite().all())
        record = epoch_record(train, epoch, 0, self.bank.settings[0])
        self.progress.history.append(record)
        predictions = epoch.predictions.of_head(0)
        content = {"training": training_tables(train, epoch, self.bank, 0)}
        if record["best"]:
            again = {"refit": refit} if refit else {}
            self.save_best(record, predictions, self.weights() | content | again)
        self.write_history(self.progress.history)
        self.wandb.log(record)
        print(epoch_lines(record, self.cfg.train.epochs))
        self.save_last(content | scores_of(record, predictions))

    def check_finite(self, is_finite):
        """ValueError before weights that are no numbers any more are saved."""
        if not is_finite:
            raise ValueError(
                f"train loss, gradient or prediction is not finite in epoch {self.progress.epoch}; "
                f"lower train.lr_head={self.cfg.train.lr_head} or "
                f"train.lr_encoder={self.cfg.train.lr_encoder}, or look at train.class_weights"
            )

    def weights(self):
        """The head, and the encoder once it trains, as a checkpoint holds them."""
        trains = self.module and any(p.requires_grad for p in self.module.parameters())
        return {"head": self.bank.state_dict()} | (
            {"encoder": self.module.state_dict()} if trains else {}
        )

    def save_last(self, content):
        """All that resuming needs. Ends the process where SIGTERM has come to any replica."""
        progress = self.progress
        content |= {"epoch": progress.epoch, "step": progress.step, "progress": vars(progress)}
        content |= {"wandb": self.wandb.id, "optimizer": self.optimizer.state_dict()}
        self.save(LAST, self.weights() | content)
        if device.any_replica(self.stopping.is_set(), self.dev):
            print(
                f"stopped by SIGTERM after {self.position()}; train.resume=auto goes on from there"
            )
            raise SystemExit(128 + signal.SIGTERM)

    def end(self):
        """Say what training came to."""
        progress = self.progress
        if progress.epoch < progress.last:
            print(f"stopped early: {progress.epochs_without[0]} epochs without improvement on val")
        print(
            f"best: epoch {progress.best_epoch[0]}, val balanced accuracy "
            f"{progress.best[0][0]:.3f}, log-loss {progress.best[0][1]:.3f}; "
            f"saved as {os.path.join(self.folder, BEST)}"
        )
        for line in refit_lines(self.cfg, progress.best_epoch[0] == 0):
            print(line)

    def finish(self):
        """What ends every run: what was left out, and W&B's summary."""
        if self.book.unreadable:
            print(
                f"{len(self.book.unreadable)} volumes could not be read and were left out "
                f"(data.max_missing={self.cfg.data.max_missing})\n"
                f"{ledger.unreadable_table(self.book)}"
            )
        if self.wandb.run is not None:
            saved = read_saved(os.path.join(self.folder, BEST), {"val_predictions"})
            everybody = ledger.rows_for_csv(self.book) if self.cfg.log.wandb_participants else None
            tracking.finish(self.wandb, saved, self.book.classes, everybody)
        score = ["--ckpt", self.folder, "--split", "test"]
        print(f"next: {command_line('eval.py', *score)}")
        device.barrier(self.dev)  # nobody ends before rank 0 has written all


def start(cfg, book, encoder, train, val, dev, needed):
    """The Run, nothing written yet. ValueError where train.resume=auto finds a run that this one
    would not go on with, or that lacks what is `needed`."""
    tables = (book.sha256[name] for name in ("labels", "manifest"))
    values = config.to_dict(cfg), encoder.sha256, *tables, list(train.units)
    identity = dict(zip(IDENTITY, values)) | {"volumes": [len(train.samples), len(val.samples)]}
    folder = os.path.expanduser(cfg.paths.run_dir)
    earlier = resumable(folder, identity, needed) if cfg.train.resume == "auto" else None
    found = device.gather(earlier and [earlier.get("epoch"), earlier.get("step")], dev)
    if any(position != found[0] for position in found):
        said = ", ".join(f"replica {i}: {after or 'none'}" for i, after in enumerate(found))
        raise ValueError(
            f"the replicas would go on after different steps ([epoch, step]; {said}): every host "
            f"needs the same {os.path.join(folder, LAST)}; copy the newest to all"
        )
    wandb_run = tracking.start(cfg, folder, earlier and earlier["wandb"])
    scans = facts.summary(book.samples, book.facts)
    return Run(folder, cfg, book, identity, scans, dev, wandb_run, earlier)


def resumable(folder, identity, needed):
    """The run's last.pt, None where there is none yet. ValueError when going on would not give that
    run's result."""
    path = os.path.join(folder, LAST)
    if not os.path.exists(path):
        return None
    try:
        earlier = read_saved(path, {*identity, *needed})
    except ValueError as error:
        raise ValueError(f"{error}; {INSTEAD}") from error
    changed = changed_settings(earlier["config"], identity["config"])
    others = {name for name in identity if earlier[name] != identity[name]} - {"config"}
    changed += [f"{name} is another" for name in sorted(others)]
    if changed:
        raise ValueError(
            f"{folder} holds a run whose result this would change: {'; '.join(changed)}; "
            f"set that back, or {INSTEAD}"
        )
    return earlier


def changed_settings(old, new):
    """Nested configurations -> ["key old -> new", ...] of the keys that change what a run
    computes."""
    old, new = config.flatten(old), config.flatten(new)
    keys = [key for key in {**old, **new} if not key.startswith(HARMLESS)]
    return [
        f"{key} {old.get(key)} -> {new.get(key)}" for key in keys if old.get(key) != new.get(key)
    ]


def agree(cfg, book, encoder, dev, job="train", checkpoint=None):
    """ValueError where the replicas were started for different jobs, or with different settings,
    encoders, data or checkpoints (a path). All replicas trust that the others do the same: no sum
    of theirs would show it."""
    if device.world() == 1:
        return
    started = {"the command": job}
    if checkpoint:
        started["the checkpoint"] = files.sha256(checkpoint)
    named = ("train.save_every", "eval.")  # which say when replicas wait for each other
    flat = config.flatten(config.to_dict(cfg))
    keys = {k: str(v) for k, v in flat.items() if not k.startswith(HARMLESS) or k.startswith(named)}
    # on each host, paths.data and paths.features may lie elsewhere
    place = lambda path: b2.below(cfg.paths.data, path.removeprefix(cfg.paths.features or ""))
    rows = [[s.unit, s.split, s.label, place(s.path)] for s in book.samples]
    data = {"what the tables say and the list of volumes": json.dumps(rows)}
    device.agree(started | keys | {"the encoder": encoder.sha256} | data, dev)


def refit_lines(cfg, is_refit):
    """What training says of train.refit, where that is on and the encoder stays frozen."""
    if cfg.train.refit and settings.first_epoch_of_encoder(cfg) > cfg.train.epochs:
        yield (
            "refit: test is scored by this head fitted again on train and val, and val by the head "
            "that never saw it"
            if is_refit and settings.refits(cfg)
            else "no refit: this head takes steps to train, so it scores val and test alike"
        )


def head_of(entry, split):
    """State of the head that scores a split, of a part of a checkpoint that holds "head", and
    perhaps the same fitted again on train and val: "refit"."""
    return entry["refit"] if split == "test" and "refit" in entry else entry["head"]


def predictions_csv(predictions):
    """Predictions -> CSV text."""
    classes = [f"p{k}" for k in range(predictions.p.shape[1])]
    header = ["participant_id", "y_true", *classes]
    numbers = [[y, *p] for y, p in zip(predictions.y_true.tolist(), predictions.p.tolist())]
    names = [[participant] for participant in predictions.participants]
    if predictions.ids != predictions.participants:
        header.insert(1, "unit")
        names = [[*name, unit] for name, unit in zip(names, predictions.ids)]
    return files.csv_text([header, *([*name, *row] for name, row in zip(names, numbers))])


def scores_of(record, predictions):
    """What a checkpoint says of its epoch: its scores, and its answers on validation, to which
    eval.py fits a temperature."""
    return {
        "val_balanced_accuracy": record["val/balanced_accuracy"],
        "val_loss": record["val/loss"],
        "train_balanced_accuracy": record["train/balanced_accuracy"],
        "val_predictions": {
            "participant_id": predictions.participants,
            "y_true": predictions.y_true.tolist(),
            "p": torch.from_numpy(predictions.p),
        },
    }


def command_line(script, *args):
    """How to call another script of this project from here, to be pasted."""
    here = os.path.dirname(os.path.abspath(__file__))
    paths = sys.executable, os.path.join(here, script)
    return shlex.join([*(min(path, os.path.relpath(path), key=len) for path in paths), *args])


def where_it_runs(dev):
    command = shlex.join([os.path.basename(sys.executable), *sys.argv])
    return {"command": command, "device": device.describe(dev), "world_size": device.world()}


def provenance_of(run):
    def git(*args):
        if not shutil.which("git"):
            return None
        here = os.path.dirname(os.path.abspath(__file__))
        answer = subprocess.run(["git", *args], capture_output=True, text=True, cwd=here)
        return answer.stdout.strip() if answer.returncode == 0 else None

    commit, versions = git("rev-parse", "HEAD"), {"python": sys.version.split()[0]}
    for package in ("torch", "torch_xla", "numpy", "scikit-learn", "pydicom"):
        if any(importlib.metadata.distributions(name=package)):
            versions[package] = importlib.metadata.version(package)
    return {
        "git_commit": commit,
        "git_changes": None if commit is None else bool(git("status", "--porcelain")),
        "versions": versions,
        **{name: run.identity[name] for name in IDENTITY[1:4]},
        "loader": loader.provenance(run.cfg),
        "data": run.book.description,
        "seed": run.cfg.seed,
        **where_it_runs(run.dev),
    }


def remove(folder, names):
    """Remove the files that are there -> their names."""
    found = [name for name in names if os.path.exists(os.path.join(folder, name))]
    for name in found:
        os.remove(os.path.join(folder, name))
    return found


def remove_evaluations(folder):
    """Remove what eval.py wrote of a checkpoint that is there no longer."""
    plots = ["training", "shares", "sweep"]
    plots += [f"{plot}_{split}" for plot in PLOTS for split in ("val", "test")]
    names = [f"plots/{plot}.{kind}" for plot in plots for kind in ("png", "svg", "pdf")]
    names += ["report.html", "predictions_test.csv"]
    for split in ("val", "test"):
        names += [f"eval_{split}.json", f"learning_curve_{split}.csv", f"gallery_{split}.json"]
    # of the best; of last.pt, also what training writes of the best itself
    last = os.path.join(folder, "last")
    remove(folder, names + glob.glob("explain_*.html", root_dir=folder))
    names += ["predictions_val.csv", "ledger.csv"]
    remove(last, names + glob.glob("explain_*.html", root_dir=last))


# -------------------------------------------------------------------------- opening a run again


@dataclass
class Opened:
    """A checkpoint: its content, its configuration (with overrides), its path, and the folder for
    results about it."""

    saved: dict
    cfg: object
    path: str
    folder: str


def open_checkpoint(ckpt, overrides=()):
    """A run's checkpoint, by the run's folder or the .pt file -> Opened. ValueError for what cannot
    be scored."""
    for override in overrides:
        if not override.startswith(tuple(name.rstrip("*") for name in CHANGEABLE)):
            raise ValueError(
                f"{override} would score something else than what was trained; "
                f"only {', '.join(CHANGEABLE)} can change now"
            )
    path = os.path.join(ckpt, BEST) if os.path.isdir(ckpt) else ckpt
    if not os.path.isfile(path):
        inside = sorted(os.listdir(ckpt)) if os.path.isdir(ckpt) else []
        others = [name for name in inside if os.path.isfile(os.path.join(ckpt, name, BEST))]
        hint = f"; it holds the runs {files.first_few(others)}" if others else ""
        raise FileNotFoundError(
            f"--ckpt {ckpt}: {path} is not there; train first, or name a run folder or its "
            f"{BEST}{hint}"
        )
    folder, name = os.path.split(os.path.abspath(path))
    if name != BEST:  # last.pt, say: its results must not pass for those of the best checkpoint
        folder = os.path.join(folder, os.path.splitext(name)[0])
    saved = read_saved(path, {*IDENTITY, "scans", "head", "epoch"})
    return Opened(saved, config.resolve(saved["config"], overrides, path), path, folder)


def read_saved(path, keys):
    """What training saved, tensors mapped. ValueError when it is damaged (every byte is verified),
    or lacks a key."""
    try:
        archive = zipfile.ZipFile(path)
        if sum(part.file_size for part in archive.infolist()) > os.path.getsize(path):
            raise zipfile.BadZipFile("it is compressed, which torch never does")  # a bomb, perhaps
        damaged = archive.testzip()
        if damaged:
            raise zipfile.BadZipFile(f"{damaged} is damaged")
        saved = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        missing = sorted(keys - set(saved))
        if "model_state_dict" in saved:
            raise KeyError("it is an encoder's file; --ckpt names a run's folder")
        if missing:
            raise KeyError(", ".join(missing))
        others = [key for key in saved if not isinstance(saved[key], KINDS.get(key, object))]
        if others:
            raise TypeError(f"of another kind: {', '.join(others)}")
    except OSError:
        raise
    except Exception as error:  # torch, zip and pickle raise a dozen types for other files
        reason = f"{type(error).__name__} {' '.join(str(error).split())[:200]}"
        raise ValueError(f"{path} is not a checkpoint of this train.py: {reason}") from error
    return saved


def check_config(opened):
    """ValueError when the run's config.yaml is not what its checkpoint was trained with."""
    path = os.path.join(os.path.dirname(os.path.abspath(opened.path)), "config.yaml")
    if not os.path.exists(path):
        return
    try:
        written = config.parse(files.content_of(path, "train again").decode(), "it")
        written = written if isinstance(written, dict) else {}
        changed = changed_settings(opened.saved["config"], written)
    except OSError:
        raise
    except Exception as error:  # PyYAML raises half a dozen types where a value contradicts its tag
        reason = f"{type(error).__name__} {' '.join(str(error).split())[:200]}"
        raise ValueError(f"{path} is not a run's configuration: {reason}; train again") from error
    if changed:
        raise ValueError(
            f"{path} is not what this checkpoint was trained with: {'; '.join(changed[:5])[:500]}; "
            "set that back, or train again"
        )
