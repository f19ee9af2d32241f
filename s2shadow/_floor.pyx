# cython: nonecheck=False
"""For the benchmarks only: loops without Python around single operations of the engine, and the floors under them.

Functions named ``*_each`` call one entry point of the engine per element, as a hypervisor would from its exit
handler; each call waits for the result of the one before. They take the capsule of ``NestedVM._state``: the VM must
live on, and its vCPUs must be loaded and have served a fault since L1's memory last changed.

``Lean`` is the same work by the least code there can be: shift, mask and valid bit, two flat arrays for the reverse
map, no checks, no locks, no accounts. What it takes is the floor of what the engine takes on as much memory.
"""

from cpython.exc cimport PyErr_CheckSignals
from cpython.pycapsule cimport PyCapsule_GetPointer
from libc.stdint cimport int64_t, uint8_t, uint32_t, uint64_t, uintptr_t
from libc.stdlib cimport free, malloc
from libc.string cimport memset

from s2shadow cimport S2S_OK, s2s_api_t, s2s_fault_t, s2s_from_python, s2s_import, s2s_vm_t
from s2shadow.arch cimport OA_48, level_span
from s2shadow.atomics cimport prefetch
from s2shadow.config cimport Stage2Config
from s2shadow.fault cimport fault_one
from s2shadow.host cimport change_t, host_unmap, remove_host_leaf, whole_leaf
from s2shadow.maintenance cimport apply_tlbi, tlbi_regs_t, tlbi_result_t
from s2shadow.lock cimport lock_exclusive, unlock_exclusive
from s2shadow.memory cimport GuestMemory, mem_view_t
from s2shadow.table cimport next_leaf
from s2shadow.tlbi cimport TLBI_OK, tlbi_lookup_word, tlbi_op_t
from s2shadow.vm cimport fault_t, note_change, vm_t
from s2shadow.vmem cimport release
from s2shadow.walker cimport walk_stage2, walk_t

cdef extern from *:
    """
    #include <time.h>
    static inline uint64_t s2_now_ns(void)
    { struct timespec t; clock_gettime(CLOCK_MONOTONIC, &t); return (uint64_t)t.tv_sec * 1000000000u + t.tv_nsec; }
    static volatile uint64_t s2_sink;
    static inline void s2_keep(uint64_t value) { s2_sink = value; }
    #include <sys/mman.h>
    static inline void *s2_huge(size_t size)
    {
        void *p = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        if (p == MAP_FAILED) return NULL;
    #ifdef MADV_HUGEPAGE
        madvise(p, size, MADV_HUGEPAGE);
    #endif
        return p;
    }
    """
    uint64_t now_ns "s2_now_ns"() noexcept nogil
    void keep "s2_keep"(uint64_t value) noexcept nogil
    void *huge_alloc "s2_huge"(size_t size) noexcept nogil        # zeroed, on large pages where there are any

cdef extern from *:
    """
    #include <stdbool.h>
    typedef struct { uint64_t paddr; int perms; } s2_floor_entry;
    /* the least that a native UC_HOOK_TLB_FILL of Unicorn can do */
    static bool s2_floor_fill(void *uc, uint64_t vaddr, int kind, s2_floor_entry *entry, void *offset)
    {
        (void)uc; (void)kind;
        entry->paddr = vaddr + (uint64_t)(uintptr_t)offset;
        entry->perms = 7;
        return true;
    }
    """
    void floor_fill "s2_floor_fill"() noexcept nogil

cdef enum:
    LINE_WORDS = 8              # one link per 64-byte line
    PIECE = 1 << 16             # some 10 ms of loads that miss every cache


