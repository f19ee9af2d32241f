"""Two vCPUs fault at once: throughput against one thread's, in contexts of their own and within one; and beside
storms of invalidations, whose effect on the faults is counted.

Random faults, all of which install a leaf. ``ns_per_operation`` is the time from the start of the first thread to the
end of the last, by all faults; ``speedup`` is that of one thread divided by it. More threads than cores tell nothing:
with one core the figure is stored, but means only that it was run.
"""

import os
import threading
from time import perf_counter_ns, sleep

import numpy as np
import pytest

import s2shadow as s2
from beds import scattered, sized
from beside import beside
from nest import DATA, HCR, PAGE, Nest

THREADS = 2
ROUNDS = 5


def side_by_side(calls):
    """Run every call on a thread of its own, all at once -> ns until the last has ended."""
    gate = threading.Barrier(len(calls) + 1)
    errors = []

    def body(call):
        gate.wait()
        try:
            call()
        except Exception as error:  # raised below, on the caller's thread
            errors.append(error)

    threads = [threading.Thread(target=body, args=(call,)) for call in calls]
    for thread in threads:
        thread.start()
    gate.wait()
    began = perf_counter_ns()
    for thread in threads:
        thread.join()
    took = perf_counter_ns() - began
    if errors:
        raise errors[0]
    return took


def throughput(benchmark, nest, whole, parts):
    """``whole``: [(vCPU, IPAs)] for one thread, ``parts`` the same for all threads; each run starts empty."""
    rows = {len(ipas): np.empty(len(ipas), dtype=s2.FAULT_DTYPE) for _, ipas in whole}
    outs = [np.empty(len(ipas), dtype=s2.FAULT_DTYPE) for _, ipas in parts]
    leaves = sum(len(ipas) for _, ipas in parts)

    def empty():
        nest.vm.vcpus[0].tlbi("ALLE1IS")

    def one():
        empty()

        def run():
            for vcpu, ipas in whole:
                nest.vm.vcpus[vcpu].fault_many(ipas, s2.READ, out=rows[len(ipas)])

        return side_by_side([run])

    def all_threads():
        side_by_side([
            lambda vcpu=vcpu, ipas=ipas, out=out: nest.vm.vcpus[vcpu].fault_many(ipas, s2.READ, out=out)
            for (vcpu, ipas), out in zip(parts, outs, strict=True)
        ])  # fmt: skip

    singles = []

    def setup():
        singles.append(one())           # turn and turn about, so that a busy machine slows both
        empty()

    benchmark.pedantic(all_threads, setup=setup, rounds=ROUNDS, warmup_rounds=1)
    assert nest.vm.stats.live == leaves and nest.vm.stats.retries == 0
    if leaves <= 1 << 17:
        nest.vm.check()
    if benchmark.stats is not None:
        best, single = benchmark.stats.stats.min * 1e9, min(singles)
        benchmark.extra_info.update({
            "operations": leaves,
            "ns_per_operation": round(best / leaves, 3),
            "floor_ns": round(single / leaves / THREADS, 3),
            "times_floor": round(best * THREADS / single, 3),
            "one_thread_ns": round(single / leaves, 3),
            "speedup": round(single / best, 3),
            "cores": os.cpu_count(),
        })  # fmt: skip


@pytest.mark.benchmark(group="two threads, random faults")
def bench_faults_disjoint_contexts(benchmark):
    pages = sized(1 << 20, 1 << 15)
    nest = Nest(pages, contexts=THREADS, track_tlbis=False)
    work = [(vcpu, nest.ipas[scattered(pages, seed=vcpu + 1)]) for vcpu in range(THREADS)]
    throughput(benchmark, nest, work, work)


