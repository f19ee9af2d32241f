"""One long seeded run of random operations, engine against model and against a brute-force scan of all leaves."""

import os
import random
from collections import Counter

import pytest

import randomops
from lockstep import DATA_PAGES, GRANULES, K, Loose, M, Pair

LONG = 20 if os.environ.get("S2SHADOW_LONG") == "1" else 1
CHECK_EVERY = 10_000
COMPARE_EVERY = 250
MACHINES = [{"granules": granules, "populate": populate} for granules in GRANULES for populate in (None, 2 * M)]


def scan(vm, page_size):
    """{page: (context, ipa, size) of every leaf over it} from all shadows, page by page; and the largest leaves."""
    found, large = {}, []
    for ctx in vm.contexts:
        for ipa, cipa, size in vm.shadow(ctx.index)[["ipa", "cipa", "size"]].tolist():
            if size > 2 * M:
                large.append((cipa, ctx.index, ipa, size))
                continue
            for page in range(cipa, cipa + size, page_size):
                found.setdefault(page, []).append((ctx.index, ipa, size))
    return found, large


def compare_reverse(pair, rng):
    """vm.reverse of many pages is what the scan finds."""
    found, large = scan(pair.vm, pair.page)
    pages = rng.sample(sorted(found), min(100, len(found)))
    pages += [pair.data + rng.randrange(DATA_PAGES) * pair.page for _ in range(20)]
    for page in pages:
        over = [(index, ipa, size) for cipa, index, ipa, size in large if cipa <= page < cipa + size]
        rows = pair.vm.reverse(page)[["context", "ipa", "size"]].tolist()
        assert sorted(rows) == sorted(found.get(page, []) + over)


def observer(pair, rng, done):
    """What is compared after each operation: answers were already."""

    def after(n, name):
        done[name] += 1
        if sum(done.values()) % CHECK_EVERY == 0:
            pair.vm.check()
        if n % COMPARE_EVERY == 0:
            pair.check_shadows()
            pair.check_host()
            pair.check_owed()
            pair.check_intervals()
        if n % (8 * COMPARE_EVERY) == 0:
            pair.check_tables()
            compare_reverse(pair, rng)

    return after


def test_run():
    """50,000 operations (10^6 in the long run): answers equal at every step, all state at intervals, check() every
    10^4; in the end nothing is left over."""
    rng, done, live = random.Random(1), Counter(), 0
    for options in MACHINES:
        pair = Pair(vcpus=2, contexts=4, **options)
        randomops.run(rng, pair, 50_000 * LONG // len(MACHINES), observer(pair, rng, done))
        live += pair.vm.stats.live
        end_empty(pair, options)
    assert sum(done.values()) == 50_000 * LONG
    assert set(done) == {operation.__name__ for operation in randomops.WEIGHTS}
    assert live > 0


@pytest.mark.parametrize("host_granule", [16 * K, 64 * K])
def test_host_granules(host_granule):
    """The same on hosts with 16K and 64K pages."""
    rng, done = random.Random(host_granule), Counter()
    options = {"granules": (host_granule, 64 * K), "host_granule": host_granule}
    pair = Pair(vcpus=2, contexts=4, **options)
    randomops.run(rng, pair, 3_000 * LONG, observer(pair, rng, done))
    end_empty(pair, options)


def test_interval_map():
    """Under the interval map the model says which leaves go, and what each context still knows. Those that it forgot
    cost whole contexts."""
    rng, done, unknown = random.Random(3), Counter(), 0
    for options in MACHINES:
        options = {**options, "teardown": "interval-map"}
        pair = Pair(vcpus=2, contexts=4, **options)
        randomops.prefill(rng, pair)
        randomops.run(rng, pair, 8_000 * LONG // len(MACHINES), observer(pair, rng, done), randomops.QUIET)
        unknown += pair.vm.stats.unknown_unmaps
        end_empty(pair, options)
    assert unknown > 20


@pytest.mark.parametrize("teardown", ["blow-away", "blow-away-lean"])
def test_blow_away(teardown):
    """Policies that drop more than they must: the same answers, host table and dirty pages."""
    rng, pair = random.Random(2), Loose(vcpus=2, contexts=4, teardown=teardown)
    randomops.prefill(rng, pair)
    randomops.run(rng, pair, 10_000 * LONG, every(100, pair.check), randomops.QUIET)
    pair.check()


def test_tight_memory():
    """Under a limit that evicts all the time: the same answers, host table and dirty pages, and never more bytes."""
    limit = 480 * K
    rng, pair = random.Random(2), Loose(vcpus=2, contexts=4, max_table_bytes=limit)
    checked = every(100, pair.check)

    def after(n, name):
        assert pair.vm.stats.memory_bytes <= limit
        checked(n, name)

    randomops.prefill(rng, pair)
    randomops.run(rng, pair, 10_000 * LONG, after, randomops.TIGHT)
    pair.check()
    assert pair.vm.stats.evictions > 0


def every(interval, call):
    def after(n, name):
        if n % interval == 0:
            call()

    return after


def end_empty(pair, options):
    """Everything unmapped: the bytes of a fresh engine."""
    pair.check()
    pair.log_dirty(0, DATA_PAGES, on=False)
    pair.unmap_all()
    pair.vm.check()
    fresh = Pair(vcpus=2, contexts=4, **options)
    fresh.unmap_all()
    got, want = pair.vm.stats, fresh.vm.stats
    for name in ("live", "host_leaves", "table_bytes", "link_bytes", "rmap_bytes", "memory_bytes"):
        assert getattr(got, name) == getattr(want, name), name
    assert got.installed == got.removed
