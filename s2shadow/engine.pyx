# cython: nonecheck=True
"""``NestedVM``: the thin layer that checks arguments once and calls the engine without the GIL."""

import dataclasses
from collections import namedtuple

import numpy as np

cimport cython
from cpython.exc cimport PyErr_CheckSignals
from cpython.pycapsule cimport PyCapsule_New
from libc.stdint cimport int8_t, int64_t, uint8_t, uint16_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free
from libc.string cimport memcpy, memset

from s2shadow.arch cimport (
    DESC_AF, DESC_MEMATTR_SHIFT, DESC_VALID, FINAL_LEVEL, LEVEL_STAGE2_OFF, SH_ISH, decode_oa, decode_sh,
    largest_leaf_level, leaf_level_within, level_span, oa_format_t, s2ap_xn_to_perm,
)
from s2shadow.arguments cimport as_u64
from s2shadow.atomics cimport cas32, load64, store32
from s2shadow.check cimport check_vm, finding_t
from s2shadow.combine cimport host_oa_format
from s2shadow.config cimport decode_config, fill_features, s2_config_t
from s2shadow.context cimport context_acquire, context_entries, context_release, context_table_bytes
from s2shadow.dirty cimport dirty_destroy, dirty_reserve
from s2shadow.fault cimport STEP_DONE, fault_run, step_t, translate_run
from s2shadow.host cimport (
    change_t, changed_since, host_age, host_attrs_t, host_dirty_log, host_log, host_map, host_protect, host_unmap,
    populate_block,
)
from s2shadow.intervals cimport (
    UNKNOWN_IPA, interval_t, intervals_find, intervals_free, intervals_new, intervals_record, intervals_remove,
)
from s2shadow.leaf cimport find_cipa
from s2shadow.maintenance cimport apply_tlbi, tlbi_regs_t, tlbi_result_t
from s2shadow.memory cimport GuestMemory, mem_view_t
from s2shadow.owed cimport FIRST_CONTEXT_VMID, hw_tlbi_t, owed_begin, owed_destroy, owed_end, owed_init, owed_take
from s2shadow.pace cimport pace_next, pace_start, pace_t
from s2shadow.rmap cimport is_marker, link_next, node_t, rmap_destroy, rmap_find, rmap_init
from s2shadow.table cimport (
    CANONICAL, ROOT_PAGES, arena_destroy, arena_init, child_page, forget_path, is_table, next_leaf, page_of, page_t,
    reserve_root, slot_ipa, table_find, table_init, table_t,
)
from s2shadow.tlbi cimport TLBI_OK, tlbi_encoding, tlbi_lookup, tlbi_lookup_word, tlbi_op_t
from s2shadow.vm cimport (
    KIND_NO_MEMORY, KIND_RETRY, NO_CONTEXT, POPULATE_CALLABLE, POPULATE_LINEAR, POPULATE_NONE, TEARDOWN_BLOW_AWAY,
    TEARDOWN_BLOW_AWAY_LEAN, TEARDOWN_INTERVAL_MAP, TEARDOWN_REVERSE_MAP, context_t, fault_t, forget_guest_path,
    forget_ways, is_active, lock_exclusive, lock_shared, overlaps_active, range_t, read_tag, rwlock_destroy,
    rwlock_init, unlock, vcpu_t, vm_t,
)

from s2shadow.check import RULES
from s2shadow.config import Stage2Config
from s2shadow.constants import HCR_FWB, HCR_VM, TEARDOWNS, Access, Kind, perm_text, size_text
from s2shadow.features import Features
from s2shadow.mapping import HostMapping, Linear, memattr_code, perm_mask
from s2shadow.tlbi import UndefinedInstruction, operation_name
from s2shadow.walker import as_access, as_addresses, as_masks, as_output, leaves as table_leaves

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

ctypedef struct shadow_t:
    uint64_t ipa
    uint64_t cipa
    uint64_t pa
    uint64_t size
    uint64_t desc
    uint8_t perm
    uint8_t memattr
    uint8_t sh
    uint8_t young
    int8_t level
    int8_t guest_level

assert FAULT_DTYPE.itemsize == sizeof(fault_t) and HW_TLBI_DTYPE.itemsize == sizeof(hw_tlbi_t)
assert SHADOW_DTYPE.itemsize == sizeof(shadow_t) and TLBI_OP_DTYPE.itemsize == sizeof(tlbi_request_t)

cdef enum:
    POPULATE_TRIES = 16                 # a populate that undoes itself ends in RETRY

TLBI_CLASSES = ("IPA", "RANGE", "VMALLS12", "ALL", "STAGE1")     # in the order of tlbi_class_t
ARENA_BYTES = 1 << 34                 # 2^31 slots of 8 bytes
TEARDOWN_CODES = dict(zip(TEARDOWNS, (TEARDOWN_REVERSE_MAP, TEARDOWN_INTERVAL_MAP, TEARDOWN_BLOW_AWAY,
                                      TEARDOWN_BLOW_AWAY_LEAN), strict=True))


class InvariantError(AssertionError):
    """``NestedVM.check`` found a broken invariant."""


cdef class Invalidation:
    """Shadow leaves that a host change dropped, and its number: the host page may be reused once every row of
    ``take_tlbis()`` with ``seq`` up to ``ticket`` has been applied. Unpacks into the two."""

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


