"""One long seeded run of random operations, engine against model and against a brute-force scan of all leaves."""

import os
import random

import lockstep
import pytest
import randomops
from lockstep import DATA, PAGE, M

COUNT = 1_000_000 if os.environ.get("S2SHADOW_LONG") == "1" else 50_000
CHECK_EVERY = 10_000
COMPARE_EVERY = 250


def scan(vm):
    """{page: sorted (context, ipa, size) of every leaf over it} from all shadows, page by page."""
    found = {}
    for ctx in vm.contexts:
        for ipa, cipa, size in vm.shadow(ctx.index)[["ipa", "cipa", "size"]].tolist():
            if size <= 2 * M:
                for page in range(cipa, cipa + size, PAGE):
                    found.setdefault(page, []).append((ctx.index, ipa, size))
    return found


def larger(vm, page):
    """Leaves above 2 MiB over a page."""
    return [
        (ctx.index, ipa, size)
        for ctx in vm.contexts
        for ipa, cipa, size in vm.shadow(ctx.index)[["ipa", "cipa", "size"]].tolist()
        if size > 2 * M and cipa <= page < cipa + size
    ]


def compare_reverse(vm, rng):
    """vm.reverse of many pages is what the scan finds."""
    found = scan(vm)
    for page in rng.sample(sorted(found), min(100, len(found))) + [DATA + rng.randrange(2048) * PAGE for _ in range(20)]:
        rows = vm.reverse(page)[["context", "ipa", "size"]].tolist()
        assert sorted(rows) == sorted(found.get(page, []) + larger(vm, page))


@pytest.mark.parametrize("seed", [1])
def test_run(seed):
    """Answers equal at every step, all state at intervals, vm.check() every 10^4; in the end nothing is left over."""
    rng = random.Random(seed)
    pair = lockstep.Pair(vcpus=2, contexts=4)
    counts = {}

    def after(n, name):
        counts[name] = counts.get(name, 0) + 1
        if n % COMPARE_EVERY == 0:
            pair.check_shadows()
            pair.check_host()
            pair.check_owed()
        if n % 2_000 == 0:
            pair.check_tables()
            compare_reverse(pair.vm, rng)
        if n % CHECK_EVERY == 0:
            pair.vm.check()

    live = []
    for granules in lockstep.GRANULES:
        pair = lockstep.Pair(granules, vcpus=2, contexts=4, populate=2 * M if granules[0] != granules[1] else None)
        randomops.run(rng, pair, COUNT // len(lockstep.GRANULES), after)
        live.append(pair.vm.stats.live)
        end_empty(pair, granules)
    assert set(counts) == {f.__name__ for f in randomops.WEIGHTS}
    assert min(live) > 0


def end_empty(pair, granules):
    """Everything unmapped: the bytes of a fresh engine."""
    pair.check()
    pair.log_dirty(0, lockstep.DATA_PAGES, on=False)
    pair.unmap_all()
    pair.vm.check()
    fresh = lockstep.Pair(granules, vcpus=2, contexts=4)
    fresh.unmap_all()
    got, want = pair.vm.stats, fresh.vm.stats
    for name in ("live", "host_leaves", "table_bytes", "link_bytes", "rmap_bytes", "memory_bytes"):
        assert getattr(got, name) == getattr(want, name), name
    assert got.installed == got.removed
