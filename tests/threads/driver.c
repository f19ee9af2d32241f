/* Native threads on one VM, through the C API: vCPUs that fault, an L1 that edits its tables and issues the TLBIs that it
 * owes, a host that maps, unmaps, protects and ages, a migration, contexts and regions that come and go.
 *
 * The engine's modules are extension modules of Python, so an interpreter must start to hand the table of functions out.
 * It is finalized before the first thread is made: no Python code runs beside the threads, there is no GIL, and no
 * interpreter to have one. What stays mapped is the code of libpython and of the modules.
 *
 * Judged while it runs:
 *   - each answer is one that L1's tables and the host allowed at some moment during the call. PAs are never used twice, so
 *     a page that was taken shows; each edit is over for L1 when its TLBIs have returned, each change of the host's when its
 *     call has;
 *   - each write that was let through while its page was logged is in a bitmap of a later dirty_log, as a copy by migration
 *     would need it.
 * And when all threads are done: check() holds; what the shadows translate, a fresh VM with the same memory, the same host
 * and the same registers translates to the same; after a fault on both they are equal; nothing is left after unmapping.
 *
 * Usage: driver [--seconds N] [--seed S] [--teardown NAME] [--jobs all|refill] [--race engine|driver]
 * --jobs refill has nothing but TLBIs that empty every shadow, and vCPUs that fill them again all at once.
 * --race breaks the rules on purpose, one vCPU's registers or a counter of this file, for a sanitizer to see.
 */
#include <Python.h>

#include <dirent.h>
#include <pthread.h>
#include <sched.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "s2shadow/s2shadow.h"

#if defined(__has_feature)
#if __has_feature(thread_sanitizer)
#define UNDER_TSAN 1
#endif
#elif defined(__SANITIZE_THREAD__)
#define UNDER_TSAN 1
#endif

/* What this file's threads tell each other must not order what the engine's do: TSan would take it for the engine's own
 * doing. An x86 machine keeps loads and stores of different threads in order by itself, as far as is needed here. */
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

/* --- what may be answered of a page, and when ------------------------------------------------------------------ */

/* An output address and what is permitted, from before the call that made it so until the call has returned that made
 * it otherwise. Of each cell only one thread makes states. */
typedef struct {
    word_t what; /* address | permissions; 0: nothing there */
    word_t began;
    word_t ended; /* 0: not yet */
} state_t;

typedef struct {
    word_t count; /* of states so far */
    state_t states[KEPT];
} cell_t;

static word_t now = 1; /* raised when a state ends */
static cell_t of_l1[SETS][CELLS];
static cell_t of_host[PAGES];
static word_t judged, unknown;

static uint64_t current(cell_t *cell)
{
    return LOAD(cell->states[(LOAD(cell->count) + KEPT - 1) % KEPT].what);
}

static void begin_state(cell_t *cell, uint64_t what)
{
    uint64_t count = LOAD(cell->count);
    state_t *state = &cell->states[count % KEPT];
    STORE(state->ended, 0);
    STORE(state->what, what);
    STORE(state->began, LOAD(now));
    STORE(cell->count, count + 1);
}

/* What was there before the newest state is over. */
static void end_state(cell_t *cell)
{
    STORE(cell->states[(LOAD(cell->count) + KEPT - 2) % KEPT].ended, ADD(now, 1) + 1);
}

typedef struct {
    int refuses;      /* else: admits */
    uint64_t address; /* admits: leads there, */
    uint64_t perm;    /* and allows all this; refuses: not all this */
} claim_t;

static int bears_out(uint64_t what, const claim_t *claim)
{
    int allows = !(claim->perm & ~(what & (PAGE - 1)));
    return claim->refuses ? !allows : allows && (what & ~(uint64_t)(PAGE - 1)) == claim->address;
}

/* Whether some state that had not ended at ``start`` bears a claim out. */
static int stood(cell_t *cell, uint64_t start, claim_t claim)
{
    uint64_t newest = LOAD(cell->count), oldest = newest > KEPT ? newest - KEPT : 0, second = 0;
    ADD(judged, 1);
    for (uint64_t i = newest; i > oldest; i--) {
        state_t *state = &cell->states[(i - 1) % KEPT];
        uint64_t what = LOAD(state->what), ended = LOAD(state->ended);
        if (i - 1 == oldest + 1)
            second = LOAD(state->began);
        if ((!ended || ended > start) && bears_out(what, &claim))
            return 1;
    }
    /* What is not remembered any more ended before the second oldest began. Nor must the oldest have been overwritten. */
    if (LOAD(cell->count) == newest && (!oldest || second <= start))
        return 0;
    ADD(unknown, 1);
    return 1;
}

/* --- L1's tables ------------------------------------------------------------------------------------------------ */

static uint64_t tables_at(unsigned set)
{
    return (set == SETS - 1 ? FAR : RAM) + (uint64_t)set * ROOM * PAGE;
}

static uint64_t table_at(unsigned set, unsigned page)
{
    return tables_at(set) + (uint64_t)page * PAGE;
}

static word_t *slot(unsigned set, unsigned cell)
{
    return &tables[set][(2 + cell / SLOTS) * SLOTS + cell % SLOTS];
}

static word_t *word_behind(uint64_t cipa)
{
    uint64_t at = (cipa - tables_at(SETS - 1)) / 8;
    CHECK(at < ROOM * SLOTS);
    return &tables[SETS - 1][at];
}

