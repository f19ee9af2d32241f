"""Memory from the system, and its refusal."""

from libc.stdint cimport int64_t
from libc.stdlib cimport calloc

cdef extern from *:
    """
    #include <stdint.h>
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
    static int64_t s2_asked, s2_refuse_from, s2_refuse_to;      /* in the order of asking; from 0: refuse nothing */
    static inline int s2_refused(void)
    {
        int64_t from = __atomic_load_n(&s2_refuse_from, __ATOMIC_RELAXED), n;
        if (!from)
            return 0;
        n = __atomic_add_fetch(&s2_asked, 1, __ATOMIC_RELAXED);
        return n >= from && n < __atomic_load_n(&s2_refuse_to, __ATOMIC_RELAXED);
    }
    """
    void *s2_reserve(size_t size) noexcept nogil
    void s2_prefer_huge(void *address, size_t size) noexcept nogil
    bint s2_refused() noexcept nogil
    int munmap(void *address, size_t size) noexcept nogil
    int64_t s2_asked
    int64_t s2_refuse_from
    int64_t s2_refuse_to


cdef bint refused() noexcept nogil:
    return s2_refused()


cdef void *reserve(size_t size) noexcept nogil:
    return NULL if s2_refused() else s2_reserve(size)


cdef void prefer_huge(void *address, size_t size) noexcept nogil:
    s2_prefer_huge(address, size)


cdef void release(void *address, size_t size) noexcept nogil:
    if address != NULL:
        munmap(address, size)


cdef void *allocate(size_t count, size_t size) noexcept nogil:
    return NULL if s2_refused() else calloc(count, size)


def refuse(int64_t nth, int64_t count=1):
    """For tests: of the allocations from now on, in any engine of this process, refuse ``count`` from the ``nth`` on
    (from 1); 0 refuses none. Returns how many were asked for since the last call, 0 if it refused none."""
    global s2_asked, s2_refuse_from, s2_refuse_to
    asked = s2_asked
    s2_refuse_from = 0
    s2_asked = 0
    s2_refuse_to = nth + count
    s2_refuse_from = nth
    return asked
