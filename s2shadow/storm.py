"""Notifier storms: what taking one host page away costs a nested VM, per teardown policy.

One **round**: every context is fully mapped; one ``vm.unmap`` of ``event_pages`` pages at a random mapped canonical
page, timed alone; L0 applies the TLB maintenance it owes and gives the page back (untimed: the same work under every
policy); all contexts touch their whole set again, and what misses is faulted in, timed and counted.

What is timed as a touch. A touch that hits costs the hypervisor nothing, since the hardware walks the shadow table by
itself, so only misses are timed. Which touches miss is not searched for by faulting everything: the harness keeps an
index from canonical pages to every (context, nested IPA) that maps them, built once from L1's tables. After an event
it compares the engine's count of live leaves with what the index says must be left:

- Equal: the refaults are the leaves that the index names. Each of them must miss (a hit would mean that another leaf
  went in its place), and the live count must be back at the full set afterwards. The two together prove that exactly
  those leaves went, without touching the other millions.
- Nothing left: every leaf of every context misses; all are faulted in, as batches.
- Anything between: one lookup in the shadow per leaf (untimed) finds the misses, which are faulted in.

At the end of every policy a full touch of every set must be all hits, or the run fails.

``entries_required`` counts, from the index, the leaves that overlap the events: what any correct policy must remove.
``entries_removed`` is what the engine says it removed.

**Workloads.** A capture loads one VM's real tables under K VMIDs: K contexts that share every canonical page. A
synthetic workload writes L1 tables of the same format: each context has canonical pages of its own, in random
order, shown at ``aliases`` nested IPAs, ``block_mix`` of the bytes in 2 MiB blocks. L0 backs pages one by one (its
memory for them is not 2 MiB aligned against L1's, so that no larger block fits) and blocks with blocks.

**Floor.** ``floor`` in the result is a dependent pointer chase over as many bytes as the tables of L1, the shadows,
the host's table and the reverse map take together, measured in the same run: a fault cannot be faster than the
loads that depend on each other (about four: guest leaf, host leaf, shadow slot, reverse-map head).
"""

from __future__ import annotations

import gc
import os
import platform
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt

from s2shadow.constants import HCR_FWB, HCR_VM, HIT, MAPPED, NO_MEMORY, READ, TEARDOWNS, WRITE, Kind
from s2shadow.features import Features

if TYPE_CHECKING:
    from s2shadow.engine import VCPU, NestedVM
    from s2shadow.memory import GuestMemory

__all__ = ["DEFAULT_POLICIES", "POLICIES", "Rig", "StormConfig", "StormError", "Workload", "build", "run",
           "summarize"]

PAGE = 4096
BLOCK = 2 << 20
PAGES_PER_BLOCK = BLOCK // PAGE
PIECE = 1 << 16                 # elements

REVERSE_MAP = "reverse-map"
POLICIES = TEARDOWNS
DEFAULT_POLICIES = (REVERSE_MAP, "blow-away", "blow-away-lean")     # what is, and what we do instead
TLBI_MODES = ("exact", "kvm72")
MOST_CONTEXTS = 65534           # host VMIDs of an engine
MOST_EVENTS = 1_000_000_000
HIT_KIND, MAPPED_KIND = int(Kind.HIT), int(Kind.MAPPED)     # numpy asks members of enums for what they do not have, and
                                                            # loses a KeyboardInterrupt that comes meanwhile

U64 = npt.NDArray[np.uint64]
Progress = Callable[[str, float], None]


class StormError(RuntimeError):
    """The engine did not do what the index of the workload says it must have done."""


