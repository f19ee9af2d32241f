# Changes of the canonical stage 2 (MMU notifiers), and what they do to the shadows.

from libc.stdint cimport uint8_t, uint32_t, uint64_t

from s2shadow.arch cimport DESC_VALID, level_span
from s2shadow.atomics cimport peek64
from s2shadow.memory cimport region_t
from s2shadow.table cimport leaf_removed, table_find
from s2shadow.vm cimport range_t, vm_t

# What the host says about a range: the attribute half of canonical descriptors.
ctypedef struct host_attrs_t:
    uint8_t perm
    uint8_t memattr
    uint8_t sh
    uint8_t young

ctypedef struct change_t:
    uint64_t dropped
    uint64_t ticket
    uint64_t work               # leaves visited and host leaves changed in this section

# What came of a write that dirty logging withheld.
ctypedef enum grant_t:
    GRANT_DONE
    GRANT_EXCLUSIVE             # for the exclusive side to do, or to go on with
    GRANT_NO_MEMORY             # no table for the split of its block, which is gone

cdef bint host_map(vm_t *vm, uint64_t cipa, uint64_t pa, uint64_t size, const host_attrs_t *attrs, uint64_t max_block,
                   change_t *change) noexcept nogil
cdef bint host_make_room(vm_t *vm, uint64_t pages) noexcept nogil
cdef void host_give_room(vm_t *vm) noexcept nogil
cdef bint register_active(vm_t *vm, uint64_t start, uint64_t end) noexcept nogil
cdef void forget_active(vm_t *vm, uint64_t start, uint64_t end) noexcept nogil
cdef void host_unmap(vm_t *vm, uint64_t start, uint64_t end, bint drop_partial, change_t *change) noexcept nogil
cdef void host_protect(vm_t *vm, uint64_t start, uint64_t end, uint8_t perm, change_t *change) noexcept nogil
cdef void host_log(vm_t *vm, const range_t *ranges, uint32_t count, bint on, change_t *change) noexcept nogil
cdef void host_dirty_log(vm_t *vm, const range_t *ranges, uint32_t count, uint64_t origin,
                         uint8_t *bitmap) noexcept nogil
cdef void host_age(vm_t *vm, uint64_t start, uint64_t end, bint clear, uint8_t *bitmap) noexcept nogil
cdef int populate_linear(vm_t *vm, const region_t *region, uint64_t cipa) noexcept nogil
cdef bint populate_block(vm_t *vm, uint64_t block, uint64_t pa, uint64_t size, const host_attrs_t *attrs) noexcept nogil
cdef grant_t grant_write(vm_t *vm, uint64_t cipa, bint exclusive) noexcept nogil
cdef bint changed_since(const vm_t *vm, uint64_t seq, uint64_t start, uint64_t end) noexcept nogil


cdef inline uint32_t whole_leaf(const vm_t *vm, uint64_t start, uint64_t end, int *level) noexcept nogil:
    """Slot of the host leaf that maps just [start, end), or 0."""
    cdef uint32_t slot
    cdef uint64_t span
    if start >= end:
        return 0
    slot = table_find(&vm.arena, &vm.canonical, start, level)
    span = level_span(vm.arena.granule_bits, level[0])
    if not peek64(vm.arena.words + slot) & DESC_VALID or start & (span - 1) or end - start != span:
        return 0
    return slot


cdef inline void remove_host_leaf(vm_t *vm, uint32_t slot) noexcept nogil:
    leaf_removed(&vm.arena, slot, 0)
    vm.canonical_leaves -= 1
