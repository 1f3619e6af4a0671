"""Pages as a browser shows them: chromium, without a window."""

import html
import json
import re
import shutil
import subprocess

import numpy as np
from PIL import Image

BROWSERS = map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))
CHROMIUM = next(filter(None, BROWSERS), None)
# a page in a frame of some width, which tells in its title: its own width and that of the frame,
# the number of elements that stick out, of tables that must be scrolled, of pictures that are shown
# and have a text, of pictures
FRAME = """<body style="margin:0">
<iframe id=f style="border:0;width:WIDTHpx;height:9000px" srcdoc="PAGE"></iframe><script>
onload = () => { const d = f.contentDocument, root = d.documentElement
    const out = [...d.body.querySelectorAll("*")].filter(
        e => e.getBoundingClientRect().right > root.clientWidth + 1
            && !e.closest(".wide:not(.cards)"))
    const scrolls = [...d.querySelectorAll(".wide")].filter(e => e.scrollWidth > e.clientWidth + 1)
    document.title = JSON.stringify([root.scrollWidth, root.clientWidth, out.length, scrolls.length,
        [...d.images].filter(i => i.alt && i.naturalWidth).length, d.images.length]) }</script>"""


def seen(page, width, folder):
    """The page in a headless browser, `width` wide -> what FRAME tells, and a picture (rows,
    columns)."""
    framed, picture = folder / f"{width}.html", folder / f"{width}.png"
    srcdoc = html.escape(page.read_text())
    framed.write_text(FRAME.replace("WIDTH", str(width)).replace("PAGE", srcdoc))
    browser = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"]
    browser += [f"--user-data-dir={folder}/chromium", f"--window-size={width},9000"]

    def look(option):
        script = [*browser, option, f"file://{framed}"]
        return subprocess.run(script, capture_output=True, text=True, timeout=120, check=True)

    title = re.search("<title>(.*?)</title>", look("--dump-dom").stdout)[1]
    look(f"--screenshot={picture}")
    return json.loads(html.unescape(title)), np.asarray(Image.open(picture).convert("L"))
