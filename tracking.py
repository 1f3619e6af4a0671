"""Weights & Biases: the run that is logged there, and what it is told at the end.

    check(cfg)                              # before anything is computed
    tracker = start(cfg, folder, earlier_id)
    tracker.log(record)                     # once an epoch
    finish(tracker, saved, names)           # what the run came to on validation

The quieter of log.wandb and of the environment (WANDB_MODE, WANDB_DISABLED) holds. Where that is
disabled, wandb is not even imported; ranks above 0 log nothing. W&B never ends a run: without its
server the run is logged offline, any other failure ends the logging, and either is a printed line.
Nothing about a single participant is sent, unless log.wandb_participants=true asks for the ledger.
"""

import contextlib
import netrc
import os
import shlex
import urllib.parse
from dataclasses import dataclass

import numpy as np
import pydantic

import config
import device
import metrics

LEVELS = ("online", "offline", "disabled")  # from loud to quiet
# what WANDB_MODE may be
MODES = {"online": "online", "run": "online", "shared": "online"}
MODES |= {"offline": "offline", "dryrun": "offline", "disabled": "disabled"}
# Seconds for which W&B may hold up a run's start and its end. The user's own settings win, such as
# WANDB_INIT_TIMEOUT and WANDB_FINISH_TIMEOUT; wandb itself would wait 90 s, and for ever.
LIMITS = {"init_timeout": 30, "finish_timeout": 60}
# What wandb would collect by itself, and upload: what is printed, which names participants; the
# command line, program, paths and packages; the code and its git remote; the host's name. What is
# left is how busy the machine is.
COLLECT_NOTHING = {"console": "off", "x_disable_meta": True, "x_save_requirements": False}
COLLECT_NOTHING |= {"disable_git": True, "disable_code": True, "save_code": False, "host": ""}


@dataclass
class Tracker:
    """What is logged of a run. run: wandb's, None where nothing is logged (any more); id: of the
    run that a resumed one goes on with."""

    run: object
    id: str

    def log(self, record):
        self.send(lambda run: run.log(record))

    def send(self, action):
        """action(run); an error ends the logging, not the run."""
        if self.run is None:
            return
        try:
            action(self.run)
        except Exception as error:  # wandb raises a dozen types, and none is worth the run
            print(
                f"W&B failed: {reason_of(error)}; this run goes on without it. To upload what it "
                f"has: {sync_command(self.run)}"
            )
            self.run = None
            stop_wandb()


# ----------------------------------------------------------------------------------------- starting


def wanted_mode(cfg):
    """The quieter of log.wandb and the environment, as of LEVELS, and the variable that decides
    where it is the environment. ValueError for a WANDB_MODE that is none."""
    value = os.environ.get("WANDB_MODE", "").strip() or "online"
    if value not in MODES:
        raise ValueError(
            f"WANDB_MODE={value} in the environment is no mode of W&B; set it to one of "
            f"{', '.join(MODES)}, or unset it"
        )
    wish, variable = MODES[value], f"WANDB_MODE={value}"
    disabled = os.environ.get("WANDB_DISABLED", "").strip()
    if disabled.lower() in ("1", "true", "yes", "on"):
        wish, variable = "disabled", f"WANDB_DISABLED={disabled}"
    configured = "online" if cfg.log.wandb == "auto" else cfg.log.wandb
    if quieter(configured, wish) == configured:
        return configured, None
    return wish, variable


def quieter(*modes):
    return max(modes, key=LEVELS.index)


def check(cfg):
    """ValueError, before anything is computed, where the mode is none or wandb is not installed."""
    mode, _ = wanted_mode(cfg)
    if mode == "disabled" or device.rank():
        return
    try:
        import wandb  # noqa: F401
    except ImportError:
        raise ValueError(
            f"log.wandb={cfg.log.wandb} needs the package wandb: pip install wandb, or set "
            "log.wandb=disabled"
        ) from None