static int read_word(void *opaque, uint64_t cipa, uint64_t *word)
{
    (void)opaque;
    *word = atomic_load_explicit(word_behind(cipa), memory_order_acquire);
    return 1;
}

static int swap_word(void *opaque, uint64_t cipa, uint64_t *expected, uint64_t desired)
{
    (void)opaque;
    return atomic_compare_exchange_strong(word_behind(cipa), expected, desired) ? S2S_CAS_DONE : S2S_CAS_LOST;
}

static uint64_t data_at(unsigned page)
{
    return DATA + (uint64_t)page * PAGE;
}

/* The state of a page of L2 under a descriptor of its own. */
static uint64_t state_of(uint64_t desc)
{
    return desc & 1 ? (desc & UINT64_C(0xFFFFFFFFF000)) | (desc & 0x80 ? S2S_RWX : R_X) : 0;
}

static uint64_t random_leaf(dice_t *dice)
{
    unsigned kind = below(dice, 16), page = below(dice, 4) ? below(dice, 64) * 16 + below(dice, 2) : below(dice, PAGES);
    uint64_t desc = data_at(page) | (kind < 4 ? RO : RW);
    if (kind == 15)
        return 0;
    return kind > 10 ? desc & ~(uint64_t)AF : desc;
}

static void build_tables(dice_t *dice)
{
    for (unsigned set = 0; set < SETS; set++) {
        STORE(tables[set][0], table_at(set, 1) | 3);
        for (unsigned entry = 0; entry < ENTRIES; entry++)
            STORE(tables[set][SLOTS + entry], table_at(set, 2 + entry) | 3);
        for (unsigned cell = 0; cell < CELLS; cell++) {
            uint64_t desc = random_leaf(dice);
            STORE(*slot(set, cell), desc);
            begin_state(&of_l1[set][cell], state_of(desc));
        }
    }
}

static s2s_registers_t registers_of(unsigned set, unsigned twin)
{
    s2s_registers_t registers = {sizeof registers, 0, tables_at(set) | (uint64_t)(1 + set + SETS * twin) << 48, VTCR,
                                 S2S_HCR_VM, 0};
    return registers;
}

/* --- the host --------------------------------------------------------------------------------------------------- */

static unsigned page_of(uint64_t cipa)
{
    uint64_t page = (cipa - DATA) / PAGE;
    CHECK(cipa >= DATA && page < PAGES);
    return (unsigned)page;
}

/* Where a page is in each of its generations: a block of pages of one generation is contiguous. */
static uint64_t pa_of(unsigned page, uint32_t generation)
{
    return (uint64_t)(generation & 0xFFFFFF) << 23 | (uint64_t)page * PAGE;
}

static word_t populated;

/* The newest state, which the host may be about to put in force: what was resolved before is not mapped after that. */
static int populate(void *opaque, uint64_t cipa, uint32_t access, s2s_mapping_t *mapping)
{
    unsigned page = page_of(cipa), first = DATA_PAGES - SLOTS, i = 0;
    uint64_t what = current(&of_host[page]);
    (void)access, (void)opaque;
    ADD(populated, 1);
    mapping->perm = (uint8_t)(what & (PAGE - 1));
    mapping->pa = what & ~(uint64_t)(PAGE - 1);
    if (page >= first && page < DATA_PAGES) {
        uint64_t start = what - (uint64_t)(page - first) * PAGE;
        while (i < SLOTS && current(&of_host[first + i]) == start + (uint64_t)i * PAGE)
            i++;
        if (i == SLOTS) {
            mapping->pa = start & ~(uint64_t)(PAGE - 1);
            mapping->block = SLOTS * PAGE;
        }
    }
    return what != 0;
}

static s2s_vm_t *new_vm(unsigned teardown, unsigned contexts)
{
    s2s_options_t options;
    s2s_populate_t policy = {.size = sizeof policy, .policy = S2S_POPULATE_CALLBACK, .callback = populate};
    s2s_memory_ops_t ops = {sizeof ops, 0, read_word, swap_word};
    s2s_vm_t *made;
    s2s->options_init(&options, sizeof options);
    options.vcpus = VCPUS;
    options.contexts = contexts;
    options.teardown = (uint8_t)teardown;
    OK(s2s->create(&options, &made));
    OK(s2s->add_ram(made, RAM, (SETS - 1) * ROOM * PAGE, tables, 0));
    OK(s2s->add_callbacks(made, tables_at(SETS - 1), ROOM * PAGE, &ops, NULL, 0));
    OK(s2s->add_ram(made, DATA, DATA_PAGES * PAGE, data, 0));
    OK(s2s->set_populate(made, &policy));
    return made;
}

/* --- migration: what it must find -------------------------------------------------------------------------------- */

/* Sessions of logging are odd. A write that was let through is owed a report by some pass from the one on that was under
 * way, or the next, when it began; and a copy that holds it, if the leaf still let it through after it was made. */
static word_t session[ZONES], passes;
static word_t written[DATA_PAGES];      /* the content of each page, */
static uint64_t copied[DATA_PAGES];     /* and what migration has of it; only its thread looks */
static uint64_t reported[DATA_PAGES];   /* the last pass that had it */
static word_t owed_copy[DATA_PAGES];    /* session << 40 | content */
static word_t owed_report[DATA_PAGES];  /* session << 40 | pass */

typedef struct {
    uint64_t session[ZONES], pass;
} watch_t;