cdef Invalidation invalidation(const change_t *change):
    """Made without a constructor call: a notifier is timed with what it returns."""
    cdef Invalidation result = Invalidation.__new__(Invalidation)
    result.leaves = change.dropped
    result.ticket = change.ticket
    return result


class TlbiResult(namedtuple("TlbiResult", "name removed required contexts")):
    """What one TLBI did: leaves removed, leaves that had to go, contexts that it named."""

    __slots__ = ()


@dataclasses.dataclass(frozen=True, slots=True)
class Context:
    """One shadow context as it is now; ``vmid``, ``vttbr`` and ``vtcr`` are L1's, the ``host_`` fields L0's."""

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
    """Of one class of TLBI: how many there were, contexts that they named, leaves removed, leaves that had to go."""

    __slots__ = ()


@dataclasses.dataclass(frozen=True, slots=True)
class Stats:
    """Counters of a ``NestedVM`` since it was made, and what it holds now (``live``, ``host_leaves``, ``*_bytes``).

    ``kernel_steps``: steps that Linux would have made through the input space of contexts that it empties (the engine
    makes none). ``unknown_unmaps``: contexts that a host change emptied since their interval map did not know better.
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
        """Heads, links and radix nodes, or nodes of the interval maps, for each live leaf; 0 where there is none."""
        return (self.link_bytes + self.rmap_bytes) / self.live if self.live else 0.0


@cython.no_gc_clear  # dealloc needs mem to unpin it, in a cycle too (an embedder that has the engine and populates it)
cdef class _Engine:
    """Owner of one ``vm_t``; what ``NestedVM``, its vCPUs and its host table share."""

    cdef vm_t vm
    cdef GuestMemory mem
    cdef mem_view_t view            # of check() and the host side, under the exclusive lock
    cdef readonly object features
    cdef object policy              # Linear, callable or None
    cdef bint pinned

    def __cinit__(self, GuestMemory mem not None, uint32_t vcpus, uint32_t contexts, features, teardown,
                  bint ignore_attributes, uint64_t max_bytes, uint64_t table_base, bint track):
        cdef uint32_t i
        cdef oa_format_t oa
        self.mem = mem
        self.features = features
        memset(&self.vm, 0, sizeof(vm_t))
        rwlock_init(&self.vm.lock)
        fill_features(features, &self.vm.features)
        self.vm.teardown = teardown
        self.vm.ignore_guest_attributes = ignore_attributes
        self.vm.context_count = contexts
        self.vm.vcpu_count = vcpus
        host_oa_format(&self.vm.features, &oa)
        if not arena_init(&self.vm.arena, self.vm.features.host_granule_bits, &oa, table_base,
                          <uint64_t>1 << self.vm.features.pa_bits, max_bytes):
            raise MemoryError("cannot reserve address space for the table arena")
        self.vm.arena.alone = vcpus == 1
        self.vm.arena.keeps_links = self.vm.teardown == TEARDOWN_REVERSE_MAP
        self.vm.contexts = <context_t *>calloc(contexts, sizeof(context_t))
        self.vm.vcpus = <vcpu_t *>calloc(vcpus, sizeof(vcpu_t))
        if (self.vm.contexts == NULL or self.vm.vcpus == NULL
                or (self.vm.teardown == TEARDOWN_REVERSE_MAP
                    and not rmap_init(&self.vm.rmap, &self.vm.arena, self.vm.features.pa_bits))
                or not owed_init(&self.vm.owed, contexts, track)):
            raise MemoryError("cannot set up the engine")
        table_init(&self.vm.arena, &self.vm.canonical, reserve_root(&self.vm.arena), CANONICAL,
                   self.vm.features.pa_bits)
        for i in range(contexts):
            self.vm.contexts[i].shadow.root = reserve_root(&self.vm.arena)
            if not self.vm.contexts[i].shadow.root:
                raise MemoryError(f"no room for the roots of {contexts} contexts")
            if self.vm.teardown == TEARDOWN_INTERVAL_MAP:
                self.vm.contexts[i].intervals = intervals_new(&self.vm.arena)
                if self.vm.contexts[i].intervals == NULL:
                    raise MemoryError("cannot set up the interval maps")
        for i in range(vcpus):
            self.vm.vcpus[i].context = NO_CONTEXT
            forget_path(&self.vm.vcpus[i].canonical_path)
        self.vm.dirty.input_bits = self.vm.features.pa_bits
        self.vm.dirty.page_bits = self.vm.features.host_granule_bits
        mem.pin(&self.view)
        self.pinned = True

    def __dealloc__(self):
        cdef uint32_t i
        if self.pinned:
            self.mem.unpin()
        if self.vm.contexts != NULL:
            for i in range(self.vm.context_count):
                intervals_free(self.vm.contexts[i].intervals)
        dirty_destroy(&self.vm.dirty)
        owed_destroy(&self.vm.owed)
        rmap_destroy(&self.vm.rmap)
        arena_destroy(&self.vm.arena)
        free(self.vm.contexts)
        free(self.vm.vcpus)
        rwlock_destroy(&self.vm.lock)

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

    cdef object ram_within(self, uint64_t start, uint64_t end):
        """The parts of [start, end) that are RAM: range_t pairs as uint64[n, 2]."""
        page = self.page_size()
        parts = []
        done = 0
        for r in self.mem.regions:          # rounded out to host pages, each page once
            low = max(start, r.start // page * page, done)
            high = min(end, -(-(r.start + r.size) // page) * page)
            if not r.device and low < high:
                parts.append((low, high))
                done = high
        return np.array(parts, dtype=np.uint64).reshape(-1, 2)

    def set_populate(self, policy):
        if isinstance(policy, str):
            if policy != "linear":
                raise ValueError(f"populate must be None, a Linear, a callable or 'linear', got {policy!r}")
            policy = Linear()
        if policy is None:
            self.vm.populate = POPULATE_NONE
        elif isinstance(policy, Linear):
            if policy.offset % self.page_size():
                raise ValueError(f"offset {policy.offset:#x} is not aligned to the host page ({self.page_size()})")
            self.vm.linear_level = self.level_of_block(policy.max_block)
            self.vm.linear_offset = policy.offset
            self.vm.linear_fresh = policy.fresh
            self.vm.populate = POPULATE_LINEAR
        elif callable(policy):
            self.vm.populate = POPULATE_CALLABLE
        else:
            raise TypeError(f"populate must be None, a Linear, a callable or 'linear', got {type(policy).__name__}")
        self.policy = policy

    def get_populate(self):
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
        return invalidation(&change)

    def load(self, addresses, pages, uint64_t vttbr, uint64_t vtcr):
        cdef host_attrs_t attrs
        cdef change_t change
        cdef uint64_t dropped = 0, cipa, pa, size
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
        change.ticket = self.vm.owed.seq
        for row in leaf_rows:
            cipa, pa, size = row["ipa"], row["pa"], row["size"]
            attrs.perm = row["perm"]
            attrs.memattr = row["memattr"]
            attrs.sh = row["sh"]
            attrs.young = int(row["desc"]) >> 10 & 1
            with nogil:
                mapped = host_map(&self.vm, cipa, pa, size, &attrs, size, &change)
            if not mapped:
                raise MemoryError(f"no room for the tables of the captured leaf at {cipa:#x}")
            dropped += change.dropped
        return Invalidation(dropped, change.ticket)

    def captured_leaves(self, addresses, pages, vttbr, vtcr):
        """The leaves of a captured host table, read through a memory that holds only its pages."""
        granule = self.page_size()
        addresses = np.ascontiguousarray(addresses, dtype=np.uint64)
        pages = np.ascontiguousarray(pages, dtype=np.uint8)
        if pages.ndim != 2 or addresses.ndim != 1 or len(addresses) != len(pages):
            raise ValueError("addresses must be uint64[N] and pages uint8[N, page], "
                             f"got {addresses.shape} and {pages.shape}")
        config = Stage2Config(vttbr, vtcr, self.features, hcr=HCR_VM | (HCR_FWB if self.features.fwb else 0))
        if config.error:
            raise ValueError(f"vtcr {vtcr:#x} and vttbr {vttbr:#x} make no host table: {config.error}")
        if config.granule != granule:
            raise ValueError(f"vtcr {vtcr:#x} has a granule of {config.granule}, the host's is {granule}")
        mem = GuestMemory()
        for address, page in zip(addresses.tolist(), pages):
            mem.add(address, buffer=page)
        # each page in at most sixteen places; tables that loop would take seconds to the default limit
        return table_leaves(mem, config, min(1 << 24, 16 * len(pages) * pages.shape[1] // 8))

    def protect(self, uint64_t start, uint64_t end, perm):
        cdef host_attrs_t attrs
        cdef change_t change
        self.check_range(start, end)
        self.fill_attrs(perm, 0, &attrs)
        with nogil:
            host_protect(&self.vm, start, end, attrs.perm, &change)
        return invalidation(&change)

    cdef Invalidation unmap(self, uint64_t start, uint64_t end, object partial):
        cdef change_t change
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
        return invalidation(&change)

    def log_dirty(self, uint64_t start, uint64_t end, bint on):
        cdef change_t change
        cdef uint64_t[:, ::1] ranges
        cdef uint32_t count
        cdef bint reserved = True
        self.check_range(start, end)
        ranges = self.ram_within(start, end)
        count = ranges.shape[0]
        if not count:
            return Invalidation(0, self.vm.owed.seq)
        with nogil:
            lock_exclusive(&self.vm.lock)
            reserved = dirty_reserve(&self.vm.dirty)
            unlock(&self.vm.lock)
        if not reserved:
            raise MemoryError("cannot reserve address space for the dirty log")
        with nogil:
            host_log(&self.vm, <const range_t *>&ranges[0, 0], count, on, &change)
        return invalidation(&change)

    cdef object new_bitmap(self, uint64_t start, uint64_t end):
        return np.zeros(((end - start >> self.vm.arena.granule_bits) + 7) // 8, dtype=np.uint8)

    def dirty_log(self, uint64_t start, uint64_t end):
        cdef uint64_t[:, ::1] ranges
        cdef uint8_t[::1] bits
        cdef uint32_t count
        self.check_range(start, end)
        bitmap = self.new_bitmap(start, end)
        ranges = self.ram_within(start, end)
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

    def host_leaves(self):
        cdef uint64_t at = 0, end = <uint64_t>1 << self.vm.features.pa_bits, desc, span
        cdef int level = 0
        cdef uint32_t slot
        rows = []
        with nogil:
            lock_shared(&self.vm.lock)
        try:
            while True:
                slot = next_leaf(&self.vm.arena, &self.vm.canonical, &at, end, &level)
                if not slot:
                    break
                desc = load64(self.vm.arena.words + slot)
                span = level_span(self.vm.arena.granule_bits, level)
                rows.append((at, decode_oa(&self.vm.arena.oa, desc) & ~(span - 1), span, s2ap_xn_to_perm(desc, True),
                             desc >> DESC_MEMATTR_SHIFT & 0xF))
                at += span
        finally:
            unlock(&self.vm.lock)
        return np.array(rows, dtype=HOST_LEAF_DTYPE)

    cdef object context_row(self, uint32_t index):
        """A ``Context``; some side of the lock is held."""
        cdef context_t *c = &self.vm.contexts[index]
        host_vmid = index + FIRST_CONTEXT_VMID
        return Context(index, c.config.vmid, c.vttbr, c.vtcr, bool(c.config.enabled), host_vmid,
                       self.vttbr_of(&c.shadow, host_vmid), self.vtcr_of(&c.shadow),
                       HCR_VM | (HCR_FWB if self.vm.features.fwb else 0),
                       context_entries(&self.vm, c), context_table_bytes(&self.vm, c), c.refs)

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
        cdef uint32_t i
        with nogil:
            lock_shared(&self.vm.lock)
        try:
            return tuple([self.context_row(i) for i in range(self.vm.context_count) if self.vm.contexts[i].valid])
        finally:
            unlock(&self.vm.lock)

    cdef context_t *context_at(self, object index) except NULL:
        cdef int64_t i = index
        if not 0 <= i < self.vm.context_count or not self.vm.contexts[i].generation:
            raise ValueError(f"no context with index {index}")
        return &self.vm.contexts[i]

    def shadow(self, index):
        cdef context_t *context
        cdef uint64_t n = 0, at = 0, end
        cdef uint8_t[::1] raw
        cdef shadow_t *row
        cdef uint32_t slot
        cdef int level = 0
        with nogil:
            lock_exclusive(&self.vm.lock)
        try:
            context = self.context_at(index)
            out = np.zeros(context_entries(&self.vm, context), dtype=SHADOW_DTYPE)
            if not len(out):
                return out
            raw = out.view(np.uint8)
            end = <uint64_t>1 << context.shadow.ia_bits
            while n < <uint64_t>len(out):
                slot = next_leaf(&self.vm.arena, &context.shadow, &at, end, &level)
                if not slot:
                    break
                row = <shadow_t *>&raw[0] + n
                self.describe(slot, level, at, row)
                row.cipa = find_cipa(&self.vm, slot)
                at += row.size
                n += 1
            return out[:n]
        finally:
            unlock(&self.vm.lock)

    cdef void describe(self, uint32_t slot, int level, uint64_t ipa, shadow_t *row) noexcept nogil:
        cdef uint64_t desc = load64(self.vm.arena.words + slot)
        row.ipa = ipa
        row.size = level_span(self.vm.arena.granule_bits, level)
        row.pa = decode_oa(&self.vm.arena.oa, desc) & ~(row.size - 1)
        row.desc = desc
        row.perm = s2ap_xn_to_perm(desc, True)
        row.memattr = <uint8_t>(desc >> DESC_MEMATTR_SHIFT & 0xF)
        row.sh = decode_sh(&self.vm.arena.oa, desc, SH_ISH)
        row.young = (desc & DESC_AF) != 0
        row.level = <int8_t>level
        row.guest_level = <int8_t>(<int>read_tag(desc) + LEVEL_STAGE2_OFF)

    def reverse(self, uint64_t cipa):
        cdef int level
        cdef uint32_t head, slot
        rows = []
        if cipa >> self.vm.features.pa_bits:
            raise ValueError(f"cipa {cipa:#x} is beyond pa_bits={self.vm.features.pa_bits}")
        if self.vm.teardown != TEARDOWN_REVERSE_MAP:
            return self.reverse_by_scan(cipa)
        with nogil:
            lock_shared(&self.vm.lock)
        try:
            for level in range(self.vm.rmap.nodes[self.vm.rmap.root].level, FINAL_LEVEL + 1):
                head = rmap_find(&self.vm.rmap, cipa, level)
                slot = self.vm.rmap.heads[head] if head else 0
                while slot:
                    if not is_marker(&self.vm.rmap, slot):
                        rows.append((slot_ipa(&self.vm.arena, slot), level_span(self.vm.arena.granule_bits, level),
                                     self.vm.arena.pages[page_of(&self.vm.arena, slot)].context))
                    slot = link_next(&self.vm.arena, slot)[0]
        finally:
            unlock(&self.vm.lock)
        out = np.array(rows, dtype=REVERSE_DTYPE)
        return out[np.lexsort((out["ipa"], out["context"]))]

    def reverse_by_scan(self, cipa):
        found = []
        for context in self.contexts():
            rows = self.shadow(context.index)
            rows = rows[(rows["cipa"] <= cipa) & (cipa < rows["cipa"] + rows["size"])]
            found += [(row["ipa"], row["size"], context.index) for row in rows]
        return np.array(found, dtype=REVERSE_DTYPE)

    def intervals(self, index):
        cdef interval_t found
        cdef uint64_t at = 0
        if self.vm.teardown != TEARDOWN_INTERVAL_MAP:
            raise ValueError("there are interval maps only with teardown='interval-map'")
        rows = []
        with nogil:
            lock_exclusive(&self.vm.lock)
        try:
            while intervals_find(self.context_at(index).intervals, at, ~<uint64_t>0, &found):
                unknown = found.ipa == UNKNOWN_IPA
                rows.append((found.start, found.end, 0 if unknown else found.ipa, unknown))
                at = found.end
        finally:
            unlock(&self.vm.lock)
        return np.array(rows, dtype=INTERVAL_DTYPE)

    cdef int collect_pages(self, uint32_t page, list into) except -1:
        cdef const page_t *meta = &self.vm.arena.pages[page]
        cdef uint64_t i, desc
        into.append(page)
        if meta.level == FINAL_LEVEL or not meta.live:
            return 0
        for i in range(<uint64_t>1 << self.vm.arena.slot_bits):
            desc = load64(self.vm.arena.words + ((<uint64_t>page << self.vm.arena.slot_bits) + i))
            if is_table(desc, meta.level):
                self.collect_pages(child_page(&self.vm.arena, desc), into)
        return 0

    def tables(self, index):
        cdef table_t *table
        cdef uint32_t i
        cdef uint8_t[:, ::1] view
        cdef uint64_t granule = self.page_size()
        pages = []
        with nogil:
            lock_exclusive(&self.vm.lock)
        try:
            table = &self.vm.canonical if index is None else &self.context_at(index).shadow
            for i in range(<uint32_t>1 << table.concatenated_bits):
                self.collect_pages(table.root + i, pages)
            out = np.empty((len(pages), granule), dtype=np.uint8)
            view = out
            for i in range(len(pages)):
                memcpy(&view[i, 0], self.vm.arena.words + (<uint64_t>pages[i] << self.vm.arena.slot_bits), granule)
            return np.array(pages, dtype=np.uint64) * granule + self.vm.arena.table_base, out
        finally:
            unlock(&self.vm.lock)

    def take_tlbis(self, limit):
        cdef uint32_t taken, wanted
        cdef uint8_t[::1] raw
        wanted = self.vm.owed.capacity if limit is None else min(as_u64(limit, "limit"), self.vm.owed.capacity)
        out = np.zeros(max(wanted, 1), dtype=HW_TLBI_DTYPE)
        raw = out.view(np.uint8)
        with nogil:                         # rows of an operation show once its section is over
            lock_shared(&self.vm.lock)
            taken = owed_take(&self.vm.owed, <hw_tlbi_t *>&raw[0], wanted)
            unlock(&self.vm.lock)
        return out[:taken]

    def stats(self):
        cdef uint32_t i, k
        cdef uint64_t kinds[8]
        cdef uint64_t installed = 0, relaxed = 0, replaced = 0, host_leaves, removed, tables, links, heads
        memset(kinds, 0, sizeof(kinds))
        with nogil:
            lock_shared(&self.vm.lock)
            for i in range(self.vm.vcpu_count):
                for k in range(8):
                    kinds[k] += self.vm.vcpus[i].kinds[k]
                installed += self.vm.vcpus[i].installed
                relaxed += self.vm.vcpus[i].relaxed
                replaced += self.vm.vcpus[i].replaced
            host_leaves = self.vm.canonical_leaves
            removed = self.vm.removed
            tables, links, heads = self.vm.arena.table_bytes, self.vm.arena.link_bytes, self.vm.arena.rmap_bytes
            unlock(&self.vm.lock)
        return Stats(
            faults=kinds[0] + kinds[1] + kinds[2] + kinds[3] + kinds[4] + kinds[5] + kinds[6],
            hits=kinds[0], mapped=kinds[1], l1_faults=kinds[2], host_faults=kinds[3], mmio=kinds[4],
            retries=kinds[5], no_memory=kinds[6], installed=installed,
            removed=removed, relaxed=relaxed, replaced=replaced, narrowed=self.vm.narrowed,
            live=installed - removed, invalidations=self.vm.invalidations, kernel_steps=self.vm.kernel_steps,
            unknown_unmaps=self.vm.unknown_unmaps,
            contexts_recycled=self.vm.recycled, evictions=self.vm.evictions, host_leaves=host_leaves,
            table_bytes=tables, link_bytes=links,
            rmap_bytes=heads, memory_bytes=tables + links + heads,
            tlbis={name: TlbiCounters(self.vm.tlbi_operations[i], self.vm.tlbi_contexts[i], self.vm.tlbi_removed[i],
                                      self.vm.tlbi_required[i]) for i, name in enumerate(TLBI_CLASSES)})

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
        raw = np.ascontiguousarray(ops).view(np.uint8)
        rows = <tlbi_request_t *>&raw[0]
        removed = out
        for i in range(n):                  # nothing is applied unless everything can be
            if not i & 0xFFFF:
                PyErr_CheckSignals()
            if rows[i].vcpu >= self.vm.vcpu_count:
                raise ValueError(f"ops[{i}]: no vCPU {rows[i].vcpu}")
            if tlbi_lookup_word(rows[i].insn, &self.vm.features, &found) != TLBI_OK:
                try:
                    tlbi_encoding(rows[i].insn, &self.vm.features)
                except UndefinedInstruction as error:
                    raise UndefinedInstruction(f"ops[{i}]: {error}") from None
        pace_start(&pace)
        while at < n:
            end = min(n, at + pace.piece)
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
            pace_next(&pace)
            PyErr_CheckSignals()
        return out

    def check(self):
        cdef finding_t finding
        with nogil:
            lock_exclusive(&self.vm.lock)
            self.mem.refresh(&self.view)
            check_vm(&self.vm, &self.view, &finding)
            unlock(&self.vm.lock)
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
    """The host's (canonical) stage 2: ``vm.host``."""

    cdef _Engine engine

    def map(self, cipa, pa, size, perm="rwx", memattr="normal"):
        """Map [cipa, cipa + size) to ``pa`` on in the largest blocks that fit -> ``Invalidation``.

        Over a live range it is a change: shadow leaves over it are dropped. An identical mapping changes nothing.
        ``ValueError`` for unaligned or out-of-range addresses, ``MemoryError`` (nothing changed) over the bound.
        """
        return self.engine.map(as_u64(cipa, "cipa"), as_u64(pa, "pa"), as_u64(size, "size"), perm, memattr)

    def protect(self, start, end, perm):
        """Give what is mapped in [start, end) the permissions ``perm`` -> ``Invalidation``.

        Host blocks partly covered are split. Where a permission is reduced, shadow leaves inside are narrowed and
        those that stick out are dropped.
        """
        return self.engine.protect(as_u64(start, "start"), as_u64(end, "end"), perm)

    def load(self, addresses, pages, vttbr, vtcr):
        """Take over a captured host table: same leaves, same sizes, AF ignored -> ``Invalidation``.

        ``addresses``: uint64[N] of the table pages, ``pages``: uint8[N, granule]. ``ValueError`` when they make no
        table of the host's granule; nothing is changed then.
        """
        return self.engine.load(addresses, pages, as_u64(vttbr, "vttbr"), as_u64(vtcr, "vtcr"))

    def leaves(self):
        """Every host leaf, sorted: array of cipa u8, pa u8, size u8, perm u1 (in force now), memattr u1."""
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
    """The answer to one fault: the fields of ``FAULT_DTYPE`` as attributes; ``kind`` is a ``Kind``."""

    cdef fault_t c

    @property
    def kind(self):
        return Kind(self.c.kind)

    @property
    def fsc(self):
        return self.c.fsc

    @property
    def level(self):
        return self.c.level

    @property
    def perm(self):
        return self.c.perm

    @property
    def context(self):
        return self.c.context

    @property
    def ipa(self):
        return self.c.ipa

    @property
    def cipa(self):
        return self.c.cipa

    @property
    def pa(self):
        return self.c.pa

    @property
    def size(self):
        return self.c.size

    @property
    def hpfar(self):
        return self.c.hpfar

    def __repr__(self):
        kind = self.kind
        if kind in (Kind.HIT, Kind.MAPPED):
            return f"Fault({kind.name} {self.ipa:#x} → {self.pa:#x}, {size_text(self.size)}, {perm_text(self.perm)})"
        if kind == Kind.L1_FAULT:
            return f"Fault({kind.name} {self.ipa:#x}, fsc={self.fsc:#04x}, level {self.level})"
        return f"Fault({kind.name} {self.ipa:#x}, cipa={self.cipa:#x})"


