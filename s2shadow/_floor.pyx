"""For the benchmarks only: loops without Python around single operations of the engine, and the floors under them.

Functions named ``*_each`` call one entry point of the engine per element, as a hypervisor would from its exit
handler. They take the capsule of ``NestedVM._state``: the VM must live on, and its vCPUs must be loaded and have
served a fault since L1's memory last changed.
"""

from cpython.pycapsule cimport PyCapsule_GetPointer
from libc.stdint cimport int64_t, uint8_t, uint32_t, uint64_t
from libc.stdlib cimport free, malloc

from s2shadow.arch cimport level_span
from s2shadow.config cimport Stage2Config
from s2shadow.fault cimport fault_run
from s2shadow.host cimport change_t, host_unmap
from s2shadow.maintenance cimport apply_tlbi, tlbi_regs_t, tlbi_result_t
from s2shadow.memory cimport GuestMemory, mem_view_t
from s2shadow.table cimport leaf_removed, next_leaf
from s2shadow.tlbi cimport TLBI_OK, tlbi_lookup_word, tlbi_op_t
from s2shadow.vm cimport CHANGES_KEPT, fault_t, lock_exclusive, unlock, vm_t
from s2shadow.walker cimport walk_stage2, walk_t

cdef extern from *:
    """
    #include <time.h>
    static inline uint64_t s2_now_ns(void)
    { struct timespec t; clock_gettime(CLOCK_MONOTONIC, &t); return (uint64_t)t.tv_sec * 1000000000u + t.tv_nsec; }
    static volatile uint64_t s2_sink;
    static inline void s2_keep(uint64_t value) { s2_sink = value; }
    """
    uint64_t now_ns "s2_now_ns"() noexcept nogil
    void keep "s2_keep"(uint64_t value) noexcept nogil

cdef enum:
    LINE_WORDS = 8              # one link per 64-byte line


def chase(uint64_t footprint, uint64_t steps=1 << 20, uint64_t seed=1):
    """Nanoseconds per dependent load over ``footprint`` bytes, visited in one random cycle (Sattolo's shuffle)."""
    cdef uint64_t lines = max(2, footprint // 64), i, j, state = seed | 1, at = 0, began, took, _step
    cdef uint64_t *words = <uint64_t *>malloc(lines * 64)
    cdef uint64_t swap
    if words == NULL:
        raise MemoryError("footprint of the pointer chase")
    with nogil:
        for i in range(lines):
            words[i * LINE_WORDS] = i
        i = lines - 1
        while i > 0:
            state = state * 6364136223846793005u + 1442695040888963407u
            j = (state >> 33) % i
            swap = words[i * LINE_WORDS]
            words[i * LINE_WORDS] = words[j * LINE_WORDS]
            words[j * LINE_WORDS] = swap
            i -= 1
        for i in range(lines):          # links as word offsets: the timed loop only loads
            words[i * LINE_WORDS] *= LINE_WORDS
        for _step in range(min(lines, steps)):
            at = words[at]
        keep(at)                       # a volatile store on either side keeps the loads between the clock reads
        began = now_ns()
        for _step in range(steps):
            at = words[at]
        keep(at)
        took = now_ns() - began
    free(words)
    return took / <double>steps


# --- single operations of the engine -----------------------------------------------------------------------------


cdef vm_t *vm_of(object state) except NULL:
    return <vm_t *>PyCapsule_GetPointer(state, "s2shadow.vm_t")


def walk_each(GuestMemory mem not None, Stage2Config cfg not None, const uint64_t[::1] ipas, uint8_t access):
    """One walk at a time -> how many ended in a leaf."""
    cdef mem_view_t view
    cdef walk_t walked
    cdef int64_t i, leaves = 0
    mem.pin(&view)
    with nogil:
        for i in range(ipas.shape[0]):
            walk_stage2(&view, &cfg.c, ipas[i], access, True, &walked)
            leaves += not walked.status
    mem.unpin()
    return leaves


def fault_each(state, uint32_t vcpu, const uint64_t[::1] ipas, uint8_t access, uint8_t kind):
    """One fault at a time -> how many were answered with ``kind``."""
    cdef vm_t *vm = vm_of(state)
    cdef fault_t row
    cdef int64_t i, at, wanted = 0
    with nogil:
        for i in range(ipas.shape[0]):
            at = 0
            fault_run(vm, &vm.vcpus[vcpu], &ipas[i], &access, 0, &row, 1, &at)
            wanted += row.kind == kind
    return wanted


def unmap_each(state, const uint64_t[::1] starts, uint64_t size):
    """One notifier at a time -> shadow leaves dropped."""
    cdef vm_t *vm = vm_of(state)
    cdef change_t change
    cdef int64_t i
    cdef uint64_t dropped = 0
    with nogil:
        for i in range(starts.shape[0]):
            host_unmap(vm, starts[i], starts[i] + size, False, &change)
            dropped += change.dropped
    return dropped


def bare_unmap_each(state, const uint64_t[::1] starts, uint64_t size):
    """The floor of a notifier: what a hypervisor without nesting does on the same canonical table -> leaves removed.

    Lock, raise the sequence that a fault in flight checks, find each leaf and remove it with its table's accounts,
    unlock. Ranges must not cut a block.
    """
    cdef vm_t *vm = vm_of(state)
    cdef int64_t i
    cdef uint64_t removed = 0
    with nogil:
        for i in range(starts.shape[0]):
            removed += bare_unmap(vm, starts[i], starts[i] + size)
    return removed


cdef uint64_t bare_unmap(vm_t *vm, uint64_t start, uint64_t end) noexcept nogil:
    cdef uint64_t at = start, removed = 0
    cdef uint32_t slot
    cdef int level = 0
    lock_exclusive(&vm.lock)
    vm.invalidations += 1
    vm.host_seq += 1
    vm.changes[vm.host_seq % CHANGES_KEPT].start = start
    vm.changes[vm.host_seq % CHANGES_KEPT].end = end
    while at < end:
        slot = next_leaf(&vm.arena, &vm.canonical, &at, end, &level)
        if not slot:
            break
        leaf_removed(&vm.arena, slot, 0)
        vm.canonical_leaves -= 1
        removed += 1
        at += level_span(vm.arena.granule_bits, level)
    unlock(&vm.lock)
    return removed


def tlbi_each(state, uint32_t word, const uint64_t[::1] operands, uint64_t vttbr, uint64_t vtcr, uint64_t hcr):
    """One TLBI at a time, decoded from its instruction word once -> shadow leaves removed."""
    cdef vm_t *vm = vm_of(state)
    cdef tlbi_op_t op
    cdef tlbi_regs_t regs
    cdef tlbi_result_t result
    cdef int64_t i
    cdef uint64_t removed = 0
    if tlbi_lookup_word(word, &vm.features, &op) != TLBI_OK:
        raise ValueError(f"no TLBI has the word {word:#x}")
    regs.vttbr, regs.vtcr, regs.hcr = vttbr, vtcr, hcr
    with nogil:
        for i in range(operands.shape[0]):
            apply_tlbi(vm, &op, operands[i], &regs, &result)
            removed += result.removed
    return removed