static watch_t watch(void)
{
    watch_t seen;
    for (unsigned zone = 0; zone < ZONES; zone++)
        seen.session[zone] = LOAD(session[zone]);
    seen.pass = LOAD(passes) + 1;
    return seen;
}

static void raise(word_t *word, uint64_t value)
{
    uint64_t old = LOAD(*word);
    while (old < value && !atomic_compare_exchange_weak_explicit(word, &old, value, ORDER, ORDER))
        ;
}

/* Whether a page was logged from then until now. */
static int logged_since(const watch_t *then, unsigned page)
{
    unsigned zone = page * ZONES / DATA_PAGES;
    return page < DATA_PAGES && then->session[zone] & 1 && LOAD(session[zone]) == then->session[zone];
}

static void owe(word_t *owed, const watch_t *then, unsigned page, uint64_t value)
{
    raise(&owed[page], then->session[page * ZONES / DATA_PAGES] << 40 | value);
}

static void copy(unsigned zone)
{
    for (unsigned i = 0; i < DATA_PAGES / ZONES; i++)
        copied[zone * (DATA_PAGES / ZONES) + i] = LOAD(written[zone * (DATA_PAGES / ZONES) + i]);
}

static word_t reports, debts;

/* One dirty_log over some pages of a zone. What was owed before it began must have been paid when it has ended. */
static void migrate(unsigned first, unsigned count)
{
    static uint64_t copies[DATA_PAGES], passes_owed[DATA_PAGES];
    uint8_t bitmap[DATA_PAGES / 8 + 1];
    uint64_t pass = LOAD(passes) + 1, current_session = LOAD(session[first * ZONES / DATA_PAGES]);
    for (unsigned i = first; i < first + count; i++) {
        copies[i] = LOAD(owed_copy[i]);
        passes_owed[i] = LOAD(owed_report[i]);
    }
    OK(s2s->dirty_log(vm, data_at(first), data_at(first + count), bitmap, sizeof bitmap));
    for (unsigned i = first; i < first + count; i++)
        if (bitmap[(i - first) / 8] >> (i - first) % 8 & 1) {
            ADD(reports, 1);
            reported[i] = pass;
            copied[i] = LOAD(written[i]);
        }
    STORE(passes, pass);
    for (unsigned i = first; i < first + count; i++) {
        uint64_t content = copies[i] & ((UINT64_C(1) << 40) - 1), from = passes_owed[i] & ((UINT64_C(1) << 40) - 1);
        if (copies[i] >> 40 == current_session && copied[i] < content)
            fail(__LINE__, "a write to page %u is lost: content %llu, copied %llu", i, (unsigned long long)content,
                 (unsigned long long)copied[i]);
        if (passes_owed[i] >> 40 == current_session && reported[i] < from)
            fail(__LINE__, "a write to page %u since pass %llu is in no bitmap up to pass %llu", i,
                 (unsigned long long)from, (unsigned long long)pass);
        ADD(debts, (copies[i] >> 40 == current_session) + (passes_owed[i] >> 40 == current_session));
    }
}

static void log_zone(unsigned zone, int on)
{
    uint64_t start = data_at(zone * (DATA_PAGES / ZONES)), end = data_at((zone + 1) * (DATA_PAGES / ZONES));
    if (!on)
        ADD(session[zone], 1);
    OK(s2s->log_dirty(vm, start, end, on, NULL));
    if (on) {
        copy(zone);
        ADD(session[zone], 1);
    }
}

static void *migration(void *argument)
{
    dice_t dice = dice_of(100);
    uint8_t own[(SETS * ROOM + 7) / 8];
    (void)argument;
    OK(s2s->log_dirty(vm, RAM, RAM + (SETS - 1) * ROOM * PAGE, 1, NULL)); /* the access flags that we write for L1 */
    while (!LOAD(stop)) {
        unsigned zone = below(&dice, ZONES), base = zone * (DATA_PAGES / ZONES), first, count;
        if (!(LOAD(session[zone]) & 1)) {
            log_zone(zone, 1);
        } else if (!below(&dice, 24)) {
            log_zone(zone, 0);
        } else {
            first = below(&dice, 3) ? 0 : below(&dice, DATA_PAGES / ZONES - 64);
            count = first ? 1 + below(&dice, 64) : DATA_PAGES / ZONES;
            migrate(base + first, count);
        }
        if (!below(&dice, 8))
            OK(s2s->dirty_log(vm, RAM, RAM + (SETS - 1) * ROOM * PAGE, own, sizeof own));
        sched_yield();
    }
    return NULL;
}

/* --- vCPUs ------------------------------------------------------------------------------------------------------ */

static const uint32_t accesses[8] = {S2S_READ, S2S_READ, S2S_WRITE, S2S_WRITE, S2S_WRITE, S2S_EXEC, S2S_EXEC | S2S_EL0,
                                     S2S_READ | S2S_EL0};

static uint64_t needed(uint32_t access)
{
    return (access & (S2S_READ | S2S_WRITE)) | (access & S2S_EXEC ? access & S2S_EL0 ? S2S_EXEC_EL0 : S2S_EXEC : 0);
}

typedef struct {
    uint32_t vcpu;
    unsigned set, twin; /* what it has loaded */
    dice_t dice;
} runner_t;

static runner_t runners[VCPUS];

static word_t kinds[8];

