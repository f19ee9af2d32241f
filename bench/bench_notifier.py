"""Host changes: one page with its leaves in one of 1, 8 or 64 contexts, pages nobody shadows, ranges, logs, ages.

The contexts hold 65,536 leaves together, so that only their number differs. One run of the single-page cases is 64
calls of ``vm.unmap`` on pages not used lately; between runs they are given back and touched again.
"""

from itertools import cycle

import numpy as np
import pytest

import s2shadow as s2
from beds import PAGE, Bed, stream_ns

LEAVES = 1 << 16
EVENTS = 64


def unmap_pages(report, bed, *, events=EVENTS, pages=1, rounds=50, among=None, restore=None):
    """Each run unmaps pages that the last runs did not, so that their entries are no warmer than any others."""
    nbytes = pages * PAGE
    batches = cycle(bed.batches(events, among))
    starts = []
    unmap = bed.vm.unmap
    restore = restore or bed.restore

    def prepare():
        restore(starts, nbytes)
        starts[:] = next(batches)

    def run():
        for start in starts:
            unmap(start, start + nbytes)

    report.rounds(
        run,
        prepare,
        rounds=rounds,
        operations=events * pages,
        # host leaf, head, shadow slot
        footprints=(len(bed.pages) * 8, len(bed.pages) * 4, LEAVES * 8),
    )


@pytest.mark.benchmark(group="unmap, 64 events of one page")
def bench_unmap_page_1_context(report):
    unmap_pages(report, Bed(contexts=1, pages=LEAVES))


