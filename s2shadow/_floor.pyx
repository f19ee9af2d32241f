"""The floor under every figure: a dependent pointer chase over a footprint of the same size."""

from libc.stdint cimport uint64_t
from libc.stdlib cimport free, malloc

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
