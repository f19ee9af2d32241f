# What an embedder asks to see, copied out under the lock by code that makes no Python object meanwhile: to make one may
# run a finalizer, or let another thread have the GIL, and either may want the lock.

from libc.stdint cimport int8_t, int64_t, uint8_t, uint16_t, uint32_t, uint64_t

from s2shadow.table cimport table_t
from s2shadow.vm cimport vm_t

# The layouts of SHADOW_DTYPE, HOST_LEAF_DTYPE, REVERSE_DTYPE and INTERVAL_DTYPE.
ctypedef struct shadow_row_t:
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

ctypedef struct host_row_t:
    uint64_t cipa
    uint64_t pa
    uint64_t size
    uint8_t perm
    uint8_t memattr

ctypedef struct reverse_row_t:
    uint64_t ipa
    uint64_t size
    uint16_t context

ctypedef struct interval_row_t:
    uint64_t start
    uint64_t end
    uint64_t ipa
    uint8_t unknown

ctypedef struct context_row_t:
    table_t shadow
    uint64_t vttbr
    uint64_t vtcr
    uint64_t entries
    uint64_t table_bytes
    uint32_t index
    uint32_t refs
    uint16_t vmid
    uint8_t enabled

ctypedef enum listing_t:
    LIST_SHADOW                 # of the context with this index
    LIST_INTERVALS
    LIST_REVERSE                # of this cIPA
    LIST_HOST

cdef int64_t list_rows(vm_t *vm, listing_t what, uint64_t of, void *rows, uint64_t room) noexcept nogil
cdef int64_t list_tables(vm_t *vm, int64_t context, uint64_t *addresses, uint8_t *contents,
                         uint64_t room) noexcept nogil
cdef uint32_t list_contexts(vm_t *vm, context_row_t *rows) noexcept nogil
cdef void list_context(vm_t *vm, uint32_t index, context_row_t *row) noexcept nogil
