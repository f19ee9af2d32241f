# cython: nonecheck=True
"""``NestedVM``: the thin layer that checks arguments once and calls the engine without the GIL."""

import dataclasses
from collections import namedtuple

import numpy as np

cimport cython
from cpython.exc cimport PyErr_CheckSignals
from cpython.pycapsule cimport PyCapsule_New
from libc.stdint cimport int64_t, uint8_t, uint16_t, uint32_t, uint64_t
from libc.string cimport memset

from s2shadow cimport S2SHADOW_VM_CAPSULE
from s2shadow.arch cimport FINAL_LEVEL, SH_ISH, largest_leaf_level, leaf_level_within, level_span
from s2shadow.arguments cimport as_u64
from s2shadow.arrays cimport as_access, batch_t, take_addresses, take_masks, take_output
from s2shadow.atomics cimport cas32, load_pointer, store32
from s2shadow.check cimport check_vm, finding_t
from s2shadow.config cimport decode_config, fill_features, s2_config_t
from s2shadow.dirty cimport dirty_reserve
from s2shadow.fault cimport STEP_DONE, fault_run, step_t, translate_run
from s2shadow.handle cimport handle_t
from s2shadow.host cimport (
    change_t, host_age, host_attrs_t, host_dirty_log, host_give_room, host_log, host_make_room, host_map, host_protect,
    host_unmap,
)
from s2shadow.intervals cimport intervals_record, intervals_remove
from s2shadow.listing cimport (
    LIST_HOST, LIST_INTERVALS, LIST_REVERSE, LIST_SHADOW, context_row_t, host_row_t, interval_row_t, list_context,
    list_contexts, list_rows, list_tables, listing_t, reverse_row_t, shadow_row_t,
)
from s2shadow.lock cimport lock_exclusive, unlock_exclusive
from s2shadow.machine cimport (
    SETUP_NO_ADDRESS_SPACE, SETUP_NO_MEMORY, SETUP_NO_ROOTS, counters_t, default_table_base, install_populated,
    least_bytes, plan_t, ram_within, root_bytes, setup_t, vcpu_load, vcpu_put, vm_counters, vm_destroy, vm_init,
)
from s2shadow.maintenance cimport apply_tlbi, tlbi_regs_t, tlbi_result_t
from s2shadow.memory cimport GuestMemory, mem_view_t, region_map_t
from s2shadow.owed cimport FIRST_CONTEXT_VMID, hw_tlbi_t, owed_take
from s2shadow.pace cimport next_piece, pace_t
from s2shadow.table cimport (
    CANONICAL, ROOT_PAGES, page_of, page_t, slot_ipa, table_find, table_t,
)
from s2shadow.tlbi cimport TLBI_OK, tlbi_encoding, tlbi_lookup, tlbi_lookup_word, tlbi_op_t
from s2shadow.vm cimport (
    KIND_NO_MEMORY, KIND_RETRY, NO_CONTEXT, POPULATE_CALLABLE, POPULATE_LINEAR, POPULATE_NONE, TEARDOWN_BLOW_AWAY,
    TEARDOWN_BLOW_AWAY_LEAN, TEARDOWN_INTERVAL_MAP, TEARDOWN_REVERSE_MAP, context_t, count_answer, fault_t,
    forget_guest_path, populate_t, range_t, vcpu_t, vm_t,
)

from s2shadow.check import RULES
from s2shadow.config import Stage2Config
from s2shadow.constants import HCR_FWB, HCR_VM, TEARDOWNS, Access, Kind, perm_text, size_text
from s2shadow.features import Features
from s2shadow.mapping import HostMapping, Linear, memattr_code, perm_mask
from s2shadow.tlbi import UndefinedInstruction, operation_name
from s2shadow.walker import leaves as table_leaves

FAULT_DTYPE = np.dtype([("kind", "u1"), ("fsc", "u1"), ("level", "i1"), ("perm", "u1"), ("context", "u2"),
                        ("ipa", "u8"), ("cipa", "u8"), ("pa", "u8"), ("size", "u8"), ("hpfar", "u8")], align=True)
SHADOW_DTYPE = np.dtype([("ipa", "u8"), ("cipa", "u8"), ("pa", "u8"), ("size", "u8"), ("desc", "u8"), ("perm", "u1"),
                         ("memattr", "u1"), ("sh", "u1"), ("young", "u1"), ("level", "i1"), ("guest_level", "i1")],
                        align=True)
REVERSE_DTYPE = np.dtype([("ipa", "u8"), ("size", "u8"), ("context", "u2")], align=True)
HOST_LEAF_DTYPE = np.dtype([("cipa", "u8"), ("pa", "u8"), ("size", "u8"), ("perm", "u1"), ("memattr", "u1")],
                           align=True)
INTERVAL_DTYPE = np.dtype([("start", "u8"), ("end", "u8"), ("ipa", "u8"), ("unknown", "u1")], align=True)
TLBI_OP_DTYPE = np.dtype([("vcpu", "u2"), ("flags", "u2"), ("insn", "u4"), ("xt", "u8"), ("vttbr", "u8"),
                          ("vtcr", "u8"), ("hcr", "u8")], align=True)
HW_TLBI_DTYPE = np.dtype([("seq", "u8"), ("op", "u1"), ("host_vmid", "u2"), ("start", "u8"), ("end", "u8"),
                          ("level", "i1"), ("asid", "u2"), ("last_level", "u1")], align=True)

# The layout of TLBI_OP_DTYPE.
ctypedef struct tlbi_request_t:
    uint16_t vcpu
    uint16_t flags              # bit 0: the three registers count, else those last loaded
    uint32_t insn
    uint64_t xt
    uint64_t vttbr
    uint64_t vtcr
    uint64_t hcr

assert FAULT_DTYPE.itemsize == sizeof(fault_t) and HW_TLBI_DTYPE.itemsize == sizeof(hw_tlbi_t)
assert SHADOW_DTYPE.itemsize == sizeof(shadow_row_t) and HOST_LEAF_DTYPE.itemsize == sizeof(host_row_t)
assert REVERSE_DTYPE.itemsize == sizeof(reverse_row_t) and INTERVAL_DTYPE.itemsize == sizeof(interval_row_t)
assert TLBI_OP_DTYPE.itemsize == sizeof(tlbi_request_t)

cdef enum:
    POPULATE_TRIES = 16                 # a populate that undoes itself ends in RETRY

TLBI_CLASSES = ("IPA", "RANGE", "VMALLS12", "ALL", "STAGE1")     # in the order of tlbi_class_t
TEARDOWN_CODES = dict(zip(TEARDOWNS, (TEARDOWN_REVERSE_MAP, TEARDOWN_INTERVAL_MAP, TEARDOWN_BLOW_AWAY,
                                      TEARDOWN_BLOW_AWAY_LEAN), strict=True))


class InvariantError(AssertionError):
    """``NestedVM.check`` found a broken invariant."""


cdef class Invalidation:
    """What a host change did: ``leaves`` is how many shadow leaves it dropped, ``ticket`` its number. The host page may
    be reused once every row of ``vm.take_tlbis()`` with ``seq`` up to ``ticket`` has been applied. Unpacks into the
    two; leaves that were only narrowed do not count."""

    cdef readonly uint64_t leaves
    cdef readonly uint64_t ticket

    def __init__(self, uint64_t leaves, uint64_t ticket):
        self.leaves = leaves
        self.ticket = ticket

    def __iter__(self):
        return iter((self.leaves, self.ticket))

    def __eq__(self, other):
        return isinstance(other, Invalidation) and tuple(self) == tuple(other)

    def __hash__(self):
        return hash((self.leaves, self.ticket))

    def __repr__(self):
        return f"Invalidation(leaves={self.leaves}, ticket={self.ticket})"


cdef Invalidation invalidation(const change_t *change, Invalidation result):
    """What a change did, in what was made before it: once something is gone, no MemoryError may hide that."""
    result.leaves = change.dropped
    result.ticket = change.ticket
    return result