@dataclass(frozen=True, slots=True)
class StormConfig:
    """A storm. ``capture`` None and not ``synthetic``: the capture shipped with the package.

    ``vm`` is the VM of the capture (None: the largest), ``contexts`` how many nested VMs have its tables. ``pages``,
    ``aliases`` and ``block_mix`` shape synthetic workloads only; ``pages`` is canonical 4K pages per context,
    ``block_mix`` the fraction of the bytes in 2 MiB blocks. The reverse-map policy runs all ``events``, each of
    ``event_pages`` pages; the others stop after ``seconds`` (at least ``min_events``). ``teardown`` and ``tlbi`` are
    those of ``NestedVM``, ``track_tlbis`` too; ``write``: touch by writing. The same ``seed`` gives the same events.
    ``ValueError`` for values that no storm can have.
    """

    capture: str | os.PathLike[str] | None = None
    vm: int | None = None
    synthetic: bool = False
    contexts: int = 4
    pages: int = 65536
    aliases: int = 1
    block_mix: float = 0.0
    events: int = 10_000
    event_pages: int = 1
    teardown: tuple[str, ...] = DEFAULT_POLICIES
    tlbi: str = "exact"
    seed: int = 1
    write: bool = False
    track_tlbis: bool = True
    seconds: float = 15.0
    min_events: int = 5

    def __post_init__(self) -> None:
        for name in ("contexts", "pages", "aliases", "events", "event_pages", "min_events"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.events > MOST_EVENTS:
            raise ValueError(f"events must be at most {MOST_EVENTS:,}, got {self.events:,}")
        if not 0 <= self.block_mix <= 1:
            raise ValueError(f"block_mix must be between 0 and 1, got {self.block_mix}")
        if self.seed < 0:
            raise ValueError(f"seed must not be negative, got {self.seed}")
        if not self.seconds > 0:
            raise ValueError(f"seconds must be positive, got {self.seconds}")
        if self.synthetic and self.capture is not None:
            raise ValueError("capture and synthetic exclude each other")
        if not self.teardown:
            raise ValueError("teardown names no policy")
        for policy in self.teardown:
            if policy not in POLICIES:
                raise ValueError(f"teardown must be of {', '.join(POLICIES)}, got {policy!r}")
        if self.tlbi not in TLBI_MODES:
            raise ValueError(f"tlbi must be one of {', '.join(TLBI_MODES)}, got {self.tlbi!r}")

    @property
    def access(self) -> int:
        """How the working set is touched: READ or WRITE."""
        return int(WRITE if self.write else READ)


# --- workloads -------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class ContextPlan:
    """One L2: the registers that L1 enters it with, and the IPAs of its working set, one for each shadow leaf."""

    vttbr: int
    vtcr: int
    hcr: int
    ipas: U64


@dataclass(frozen=True, slots=True)
class LeafClass:
    """All shadow leaves of one size, sorted by canonical address."""

    size: int
    starts: U64
    contexts: npt.NDArray[np.int64]
    ipas: U64

    def bounds(self, start: Any, end: Any) -> tuple[Any, Any]:
        """Positions of the leaves that overlap [start, end); for arrays too."""
        first = np.searchsorted(self.starts, np.uint64(start) & ~np.uint64(self.size - 1))
        return first, np.searchsorted(self.starts, np.uint64(end))


class LeafIndex:
    """Canonical address to every shadow leaf that must map it."""

    def __init__(self, starts: U64, sizes: U64, contexts: npt.NDArray[np.int64], ipas: U64):
        self.classes: list[LeafClass] = []
        for size in (PAGE, BLOCK):
            rows = np.flatnonzero(sizes == size)
            rows = rows[np.lexsort((ipas[rows], contexts[rows], starts[rows]))]
            if len(rows):
                self.classes.append(LeafClass(size, starts[rows], contexts[rows], ipas[rows]))

    def __len__(self) -> int:
        return sum(len(leaves.starts) for leaves in self.classes)

    def required(self, start: Any, end: Any) -> Any:
        """How many leaves overlap each [start, end)."""
        return sum(last - first for first, last in (leaves.bounds(start, end) for leaves in self.classes))

    def overlapping(self, start: int, end: int) -> tuple[npt.NDArray[np.int64], U64]:
        """Contexts and IPAs of the leaves that overlap [start, end), sorted by context."""
        contexts, ipas = [], []
        for leaves in self.classes:
            first, last = leaves.bounds(start, end)
            contexts.append(leaves.contexts[first:last])
            ipas.append(leaves.ipas[first:last])
        context, ipa = np.concatenate(contexts), np.concatenate(ipas)
        order = np.lexsort((ipa, context))
        return context[order], ipa[order]


class HostPlan:
    """What L0 backs with pages and what with 2 MiB blocks, and how it gives memory back after an event."""

    PAGE_OFFSET = PAGE              # not a multiple of a block: the largest fitting mapping is one page
    BLOCK_OFFSET = 1 << 44          # apart from the pages

    def __init__(self, pages: U64, blocks: U64):
        """``pages`` and ``blocks``: sorted start addresses, each once; no page inside a block."""
        self.blocks = blocks
        breaks = np.flatnonzero(np.diff(pages) != PAGE) + 1
        runs = [run for run in np.split(pages, breaks) if len(run)]
        self.run_starts = np.array([run[0] for run in runs], dtype=np.uint64)
        self.run_ends = np.array([run[-1] + np.uint64(PAGE) for run in runs], dtype=np.uint64)
        units = np.concatenate([pages, blocks])
        order = np.argsort(units)
        self.units = units[order]
        self.unit_pages = np.where(order < len(pages), 1, PAGES_PER_BLOCK)

    @property
    def total_pages(self) -> int:
        return int(self.unit_pages.sum())

    def map_all(self, vm: NestedVM) -> None:
        for start, end in zip(self.run_starts.tolist(), self.run_ends.tolist(), strict=True):
            vm.host.map(start, start + self.PAGE_OFFSET, end - start)
        for start in self.blocks.tolist():
            vm.host.map(start, start + self.BLOCK_OFFSET, BLOCK)

    def give_back(self, vm: NestedVM, start: int, end: int) -> None:
        """Map [start, end) as it was. A block comes back whole: what an event left of it goes first."""
        first = int(np.searchsorted(self.run_ends, np.uint64(start), side="right"))
        last = int(np.searchsorted(self.run_starts, np.uint64(end)))
        for i in range(first, last):
            low, high = max(start, int(self.run_starts[i])), min(end, int(self.run_ends[i]))
            vm.host.map(low, low + self.PAGE_OFFSET, high - low)
        if len(self.blocks):
            first = int(np.searchsorted(self.blocks, np.uint64(start & ~(BLOCK - 1))))
            for block in self.blocks[first:int(np.searchsorted(self.blocks, np.uint64(end)))].tolist():
                vm.unmap(block, block + BLOCK)
                vm.host.map(block, block + self.BLOCK_OFFSET, BLOCK)

    def pick_events(self, count: int, pages: int, seed: int) -> U64:
        """Start addresses of ``count`` events, each mapped page equally likely (pulled back from the very end)."""
        if pages > self.total_pages:
            raise ValueError(f"event_pages {pages:,} is more than the {self.total_pages:,} canonical pages of the set")
        ends = np.cumsum(self.unit_pages)
        random = np.random.default_rng(seed)
        limit = int(self.units[-1]) + int(self.unit_pages[-1]) * PAGE - pages * PAGE

        def pick(at: int, end: int) -> U64:
            picked = random.integers(0, ends[-1], size=end - at)
            unit = np.searchsorted(ends, picked, side="right")
            within = picked - (ends[unit] - self.unit_pages[unit])
            starts = self.units[unit] + within.astype(np.uint64) * np.uint64(PAGE)
            return np.asarray(np.minimum(starts, np.uint64(max(limit, 0))))
        return in_pieces(pick, count)


def in_pieces(function: Callable[[int, int], npt.NDArray[Any]], n: int) -> npt.NDArray[Any]:
    """``n`` elements of a long array, as ``function(at, end)`` makes them: Ctrl-C is answered between two pieces, and
    numpy does not look."""
    first = function(0, min(n, PIECE))
    whole = np.empty(n, first.dtype)
    whole[:PIECE] = first
    for at in range(PIECE, n, PIECE):
        whole[at:at + PIECE] = function(at, min(n, at + PIECE))
    return whole


def plain_rows(*arrays: npt.NDArray[Any]) -> Iterator[tuple[Any, ...]]:
    """Rows of Python's numbers, made as they are needed."""
    for at in range(0, len(arrays[0]), PIECE):
        yield from zip(*(array[at:at + PIECE].tolist() for array in arrays), strict=True)


@dataclass(frozen=True, slots=True)
class Workload:
    """What a storm runs on: ``mem``, L1's memory with its tables (``guest_table_bytes`` of them), under ``features``;
    ``contexts``, the plan of each L2; ``index``, every shadow leaf by its canonical range, from which it is known what
    an event must remove; ``host``, what the host maps; ``label``, what the report calls it."""

    mem: GuestMemory
    features: Features
    contexts: tuple[ContextPlan, ...]
    index: LeafIndex
    host: HostPlan
    label: str
    guest_table_bytes: int

    def leaf_counts(self) -> dict[str, int]:
        """Shadow leaves of all contexts by size, ``"4K"`` and ``"2M"``."""
        return {"4K" if leaves.size == PAGE else "2M": len(leaves.starts) for leaves in self.index.classes}


def build(config: StormConfig) -> Workload:
    """The workload of a storm; ``CaptureError`` or ``ValueError`` where it cannot be."""
    return build_synthetic(config) if config.synthetic else build_capture(config)


def build_capture(config: StormConfig) -> Workload:
    """One VM's captured tables under K VMIDs. Access flags are settled first, so that every policy sees the same."""
    from s2shadow.capture import CaptureError, load_tables, shipped
    from s2shadow.config import Stage2Config
    from s2shadow.memory import GuestMemory
    from s2shadow.walker import leaves, walk_many

    mem = GuestMemory()
    folder = Path(config.capture) if config.capture is not None else shipped()
    capture = load_tables(mem, folder)
    # Shadows have 48-bit addresses: a machine with more is taken as one with 48, where the VM still works then.
    able = [vm for vm in capture.vms if vm.config(shadow_features(vm.features)).error is None]
    vm = pick_vm(able if able and config.vm is None else capture.vms, config.vm, folder)
    features = shadow_features(vm.features)
    cfg = vm.config(features)
    if cfg.error is not None:
        raise CaptureError(f"{folder}: VM {vm.vm} cannot be shadowed: under {features.pa_bits}-bit physical addresses "
                           f"its {vm.ipa_bits}-bit stage 2 is a {cfg.error}")
    check_vmids(config.contexts, 16 if vm.vtcr >> 19 & 1 else 8)

    rows = leaves(mem, cfg)
    usable = (rows["perm"] & config.access) != 0
    usable &= (rows["pa"] >= capture.ram[0]) & (rows["pa"] + rows["size"] <= capture.ram[1])
    rows = rows[usable]
    if not len(rows):
        raise CaptureError(f"{folder}: VM {vm.vm} has no {'writable' if config.write else 'readable'} leaf")
    check_memory(int((rows["size"] // np.where(rows["size"] >= BLOCK, BLOCK, PAGE).astype(np.uint64)).sum()),
                 config.contexts)
    ipas, starts, sizes = shadow_units(rows["ipa"], rows["pa"], rows["size"])
    walk_many(mem, cfg, ipas, config.access)

    plans = []
    for vmid in range(1, config.contexts + 1):
        vttbr = vm.vttbr & ((1 << 48) - 1) | vmid << 48
        plans.append(ContextPlan(vttbr, vm.vtcr, vm.hcr, ipas))
        assert Stage2Config(vttbr, vm.vtcr, features=features, hcr=vm.hcr).vmid == vmid
    k, n = config.contexts, len(ipas)
    index = LeafIndex(np.tile(starts, k), np.tile(sizes, k), np.repeat(np.arange(k), n), np.tile(ipas, k))
    host = HostPlan(np.unique(starts[sizes == PAGE]), np.unique(starts[sizes == BLOCK]))
    shape = ", ".join(f"{count:,} {'leaf' if count == 1 else 'leaves'} of {size}" for size, count in vm.leaves.items())
    what = "Linux 7.2.13 hosting a Linux guest" if config.capture is None else folder.name
    label = f"{what} ({shape}, captured), {plural(k, 'context')}"
    return Workload(mem, features, tuple(plans), index, host, label, sum(vm.tables.values()) * vm.granule)


def shadow_features(features: Features) -> Features:
    return replace(features, pa_bits=min(features.pa_bits, 48))


def pick_vm(vms: Sequence[Any], wanted: int | None, folder: Path) -> Any:
    """The VM of that number, by default the one with the most leaves."""
    from s2shadow.capture import CaptureError

    if wanted is None:
        return max(vms, key=lambda vm: sum(vm.leaves.values()))
    for vm in vms:
        if vm.vm == wanted:
            return vm
    raise CaptureError(f"{folder}: no VM {wanted}; it has {number_list(vm.vm for vm in vms)}")


def number_list(numbers: Iterable[int]) -> str:
    found = [str(number) for number in numbers]
    return ", ".join(found) if len(found) <= 12 else f"{', '.join(found[:10])} … {found[-1]} ({len(found)} in all)"


def plural(count: int, noun: str) -> str:
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}s"


def check_vmids(contexts: int, bits: int) -> None:
    most = min((1 << bits) - 1, MOST_CONTEXTS)
    if contexts > most:
        raise ValueError(f"contexts must be at most {most} with {bits}-bit VMIDs, got {contexts}")


def check_memory(leaves_per_context: int, contexts: int) -> None:
    """Refuse what cannot fit before the machine starts to swap: about 100 bytes a leaf in engine and harness."""
    need = leaves_per_context * contexts * 100 + leaves_per_context * 64
    have = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if need > have * 0.8:
        raise ValueError(f"{leaves_per_context * contexts:,} leaves need about {need / 2**30:,.0f} GiB, "
                         f"this machine has {have / 2**30:,.0f} GiB")


def shadow_units(ipas: U64, outputs: U64, sizes: U64) -> tuple[U64, U64, U64]:
    """Guest leaves cut into the shadow leaves that they become over the host of ``HostPlan``, sorted by IPA.

    A leaf of 2 MiB or more becomes 2 MiB blocks, any other 4 KiB pages. Where a page leaf lies in the same canonical
    block as a block leaf, the host has pages there, so the block becomes pages too.
    """
    whole = (sizes >= BLOCK) & (outputs % BLOCK == 0) & (ipas % BLOCK == 0)
    ipas, outputs, units = cut(ipas, outputs, sizes, np.where(whole, BLOCK, PAGE).astype(np.uint64))
    paged = np.unique(outputs[units == PAGE] & ~np.uint64(BLOCK - 1))
    shared = (units == BLOCK) & np.isin(outputs, paged)
    if shared.any():
        ipas, outputs, units = cut(ipas, outputs, units, np.where(shared, PAGE, units).astype(np.uint64))
    order = np.argsort(ipas)
    return ipas[order], outputs[order], units[order]


def cut(ipas: U64, outputs: U64, sizes: U64, units: U64) -> tuple[U64, U64, U64]:
    counts = (sizes // units).astype(np.int64)
    rows = np.repeat(np.arange(len(ipas)), counts)
    offsets = (np.arange(len(rows)) - np.repeat(np.cumsum(counts) - counts, counts)).astype(np.uint64) * units[rows]
    return ipas[rows] + offsets, outputs[rows] + offsets, units[rows]


RAM_BASE = 1 << 30
IPA_BASE = 1 << 31
IPA_BITS = 40
SYNTHETIC_VTCR = 0x802D3558         # what Linux 7.2 writes: 4K granule, 40-bit IPA from level 1, 48-bit output, HA, VS
START_TABLES = 2
LEAF_ATTRIBUTES = 1 << 10 | 3 << 8 | 3 << 6 | 0b0110 << 2      # AF, inner shareable, read-write, Normal (FWB)


def build_synthetic(config: StormConfig) -> Workload:
    """Tables written with numpy: per context its own canonical pages in random order, and its own blocks."""
    from s2shadow.memory import GuestMemory

    blocks = int(config.pages * config.block_mix) // PAGES_PER_BLOCK
    pages = config.pages - blocks * PAGES_PER_BLOCK
    stride = -(-pages // PAGES_PER_BLOCK) * BLOCK + blocks * BLOCK
    if IPA_BASE + stride * config.aliases > 1 << IPA_BITS:
        raise ValueError(f"pages {config.pages:,} x aliases {config.aliases:,} exceed the {IPA_BITS}-bit IPA space")
    check_vmids(config.contexts, 16)
    check_memory((pages + blocks) * config.aliases, config.contexts)

    k = config.contexts
    tables_per_context = count_tables(pages, blocks, config.aliases)
    page_zone = RAM_BASE + -(-k * tables_per_context * PAGE // BLOCK) * BLOCK
    block_zone = page_zone + -(-k * pages // PAGES_PER_BLOCK) * BLOCK
    mem = GuestMemory()
    mem.add(RAM_BASE, block_zone + k * blocks * BLOCK - RAM_BASE)

    rng = np.random.default_rng([config.seed, 1])
    alias_bases = IPA_BASE + np.arange(config.aliases, dtype=np.uint64) * np.uint64(stride)
    block_base = np.uint64(stride - blocks * BLOCK)
    page_ipas = (alias_bases[:, None] + addresses(0, pages, PAGE)).ravel()
    block_ipas = (alias_bases[:, None] + block_base + addresses(0, blocks, BLOCK)).ravel()
    ipas = np.concatenate([page_ipas, block_ipas])
    order = np.argsort(ipas)
    sizes = np.concatenate([np.full(len(page_ipas), PAGE, np.uint64), np.full(len(block_ipas), BLOCK, np.uint64)])

    plans, starts = [], []
    for context in range(k):
        base = RAM_BASE + context * tables_per_context * PAGE
        page_outputs = np.tile(addresses(page_zone + context * pages * PAGE, pages, PAGE)[rng.permutation(pages)],
                               config.aliases)
        block_outputs = np.tile(addresses(block_zone + context * blocks * BLOCK, blocks, BLOCK), config.aliases)
        mem.write(base, stage2_tables(base, page_ipas, page_outputs, block_ipas, block_outputs))
        plans.append(ContextPlan((context + 1) << 48 | base | 1, SYNTHETIC_VTCR, int(HCR_VM | HCR_FWB), ipas[order]))
        starts.append(np.concatenate([page_outputs, block_outputs]))
    index = LeafIndex(np.concatenate(starts), np.tile(sizes, k), np.repeat(np.arange(k), len(ipas)), np.tile(ipas, k))
    host = HostPlan(addresses(page_zone, k * pages, PAGE), addresses(block_zone, k * blocks, BLOCK))
    shape = f"{config.pages:,} pages per context"
    if blocks:
        shape += f", {plural(blocks, 'block')} of 2M among them"
    if config.aliases > 1:
        shape += f", each at {config.aliases} IPAs"
    label = f"generated ({shape}), {plural(k, 'context')}"
    return Workload(mem, Features(), tuple(plans), index, host, label, k * tables_per_context * PAGE)


def addresses(start: int, count: int, step: int) -> U64:
    return np.uint64(start) + np.arange(count, dtype=np.uint64) * np.uint64(step)


def count_tables(pages: int, blocks: int, aliases: int) -> int:
    """An even bound of the table pages of one context: start tables, level 2 and level 3."""
    level3 = -(-pages // PAGES_PER_BLOCK) * aliases
    span = (-(-pages // PAGES_PER_BLOCK) + blocks) * aliases
    return (START_TABLES + -(-span // 512) + 1 + level3 + 1) & ~1


def stage2_tables(base: int, page_ipas: U64, page_outputs: U64, block_ipas: U64, block_outputs: U64) -> bytes:
    """The bytes of a 4K-granule stage-2 table of 40 bits at ``base``: start tables, then level 2, then level 3."""
    level3 = np.unique(page_ipas >> np.uint64(21))
    level2 = np.unique(np.concatenate([level3, block_ipas >> np.uint64(21)]) >> np.uint64(9))
    first2, first3 = START_TABLES, START_TABLES + len(level2)
    tables = np.zeros((first3 + len(level3), 512), dtype="<u8")

    def table_descriptors(first: int, count: int) -> U64:
        return addresses(base + first * PAGE, count, PAGE) | np.uint64(3)

    def row(first: int, keys: U64, key: U64) -> npt.NDArray[np.int64]:
        return np.asarray(first + np.searchsorted(keys, key), dtype=np.int64)

    low = np.uint64(511)
    tables[:START_TABLES].reshape(-1)[level2] = table_descriptors(first2, len(level2))
    tables[row(first2, level2, level3 >> np.uint64(9)), level3 & low] = table_descriptors(first3, len(level3))
    entry = block_ipas >> np.uint64(21)
    tables[row(first2, level2, entry >> np.uint64(9)), entry & low] = block_outputs | np.uint64(LEAF_ATTRIBUTES | 1)
    entry = page_ipas >> np.uint64(12)
    tables[row(first3, level3, entry >> np.uint64(9)), entry & low] = page_outputs | np.uint64(LEAF_ATTRIBUTES | 3)
    return tables.tobytes()


# --- one policy ------------------------------------------------------------------------------------------------

SCALAR_FAULTS = 4       # up to so many refaults of one context go one by one: a batch call costs more than they do


class Round(NamedTuple):
    """One event: nanoseconds and leaves of its teardown, and of what had to be faulted in again."""

    teardown_ns: int
    removed: int
    refault_ns: int
    refaults: int
    owed_tlbis: int
    kernel_steps: int


ROUND_DTYPE = np.dtype([(name, np.int64) for name in Round._fields])


class Rig:
    """A ``NestedVM`` over a workload under one policy: one vCPU per context, each context loaded on its own."""

    def __init__(self, workload: Workload, policy: str, config: StormConfig):
        from s2shadow.engine import FAULT_DTYPE, NestedVM

        k = len(workload.contexts)
        self.workload = workload
        self.access = config.access
        self.drain = config.track_tlbis
        self.vm = NestedVM(workload.mem, vcpus=k, contexts=k, features=workload.features, teardown=policy,
                           tlbi=config.tlbi, track_tlbis=config.track_tlbis)
        workload.host.map_all(self.vm)
        self.vcpus: list[VCPU] = []
        for vcpu, plan in zip(self.vm.vcpus, workload.contexts, strict=True):
            vcpu.load(plan.vttbr, plan.vtcr, hcr=plan.hcr)
            self.vcpus.append(vcpu)
        self.full = len(workload.index)
        self.steps = self.vm.stats.kernel_steps         # at the end of the last round
        widest = max(len(plan.ipas) for plan in workload.contexts)
        self.out: npt.NDArray[np.void] = np.zeros(widest, dtype=FAULT_DTYPE)

    def fill(self) -> tuple[int, int]:
        """Fault every set in, from whatever is mapped now -> (nanoseconds, leaves installed)."""
        spent = mapped = 0
        for vcpu, plan in zip(self.vcpus, self.workload.contexts, strict=True):
            ns, count = self.fault_batch(vcpu, plan.ipas)
            spent, mapped = spent + ns, mapped + count
        if self.vm.stats.live != self.full:
            raise StormError(f"{self.vm.stats.live:,} leaves are live after touching the whole set of {self.full:,}")
        return spent, mapped

    def fault_batch(self, vcpu: VCPU, ipas: U64) -> tuple[int, int]:
        """One timed ``fault_many`` -> (nanoseconds, leaves installed); ``StormError`` if a fault was not answered."""
        out = self.out[:len(ipas)]
        began = time.perf_counter_ns()
        vcpu.fault_many(ipas, self.access, out=out)
        spent = time.perf_counter_ns() - began
        mapped = int(np.count_nonzero(out["kind"] == MAPPED_KIND))
        if mapped != len(ipas):
            wrong = np.flatnonzero((out["kind"] != MAPPED_KIND) & (out["kind"] != HIT_KIND))
            if len(wrong):
                fail_fault(int(out["kind"][wrong[0]]), int(ipas[wrong[0]]))
        return spent, mapped

    def round(self, start: int, end: int, required: int) -> Round:
        """One event over [start, end), which ``required`` leaves overlap, and everything touched again."""
        vm = self.vm
        clock = time.perf_counter_ns
        began = clock()
        change = vm.unmap(start, end)
        teardown = clock() - began
        stats = vm.stats
        owed = len(vm.take_tlbis()) if self.drain else 0
        self.workload.host.give_back(vm, start, end)
        if stats.live == self.full - required:
            refault, count = self.refault_indexed(start, end)
        elif stats.live == 0:
            refault, count = self.fill()
        else:
            refault, count = self.refault_missing()
        after = vm.stats
        if after.live != self.full or count != self.full - stats.live:
            raise StormError(f"event [{start:#x}, {end:#x}) left {stats.live:,} of {self.full:,} leaves, "
                             f"{count:,} faulted in again, {after.live:,} live now")
        if self.drain:
            vm.take_tlbis()
        steps, self.steps = stats.kernel_steps - self.steps, after.kernel_steps
        return Round(teardown, int(change.leaves), refault, count, owed, int(steps))

    def refault_indexed(self, start: int, end: int) -> tuple[int, int]:
        """Fault in exactly the leaves that the index names; each must have been missing."""
        contexts, ipas = self.workload.index.overlapping(start, end)
        breaks = np.flatnonzero(np.diff(contexts)) + 1
        spent = mapped = 0
        singles = []
        for group, of in zip(np.split(ipas, breaks), np.split(contexts, breaks), strict=True):
            if len(group) > SCALAR_FAULTS:
                ns, count = self.fault_batch(self.vcpus[int(of[0])], group)
                spent, mapped = spent + ns, mapped + count
            elif len(group):
                fault = self.vcpus[int(of[0])].fault
                singles += [(fault, ipa) for ipa in group.tolist()]
        if singles:
            access = self.access
            began = time.perf_counter_ns()
            answers = [fault(ipa, access) for fault, ipa in singles]
            spent += time.perf_counter_ns() - began
            mapped += sum(answer.kind == MAPPED for answer in answers)
            for answer in answers:
                if answer.kind not in (MAPPED, HIT):
                    fail_fault(int(answer.kind), int(answer.ipa))
        return spent, mapped

    def refault_missing(self) -> tuple[int, int]:
        """Look every leaf up and fault in those that are gone."""
        spent = mapped = 0
        for vcpu, plan in zip(self.vcpus, self.workload.contexts, strict=True):
            found = vcpu.translate_many(plan.ipas, self.access)
            missing = plan.ipas[found["kind"] != HIT_KIND]
            if len(missing):
                ns, count = self.fault_batch(vcpu, missing)
                spent, mapped = spent + ns, mapped + count
        return spent, mapped

    def verify(self) -> None:
        """A touch of everything must hit everywhere."""
        for i, (vcpu, plan) in enumerate(zip(self.vcpus, self.workload.contexts, strict=True)):
            out = self.out[:len(plan.ipas)]
            vcpu.fault_many(plan.ipas, self.access, out=out)
            misses = np.flatnonzero(out["kind"] != HIT_KIND)
            if len(misses):
                raise StormError(f"context {i}: IPA {int(plan.ipas[misses[0]]):#x} was not mapped at the end")


def fail_fault(kind: int, ipa: int) -> None:
    if kind == NO_MEMORY:
        raise MemoryError("the engine's tables")
    raise StormError(f"a touch of IPA {ipa:#x} was answered {Kind(kind).name}")


# --- the whole storm -------------------------------------------------------------------------------------------


def run(config: StormConfig, progress: Progress | None = None) -> dict[str, Any]:
    """Run a storm -> the JSON-ready result (schema 1).

    ``progress(policy, fraction)`` is called now and then. ``KeyboardInterrupt`` ends the run early: the result holds
    what was measured until then, with ``"interrupted": true``.
    """
    result: dict[str, Any] = {"schema": 1, "machine": machine(), "config": config_dict(config), "policies": {},
                              "ratios": {}, "interrupted": False}
    try:
        workload = build(config)
        starts = workload.host.pick_events(config.events, config.event_pages, config.seed)
        result["workload"] = {"label": workload.label, "contexts": len(workload.contexts),
                              "leaves": len(workload.index), "leaves_by_size": workload.leaf_counts(),
                              "canonical_pages": workload.host.total_pages,
                              "guest_table_bytes": workload.guest_table_bytes}
        for policy in config.teardown:
            run_policy(config, workload, policy, starts, result, progress)
    except KeyboardInterrupt:
        result["interrupted"] = True
    result["ratios"] = ratios(result["policies"])
    return result


def run_policy(config: StormConfig, workload: Workload, policy: str, starts: U64, result: dict[str, Any],
               progress: Progress | None) -> None:
    """Measure one policy into ``result``; an interrupt keeps the rounds that are complete."""
    deadline = None if policy == REVERSE_MAP else time.monotonic() + config.seconds
    size = np.uint64(config.event_pages * PAGE)
    ends = in_pieces(lambda at, end: starts[at:end] + size, len(starts))
    required = in_pieces(lambda at, end: np.asarray(workload.index.required(starts[at:end], ends[at:end])), len(starts))
    rounds, done = np.empty(len(starts), ROUND_DTYPE), 0    # 10^7 objects would take a second to sum up
    began = time.monotonic()
    rig = Rig(workload, policy, config)
    if progress is not None:
        progress(policy, 0.0)
    collecting = gc.isenabled()
    gc.disable()
    interrupted = True
    try:
        fill = rig.fill()
        full_stats = rig.vm.stats
        shadow_bytes = sum(context.table_bytes for context in rig.vm.contexts)
        for i, (start, end, need) in enumerate(plain_rows(starts, ends, required)):
            rounds[i] = rig.round(start, end, need)
            done = i + 1
            if deadline is None:
                share, due = done / len(starts), not i & 0xFF
            else:
                share, due = (time.monotonic() - began) / config.seconds, True
                if time.monotonic() >= deadline and done >= config.min_events:
                    break
            if progress is not None and due:
                progress(policy, min(share, 1.0))
        interrupted = False
    finally:
        if collecting:
            gc.enable()
        if done:
            row = summarize(rounds[:done], int(required[:done].sum()), *fill)
            row |= memory_use(full_stats, shadow_bytes)
            row |= {"leaves": rig.full, "seconds": time.monotonic() - began, "interrupted": interrupted}
            result["policies"][policy] = row
    rig.verify()
    if "floor" not in result:
        add_floor(result, full_stats.memory_bytes + workload.guest_table_bytes)
    if progress is not None:
        progress(policy, 1.0)


def summarize(rounds: npt.NDArray[np.void], required: int, fill_ns: int, filled: int) -> dict[str, Any]:
    """The figures of one policy from its rounds (``ROUND_DTYPE``) and from the first fill."""
    teardown, refault = rounds["teardown_ns"], rounds["refault_ns"]
    p50, p99 = np.percentile(teardown, [50, 99]).tolist()
    removed, steps, owed = (int(rounds[name].sum()) for name in ("removed", "kernel_steps", "owed_tlbis"))
    return {
        "events": len(rounds),
        "fault_ns": fill_ns / filled if filled else None,
        "faults_per_s": filled * 1e9 / fill_ns if fill_ns else None,
        "teardown_ns_per_event": {"p50": p50, "p99": p99, "max": float(teardown.max()), "mean": float(teardown.mean())},
        "refaults_per_event": float(rounds["refaults"].mean()),
        "refault_ns_per_event": float(refault.mean()),
        "total_ns_per_event": float(teardown.mean() + refault.mean()),
        "entries_removed": removed,
        "entries_required": required,
        "kernel_steps": steps,
        "tlbis_per_event": owed / len(rounds),
    }


def memory_use(stats: Any, shadow_bytes: int) -> dict[str, Any]:
    """Bytes at full mapping: the shadow tables, and the reverse map (heads, radix nodes, links) per mapping."""
    reverse = stats.link_bytes + stats.rmap_bytes
    return {"table_bytes": shadow_bytes, "table_bytes_per_entry": shadow_bytes / stats.live,
            "reverse_map_bytes": reverse, "reverse_map_bytes_per_entry": reverse / stats.live}


def add_floor(result: dict[str, Any], footprint: int) -> None:
    try:
        from s2shadow._floor import chase
    except ImportError:
        return
    result["floor"] = {"bytes": int(footprint), "ns_per_load": chase(int(footprint))}


def ratios(policies: dict[str, Any]) -> dict[str, dict[str, float]]:
    """How many times more than the reverse map each other policy takes."""
    found: dict[str, dict[str, float]] = {"teardown_p50": {}, "total": {}, "refaults": {}}
    base = policies.get(REVERSE_MAP)
    for name, row in policies.items():
        if base is None or name == REVERSE_MAP:
            continue
        for key, value in (("teardown_p50", lambda p: p["teardown_ns_per_event"]["p50"]),
                           ("total", lambda p: p["total_ns_per_event"]),
                           ("refaults", lambda p: p["refaults_per_event"])):
            if value(base):
                found[key][name] = value(row) / value(base)
    return found


def config_dict(config: StormConfig) -> dict[str, Any]:
    values = asdict(config)
    values["capture"] = None if config.capture is None else os.fspath(config.capture)
    values["teardown"] = list(config.teardown)
    return values


def machine() -> dict[str, Any]:
    from importlib.metadata import PackageNotFoundError, version

    try:
        ours = version("s2shadow")
    except PackageNotFoundError:
        ours = "unknown"
    return {"system": platform.system(), "release": platform.release(), "machine": platform.machine(),
            "cpu": cpu_name(), "cpus": os.cpu_count(), "python": platform.python_version(),
            "numpy": np.__version__, "s2shadow": ours, "timer_ns": timer_cost()}


def cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith(("model name", "Model")):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or "unknown"


def timer_cost() -> float:
    """Nanoseconds that reading the clock twice adds to every timed section (not subtracted anywhere)."""
    clock = time.perf_counter_ns
    return float(np.median([-(clock() - clock()) for _ in range(1000)]))
