# Address space reserved in one piece and committed as it is touched: arrays that never move and cost what is used.

from libc.stdint cimport uint8_t

cdef extern from *:
    """
    #include <sys/mman.h>
    static inline void *s2_reserve(size_t size)
    {
        void *p = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        return p == MAP_FAILED ? NULL : p;
    }
    static inline void s2_release(void *p, size_t size) { if (p) munmap(p, size); }
    """
    void *reserve "s2_reserve"(size_t size) noexcept nogil                  # zeroed, or NULL
    void release "s2_release"(void *address, size_t size) noexcept nogil
