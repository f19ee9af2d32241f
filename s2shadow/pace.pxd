"""Ctrl-C in long work without the GIL: a batch comes up for signals about every 10 ms, whatever one element takes.

The first piece is small; each piece then measures how large the next one may be. Nothing is paid per element.
"""

from cpython.exc cimport PyErr_CheckSignals
from libc.stdint cimport int64_t, uint64_t

cdef extern from *:
    """
    #ifndef S2SHADOW_PACE
    #define S2SHADOW_PACE
    #include <time.h>
    static inline uint64_t s2_pace_clock(void)
    { struct timespec t; clock_gettime(CLOCK_MONOTONIC, &t); return (uint64_t)t.tv_sec * 1000000000u + t.tv_nsec; }
    #endif
    """
    uint64_t pace_clock "s2_pace_clock"() noexcept nogil

cdef enum:
    PACE_NS = 10_000_000
    FIRST_PIECE = 256
    MOST_PIECE = 1 << 16        # what comes may be slower than what was

cdef struct pace_t:
    uint64_t began              # of the piece under way
    int64_t piece               # its elements


cdef inline int64_t next_piece(pace_t *pace, int64_t at, int64_t n) except -1:
    """How many of ``n`` elements come next, after the ``at`` that are done; between two pieces, signals are looked for.
    A piece grows at most eightfold."""
    cdef uint64_t now, took
    if at == 0:
        pace.piece = FIRST_PIECE
        if n > FIRST_PIECE:                 # else no other will be measured
            pace.began = pace_clock()
    else:
        PyErr_CheckSignals()
        now = pace_clock()
        took = now - pace.began
        if took * 8 < PACE_NS:
            pace.piece *= 8
        else:
            pace.piece = pace.piece * PACE_NS / <int64_t>took + 1
        if pace.piece > MOST_PIECE:
            pace.piece = MOST_PIECE
        pace.began = now
    return pace.piece if pace.piece < n - at else n - at
