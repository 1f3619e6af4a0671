"""From the table to the splits: how many participants are used, and why the others are not.

    found = count(book, "participants.tsv")     # Flow, of a ledger.Ledger
    draw(found)                                 # a figure in the manner of CONSORT's flow diagram
    table(found)                                # its numbers: (header, rows)
    in_words(found)                             # and for who cannot see it

CONSORT 2010 is the standard of reporting trials, whose diagram readers of medical papers know
(Schulz et al., BMJ 340:c332). All counts are of participants; where eyes or volumes are scored
(data.unit), a split counts these as well.
"""

import textwrap
from collections import Counter
from dataclasses import dataclass

import figures
from labels import SPLITS, grouped

WIDTH = 4.8  # inches: narrower than other figures, so that its text can be read on a phone
MOST = 6  # reasons, and classes of a split, that the figure names before it sums up the rest
SIZE = 8.5  # of the text, in points
LINE = 1.3 * SIZE / 72  # inches from line to line
LETTER = 0.6 * SIZE / 72  # inches that a letter takes, on the average
PAD = 0.07  # inches between a box and its text
GAP = 0.26  # inches between boxes


@dataclass
class Flow:
    """left_out, missing: {reason: participants}, the most frequent first."""

    source: str  # the name of the table
    listed: int  # participants of the table
    left_out: dict  # not asked for, or known to have no OCT
    missing: dict  # who should have a volume, and has none
    splits: list  # Parts: all that is used, then train, val and test
    unit: str  # data.unit

    @property
    def eligible(self):
        return self.listed - sum(self.left_out.values())


@dataclass
class Part:
    """What is used of a split. classes: {name: units}."""

    name: str
    participants: int
    units: int
    volumes: int
    classes: dict


def count(book, source):
    """The Flow of a ledger. A participant is used where any eye or volume is; one without is
    counted once, with the reason of the first."""
    left_out, missing = Counter(book.left_out.values()), Counter()
    rows_of = grouped(book.rows, lambda row: row.participant_id)
    for rows in rows_of.values():
        states = {row.status for row in rows}
        if "used" not in states:
            first = next((row for row in rows if row.status == "missing"), rows[0])
            (missing if "missing" in states else left_out)[first.cause or "not said"] += 1
    parts = []
    for split in (None, *SPLITS):
        rows = [r for r in book.rows if r.status == "used" and split in (None, r.split)]
        of_class = Counter(row.label for row in rows)
        parts.append(
            Part(
                split or "used",
                len({row.participant_id for row in rows}),
                len(rows),
                sum(row.volumes for row in rows),
                {name: of_class[label] for label, name in enumerate(book.classes)},
            )
        )
    listed = len(rows_of) + len(book.left_out)
    ordered = (dict(counter.most_common()) for counter in (left_out, missing))
    return Flow(source, listed, *ordered, parts, book.unit)


def counted(number, word):
    """1 -> "1 eye", 2 -> "2 eyes"."""
    return f"{number} {word}{'' if number == 1 else 's'}"


def amounts(part, unit):
    """What is used of a split, in words: participants, units where these are others, volumes."""
    words = [counted(part.participants, "participant")]
    words += [counted(part.units, unit)] if unit == "eye" else []
    return [*words, counted(part.volumes, "volume")]


def shortened(reasons, most):
    """{reason: number} -> [(reason, number)]: the first `most`, then the sum of all others. A
    single other one is named itself, for a sum would take as much room."""
    first, rest = list(reasons.items())[:most], list(reasons.values())[most:]
    if len(rest) == 1:
        return list(reasons.items())
    return first + ([(f"and {len(rest)} more", sum(rest))] if rest else [])


# ------------------------------------------------------------------------------------- as a table


def table(flow, most=50):
    """The numbers of the figure -> (header, rows of texts). most: reasons that are named."""
    with_eyes = flow.unit == "eye"

    def row(name, number, units="", volumes=""):
        return [name, str(number), *([str(units)] if with_eyes else []), str(volumes)]

    rows = [row(f"in {flow.source}", flow.listed)]
    rows += [row(f"left out: {why}", number) for why, number in shortened(flow.left_out, most)]
    rows.append(row("should have a volume", flow.eligible))
    rows += [row(f"missing: {why}", number) for why, number in shortened(flow.missing, most)]
    rows += [row(p.name, p.participants, p.units, p.volumes) for p in flow.splits]
    return ["", "participants", *(["eyes"] if with_eyes else []), "volumes"], rows


def in_words(flow):
    """What the figure shows, with all numbers."""

    def listed(reasons):
        named = "; ".join(f"{why}: {number}" for why, number in shortened(reasons, 20))
        return f"{sum(reasons.values())}{f' ({named})' if named else ''}"

    parts = [
        f"{part.name} {', '.join(amounts(part, flow.unit))} ("
        + "; ".join(f"{name}: {number}" for name, number in part.classes.items())
        + ")"
        for part in flow.splits
    ]
    return (
        f"Flow of participants. In {flow.source}: {flow.listed}. Left out: "
        f"{listed(flow.left_out)}. Should have a volume: {flow.eligible}. Missing: "
        f"{listed(flow.missing)}. {'. '.join(parts)}."
    )


