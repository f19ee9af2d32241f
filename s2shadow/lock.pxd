# The engine's lock: many on the shared side, one on the exclusive side.
#
# Whoever goes in counts itself on one of a few lines, chosen by vCPU, so that vCPUs seldom write the same one; the
# exclusive side looks at all of them and waits: shared sections are short (a chunk of a batch), so by yielding. The
# turn is a futex of three states (Drepper, "Futexes Are Tricky").
#
# Not pthread_rwlock: its counter is one line for all vCPUs, and a pair of calls costs more than all the rest of a short
# operation.

from libc.stdint cimport uint32_t

cdef extern from *:
    """
    #include <sched.h>
    #include <stdint.h>
    #include <string.h>
    #ifdef __linux__
    #include <linux/futex.h>
    #include <sys/syscall.h>
    #include <unistd.h>
    #endif
    enum { S2_READER_LINES = 4, S2_FREE = 0, S2_TAKEN = 1, S2_WANTED = 2 };
    typedef struct { uint32_t inside; uint8_t pad[124]; } s2_reader_t;   /* two lines: they are fetched in pairs */
    typedef struct {
        uint32_t turn;                  /* not free for the whole of an exclusive section */
        s2_reader_t readers[S2_READER_LINES];
    } s2_lock_t;

    static inline void s2_lock_init(s2_lock_t *l) { memset(l, 0, sizeof *l); }
    static inline s2_reader_t *s2_lock_reader(s2_lock_t *l, uint32_t vcpu)
    { return &l->readers[vcpu % S2_READER_LINES]; }

    static __attribute__((noinline, cold, unused)) void s2_await_turn(s2_lock_t *l)
    {
        while (__atomic_exchange_n(&l->turn, S2_WANTED, __ATOMIC_SEQ_CST) != S2_FREE)
    #ifdef __linux__
            syscall(SYS_futex, &l->turn, FUTEX_WAIT_PRIVATE, S2_WANTED, NULL, NULL, 0);
    #else
            sched_yield();
    #endif
    }
    static inline void s2_take_turn(s2_lock_t *l)
    {
        uint32_t seen = S2_FREE;
        if (!__atomic_compare_exchange_n(&l->turn, &seen, S2_TAKEN, 0, __ATOMIC_SEQ_CST, __ATOMIC_RELAXED))
            s2_await_turn(l);
    }
    static __attribute__((noinline, cold, unused)) void s2_wake_next(s2_lock_t *l)
    {
    #ifdef __linux__
        syscall(SYS_futex, &l->turn, FUTEX_WAKE_PRIVATE, 1, NULL, NULL, 0);
    #endif
    }
    static inline void s2_give_turn(s2_lock_t *l)
    {
        if (__atomic_exchange_n(&l->turn, S2_FREE, __ATOMIC_RELEASE) == S2_WANTED) s2_wake_next(l);
    }

    /* Dekker's handshake: each side writes its own word, then reads the other's, all sequentially consistent. */
    static __attribute__((noinline, cold, unused)) void s2_enter_late(s2_lock_t *l, s2_reader_t *r)
    {
        __atomic_fetch_sub(&r->inside, 1, __ATOMIC_RELEASE);
        s2_take_turn(l);                /* nobody is exclusive while we have it */
        __atomic_fetch_add(&r->inside, 1, __ATOMIC_SEQ_CST);
        s2_give_turn(l);
    }
    static inline void s2_lock_shared(s2_lock_t *l, s2_reader_t *r)
    {
        __atomic_fetch_add(&r->inside, 1, __ATOMIC_SEQ_CST);
        if (__builtin_expect(__atomic_load_n(&l->turn, __ATOMIC_SEQ_CST) != S2_FREE, 0)) s2_enter_late(l, r);
    }
    static inline void s2_unlock_shared(s2_reader_t *r) { __atomic_fetch_sub(&r->inside, 1, __ATOMIC_RELEASE); }

    static __attribute__((noinline, cold, unused)) void s2_await_readers(const s2_lock_t *l)
    {
        for (int i = 0; i < S2_READER_LINES; i++)
            for (int spin = 0; __atomic_load_n(&l->readers[i].inside, __ATOMIC_SEQ_CST); spin++)
                if (spin >= 64) sched_yield();
    }
    static inline void s2_lock_exclusive(s2_lock_t *l)
    {
        uint32_t inside = 0;
        s2_take_turn(l);
    #pragma GCC unroll 4
        for (int i = 0; i < S2_READER_LINES; i++) inside |= __atomic_load_n(&l->readers[i].inside, __ATOMIC_SEQ_CST);
        if (__builtin_expect(inside != 0, 0)) s2_await_readers(l);
    }
    static inline void s2_unlock_exclusive(s2_lock_t *l) { s2_give_turn(l); }
    """
    ctypedef struct reader_t "s2_reader_t":
        pass
    ctypedef struct lock_t "s2_lock_t":
        pass
    void lock_init "s2_lock_init"(lock_t *lock) noexcept nogil
    reader_t *lock_reader "s2_lock_reader"(lock_t *lock, uint32_t vcpu) noexcept nogil
    void lock_shared "s2_lock_shared"(lock_t *lock, reader_t *reader) noexcept nogil
    void unlock_shared "s2_unlock_shared"(reader_t *reader) noexcept nogil
    void lock_exclusive "s2_lock_exclusive"(lock_t *lock) noexcept nogil
    void unlock_exclusive "s2_unlock_exclusive"(lock_t *lock) noexcept nogil
    int sched_yield() noexcept nogil


cdef inline void breathe(lock_t *lock) noexcept nogil:
    """Let others have the lock for a moment, in an exclusive section."""
    unlock_exclusive(lock)
    sched_yield()
    lock_exclusive(lock)


cdef inline void lock_shared_other(lock_t *lock) noexcept nogil:
    """For whoever is no vCPU."""
    lock_shared(lock, lock_reader(lock, 0))


cdef inline void unlock_shared_other(lock_t *lock) noexcept nogil:
    unlock_shared(lock_reader(lock, 0))
