# Where memory comes from. Arrays that never move are address space reserved in one piece and committed as it is
# touched: they cost what is used. Every place that can be refused memory asks ``refused`` first, so that tests can
# refuse each in turn; none is on a path that takes no memory.

from libc.stdint cimport uint8_t

cdef bint refused() noexcept nogil                              # a test wants this allocation to fail
cdef void *reserve(size_t size) noexcept nogil                  # zeroed, or NULL
cdef void prefer_huge(void *address, size_t size) noexcept nogil
cdef void release(void *address, size_t size) noexcept nogil
cdef void *allocate(size_t count, size_t size) noexcept nogil   # zeroed, or NULL; for free()
