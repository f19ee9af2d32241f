"""Several threads on one engine: faults, changes and logging at once, bounded by counts, judged by what is left."""

import subprocess
import sys
import textwrap
import threading
from pathlib import Path

import numpy as np
import pytest

import rig
import s2shadow
from rig import DATA, HOST, PAGE, RAM, M, Rig
from s2shadow import HIT, HOST_FAULT, L1_FAULT, MAPPED, READ, RETRY, WRITE

PAGES = 2048
FINE = {HIT, MAPPED, RETRY}

by_range = pytest.mark.parametrize("teardown", ["reverse-map", "interval-map"])  # whose removals find leaves


def together(*jobs):
    """Runs the jobs at once; the first exception of any comes out."""
    failures = []
    barrier = threading.Barrier(len(jobs))

    def guarded(job):
        barrier.wait()
        try:
            job()
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=guarded, args=(job,)) for job in jobs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        raise failures[0]


def crowd(vcpus, contexts=None, **options):
    """A rig of several vCPUs, pairs of them in one context, all over the same 2048 pages."""
    r = Rig(vcpus=vcpus, contexts=contexts, **options)
    r.tables.map_range(0, DATA, PAGES // 2 * PAGE)
    r.tables.map_range(PAGES // 2 * PAGE, DATA + PAGES // 2 * PAGE, PAGES // 2 * PAGE, level=2)
    for n in range(vcpus):
        r.load(1 + n // 2, n=n)
    return r


def faulting(r, n, rounds, access=WRITE, allowed=frozenset(FINE)):
    """A job: vCPU n touches random pages in batches, every answer one of those allowed."""

    def job():
        rng = np.random.default_rng(n)
        out = np.zeros(500, s2shadow.FAULT_DTYPE)
        for _ in range(rounds):
            ipas = rng.integers(0, PAGES, 500, dtype=np.uint64) * PAGE
            got = r.vm.vcpus[n].fault_many(ipas, access, out=out)
            assert set(got["kind"].tolist()) <= allowed
            done = got[np.isin(got["kind"], [HIT, MAPPED])]
            assert ((done["cipa"] - DATA) == done["ipa"]).all()

    return job


@by_range
def test_faults_in_parallel(teardown):
    """Four vCPUs fill two shadows at once: each leaf once, right, and counted once."""
    r = crowd(4, teardown=teardown)
    together(*(faulting(r, n, 600, allowed=frozenset({HIT, MAPPED})) for n in range(4)))
    r.vm.check()
    stats = r.vm.stats
    assert stats.installed - stats.removed == stats.live == sum(c.entries for c in r.vm.contexts)
    assert stats.faults == 4 * 600 * 500
    for index in (0, 1):
        rows = r.shadow(index)
        assert (rows["pa"] == HOST + DATA + rows["ipa"]).all()


@by_range
def test_unmap_against_faults(teardown):
    """While others fault, one unmaps and remaps: whatever is live at the end is what the host maps now."""
    r = crowd(4, teardown=teardown)

    def changer():
        rng = np.random.default_rng(99)
        for n in range(15000):
            page = DATA + int(rng.integers(0, PAGES)) * PAGE
            r.vm.unmap(page, page + PAGE)
            r.vm.host.map(page, (2 + n % 2) * HOST + page, PAGE)

    together(changer, *(faulting(r, n, 600, allowed=frozenset({*FINE, HOST_FAULT})) for n in range(4)))
    r.vm.check()
    host = {cipa: pa for cipa, pa, size, _ in r.host_leaves() if size == PAGE}
    for index in (0, 1):
        for cipa, pa, size in r.shadow(index)[["cipa", "pa", "size"]].tolist():
            assert size > PAGE or cipa not in host or host[cipa] == pa


@by_range
def test_after_unmap_nothing_old(teardown):
    """Once unmap has returned, no thread is answered with the old page."""
    r = crowd(2, teardown=teardown)
    stale, current = [], [HOST]
    stop = threading.Event()

    def reader():
        while not stop.is_set():
            floor = current[0]  # mappings below this are gone for good
            f = r.vm.vcpus[0].fault(5 * PAGE, READ)
            if f.kind in (HIT, MAPPED) and f.pa - DATA - 5 * PAGE < floor:
                stale.append((f.pa, floor))

    def mover():
        try:
            for n in range(2, 200):
                r.vm.unmap(DATA + 5 * PAGE, DATA + 6 * PAGE)
                r.vm.host.map(DATA + 5 * PAGE, n * HOST + DATA + 5 * PAGE, PAGE)
                current[0] = n * HOST
        finally:
            stop.set()

    together(reader, mover)
    assert stale == []
    r.vm.check()


@by_range
def test_tlbi_against_faults(teardown):
    """L1 edits and invalidates on one vCPU while others fault: after the TLBI the old leaf never comes back."""
    r = crowd(3, contexts=6, teardown=teardown)
    for n in range(3):
        r.load(1, n=n)
    where = r.tables.slot(7 * PAGE, 3)
    stale = []

    def editor():
        for n in range(10000):
            target = DATA + (8 + n % 50) * PAGE
            r.tables.set(where, r.tables.leaf(target, 3))
            r.vm.vcpus[2].tlbi("IPAS2E1IS", 7)
            got = r.vm.vcpus[2].fault(7 * PAGE, READ)
            if got.kind in (HIT, MAPPED) and got.cipa != target:
                stale.append((got.cipa, target))

    def toucher(n):
        def job():
            for _ in range(20000):
                assert r.vm.vcpus[n].fault(7 * PAGE, READ).kind in FINE

        return job

    together(editor, toucher(0), toucher(1))
    assert stale == []
    r.vm.check()


@by_range
def test_no_write_is_lost(teardown):
    """Writers and a dirty-log thread: every page written since the last report is reported in the end."""
    r = crowd(4, teardown=teardown)
    r.vm.log_dirty(RAM, RAM + 64 * M)
    written = [np.zeros(PAGES, dtype=bool) for _ in range(4)]
    reported = np.zeros(PAGES, dtype=bool)
    done = threading.Event()
    left = [4]

    def writer(n):
        def job():
            rng = np.random.default_rng(n)
            try:
                for _ in range(3000):
                    pages = rng.integers(0, PAGES, 64, dtype=np.uint64)
                    got = r.vm.vcpus[n].fault_many(pages * PAGE, WRITE)
                    assert set(got["kind"].tolist()) <= FINE
                    written[n][pages[got["kind"] != RETRY].astype(np.int64)] = True
            finally:
                left[0] -= 1
                if not left[0]:
                    done.set()

        return job

    def logger():
        while not done.is_set():
            reported[:] |= np.array(rig.flags(r.vm.dirty_log(DATA, DATA + PAGES * PAGE), PAGES))

    together(logger, *(writer(n) for n in range(4)))
    reported |= np.array(rig.flags(r.vm.dirty_log(DATA, DATA + PAGES * PAGE), PAGES))
    missing = np.flatnonzero(np.logical_or.reduce(written) & ~reported)
    assert missing.tolist() == []
    assert not r.vm.dirty_log(DATA, DATA + PAGES * PAGE).any()
    for index in (0, 1):
        assert not (r.shadow(index)["perm"] & WRITE).any()
    r.vm.check()


def test_last_round_is_not_lost():
    """One writer hands each page over as it writes it: a report taken afterwards contains it, every time."""
    r = crowd(2)
    r.vm.log_dirty(RAM, RAM + 64 * M)
    lost = []

    def writer():
        rng = np.random.default_rng(1)
        for _ in range(10000):
            page = int(rng.integers(0, PAGES))
            while r.vm.vcpus[0].fault(page * PAGE, WRITE).kind == RETRY:
                pass
            at = DATA + page * PAGE
            if not rig.flags(r.vm.dirty_log(at, at + PAGE), 1)[0]:
                lost.append(page)

    def others():
        rng = np.random.default_rng(2)
        for _ in range(10000):
            page = int(rng.integers(0, PAGES))
            r.vm.vcpus[1].fault(page * PAGE, READ)
            r.vm.test_young(DATA, DATA + 64 * PAGE)

    together(writer, others)
    assert lost == []
    r.vm.check()


@by_range
def test_everything_at_once(teardown):
    """Faults, context switches, unmaps, permissions, logging, aging, TLBIs and readers of the state, all at once."""
    r = crowd(5, contexts=6, teardown=teardown)
    allowed = frozenset({*FINE, HOST_FAULT, L1_FAULT})

    def switching(n):
        def job():
            inner = faulting(r, n, 1, allowed=allowed)
            for k in range(400):
                r.load(1 + (n + k) % 7, n=n)
                inner()

        return job

    def host():
        rng = np.random.default_rng(7)
        for n in range(6000):
            page = DATA + int(rng.integers(0, PAGES - 8)) * PAGE
            what = n % 6
            if what == 0:
                r.vm.unmap(page, page + 8 * PAGE)
            elif what == 1:
                r.vm.host.map(page, HOST + page, 8 * PAGE)
            elif what == 2:
                r.vm.host.protect(page, page + 8 * PAGE, "rx" if n % 4 else "rwx")
            elif what == 3:
                r.vm.log_dirty(DATA, DATA + PAGES * PAGE, on=n % 4 == 3)
            elif what == 4:
                r.vm.dirty_log(DATA, DATA + PAGES * PAGE)
            else:
                r.vm.age(DATA, DATA + PAGES * PAGE)
        r.vm.unmap(DATA, DATA + 4 * M)

    def looker():
        for _ in range(400):
            assert r.vm.stats.faults >= 0
            for index in range(2):
                rows = r.vm.shadow(index)
                assert (np.diff(rows["ipa"].astype(np.int64)) > 0).all()
            r.vm.reverse(DATA)
            r.vm.take_tlbis()
            r.vm.vcpus[4].tlbi("VMALLS12E1IS", vttbr=3 << 48, vtcr=r.tables.vtcr)
            r.vm.check()

    together(host, looker, *(switching(n) for n in range(4)))
    r.vm.check()
    r.vm.unmap(0, 1 << 48)
    assert r.vm.stats.live == 0
    r.vm.check()


def test_unknown_ranges_in_parallel():
    """Aliases make ranges UNKNOWN while others fault, switch contexts and invalidate: a host change still reaches every
    leaf over the page, at every moment."""
    r = crowd(4, contexts=5, teardown="interval-map")
    for page in range(0, 512, 3):
        r.tables.map((PAGES + page) * PAGE, DATA + page * PAGE)
    stale = []

    def toucher(n):
        def job():
            rng = np.random.default_rng(n)
            for k in range(300):
                r.load(1 + (n + k // 10) % 6, n=n)
                pages = rng.integers(0, 512, 60)
                pages[::2] = PAGES + pages[::2] // 3 * 3
                kinds = r.vm.vcpus[n].fault_many(pages.astype(np.uint64) * PAGE, READ)["kind"]
                assert set(kinds.tolist()) <= {*FINE, HOST_FAULT}

        return job

    def changer():
        rng = np.random.default_rng(99)
        for n in range(3000):
            page = DATA + int(rng.integers(0, 512)) * PAGE
            r.vm.unmap(page, page + PAGE)
            if len(r.vm.reverse(page)):
                stale.append(page)
            r.vm.host.map(page, (2 + n % 2) * HOST + page, PAGE)
            if n % 50 == 0:
                r.vm.vcpus[3].tlbi("VMALLS12E1IS", vttbr=(1 + n // 50 % 6) << 48, vtcr=r.tables.vtcr)
                r.vm.check()

    together(changer, *(toucher(n) for n in range(3)))
    assert stale == []
    assert r.vm.stats.unknown_unmaps > 0 and r.vm.stats.contexts_recycled > 0
    r.vm.check()
    r.vm.unmap(0, 1 << 48)
    assert r.vm.stats.live == r.vm.stats.rmap_bytes == 0


@by_range
@pytest.mark.parametrize("end", ["tlbi", "recycle"])
def test_host_change_amid_a_long_removal(end, teardown):
    """A context of many leaves is emptied in several sections. A host change that comes between two of them misses
    nothing of what is still there."""
    r = Rig(contexts=2, teardown=teardown)
    r.vm.host.map(RAM, HOST + PAGE + RAM, 64 * M)  # by pages
    r.tables.map_range(0, DATA, 62 * M, level=2)
    ipas = np.arange(62 * M // PAGE, dtype=np.uint64) * PAGE
    emptying, done = threading.Event(), threading.Event()

    def emptier():
        try:
            for k in range(400):            # as often as it takes, 40 times at least
                if k >= 40 and r.vm.stats.invalidations > 40:
                    break
                r.load(1 + k if end == "recycle" else 1)
                r.vm.vcpus[0].fault_many(ipas)
                emptying.set()
                if end == "recycle":
                    r.load(1000 + k)
                    r.load(2000 + k)
                else:
                    r.vm.vcpus[0].tlbi("VMALLS12E1IS")
                emptying.clear()
        finally:
            done.set()

    def changer():
        rng = np.random.default_rng(3)
        while not done.is_set():
            if emptying.wait(0.01):
                page = DATA + int(rng.integers(0, len(ipas))) * PAGE
                r.vm.unmap(page, page + PAGE)
                r.vm.check()  # also of a context that has no owner any more
                r.vm.host.map(page, HOST + PAGE + page, PAGE)

    together(emptier, changer)
    assert r.vm.stats.invalidations > 40
    r.vm.check()


def test_populate_in_parallel():
    """A callable populate called from several threads: no page gets two frames."""
    r = crowd(4, host=False)
    lock, handed = threading.Lock(), {}
    frames = iter(range(1 << 20))

    def populate(cipa, access):
        with lock:
            page = cipa & -PAGE
            handed.setdefault(page, []).append(HOST + next(frames) * PAGE)
            return s2shadow.HostMapping(handed[page][-1], PAGE)

    r.vm.host.populate = populate
    together(*(faulting(r, n, 100) for n in range(4)))
    r.vm.check()
    for cipa, pa, size, _ in r.host_leaves():
        assert size == PAGE and pa in handed[cipa]


def test_walks_in_parallel():
    """walk_many from several threads over one memory, with access-flag updates: each update once, nothing torn."""
    mem = s2shadow.GuestMemory()
    mem.add(RAM, 4 * M)
    tables = rig.Tables(mem.read64, mem.write64, RAM, vtcr=1 << 21)
    tables.map_range(0, DATA, 512 * PAGE, af=0)
    cfg = s2shadow.Stage2Config(tables.vttbr(), tables.vtcr)
    updates = []

    def job():
        got = s2shadow.walk_many(mem, cfg, np.arange(512, dtype=np.uint64) * PAGE, READ)
        assert (got["status"] == 0).all()
        updates.append(int(got["updated"].sum()))

    together(job, job, job, job)
    assert sum(updates) >= 512
    assert all(tables.get(tables.slot(n * PAGE, 3)) == tables.leaf(DATA + n * PAGE, 3) for n in range(512))


def test_one_vcpu_two_threads():
    """Two threads on one vCPU: the second gets RuntimeError, the first its answers."""
    r = crowd(1)
    started, release = threading.Event(), threading.Event()

    def populate(cipa, access):
        started.set()
        assert release.wait(60)
        return s2shadow.HostMapping(HOST, PAGE)

    r.vm.unmap(RAM, RAM + 64 * M)
    r.vm.host.populate = populate
    first = []
    thread = threading.Thread(target=lambda: first.append(r.fault(0)))
    thread.start()
    assert started.wait(60)
    try:
        with pytest.raises(RuntimeError):
            r.fault(PAGE)
        with pytest.raises(RuntimeError):
            r.vcpu.load(r.tables.vttbr(), r.tables.vtcr)
    finally:
        release.set()
        thread.join()
    assert first[0].kind == MAPPED
    assert r.fault(0).kind == HIT


def test_no_lock_while_populating():
    """While one fault waits in populate, other threads fault, unmap and look without waiting for it."""
    r = crowd(2)
    started, release = threading.Event(), threading.Event()

    def populate(cipa, access):
        started.set()
        assert release.wait(60)
        return s2shadow.HostMapping(2 * HOST, PAGE)

    r.vm.unmap(DATA, DATA + PAGE)
    r.vm.host.populate = populate
    first = []
    thread = threading.Thread(target=lambda: first.append(r.fault(0)))
    thread.start()
    assert started.wait(60)
    try:
        assert r.fault(PAGE, n=1).kind in (HIT, MAPPED)
        assert r.vm.unmap(DATA + PAGE, DATA + 2 * PAGE).leaves == 1
        r.vm.check()
    finally:
        release.set()
        thread.join()
    assert first[0].kind in (MAPPED, RETRY)
    r.vm.check()


@pytest.mark.parametrize(
    "look",
    ["vm.host.leaves()", "vm.reverse(DATA)", "vm.shadow(0)", "vm.contexts", "vm.tables(0)", "r.load()",
     "r.mem.regions", "r.mem.add(0x8_0000_0000 + n * 8 * K, PAGE)"],
)
def test_a_finalizer_may_use_what_is_looked_at(look):
    """Python collects garbage whenever it makes objects, also amid a listing of thousands: an embedder's finalizer that
    unmaps its page and reads memory then waits for no lock that its own thread holds."""
    script = f"""
        import gc
        from rig import DATA, HOST, PAGE, RAM, ROM, K, M, Rig
        r = Rig(contexts=600)
        vm = r.vm
        r.tables.map(0, DATA)
        for n in range(2000):
            vm.host.map(0x2_0000_0000 + n * PAGE, HOST + 2 * n * PAGE, PAGE)
            r.mem.add(0x3_0000_0000 + n * 8 * K, PAGE)
        for vmid in range(1, 250):
            r.load(vmid)
            r.fault(0)
        class Backing:
            def __init__(self):
                self.itself = self
            def __del__(self):
                vm.unmap(0x2_0000_0000, 0x2_0000_0000 + PAGE)
                r.mem.read64(RAM)
        gc.collect()
        for n in range(20):
            Backing()
            {look}
        """
    subprocess.run([sys.executable, "-c", textwrap.dedent(script)], cwd=Path(__file__).parent, check=True, timeout=120)


def test_a_vcpu_of_nobody():
    """One that comes from no VM says so, and can be shown."""
    vcpu = s2shadow.VCPU.__new__(s2shadow.VCPU)
    assert "no context" in repr(vcpu)
    with pytest.raises(RuntimeError, match=r"NestedVM\.vcpus"):
        vcpu.fault(0)
