"""Save a picture of the synthetic eyes, for the README. Run it from the project's root.

    python scripts/phantom_picture.py docs/phantom.png

Above: the central B-scan of each scanner. Below: one eye as it would be in each class, with the
boosted effect.
"""

import argparse
import os
import sys

import numpy as np
from matplotlib.figure import Figure  # without pyplot: no display, no global state

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import figures  # noqa: E402
import files  # noqa: E402
import phantom  # noqa: E402


def picture(path, seed=5):
    """Save the figure to path."""
    figure = Figure(figsize=(15, 6.4), layout="constrained")
    shown = []  # (protocol, label, title)
    for k in (1, 2, 5, 4):
        protocol = phantom.PROTOCOLS[k]
        shown.append((protocol, 0, f"{protocol['model']}, {protocol['region']}"))
    for label, group in enumerate(phantom.GROUPS):
        title = f"Triton, class {label}: {group.split('_')[0]} (boosted)"
        shown.append((phantom.PROTOCOLS[0], label, title))
    for axis, (protocol, label, title) in zip(figure.subplots(2, 4).flat, shown):
        shape = (41, *protocol["shape"][1:])
        eye = phantom.draw_eye(seed, 0, "R", 60, label, "boosted")
        volume = phantom.synthesize(eye, protocol, shape, np.random.default_rng([seed, 0, 3]))
        depth = protocol["axial"] * shape[1] / 1000  # mm
        extent = (0, protocol["extent"][1], depth, 0)
        axis.imshow(volume[20], cmap="gray", vmin=0, vmax=255, extent=extent, aspect="auto")
        axis.set_ylim(0.5 * depth + 0.7, 0.5 * depth - 0.6)
        axis.set(title=title, xlabel="mm", ylabel="depth in mm")
    files.write(path, figures.picture(figure, "png", dpi=100))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("path", help="PNG file to write, for example phantom.png")
    picture(parser.parse_args().path)
