/* What all parts of the thread driver share: sizes, atomics that order nothing under TSan, failure, chance. */
#ifndef BASICS_H
#define BASICS_H

#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>

#include "s2shadow/s2shadow.h"

#if defined(__has_feature)
#if __has_feature(thread_sanitizer)
#define UNDER_TSAN 1
#endif
#elif defined(__SANITIZE_THREAD__)
#define UNDER_TSAN 1
#endif

/* What the driver's threads tell each other must not order what the engine does: TSan would take it for the engine's
 * own doing. An x86 machine keeps loads and stores of different threads in order by itself, as far as is needed here. */
#if defined(UNDER_TSAN) && (defined(__x86_64__) || defined(__i386__))
#define ORDER memory_order_relaxed
#else
#define ORDER memory_order_seq_cst
#endif
#define LOAD(object) atomic_load_explicit(&(object), ORDER)
#define STORE(object, value) atomic_store_explicit(&(object), value, ORDER)
#define ADD(object, value) atomic_fetch_add_explicit(&(object), value, ORDER)

typedef _Atomic uint64_t word_t;

enum {
    PAGE = 4096,
    SLOTS = 512,
    SETS = 3,                   /* L1's tables; those of the last one are behind callbacks */
    TWINS = 3,                  /* VMIDs under which each is used */
    ENTRIES = 4,                /* of the level 2 table: three tables, and one that is a block, a table or nothing */
    CELLS = ENTRIES * SLOTS,    /* pages of L2 */
    DATA_PAGES = 1024,          /* of L1: the second half may be one block of the host's */
    EXTRA_PAGES = 16,           /* in a region that comes and goes */
    PAGES = DATA_PAGES + EXTRA_PAGES,
    ZONES = 2,                  /* of DATA, logged apart from each other */
    KEPT = 8,                   /* states of a page that are remembered */
    RUNNERS = 6,
    EDITOR = RUNNERS,           /* vCPUs of other threads */
    CHURNER,
    VCPUS,
    BATCH = 64
};

#define RAM UINT64_C(0x40000000)   /* cIPA of L1's tables: of each the root, level 2, and four of level 3 */
#define FAR UINT64_C(0x50000000)   /* those behind callbacks */
#define DATA UINT64_C(0x60000000)
#define EXTRA (DATA + (uint64_t)DATA_PAGES * PAGE)
#define ROOM 6                     /* pages of one set of tables */

#define RW 0x7FFu                  /* L3 leaf: normal memory, AF, readable and writable */
#define RO 0x77Fu
#define BLOCK 0x7FDu
#define AF 0x400u
#define R_X 37u                    /* S2S_RWX without S2S_WRITE */

/* 4 KiB granule, 39 bits of IPA, from level 1, 48 bits of output, VMID of 16 bits, hardware access flag */
#define VTCR (25 | 1u << 6 | 5u << 16 | 1u << 19 | 1u << 21)

#define IPAS2E1IS 0xD50C8020u
#define IPAS2LE1IS 0xD50C80A0u
#define RIPAS2E1IS 0xD50C8040u
#define RIPAS2LE1IS 0xD50C80C0u
#define VMALLS12E1IS 0xD50C83C0u
#define ALLE1IS 0xD50C8380u

static const s2s_api_t *s2s;
static s2s_vm_t *vm;
static uint64_t seed;
static atomic_int stop;
static _Alignas(PAGE) word_t tables[SETS][ROOM * SLOTS];
static _Alignas(PAGE) uint8_t data[PAGES][PAGE];

/* --- what went wrong ------------------------------------------------------------------------------------------- */

static void __attribute__((noreturn, format(printf, 2, 3))) fail(int line, const char *format, ...)
{
    va_list arguments;
    va_start(arguments, format);
    fprintf(stderr, "driver: seed %llu, line %d: ", (unsigned long long)seed, line);
    vfprintf(stderr, format, arguments);
    fprintf(stderr, " (%s)\n", s2s ? s2s->last_error() : "no table");
    fflush(stderr);
    _Exit(1);
}
#define CHECK(condition) ((condition) ? (void)0 : fail(__LINE__, "%s", #condition))
#define OK(call) CHECK((call) == S2S_OK)

/* --- chance ---------------------------------------------------------------------------------------------------- */

typedef struct {
    uint64_t state;
} dice_t;

static uint64_t roll(dice_t *dice)
{
    dice->state ^= dice->state << 13;
    dice->state ^= dice->state >> 7;
    dice->state ^= dice->state << 17;
    return dice->state * UINT64_C(0x2545F4914F6CDD1D) >> 16;
}

static unsigned below(dice_t *dice, unsigned limit)
{
    return (unsigned)(roll(dice) % limit);
}

static dice_t dice_of(unsigned thread)
{
    dice_t dice = {(seed + 1) * UINT64_C(0x9E3779B97F4A7C15) ^ (thread + 1) * UINT64_C(0xBF58476D1CE4E5B9)};
    if (!dice.state)
        dice.state = 1;
    for (int i = 0; i < 8; i++)
        (void)roll(&dice);
    return dice;
}

#endif
