# C11-style atomics on plain words. GCC and Clang builtins; ThreadSanitizer understands them.

from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t

cdef extern from *:
    """
    #include <stdint.h>
    /* what only one thread can write just now: atomic for its readers, without a locked instruction */
    static inline uint16_t s2_bump16(uint16_t *p, uint16_t v)
    { uint16_t old = *p; __atomic_store_n(p, (uint16_t)(old + v), __ATOMIC_RELAXED); return old; }
    static inline uint32_t s2_bump32(uint32_t *p, uint32_t v)
    { uint32_t old = *p; __atomic_store_n(p, old + v, __ATOMIC_RELAXED); return old; }
    static inline uint64_t s2_load64(const uint64_t *p) { return __atomic_load_n(p, __ATOMIC_ACQUIRE); }
    static inline uint64_t s2_peek64(const uint64_t *p) { return __atomic_load_n(p, __ATOMIC_RELAXED); }
    static inline uint8_t s2_peek8(const uint8_t *p) { return __atomic_load_n(p, __ATOMIC_RELAXED); }
    static inline void s2_poke8(uint8_t *p, uint8_t v) { __atomic_store_n(p, v, __ATOMIC_RELAXED); }
    static inline void s2_poke32(uint32_t *p, uint32_t v) { __atomic_store_n(p, v, __ATOMIC_RELAXED); }
    static inline void s2_poke64(uint64_t *p, uint64_t v) { __atomic_store_n(p, v, __ATOMIC_RELAXED); }
    static inline void s2_store64(uint64_t *p, uint64_t v) { __atomic_store_n(p, v, __ATOMIC_RELEASE); }
    static inline int s2_cas64(uint64_t *p, uint64_t *expected, uint64_t v)
    { return __atomic_compare_exchange_n(p, expected, v, 0, __ATOMIC_ACQ_REL, __ATOMIC_ACQUIRE); }
    static inline uint64_t s2_or64(uint64_t *p, uint64_t v) { return __atomic_fetch_or(p, v, __ATOMIC_ACQ_REL); }
    static inline uint64_t s2_add64(uint64_t *p, uint64_t v) { return __atomic_fetch_add(p, v, __ATOMIC_ACQ_REL); }
    static inline uint32_t s2_load32(const uint32_t *p) { return __atomic_load_n(p, __ATOMIC_ACQUIRE); }
    static inline uint32_t s2_peek32(const uint32_t *p) { return __atomic_load_n(p, __ATOMIC_RELAXED); }
    static inline void s2_store32(uint32_t *p, uint32_t v) { __atomic_store_n(p, v, __ATOMIC_RELEASE); }
    static inline int s2_cas32(uint32_t *p, uint32_t *expected, uint32_t v)
    { return __atomic_compare_exchange_n(p, expected, v, 0, __ATOMIC_ACQ_REL, __ATOMIC_ACQUIRE); }
    static inline uint32_t s2_add32(uint32_t *p, uint32_t v) { return __atomic_fetch_add(p, v, __ATOMIC_SEQ_CST); }
    static inline uint16_t s2_add16(uint16_t *p, uint16_t v) { return __atomic_fetch_add(p, v, __ATOMIC_ACQ_REL); }
    static inline uint8_t s2_or8(uint8_t *p, uint8_t v) { return __atomic_fetch_or(p, v, __ATOMIC_ACQ_REL); }
    static inline void *s2_loadp(void *const *p) { return __atomic_load_n(p, __ATOMIC_ACQUIRE); }
    static inline void s2_storep(void **p, void *v) { __atomic_store_n(p, v, __ATOMIC_RELEASE); }
    static inline void s2_prefetch(const void *p) { __builtin_prefetch(p); }
    /* gcc and clang know PREFETCHW only where they are told of it; where it is missing it does nothing */
    #ifdef __x86_64__
    static inline void s2_prefetchw(const void *p) { __asm__ volatile("prefetchw %0" : : "m"(*(const char *)p)); }
    #else
    static inline void s2_prefetchw(const void *p) { __builtin_prefetch(p, 1); }
    #endif
    #ifdef S2SHADOW_STRESS
    #include <sched.h>
    static inline void s2_linger(void) { sched_yield(); }
    #else
    static inline void s2_linger(void) {}
    #endif
    """
    void prefetch "s2_prefetch"(const void *address) noexcept nogil         # a hint: never faults
    void prefetch_to_write "s2_prefetchw"(const void *address) noexcept nogil
    void linger "s2_linger"() noexcept nogil        # S2SHADOW_STRESS: let others come between two steps of one thread
    uint64_t load64 "s2_load64"(const uint64_t *address) noexcept nogil
    uint8_t peek8 "s2_peek8"(const uint8_t *address) noexcept nogil
    void poke8 "s2_poke8"(uint8_t *address, uint8_t value) noexcept nogil
    void poke32 "s2_poke32"(uint32_t *address, uint32_t value) noexcept nogil
    void poke64 "s2_poke64"(uint64_t *address, uint64_t value) noexcept nogil
    uint64_t peek64 "s2_peek64"(const uint64_t *address) noexcept nogil
    void store64 "s2_store64"(uint64_t *address, uint64_t value) noexcept nogil
    bint cas64 "s2_cas64"(uint64_t *address, uint64_t *expected, uint64_t value) noexcept nogil
    uint64_t fetch_or64 "s2_or64"(uint64_t *address, uint64_t value) noexcept nogil
    uint64_t fetch_add64 "s2_add64"(uint64_t *address, uint64_t value) noexcept nogil
    uint32_t load32 "s2_load32"(const uint32_t *address) noexcept nogil
    uint32_t peek32 "s2_peek32"(const uint32_t *address) noexcept nogil
    void store32 "s2_store32"(uint32_t *address, uint32_t value) noexcept nogil
    bint cas32 "s2_cas32"(uint32_t *address, uint32_t *expected, uint32_t value) noexcept nogil
    uint32_t fetch_add32 "s2_add32"(uint32_t *address, uint32_t value) noexcept nogil
    uint16_t fetch_add16 "s2_add16"(uint16_t *address, uint16_t value) noexcept nogil
    uint8_t fetch_or8 "s2_or8"(uint8_t *address, uint8_t value) noexcept nogil
    uint16_t bump16 "s2_bump16"(uint16_t *address, uint16_t value) noexcept nogil
    uint32_t bump32 "s2_bump32"(uint32_t *address, uint32_t value) noexcept nogil
    void *load_pointer "s2_loadp"(void *const *address) noexcept nogil
    void store_pointer "s2_storep"(void **address, void *value) noexcept nogil
