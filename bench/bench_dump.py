"""Dumps and differences of stage-2 maps: leaves and lines per second, on the shipped capture and on many short runs."""

from timeit import repeat

import numpy as np
import pytest

import s2shadow as s2
from beds import PAGE, scattered, sized, stage2_tables
from s2shadow import dump
from s2shadow.capture import shipped

TABLES_AT = 1 << 44
PAGES = sized(1 << 20, 1 << 16)
VTCR = 25 | 1 << 6 | 5 << 16 | 1 << 31  # 4K granule, 39-bit IPA from level 1


@pytest.fixture(scope="module")
def linux():
    """A Linux guest's 64,410 leaves of 4K."""
    mem = s2.GuestMemory()
    return mem, mem.load_tables(shipped()).vms[0].config()


@pytest.fixture(scope="module")
def scattered_pages():
    """Pages that go on nowhere, every second one read-only: as many ranges, and lines of text, as leaves."""
    image, _ = stage2_tables(TABLES_AT, scattered(PAGES) * PAGE, levels=3)
    image[-PAGES::2] &= ~np.uint64(1 << 7)
    mem = s2.GuestMemory()
    mem.add(TABLES_AT, buffer=image)
    return mem, s2.Stage2Config(TABLES_AT, VTCR)


@pytest.fixture(scope="module")
def text(scattered_pages):
    return dump.kernel_text(dump.ranges(*scattered_pages))


def leaves_ns(tables):
    """ns per leaf of the same tables scanned in C: the floor of a dump."""
    best = min(repeat(lambda: s2.leaves(*tables), number=1, repeat=5))
    return best * 1e9 / len(s2.leaves(*tables))


def bench_ranges_linux(linux, report):
    report(lambda: dump.ranges(*linux), operations=len(s2.leaves(*linux)), floor=lambda: leaves_ns(linux))


def bench_ranges_scattered(scattered_pages, report):
    report.rounds(lambda: dump.ranges(*scattered_pages), lambda: None, rounds=3, operations=PAGES,
                  floor=lambda: leaves_ns(scattered_pages))


def bench_kernel_text(scattered_pages, report):
    rows = dump.ranges(*scattered_pages)
    report.rounds(lambda: dump.kernel_text(rows), lambda: None, rounds=3, operations=PAGES)


def bench_parse_kernel_text(text, report):
    report.rounds(lambda: dump.parse_kernel_text(text), lambda: None, rounds=3, operations=text.count("\n") - 1)


def bench_diff_same(scattered_pages, report):
    rows = dump.ranges(*scattered_pages)
    report.rounds(lambda: dump.diff(rows, rows), lambda: None, rounds=3, operations=PAGES)


def bench_diff_with_text(linux, report):
    rows = dump.ranges(*linux)
    parsed = dump.parse_kernel_text(dump.kernel_text(rows))
    report(lambda: dump.diff(rows, parsed), operations=len(rows))