static void wrong(int line, const runner_t *me, uint32_t access, const s2s_fault_t *f)
{
    fail(line, "vCPU %u, tables %u, ipa %#llx, access %u: kind %u, cipa %#llx, pa %#llx, perm %u, level %d", me->vcpu,
         me->set, (unsigned long long)f->ipa, access, f->kind, (unsigned long long)f->cipa, (unsigned long long)f->pa,
         f->perm, f->level);
}
#define ALLOWED(condition) ((condition) ? (void)0 : wrong(__LINE__, me, access, f))

/* An answer to a call that began at ``start``. */
static void judge(const runner_t *me, uint32_t access, const s2s_fault_t *f, uint64_t start)
{
    cell_t *l1 = &of_l1[me->set][f->ipa / PAGE];
    uint64_t need = needed(access), offset = f->ipa % PAGE;
    ADD(kinds[f->kind & 7], 1);
    switch (f->kind) {
    case S2S_HIT:
    case S2S_MAPPED:
        ALLOWED(!(need & ~(uint64_t)f->perm) && f->cipa % PAGE == offset && f->pa % PAGE == offset);
        ALLOWED(stood(l1, start, (claim_t){0, f->cipa - offset, f->perm}));
        ALLOWED(stood(&of_host[page_of(f->cipa)], start, (claim_t){0, f->pa - offset, f->perm}));
        break;
    case S2S_L1_FAULT:
        ALLOWED(stood(l1, start, (claim_t){1, 0, need}));
        break;
    case S2S_HOST_FAULT:
        ALLOWED(stood(l1, start, (claim_t){0, f->cipa - offset, need}));
        ALLOWED(stood(&of_host[page_of(f->cipa)], start, (claim_t){1, 0, need}));
        break;
    case S2S_MMIO: /* of the region that comes and goes */
        ALLOWED(f->cipa >= EXTRA && stood(&of_host[page_of(f->cipa)], start, (claim_t){1, 0, S2S_RWX}));
        break;
    case S2S_RETRY:
    case S2S_MISS:
        break;
    default:
        ALLOWED(0);
    }
}

static int let_through(const s2s_fault_t *f)
{
    return f->kind == S2S_HIT || f->kind == S2S_MAPPED;
}

static void note_write(uint32_t access, const s2s_fault_t *f, const watch_t *then)
{
    unsigned page;
    if (!(access & S2S_WRITE) || !let_through(f))
        return;
    page = page_of(f->cipa);
    if (logged_since(then, page))
        owe(owed_report, then, page, then->pass);
}

static uint64_t random_ipa(dice_t *dice)
{
    unsigned cell = below(dice, 4) ? below(dice, ENTRIES) * SLOTS + below(dice, 24) : below(dice, CELLS);
    return (uint64_t)cell * PAGE + below(dice, PAGE);
}

/* A store of L2's: the fault, the store, and whether the leaf still allows it then. */
static void store(runner_t *me, uint64_t ipa)
{
    watch_t then = watch();
    uint64_t start = LOAD(now), content;
    s2s_fault_t f, again;
    OK(s2s->fault(vm, me->vcpu, ipa, S2S_WRITE, &f));
    judge(me, S2S_WRITE, &f, start);
    note_write(S2S_WRITE, &f, &then);
    if (!let_through(&f) || f.cipa >= EXTRA)
        return;
    content = ADD(written[page_of(f.cipa)], 1) + 1;
    start = LOAD(now);
    OK(s2s->translate(vm, me->vcpu, ipa, S2S_WRITE, &again));
    judge(me, S2S_WRITE, &again, start);
    if (again.kind == S2S_HIT && again.cipa == f.cipa && logged_since(&then, page_of(f.cipa)))
        owe(owed_copy, &then, page_of(f.cipa), content);
}

static void batch(runner_t *me)
{
    uint64_t ipas[BATCH], start, first = random_ipa(&me->dice) / PAGE;
    uint8_t masks[BATCH];
    s2s_fault_t rows[BATCH];
    watch_t then;
    size_t n = 1 + below(&me->dice, BATCH), done, stride = below(&me->dice, 2);
    int neighbours = (int)below(&me->dice, 2);
    for (size_t i = 0; i < n; i++) {
        ipas[i] = neighbours ? (first + i) % CELLS * PAGE : random_ipa(&me->dice);
        masks[i] = (uint8_t)accesses[below(&me->dice, 8)];
    }
    then = watch();
    start = LOAD(now);
    OK(s2s->fault_many(vm, me->vcpu, ipas, masks, stride, rows, n, &done));
    CHECK(done == n);
    for (size_t i = 0; i < n; i++) {
        judge(me, masks[i * stride], &rows[i], start);
        note_write(masks[i * stride], &rows[i], &then);
    }
    start = LOAD(now);
    OK(s2s->translate_many(vm, me->vcpu, ipas, masks, stride, rows, n));
    for (size_t i = 0; i < n; i++)
        judge(me, masks[i * stride], &rows[i], start);
}

static void one(runner_t *me)
{
    uint32_t access = accesses[below(&me->dice, 8)];
    uint64_t ipa = random_ipa(&me->dice), start = LOAD(now);
    watch_t then = watch();
    s2s_fault_t f;
    s2s_walk_t walk;
    OK(s2s->fault(vm, me->vcpu, ipa, access, &f));
    judge(me, access, &f, start);
    note_write(access, &f, &then);
    if (below(&me->dice, 16))
        return;
    start = LOAD(now);
    OK(s2s->walk(vm, me->vcpu, ipa, S2S_READ, (int)below(&me->dice, 2), &walk));
    if (!walk.status)
        CHECK(stood(&of_l1[me->set][ipa / PAGE], start, (claim_t){0, walk.pa - walk.pa % PAGE, S2S_READ}));
}

