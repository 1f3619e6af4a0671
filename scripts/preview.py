"""Draw augmented volumes next to the originals. Run it from the project's root.

    python scripts/preview.py --config configs/demo.yaml --config configs/finetune.yaml views.png

Two rows for one training volume of each class: its middle B-scan (rows, columns) and its lateral
plane (frames, columns; mean over rows). Left as it is, then as a training encoder sees it in
several epochs.
"""

import contextlib
import os
import sys

from matplotlib.figure import Figure  # without pyplot: no display, no global state

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import config  # noqa: E402
import data  # noqa: E402
import device  # noqa: E402
import features  # noqa: E402
import figures  # noqa: E402
import files  # noqa: E402
import ledger  # noqa: E402
import phantom  # noqa: E402
import settings  # noqa: E402
import stages  # noqa: E402


def draw(cfg, book, size, views=5):
    """Figure of one training volume of each class, of `size` (D, H, W), and `views` augmented views
    of it."""
    samples = list({s.label: s for s in reversed(book.of("train"))}.values())
    volumes = data.open_volumes(cfg, samples, size)
    figure = Figure((1.8 * (1 + views), 3.4 * len(samples)), layout="constrained")
    no_ticks = {"xticks": [], "yticks": []}
    axes = figure.subplots(2 * len(samples), 1 + views, squeeze=False, subplot_kw=no_ticks)
    arriving = data.stream(volumes, book, range(len(samples)), cfg)
    stage = stages.Stage("preview", len(samples), "volume", reading=volumes.reading)
    with stage, contextlib.closing(arriving):
        for i, key, volume in stage.over(arriving):
            axes[2 * i, 0].set_ylabel(book.classes[samples[i].label])
            draw_views(axes[2 * i : 2 * i + 2], cfg, key, volume)
    for view, axis in enumerate(axes[0]):
        axis.set_title(f"view {view}" if view else "original")
    return figure


def draw_views(axes, cfg, key, volume):
    """Fill the two rows of axes that belong to a volume (1, D, H, W): B-scans, lateral planes."""
    grey = {"cmap": "gray", "aspect": "auto"}
    for view, (scan, lateral) in enumerate(axes.T):
        strength = data.strengths(cfg) if view else {}
        frames = data.augment(volume, strength, f"{cfg.seed} {view} {key}")[0].float()  # (D, H, W)
        middle = frames[len(frames) // 2]
        if not view:
            # one grey scale for all views of a scan; the faint lateral planes have their own
            low, high = middle.aminmax()
        scan.imshow(middle, vmin=low, vmax=high, **grey)
        lateral.imshow(frames.mean(dim=1), **grey)


def main():
    parser = config.parser(__doc__, path="file to write, for example views.png")
    args = parser.parse_intermixed_args()
    cfg = config.load(args.config, args.overrides)
    settings.check_placeholders(cfg)
    if not data.strengths(cfg):
        raise ValueError(
            "there is nothing to preview: every switch of data.augment is off; set "
            "data.augment.flip=true, say"
        )
    phantom.prepare(cfg)
    book = ledger.read(cfg)
    ledger.check(book, cfg.data.max_missing)
    figure = draw(cfg, book, features.open_encoder(cfg).size)
    files.write(args.path, figures.picture(figure, "png", dpi=90))
    print(f"preview: {args.path}")


if __name__ == "__main__":
    device.run(main)
