"""The progress line of the stage that runs now, on stderr: how far, how fast, and what limits it.

    plan([("encoding", 743), ("training", 0)])       # what is ahead: (kind, number of items)
    with Stage("encode", 600, "volume", "encoding", reading=volumes.reading) as stage:
        for volume in stage.over(volumes_of_this_stage): ...

    encode:  37%|█ | 276/743, 2.44s/volume, 19:02 left, network-bound; job: 19:02 left, then ...

A terminal has one line, redrawn every second. A file gets whole lines: one every LOG_EVERY seconds,
and one at the end of a stage of at least LOG_FROM seconds. Rank 0 alone shows. A rate is that of
the last minute, or of the last ten items where these took longer.

The job's time is that of this stage and of every planned one whose kind has a rate: this stage's,
or the last one's of that kind. It is "at most" that, for features may be kept already, and patience
may end training. Kinds without a rate are named, and no number is made up for them.
"""

import contextlib
import math
import os
import sys
import threading
import time
from collections import Counter, deque

from tqdm import tqdm

DRAW_EVERY = 1  # seconds between two drawings on a terminal
LOG_EVERY = 300  # seconds between two lines of a stage in a file
LOG_FROM = 10  # seconds that a stage takes at least, to have a line in a file when it ends
WINDOW, ITEMS = 60, 10  # a rate is that of the last so many seconds and items
HARDLY = 0.2  # share of the time in which the consumer may wait for volumes and still be the limit

PLAN = []  # what is ahead: (kind, number)
SECONDS = {}  # kind: seconds per item, of the last stage of that kind that ended
NOWHERE = open(os.devnull, "w")  # noqa: SIM115  (for as long as the process lasts)

DONE = "{desc}: {n_fmt}/{total_fmt} in {elapsed}, {rate_fmt}{bound}"
PACE = ", {rate_fmt}, {remaining} left"
LINE = "{desc}: {n_fmt}/{total_fmt} in {elapsed}" + PACE + "{bound}{job}"
BAR = "{desc}: {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt}" + PACE + "{bound}{job}"


def plan(ahead):
    """From now on these stages, [(kind, number of items at most, 0 where it is not known)], are
    ahead. A Stage takes the first of its kind off the list when it is made."""
    PLAN[:] = ahead


