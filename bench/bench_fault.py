"""Shadow faults: a whole set faulted in, in order and at random, pages and 2 MiB blocks; and hits.

The host maps everything beforehand; canonical pages are in random order. Before each run that installs leaves, L1's
VMALLS12E1 empties the context, so the tables' arena is warm and the host's table untouched.
"""

from itertools import cycle

import numpy as np
import pytest

import s2shadow as s2
from beds import Bed, scattered

PAGES = 1 << 16
MANY_PAGES = 1 << 20
CHUNK = 256


@pytest.fixture(scope="module")
def pages():
    return Bed(contexts=1, pages=PAGES)


@pytest.fixture(scope="module")
def many_pages():
    return Bed(contexts=1, pages=MANY_PAGES)


@pytest.fixture(scope="module")
def blocks():
    return Bed(contexts=1, pages=512 * 4096, block_mix=1.0)


@pytest.fixture
def full(pages):
    pages.rig.fill()
    return pages


def install(report, bed, ipas, rounds):
    vcpu = bed.vcpus[0]
    out = np.empty(len(ipas), dtype=s2.FAULT_DTYPE)
    report.rounds(
        lambda: vcpu.fault_many(ipas, s2.READ, out=out),
        lambda: vcpu.tlbi("VMALLS12E1"),
        rounds=rounds,
        operations=len(ipas),
        footprints=bed.fault_footprints,
    )
    assert (out["kind"] == s2.MAPPED).all()


@pytest.mark.benchmark(group="fault, 65,536 pages installed")
def bench_fault_many_sequential(report, pages):
    install(report, pages, pages.ipas[0], 20)


@pytest.mark.benchmark(group="fault, 65,536 pages installed")
def bench_fault_many_random(report, pages):
    install(report, pages, pages.ipas[0][scattered(PAGES)], 20)


@pytest.mark.benchmark(group="fault, 65,536 pages installed")
def bench_fault_random(report, pages):
    """The same by scalar calls."""
    fault = pages.vcpus[0].fault
    ipas = pages.ipas[0][scattered(PAGES)].tolist()

    def run():
        for ipa in ipas:
            fault(ipa, 1)

    report.rounds(
        run,
        lambda: pages.vcpus[0].tlbi("VMALLS12E1"),
        rounds=5,
        operations=PAGES,
        footprints=pages.fault_footprints,
    )


@pytest.mark.benchmark(group="fault, 262,144 of 1M pages installed")
def bench_fault_many_random_1m(report, many_pages):
    install(report, many_pages, many_pages.ipas[0][scattered(MANY_PAGES)[: 1 << 18]], 4)


@pytest.mark.benchmark(group="fault, 4,096 blocks of 2M installed")
def bench_fault_many_blocks_sequential(report, blocks):
    install(report, blocks, blocks.ipas[0], 50)


@pytest.mark.benchmark(group="fault, 4,096 blocks of 2M installed")
def bench_fault_many_blocks_random(report, blocks):
    install(report, blocks, blocks.ipas[0][scattered(len(blocks.ipas[0]))], 50)


@pytest.mark.benchmark(group="hit")
def bench_fault_hit(report, full):
    """256 scalar calls."""
    fault = full.vcpus[0].fault
    chunks = cycle(full.ipas[0][scattered(PAGES)].reshape(-1, CHUNK).tolist())

    def run():
        for ipa in next(chunks):
            fault(ipa, 1)

    report(run, operations=CHUNK, footprints=(PAGES * 8,))


def hit(report, bed, call, n):
    batches = cycle(bed.ipas[0][scattered(PAGES)].reshape(-1, n))
    out = np.empty(n, dtype=s2.FAULT_DTYPE)
    report(lambda: call(next(batches), 1, out=out), operations=n, footprints=(PAGES * 8,))
    assert (out["kind"] == s2.HIT).all()


@pytest.mark.benchmark(group="hit")
def bench_fault_many_hit_1(report, full):
    hit(report, full, full.vcpus[0].fault_many, 1)


@pytest.mark.benchmark(group="hit")
def bench_fault_many_hit_16(report, full):
    hit(report, full, full.vcpus[0].fault_many, 16)


@pytest.mark.benchmark(group="hit")
def bench_fault_many_hit_4096(report, full):
    hit(report, full, full.vcpus[0].fault_many, 4096)


@pytest.mark.benchmark(group="hit")
def bench_translate_many_4096(report, full):
    hit(report, full, full.vcpus[0].translate_many, 4096)
