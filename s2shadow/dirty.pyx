"""Range state of dirty logging."""

from s2shadow.vmem cimport release, reserve


cdef bint dirty_reserve(dirty_t *dirty) noexcept nogil:
    """Reserve the bit arrays; False if the system grants no address space."""
    if dirty.logged != NULL:
        return True
    dirty.words = (<uint64_t>1 << (dirty.input_bits - dirty.page_bits)) / 64
    dirty.logged = <uint64_t *>reserve(dirty.words * 8)
    dirty.dirty = <uint64_t *>reserve(dirty.words * 8)
    if dirty.logged != NULL and dirty.dirty != NULL:
        return True
    dirty_destroy(dirty)
    return False


cdef void dirty_destroy(dirty_t *dirty) noexcept nogil:
    release(dirty.logged, dirty.words * 8)
    release(dirty.dirty, dirty.words * 8)
    dirty.logged = NULL
    dirty.dirty = NULL


cdef inline uint64_t word_mask(uint64_t word, uint64_t first, uint64_t last) noexcept nogil:
    """The bits of ``word`` that stand for pages first..last."""
    cdef uint64_t mask = ~<uint64_t>0
    if word == first >> 6:
        mask &= ~<uint64_t>0 << (first & 63)
    if word == last >> 6:
        mask &= ~<uint64_t>0 >> (63 - (last & 63))
    return mask


cdef void dirty_set_range(dirty_t *dirty, uint64_t start, uint64_t end, bint on) noexcept nogil:
    """Switch logging of [start, end) (exclusive side). Off forgets what was dirty there."""
    cdef uint64_t first = start >> dirty.page_bits, last = (end - 1) >> dirty.page_bits, word, mask
    for word in range(first >> 6, (last >> 6) + 1):
        mask = word_mask(word, first, last)
        if on:
            dirty.logged[word] |= mask
        elif dirty.logged[word]:            # untouched pages of the arrays stay untouched
            dirty.logged[word] &= ~mask
            dirty.dirty[word] &= ~mask
    if on:
        dirty.active = 1


cdef bint dirty_any_logged(const dirty_t *dirty, uint64_t start, uint64_t end) noexcept nogil:
    cdef uint64_t first = start >> dirty.page_bits, last = (end - 1) >> dirty.page_bits, word
    if not dirty.active:
        return False
    for word in range(first >> 6, (last >> 6) + 1):
        if peek64(dirty.logged + word) & word_mask(word, first, last):
            return True
    return False


cdef uint64_t dirty_next(const dirty_t *dirty, uint64_t start, uint64_t end) noexcept nogil:
    """Address of the first dirty page in [start, end), or ``end``."""
    cdef uint64_t page = start >> dirty.page_bits, stop = end >> dirty.page_bits, word
    while page < stop:
        word = dirty.dirty[page >> 6] >> (page & 63)
        if word & 1:
            return page << dirty.page_bits
        page = page + 1 if word else (page | 63) + 1
    return end