def chase(uint64_t footprint, uint64_t steps=1 << 20, uint64_t seed=1):
    """Nanoseconds per dependent load over ``footprint`` bytes, visited in one random cycle (Sattolo's shuffle)."""
    cdef uint64_t lines = max(2, footprint // 64), i, at = 0, began, took = 0, _step, left, piece
    cdef shuffle_t shuffle
    if lines > <uint64_t>1 << 57:
        raise MemoryError("footprint of the pointer chase")
    shuffle.words = <uint64_t *>malloc(lines * 64)
    if shuffle.words == NULL:
        raise MemoryError("footprint of the pointer chase")
    shuffle.state = seed | 1
    try:
        for at in range(0, lines, PIECE):       # in pieces: Ctrl-C is answered between them
            with nogil:
                for i in range(at, min(lines, at + PIECE)):
                    shuffle.words[i * LINE_WORDS] = i
            PyErr_CheckSignals()
        i = lines - 1
        while i > 0:
            piece = min(i, <uint64_t>PIECE)
            with nogil:
                shuffle_down(&shuffle, i, piece)
            i -= piece
            PyErr_CheckSignals()
        for at in range(0, lines, PIECE):
            with nogil:
                for i in range(at, min(lines, at + PIECE)):         # links as word offsets: the timed loop only loads
                    shuffle.words[i * LINE_WORDS] *= LINE_WORDS
            PyErr_CheckSignals()
        at = 0
        for timed in (False, True):
            left = steps if timed else min(lines, steps)
            while left:
                piece = min(left, <uint64_t>PIECE)
                with nogil:
                    keep(at)            # a volatile store on either side keeps the loads between the clock reads
                    began = now_ns()
                    for _step in range(piece):
                        at = shuffle.words[at]
                    keep(at)
                    if timed:
                        took += now_ns() - began
                left -= piece
                PyErr_CheckSignals()
    finally:
        free(shuffle.words)
    return took / <double>steps


cdef struct shuffle_t:
    uint64_t *words
    uint64_t state


cdef void shuffle_down(shuffle_t *shuffle, uint64_t first, uint64_t count) noexcept nogil:
    cdef uint64_t i = first, j, swap
    cdef uint64_t *words = shuffle.words
    while i > first - count:
        shuffle.state = shuffle.state * 6364136223846793005u + 1442695040888963407u
        j = (shuffle.state >> 33) % i
        swap = words[i * LINE_WORDS]
        words[i * LINE_WORDS] = words[j * LINE_WORDS]
        words[j * LINE_WORDS] = swap
        i -= 1


def stream(uint64_t entries, uint64_t rounds=8):
    """Nanoseconds per 8-byte entry, read, changed and written in order; the best of some rounds."""
    cdef uint64_t *words = <uint64_t *>malloc(entries * 8)
    cdef uint64_t i, began, took, best = ~<uint64_t>0, _round
    if words == NULL:
        raise MemoryError("footprint of the stream")
    with nogil:
        memset(words, 0xFF, entries * 8)
        for _round in range(rounds):
            began = now_ns()
            for i in range(entries):
                words[i] &= ~(<uint64_t>1 << (i & 7))
            keep(words[entries - 1])
            took = now_ns() - began
            if took < best:
                best = took
    free(words)
    return best / <double>entries


def nothing(_first=None, _second=None):
    """A call that does nothing: the floor of whatever is one call of Python's."""


# --- single operations of the engine -----------------------------------------------------------------------------


def unicorn_fill():
    """Address of a TLB fill for Unicorn that adds its user data to the address, and no more."""
    return <uintptr_t>&floor_fill


cdef vm_t *vm_of(object state) except NULL:
    return <vm_t *>PyCapsule_GetPointer(state, "s2shadow.vm_t")


def walk_each(GuestMemory mem not None, Stage2Config cfg not None, const uint64_t[::1] ipas, uint8_t access):
    """One walk at a time -> how many ended in a leaf."""
    cdef mem_view_t view
    cdef walk_t walked
    cdef const uint64_t *ipa = &ipas[0]
    cdef int64_t i, leaves = 0
    walked.pa = 0
    mem.pin(&view)
    with nogil:
        for i in range(ipas.shape[0]):
            walk_stage2(&view, &cfg.c, ipa[i] ^ walked.pa >> 63, access, True, &walked)
            leaves += not walked.status
    mem.unpin()
    return leaves


def fault_each(state, uint32_t vcpu, const uint64_t[::1] ipas, uint8_t access, uint8_t kind):
    """One fault at a time -> how many were answered with ``kind``."""
    cdef vm_t *vm = vm_of(state)
    cdef fault_t row
    cdef const uint64_t *given = &ipas[0]
    cdef uint64_t ipa
    cdef int64_t i, wanted = 0
    row.pa = 0
    with nogil:
        for i in range(ipas.shape[0]):
            ipa = given[i] ^ row.pa >> 63
            fault_one(vm, &vm.vcpus[vcpu], ipa, access, &row)
            wanted += row.kind == kind
    return wanted


def c_fault_each(nested_vm, uint32_t vcpu, const uint64_t[::1] ipas, uint32_t access, uint8_t kind):
    """``fault_each`` through the C API's table, as an embedder calls it; takes the ``NestedVM`` itself."""
    cdef const s2s_api_t *api = s2s_import()
    cdef s2s_vm_t *vm = s2s_from_python(nested_vm)
    cdef s2s_fault_t row
    cdef const uint64_t *given = &ipas[0]
    cdef int64_t i, wanted = 0
    row.pa = 0
    with nogil:
        for i in range(ipas.shape[0]):
            if api.fault(vm, vcpu, given[i] ^ row.pa >> 63, access, &row) == S2S_OK:
                wanted += row.kind == kind
    return wanted


def unmap_each(state, const uint64_t[::1] starts, uint64_t size):
    """One notifier at a time -> shadow leaves dropped."""
    cdef vm_t *vm = vm_of(state)
    cdef change_t change
    cdef const uint64_t *given = &starts[0]
    cdef int64_t i
    cdef uint64_t start, dropped = 0
    change.dropped = 0
    with nogil:
        for i in range(starts.shape[0]):
            start = given[i] ^ change.dropped >> 63
            host_unmap(vm, start, start + size, False, &change)
            dropped += change.dropped
    return dropped


def bare_unmap_each(state, const uint64_t[::1] starts, uint64_t size):
    """The floor of a notifier: what a hypervisor without nesting does on the same canonical table -> leaves removed.

    Lock, raise the sequence that a fault in flight checks, find each leaf and remove it with its table's accounts,
    unlock. Ranges must not cut a block.
    """
    cdef vm_t *vm = vm_of(state)
    cdef const uint64_t *given = &starts[0]
    cdef int64_t i
    cdef uint64_t start, removed = 0
    with nogil:
        for i in range(starts.shape[0]):
            start = given[i] ^ removed >> 63
            removed += bare(vm, start, start + size)
    return removed


cdef uint64_t bare_unmap(vm_t *vm, uint64_t start, uint64_t end) noexcept nogil:
    cdef uint64_t at = start, removed = 0
    cdef uint32_t slot
    cdef int level = 0
    lock_exclusive(&vm.lock)
    vm.invalidations += 1
    note_change(vm, start, end)
    slot = whole_leaf(vm, start, end, &level)
    if slot:
        remove_host_leaf(vm, slot)
        removed = 1
        at = end
    while at < end:
        slot = next_leaf(&vm.arena, &vm.canonical, &at, end, &level)
        if not slot:
            break
        remove_host_leaf(vm, slot)
        removed += 1
        at += level_span(vm.arena.granule_bits, level)
    unlock_exclusive(&vm.lock)
    return removed


ctypedef uint64_t (*bare_t)(vm_t *, uint64_t, uint64_t) noexcept nogil
cdef bare_t bare = bare_unmap       # a call, as into any other module


def pauses(state):
    """How often an operation on a VM let go of the lock for others before it was done, while nothing else runs."""
    return vm_of(state).lock.pauses


def tlbi_each(state, uint32_t word, const uint64_t[::1] operands, uint64_t vttbr, uint64_t vtcr, uint64_t hcr):
    """One TLBI at a time, decoded from its instruction word once -> shadow leaves removed."""
    cdef vm_t *vm = vm_of(state)
    cdef tlbi_op_t op
    cdef tlbi_regs_t regs
    cdef tlbi_result_t result
    cdef const uint64_t *given = &operands[0]
    cdef int64_t i
    cdef uint64_t removed = 0
    if tlbi_lookup_word(word, &vm.features, &op) != TLBI_OK:
        raise ValueError(f"no TLBI has the word {word:#x}")
    regs.vttbr, regs.vtcr, regs.hcr = vttbr, vtcr, hcr
    with nogil:
        for i in range(operands.shape[0]):
            apply_tlbi(vm, &op, given[i] ^ removed >> 63, &regs, &result)
            removed += result.removed
    return removed


# --- the least code that does the work ---------------------------------------------------------------------------

cdef enum:
    ENTRIES = 512
    MOST_IN_FLIGHT = 64
    LEAF_BITS = 0xFFC           # attributes of a leaf

# Four levels of 4K tables in one array; a descriptor holds 8 times the index of the table's first word, plus ``base``.
ctypedef struct lean_table_t:
    uint64_t *words
    uint64_t base
    uint64_t next_word          # words from here on were never used
    uint64_t limit
    int shift                   # of the root
    bint full                   # there was no room for a table: what was measured is void


cdef inline uint64_t lean_find(const lean_table_t *table, uint64_t ipa) noexcept nogil:
    """Index of the last-level entry; 0 where a table is missing."""
    cdef uint64_t at = 0, desc
    cdef int shift = table.shift
    while shift > 12:
        desc = table.words[at + (ipa >> shift & (ENTRIES - 1))]
        if not desc & 1:
            return 0
        at = ((desc & OA_48) - table.base) >> 3
        shift -= 9
    return at + (ipa >> 12 & (ENTRIES - 1))


cdef inline uint64_t lean_ensure(lean_table_t *table, uint64_t ipa) noexcept nogil:
    """Index of the last-level entry, tables made on the way; 0 where there is no room for them."""
    cdef uint64_t at = 0
    cdef uint64_t *entry
    cdef int shift = table.shift
    while shift > 12:
        entry = table.words + at + (ipa >> shift & (ENTRIES - 1))
        if not entry[0] & 1:
            if table.next_word + ENTRIES > table.limit:
                table.full = 1
                return 0
            entry[0] = table.next_word << 3 | 3
            table.next_word += ENTRIES
        at = (entry[0] & OA_48) >> 3
        shift -= 9
    return at + (ipa >> 12 & (ENTRIES - 1))


cdef class LeanWalk:
    """L1's tables (one array, the root first, at address ``base``), walked by the loads alone."""

    cdef lean_table_t guest
    cdef object image

    def __init__(self, uint64_t[::1] image not None, uint64_t base, int levels):
        self.image = image
        self.guest.words = &image[0]
        self.guest.base = base
        self.guest.shift = 12 + 9 * (levels - 1)

    def serial(self, const uint64_t[::1] ipas not None):
        """(ns per walk, sum of the outputs): each walk starts when the one before has ended."""
        cdef uint64_t began, took, total = 0, desc = 0
        cdef int64_t i
        with nogil:
            began = now_ns()
            for i in range(ipas.shape[0]):
                desc = self.guest.words[lean_find(&self.guest, ipas[i] ^ desc >> 63)]
                total += desc & OA_48
            keep(total)
            took = now_ns() - began
        return took / <double>ipas.shape[0], total

    def batch(self, const uint64_t[::1] ipas not None, int64_t size):
        """The same ``size`` at a time, level by level: the next level's line is fetched while others are looked at."""
        cdef uint64_t at[MOST_IN_FLIGHT]
        cdef uint64_t began, took, total = 0
        cdef int64_t first, i, n
        cdef int shift
        if not 1 <= size <= MOST_IN_FLIGHT:
            raise ValueError(f"size must be between 1 and {MOST_IN_FLIGHT}, got {size}")
        with nogil:
            began = now_ns()
            first = 0
            while first < ipas.shape[0]:
                n = min(size, ipas.shape[0] - first)
                for i in range(n):
                    at[i] = ipas[first + i] >> self.guest.shift & (ENTRIES - 1)
                    prefetch(self.guest.words + at[i])
                shift = self.guest.shift
                while shift > 12:
                    shift -= 9
                    for i in range(n):
                        at[i] = (((self.guest.words[at[i]] & OA_48) - self.guest.base) >> 3) + (
                            ipas[first + i] >> shift & (ENTRIES - 1))
                        prefetch(self.guest.words + at[i])
                for i in range(n):
                    total += self.guest.words[at[i]] & OA_48
                first += n
            keep(total)
            took = now_ns() - began
        return took / <double>ipas.shape[0], total


cdef class Lean:
    """A canonical table, one shadow table for all contexts, a head for each canonical page and a link for each shadow
    entry, over ``pages`` canonical pages from ``start`` and ``leaves`` shadow leaves, dense in each of ``contexts``
    stretches. ``guest``: L1's tables."""

    cdef lean_table_t guest
    cdef lean_table_t canonical
    cdef lean_table_t shadow
    cdef uint64_t *links
    cdef uint32_t *heads        # word index of the first shadow leaf of a canonical page
    cdef uint64_t start
    cdef uint64_t pages
    cdef LeanWalk walker

    def __init__(self, LeanWalk guest, uint64_t start, uint64_t pages, uint64_t leaves, uint64_t contexts=1):
        cdef uint64_t i
        self.start = start
        self.pages = pages
        self.walker = guest
        if guest is not None:
            self.guest = guest.guest
        self.take(&self.canonical, pages, 1)
        self.take(&self.shadow, leaves, contexts)
        self.links = <uint64_t *>huge_alloc(self.shadow.limit * 8)
        self.heads = <uint32_t *>huge_alloc(pages * 4)
        if self.links == NULL or self.heads == NULL:
            raise MemoryError("the floor's arrays")
        with nogil:
            for i in range(pages):
                self.canonical.words[lean_ensure(&self.canonical, start + (i << 12))] = (start + (i << 12)) | 0x7FF
            # committed before anything is timed
            memset(self.shadow.words, 0, self.shadow.limit * 8)
            memset(self.links, 0, self.shadow.limit * 8)
            memset(self.heads, 0, pages * 4)

    cdef int take(self, lean_table_t *table, uint64_t leaves, uint64_t stretches) except -1:
        # leaf tables, the tables above them, and at the end of each stretch one more of each level
        table.limit = (leaves // ENTRIES + leaves // ENTRIES // ENTRIES + 4 * stretches + 4) * ENTRIES
        table.words = <uint64_t *>huge_alloc(table.limit * 8)
        table.next_word = ENTRIES
        table.shift = 39
        if table.words == NULL:
            raise MemoryError("the floor's tables")
        return 0

    def __dealloc__(self):
        release(self.canonical.words, self.canonical.limit * 8)
        release(self.shadow.words, self.shadow.limit * 8)
        release(self.links, self.shadow.limit * 8)
        release(self.heads, self.pages * 4)

    cdef uint64_t page(self, uint64_t cipa) noexcept nogil:
        return (cipa - self.start) >> 12

    def clear(self):
        """Empty the shadow."""
        with nogil:
            memset(self.shadow.words, 0, self.shadow.next_word * 8)
            memset(self.links, 0, self.shadow.next_word * 8)
            memset(self.heads, 0, self.pages * 4)
            self.shadow.next_word = ENTRIES

    def fill(self, const uint64_t[::1] ipas not None, const uint64_t[::1] cipas not None):
        """Install leaves, without a walk; an IPA's upper bits may name its context."""
        cdef uint64_t slot
        cdef int64_t i
        with nogil:
            for i in range(ipas.shape[0]):
                slot = lean_ensure(&self.shadow, ipas[i])
                if not slot:
                    break
                self.install(slot, cipas[i] | 0x7FF)
        self.check_room()

    cdef int check_room(self) except -1:
        if self.shadow.full or self.canonical.full:
            raise MemoryError("the floor's leaves are not as dense as it was told")
        return 0

    cdef void install(self, uint64_t slot, uint64_t desc) noexcept nogil:
        cdef uint32_t *head = self.heads + self.page(desc & OA_48)
        self.shadow.words[slot] = desc
        self.links[slot] = head[0]
        head[0] = <uint32_t>slot

    def faults(self, const uint64_t[::1] ipas not None):
        """ns for each fault, one after the other: guest walk, canonical walk, leaf, link, head."""
        cdef uint64_t began, took, slot, desc = 0, host = 0
        cdef int64_t i
        with nogil:
            began = now_ns()
            for i in range(ipas.shape[0]):
                desc = self.guest.words[lean_find(&self.guest, ipas[i] ^ host >> 63)]
                host = self.canonical.words[lean_find(&self.canonical, desc & OA_48)]
                slot = lean_ensure(&self.shadow, ipas[i])
                if not slot:
                    break
                self.install(slot, host & (OA_48 | desc & LEAF_BITS | 3))
            keep(host)
            took = now_ns() - began
        self.check_room()
        return took / <double>ipas.shape[0]

    def faults_batched(self, const uint64_t[::1] ipas not None, int64_t size):
        """The same, ``size`` at a time: what the next step loads is fetched while others are served."""
        cdef uint64_t guest[MOST_IN_FLIGHT]
        cdef uint64_t host[MOST_IN_FLIGHT]
        cdef uint64_t slot[MOST_IN_FLIGHT]
        cdef uint64_t began, took, desc = 0
        cdef int64_t first, i, n
        if not 1 <= size <= MOST_IN_FLIGHT:
            raise ValueError(f"size must be between 1 and {MOST_IN_FLIGHT}, got {size}")
        with nogil:
            began = now_ns()
            first = 0
            while first < ipas.shape[0]:
                n = min(size, ipas.shape[0] - first)
                for i in range(n):
                    guest[i] = lean_find(&self.guest, ipas[first + i])
                    prefetch(self.guest.words + guest[i])
                    slot[i] = lean_ensure(&self.shadow, ipas[first + i])
                    prefetch(self.shadow.words + slot[i])
                    prefetch(self.links + slot[i])
                if self.shadow.full:
                    break
                for i in range(n):
                    guest[i] = self.guest.words[guest[i]]
                    host[i] = lean_find(&self.canonical, guest[i] & OA_48)
                    prefetch(self.canonical.words + host[i])
                    prefetch(self.heads + self.page(guest[i] & OA_48))
                for i in range(n):
                    desc = self.canonical.words[host[i]] & (OA_48 | guest[i] & LEAF_BITS | 3)
                    self.install(slot[i], desc)
                first += n
            keep(desc)
            took = now_ns() - began
        self.check_room()
        return took / <double>ipas.shape[0]

    def removals(self, const uint64_t[::1] cipas not None):
        """(ns for each canonical page, leaves removed), one after the other: every leaf on the page's list goes."""
        cdef uint64_t began, took, slot, following, removed = 0
        cdef uint32_t *head
        cdef int64_t i
        with nogil:
            began = now_ns()
            for i in range(cipas.shape[0]):
                head = self.heads + self.page(cipas[i] ^ removed >> 63)
                slot = head[0]
                head[0] = 0
                while slot:
                    removed += self.shadow.words[slot] & 1
                    self.shadow.words[slot] = 0
                    following = self.links[slot]
                    self.links[slot] = 0
                    slot = following
            keep(removed)
            took = now_ns() - began
        return took / <double>cipas.shape[0], removed

    def range_removal(self, uint64_t ipa, int64_t pages, int64_t ahead):
        """ns for each page of one range, each on the list of its canonical page alone; heads are fetched ``ahead``."""
        cdef uint64_t began, took, slot = 0, desc, to_come, removed = 0
        cdef int64_t i
        with nogil:
            began = now_ns()
            for i in range(pages):
                if i % ENTRIES == 0:
                    slot = lean_find(&self.shadow, ipa + (<uint64_t>i << 12))
                if (i + ahead) % ENTRIES >= ahead and i + ahead < pages:
                    to_come = self.shadow.words[slot + ahead]
                    prefetch(self.heads + self.page(to_come & OA_48))
                desc = self.shadow.words[slot]
                if desc & 1:
                    self.heads[self.page(desc & OA_48)] = 0
                    self.links[slot] = 0
                    self.shadow.words[slot] = 0
                    removed += 1
                slot += 1
            keep(removed)
            took = now_ns() - began
        return took / <double>pages, removed

    def write_protect(self, uint64_t start, int64_t pages, int64_t ahead):
        """ns for all canonical pages of a range and every leaf on their lists: S2AP[1] is cleared."""
        cdef uint64_t began, took, slot, leaf = 0, changed = 0
        cdef int64_t i, at
        with nogil:
            began = now_ns()
            for i in range(pages):
                if i % ENTRIES == 0:
                    leaf = lean_find(&self.canonical, start + (<uint64_t>i << 12))
                at = self.page(start) + i
                if i + ahead < pages:
                    prefetch(self.shadow.words + self.heads[at + ahead])
                    prefetch(self.links + self.heads[at + ahead])
                self.canonical.words[leaf] &= ~<uint64_t>0x80
                leaf += 1
                slot = self.heads[at]
                while slot:
                    self.shadow.words[slot] &= ~<uint64_t>0x80
                    changed += 1
                    slot = self.links[slot]
            keep(changed)
            took = now_ns() - began
        return <double>took, changed
