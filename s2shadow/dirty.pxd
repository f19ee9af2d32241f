# Dirty logging: which host pages of cIPA space are logged, and which were written. Two bit arrays over the whole
# space, reserved when logging is first switched on.

from libc.stdint cimport uint8_t, uint64_t

from s2shadow.atomics cimport fetch_or64, peek64

ctypedef struct dirty_t:
    uint64_t *logged
    uint64_t *dirty
    uint64_t words              # of each array
    uint64_t input_bits
    uint8_t page_bits
    uint8_t active              # some page is, or was, logged

cdef bint dirty_reserve(dirty_t *dirty) noexcept nogil
cdef void dirty_destroy(dirty_t *dirty) noexcept nogil
cdef void dirty_set_range(dirty_t *dirty, uint64_t start, uint64_t end, bint on) noexcept nogil
cdef bint dirty_any_logged(const dirty_t *dirty, uint64_t start, uint64_t end) noexcept nogil
cdef uint64_t dirty_next(const dirty_t *dirty, uint64_t start, uint64_t end) noexcept nogil


cdef inline bint is_logged(const dirty_t *dirty, uint64_t cipa) noexcept nogil:
    cdef uint64_t page = cipa >> dirty.page_bits
    return dirty.active and (peek64(dirty.logged + (page >> 6)) >> (page & 63) & 1) != 0


cdef inline void mark_dirty(dirty_t *dirty, uint64_t cipa) noexcept nogil:
    """Mark a page if it is logged."""
    cdef uint64_t page = cipa >> dirty.page_bits
    if is_logged(dirty, cipa):
        fetch_or64(dirty.dirty + (page >> 6), <uint64_t>1 << (page & 63))


cdef inline void clear_dirty(dirty_t *dirty, uint64_t cipa) noexcept nogil:
    cdef uint64_t page = cipa >> dirty.page_bits
    dirty.dirty[page >> 6] &= ~(<uint64_t>1 << (page & 63))
