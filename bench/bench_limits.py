"""The figures that have a limit (``budgets.toml``), each beside what the least code in C takes for the same work.

With S2SHADOW_BENCH=full the sizes are those of the record (9 GiB of memory, ten minutes); else they fit an everyday
run, and times of cold memory say little. The operations are those of ``cases.py``, which counts their
instructions.
"""

from itertools import cycle
from time import perf_counter_ns

import numpy as np
import pytest

import s2shadow as s2
from beds import scattered, sized
from nest import DATA, HCR, PAGE, VTCR, Nest, range_operand, u64
from s2shadow._floor import Lean, LeanWalk, bare_unmap_each, fault_each, tlbi_each, unmap_each

IPAS2E1IS = 0xD50C8020
RIPAS2E1IS = 0xD50C8040
ROUNDS = 5
IN_FLIGHT = 48      # of the floors that fetch ahead


def lean_of(nest):
    """A floor with as many pages and leaves as ``nest``, empty."""
    walker, contexts = LeanWalk(nest.images[0], nest.roots[0], 4), len(nest.roots)
    return Lean(walker, DATA, len(nest.canonical), len(nest.ipas) * contexts, contexts)


# --- walks -------------------------------------------------------------------------------------------------------


class ColdTables:
    """Four levels of tables for scattered 2 MiB stretches: 4 leaf tables to a table above, so that the last two levels
    are cold. The first two never are: there is not enough address space."""

    ROOT = 1 << 44
    PER_TABLE = 4

    def __init__(self, tables):
        """``tables`` of the third level, 20 KiB each with what is below: 131,072 are 2.5 GiB."""
        counts = [1, -(-tables // 512), tables, tables * self.PER_TABLE]
        starts = np.concatenate([[0], np.cumsum(counts)]) * 512
        self.image = np.zeros(int(starts[-1]), dtype=np.uint64)
        for level in (0, 1):
            self._link(starts[level], starts[level + 1], counts[level + 1], 1)
        self._link(starts[2], starts[3], counts[3], 512 // self.PER_TABLE)
        leaves, step = self.image[starts[3] :], 1 << 24
        for at in range(0, len(leaves), step):
            pages = np.arange(at, min(at + step, len(leaves)), dtype=np.uint64)
            leaves[at : at + step] = pages << np.uint64(12) | np.uint64(1 << 10 | 3 << 8 | 3 << 6 | 0xF << 2 | 3)
        self.tables = tables
        self.mem = s2.GuestMemory()
        self.mem.add(self.ROOT, buffer=self.image)
        self.config = s2.Stage2Config(self.ROOT, VTCR[4])

    def _link(self, start, below, count, spread):
        targets = self.ROOT + 8 * (int(below) + 512 * np.arange(count))
        self.image[start + spread * np.arange(count)] = targets.astype(np.uint64) | np.uint64(3)

    def addresses(self, count, seed=1):
        rng = np.random.default_rng(seed)
        above, table, entry = (rng.integers(0, n, count) for n in (self.tables, self.PER_TABLE, 512))
        return u64(above << 30 | table * (512 // self.PER_TABLE) << 21 | entry << 12)


@pytest.mark.benchmark(group="limits: walk, 4 levels, cold, random")
def bench_walk_cold_batch(report):
    """One call for many addresses, against a chain of the same loads."""
    bed = ColdTables(sized(1 << 17, 1 << 9))
    floor = LeanWalk(bed.image, bed.ROOT, 4)
    n = sized(1 << 20, 1 << 12)
    batches = cycle([bed.addresses(n, seed) for seed in range(5)])
    out = np.empty(n, dtype=s2.WALK_DTYPE)
    chosen = next(batches)
    assert floor.serial(chosen)[1] == int(s2.walk_many(bed.mem, bed.config, chosen)["pa"].sum())
    report.rounds(
        lambda: s2.walk_many(bed.mem, bed.config, next(batches), out=out),
        lambda: None,
        rounds=5,
        operations=n,
        floor=lambda: floor.serial(next(batches)[: n // 8])[0],     # about as long as a batch: as likely interrupted
        floor_16_ns=lambda: floor.batch(next(batches), 16)[0],
        floor_48_ns=lambda: floor.batch(next(batches), 48)[0],
    )


# --- shadow faults -----------------------------------------------------------------------------------------------


def all_faulted(report, nest, ipas, call, floor):
    """Every page of an empty context. Floors: one after the other; as the CPU overlaps them; fetched ahead."""
    lean = lean_of(nest)
    floors = {
        "serial": lambda: lean.faults(ipas),
        "overlapped": lambda: lean.faults_batched(ipas, 1),
        "prefetched": lambda: lean.faults_batched(ipas, IN_FLIGHT),
    }

    def afresh(kind):
        lean.clear()
        return floors[kind]()

    report.rounds(
        lambda: call(ipas),
        lambda: nest.vm.vcpus[0].tlbi("VMALLS12E1IS"),
        rounds=ROUNDS,
        operations=len(ipas),
        floor=lambda: afresh(floor),
        **{f"{kind}_floor_ns": lambda kind=kind: afresh(kind) for kind in floors if kind != floor},
    )
    assert nest.vm.stats.live == len(ipas)


def in_batch(nest):
    out = np.empty(len(nest.ipas), dtype=s2.FAULT_DTYPE)
    return lambda ipas: nest.vm.vcpus[0].fault_many(ipas, s2.READ, out=out)


def one_by_one(nest):
    return lambda ipas: fault_each(nest.state, 0, ipas, s2.READ, s2.MAPPED)


@pytest.fixture(scope="module")
def random_pages():
    return Nest(sized(1 << 20, 1 << 16))


@pytest.fixture(scope="module")
def ordered_pages():
    return Nest(sized(1 << 20, 1 << 16), order=np.arange)


@pytest.mark.benchmark(group="limits: shadow fault, 4K")
def bench_fault_random_batch(report, random_pages):
    ipas = random_pages.ipas[scattered(len(random_pages.ipas))]
    all_faulted(report, random_pages, ipas, in_batch(random_pages), "overlapped")


@pytest.mark.benchmark(group="limits: shadow fault, 4K")
def bench_fault_random_single(report, random_pages):
    ipas = random_pages.ipas[scattered(len(random_pages.ipas))]
    all_faulted(report, random_pages, ipas, one_by_one(random_pages), "serial")


@pytest.mark.benchmark(group="limits: shadow fault, 4K")
def bench_fault_sequential_batch(report, ordered_pages):
    ipas = ordered_pages.ipas
    all_faulted(report, ordered_pages, ipas, in_batch(ordered_pages), "overlapped")


@pytest.mark.benchmark(group="limits: shadow fault, 4K")
def bench_fault_sequential_single(report, ordered_pages):
    ipas = ordered_pages.ipas
    all_faulted(report, ordered_pages, ipas, one_by_one(ordered_pages), "serial")


# --- notifiers ---------------------------------------------------------------------------------------------------


EVENTS = 1 << 10


def give(nest, starts):
    """Map pages of the host again."""
    for start in starts.tolist():
        nest.vm.host.map(start, start + PAGE, PAGE)


class Notifiers:
    """Random pages of a full nest, taken away one by one and given back; beside it the same removals in bare C, and
    the same changes of a canonical table alone."""

    def __init__(self, pages, contexts=1, among=None, **options):
        self.nest = Nest(pages, contexts=contexts, track_tlbis=False, **options)
        self.bare = Nest(1, load=False, track_tlbis=False, unshadowed=len(self.nest.canonical) - 1)
        self.nest.fill()
        self.lean = lean_of(self.nest)
        for context in range(contexts):
            self.lean.fill(self.nest.ipas + np.uint64(context << 39), self.nest.outputs(context))
        self.among = self.nest.canonical if among is None else among(self.nest)
        self.batches = cycle(self.among[scattered(len(self.among))[: 64 * EVENTS]].reshape(-1, EVENTS))
        self.starts = self.among[:0]
        self.leaves = self.nest.vm.stats.live

    def give_back(self):
        """What the last run took, and the next pages to take."""
        if len(self.starts):
            give(self.nest, self.starts)
            self.nest.fill() if len(self.nest.ipas) * len(self.nest.roots) <= 1 << 17 else self._refault()
        self.starts = u64(next(self.batches))

    def _refault(self):
        contexts, ipas = self.nest.where(self.starts)
        for context in np.unique(contexts).tolist():
            kinds = self.nest.vm.vcpus[context].fault_many(ipas[contexts == context], s2.READ)["kind"]
            assert (kinds == s2.MAPPED).all()

    def run(self):
        return unmap_each(self.nest.state, self.starts, PAGE)

    def bare_ns(self):
        """The canonical operation alone."""
        starts = u64(next(self.batches))
        began = perf_counter_ns()
        bare_unmap_each(self.bare.state, starts, PAGE)
        took = perf_counter_ns() - began
        give(self.bare, starts)
        return took / EVENTS

    def removals_ns(self):
        """Head, leaf and link of as many pages and leaves, in bare C."""
        starts = u64(next(self.batches))
        taken, removed = self.lean.removals(starts)
        if removed:
            contexts, ipas = self.nest.where(starts)
            self.lean.fill(ipas + (contexts.astype(np.uint64) << np.uint64(39)), self.nest.outputs_at(contexts, ipas))
        return taken


def notify(report, bed, leaves, rounds=30):
    report.rounds(
        bed.run,
        bed.give_back,
        rounds=rounds,
        operations=EVENTS,
        beyond=bed.bare_ns,
        floor=bed.removals_ns,
        leaves=leaves,
    )
    assert bed.nest.vm.stats.live == bed.leaves - leaves * EVENTS


@pytest.mark.benchmark(group="limits: notifier, 1 page")
def bench_unmap_1_context(report):
    notify(report, Notifiers(1 << 16), 1)


@pytest.mark.benchmark(group="limits: notifier, 1 page")
def bench_unmap_64_contexts(report):
    """Of 1,048,576 pages each."""
    notify(report, Notifiers(sized(1 << 20, 1 << 11), contexts=64), 1)


@pytest.mark.benchmark(group="limits: notifier, 1 page")
def bench_unmap_shared_by_8_contexts(report):
    notify(report, Notifiers(1 << 16, contexts=8, shared=True), 8)


@pytest.mark.benchmark(group="limits: notifier, 1 page")
def bench_unmap_8_aliases(report):
    notify(report, Notifiers(1 << 16, aliases=8), 8)


@pytest.mark.benchmark(group="limits: notifier, 1 page")
def bench_unmap_not_shadowed(report):
    """Eight full contexts; no leaf maps these pages."""
    notify(report, Notifiers(1 << 13, contexts=8, unshadowed=1 << 16, among=lambda nest: nest.unshadowed), 0)


# --- TLBIs, write protection -------------------------------------------------------------------------------------


@pytest.mark.benchmark(group="limits: TLBI")
def bench_tlbi_ipa_each(report):
    nest = Nest(1 << 16, track_tlbis=False).fill()
    batches = cycle(nest.ipas[scattered(1 << 16)].reshape(-1, EVENTS))
    state = [nest.ipas[:0]]

    def prepare():
        nest.vm.vcpus[0].fault_many(state[0], s2.READ)
        state[0] = u64(next(batches))

    def run():
        tlbi_each(nest.state, IPAS2E1IS, state[0] >> np.uint64(12), nest.vttbrs[0], nest.vtcr, HCR)

    lean = lean_of(nest)
    lean.fill(nest.ipas, nest.outputs(0))
    pages = cycle(nest.canonical[scattered(1 << 16)].reshape(-1, EVENTS))
    report.rounds(
        run,
        prepare,
        rounds=50,                  # with the one that warms up, fewer than there are batches
        operations=EVENTS,
        floor=lambda: lean.removals(u64(next(pages)))[0],
    )
    assert nest.vm.stats.live == (1 << 16) - EVENTS


def range_of_leaves(report, nest):
    """One RIPAS2E1 for all pages of a full context."""
    pages = len(nest.ipas)
    operand = u64([range_operand(0, pages)])
    lean = lean_of(nest)

    def floor():
        lean.clear()
        lean.fill(nest.ipas, nest.outputs(0))
        return lean.range_removal(0, pages, 16)[0]

    report.rounds(
        lambda: tlbi_each(nest.state, RIPAS2E1IS, operand, nest.vttbrs[0], nest.vtcr, HCR),
        nest.fill,
        rounds=ROUNDS,
        operations=pages,
        floor=floor,
    )
    assert nest.vm.stats.live == 0


@pytest.mark.benchmark(group="limits: TLBI by range, per page")
def bench_tlbi_range_sequential(report, ordered_pages):
    range_of_leaves(report, ordered_pages)


@pytest.mark.benchmark(group="limits: TLBI by range, per page")
def bench_tlbi_range_scattered(report, random_pages):
    range_of_leaves(report, random_pages)


@pytest.mark.benchmark(group="limits: write-protect 1 GiB of pages, 8 contexts")
@pytest.mark.parametrize("how", ["protect", "log_dirty"])
def bench_write_protect(report, how):
    """Each page in one of 8 contexts, of as many pages each; the whole range in one call, in ns. ``linux_way_ns``: the
    same call where every leaf of every context is visited, as Linux does."""
    pages = sized(1 << 18, 1 << 13)
    nest, linux = (
        Nest(pages, contexts=8, teardown=policy, track_tlbis=False) for policy in ("reverse-map", "blow-away")
    )
    end = DATA + pages * PAGE
    lean = lean_of(nest)
    for context in range(8):
        lean.fill(nest.ipas + np.uint64(context << 39), nest.outputs(context))

    def take_writes(vm):
        if how == "protect":
            vm.host.protect(DATA, end, "rx")
        else:
            vm.log_dirty(DATA, end)

    def undo(vm):
        if how == "protect":
            vm.host.protect(DATA, end, "rwx")
        else:
            vm.log_dirty(DATA, end, on=False)
        vm.vcpus[0].tlbi("ALLE1IS")
        for vcpu in vm.vcpus:
            assert (vcpu.fault_many(nest.ipas, s2.WRITE)["kind"] == s2.MAPPED).all()

    def linux_way():
        undo(linux.vm)
        began = perf_counter_ns()
        take_writes(linux.vm)
        return perf_counter_ns() - began

    report.rounds(
        lambda: take_writes(nest.vm),
        lambda: undo(nest.vm),
        rounds=3,
        floor=lambda: lean.write_protect(DATA, pages, 16)[0],
        linux_way_ns=linux_way,
        pages=pages,
    )
    assert nest.vm.stats.narrowed >= pages
