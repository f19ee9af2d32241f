"""One stage-2 walk of L1's tables: 3 and 4 levels, hot (512 pages) and cold (16M pages, 128 MiB of leaf tables)."""

from itertools import cycle

import numpy as np
import pytest

import s2shadow as s2
from beds import PAGE, scattered, stage2_tables

TABLES_AT = 1 << 44  # far from the pages that they map
VTCR = {
    3: 25 | 1 << 6 | 3 << 12 | 5 << 16 | 1 << 31,  # 4K granule, 39-bit IPA from level 1, 48-bit output
    4: 16 | 2 << 6 | 3 << 12 | 5 << 16 | 1 << 31,  # 4K granule, 48-bit IPA from level 0, 48-bit output
}
HOT_PAGES = 512
COLD_PAGES = 1 << 24
COLD_SAMPLE = 1 << 21  # addresses visited before one comes again: more lines than the last cache holds
CHUNK = 256  # scalar calls in one timed body: the best of single cold calls would be the luckiest one


class WalkBed:
    def __init__(self, pages, levels):
        image, self.footprints = stage2_tables(TABLES_AT, np.arange(pages) * PAGE, levels=levels)
        self.mem = s2.GuestMemory()
        self.mem.add(TABLES_AT, buffer=image)
        self.cfg = s2.Stage2Config(TABLES_AT, VTCR[levels])
        self.addresses = (scattered(pages)[:COLD_SAMPLE] * PAGE).astype(np.uint64)
        assert s2.walk(self.mem, self.cfg, int(self.addresses[0])).pa == self.addresses[0]

    def scalar(self, report):
        mem, cfg, walk = self.mem, self.cfg, s2.walk
        chunks = cycle(self.addresses.reshape(-1, CHUNK).tolist())

        def run():
            for ipa in next(chunks):
                walk(mem, cfg, ipa)

        report(run, operations=CHUNK, footprints=self.footprints)

    def batch(self, report, n):
        mem, cfg, walk_many = self.mem, self.cfg, s2.walk_many
        batches = cycle(np.resize(self.addresses, (max(1, len(self.addresses) // n), n)))
        out = np.empty(n, dtype=s2.WALK_DTYPE)
        report(lambda: walk_many(mem, cfg, next(batches), out=out), operations=n, footprints=self.footprints)


@pytest.fixture(scope="module")
def hot():
    return WalkBed(HOT_PAGES, 3)


@pytest.fixture(scope="module")
def cold():
    return WalkBed(COLD_PAGES, 3)


@pytest.fixture(scope="module")
def hot_4_levels():
    return WalkBed(HOT_PAGES, 4)


@pytest.fixture(scope="module")
def cold_4_levels():
    return WalkBed(COLD_PAGES, 4)


@pytest.mark.benchmark(group="walk, 256 scalar calls")
def bench_walk_hot(report, hot):
    hot.scalar(report)


@pytest.mark.benchmark(group="walk, 256 scalar calls")
def bench_walk_cold(report, cold):
    cold.scalar(report)


@pytest.mark.benchmark(group="walk, 256 scalar calls")
def bench_walk_hot_4_levels(report, hot_4_levels):
    hot_4_levels.scalar(report)


@pytest.mark.benchmark(group="walk, batch of 1")
def bench_walk_many_1_hot(report, hot):
    hot.batch(report, 1)


@pytest.mark.benchmark(group="walk, batch of 1")
def bench_walk_many_1_cold(report, cold):
    cold.batch(report, 1)


@pytest.mark.benchmark(group="walk, batch of 16")
def bench_walk_many_16_hot(report, hot):
    hot.batch(report, 16)


@pytest.mark.benchmark(group="walk, batch of 16")
def bench_walk_many_16_cold(report, cold):
    cold.batch(report, 16)


@pytest.mark.benchmark(group="walk, batch of 4096")
def bench_walk_many_4096_hot(report, hot):
    hot.batch(report, 4096)


@pytest.mark.benchmark(group="walk, batch of 4096")
def bench_walk_many_4096_cold(report, cold):
    cold.batch(report, 4096)


@pytest.mark.benchmark(group="walk, batch of 4096")
def bench_walk_many_4096_cold_4_levels(report, cold_4_levels):
    cold_4_levels.batch(report, 4096)