@pytest.mark.benchmark(group="unmap, 64 events of one page")
def bench_unmap_page_8_contexts(report):
    unmap_pages(report, Bed(contexts=8, pages=LEAVES // 8))


@pytest.mark.benchmark(group="unmap, 64 events of one page")
def bench_unmap_page_64_contexts(report):
    unmap_pages(report, Bed(contexts=64, pages=LEAVES // 64))


@pytest.mark.benchmark(group="unmap, 64 events of one page")
def bench_unmap_page_4_aliases(report):
    """Each canonical page at four IPAs: four leaves go."""
    unmap_pages(report, Bed(contexts=1, pages=LEAVES // 4, aliases=4))


@pytest.mark.benchmark(group="unmap, 64 events of one page")
def bench_unmap_page_shared_by_8_contexts(report):
    """The shipped capture under 8 VMIDs: eight leaves go."""
    unmap_pages(report, Bed(synthetic=False, contexts=8))


@pytest.mark.benchmark(group="unmap, 64 events of one page")
def bench_unmap_unshadowed_page(report):
    """Full shadows, but none of these pages."""
    bed = Bed(contexts=2, pages=LEAVES // 2, fill=False)
    bed.rig.fault_batch(bed.vcpus[0], bed.ipas[0])
    other = bed.pages[len(bed.pages) // 2 :]  # canonical pages are dealt to contexts in order
    assert len(bed.vm.reverse(int(other[0]))) == 0
    give_back(report, bed, other)


@pytest.mark.benchmark(group="unmap, 64 events of one page")
def bench_unmap_page_no_shadow_at_all(report):
    bed = Bed(contexts=1, pages=LEAVES, fill=False)
    give_back(report, bed, bed.pages)


def give_back(report, bed, among):
    def restore(starts, nbytes):
        for start in starts:
            bed.workload.host.give_back(bed.vm, start, start + nbytes)

    unmap_pages(report, bed, among=among, restore=restore)


@pytest.mark.benchmark(group="unmap, 512 pages")
def bench_unmap_512_pages(report):
    bed = Bed(contexts=1, pages=LEAVES)
    unmap_pages(report, bed, events=1, pages=512, among=bed.pages[: LEAVES // 512 * 512 : 512], rounds=100)


@pytest.mark.benchmark(group="unmap, interval map")
def bench_unmap_page_1_context_interval_map(report):
    unmap_pages(report, Bed("interval-map", contexts=1, pages=LEAVES))


@pytest.mark.benchmark(group="unmap, interval map")
def bench_unmap_page_8_contexts_interval_map(report):
    """Every context's map is asked: seven answer that they do not know the page."""
    unmap_pages(report, Bed("interval-map", contexts=8, pages=LEAVES // 8))


@pytest.mark.benchmark(group="unmap, interval map")
def bench_unmap_page_64_contexts_interval_map(report):
    unmap_pages(report, Bed("interval-map", contexts=64, pages=LEAVES // 64))


@pytest.mark.benchmark(group="unmap, interval map")
def bench_unmap_page_shared_by_8_contexts_interval_map(report):
    """The shipped capture under 8 VMIDs: eight leaves go."""
    unmap_pages(report, Bed("interval-map", synthetic=False, contexts=8))


@pytest.mark.benchmark(group="unmap, interval map")
def bench_unmap_512_pages_interval_map(report):
    bed = Bed("interval-map", contexts=1, pages=LEAVES)
    unmap_pages(report, bed, events=1, pages=512, among=bed.pages[: LEAVES // 512 * 512 : 512], rounds=100)


@pytest.mark.benchmark(group="unmap, Linux's way")
def bench_unmap_page_4_aliases_interval_map(report):
    """Each canonical page at four IPAs, so that nothing is known: one of eight contexts goes."""
    blow_away(report, Bed("interval-map", contexts=8, pages=LEAVES // 32, aliases=4))


@pytest.mark.benchmark(group="unmap, Linux's way")
def bench_unmap_page_blow_away(report):
    blow_away(report, Bed("blow-away", contexts=8, pages=LEAVES // 8))


@pytest.mark.benchmark(group="unmap, Linux's way")
def bench_unmap_page_blow_away_lean(report):
    blow_away(report, Bed("blow-away-lean", contexts=8, pages=LEAVES // 8))


def blow_away(report, bed):
    def restore(starts, nbytes):
        for start in starts:
            bed.workload.host.give_back(bed.vm, start, start + nbytes)
        bed.rig.fill()

    unmap_pages(report, bed, events=1, rounds=10, restore=restore)


def host_and_shadow():
    """The floor of what goes over a range: an entry of each table for each page."""
    return 2 * stream_ns(LEAVES)


@pytest.fixture(scope="module")
def writable():
    """One context of 65,536 pages; ``touch`` writes to all of them."""
    bed = Bed(contexts=1, pages=LEAVES, write=True)
    out = np.empty(LEAVES, dtype=s2.FAULT_DTYPE)
    bed.touch = lambda ipas=bed.ipas[0]: bed.vcpus[0].fault_many(ipas, s2.WRITE, out=out[: len(ipas)])
    yield bed
    bed.vm.log_dirty(bed.start, bed.end, on=False)


@pytest.mark.benchmark(group="65,536 pages")
def bench_log_dirty_on(report, writable):
    vm, start, end = writable.vm, writable.start, writable.end

    def prepare():
        vm.log_dirty(start, end, on=False)
        writable.touch()

    report.rounds(lambda: vm.log_dirty(start, end), prepare, rounds=20, operations=LEAVES, floor=host_and_shadow)


@pytest.mark.benchmark(group="65,536 pages")
def bench_dirty_log_clean(report, writable):
    vm, start, end = writable.vm, writable.start, writable.end
    vm.log_dirty(start, end)
    vm.dirty_log(start, end)
    report(lambda: vm.dirty_log(start, end), operations=LEAVES, floor=host_and_shadow)


@pytest.mark.benchmark(group="65,536 pages")
def bench_dirty_log_1_percent_dirty(report, writable):
    vm, start, end = writable.vm, writable.start, writable.end
    vm.log_dirty(start, end)
    some = writable.ipas[0][::100]
    report.rounds(
        lambda: vm.dirty_log(start, end),
        lambda: writable.touch(some),
        rounds=50,
        operations=LEAVES,
        floor=host_and_shadow,
    )


@pytest.mark.benchmark(group="65,536 pages")
def bench_age_young(report, writable):
    vm, start, end = writable.vm, writable.start, writable.end
    report.rounds(
        lambda: vm.age(start, end),
        lambda: writable.touch(),
        rounds=20,
        operations=LEAVES,
        floor=host_and_shadow,
    )


@pytest.mark.benchmark(group="65,536 pages")
def bench_age_old(report, writable):
    vm, start, end = writable.vm, writable.start, writable.end
    vm.age(start, end)
    report(lambda: vm.age(start, end), operations=LEAVES, floor=host_and_shadow)


@pytest.mark.benchmark(group="65,536 pages")
def bench_test_young(report, writable):
    vm, start, end = writable.vm, writable.start, writable.end
    writable.touch()
    report(lambda: vm.test_young(start, end), operations=LEAVES, floor=host_and_shadow)