# ------------------------------------------------------------------------------------- as a figure


@dataclass
class Box:
    """Texts in a frame, `width` inches wide: a title, and paragraphs below it."""

    width: float
    title: str
    paragraphs: list

    def __post_init__(self):
        letters = int((self.width - 2 * PAD) / LETTER)
        indent = {"subsequent_indent": "   "}
        wrapped = lambda text: textwrap.wrap(figures.label(text, 100), letters, **indent) or [""]
        self.title = "\n".join(textwrap.wrap(figures.label(self.title, 80), int(0.9 * letters)))
        self.lines = [line for text in self.paragraphs for line in wrapped(text)]

    @property
    def height(self):
        return 2 * PAD + LINE * (1 + self.title.count("\n") + len(self.lines))

    def draw(self, axis, left, top):
        """Draw it with its upper left corner there, on an axis whose unit is an inch."""
        from matplotlib.patches import Rectangle

        lower_left = left, top - self.height
        frame = {"facecolor": "none", "edgecolor": "0.3", "linewidth": 0.8}
        axis.add_patch(Rectangle(lower_left, self.width, self.height, **frame))
        style = {"va": "top", "fontsize": SIZE, "linespacing": 1.1}
        axis.text(left + PAD, top - PAD, self.title, fontweight="bold", **style)
        for number, line in enumerate(self.lines, 1 + self.title.count("\n")):
            axis.text(left + PAD, top - PAD - number * LINE, line, **style)


def boxes(flow):
    """The boxes of the figure: three lists, of those on the main line, those beside it, and those
    of the splits."""
    used, *splits = flow.splits
    narrow, beside, half = (WIDTH - 0.24) / 3, 0.6 * WIDTH, 0.5 * WIDTH

    def of_reasons(title, reasons):
        lines = [f"{why}: {number}" for why, number in shortened(reasons, MOST)]
        return Box(beside, f"{title}: {sum(reasons.values())}", lines)

    def of_split(part):
        classes = shortened(part.classes, 2 * MOST)
        lines = [f"{figures.label(name, 40)}: {number}" for name, number in classes]
        return Box(narrow, part.name, [*amounts(part, flow.unit), "", *lines])

    people = lambda number: counted(number, "participant")
    main = [
        Box(half, people(flow.listed), [f"in {flow.source}"]),
        Box(half, people(flow.eligible), ["that should have a volume"]),
        Box(half, f"{people(used.participants)} used", amounts(used, flow.unit)[1:]),
    ]
    sides = [of_reasons("Left out", flow.left_out), of_reasons("Missing", flow.missing)]
    return main, sides, [of_split(part) for part in splits]


@figures.style()
def draw(flow):
    """The flow as a matplotlib figure: from the table down, with who is left out beside the line,
    to the three splits."""
    main, sides, splits = boxes(flow)
    gaps = [side.height + GAP for side in sides] + [1.5 * GAP]
    height = 0.04 + sum(box.height for box in main) + sum(gaps) + max(b.height for b in splits)
    figure, axis = figures.new_figure(WIDTH, height)
    figure.set_layout_engine("none")
    axis.set_position([0, 0, 1, 1])  # so that its units are inches
    axis.set(xlim=(0, WIDTH), ylim=(0, height))
    axis.set_axis_off()
    arrow = {"arrowstyle": "-|>", "color": "0.3", "linewidth": 0.8, "shrinkA": 0, "shrinkB": 0}

    def point(start, end):  # an arrow between two (x, y)
        axis.annotate("", end, start, arrowprops=arrow)

    top, line = height - 0.02, 0.25 * WIDTH  # y of the next box; x of the main line
    for box, side, gap in zip(main, [*sides, None], gaps):
        box.draw(axis, 0.02, top)
        top -= box.height
        if side:
            point((line, top), (line, top - gap))
            middle = top - gap / 2
            point((line, middle), (0.98 * WIDTH - side.width, middle))
            side.draw(axis, 0.98 * WIDTH - side.width, middle + side.height / 2)
        top -= gap
    fork, step = top + 0.75 * GAP, (WIDTH - 0.04 - splits[0].width) / 2
    centres = [0.02 + n * step + splits[0].width / 2 for n in range(3)]
    straight = {"color": "0.3", "linewidth": 0.8, "linestyle": "-", "marker": ""}
    axis.plot([line, line], [top + gaps[-1], fork], **straight)
    axis.plot([centres[0], centres[-1]], [fork, fork], **straight)
    for centre, box in zip(centres, splits):
        point((centre, fork), (centre, top))
        box.draw(axis, centre - box.width / 2, top)
    return figure