def start(cfg, folder, earlier):
    """The Tracker. earlier: id of the run to go on with."""
    check(cfg)
    mode, variable = wanted_mode(cfg)
    if device.rank():
        return Tracker(None, earlier)
    if variable and cfg.log.wandb != "auto":
        print(f"{variable} in the environment: W&B is {mode}, not {cfg.log.wandb} (log.wandb)")
    if mode == "disabled":
        return Tracker(None, earlier)
    try:
        run = start_wandb(cfg, mode, folder, earlier)
    except Exception as error:  # as in Tracker.send
        print(f"W&B did not start: {reason_of(error)}; this run goes on without it")
        stop_wandb()
        run = None
    return Tracker(run, earlier if run is None else run.id)


def start_wandb(cfg, mode, folder, earlier):
    """wandb's run, online or offline; None where W&B's settings say disabled."""
    import wandb

    os.environ["WANDB_ERROR_REPORTING"] = "false"  # wandb's own crashes are not reported either
    # wandb refuses an empty mode, and a key with white space around it
    for name in ("WANDB_MODE", "WANDB_API_KEY"):
        os.environ[name] = os.environ.get(name, "").strip()
        if not os.environ[name]:
            del os.environ[name]
    own = wandb.setup().settings  # of the environment and of W&B's files
    wish = quieter(mode, MODES[own.mode])
    if wish != mode and cfg.log.wandb != "auto":  # `wandb offline` writes this to a file
        print(f"W&B's settings file: W&B is {wish}, not {cfg.log.wandb} (log.wandb)")
    mode = wish
    if mode == "online" and not has_key(own):
        if cfg.log.wandb == "online":
            print(
                "log.wandb=online finds no key, so this run is logged offline; run wandb login, or "
                "set WANDB_API_KEY"
            )
        mode = "offline"
    if mode == "disabled":
        return None
    os.makedirs(folder, exist_ok=True)
    limits = {name: value for name, value in LIMITS.items() if name not in own.model_fields_set}
    about = {
        **described(cfg),
        "dir": folder,
        "id": earlier,
        "resume": "allow" if earlier else None,
        "settings": wandb.Settings(finish_timeout_raises=True, **limits, **COLLECT_NOTHING),
    }
    if mode == "offline":
        return wandb.init(mode="offline", **about)
    try:
        return wandb.init(mode="online", **about)
    except Exception as error:  # as in Tracker.send
        run = wandb.init(mode="offline", **about)
        print(
            f"W&B did not start online: {reason_of(error)}; this run is logged offline. To upload "
            f"it later: {sync_command(run)}"
        )
        return run


def described(cfg):
    """What W&B shows of a run in its lists: project, name, configuration without the paths of this
    machine, group, tags."""
    trains = not cfg.model.freeze_encoder or cfg.model.unfreeze_at_epoch >= 0
    settings, encoder = config.to_dict(cfg), cfg.paths.checkpoint_path or cfg.model.loader or ""
    del settings["paths"], settings["demo"]["dir"]
    for name in ("labels", "participants", "manifest", "checksums"):
        del settings["data"][name]
    return {
        "project": cfg.log.wandb_project,
        "name": cfg.log.run_name,
        "config": settings,
        "group": os.path.splitext(os.path.basename(encoder))[0],
        "tags": [
            "finetune" if trains else "probe",
            cfg.model.head.kind,
            cfg.model.pool_method,
            *([cfg.data.scanner] if cfg.data.scanner else []),
        ],
    }


