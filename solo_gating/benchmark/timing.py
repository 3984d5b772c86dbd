"""Times of several engines, taken in turns so that what slows the machine slows all of them."""

import math
import random
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np

Call = Callable[[], Any]
Clock = Callable[[], float]

# What may be timed by. A process's CPU time leaves out what other programs take, on a shared machine,
# and adds up its threads.
CLOCKS: dict[str, Clock] = {"wall": time.perf_counter, "cpu": time.process_time}

# The shortest turn is so long, if there is time for it: much longer than the clock's step and a
# thread's waking up.
TURN = 0.01
LEAST_ROUNDS = 5
# Longer turns would leave fewer rounds than that.
_WANTED_ROUNDS = 20
# Above this spread between rounds, figures are said to be noisy.
NOISY = 0.1
# Calls longer than this many turns are not repeated only to warm the caches.
_LONG = 10


def interleaved(
    calls: Mapping[str, Call],
    seconds: float,
    seed: int = 0,
    clock: Clock = time.perf_counter,
) -> dict[str, list[float]]:
    """Time engines against each other.

    In each round every engine has one turn, in a shuffled order: an untimed call that brings its
    weights back into the caches, and timed ones, as many for all engines, so that a fast engine
    gains no warmer caches by more calls. The number is such that the fastest engine's turn takes
    `TURN` seconds, or less if there were too few rounds then. Rounds follow each other until
    `seconds` are over, `LEAST_ROUNDS` at least. Where all calls are long, the untimed ones are left
    out.

    Args:
        calls: the engines.
        seconds: for all of them together, of the clock's.
        seed: of the order.
        clock: gives seconds.

    Returns:
        For each engine, seconds per call in each round.
    """
    order, shuffle = list(calls), random.Random(seed)
    expected = [_expected(call, clock) for call in calls.values()]
    warmed = min(expected) < _LONG * TURN
    affordable = int(seconds / _WANTED_ROUNDS / sum(expected)) - warmed
    number = max(1, min(math.ceil(TURN / min(expected)), affordable))
    times: dict[str, list[float]] = {name: [] for name in calls}
    start, rounds = clock(), 0
    while rounds < LEAST_ROUNDS or clock() - start < seconds:
        shuffle.shuffle(order)
        for name in order:
            if warmed:
                calls[name]()
            times[name].append(_timed(calls[name], number, clock))
        rounds += 1
    return times


def _expected(call: Call, clock: Clock) -> float:
    """Seconds of a call; of the second one, where the first might be slower and is not long."""
    first = _timed(call, 1, clock)
    return first if first > _LONG * TURN else min(first, _timed(call, 1, clock))


def _timed(call: Call, number: int, clock: Clock) -> float:
    start = clock()
    for _ in range(number):
        call()
    # A call too short for the clock must not be repeated for ever.
    return max(clock() - start, 1e-6) / number


def quickest(calls: Mapping[str, Call], clock: Clock = time.perf_counter) -> str:
    """The name of the engine that is fastest in a short trial: the best of two calls, after one."""
    trial = {name: [_timed(call, 1, clock) for _ in range(3)][1:] for name, call in calls.items()}
    return min(trial, key=lambda name: min(trial[name]))


def paired_ratio(times: list[float], others: list[float]) -> float:
    """The median over rounds of one engine's time divided by another's in the same round."""
    return float(np.median(np.divide(times, others)))


def spread(values: Any) -> float:
    """Interquartile range divided by the median."""
    low, middle, high = np.quantile(values, [0.25, 0.5, 0.75])
    return float((high - low) / middle)


def noisy_note(rows: Iterable[Mapping[str, Any]]) -> list[str]:
    """The sentence under a table that has rows marked as noisy; nothing under another."""
    if not any(row["noisy"] for row in rows):
        return []
    return [
        "Figures marked * are not to be trusted: between rounds the times spread by more than "
        f"{NOISY:.0%} (interquartile range / median)."
    ]


def is_noisy(times: list[float], others: list[float]) -> bool:
    """Whether an engine's times, compared with another's, are too unsteady to be trusted.

    That is if the interquartile range of the other's rounds, or of the ratios in the same round, is
    more than `NOISY` of the median.
    """
    return max(spread(others), spread(np.divide(times, others))) > NOISY