cdef class VCPU:
    """One virtual CPU of L1: ``vm.vcpus[i]``. One thread at a time; a second one gets a ``RuntimeError``."""

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
        """
        cdef s2_config_t config
        cdef uint64_t vttbr_ = as_u64(vttbr, "vttbr"), vtcr_ = as_u64(vtcr, "vtcr"), hcr_ = as_u64(hcr, "hcr")
        decode_config(&self.engine.vm.features, vttbr_, vtcr_, hcr_, big_endian, as_u64(s2pir, "s2pir"), &config)
        self.enter()
        try:
            with nogil:
                lock_exclusive(&self.engine.vm.lock)
                if self.c.context != NO_CONTEXT:
                    context_release(&self.engine.vm, self.c.context)
                    self.c.context = NO_CONTEXT
                self.c.context = context_acquire(&self.engine.vm, &config, vttbr_, vtcr_)
                self.c.config = config
                forget_ways(self.c)
                self.c.vttbr = vttbr_
                self.c.vtcr = vtcr_
                self.c.hcr = hcr_
                unlock(&self.engine.vm.lock)
                lock_shared(&self.engine.vm.lock)
            try:
                return self.engine.context_row(self.c.context)
            finally:
                unlock(&self.engine.vm.lock)
        finally:
            self.leave()

    def put(self):
        """L1 left L2: let go of the context. Nothing happens if none is loaded."""
        self.enter()
        try:
            with nogil:
                lock_exclusive(&self.engine.vm.lock)
                if self.c.context != NO_CONTEXT:
                    context_release(&self.engine.vm, self.c.context)
                    self.c.context = NO_CONTEXT
                unlock(&self.engine.vm.lock)
        finally:
            self.leave()

    def fault(self, ipa, access=Access.READ):
        """Serve one stage-2 fault of L2 -> ``Fault``; ``MemoryError`` when the allocator refuses."""
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
        """Serve many faults in order: uint64[n] -> ``FAULT_DTYPE``[n]; the GIL is released.

        ``access`` is one mask or a uint8[n]; ``out`` may be a C-contiguous ``FAULT_DTYPE``[n] to write into. An
        exception from a populate callable stops at that element and propagates; the ones before it are done. So do
        signals (Ctrl-C), which a batch looks for about every 10 ms: what was done is in ``out``.
        """
        cdef const uint64_t[::1] addresses = as_addresses(ipas)
        cdef const uint8_t[::1] masks = as_masks(access, addresses.shape[0])
        cdef Py_ssize_t n = addresses.shape[0], at = 0, step, stride = 1 if masks.shape[0] > 1 else 0
        cdef uint8_t[::1] raw
        cdef pace_t pace
        out = as_output(out, FAULT_DTYPE, n)
        if n == 0:
            return out
        raw = out.view(np.uint8)
        self.enter_loaded()
        pace_start(&pace)
        try:
            while at < n:
                step = min(n - at, pace.piece)
                self.run(&addresses[at], &masks[at * stride], stride, <fault_t *>&raw[0] + at, step)
                at += step
                pace_next(&pace)
                PyErr_CheckSignals()
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
            self.c.kinds[out[at].kind] += 1
            at += 1

    cdef bint ask(self, uint64_t cipa, uint8_t access) except -1:
        """Call populate for ``cipa`` and map what it says; False for None."""
        cdef uint64_t seq = self.engine.vm.host_seq
        policy = self.engine.policy
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
        cdef uint64_t size = mapping.size, pa = mapping.pa, span
        cdef int level = self.engine.level_of_block(size), reached = 0
        cdef vm_t *vm = &self.engine.vm
        cdef bint stored = True
        self.engine.fill_attrs(mapping.perm, mapping.memattr, &attrs)
        if pa >> vm.features.pa_bits or (pa + size - 1) >> vm.features.pa_bits:
            raise ValueError(f"populate returned pa {pa:#x} beyond pa_bits={vm.features.pa_bits}")
        pa += cipa & (size - 1)
        with nogil:
            lock_exclusive(&vm.lock)
            self.engine.mem.refresh(&self.c.view)
            if not load64(vm.arena.words + table_find(&vm.arena, &vm.canonical, cipa, &reached)) & DESC_VALID:
                if reached > level:
                    level = reached         # part of a larger block is mapped already
                span = level_span(vm.arena.granule_bits, level)
                while level < FINAL_LEVEL and overlaps_active(vm, cipa & ~(span - 1), (cipa & ~(span - 1)) + span):
                    level += 1
                    span = level_span(vm.arena.granule_bits, level)
                # What was resolved before a change of that range must not be installed after it.
                if not (is_active(vm, cipa) or changed_since(vm, seq, cipa & ~(span - 1), (cipa & ~(span - 1)) + span)):
                    owed_begin(&vm.owed)
                    stored = populate_block(vm, cipa & ~(span - 1), pa & ~(span - 1), span, &attrs)
                    owed_end(&vm.owed)
            unlock(&vm.lock)
        if not stored:
            raise MemoryError(f"no room for the host table of {cipa:#x}")
        return 0

    def translate(self, ipa, access=Access.READ):
        """What the hardware would find in the shadow -> ``Fault`` of kind HIT or MISS. Changes nothing."""
        cdef Fault result = Fault.__new__(Fault)
        cdef uint64_t address = as_u64(ipa, "ipa")
        cdef uint8_t mask = as_access(access)
        self.enter_loaded()
        with nogil:
            translate_run(&self.engine.vm, self.c, &address, &mask, 0, &result.c, 1)
        self.leave()
        return result

    def translate_many(self, ipas, access=Access.READ, out=None):
        """``translate`` for uint64[n] -> ``FAULT_DTYPE``[n]; the GIL is released. Ctrl-C is answered in between."""
        cdef const uint64_t[::1] addresses = as_addresses(ipas)
        cdef const uint8_t[::1] masks = as_masks(access, addresses.shape[0])
        cdef Py_ssize_t n = addresses.shape[0], at = 0, step, stride = 1 if masks.shape[0] > 1 else 0
        cdef uint8_t[::1] raw
        cdef pace_t pace
        out = as_output(out, FAULT_DTYPE, n)
        if n == 0:
            return out
        raw = out.view(np.uint8)
        self.enter_loaded()
        pace_start(&pace)
        try:
            while at < n:
                step = min(n - at, pace.piece)
                with nogil:
                    translate_run(&self.engine.vm, self.c, &addresses[at], &masks[at * stride], stride,
                                  <fault_t *>&raw[0] + at, step)
                at += step
                pace_next(&pace)
                PyErr_CheckSignals()
        finally:
            self.leave()
        return out

    def tlbi(self, op, xt=0, vttbr=None, vtcr=None, hcr=None):
        """L1 issued a TLBI -> ``TlbiResult(name, removed, required, contexts)``.

        ``op`` is a name, (op1, CRn, CRm, op2) or a 32-bit SYS word. The registers are those that were in force when
        L1 issued it; None stands for what this vCPU loaded last. No context is acquired. Stage-1 operations remove
        no leaf; what they ask of the hardware is owed (``take_tlbis``). ``UndefinedInstruction`` for what does not
        exist or what the features lack.
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
        return f"VCPU({self.index}, {'no context' if self.c.context == NO_CONTEXT else f'context {self.c.context}'})"


