"""Weights & Biases: the run that is logged there, and what it is told at the end.

    run = start(cfg, folder, earlier_id)
    run.log(record)                     # once an epoch
    finish(run, saved, ledger_rows)     # what the run came to on validation

With log.wandb=disabled, and on ranks above 0, start gives a run that ignores everything.
"""

import netrc
import os
import urllib.parse
from types import SimpleNamespace

import numpy as np

import config
import device
import ledger
import metrics


def start(cfg, folder, earlier):
    """The W&B run, or one that ignores everything: with log.wandb=disabled, and on ranks above 0.

    earlier: id of the run to go on with. ValueError when W&B does not start.
    """
    if cfg.log.wandb == "disabled" or device.rank():
        return SimpleNamespace(id=earlier, log=lambda record: None)
    try:
        import wandb
    except ImportError:
        raise ValueError(
            f"log.wandb={cfg.log.wandb} needs the package wandb: pip install wandb, or set "
            "log.wandb=disabled"
        ) from None
    mode = cfg.log.wandb
    if mode == "auto":
        mode = "online" if has_key(wandb.Settings().base_url) else "offline"
    os.makedirs(folder, exist_ok=True)
    trains = not cfg.model.freeze_encoder or cfg.model.unfreeze_at_epoch >= 0
    tags = [
        "finetune" if trains else "probe",
        cfg.model.head.kind,
        cfg.model.pool_method,
        cfg.data.scanner,
    ]
    try:
        return wandb.init(
            project=cfg.log.wandb_project,
            name=cfg.log.run_name,
            mode=mode,
            dir=folder,
            config=config.to_dict(cfg),
            id=earlier,
            resume="allow" if earlier else None,
            group=os.path.splitext(os.path.basename(cfg.paths.checkpoint_path))[0],
            tags=tags,
        )
    except wandb.Error as error:
        raise ValueError(
            f"W&B did not start: {error}; mend that, or set log.wandb=offline"
        ) from error


def has_key(url):
    # where `wandb login` puts the key
    logins = os.environ.get("NETRC", os.path.expanduser("~/.netrc"))
    try:
        return bool(os.environ.get("WANDB_API_KEY")) or (
            os.path.exists(logins)
            and netrc.netrc(logins).authenticators(urllib.parse.urlparse(url).hostname) is not None
        )
    except netrc.NetrcParseError as error:
        raise ValueError(
            f"log.wandb=auto looks for a key, but {error}; mend the file, or set log.wandb=offline"
        ) from error


def finish(run, saved, ledger_rows):
    """Log what the run came to on validation: summary with intervals and alarms, confusion matrix,
    ROC curves, ledger. saved: the best checkpoint; ledger_rows: the header first."""
    import wandb
    from sklearn.metrics import roc_curve

    y, p = saved["val_predictions"]["y_true"], saved["val_predictions"]["p"].numpy()
    names = ledger.CLASS_NAMES
    result = metrics.evaluate(y, p, len(names), saved["val_predictions"]["participant_id"])
    if saved["train_balanced_accuracy"] is not None:
        result["alarms"] += metrics.gap_alarm(
            saved["train_balanced_accuracy"], saved["val_balanced_accuracy"]
        )
    curves = {}
    for k, name in enumerate(names):
        if 0 < y.count(k) < len(y):
            curves[name] = [axis.tolist() for axis in roc_curve(np.array(y) == k, p[:, k])[:2]]
    title = "ROC, one against the rest"
    xs, ys = ([curve[axis] for curve in curves.values()] for axis in (0, 1))
    header, *rows = ledger_rows
    run.log(
        {
            "val/confusion_matrix": wandb.plot.confusion_matrix(
                y_true=y, preds=p.argmax(axis=1).tolist(), class_names=list(names)
            ),
            "val/roc": wandb.plot.line_series(
                xs, ys, keys=list(curves), title=title, xname="false positives"
            ),
            "ledger": wandb.Table(
                columns=header, data=[[str(cell) for cell in row] for row in rows]
            ),
        }
    )
    run.summary.update({"best_epoch": saved["epoch"], "alarms": result["alarms"]})
    for name in metrics.SCORES:
        low, high = result["ci95"][name] or (None, None)
        summary = {
            f"best/val/{name}": result[name],
            f"best/val/{name}_low": low,
            f"best/val/{name}_high": high,
        }
        run.summary.update(summary)
    run.finish()
