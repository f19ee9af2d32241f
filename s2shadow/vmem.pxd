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
    /* Large pages where the system has them, from the second on: what uses less than the first stays as small as it
       is. Arrays fill from the front, so a large page is taken when the one before it is full. */
    static inline void s2_prefer_huge(void *p, size_t size)
    {
    #ifdef MADV_HUGEPAGE
        const size_t huge = (size_t)2 << 20;
        if (size > 2 * huge) madvise((char *)p + huge, size - huge, MADV_HUGEPAGE);
    #else
        (void)p; (void)size;
    #endif
    }
    static inline void s2_release(void *p, size_t size) { if (p) munmap(p, size); }
    """
    void *reserve "s2_reserve"(size_t size) noexcept nogil                  # zeroed, or NULL
    void prefer_huge "s2_prefer_huge"(void *address, size_t size) noexcept nogil
    void release "s2_release"(void *address, size_t size) noexcept nogil
