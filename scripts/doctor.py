"""Is this machine ready for a run? A line for each thing that it needs, right or what to do.

    .venv/bin/python scripts/doctor.py --config configs/single_domain_01.yaml

Starts nothing and writes nothing. Of a bucket, two objects are asked for; no key is printed. Exit
status 1 where something must be mended first.
"""

import importlib.metadata
import os
import re
import shutil
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import torch

import b2
import config
import device
import ledger
import settings
import tracking

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


def python(cfg):
    version = ".".join(map(str, sys.version_info[:2]))
    if version not in ("3.11", "3.12", "3.13"):
        raise ValueError(f"Python {version} was not tried; octprobe is for 3.11, 3.12 and 3.13")
    return f"Python {version}"


def packages(cfg):
    wrong = []
    for name in ("requirements.txt", "requirements-common.txt"):
        with open(os.path.join(ROOT, name), encoding="utf-8") as f:
            pins = re.findall(r"^([\w.-]+)(?:\[.*\])?==(\S+)", f.read(), re.MULTILINE)
        for package, version in pins:
            try:
                found = importlib.metadata.version(package).split("+")[0]
            except importlib.metadata.PackageNotFoundError:
                found = "missing"
            if found != version:
                wrong.append(f"{package} is {found}, pinned is {version}")
    if wrong:
        raise ValueError(f"{'; '.join(wrong)}; run make setup")
    return "all packages are those that are pinned"


def accelerator(cfg):
    dev = device.get(cfg.device.backend)
    if dev.type == "cpu":
        return f"no GPU or TPU is used; {torch.get_num_threads()} CPU threads"
    return device.describe(dev)


def memory(cfg):
    available = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 1e9
    if available < 4:
        raise ValueError(f"{available:.1f} GB of memory are free; a full-size encoder needs 4 GB")
    return f"{available:.0f} GB of memory are free"


def disk(cfg):
    found = []
    for key, folder in (("cache_dir", cfg.paths.cache_dir), ("run_dir", cfg.paths.run_dir)):
        folder = os.path.abspath(os.path.expanduser(folder))
        while not os.path.exists(folder):
            folder = os.path.dirname(folder)
        if not os.access(folder, os.W_OK):
            raise ValueError(f"{folder} cannot be written; set paths.{key} to another folder")
        found.append(f"{shutil.disk_usage(folder).free / 1e9:.0f} GB are free for paths.{key}")
    return ", ".join(found)


def data(cfg):
    settings.check_placeholders(cfg)
    if cfg.demo.dir:
        return "the demo's data and encoder are written by make probe"
    b2.find(ledger.place_of(cfg, cfg.data.labels), 30)
    encoder = cfg.paths.checkpoint_path
    if encoder and not os.path.isdir(os.path.expanduser(encoder)):  # a loader may take a folder
        b2.find(encoder, 30)
    return "the tables and the encoder are there"


def wandb(cfg):
    tracking.check(cfg)
    mode, variable = tracking.wanted_mode(cfg)
    if mode == "online":
        import wandb

        if not tracking.has_key(wandb.setup().settings):
            return "W&B has no key, so that runs are logged offline; wandb login makes one"
    return f"W&B is {mode}" + (f", by {variable}" if variable else "")


def main():
    args = config.parser(__doc__).parse_intermixed_args()
    cfg = config.load(args.config, args.overrides)
    failed = 0
    for check in (python, packages, accelerator, memory, disk, data, wandb):
        try:
            print(f"ok    {check(cfg)}")
        except (ValueError, OSError) as error:
            print(f"MEND  {error}")
            failed += 1
    sys.exit(f"error: {failed} to mend, named above" if failed else 0)


if __name__ == "__main__":
    device.run(main)