class Stage(tqdm):
    """A stage and its line. Use it in a `with` statement, and call update() for every item, or go
    through `over`.

    desc: its name; total: its number of items; unit: what an item is called. kind: see `plan`; None
    where it is not planned. reading: the Reading of the volumes that the stage waits for. shown: is
    there a line at all? None: on rank 0 alone. leave: does the line stay on a terminal when the
    stage ends? options: of tqdm, such as initial.
    """

    monitor_interval = 0  # no thread of tqdm's: `keep_drawing` draws
    thread = None

    def __init__(
        self, desc, total, unit, kind=None, reading=None, shown=None, leave=True, **options
    ):
        if shown is None:
            import device  # here, because it imports torch, which takes seconds

            shown = device.rank() == 0
            if device.world() > 1:
                desc += f" on replica 0 of {device.world()}"
        self.kind, self.reading, self.is_terminal = kind, reading, sys.stderr.isatty()
        planned = [entry for entry in PLAN if entry[0] == kind]
        if planned:
            PLAN.remove(planned[0])
        # (time, items, what `reading` knew), of the beginning and of the last drawings
        self.recent = deque([(time.monotonic(), options.get("initial", 0), self.waited())])
        self.begun, self.ended = self.recent[0], threading.Event()
        super().__init__(
            desc=desc,
            total=total,
            unit=unit,
            leave=leave,
            file=sys.stderr if self.is_terminal else NOWHERE,
            dynamic_ncols=True,
            mininterval=math.inf,  # update() counts and does not draw
            bar_format=BAR if self.is_terminal else LINE,
            disable=not shown or not total,
            **options,
        )

    def __enter__(self):
        if not self.disable:
            self.thread = threading.Thread(target=self.keep_drawing, daemon=True)
            self.thread.start()
        return self

    def over(self, items):
        """Yield the items; one is done when the next is asked for."""
        for item in items:
            yield item
            self.update()

    def keep_drawing(self):
        """In a thread of its own, so that a stage that stands still says so."""
        while not self.ended.wait(DRAW_EVERY if self.is_terminal else LOG_EVERY):
            now = time.monotonic()
            self.recent.append((now, self.n, self.waited()))
            while self.recent[1][0] < now - WINDOW and self.recent[1][1] <= self.n - ITEMS:
                self.recent.popleft()
            self.refresh() if self.is_terminal else self.log()

    def log(self):
        # tqdm fills rates up to a width that does not change, for a terminal
        print(" ".join(str(self).split()), file=sys.stderr, flush=True)

    def waited(self):
        """{what held the consumer up: seconds} so far."""
        return self.reading.so_far() if self.reading else Counter()

    @property
    def format_dict(self):
        """What the formats above are filled with, by tqdm."""
        then, n, waited = self.recent[0]
        seconds = time.monotonic() - then
        rate = max(0, self.n - n) / seconds if seconds else 0
        bound = self.reading and self.reading.bound(self.waited() - waited, seconds)
        return super().format_dict | {
            "n": min(self.n, self.total),
            "rate": rate,
            "bar_format": self.bar_format if rate else self.bar_format.replace(PACE, ""),
            "bound": f", {bound}-bound" if bound else "",
            "job": self.job_left(rate),
        }

    def job_left(self, rate):
        """The time that this stage, at so many items a second, and the planned ones take, in
        words; "" where none is planned."""
        if not PLAN:
            return ""
        seconds = SECONDS | ({self.kind: 1 / rate} if rate else {})
        ahead = sum(number * seconds[kind] for kind, number in PLAN if kind in seconds)
        unknown = dict.fromkeys(kind for kind, _ in PLAN if kind not in seconds)
        words = []
        if rate:
            left = self.format_interval((self.total - self.n) / rate + ahead)
            words.append(f"{'at most ' if ahead else ''}{left} left")
        if unknown:
            words.append(f"then {' and '.join(unknown)}")
        return f"; job: {', '.join(words)}"

    def close(self):
        """End the stage, and remember its rate for the next of its kind. tqdm calls it at the end
        of a `with` block."""
        if self.disable:
            return
        self.ended.set()
        if self.thread:
            self.thread.join()
        self.recent, self.bar_format = deque([self.begun]), DONE  # of the whole stage
        seconds, items = time.monotonic() - self.begun[0], self.n - self.begun[1]
        if items:
            SECONDS[self.kind] = seconds / items
        if not self.is_terminal and seconds >= LOG_FROM:
            self.log()
        super().close()


class Reading:
    """What volumes on their way are in, and for how long their consumer has waited for one.

    Threads say what they do by `during`: "disk", and within that "network" or "decode", and
    "augmentation"; the consumer by "wait". decoders: how many volumes are decoded at once.
    """

    def __init__(self, decoders=1):
        self.decoders, self.lock = decoders, threading.Lock()
        self.doing, self.since = Counter(), time.monotonic()
        self.seconds = Counter()  # in which the consumer waited, by what held it up

    @contextlib.contextmanager
    def during(self, what):
        self.change(what, 1)
        try:
            yield
        finally:
            self.change(what, -1)

    def change(self, what, by):
        with self.lock:
            now = time.monotonic()
            if self.doing["wait"]:
                self.seconds[self.holds_up()] += now - self.since
            self.since = now
            self.doing[what] += by

    def holds_up(self):
        """What most volumes on their way are in now; decoding, where they queue for it."""
        parts = {name: self.doing[name] for name in ("network", "decode", "augmentation")}
        if parts["decode"] > self.decoders:
            return "decode"
        parts["disk"] = self.doing["disk"] - parts["network"] - parts["decode"]
        return max(parts, key=parts.get)

    def so_far(self):
        """`seconds`, up to now."""
        self.change("wait", 0)
        with self.lock:
            return Counter(self.seconds)

    def bound(self, waited, seconds):
        """What bounds a stage that took so many seconds, in which its consumer waited {what held it
        up: seconds}; None where it is too early to say."""
        if seconds < 1:
            return None
        if waited.total() < HARDLY * seconds:
            return "encoder"
        return waited.most_common(1)[0][0]