class TlbiResult(namedtuple("TlbiResult", "name removed required contexts")):
    """What one TLBI did: the operation's ``name``, shadow leaves ``removed``, those of them that were ``required`` by
    the architecture, and how many ``contexts`` it named."""

    __slots__ = ()


@dataclasses.dataclass(frozen=True, slots=True)
class Context:
    """One shadow context as it was when asked for.

    ``index`` in the pool; ``vmid``, ``vttbr`` and ``vtcr`` as L1 wrote them; ``enabled``: L1's stage 2 is on.
    ``host_vmid``, ``host_vttbr``, ``host_vtcr`` and ``host_hcr`` are the registers under which hardware, or another
    walker, uses the shadow. ``entries``: live leaves; ``table_bytes``: of its tables; ``refs``: vCPUs that have it
    loaded. Source: struct kvm_s2_mmu and get_s2_mmu_nested of Linux; the key is wider than Linux's by EE, FWB, CD and
    S2PIR.
    """

    index: int
    vmid: int
    vttbr: int
    vtcr: int
    enabled: bool
    host_vmid: int
    host_vttbr: int
    host_vtcr: int
    host_hcr: int
    entries: int
    table_bytes: int
    refs: int

    def __repr__(self):
        return f"Context(index={self.index}, vmid={self.vmid}, enabled={self.enabled}, entries={self.entries})"


class TlbiCounters(namedtuple("TlbiCounters", "operations contexts removed required")):
    """Of one class of TLBI: how many ``operations`` there were, ``contexts`` that they named, leaves ``removed``, and
    leaves that were ``required`` to go."""

    __slots__ = ()


@dataclasses.dataclass(frozen=True, slots=True)
class Stats:
    """Counters of a ``NestedVM`` since it was made, and what it holds now.

    Faults: ``faults``, and of them ``hits``, ``mapped``, ``l1_faults``, ``host_faults``, ``mmio``, ``retries`` and
    ``no_memory``, by ``Kind``. Shadow leaves: ``installed`` and ``removed`` (their difference is ``live``), ``relaxed``
    in place (a permission added), ``replaced`` by another leaf, ``narrowed`` by a host change. ``invalidations``: host
    changes. ``kernel_steps``: steps that Linux would have made through the input space of contexts that it empties (the
    engine makes none). ``unknown_unmaps``: contexts that a host change emptied since their interval map did not know
    better. ``contexts_recycled``: contexts that got another key; ``evictions``: contexts or tables that went for room.
    Now: ``live`` shadow leaves, ``host_leaves``; bytes of all tables (``table_bytes``), of reverse-map links
    (``link_bytes``), of heads and radix nodes or interval maps (``rmap_bytes``), and of all three (``memory_bytes``).
    ``tlbis`` has ``TlbiCounters`` by class of operation: IPA, RANGE, VMALLS12, ALL, STAGE1.
    """

    faults: int
    hits: int
    mapped: int
    l1_faults: int
    host_faults: int
    mmio: int
    retries: int
    no_memory: int
    installed: int
    removed: int
    relaxed: int
    replaced: int
    narrowed: int
    live: int
    invalidations: int
    kernel_steps: int
    unknown_unmaps: int
    contexts_recycled: int
    evictions: int
    host_leaves: int
    table_bytes: int
    link_bytes: int
    rmap_bytes: int
    memory_bytes: int
    tlbis: dict

    @property
    def reverse_map_bytes_per_entry(self):
        """Bytes of heads, links and radix nodes, or of interval maps, for each live leaf; 0.0 where there is none."""
        return (self.link_bytes + self.rmap_bytes) / self.live if self.live else 0.0


