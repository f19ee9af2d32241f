"""Test beds of the suites: floors from the same run, one way to report, L1 tables, engines in a storm's rig.

Names of benchmarks are keys of their history: never rename one. Inputs are made outside the timed body. Figures are
compared by ``min``, which moves by a few per cent between runs, where means move by half.
"""

import os
import timeit
from functools import cache

import numpy as np

from s2shadow._floor import chase, nothing, stream
from s2shadow.storm import Rig, StormConfig, build

PAGE = 4096
BLOCK = 2 << 20
ENTRIES = 512


@cache
def load_ns(nbytes):
    """ns per dependent load over this many bytes."""
    return min(chase(nbytes, 1 << 18, seed) for seed in (1, 2, 3))


def floor_ns(footprints):
    """The floor of an operation: one dependent load in each footprint (bytes, rounded up to a power of two)."""
    return sum(load_ns(max(PAGE, 1 << (int(nbytes) - 1).bit_length())) for nbytes in footprints)


@cache
def call_ns():
    """The floor of an operation that is one call and touches next to nothing: an empty call of the same kind."""
    return min(timeit.repeat("call(0, 0)", globals={"call": nothing}, number=10_000, repeat=10)) * 1e5


@cache
def stream_ns(entries):
    """ns per table entry, read and written in order."""
    return stream(entries)


FULL = os.environ.get("S2SHADOW_BENCH") == "full"


def sized(full, small):
    """The size that a figure of the record is taken at, or a smaller one for everyday runs."""
    return full if FULL else small


class Report:
    """Runs one operation; stores ns per operation, floor and ratio beside pytest-benchmark's seconds per call."""

    def __init__(self, benchmark):
        self.benchmark = benchmark

    def __call__(self, run, *, operations=1, footprints=(), floor=None):
        """``run`` as often as pytest-benchmark likes: it leaves things as they were. ``operations`` in one run.

        The floor is ``floor()``, ns per operation by code that does the same and no more, or else one dependent load
        in each of ``footprints``."""
        self.benchmark(run)
        self._store(operations, footprints, {"floor_ns": floor()} if floor and not self.benchmark.disabled else {})

    def rounds(self, run, prepare, *, rounds, operations=1, footprints=(), floor=None, beyond=None, **more):
        """``prepare`` before each ``run``, untimed. ``beyond``: ns per operation to subtract, as what is measured comes
        on top of that. Further keywords are stored; like floor and beyond, those that are functions are called in
        each round, turn and turn about with ``run``, so that a busy machine slows all, and the least is kept."""
        sampled = {"floor_ns": floor, "bare_ns": beyond, **more}
        sampled = {key: take for key, take in sampled.items() if callable(take)}
        least = {}

        def setup():
            for key, take in sampled.items() if not self.benchmark.disabled else ():
                least[key] = min(take(), least.get(key, float("inf")))
            prepare()

        self.benchmark.pedantic(run, setup=setup, rounds=rounds, warmup_rounds=1, iterations=1)
        self._store(operations, footprints, {**least, **{k: v for k, v in more.items() if not callable(v)}})

    def _store(self, operations, footprints, more):
        if self.benchmark.stats is None:  # --benchmark-disable
            return
        info = {"operations": operations, "ns_per_operation": self.benchmark.stats.stats.min * 1e9 / operations}
        if footprints:
            info["floor_ns"] = floor_ns(footprints)
        info.update(more)
        if "bare_ns" in info:
            info["whole_ns"] = info["ns_per_operation"]
            info["ns_per_operation"] -= info["bare_ns"]
        if "floor_ns" in info:
            info["times_floor"] = info["ns_per_operation"] / info["floor_ns"]
        self.benchmark.extra_info.update({k: round(v, 3) if isinstance(v, float) else v for k, v in info.items()})


def stage2_tables(address, frames, *, levels, leaf=3):
    """4K-granule tables at ``address`` that map IPA 0 upward to ``frames``: pages, or blocks where ``leaf`` is 1.

    Returns all table pages as one uint64 array, root first, and the bytes of the tables of each level.
    """
    counts = [len(frames)]
    for _ in range(levels):
        counts.insert(0, -(-counts[0] // ENTRIES))
    counts.pop()
    assert counts[0] == 1, "more than one root table"
    starts = address + PAGE * np.cumsum([0, *counts])
    image = np.zeros(sum(counts) * ENTRIES, dtype=np.uint64)
    for level in range(levels):
        if level == levels - 1:
            # AF, inner shareable, read-write, Normal write-back
            entries = np.asarray(frames, dtype=np.uint64) | np.uint64(1 << 10 | 3 << 8 | 3 << 6 | 0xF << 2 | leaf)
        else:
            entries = (starts[level + 1] + PAGE * np.arange(counts[level + 1])).astype(np.uint64) | np.uint64(3)
        at = int(starts[level] - address) // 8
        image[at : at + len(entries)] = entries
    return image, [count * PAGE for count in counts]


def scattered(count, seed=1):
    """0 to count - 1 in a random order."""
    return np.random.default_rng(seed).permutation(count)


class Bed:
    """An engine over a workload of ``s2shadow storm``, with every context loaded on a vCPU of its own."""

    def __init__(self, policy="reverse-map", fill=True, **storm):
        storm.setdefault("synthetic", True)
        self.config = StormConfig(track_tlbis=False, **storm)
        self.workload = build(self.config)
        self.rig = Rig(self.workload, policy, self.config)
        self.vm = self.rig.vm
        self.vcpus = self.rig.vcpus
        self.ipas = [plan.ipas for plan in self.workload.contexts]
        self.pages = self.workload.host.units  # canonical addresses of what the host maps, sorted
        self.start = int(self.pages[0])
        self.end = int(self.pages[-1]) + PAGE
        if fill:
            self.rig.fill()

    def restore(self, starts, nbytes):
        """Give canonical ranges back to L1 and touch them again, in every context that maps them."""
        for start in starts:
            self.workload.host.give_back(self.vm, start, start + nbytes)
            self.rig.refault_indexed(start, start + nbytes)

    def batches(self, count, among=None):
        """Canonical addresses of pages, in random order, ``count`` at a time."""
        pages = self.pages if among is None else among
        pages = pages[scattered(len(pages))]
        return pages[: len(pages) // count * count].reshape(-1, count).tolist()

    @property
    def fault_footprints(self):
        """The dependent loads of a fault, each in its own footprint: guest leaf, host leaf, shadow slot, head."""
        leaves = len(self.workload.index)
        pages = len(self.pages)
        return leaves * 8, pages * 8, leaves * 8, pages * 4