@pytest.mark.benchmark(group="two threads, random faults")
def bench_faults_within_one_context(benchmark):
    """Two vCPUs that L1 entered the same L2 with: each page is faulted in by one of them."""
    pages = sized(1 << 20, 1 << 15)
    nest = Nest(pages, vcpus=THREADS, track_tlbis=False)
    nest.vm.vcpus[1].load(nest.vttbrs[0], nest.vtcr, hcr=HCR)
    nest.vm.vcpus[1].fault(1 << 38, s2.READ)
    ipas = nest.ipas[scattered(pages)]
    work = [(vcpu, np.ascontiguousarray(ipas[vcpu::THREADS])) for vcpu in range(THREADS)]
    throughput(benchmark, nest, [(0, ipas)], work)


# --- storms ------------------------------------------------------------------------------------------------------


class Storm:
    """Takes ranges of ``pages`` pages away and gives them back at once, and sends a TLBI each time."""

    def __init__(self, nest, pages):
        self.nest, self.nbytes, self.events = nest, pages * PAGE, 0
        rng = np.random.default_rng(1)
        self.places = (DATA + rng.integers(0, len(nest.canonical) // pages, 1 << 12) * self.nbytes).tolist()
        self.tlbi = nest.vm.vcpus[-1].tlbi              # a vCPU that does not fault

    def event(self):
        nest, start = self.nest, self.places[self.events % len(self.places)]
        nest.vm.unmap(start, start + self.nbytes)
        nest.vm.host.map(start, start + PAGE, self.nbytes)
        self.tlbi("IPAS2E1IS", int(nest.ipas[self.events % len(nest.ipas)]) >> 12, nest.vttbrs[0], nest.vtcr, HCR)
        self.events += 1


@pytest.mark.benchmark(group="one thread faults beside a storm of invalidations")
@pytest.mark.parametrize("pages", [1, 512, 16384])
def bench_faults_beside_storm(benchmark, pages):
    """A whole set is touched over and over while ranges of this many pages go and come back; what answers RETRY or
    HOST_FAULT (the page is away just then) is counted."""
    leaves = sized(1 << 20, 1 << 16)
    nest = Nest(leaves, vcpus=2, track_tlbis=False).fill([0])
    nest.vm.vcpus[1].load(nest.vttbrs[0], nest.vtcr, hcr=HCR)
    ipas = nest.ipas[scattered(leaves)]
    out = np.empty(leaves, dtype=s2.FAULT_DTYPE)
    seen = np.zeros(8, dtype=np.int64)
    touch = nest.vm.vcpus[0].fault_many

    def run():
        touch(ipas, s2.READ, out=out)
        np.add(seen, np.bincount(out["kind"], minlength=8), out=seen)

    alone = []
    for _ in range(1 if benchmark.disabled else ROUNDS):
        began = perf_counter_ns()
        run()
        alone.append(perf_counter_ns() - began)
    storm = Storm(nest, pages)
    with beside(storm.event) as failures:
        while not storm.events and not failures:
            sleep(0.001)
        seen[:] = 0
        first, began = storm.events, perf_counter_ns()
        benchmark.pedantic(run, rounds=20)
        events, took = storm.events - first, perf_counter_ns() - began
    counted = seen.copy()
    run()
    assert np.isin(out["kind"], (s2.HIT, s2.MAPPED)).all() and nest.vm.stats.live == leaves
    if leaves <= 1 << 17:
        nest.vm.check()
    if benchmark.stats is not None:
        total = int(counted.sum())
        benchmark.extra_info.update({
            "operations": leaves,
            "ns_per_operation": round(benchmark.stats.stats.mean * 1e9 / leaves, 3),    # the mean: storms come in gusts
            "floor_ns": round(min(alone) / leaves, 3),
            "times_floor": round(benchmark.stats.stats.mean * 1e9 / min(alone), 3),
            "events_per_second": round(events / took * 1e9, 1),
            "retries_per_million": round(counted[s2.RETRY] / total * 1e6, 3),
            "retries": int(counted[s2.RETRY]),
            "host_faults": int(counted[s2.HOST_FAULT]),
            "refaulted": int(counted[s2.MAPPED]),
            "cores": os.cpu_count(),
        })  # fmt: skip
