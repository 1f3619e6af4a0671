"""Pictures of the pages, for README.md and docs/. `make pictures` makes the pages and calls this.

    python scripts/pictures.py docs          # docs/report.png, docs/gallery.png, ...

Needs chromium. Run it from the project's root.
"""

import argparse
import pathlib
import shutil
import subprocess
import tempfile

import numpy as np
from PIL import Image

# name: (page, id of the section that is shown, or "" for the top of the page; width and largest
# height in pixels)
SHOTS = {
    "report": ("runs/cls_demo/report.html", "", 1280, 420),
    "gallery": ("runs/cls_demo/report.html", "eyes", 1280, 900),
    "features": ("runs/cls_demo/report.html", "features", 1000, 1200),
    "training": ("runs/cls_demo/report.html", "training", 1280, 1400),
    "comparison": ("runs/comparison.html", "", 1280, 1100),
    "check": ("runs/cls_demo_check.html", "", 1000, 1200),
    "tasks": ("runs/leaderboard.html", "", 1280, 1100),
}
# what goes into a page so that it shows one section alone, opened; PART is its id
ALONE = """<style>main > :not(details) { display: none }</style>
<script>addEventListener("load", () => {
    const part = document.getElementById("PART").closest("main > details")
    part.open = true
    for (const e of [...document.querySelector("main").children]) if (e !== part) e.remove() })
</script></head>"""


def shoot(browser, page, part, width, most, path):
    """Save a PNG of what a browser shows of a page, or of its section `part` alone, without the
    empty rest below it. width and most: as in SHOTS."""
    text = pathlib.Path(page).read_text(encoding="utf-8")
    text = text.replace("</head>", ALONE.replace("PART", part)) if part else text
    with tempfile.TemporaryDirectory() as folder:
        shown, picture = pathlib.Path(folder, "page.html"), pathlib.Path(folder, "page.png")
        shown.write_text(text, encoding="utf-8")
        command = [browser, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"]
        command += [f"--user-data-dir={folder}/browser", f"--window-size={width},{most}"]
        command += [f"--screenshot={picture}", f"file://{shown}"]
        subprocess.run(command, check=True, capture_output=True, timeout=120)
        image = Image.open(picture).convert("RGB")
    pixels = np.asarray(image)
    rows = np.flatnonzero((pixels != pixels[-1, -1]).any(axis=(1, 2)))
    bottom = min(rows[-1] + 20, image.height) if len(rows) else image.height
    image.crop((0, 0, width, bottom)).save(path, optimize=True)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", help="for the pictures, for example docs")
    folder = pathlib.Path(parser.parse_args().folder)
    browsers = map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))
    browser = next(filter(None, browsers), None)
    if not browser:
        raise SystemExit("error: there is no chromium; install it, for example with apt-get")
    for name, (page, part, width, most) in SHOTS.items():
        if not pathlib.Path(page).exists():
            raise SystemExit(f"error: {page} is not there; run make pictures, which makes it")
        shoot(browser, page, part, width, most, folder / f"{name}.png")
        print(f"{folder / name}.png")


if __name__ == "__main__":
    main()
