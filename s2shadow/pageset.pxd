# A set of table pages, in the order of their numbers: one bit each, and summaries above (a bit for each word that has
# any), so that the next member is a few steps away however far it is. Page 0 is never in it.
#
# Pages are added on the shared side; everything else runs on the exclusive side.

from libc.stdint cimport uint32_t, uint64_t

cdef enum:
    PAGESET_LEVELS = 4          # 64^4 bits are more than the pages that an arena can have

ctypedef struct pageset_t:
    uint64_t *words[PAGESET_LEVELS]
    uint64_t bytes

cdef bint pageset_init(pageset_t *pages, uint32_t limit) noexcept nogil
cdef void pageset_destroy(pageset_t *pages) noexcept nogil
cdef void pageset_add(pageset_t *pages, uint32_t page) noexcept nogil
cdef void pageset_remove(pageset_t *pages, uint32_t page) noexcept nogil
cdef uint32_t pageset_next(const pageset_t *pages, uint32_t after) noexcept nogil