def has_key(settings):
    """Has W&B a key for its server, in its settings or where `wandb login` puts it?"""
    import wandb

    if settings.api_key or settings.identity_token_file:
        return True
    url = urllib.parse.urlsplit(settings.base_url)
    machines = [url.netloc, url.hostname]
    if settings.base_url == wandb.Settings().base_url:
        machines.append("api.wandb.ai")  # W&B's own server, by its older name
    path = os.path.expanduser(os.environ.get("NETRC") or "~/.netrc")
    if not os.path.exists(path):
        return False
    try:
        logins = netrc.netrc(path)
    except (netrc.NetrcParseError, OSError, ValueError):
        # without the error's text: that may hold the key
        print(f"{path} is not a netrc file that can be read, so no key of W&B is taken from it")
        return False
    return any(logins.authenticators(machine) for machine in machines)


# ------------------------------------------------------------------------------- when W&B fails


def reason_of(error):
    """An error of wandb on one line, without any key."""
    if isinstance(error, pydantic.ValidationError):  # its text has the value, which may be a key
        return "; ".join(
            f"WANDB_{'.'.join(map(str, e['loc'])).upper()}: {e['msg']}" for e in error.errors()
        )
    text = (str(error).strip() or "no reason given").splitlines()[0][:200]
    key = os.environ.get("WANDB_API_KEY")
    return f"{type(error).__name__}: {text.replace(key, '***') if key else text}"


def sync_command(run):
    return f"wandb sync {shlex.quote(os.path.dirname(run.dir))}"


def stop_wandb():
    """End wandb's own process and what it still has to do when Python ends."""
    import wandb

    with contextlib.suppress(Exception, SystemExit):  # SystemExit: where that process has died
        wandb.teardown()


# -------------------------------------------------------------------------------------- the end


def finish(tracker, saved, names, ledger_rows=None):
    """Log what the run came to on validation: summary with intervals and alarms, confusion matrix,
    ROC curves. saved: the best checkpoint; names: of the classes; ledger_rows: of all participants,
    the header first, where the ledger is to be sent too.

    The alarms are those of metrics, which name classes, and those of eval.py, which name
    participants, are not among them.
    """
    from sklearn.metrics import roc_curve

    y, p = saved["val_predictions"]["y_true"], saved["val_predictions"]["p"].numpy()
    people = saved["val_predictions"]["participant_id"]
    result = metrics.evaluate(y, p, len(names), people, names=names)
    if "left_out" in saved["training"]:
        left_out = saved["training"]["left_out"]
        result["alarms"] += metrics.gap_alarm(left_out, result["confusion_matrix"])
    curves = {}
    for k, name in enumerate(names):
        if 0 < y.count(k) < len(y):
            curves[name] = [axis.tolist() for axis in roc_curve(np.array(y) == k, p[:, k])[:2]]
    summary = {"best_epoch": saved["epoch"], "alarms": result["alarms"]}
    for name in metrics.SCORES:
        low, high = result["ci95"][name] or (None, None)
        summary |= {
            f"best/val/{name}": result[name],
            f"best/val/{name}_low": low,
            f"best/val/{name}_high": high,
        }

    def send(run):
        run.summary.update(summary)  # first, for pictures need the server and may fail
        run.log(pictures(y, p.argmax(axis=1).tolist(), names, curves, ledger_rows))
        run.finish()

    tracker.send(send)


def pictures(y_true, y_predicted, names, curves, ledger_rows):
    """Confusion matrix, ROC curves {class: (false positives, true positives)} and ledger (None:
    left out), as W&B draws them. Of the first it uploads the counts, not the rows."""
    import wandb

    xs, ys = ([curve[axis] for curve in curves.values()] for axis in (0, 1))
    drawn = {
        "val/confusion_matrix": wandb.plot.confusion_matrix(
            y_true=y_true, preds=y_predicted, class_names=list(names)
        ),
        "val/roc": wandb.plot.line_series(
            xs, ys, keys=list(curves), title="ROC, one against the rest", xname="false positives"
        ),
    }
    if ledger_rows:
        header, *rows = ledger_rows
        table = [[str(cell) for cell in row] for row in rows]
        drawn["ledger"] = wandb.Table(columns=header, data=table)
    return drawn