@cython.no_gc_clear  # dealloc needs mem to unpin it, in a cycle too (an embedder that has the engine and populates it)
cdef class _Engine:
    """Owner of one ``vm_t``; what ``NestedVM``, its vCPUs and its host table share."""

    cdef vm_t vm
    cdef handle_t handle            # what the C API calls this engine
    cdef GuestMemory mem
    cdef mem_view_t view            # of check() and the host side, under the exclusive lock
    cdef readonly object features
    cdef object policy              # Linear, callable or None
    cdef bint pinned

    def __cinit__(self, GuestMemory mem not None, uint32_t vcpus, uint32_t contexts, features, teardown,
                  bint ignore_attributes, bint tlbi_kvm72, uint64_t max_bytes, uint64_t table_base, bint track):
        cdef plan_t plan
        cdef setup_t done
        self.mem = mem
        self.features = features
        memset(&plan, 0, sizeof(plan_t))
        fill_features(features, &plan.features)
        plan.vcpus = vcpus
        plan.contexts = contexts
        plan.teardown = teardown
        plan.max_bytes = max_bytes
        plan.table_base = table_base
        plan.ignore_guest_attributes = ignore_attributes
        plan.tlbi_kvm72 = tlbi_kvm72
        plan.track_tlbis = track
        done = vm_init(&self.vm, &plan)
        if done == SETUP_NO_ADDRESS_SPACE:
            raise MemoryError("cannot reserve address space for the table arena")
        if done == SETUP_NO_ROOTS:
            raise MemoryError(f"no room for the roots of {contexts} contexts")
        if done == SETUP_NO_MEMORY:
            raise MemoryError("cannot set up the engine")
        mem.pin(&self.view)
        self.pinned = True
        self.handle.vm = &self.vm
        self.handle.shared = &mem.c

    def __dealloc__(self):
        if self.pinned:
            self.mem.unpin()
        vm_destroy(&self.vm)

    cdef uint64_t page_size(self):
        return <uint64_t>1 << self.vm.arena.granule_bits

    cdef int check_range(self, uint64_t start, uint64_t end) except -1:
        cdef uint64_t page = self.page_size()
        if start & (page - 1):
            raise ValueError(f"start {start:#x} is not aligned to the host page ({page})")
        if end & (page - 1):
            raise ValueError(f"end {end:#x} is not aligned to the host page ({page})")
        if start > end:
            raise ValueError(f"start {start:#x} is above end {end:#x}")
        if end > <uint64_t>1 << self.vm.features.pa_bits:
            raise ValueError(f"end {end:#x} is beyond pa_bits={self.vm.features.pa_bits}")
        return 0

    cdef object ram_ranges(self, uint64_t start, uint64_t end):
        """The parts of [start, end) that are RAM: range_t pairs as uint64[n, 2]."""
        # a map that this engine can see stays until no engine uses the memory
        cdef const region_map_t *map = <const region_map_t *>load_pointer(<void *const *>&self.mem.c.map)
        cdef uint64_t[:, ::1] parts = np.empty((map.count + 1, 2), dtype=np.uint64)
        return np.asarray(parts)[:ram_within(map, self.page_size(), start, end, <range_t *>&parts[0, 0])]

    def set_populate(self, policy):
        cdef populate_t kind
        cdef int level = 0
        cdef int64_t offset = 0
        cdef bint fresh = False
        if isinstance(policy, str):
            if policy != "linear":
                raise ValueError(f"populate must be None, a Linear, a callable or 'linear', got {policy!r}")
            policy = Linear()
        kind = POPULATE_NONE
        if isinstance(policy, Linear):
            if policy.offset % self.page_size():
                raise ValueError(f"offset {policy.offset:#x} is not aligned to the host page ({self.page_size()})")
            level = self.level_of_block(policy.max_block)
            offset = policy.offset
            fresh = policy.fresh
            kind = POPULATE_LINEAR
        elif callable(policy):
            kind = POPULATE_CALLABLE
        elif policy is not None:
            raise TypeError(f"populate must be None, a Linear, a callable or 'linear', got {type(policy).__name__}")
        with cython.critical_section(self):
            self.policy = policy
        with nogil:
            lock_exclusive(&self.vm.lock)       # a fault beside this is served by the one policy or by the other
            if kind == POPULATE_LINEAR:
                self.vm.linear_level = level
                self.vm.linear_offset = offset
                self.vm.linear_fresh = fresh
            self.vm.populate = kind
            unlock_exclusive(&self.vm.lock)

    def get_populate(self):
        with cython.critical_section(self):
            return self.policy

    cdef int level_of_block(self, uint64_t size) except -9:
        """Level of the largest host leaf not above ``size``."""
        if size < self.page_size():
            raise ValueError(f"block size {size} is below the host page ({self.page_size()})")
        return leaf_level_within(self.vm.arena.granule_bits, self.vm.arena.oa.wide, size)

    cdef int fill_attrs(self, object perm, object memattr, host_attrs_t *attrs) except -1:
        attrs.perm = perm_mask(perm)
        if not self.vm.features.xnx and attrs.perm & 36 != 36:
            attrs.perm &= 3
        attrs.memattr = memattr_code(memattr, self.vm.features.fwb)
        attrs.sh = 3
        attrs.young = 1
        return 0

    def map(self, uint64_t cipa, uint64_t pa, uint64_t size, perm, memattr):
        cdef host_attrs_t attrs
        cdef change_t change
        cdef Invalidation result = Invalidation.__new__(Invalidation)
        cdef bint mapped
        cdef uint64_t limit = <uint64_t>1 << self.vm.features.pa_bits
        if size == 0:
            raise ValueError("size must be positive, got 0")
        if size & (self.page_size() - 1):
            raise ValueError(f"size {size:#x} is not a multiple of the host page ({self.page_size()})")
        if cipa & (self.page_size() - 1):
            raise ValueError(f"cipa {cipa:#x} is not aligned to the host page ({self.page_size()})")
        if pa & (self.page_size() - 1):
            raise ValueError(f"pa {pa:#x} is not aligned to the host page ({self.page_size()})")
        if size > limit or cipa > limit - size:
            raise ValueError(f"cipa {cipa:#x} with size {size:#x} is beyond pa_bits={self.vm.features.pa_bits}")
        if pa > limit - size:
            raise ValueError(f"pa {pa:#x} with size {size:#x} is beyond pa_bits={self.vm.features.pa_bits}")
        self.fill_attrs(perm, memattr, &attrs)
        with nogil:
            mapped = host_map(&self.vm, cipa, pa, size, &attrs, ~<uint64_t>0, &change)
        if not mapped:
            raise MemoryError(f"no room for the tables of {size:#x} bytes at {cipa:#x}")
        return invalidation(&change, result)

    def load(self, addresses, pages, uint64_t vttbr, uint64_t vtcr):
        cdef host_attrs_t attrs
        cdef change_t change
        cdef Invalidation result = Invalidation.__new__(Invalidation)
        cdef uint64_t dropped = 0, cipa, pa, size, needed
        cdef bint mapped
        cdef uint64_t largest = level_span(self.vm.arena.granule_bits,
                                           largest_leaf_level(self.vm.arena.granule_bits, self.vm.arena.oa.wide))
        leaf_rows = self.captured_leaves(addresses, pages, vttbr, vtcr)
        for row in leaf_rows:
            cipa, pa, size = row["ipa"], row["pa"], row["size"]
            if (cipa + size) >> self.vm.features.pa_bits and cipa + size != 1 << self.vm.features.pa_bits:
                raise ValueError(f"captured leaf at {cipa:#x} is beyond pa_bits={self.vm.features.pa_bits}")
            if size > largest:
                raise ValueError(f"captured leaf of {size:#x} bytes at {cipa:#x} is larger than the host's blocks")
        needed = self.tables_above(leaf_rows)
        with nogil:
            mapped = host_make_room(&self.vm, needed)
        if not mapped:
            raise MemoryError(f"no room for the tables of {len(leaf_rows)} captured leaves")
        change.ticket = self.vm.owed.seq
        try:
            for row in leaf_rows:
                cipa, pa, size = row["ipa"], row["pa"], row["size"]
                attrs.perm = row["perm"]
                attrs.memattr = row["memattr"]
                attrs.sh = row["sh"]
                attrs.young = int(row["desc"]) >> 10 & 1
                with nogil:
                    mapped = host_map(&self.vm, cipa, pa, size, &attrs, size, &change)
                if not mapped:              # another thread took the room
                    raise MemoryError(f"no room for the tables of the captured leaf at {cipa:#x}")
                dropped += change.dropped
        finally:
            with nogil:
                host_give_room(&self.vm)
        change.dropped = dropped
        return invalidation(&change, result)

    cdef uint64_t tables_above(self, leaf_rows):
        """How many table pages these leaves stand in, where nothing else does."""
        cdef uint64_t needed = 0, span
        cdef int level
        for level in range(self.vm.canonical.start_level, FINAL_LEVEL):
            span = level_span(self.vm.arena.granule_bits, level)
            needed += len(np.unique(leaf_rows["ipa"][leaf_rows["size"] < span] // span))
        return needed

    def captured_leaves(self, addresses, pages, vttbr, vtcr):
        """The leaves of a captured host table, read through a memory that holds only its pages."""
        granule = self.page_size()
        addresses = np.ascontiguousarray(addresses, dtype=np.uint64)
        pages = np.ascontiguousarray(pages, dtype=np.uint8)
        if pages.ndim != 2 or addresses.ndim != 1 or len(addresses) != len(pages) or pages.shape[1] != granule:
            raise ValueError(f"addresses must be uint64[N] and pages uint8[N, {granule}], "
                             f"got {addresses.shape} and {pages.shape}")
        config = Stage2Config(vttbr, vtcr, self.features, hcr=HCR_VM | (HCR_FWB if self.features.fwb else 0))
        if config.error:
            raise ValueError(f"vtcr {vtcr:#x} and vttbr {vttbr:#x} make no host table: {config.error}")
        if config.granule != granule:
            raise ValueError(f"vtcr {vtcr:#x} has a granule of {config.granule}, the host's is {granule}")
        order = np.argsort(addresses, kind="stable")
        check_table_pages(addresses[order], granule)
        mem = GuestMemory()
        (<GuestMemory>mem).fill(addresses[order], pages[order])
        # each page in at most sixteen places; tables that loop would take seconds to the default limit
        return table_leaves(mem, config, min(1 << 24, 16 * len(pages) * pages.shape[1] // 8))

    def protect(self, uint64_t start, uint64_t end, perm):
        cdef host_attrs_t attrs
        cdef change_t change
        cdef Invalidation result = Invalidation.__new__(Invalidation)
        self.check_range(start, end)
        self.fill_attrs(perm, 0, &attrs)
        with nogil:
            host_protect(&self.vm, start, end, attrs.perm, &change)
        return invalidation(&change, result)

    cdef Invalidation unmap(self, uint64_t start, uint64_t end, object partial):
        cdef change_t change
        cdef Invalidation result = Invalidation.__new__(Invalidation)
        cdef bint drop_partial
        self.check_range(start, end)
        if partial is None:
            drop_partial = self.vm.teardown in (TEARDOWN_BLOW_AWAY, TEARDOWN_BLOW_AWAY_LEAN)
        elif partial in ("split", "drop"):
            drop_partial = partial == "drop"
        else:
            raise ValueError(f"partial must be 'split', 'drop' or None, got {partial!r}")
        if start == end:
            return Invalidation(0, self.vm.owed.seq)
        with nogil:
            host_unmap(&self.vm, start, end, drop_partial, &change)
        return invalidation(&change, result)

    def log_dirty(self, uint64_t start, uint64_t end, bint on):
        cdef change_t change
        cdef Invalidation result = Invalidation.__new__(Invalidation)
        cdef uint64_t[:, ::1] ranges
        cdef uint32_t count
        cdef bint reserved = True
        self.check_range(start, end)
        ranges = self.ram_ranges(start, end)
        count = ranges.shape[0]
        if not count:
            return Invalidation(0, self.vm.owed.seq)
        with nogil:
            lock_exclusive(&self.vm.lock)
            reserved = dirty_reserve(&self.vm.dirty)
            unlock_exclusive(&self.vm.lock)
        if not reserved:
            raise MemoryError("cannot reserve address space for the dirty log")
        with nogil:
            host_log(&self.vm, <const range_t *>&ranges[0, 0], count, on, &change)
        return invalidation(&change, result)

    cdef object new_bitmap(self, uint64_t start, uint64_t end):
        return np.zeros(((end - start >> self.vm.arena.granule_bits) + 7) // 8, dtype=np.uint8)

    def dirty_log(self, uint64_t start, uint64_t end):
        cdef uint64_t[:, ::1] ranges
        cdef uint8_t[::1] bits
        cdef uint32_t count
        self.check_range(start, end)
        bitmap = self.new_bitmap(start, end)
        ranges = self.ram_ranges(start, end)
        count = ranges.shape[0]
        if count and self.vm.dirty.active:
            bits = bitmap
            with nogil:
                host_dirty_log(&self.vm, <const range_t *>&ranges[0, 0], count, start, &bits[0])
        return bitmap

    def age(self, uint64_t start, uint64_t end, bint clear):
        cdef uint8_t[::1] bits
        self.check_range(start, end)
        bitmap = self.new_bitmap(start, end)
        if start < end:
            bits = bitmap
            with nogil:
                host_age(&self.vm, start, end, clear, &bits[0])
        return bitmap

    cdef object listed(self, listing_t what, uint64_t of, object dtype):
        """The rows of a listing, found out how many first: others may add some in between."""
        cdef int64_t n = 0, room = 0
        cdef uint8_t[::1] raw
        while True:
            out = np.zeros(room + 1, dtype=dtype)
            raw = out.view(np.uint8)
            with nogil:
                n = list_rows(&self.vm, what, of, &raw[0], room)
            if n < 0:
                raise ValueError(f"no context with index {of}")
            if n <= room:
                return out[:n]
            room = n + (n >> 6)

    def host_leaves(self):
        return self.listed(LIST_HOST, 0, HOST_LEAF_DTYPE)

    cdef object context_of(self, const context_row_t *row):
        host_vmid = row.index + FIRST_CONTEXT_VMID
        return Context(row.index, row.vmid, row.vttbr, row.vtcr, bool(row.enabled), host_vmid,
                       self.vttbr_of(&row.shadow, host_vmid), self.vtcr_of(&row.shadow),
                       HCR_VM | (HCR_FWB if self.vm.features.fwb else 0), row.entries, row.table_bytes, row.refs)

    cdef object vttbr_of(self, const table_t *table, host_vmid):
        """The table's address in VTTBR_EL2's form: bits 51:48 of a 52-bit one stand in 5:2."""
        root = self.vm.arena.table_base + (<uint64_t>table.root << self.vm.arena.granule_bits)
        return host_vmid << 48 | root & (1 << 48) - 1 | root >> 48 << 2

    cdef object vtcr_of(self, const table_t *table):
        """VTCR_EL2 under which another walker reads our tables: no hardware updates, inner shareable, write-back."""
        cdef int bits = self.vm.arena.granule_bits
        tg0 = {12: 0, 14: 2, 16: 1}[bits]
        sl0 = 2 - table.start_level if bits == 12 else 3 - table.start_level
        ps = {32: 0, 36: 1, 40: 2, 42: 3, 44: 4, 48: 5, 52: 6}[self.vm.features.pa_bits]
        ds = self.vm.arena.oa.implies_sh
        return (64 - table.ia_bits | sl0 << 6 | 1 << 8 | 1 << 10 | SH_ISH << 12 | tg0 << 14 | ps << 16
                | self.vm.features.vmid16 << 19 | 1 << 31 | ds << 32)

    def contexts(self):
        cdef uint32_t i, n
        cdef uint8_t[::1] raw = np.empty(self.vm.context_count * sizeof(context_row_t), dtype=np.uint8)
        cdef context_row_t *rows = <context_row_t *>&raw[0]
        with nogil:
            n = list_contexts(&self.vm, rows)
        return tuple([self.context_of(&rows[i]) for i in range(n)])

    cdef context_t *context_at(self, object index) except NULL:
        cdef int64_t i = index
        if not 0 <= i < self.vm.context_count or not self.vm.contexts[i].generation:
            raise ValueError(f"no context with index {index}")
        return &self.vm.contexts[i]

    cdef uint64_t index_of(self, object index) except? -1:
        """Of a context, as far as that can be said without the lock."""
        cdef int64_t i = index
        if not 0 <= i < self.vm.context_count:
            raise ValueError(f"no context with index {index}")
        return i

    def shadow(self, index):
        return self.listed(LIST_SHADOW, self.index_of(index), SHADOW_DTYPE)

    def reverse(self, uint64_t cipa):
        if cipa >> self.vm.features.pa_bits:
            raise ValueError(f"cipa {cipa:#x} is beyond pa_bits={self.vm.features.pa_bits}")
        if self.vm.teardown != TEARDOWN_REVERSE_MAP:
            return self.reverse_by_scan(cipa)
        out = self.listed(LIST_REVERSE, cipa, REVERSE_DTYPE)
        return out[np.lexsort((out["ipa"], out["context"]))]

    def reverse_by_scan(self, cipa):
        found = []
        for context in self.contexts():
            rows = self.shadow(context.index)
            rows = rows[(rows["cipa"] <= cipa) & (cipa < rows["cipa"] + rows["size"])]
            found += [(row["ipa"], row["size"], context.index) for row in rows]
        return np.array(found, dtype=REVERSE_DTYPE)

    def intervals(self, index):
        if self.vm.teardown != TEARDOWN_INTERVAL_MAP:
            raise ValueError("there are interval maps only with teardown='interval-map'")
        return self.listed(LIST_INTERVALS, self.index_of(index), INTERVAL_DTYPE)

    def tables(self, index):
        cdef int64_t context = -1 if index is None else self.index_of(index), n = 0, room = 0
        cdef uint64_t[::1] addresses
        cdef uint8_t[:, ::1] contents
        while True:
            found, out = np.empty(room + 1, dtype=np.uint64), np.empty((room + 1, self.page_size()), dtype=np.uint8)
            addresses, contents = found, out
            with nogil:
                n = list_tables(&self.vm, context, &addresses[0], &contents[0, 0], room)
            if n < 0:
                raise ValueError(f"no context with index {index}")
            if n <= room:
                return found[:n], out[:n]
            room = n + (n >> 6)

    def take_tlbis(self, limit):
        cdef uint32_t taken, wanted
        cdef uint8_t[::1] raw
        wanted = self.vm.owed.capacity if limit is None else min(as_u64(limit, "limit"), self.vm.owed.capacity)
        out = np.zeros(max(wanted, 1), dtype=HW_TLBI_DTYPE)
        raw = out.view(np.uint8)
        with nogil:                         # rows of an operation show once its section is over
            lock_exclusive(&self.vm.lock)
            taken = owed_take(&self.vm.owed, <hw_tlbi_t *>&raw[0], wanted)
            unlock_exclusive(&self.vm.lock)
        return out[:taken]

    def stats(self):
        cdef counters_t c
        with nogil:
            vm_counters(&self.vm, &c)
        return Stats(
            faults=c.faults, hits=c.kinds[0], mapped=c.kinds[1], l1_faults=c.kinds[2], host_faults=c.kinds[3],
            mmio=c.kinds[4], retries=c.kinds[5], no_memory=c.kinds[6], installed=c.installed, removed=c.removed,
            relaxed=c.relaxed, replaced=c.replaced, narrowed=c.narrowed, live=c.live, invalidations=c.invalidations,
            kernel_steps=c.kernel_steps, unknown_unmaps=c.unknown_unmaps, contexts_recycled=c.recycled,
            evictions=c.evictions, host_leaves=c.host_leaves, table_bytes=c.table_bytes, link_bytes=c.link_bytes,
            rmap_bytes=c.rmap_bytes, memory_bytes=c.table_bytes + c.link_bytes + c.rmap_bytes,
            tlbis={name: TlbiCounters(self.vm.tlbis[i].operations, self.vm.tlbis[i].contexts, self.vm.tlbis[i].removed,
                                      self.vm.tlbis[i].required) for i, name in enumerate(TLBI_CLASSES)})

    def tlbi_many(self, ops):
        cdef tlbi_op_t found
        cdef tlbi_regs_t regs
        cdef tlbi_result_t result
        cdef uint8_t[::1] raw
        cdef uint64_t[::1] removed
        cdef tlbi_request_t *rows
        cdef vcpu_t *vcpu
        cdef Py_ssize_t n, i, at = 0, end
        cdef pace_t pace
        if not isinstance(ops, np.ndarray) or ops.dtype != TLBI_OP_DTYPE or ops.ndim != 1:
            raise TypeError(f"ops must be a one-dimensional array of {TLBI_OP_DTYPE}")
        n = len(ops)
        out = np.zeros(n, dtype=np.uint64)
        if n == 0:
            return out
        copy = np.empty(n, dtype=TLBI_OP_DTYPE)         # what was checked must not change
        raw = copy.view(np.uint8)
        rows = <tlbi_request_t *>&raw[0]
        removed = out
        for i in range(n):                  # nothing is applied unless everything can be
            if not i & 0xFFFF:
                PyErr_CheckSignals()
                copy[i:i + 0x10000] = ops[i:i + 0x10000]
            if rows[i].vcpu >= self.vm.vcpu_count:
                raise ValueError(f"ops[{i}]: no vCPU {rows[i].vcpu}")
            if tlbi_lookup_word(rows[i].insn, &self.vm.features, &found) != TLBI_OK:
                try:
                    tlbi_encoding(rows[i].insn, &self.vm.features)
                except UndefinedInstruction as error:
                    raise UndefinedInstruction(f"ops[{i}]: {error}") from None
        while at < n:
            end = at + next_piece(&pace, at, n)
            with nogil:
                for i in range(at, end):
                    vcpu = &self.vm.vcpus[rows[i].vcpu]
                    regs.vttbr = rows[i].vttbr if rows[i].flags & 1 else vcpu.vttbr
                    regs.vtcr = rows[i].vtcr if rows[i].flags & 1 else vcpu.vtcr
                    regs.hcr = rows[i].hcr if rows[i].flags & 1 else vcpu.hcr
                    tlbi_lookup_word(rows[i].insn, &self.vm.features, &found)
                    apply_tlbi(&self.vm, &found, rows[i].xt, &regs, &result)
                    removed[i] = result.removed
            at = end
        return out

    def check(self):
        cdef finding_t finding
        with nogil:
            lock_exclusive(&self.vm.lock)
            self.mem.refresh(&self.view)
            check_vm(&self.vm, &self.view, &finding)
            unlock_exclusive(&self.vm.lock)
        if finding.rule:
            where = self.where(finding.slot) if finding.slot else ""
            raise InvariantError(f"{RULES[finding.rule]}{where}: {finding.seen:#x}, should be {finding.wanted:#x}")

    def where(self, uint32_t slot):
        cdef const page_t *page = &self.vm.arena.pages[page_of(&self.vm.arena, slot)]
        owner = "the canonical table" if page.context == CANONICAL else f"context {page.context}"
        return f" (at {slot_ipa(&self.vm.arena, slot):#x}, level {page.level} of {owner})"

    def _poke(self, index, uint64_t ipa, uint64_t flip):
        """Flip bits of the entry that ``ipa`` leads to: for tests of ``check`` and of outside walkers."""
        cdef table_t *table = &self.vm.canonical if index is None else &self.context_at(index).shadow
        cdef int level = 0
        cdef uint32_t slot = table_find(&self.vm.arena, table, ipa, &level)
        self.vm.arena.words[slot] ^= flip

    def _poke_interval(self, index, uint64_t ipa, uint64_t cipa, uint64_t size):
        """Forget the range at ``ipa``, or record one of ``size`` there: for tests of ``check``."""
        if size:
            intervals_record(self.context_at(index).intervals, cipa, size, ipa)
        else:
            intervals_remove(self.context_at(index).intervals, ipa)


cdef class HostStage2:
    """The host's (canonical) stage 2, cIPA to PA: ``vm.host``.

    Addresses and sizes are bytes, aligned to the host's granule and below 2^pa_bits; ``perm`` is ``"rwx"`` text or a
    mask of ``Access``, ``memattr`` a name or MemAttr[3:0] as in ``HostMapping``. Source: kvm_pgtable_stage2_map and its
    neighbours in Linux.
    """

    cdef _Engine engine

    def map(self, cipa, pa, size, perm="rwx", memattr="normal"):
        """Map [cipa, cipa + size) to ``pa`` on in the largest blocks that fit -> ``Invalidation``.

        Over a live range it is a change: shadow leaves over it are dropped. An identical mapping changes nothing.
        ``ValueError`` for unaligned or out-of-range addresses, for an unknown ``perm`` or ``memattr``; ``MemoryError``
        (nothing changed) over the bound.
        """
        return self.engine.map(as_u64(cipa, "cipa"), as_u64(pa, "pa"), as_u64(size, "size"), perm, memattr)

    def protect(self, start, end, perm):
        """Give what is mapped in [start, end) the permissions ``perm`` -> ``Invalidation``.

        Host blocks partly covered are split, if their permissions differ from ``perm``; what is not mapped stays so.
        Where a permission is reduced, shadow leaves inside are narrowed and those that stick out are dropped.
        ``ValueError`` for bounds that are not host-page aligned, and for an unknown ``perm``.
        """
        return self.engine.protect(as_u64(start, "start"), as_u64(end, "end"), perm)

    def load(self, addresses, pages, vttbr, vtcr):
        """Take over a captured host table: same leaves, same sizes, AF ignored -> ``Invalidation``.

        ``addresses``: uint64[N] of the table pages, ``pages``: uint8[N, granule]. ``ValueError`` when they make no
        table of the host's granule; nothing is changed then.
        """
        return self.engine.load(addresses, pages, as_u64(vttbr, "vttbr"), as_u64(vtcr, "vtcr"))

    def leaves(self):
        """Every host leaf, sorted by cIPA: ``HOST_LEAF_DTYPE[n]``; ``perm`` is that in force now."""
        return self.engine.host_leaves()

    @property
    def populate(self):
        """What a host fault does: None, a ``Linear``, or a callable(cipa, access) -> ``HostMapping`` or None.

        ``"linear"`` is ``Linear()``. A callable runs without an engine lock and may call the engine; the fault then
        starts over. An exception from it stops the batch at that element and propagates.
        """
        return self.engine.get_populate()

    @populate.setter
    def populate(self, policy):
        self.engine.set_populate(policy)

    def __repr__(self):
        return f"HostStage2({len(self.leaves())} leaves, populate={self.populate!r})"


cdef class Fault:
    """The answer to one fault or to ``translate``: the fields of ``FAULT_DTYPE`` as attributes. Addresses and sizes are
    bytes. Source: kvm_handle_guest_abort of Linux, for which of the answers a fault gets."""

    cdef fault_t c

    @property
    def kind(self):
        """How it was answered: a ``Kind``."""
        return Kind(self.c.kind)

    @property
    def fsc(self):
        """For L1_FAULT what to put into L1's ESR_EL2 (DFSC or IFSC, level included), for MMIO 0x10; else 0."""
        return self.c.fsc

    @property
    def level(self):
        """Level of L1's leaf, or of the fault, -1 to 3; -2 where L1's stage 2 is off."""
        return self.c.level

    @property
    def perm(self):
        """Permissions of the shadow entry: a mask of READ, WRITE, EXEC (EL1) and EXEC_EL0."""
        return self.c.perm

    @property
    def context(self):
        """``Context.index`` of the context that served it."""
        return self.c.context

    @property
    def ipa(self):
        """The address of the access, in L2's physical space."""
        return self.c.ipa

    @property
    def cipa(self):
        """Canonical IPA of ``ipa``, in L1's physical space; 0 where it is not known."""
        return self.c.cipa

    @property
    def pa(self):
        """Host physical address of ``ipa`` on HIT and MAPPED, else 0."""
        return self.c.pa

    @property
    def size(self):
        """Bytes of the shadow entry; 0 without one."""
        return self.c.size

    @property
    def hpfar(self):
        """HPFAR_EL2 of the access: IPA[55:12] in bits 47:4; always filled."""
        return self.c.hpfar

    def __repr__(self):
        kind = self.kind
        if kind in (Kind.HIT, Kind.MAPPED):
            return f"Fault({kind.name} {self.ipa:#x} → {self.pa:#x}, {size_text(self.size)}, {perm_text(self.perm)})"
        if kind == Kind.L1_FAULT:
            return f"Fault({kind.name} {self.ipa:#x}, fsc={self.fsc:#04x}, level {self.level})"
        return f"Fault({kind.name} {self.ipa:#x}, cipa={self.cipa:#x})"


cdef class VCPU:
    """One virtual CPU of L1: ``vm.vcpus[i]``; ``index`` is i. One thread at a time; a second one gets a
    ``RuntimeError``.

    Registers are 64-bit numbers, addresses bytes; anything else is a ``ValueError`` or ``TypeError`` that names the
    argument. ``fault``, ``translate`` and their batches raise ``RuntimeError`` while no context is loaded.
    """

    cdef _Engine engine
    cdef vcpu_t *c
    cdef readonly uint32_t index

    cdef int enter(self) except -1:
        cdef uint32_t idle = 0
        if self.c == NULL:
            raise RuntimeError("a VCPU comes from NestedVM.vcpus")
        if not cas32(&self.c.busy, &idle, 1):
            raise RuntimeError(f"vCPU {self.index} is in use by another thread")
        return 0

    cdef int enter_loaded(self) except -1:
        self.enter()
        if self.c.context == NO_CONTEXT:
            self.leave()
            raise RuntimeError(f"vCPU {self.index} has no context: load() it first")
        if self.engine.mem.refresh(&self.c.view):
            forget_guest_path(self.c)
        return 0

    cdef void leave(self) noexcept:
        store32(&self.c.busy, 0)

    def load(self, vttbr, vtcr, hcr=HCR_VM, bint big_endian=False, s2pir=0):
        """L1 entered L2 with these registers: take the context that they name, or recycle one -> ``Context``.

        Never raises for what L1 wrote: an illegal configuration is a context whose every fault is an L1_FAULT.
        ``hcr``: HCR_EL2, of which VM, DC, CD, FWB and PTW count; ``big_endian``: SCTLR_EL2.EE; ``s2pir``: S2PIR_EL2.
        Source: get_s2_mmu_nested of Linux.
        """
        cdef s2_config_t config
        cdef context_row_t row
        cdef uint64_t vttbr_ = as_u64(vttbr, "vttbr"), vtcr_ = as_u64(vtcr, "vtcr"), hcr_ = as_u64(hcr, "hcr")
        decode_config(&self.engine.vm.features, vttbr_, vtcr_, hcr_, big_endian, as_u64(s2pir, "s2pir"), &config)
        self.enter()
        try:
            with nogil:
                vcpu_load(&self.engine.vm, self.c, &config, vttbr_, vtcr_, hcr_)
                list_context(&self.engine.vm, self.c.context, &row)
            return self.engine.context_of(&row)
        finally:
            self.leave()

    def put(self):
        """L1 left L2: let go of the context. Nothing happens if none is loaded."""
        self.enter()
        try:
            with nogil:
                vcpu_put(&self.engine.vm, self.c)
        finally:
            self.leave()

    def fault(self, ipa, access=Access.READ):
        """Serve one stage-2 fault of L2 at ``ipa`` -> ``Fault``; ``MemoryError`` when the allocator refuses.

        ``access`` is a mask of ``Access``: what the access does. An exception from a populate callable propagates.
        Source: kvm_handle_guest_abort of Linux; the walk of L1's tables is that of ``walk``.
        """
        cdef Fault result = Fault.__new__(Fault)
        cdef uint64_t address = as_u64(ipa, "ipa")
        cdef uint8_t mask = as_access(access)
        self.enter_loaded()
        try:
            self.run(&address, &mask, 0, &result.c, 1)
        finally:
            self.leave()
        if result.c.kind == KIND_NO_MEMORY:
            raise MemoryError(f"no room for a shadow of {ipa:#x}")
        return result

    def fault_many(self, ipas, access=Access.READ, out=None):
        """Serve many faults in order: uint64[n] -> ``FAULT_DTYPE[n]``; the GIL is released.

        ``access`` is one mask or a uint8[n]; ``out`` may be a C-contiguous ``FAULT_DTYPE[n]`` to write into. Where the
        allocator refuses, the element is NO_MEMORY. An exception from a populate callable stops at that element and
        propagates; the ones before it are done. So do signals (Ctrl-C), which a batch looks for about every 10 ms: what
        was done is in ``out``.
        """
        cdef batch_t batch
        cdef void *rows = NULL
        cdef int64_t at = 0, n
        cdef pace_t pace
        ipas = take_addresses(ipas, &batch)
        access = take_masks(access, &batch)
        out = take_output(out, FAULT_DTYPE, &batch, &rows)
        if batch.n == 0:
            return out
        self.enter_loaded()
        try:
            while at < batch.n:
                n = next_piece(&pace, at, batch.n)
                self.run(batch.ipas + at, batch.masks + at * batch.stride, batch.stride, <fault_t *>rows + at, n)
                at += n
        finally:
            self.leave()
        return out

    cdef int run(self, const uint64_t *ipas, const uint8_t *masks, int64_t stride, fault_t *out, int64_t n) except -1:
        """Serve faults, asking the embedder where it must be asked."""
        cdef int64_t at = 0, asked = -1
        cdef int tries = 0
        cdef step_t step
        while True:
            with nogil:
                step = fault_run(&self.engine.vm, self.c, ipas, masks, stride, out, n, &at)
            if step == STEP_DONE:
                return 0
            tries = tries + 1 if asked == at else 1
            asked = at
            if tries > POPULATE_TRIES:
                out[at].kind = KIND_RETRY
            elif self.ask(self.c.asked_cipa, masks[at * stride]):
                continue
            with nogil:                     # whoever has the lock may be waiting for the GIL
                count_answer(&self.engine.vm, self.c, out[at].kind)     # of the user's array, which others may write
            at += 1

    cdef bint ask(self, uint64_t cipa, uint8_t access) except -1:
        """Call populate for ``cipa`` and map what it says; False for None."""
        cdef uint64_t seq = self.engine.vm.host_seq
        policy = self.engine.get_populate()
        if not callable(policy):
            return True                     # it was replaced meanwhile: start over
        mapping = policy(cipa, Access(access))
        if mapping is None:
            return False
        if not isinstance(mapping, HostMapping):
            raise TypeError(f"populate must return a HostMapping or None, got {type(mapping).__name__}")
        self.install(cipa, mapping, seq)
        return True

    cdef int install(self, uint64_t cipa, object mapping, uint64_t seq) except -1:
        cdef host_attrs_t attrs
        cdef uint64_t size = mapping.size, pa = mapping.pa
        cdef vm_t *vm = &self.engine.vm
        cdef bint stored
        self.engine.level_of_block(size)
        self.engine.fill_attrs(mapping.perm, mapping.memattr, &attrs)
        if pa >> vm.features.pa_bits or (pa + size - 1) >> vm.features.pa_bits:
            raise ValueError(f"populate returned pa {pa:#x} beyond pa_bits={vm.features.pa_bits}")
        with nogil:
            self.engine.mem.refresh(&self.c.view)
            stored = install_populated(vm, cipa, pa, size, &attrs, seq)
        if not stored:
            raise MemoryError(f"no room for the host table of {cipa:#x}")
        return 0

    def translate(self, ipa, access=Access.READ):
        """What the hardware would find in the shadow -> ``Fault`` of kind HIT or MISS.

        An entry with AF clear, or without the permission, is a MISS. Changes nothing, but for this: a leaf that stands
        behind more than 4,096 others of its page, where memory for markers is refused, goes and is a MISS.
        """
        cdef Fault result = Fault.__new__(Fault)
        cdef uint64_t address = as_u64(ipa, "ipa")
        cdef uint8_t mask = as_access(access)
        self.enter_loaded()
        with nogil:
            translate_run(&self.engine.vm, self.c, &address, &mask, 0, &result.c, 1)
        self.leave()
        return result

    def translate_many(self, ipas, access=Access.READ, out=None):
        """``translate`` for uint64[n] -> ``FAULT_DTYPE[n]``; ``access`` and ``out`` as in ``fault_many``.
        The GIL is released."""
        cdef batch_t batch
        cdef void *rows = NULL
        cdef int64_t at = 0, n
        cdef pace_t pace
        ipas = take_addresses(ipas, &batch)
        access = take_masks(access, &batch)
        out = take_output(out, FAULT_DTYPE, &batch, &rows)
        if batch.n == 0:
            return out
        self.enter_loaded()
        try:
            while at < batch.n:
                n = next_piece(&pace, at, batch.n)
                with nogil:
                    translate_run(&self.engine.vm, self.c, batch.ipas + at, batch.masks + at * batch.stride,
                                  batch.stride, <fault_t *>rows + at, n)
                at += n
        finally:
            self.leave()
        return out

    def tlbi(self, op, xt=0, vttbr=None, vtcr=None, hcr=None):
        """L1 issued a TLBI -> ``TlbiResult(name, removed, required, contexts)``.

        ``op`` is a name, (op1, CRn, CRm, op2) or a 32-bit SYS word. The registers are those that were in force when L1
        issued it; None stands for what this vCPU loaded last. No context is acquired. Stage-1 operations remove no
        leaf; what they ask of the hardware is owed (``take_tlbis``). ``UndefinedInstruction`` for what does not exist
        or what the features lack. Source: Arm ARM, TLBI; under ``tlbi="kvm72"`` handle_ipas2e1is, handle_ripas2e1is,
        handle_vmalls12e1is, handle_alle1is and compute_tlb_inval_range of Linux 7.2.
        """
        cdef vm_t *vm = &self.engine.vm
        cdef tlbi_op_t found
        cdef tlbi_regs_t regs
        cdef tlbi_result_t result
        cdef uint64_t operand = as_u64(xt, "xt")
        regs.vttbr = self.c.vttbr if vttbr is None else as_u64(vttbr, "vttbr")
        regs.vtcr = self.c.vtcr if vtcr is None else as_u64(vtcr, "vtcr")
        regs.hcr = self.c.hcr if hcr is None else as_u64(hcr, "hcr")
        encoding = tlbi_encoding(op, &vm.features)
        tlbi_lookup(encoding[0], encoding[1], encoding[2], encoding[3], &vm.features, &found)
        self.enter()
        with nogil:
            apply_tlbi(vm, &found, operand, &regs, &result)
        self.leave()
        return TlbiResult(operation_name(*encoding), result.removed, result.required, result.contexts)

    def __repr__(self):
        idle = self.c == NULL or self.c.context == NO_CONTEXT
        return f"VCPU({self.index}, {'no context' if idle else f'context {self.c.context}'})"


cdef class NestedVM:
    """A VM whose guest is a hypervisor: shadow stage-2 contexts over L1's memory, and the host's stage 2 under it.

    ``mem`` stays in use as long as the VM lives. ``vcpus`` is how many vCPUs L1 has; as an attribute, the ``VCPU``
    tuple. ``contexts`` is the size of the pool (None: 2 per vCPU; smaller than ``vcpus``: ``ValueError``). ``features``
    is what L1 and the host have (None: ``Features()``). ``host`` is the ``HostStage2``. ``teardown``: what a host
    change does to the shadows: ``"reverse-map"`` drops exactly the leaves that map the range, ``"blow-away"`` every
    leaf of every context as Linux 7.2, ``"blow-away-lean"`` whole tables. ``"interval-map"`` is what was proposed for
    Linux in 2026: each context has an ordered map from canonical ranges to the nested range that maps them. Where two
    of its leaves overlap there (an alias, a page of a block mapped elsewhere) it no longer knows, and a host change
    drops that whole context. The proposal is for removals only: taking permissions (``protect``, dirty logging) narrows
    every leaf of every context, and ``age`` looks at the host's leaves, both as under blow-away. ``tlbi``: ``"exact"``
    removes what the architecture asks for, ``"kvm72"`` what Linux 7.2 removes. ``attributes``: ``"architectural"`` or
    ``"kvm72"`` (L1's memory attributes ignored). ``max_table_bytes`` bounds tables, links and heads: cold contexts and
    leaf tables are evicted. ``table_base`` is the simulated physical address of the tables. ``track_tlbis`` keeps the
    queue of owed TLB maintenance. What an argument cannot be is a ``ValueError`` or ``TypeError`` that names it, and
    ``MemoryError`` that the address space for the tables is not there.

    Thread safety: one thread per vCPU; batches and host changes release the GIL and run side by side.
    """

    cdef _Engine engine
    cdef readonly HostStage2 host
    cdef readonly tuple vcpus
    cdef readonly GuestMemory mem
    cdef readonly object features
    cdef readonly str teardown
    cdef object __weakref__

    def __init__(self, GuestMemory mem not None, vcpus=1, contexts=None, features=None, *, teardown="reverse-map",
                 tlbi="exact", attributes="architectural", max_table_bytes=None, table_base=None, track_tlbis=True):
        cdef uint32_t i
        cdef VCPU vcpu
        if features is None:
            features = Features()
        check_features(features)
        vcpus, contexts = check_counts(vcpus, contexts, features)
        if teardown not in TEARDOWNS:
            raise ValueError(f"teardown must be one of {', '.join(map(repr, TEARDOWNS))}, got {teardown!r}")
        if tlbi not in ("exact", "kvm72"):
            raise ValueError(f"tlbi must be 'exact' or 'kvm72', got {tlbi!r}")
        if attributes not in ("architectural", "kvm72"):
            raise ValueError(f"attributes must be 'architectural' or 'kvm72', got {attributes!r}")
        table_base = check_table_base(table_base, features)
        budget = table_budget(max_table_bytes, vcpus, contexts, features)
        self.engine = _Engine(mem, vcpus, contexts, features, TEARDOWN_CODES[teardown], attributes == "kvm72",
                              tlbi == "kvm72", budget, table_base, track_tlbis)
        self.mem = mem
        self.features = features
        self.teardown = teardown
        self.host = HostStage2.__new__(HostStage2)
        self.host.engine = self.engine
        all_vcpus = []
        for i in range(vcpus):
            vcpu = VCPU.__new__(VCPU)
            vcpu.engine = self.engine
            vcpu.c = &self.engine.vm.vcpus[i]
            vcpu.index = i
            all_vcpus.append(vcpu)
        self.vcpus = tuple(all_vcpus)

    def unmap(self, start, end, partial=None):
        """The host takes [start, end) of cIPA away (an MMU notifier) -> ``Invalidation(leaves, ticket)``.

        A host block partly covered is split (``"split"``) or dropped whole (``"drop"``, as Linux does); None is drop
        under blow-away, else split. ``ValueError`` for bounds that are not host-page aligned. Source:
        kvm_unmap_gfn_range of Linux, and kvm_nested_s2_unmap for blow-away.
        """
        return self.engine.unmap(as_u64(start, "start"), as_u64(end, "end"), partial)

    def log_dirty(self, start, end, on=True):
        """Switch dirty logging of the RAM in [start, end) -> ``Invalidation``.

        While it is on, leaves get W only on a write fault, at host-page size. Off forgets what was dirty.
        ``ValueError`` for bounds that are not host-page aligned. Source: kvm_arch_mmu_enable_log_dirty_pt_masked of
        Linux, and kvm_nested_s2_wp for blow-away.
        """
        return self.engine.log_dirty(as_u64(start, "start"), as_u64(end, "end"), on)

    def dirty_log(self, start, end):
        """Report what was written, clear and protect again, in one step -> bitmap, uint8[ceil(pages / 8)].

        Bit i, in little order (``np.unpackbits(…, bitorder="little")``), is host page i of [start, end). Pages that are
        not logged are 0. ``ValueError`` for bounds that are not host-page aligned.
        """
        return self.engine.dirty_log(as_u64(start, "start"), as_u64(end, "end"))

    def age(self, start, end):
        """OR of the access flags of host and shadow leaves, which are cleared -> bitmap as in ``dirty_log``.

        A young block marks all its pages in [start, end). Owes no TLBI. Under blow-away and interval-map the shadows
        are not looked at. ``ValueError`` for bounds that are not host-page aligned. Source: kvm_age_gfn of Linux.
        """
        return self.engine.age(as_u64(start, "start"), as_u64(end, "end"), True)

    def test_young(self, start, end):
        """As ``age``, but nothing is cleared. Source: kvm_test_age_gfn of Linux."""
        return self.engine.age(as_u64(start, "start"), as_u64(end, "end"), False)

    @property
    def contexts(self):
        """The contexts that have an owner, as a tuple of ``Context``."""
        return self.engine.contexts()

    def shadow(self, index):
        """The live entries of context ``index``, sorted by IPA: ``SHADOW_DTYPE[n]``; ``ValueError`` for no context."""
        return self.engine.shadow(index)

    def reverse(self, cipa):
        """Every shadow leaf that maps the host page at ``cipa``: ``REVERSE_DTYPE[n]``, sorted by context and IPA.

        Under policies without a reverse map it is found by a scan of all shadows.
        """
        return self.engine.reverse(as_u64(cipa, "cipa"))

    def intervals(self, index):
        """A context's interval map, sorted: ``INTERVAL_DTYPE`` array.

        Each row is a canonical range [start, end) and the ``ipa`` that maps it; 0, and ``unknown`` 1, where that is not
        known any more. ``ValueError`` under other policies.
        """
        return self.engine.intervals(index)

    def tables(self, index=None):
        """(addresses uint64[N], pages uint8[N, granule]) of a shadow, or of the canonical table for None.

        Another walker can walk them under ``Context.host_vttbr`` and ``host_vtcr``; the pages are a copy.
        ``ValueError`` for an index without a context.
        """
        return self.engine.tables(index)

    def tlbi_many(self, ops):
        """Apply TLBIs in order: ``TLBI_OP_DTYPE[n]`` -> uint64[n] of leaves removed.

        ``flags`` bit 0 says that the row's three registers count, else those that the vCPU loaded last. Raises
        ``UndefinedInstruction`` or ``ValueError``, naming the row, before anything is applied. The GIL is released;
        Ctrl-C is answered between rows, and those before it were applied.
        """
        return self.engine.tlbi_many(ops)

    def take_tlbis(self, limit=None):
        """Take the TLB maintenance that L0 owes its hardware, oldest first: ``HW_TLBI_DTYPE`` array.

        ``op``: VMALLS12=0, IPA=1, VA=2, ASID=3, VMALL=4, ALL=5, VAA=6 (by VA, any ASID). A table page that an operation
        emptied is reused at once: apply its rows before the next fault is served. Rows are for the shadows; where the
        hardware walks the canonical table too (host VMID 1), its own maintenance is for whoever changes it.
        """
        return self.engine.take_tlbis(limit)

    @property
    def stats(self):
        """Counters as they are now: a frozen ``Stats``."""
        return self.engine.stats()

    def check(self):
        """Verify every invariant by brute force; ``InvariantError`` names the first that is broken, and where.

        Takes the exclusive side for as long as it reads every table: for tests, not for production.
        """
        self.engine.check()

    def _poke(self, index, ipa, flip):
        self.engine._poke(index, ipa, flip)

    def _evict_looked(self):
        """Leaf tables that evictions looked at: for tests of what they cost."""
        return self.engine.vm.evict_looked

    def _state(self):
        """The engine's ``vm_t``, as a capsule valid as long as this object: for ``s2shadow._floor``, which measures."""
        return PyCapsule_New(&self.engine.vm, "s2shadow.vm_t", NULL)

    @property
    def _c_handle(self):
        """Capsule of the C API's ``s2s_vm_t *`` for this VM: what it holds is good as long as this object lives."""
        return PyCapsule_New(&self.engine.handle, S2SHADOW_VM_CAPSULE, NULL)

    def _poke_interval(self, index, ipa, cipa=0, size=0):
        self.engine._poke_interval(index, ipa, cipa, size)

    def __repr__(self):
        return f"NestedVM({len(self.vcpus)} vCPUs, {len(self.contexts)} contexts, teardown={self.teardown!r})"


def check_table_pages(addresses, page):
    """Of a captured table, sorted: aligned, each once, of the page's size and below 2^52."""
    misplaced = addresses[(addresses % page != 0) | (addresses >= 1 << 52)]
    twice = addresses[1:][np.diff(addresses) == 0]
    if len(misplaced):
        raise ValueError(f"addresses: {int(misplaced[0]):#x} is not that of a page of {page} bytes below 2^52")
    if len(twice):
        raise ValueError(f"addresses: {int(twice[0]):#x} is there twice")


def check_features(features):
    if not isinstance(features, Features):
        raise TypeError(f"features must be a Features, got {type(features).__name__}")
    wide = features.lpa if features.host_granule == 65536 else features.lpa2
    if features.pa_bits > 48 and not wide:
        raise ValueError(f"pa_bits={features.pa_bits} with host_granule={features.host_granule} needs "
                         f"{'lpa' if features.host_granule == 65536 else 'lpa2'}=True: the host's tables could not "
                         "hold such addresses")


def check_counts(vcpus, contexts, features):
    if vcpus < 1:
        raise ValueError(f"vcpus must be at least 1, got {vcpus}")
    if contexts is None:
        contexts = 2 * vcpus
    if contexts < vcpus:
        raise ValueError(f"contexts ({contexts}) must be at least vcpus ({vcpus})")
    most = min((1 << features.vmid_bits) - FIRST_CONTEXT_VMID, CANONICAL)
    if contexts > most:
        raise ValueError(f"contexts must be at most {most} with {features.vmid_bits}-bit VMIDs, got {contexts}")
    return vcpus, contexts


def check_table_base(table_base, features):
    limit = 1 << features.pa_bits
    alignment = ROOT_PAGES * features.host_granule
    if table_base is None:
        return default_table_base(features.pa_bits)
    if table_base < 0 or table_base % alignment:
        raise ValueError(f"table_base must be a multiple of {alignment:#x}, got {table_base:#x}")
    if table_base > limit - (1 << 30):
        raise ValueError(f"table_base {table_base:#x} leaves less than 1 GiB below pa_bits={features.pa_bits}")
    return table_base


def table_budget(max_table_bytes, vcpus, contexts, features):
    """The bound that remains once every root is paid for; 0 for none."""
    if max_table_bytes is None:
        return 0
    least = least_bytes(features.host_granule, vcpus, contexts)
    if max_table_bytes < least:
        raise ValueError(f"max_table_bytes must be at least {least} for {contexts} contexts and {vcpus} vCPUs, "
                         f"got {max_table_bytes}")
    return max_table_bytes - root_bytes(features.host_granule, contexts)