static void load(runner_t *me, unsigned set, unsigned twin)
{
    s2s_registers_t registers = registers_of(set, twin);
    OK(s2s->load(vm, me->vcpu, &registers, NULL));
    me->set = set;
    me->twin = twin;
}

static void *run_vcpu(void *argument)
{
    runner_t *me = argument;
    int stays = me->vcpu < 4; /* two in one context, one in another, one behind callbacks; the others move */
    load(me, me->vcpu < 2 ? 0 : me->vcpu < 4 ? me->vcpu - 1 : below(&me->dice, SETS), 0);
    while (!LOAD(stop)) {
        unsigned what = below(&me->dice, 16);
        if (!stays && !below(&me->dice, 24)) {
            if (!below(&me->dice, 4))
                OK(s2s->put(vm, me->vcpu));
            load(me, below(&me->dice, SETS), below(&me->dice, TWINS));
        }
        if (what < 3)
            batch(me);
        else if (what < 9)
            store(me, random_ipa(&me->dice));
        else
            one(me);
    }
    return NULL;
}

/* --- L1 edits ---------------------------------------------------------------------------------------------------- */

static uint64_t range_of(unsigned cell, unsigned pages)
{
    uint64_t scale = pages > 64, num = pages / (scale ? 64 : 2) - 1;
    return cell | num << 39 | scale << 44 | UINT64_C(1) << 46;
}

static word_t edits;

/* What L1 owes for [cell, cell + pages), to each VMID that uses these tables. */
static void invalidate(runner_t *me, unsigned set, unsigned cell, unsigned pages, int last_level)
{
    unsigned form = below(&me->dice, 64);
    for (unsigned twin = 0; twin < TWINS; twin++) {
        s2s_registers_t registers = registers_of(set, twin), *under = &registers;
        if (!below(&me->dice, 4)) {
            load(me, set, twin);
            under = NULL; /* as this vCPU has them now */
        }
        if (form == 0) {
            OK(s2s->tlbi(vm, EDITOR, ALLE1IS, 0, under, NULL));
        } else if (form < 4) {
            OK(s2s->tlbi(vm, EDITOR, VMALLS12E1IS, 0, under, NULL));
        } else if (form < 32 || pages > 8) {
            OK(s2s->tlbi(vm, EDITOR, last_level ? RIPAS2LE1IS : RIPAS2E1IS, range_of(cell, pages), under, NULL));
        } else {
            for (unsigned i = 0; i < pages; i++)
                OK(s2s->tlbi(vm, EDITOR, last_level && form < 48 ? IPAS2LE1IS : IPAS2E1IS, cell + i, under, NULL));
        }
    }
}

static void edit_leaves(runner_t *me, unsigned set, int hooked)
{
    unsigned entry = below(&me->dice, ENTRIES - !hooked), pages = 2 + 2 * below(&me->dice, 4);
    unsigned cell = entry * SLOTS + (below(&me->dice, 4) ? below(&me->dice, 24) : below(&me->dice, SLOTS - 8));
    for (unsigned i = 0; i < pages; i++) {
        uint64_t desc = random_leaf(&me->dice);
        begin_state(&of_l1[set][cell + i], state_of(desc));
        atomic_store_explicit(slot(set, cell + i), desc, memory_order_relaxed);
    }
    invalidate(me, set, cell, pages, 1);
    for (unsigned i = 0; i < pages; i++)
        end_state(&of_l1[set][cell + i]);
}

/* The last entry of level 2 becomes something else, break before make. Whether it is a table then. */
static int edit_entry(runner_t *me, unsigned set)
{
    unsigned first = (ENTRIES - 1) * SLOTS, kind = below(&me->dice, 3);
    word_t *entry = &tables[set][SLOTS + ENTRIES - 1];
    uint64_t block = data_at(below(&me->dice, 2) * SLOTS);
    for (unsigned i = 0; i < SLOTS; i++)
        begin_state(&of_l1[set][first + i], 0);
    atomic_store_explicit(entry, 0, memory_order_relaxed);
    invalidate(me, set, first, SLOTS, 0);
    for (unsigned i = 0; i < SLOTS; i++)
        end_state(&of_l1[set][first + i]);
    if (kind == 0)
        return 0;
    for (unsigned i = 0; i < SLOTS; i++)
        begin_state(&of_l1[set][first + i],
                    kind == 1 ? (block + (uint64_t)i * PAGE) | S2S_RWX : state_of(LOAD(*slot(set, first + i))));
    atomic_store_explicit(entry, kind == 1 ? block | BLOCK : table_at(set, 2 + ENTRIES - 1) | 3, memory_order_release);
    for (unsigned i = 0; i < SLOTS; i++)
        end_state(&of_l1[set][first + i]);
    return kind == 2;
}

static void *edit(void *argument)
{
    runner_t *me = argument;
    int hooked[SETS] = {1, 1, 1};
    load(me, 0, 0);
    while (!LOAD(stop)) {
        unsigned set = below(&me->dice, SETS);
        if (below(&me->dice, 40))
            edit_leaves(me, set, hooked[set]);
        else
            hooked[set] = edit_entry(me, set);
        ADD(edits, 1);
        for (int i = 0; i < 4; i++)
            one(me);
    }
    return NULL;
}

