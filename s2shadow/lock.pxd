# The engine's lock: many on the shared side, one on the exclusive side.
#
# Whoever goes in counts itself on one of a few lines, chosen by vCPU, so that vCPUs seldom write the same one; the
# exclusive side looks at all of them and waits: shared sections are short (a chunk of a batch), so by yielding. The
# turn is a futex of three states (Drepper, "Futexes Are Tricky").
#
# Who comes to the shared side amid an exclusive section waits awake for a moment, since most sections are short, then
# sleeps. To wake up takes longer than the pause between two exclusive sections: who comes to the exclusive side lets
# those in first who are late, or a long removal in chunks would be one long section to them.
#
# Not pthread_rwlock: its counter is one line for all vCPUs, and a pair of calls costs more than all the rest of a short
# operation.

from libc.stdint cimport uint32_t, uint64_t

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
    enum { S2_AWAKE = 128, S2_PATIENCE = 2048 };    /* some microseconds; longer than it takes to wake up */
    #if defined(__x86_64__)
    #define S2_PAUSE() __builtin_ia32_pause()
    #elif defined(__aarch64__)
    #define S2_PAUSE() __asm__ volatile("isb")
    #else
    #define S2_PAUSE() ((void)0)
    #endif
    typedef struct { uint32_t inside; uint8_t pad[124]; } s2_reader_t;   /* two lines: they are fetched in pairs */
    typedef struct {
        uint32_t turn;                  /* not free for the whole of an exclusive section */
        uint32_t late;                  /* who wait */
        s2_reader_t readers[S2_READER_LINES];
        uint64_t pauses;                /* how often a long operation let others in */
    } s2_lock_t;

    static inline void s2_lock_init(s2_lock_t *l) { memset(l, 0, sizeof *l); }
    static inline s2_reader_t *s2_lock_reader(s2_lock_t *l, uint32_t vcpu)
    { return &l->readers[vcpu % S2_READER_LINES]; }

    static __attribute__((noinline, cold, unused)) void s2_await_turn(s2_lock_t *l)
    {
        __atomic_fetch_add(&l->late, 1, __ATOMIC_RELAXED);
        for (int i = 0; i < S2_AWAKE; i++, S2_PAUSE()) {
            uint32_t seen = S2_FREE;
            if (__atomic_load_n(&l->turn, __ATOMIC_RELAXED) == S2_FREE &&
                __atomic_compare_exchange_n(&l->turn, &seen, S2_TAKEN, 0, __ATOMIC_SEQ_CST, __ATOMIC_RELAXED))
                goto have;
        }
        while (__atomic_exchange_n(&l->turn, S2_WANTED, __ATOMIC_SEQ_CST) != S2_FREE)
    #ifdef __linux__
            syscall(SYS_futex, &l->turn, FUTEX_WAIT_PRIVATE, S2_WANTED, NULL, NULL, 0);
    #else
            sched_yield();
    #endif
    have:
        __atomic_fetch_sub(&l->late, 1, __ATOMIC_RELAXED);
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
        __atomic_fetch_add(&l->late, 1, __ATOMIC_RELAXED);
        for (int i = 0; i < S2_AWAKE; i++, S2_PAUSE()) {
            if (__atomic_load_n(&l->turn, __ATOMIC_RELAXED) != S2_FREE) continue;
            __atomic_fetch_add(&r->inside, 1, __ATOMIC_SEQ_CST);
            if (__atomic_load_n(&l->turn, __ATOMIC_SEQ_CST) == S2_FREE) goto in;
            __atomic_fetch_sub(&r->inside, 1, __ATOMIC_RELEASE);
        }
        s2_take_turn(l);                /* nobody is exclusive while we have it */
        __atomic_fetch_add(&r->inside, 1, __ATOMIC_SEQ_CST);
        s2_give_turn(l);
    in:
        __atomic_fetch_sub(&l->late, 1, __ATOMIC_RELAXED);
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
    static __attribute__((noinline, cold, unused)) void s2_let_in(const s2_lock_t *l)
    {
        uint32_t late = __atomic_load_n(&l->late, __ATOMIC_RELAXED);
        for (int i = 1; i < S2_PATIENCE && __atomic_load_n(&l->late, __ATOMIC_RELAXED) >= late; i++)
            if (i % 256) S2_PAUSE();
            else sched_yield();
    }
    static inline void s2_lock_exclusive(s2_lock_t *l)
    {
        uint32_t inside = 0;
        if (__builtin_expect(__atomic_load_n(&l->late, __ATOMIC_RELAXED) != 0, 0)) s2_let_in(l);
        s2_take_turn(l);
    #pragma GCC unroll 4
        for (int i = 0; i < S2_READER_LINES; i++) inside |= __atomic_load_n(&l->readers[i].inside, __ATOMIC_SEQ_CST);
        if (__builtin_expect(inside != 0, 0)) s2_await_readers(l);
    }
    static inline void s2_unlock_exclusive(s2_lock_t *l) { s2_give_turn(l); }
    /* Out of line: those who may have to are often in the midst of what must be short. */
    static __attribute__((noinline, cold, unused)) void s2_breathe(s2_lock_t *l)
    {
        s2_unlock_exclusive(l);
    #ifdef S2SHADOW_STRESS
        sched_yield();
    #endif
        s2_lock_exclusive(l);
        l->pauses++;
    }
    """
    ctypedef struct reader_t "s2_reader_t":
        pass
    ctypedef struct lock_t "s2_lock_t":
        uint64_t pauses
    void lock_init "s2_lock_init"(lock_t *lock) noexcept nogil
    reader_t *lock_reader "s2_lock_reader"(lock_t *lock, uint32_t vcpu) noexcept nogil
    void lock_shared "s2_lock_shared"(lock_t *lock, reader_t *reader) noexcept nogil
    void unlock_shared "s2_unlock_shared"(reader_t *reader) noexcept nogil
    void lock_exclusive "s2_lock_exclusive"(lock_t *lock) noexcept nogil
    void unlock_exclusive "s2_unlock_exclusive"(lock_t *lock) noexcept nogil
    void breathe "s2_breathe"(lock_t *lock) noexcept nogil      # let those have the lock who wait for it
    int sched_yield() noexcept nogil


cdef inline void lock_shared_other(lock_t *lock) noexcept nogil:
    """For whoever is no vCPU."""
    lock_shared(lock, lock_reader(lock, 0))


cdef inline void unlock_shared_other(lock_t *lock) noexcept nogil:
    unlock_shared(lock_reader(lock, 0))
