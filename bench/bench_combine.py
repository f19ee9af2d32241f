"""The pure combiner: one guest leaf and one host leaf to a shadow leaf, through the Python call."""

import numpy as np
import pytest

import s2shadow as s2
from beds import PAGE, call_ns, stage2_tables

TABLES_AT = 1 << 44
FEATURES = s2.Features()


@pytest.fixture(scope="module")
def guest():
    image, _ = stage2_tables(TABLES_AT, np.arange(512) * PAGE, levels=3)
    mem = s2.GuestMemory()
    mem.add(TABLES_AT, buffer=image)
    return s2.walk(mem, s2.Stage2Config(TABLES_AT, 25 | 1 << 6 | 3 << 12 | 5 << 16 | 1 << 31), 5 * PAGE)


@pytest.mark.benchmark(group="combine")
def bench_combine_page_in_block(report, guest):
    host = s2.HostMapping(1 << 40, 2 << 20)
    report(lambda: s2.combine(guest, host, features=FEATURES, guest_fwb=False, host_fwb=True), floor=call_ns)


@pytest.mark.benchmark(group="combine")
def bench_combine_two_walks(report, guest):
    report(lambda: s2.combine(guest, guest, features=FEATURES, guest_fwb=False, host_fwb=False), floor=call_ns)


@pytest.mark.benchmark(group="combine")
def bench_combine_stage2_off(report):
    host = s2.HostMapping(1 << 40, 2 << 20)
    report(lambda: s2.combine(None, host, features=FEATURES, guest_fwb=False, host_fwb=True), floor=call_ns)