/* Shadows are emptied, and the vCPUs make the same tables and nodes again, against each other. */
static void *empty_all(void *argument)
{
    runner_t *me = argument;
    while (!LOAD(stop)) {
        OK(s2s->tlbi(vm, EDITOR, ALLE1IS, 0, NULL, NULL));
        ADD(edits, 1);
        if (!below(&me->dice, 16))
            OK(s2s->check(vm));
        for (unsigned i = below(&me->dice, 8); i; i--)
            sched_yield();
    }
    return NULL;
}

/* --- the host changes -------------------------------------------------------------------------------------------- */

static uint32_t generation[PAGES];
static word_t changes;

static uint32_t next_generation(unsigned first, unsigned count)
{
    uint32_t newest = 0;
    for (unsigned i = first; i < first + count; i++)
        if (generation[i] > newest)
            newest = generation[i];
    for (unsigned i = first; i < first + count; i++)
        generation[i] = newest + 1;
    return newest + 1;
}

static void *notify(void *argument)
{
    static const uint8_t perms[8] = {S2S_RWX, S2S_RWX, S2S_RWX, S2S_READ | S2S_WRITE, S2S_RWX, R_X, S2S_READ, S2S_RWX};
    dice_t dice = dice_of(101);
    uint8_t bitmap[DATA_PAGES / 8];
    (void)argument;
    while (!LOAD(stop)) {
        unsigned what = below(&dice, 32), first, count = 1, size = below(&dice, 64);
        uint8_t perm = perms[below(&dice, 8)];
        uint64_t start, end;
        if (size > 40)
            count = 2 + below(&dice, 15);
        if (size < 2)
            count = SLOTS;
        first = below(&dice, 4) ? below(&dice, 64) * 16 : below(&dice, DATA_PAGES);
        if (count == SLOTS)
            first = size * SLOTS;
        else if (first > DATA_PAGES - count)
            first = DATA_PAGES - count;
        start = data_at(first);
        end = start + (uint64_t)count * PAGE;
        if (what < 28) {
            uint32_t newer = what < 20 ? next_generation(first, count) : 0;
            perm = what < 14 ? S2S_RWX : perm;
            for (unsigned i = first; i < first + count; i++)
                begin_state(&of_host[i], pa_of(i, generation[i]) | perm);
            if (what < 14) /* populate maps it again */
                OK(s2s->host_unmap(vm, start, end, below(&dice, 8) ? S2S_PARTIAL_DEFAULT : S2S_PARTIAL_DROP, NULL));
            else if (what < 20)
                OK(s2s->host_map(vm, start, pa_of(first, newer), end - start, perm, S2S_NORMAL, NULL));
            else
                OK(s2s->host_protect(vm, start, end, perm, NULL));
            for (unsigned i = first; i < first + count; i++)
                end_state(&of_host[i]);
        } else {
            OK((what < 30 ? s2s->age : s2s->test_young)(vm, start, end, bitmap, sizeof bitmap));
        }
        ADD(changes, 1);
    }
    return NULL;
}

/* --- contexts and regions come and go ---------------------------------------------------------------------------- */

static word_t switches;

static void extra_region(int there)
{
    uint32_t newer = next_generation(DATA_PAGES, EXTRA_PAGES);
    for (unsigned i = DATA_PAGES; i < PAGES; i++)
        begin_state(&of_host[i], there ? pa_of(i, newer) | S2S_RWX : 0);
    if (there)
        OK(s2s->add_ram(vm, EXTRA, EXTRA_PAGES * PAGE, data[DATA_PAGES], 0));
    else
        OK(s2s->remove_region(vm, EXTRA, NULL));
    for (unsigned i = DATA_PAGES; i < PAGES; i++)
        end_state(&of_host[i]);
}

static void *churn(void *argument)
{
    runner_t *me = argument;
    int there = 0;
    while (!LOAD(stop)) {
        unsigned set = below(&me->dice, SETS);
        if (below(&me->dice, 3)) {
            load(me, set, below(&me->dice, TWINS));
            for (int i = 0; i < 8; i++)
                one(me);
        } else { /* a VMID that nobody else has, and to which no TLBIs are sent: for its leaves to be recycled */
            s2s_registers_t registers = registers_of(set, TWINS + below(&me->dice, 32));
            uint64_t ipas[8];
            uint8_t access = S2S_READ;
            s2s_fault_t rows[8];
            OK(s2s->load(vm, CHURNER, &registers, NULL));
            for (int i = 0; i < 8; i++)
                ipas[i] = random_ipa(&me->dice);
            OK(s2s->fault_many(vm, CHURNER, ipas, &access, 0, rows, 8, NULL));
        }
        if (!below(&me->dice, 2))
            OK(s2s->put(vm, CHURNER));
        if (!below(&me->dice, 64))
            extra_region(there = !there);
        ADD(switches, 1);
    }
    return NULL;
}

/* --- who looks --------------------------------------------------------------------------------------------------- */

static word_t rows_taken, checks;

