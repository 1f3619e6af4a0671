"""What train.py and eval.py compute on small data is what an earlier version computed.

Minutes. recorded.py says how the recording is made, and compares more narrowly on the processor
that made it.
"""

import os

import pytest
import recorded
from helpers import FIXTURES

TOLERANCE = 1e-4  # other processors round differently
# Two groups, so that two workers share the time and only two data sets are written.
NAMES = list(recorded.CASES)
GROUPS = {"even cases": NAMES[::2], "odd cases": NAMES[1::2]}


@pytest.mark.slow
@pytest.mark.parametrize("names", GROUPS.values(), ids=GROUPS)
def test_nothing_has_moved(names):
    expected = recorded.load(os.path.join(FIXTURES, "recorded.json.gz"))
    found = recorded.record(names)
    moved = {name: recorded.compare(expected[name], found[name], TOLERANCE) for name in names}
    assert not {name: values for name, values in moved.items() if values}


def test_every_case_is_recorded():
    assert set(recorded.load(os.path.join(FIXTURES, "recorded.json.gz"))) == set(recorded.CASES)
