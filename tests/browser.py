"""A page as headless Chromium shows it, for tests.

    look = seen(page, width, folder, dark=True)     # a Look
    assert look.problems() == []

axe-core (npm), which checks accessibility, comes with `make test-slow`.
"""

import html
import json
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

BROWSERS = map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))
CHROMIUM = next(filter(None, BROWSERS), None)
AXE = Path(__file__).parent / "node_modules/axe-core/axe.min.js"

# The page in a frame of some width, for a window cannot be narrower than 500 pixels. Its title
# tells what a Look has. Sections that are folded are opened: what is in them must fit, too.
FRAME = """<body style="margin:0">
<iframe id=f style="border:0;width:WIDTHpx;height:9000px" srcdoc="PAGE"></iframe><script>
onload = async () => { const d = f.contentDocument, root = d.documentElement
    d.querySelectorAll("details").forEach(e => e.open = true)
    await f.contentWindow.document.fonts.ready
    const out = [...d.body.querySelectorAll("*")].filter(
        e => e.getBoundingClientRect().right > root.clientWidth + 1 && !e.closest(".wide"))
    const scrolls = [...d.querySelectorAll(".wide")].filter(e => e.scrollWidth > e.clientWidth + 1)
    const found = await f.contentWindow.axe.run(d, {resultTypes: ["violations"]})
    document.title = JSON.stringify({width: root.clientWidth, own_width: root.scrollWidth,
        sticks_out: out.map(e => e.outerHTML.slice(0, 200)),
        scrolls: scrolls.map(e => e.textContent.slice(0, 200)),
        images: d.images.length,
        told: [...d.images].filter(i => i.alt && i.naturalWidth).length,
        violations: found.violations.map(v => [v.impact, v.id, v.nodes[0].html.slice(0, 300),
            v.nodes[0].failureSummary]) }) }</script>"""


@dataclass
class Look:
    """width: of the frame, own_width: of the page in it; sticks_out: elements beyond its edge;
    scrolls: tables that must be scrolled; images, told: how many, and how many of them are shown
    and have a text; violations: what axe finds (impact, rule, element, why); console: what the
    browser complains of; pixels (rows, columns): the page in grey."""

    width: int
    own_width: int
    sticks_out: list
    scrolls: list
    images: int
    told: int
    violations: list
    console: list
    pixels: np.ndarray

    def problems(self, may_scroll=False):
        """All that no page may have -> texts. may_scroll: tables may be wider than the page."""
        found = [f"sticks out: {e}" for e in self.sticks_out]
        found += [] if may_scroll else [f"must be scrolled: {text}" for text in self.scrolls]
        found += ["the page is wider than its window"] if self.own_width > self.width else []
        found += ["an image is not shown, or has no text"] if self.told < self.images else []
        found += [str(v) for v in self.violations if v[0] in ("serious", "critical")]
        found += ["blank"] if np.ptp(self.pixels[:1500]) < 50 else []
        return found + self.console


def seen(page, width, folder, dark=False):
    """The page (a path) in a browser of so many pixels -> Look. folder: for temporary files."""
    assert CHROMIUM, "this test looks at pages in chromium: apt-get install chromium"
    assert AXE.exists(), "this test needs axe-core: make tests/node_modules"
    framed, picture = folder / f"{width}.html", folder / f"{width}.png"
    text = Path(page).read_text(encoding="utf-8")
    checked = text.replace("</head>", f"<script>{AXE.read_text()}</script></head>")
    frame = lambda content: FRAME.replace("WIDTH", str(width)).replace("PAGE", html.escape(content))
    browser = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"]
    browser += [f"--user-data-dir={folder}/chromium", f"--window-size={width},9000"]
    browser += ["--enable-logging=stderr", "--virtual-time-budget=60000"]
    browser += ["--blink-settings=preferredColorScheme=0"] if dark else []

    def look(content, option):
        framed.write_text(frame(content), encoding="utf-8")
        script = [*browser, option, f"file://{framed}"]
        return subprocess.run(script, capture_output=True, text=True, timeout=180, check=True)

    done = look(checked, "--dump-dom")
    told = json.loads(html.unescape(re.search("<title>(.*?)</title>", done.stdout, re.S)[1]))
    console = re.findall("CONSOLE.*", done.stderr)
    look(text, f"--screenshot={picture}")
    return Look(**told, console=console, pixels=np.asarray(Image.open(picture).convert("L")))