static void *drain(void *argument)
{
    dice_t dice = dice_of(102);
    s2s_hw_tlbi_t rows[256];
    s2s_stats_t stats = {.size = sizeof stats};
    uint64_t seq = 0, faults = 0;
    size_t n;
    (void)argument;
    while (!LOAD(stop)) {
        OK(s2s->take_tlbis(vm, rows, 1 + below(&dice, 256), &n));
        for (size_t i = 0; i < n; i++) {
            CHECK(rows[i].seq >= seq);
            seq = rows[i].seq;
        }
        ADD(rows_taken, n);
        if (!below(&dice, 4)) {
            OK(s2s->stats(vm, &stats));
            CHECK(stats.installed - stats.removed == stats.live && stats.faults >= faults);
            faults = stats.faults;
        }
        if (!below(&dice, 32)) {
            OK(s2s->check(vm));
            ADD(checks, 1);
        }
        sched_yield();
    }
    return NULL;
}

/* --- the end: against a fresh VM --------------------------------------------------------------------------------- */

static s2s_fault_t served(s2s_vm_t *by, uint32_t vcpu, uint64_t ipa, uint32_t access)
{
    s2s_fault_t f;
    OK(s2s->fault(by, vcpu, ipa, access, &f));
    return f;
}

static word_t live;

/* What the old VM's vCPU has of a set of tables, against what the fresh one makes of them. */
static void compare(const runner_t *me, s2s_vm_t *fresh)
{
    static const uint32_t each[4] = {S2S_WRITE, S2S_READ, S2S_EXEC, S2S_EXEC | S2S_EL0};
    s2s_registers_t registers = registers_of(me->set, me->twin);
    OK(s2s->load(fresh, 0, &registers, NULL));
    for (uint64_t ipa = 0; ipa < (uint64_t)CELLS * PAGE; ipa += PAGE) {
        s2s_fault_t left[4], old, new;
        for (int i = 0; i < 4; i++)
            OK(s2s->translate(vm, me->vcpu, ipa, each[i], &left[i]));
        for (int i = 0; i < 4; i++) {
            const s2s_fault_t *f = &left[i];
            uint32_t access = each[i];
            new = served(fresh, 0, ipa, access);
            ALLOWED(f->kind == S2S_MISS || (let_through(&new) && f->pa == new.pa && f->cipa == new.cipa));
            ADD(live, f->kind == S2S_HIT);
            old = served(vm, me->vcpu, ipa, access);
            f = &old;
            ALLOWED(let_through(&old) == let_through(&new) && (let_through(&new) || old.kind == new.kind));
            ALLOWED(old.fsc == new.fsc && old.level == new.level && old.hpfar == new.hpfar);
            ALLOWED(!let_through(&new) || (old.pa == new.pa && old.cipa == new.cipa));
        }
        for (int i = 0; i < 4; i++) { /* all that can be had is there now, of both */
            const s2s_fault_t *f = &old;
            uint32_t access = each[i];
            OK(s2s->translate(vm, me->vcpu, ipa, access, &old));
            OK(s2s->translate(fresh, 0, ipa, access, &new));
            ALLOWED(old.kind == new.kind && old.perm == new.perm && old.level == new.level);
            ALLOWED(left[i].kind == S2S_MISS || !(left[i].perm & ~new.perm));
        }
    }
}

static void at_the_end(unsigned teardown)
{
    s2s_vm_t *fresh;
    s2s_stats_t stats = {.size = sizeof stats};
    for (unsigned zone = 0; zone < ZONES; zone++)
        if (LOAD(session[zone]) & 1) {
            migrate(zone * (DATA_PAGES / ZONES), DATA_PAGES / ZONES);
            log_zone(zone, 0);
        }
    OK(s2s->check(vm));
    fresh = new_vm(teardown, VCPUS);
    if (current(&of_host[DATA_PAGES]))
        OK(s2s->add_ram(fresh, EXTRA, EXTRA_PAGES * PAGE, data[DATA_PAGES], 0));
    for (uint32_t vcpu = 0; vcpu < RUNNERS; vcpu++)
        compare(&runners[vcpu], fresh);
    for (unsigned set = 0; set < SETS; set++)
        for (unsigned twin = 0; twin < TWINS; twin++) {
            load(&runners[CHURNER], set, twin);
            compare(&runners[CHURNER], fresh);
        }
    OK(s2s->check(fresh));
    OK(s2s->check(vm));
    OK(s2s->host_unmap(vm, 0, UINT64_C(1) << 48, S2S_PARTIAL_DEFAULT, NULL));
    OK(s2s->check(vm));
    OK(s2s->stats(vm, &stats));
    CHECK(stats.live == 0 && stats.installed == stats.removed && stats.host_leaves == 0);
    s2s->destroy(fresh);
    s2s->destroy(vm);
}

/* --- rules broken on purpose -------------------------------------------------------------------------------------- */

static int unguarded;

static void *count_unguarded(void *argument)
{
    for (int i = 0; i < 10000; i++)
        unguarded++;
    return argument;
}

/* A vCPU's registers are read for a TLBI on one thread and loaded on another: both sides are in the engine. */
static void *load_on(void *argument)
{
    for (int i = 0; i < 2000; i++)
        load(&runners[0], 0, (unsigned)i % TWINS);
    return argument;
}

static void *invalidate_on(void *argument)
{
    for (int i = 0; i < 2000; i++)
        OK(s2s->tlbi(vm, 0, IPAS2E1IS, 0, NULL, NULL));
    return argument;
}

/* --- main --------------------------------------------------------------------------------------------------------- */

static void together(void *(*const jobs[])(void *), void *const arguments[], unsigned count, double seconds)
{
    pthread_t threads[16];
    struct timespec pause = {(time_t)seconds, (long)((seconds - (double)(time_t)seconds) * 1e9)};
    CHECK(count <= 16);
    for (unsigned i = 0; i < count; i++)
        CHECK(!pthread_create(&threads[i], NULL, jobs[i], arguments[i]));
    nanosleep(&pause, NULL);
    STORE(stop, 1);
    for (unsigned i = 0; i < count; i++)
        CHECK(!pthread_join(threads[i], NULL));
}

