/* Native threads on one VM, through the C API: vCPUs that fault, an L1 that edits its tables and issues the TLBIs that
 * it owes, a host that maps, unmaps, protects and ages, a migration, contexts and regions that come and go.
 *
 * The engine's modules are extension modules of Python, so an interpreter must start to hand the table of functions
 * out. It is finalized before the first thread is made: no Python code runs beside the threads, there is no GIL, and no
 * interpreter to have one. What stays mapped is the code of libpython and of the modules.
 *
 * Judged while it runs:
 *   - each answer is one that L1's tables and the host allowed at some moment during the call. No PA is used twice, so
 *     a page that was taken shows; each edit is over for L1 when its TLBIs have returned, each change of the host's
 *     when its call has;
 *   - each write that was let through while its page was logged is in a bitmap of a later dirty_log, as a copy by
 *     migration would need it.
 * And when all threads are done: check() holds; what the shadows translate, a fresh VM with the same memory, the same
 * host and the same registers translates to the same; after a fault on both they are equal; nothing is left after
 * unmapping.
 *
 * Usage: driver [--seconds N] [--seed S] [--teardown NAME] [--jobs all|refill] [--race engine|driver]
 * --jobs refill has nothing but TLBIs that empty every shadow, and vCPUs that fill them again all at once.
 * --race breaks the rules on purpose, one vCPU's registers or a counter of this file, for a sanitizer to see.
 */
#include <Python.h>

#include <dirent.h>
#include <pthread.h>
#include <sched.h>
#include <string.h>
#include <time.h>

#include "vcpus.h"

/* --- L2 runs ----------------------------------------------------------------------------------------------------- */

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

/* --- the host migrates ------------------------------------------------------------------------------------------- */

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
    printf("%llu edits of L1's, %llu host changes, %llu populated, %llu switches, %llu passes of migration with %llu "
           "pages and %llu debts paid, %llu rows taken, %llu checks\n",
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
