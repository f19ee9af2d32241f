"""A fault through the C API's table, against the Cython call under it in the same rounds: refills, and hits."""

import time

import pytest

import s2shadow as s2
from beds import Bed, scattered
from s2shadow._floor import c_fault_each, fault_each

PAGES = 1 << 16


@pytest.fixture(scope="module")
def bed():
    return Bed(contexts=1, pages=PAGES)


def empty(bed):
    bed.vcpus[0].tlbi("VMALLS12E1")


def compare(report, bed, kind, prepare):
    ipas = bed.ipas[0][scattered(PAGES)]
    state = bed.vm._state()

    def cython_call():
        prepare(bed)
        began = time.perf_counter_ns()
        assert fault_each(state, 0, ipas, s2.READ, kind) == PAGES
        return (time.perf_counter_ns() - began) / PAGES

    def run():
        assert c_fault_each(bed.vm, 0, ipas, s2.READ, kind) == PAGES

    report.rounds(run, lambda: prepare(bed), rounds=30, operations=PAGES, floor=cython_call)


@pytest.mark.benchmark(group="C API")
def bench_c_fault_random(report, bed):
    compare(report, bed, s2.MAPPED, empty)


@pytest.mark.benchmark(group="C API")
def bench_c_fault_hit(report, bed):
    bed.rig.fill()
    compare(report, bed, s2.HIT, lambda bed: None)