cdef class NestedVM:
    """A VM whose guest is a hypervisor: shadow stage-2 contexts over L1's memory, and the host's stage 2 under it.

    ``mem`` stays in use as long as the VM lives. ``contexts`` is the size of the pool (None: 2 per vCPU).
    ``teardown``: what a host change does to the shadows: ``"reverse-map"`` drops exactly the leaves that map the
    range, ``"blow-away"`` every leaf of every context as Linux 7.2, ``"blow-away-lean"`` whole tables.
    ``"interval-map"`` is what was proposed for Linux in 2026: each context has an ordered map from canonical ranges to
    the nested range that maps them. Where two of its leaves overlap there (an alias, a page of a block mapped
    elsewhere) it no longer knows, and a host change drops that whole context. The proposal is for removals only:
    taking permissions (``protect``, dirty logging) narrows every leaf of every context, and ``age`` looks at the
    host's leaves, both as under blow-away.
    ``tlbi``: ``"exact"`` removes what the architecture asks for, ``"kvm72"`` what Linux 7.2 removes.
    ``attributes``: ``"architectural"`` or ``"kvm72"`` (L1's memory attributes ignored). ``max_table_bytes`` bounds
    tables, links and heads: cold contexts and leaf tables are evicted. ``table_base`` is the simulated physical
    address of the tables. ``track_tlbis`` keeps the queue of owed TLB maintenance.

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
        self.engine = _Engine(mem, vcpus, contexts, features, TEARDOWN_CODES[teardown], attributes == "kvm72", budget,
                              table_base, track_tlbis)
        self.engine.vm.tlbi_kvm72 = tlbi == "kvm72"
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
        under blow-away, else split. ``ValueError`` for bounds that are not host-page aligned.
        """
        return self.engine.unmap(as_u64(start, "start"), as_u64(end, "end"), partial)

    def log_dirty(self, start, end, on=True):
        """Switch dirty logging of the RAM in [start, end) -> ``Invalidation``.

        While it is on, leaves get W only on a write fault, at host-page size. Off forgets what was dirty.
        """
        return self.engine.log_dirty(as_u64(start, "start"), as_u64(end, "end"), on)

    def dirty_log(self, start, end):
        """Report, clear and protect again -> uint8 bitmap, one bit per host page of [start, end), little bit order."""
        return self.engine.dirty_log(as_u64(start, "start"), as_u64(end, "end"))

    def age(self, start, end):
        """OR of the access flags of host and shadow leaves, which are cleared -> bitmap as in ``dirty_log``."""
        return self.engine.age(as_u64(start, "start"), as_u64(end, "end"), True)

    def test_young(self, start, end):
        """As ``age``, but nothing is cleared."""
        return self.engine.age(as_u64(start, "start"), as_u64(end, "end"), False)

    @property
    def contexts(self):
        """The contexts that have an owner, as a tuple of ``Context``."""
        return self.engine.contexts()

    def shadow(self, index):
        """A context's live entries, sorted by IPA: ``SHADOW_DTYPE`` array."""
        return self.engine.shadow(index)

    def reverse(self, cipa):
        """Every shadow leaf that maps this host page: ``REVERSE_DTYPE`` array, sorted by context and IPA."""
        return self.engine.reverse(as_u64(cipa, "cipa"))

    def intervals(self, index):
        """A context's interval map, sorted: ``INTERVAL_DTYPE`` array.

        Each row is a canonical range [start, end) and the ``ipa`` that maps it; 0, and ``unknown`` 1, where that is not
        known any more. ``ValueError`` under other policies.
        """
        return self.engine.intervals(index)

    def tables(self, index=None):
        """(addresses uint64[N], pages uint8[N, granule]) of a shadow, or of the canonical table for None."""
        return self.engine.tables(index)

    def tlbi_many(self, ops):
        """Apply TLBIs in order: ``TLBI_OP_DTYPE``[n] -> uint64[n] of leaves removed.

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
        """Counters, as a frozen ``Stats``."""
        return self.engine.stats()

    def check(self):
        """Verify every invariant by brute force; ``InvariantError`` names the first that is broken."""
        self.engine.check()

    def _poke(self, index, ipa, flip):
        self.engine._poke(index, ipa, flip)

    def _state(self):
        """The engine's ``vm_t``, as a capsule valid as long as this object: for ``s2shadow._floor``, which measures."""
        return PyCapsule_New(&self.engine.vm, "s2shadow.vm_t", NULL)

    def _poke_interval(self, index, ipa, cipa=0, size=0):
        self.engine._poke_interval(index, ipa, cipa, size)

    def __repr__(self):
        return f"NestedVM({len(self.vcpus)} vCPUs, {len(self.contexts)} contexts, teardown={self.teardown!r})"


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
        return limit - ARENA_BYTES if limit > ARENA_BYTES else limit // 2
    if table_base < 0 or table_base % alignment:
        raise ValueError(f"table_base must be a multiple of {alignment:#x}, got {table_base:#x}")
    if table_base > limit - (1 << 30):
        raise ValueError(f"table_base {table_base:#x} leaves less than 1 GiB below pa_bits={features.pa_bits}")
    return table_base


def table_budget(max_table_bytes, vcpus, contexts, features):
    """The bound that remains once every root is paid for; 0 for none."""
    if max_table_bytes is None:
        return 0
    page = features.host_granule + sizeof(page_t)
    levels = 4
    # A walk path: shadow and canonical tables, links of the leaf table, and nodes of the reverse map.
    path = levels * 2 * page + features.host_granule + levels * (features.host_granule + sizeof(node_t))
    roots = (contexts + 1) * ROOT_PAGES * page
    least = roots + vcpus * path
    if max_table_bytes < least:
        raise ValueError(f"max_table_bytes must be at least {least} for {contexts} contexts and {vcpus} vCPUs, "
                         f"got {max_table_bytes}")
    return max_table_bytes - roots
