"""Sets of table pages: eviction finds the shadows' leaf tables by one."""

from s2shadow.atomics cimport fetch_or64, peek64, store64
from s2shadow.vmem cimport release, reserve

cdef extern from *:
    int lowest_bit "__builtin_ctzll"(unsigned long long word) noexcept nogil

cdef enum:
    WORD_BITS = 6


cdef bint pageset_init(pageset_t *pages, uint32_t limit) noexcept nogil:
    """An empty set of pages below ``limit``; False without memory."""
    cdef uint64_t counts[PAGESET_LEVELS]
    cdef uint64_t bits = limit, total = 0
    cdef int level
    for level in range(PAGESET_LEVELS):
        bits = (bits >> WORD_BITS) + 2          # one beyond the last, which ends a search
        counts[level] = bits
        total += bits
    pages.bytes = total * 8
    pages.words[0] = <uint64_t *>reserve(pages.bytes)
    if pages.words[0] == NULL:
        return False
    for level in range(1, PAGESET_LEVELS):
        pages.words[level] = pages.words[level - 1] + counts[level - 1]
    return True


cdef void pageset_destroy(pageset_t *pages) noexcept nogil:
    release(pages.words[0], pages.bytes)
    pages.words[0] = NULL


cdef void pageset_add(pageset_t *pages, uint32_t page) noexcept nogil:
    cdef uint64_t at = page, before
    cdef int level
    for level in range(PAGESET_LEVELS):
        before = fetch_or64(pages.words[level] + (at >> WORD_BITS), <uint64_t>1 << (at & 63))
        if before:
            return
        at >>= WORD_BITS


cdef void pageset_remove(pageset_t *pages, uint32_t page) noexcept nogil:
    """Take a page out; nothing happens if it is not in."""
    cdef uint64_t at = page, word
    cdef int level
    for level in range(PAGESET_LEVELS):
        word = peek64(pages.words[level] + (at >> WORD_BITS))
        if not word >> (at & 63) & 1:
            return
        word &= ~(<uint64_t>1 << (at & 63))
        store64(pages.words[level] + (at >> WORD_BITS), word)
        if word:
            return
        at >>= WORD_BITS


cdef uint32_t pageset_next(const pageset_t *pages, uint32_t after) noexcept nogil:
    """The first member above ``after``, or 0."""
    cdef uint64_t at = <uint64_t>after + 1, word
    cdef int level = 0
    while level < PAGESET_LEVELS:
        word = peek64(pages.words[level] + (at >> WORD_BITS)) >> (at & 63)
        if word:
            at += lowest_bit(word)
            while level:
                level -= 1
                at = at << WORD_BITS | lowest_bit(peek64(pages.words[level] + at))
            return <uint32_t>at
        at = (at >> WORD_BITS) + 1
        level += 1
    return 0
