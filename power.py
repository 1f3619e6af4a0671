"""How many participants would show a difference between two runs?

    needed(y, p_a, p_b, people)      # numbers
    sentence(a, b, found)            # in words, for eval.py --compare A B --power

From the answers that the two gave to the same participants, right or wrong.
"""

import math

import numpy as np
from scipy.stats import norm

import intervals
import resampling

POWER, LEVEL = 0.8, 0.05  # two-sided


def needed(y, p_a, p_b, people=None):
    """-> dict: difference (balanced accuracy of a minus b), participants (scored now), needed
    (to show this difference; None where it is zero), shown (the smallest difference that those of
    now would show).

    Both at a power of 80 % and a two-sided level of 5 %, by the normal approximation: a difference
    of (z_0.975 + z_0.8) standard errors, whose square falls as the participants become more.
    """
    y = np.asarray(y)
    right_a, right_b = (np.asarray(p).argmax(axis=1) == y for p in (p_a, p_b))
    gain = right_a.astype(float) - right_b  # (n,)
    classes, number, sizes = np.unique(y, return_inverse=True, return_counts=True)
    means = np.bincount(number, gain) / sizes
    difference, people_now = float(means.mean()), len(resampling.participants(y, people)[0])
    # each row's part in the difference, which participants add up
    part = (gain - means[number]) / (sizes[number] * len(classes))
    error = math.sqrt(intervals.variance_of_sum(part[:, None], y, people)[0])
    errors = norm.ppf(1 - LEVEL / 2) + norm.ppf(POWER)
    # sums of recalls are equal only up to rounding
    more = (errors * error / difference) ** 2 if abs(difference) > 1e-12 else None
    return {
        "difference": difference,
        "participants": people_now,
        "needed": None if more is None else max(2, math.ceil(people_now * more)),
        "shown": float(errors * error),
    }


def sentence(a, b, found):
    """What `needed` found of two runs' names, in words."""
    now, shown = found["participants"], found["shown"]
    if not shown:
        return f"    power: {a} and {b} are right for the same participants, which tells nothing"
    if found["needed"] is None:
        first = f"{a} and {b} have the same balanced accuracy: no number of participants shows it"
    else:
        first = (
            f"the difference of {abs(found['difference']):.3f} between {a} and {b}, if it is the "
            f"true one, is shown with {found['needed']} participants in {100 * POWER:.0f} % of "
            "cases"
        )
    return (
        f"    power: {first}; {now} participants show one of {shown:.3f} so often. This takes a "
        f"paired test at {100 * LEVEL:.0f} %, two-sided, the same shares of classes, and answers "
        "that agree as often as these"
    )