/* The table of functions; the interpreter that had it is gone afterwards. */
static const s2s_api_t *take_table(void)
{
    const s2s_api_t *table;
    setenv("OPENBLAS_NUM_THREADS", "1", 0); /* numpy's library would keep threads of its own */
    Py_InitializeEx(0);
    table = s2s_import();
    if (table == NULL) {
        PyErr_Print();
        exit(2);
    }
    CHECK(Py_FinalizeEx() == 0 && !Py_IsInitialized());
    return table;
}

/* Threads of this process, as Linux counts them; 1 where it cannot be asked. */
static unsigned thread_count(void)
{
    DIR *tasks = opendir("/proc/self/task");
    const struct dirent *entry;
    unsigned count = 0;
    if (tasks == NULL)
        return 1;
    while ((entry = readdir(tasks)) != NULL)
        count += entry->d_name[0] != '.';
    closedir(tasks);
    return count;
}

static void report(double seconds, const char *teardown)
{
    printf("seed %llu, %s, %.0f s: %llu judged (%llu too late to tell), %llu hits, %llu mapped, %llu L1 faults, "
           "%llu host faults, %llu mmio, %llu retries, %llu misses\n",
           (unsigned long long)seed, teardown, seconds, (unsigned long long)judged, (unsigned long long)unknown,
           (unsigned long long)kinds[S2S_HIT], (unsigned long long)kinds[S2S_MAPPED],
           (unsigned long long)kinds[S2S_L1_FAULT], (unsigned long long)kinds[S2S_HOST_FAULT],
           (unsigned long long)kinds[S2S_MMIO], (unsigned long long)kinds[S2S_RETRY],
           (unsigned long long)kinds[S2S_MISS]);
    printf("%llu edits of L1's, %llu host changes, %llu populated, %llu switches, %llu passes of migration with %llu pages "
           "and %llu debts paid, %llu rows taken, %llu checks\n",
           (unsigned long long)edits, (unsigned long long)changes, (unsigned long long)populated,
           (unsigned long long)switches, (unsigned long long)passes, (unsigned long long)reports,
           (unsigned long long)debts, (unsigned long long)rows_taken, (unsigned long long)checks);
}

int main(int argc, char **argv)
{
    static const char *const names[] = {"reverse-map", "interval-map", "blow-away", "blow-away-lean"};
    void *(*const jobs[])(void *) = {run_vcpu, run_vcpu, run_vcpu, run_vcpu, run_vcpu, run_vcpu,
                                     edit, churn, notify, migration, drain};
    void *(*const refill[])(void *) = {run_vcpu, run_vcpu, run_vcpu, run_vcpu, run_vcpu, run_vcpu, empty_all};
    void *const arguments[] = {&runners[0], &runners[1], &runners[2], &runners[3], &runners[4], &runners[5],
                               &runners[EDITOR], &runners[CHURNER], NULL, NULL, NULL};
    const char *race = "", *set = "all";
    double seconds = 10;
    unsigned teardown = 0;
    seed = (uint64_t)time(NULL);
    for (int i = 1; i < argc; i += 2) {
        CHECK(i + 1 < argc);
        if (!strcmp(argv[i], "--seconds"))
            seconds = atof(argv[i + 1]);
        else if (!strcmp(argv[i], "--seed"))
            seed = strtoull(argv[i + 1], NULL, 10);
        else if (!strcmp(argv[i], "--race"))
            race = argv[i + 1];
        else if (!strcmp(argv[i], "--jobs"))
            set = argv[i + 1];
        else if (!strcmp(argv[i], "--teardown"))
            for (teardown = 0; teardown < 4 && strcmp(names[teardown], argv[i + 1]); teardown++)
                ;
        else
            fail(__LINE__, "no option %s", argv[i]);
    }
    CHECK(teardown < 4);
    s2s = take_table();
#ifndef UNDER_TSAN /* which has a thread of its own */
    CHECK(thread_count() == 1);
#else
    (void)thread_count;
#endif
    dice_t dice = dice_of(103);
    build_tables(&dice);
    for (unsigned i = 0; i < PAGES; i++) {
        generation[i] = i < DATA_PAGES;
        begin_state(&of_host[i], i < DATA_PAGES ? pa_of(i, 1) | S2S_RWX : 0);
    }
    for (uint32_t i = 0; i < VCPUS; i++)
        runners[i] = (runner_t){i, 0, 0, dice_of(i)};
    vm = new_vm(teardown, VCPUS + 2);
    if (*race) {
        void *(*const both[])(void *) = {load_on, invalidate_on};
        void *(*const two[])(void *) = {count_unguarded, count_unguarded};
        together(strcmp(race, "engine") ? two : both, arguments, 2, 0);
        return 0;
    }
    if (!strcmp(set, "refill"))
        together(refill, arguments, sizeof refill / sizeof *refill, seconds);
    else
        together(jobs, arguments, sizeof jobs / sizeof *jobs, seconds);
    report(seconds, names[teardown]);
    CHECK(unknown * 100 <= judged);
    at_the_end(teardown);
    printf("%llu live translations as a fresh VM has them\n", (unsigned long long)live);
    return 0;
}
