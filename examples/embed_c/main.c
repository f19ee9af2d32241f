/* s2shadow inside a C program: the MMU of a simulator that owns the memory of its guest hypervisor.
 *
 * CPython is embedded only to find the table of functions. From then on the interpreter lock is let go, and nothing
 * below knows of Python. L1's stage-2 tables are built in this program's own memory; a million faults are served,
 * checked one by one against what the tables say; pages are taken away, TLBIs issued, dirty pages found, two vCPUs run
 * against a storm of notifiers, and the same tables are read once more through callbacks.
 *
 *     make && ./embed            (make CFLAGS="-O1 -g -fsanitize=address,undefined" for the sanitizers)
 */
#include <Python.h>

#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>

#include "s2shadow/s2shadow.h"

#define PAGE 4096ull
#define PAGES 131072ull           /* of L2, one after the other from IPA 0: 512 MiB */
#define ROUNDS 8                  /* times all of them: 2^20 faults */
#define TABLES 0x1000000ull       /* cIPA of L1's tables: the root, one table of level 2, and those of level 3 */
#define DATA 0x40000000ull        /* cIPA of the pages that they map */
#define HOST_OFFSET 0x800000000ull
#define DESC_PAGE 0x7ffull        /* valid, page, MemAttr 1111, S2AP rw, SH inner, AF */

/* 4 KiB granule, 39 bits of IPA, tables from level 1 on, 48 bits of output, VMID of 16 bits */
#define VTCR (25ull | 1ull << 6 | 5ull << 16 | 1ull << 19)
#define VMID 7ull

#define TLBI_VMALLS12E1IS 0xd50c83dfu
#define TLBI_IPAS2E1IS 0xd50c803fu

static const s2s_api_t *s2s;
static uint64_t *tables;          /* what stands at cIPA TABLES */
static atomic_uint moves[PAGES];  /* how often the host has moved each page of DATA */

static void fail(int line, const char *what)
{
    fprintf(stderr, "embed: line %d: %s (%s)\n", line, what, s2s ? s2s->last_error() : "no table");
    exit(1);
}
#define CHECK(condition) ((condition) ? (void)0 : fail(__LINE__, #condition))
#define OK(call) CHECK((call) == S2S_OK)

static double now(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec * 1e9 + (double)t.tv_nsec;
}

/* --- L1's side ------------------------------------------------------------------------------------------------- */

/* The page of DATA that a page of L2 is on: any permutation will do, and this one leaves no two neighbours together. */
static uint64_t frame_of(uint64_t page)
{
    return page * 40503u % PAGES;
}

static uint64_t cipa_of(uint64_t page)
{
    return DATA + frame_of(page) * PAGE;
}

static uint64_t *leaf_of(uint64_t page)
{
    return tables + 512 * 2 + page; /* the tables of level 3 stand side by side behind root and level 2 */
}

static void build_tables(void)
{
    tables[0] = (TABLES + PAGE) | 3;
    for (uint64_t i = 0; i < PAGES / 512; i++)
        tables[512 + i] = (TABLES + (2 + i) * PAGE) | 3;
    for (uint64_t page = 0; page < PAGES; page++)
        *leaf_of(page) = cipa_of(page) | DESC_PAGE;
}

static void enter_l2(s2s_vm_t *vm, uint32_t vcpu)
{
    s2s_registers_t registers = {sizeof registers, 0, TABLES | VMID << 48, VTCR, S2S_HCR_VM, 0};
    OK(s2s->load(vm, vcpu, &registers, NULL));
}

static uint64_t tlbi(s2s_vm_t *vm, uint32_t word, uint64_t operand)
{
    s2s_tlbi_result_t result;
    OK(s2s->tlbi(vm, 0, word, operand, NULL, &result));
    return result.removed;
}

/* --- the host's side ------------------------------------------------------------------------------------------- */

/* Where the host keeps a page of DATA: each move takes it 1 GiB further. */
static uint64_t pa_of(uint64_t cipa)
{
    return cipa + HOST_OFFSET + ((uint64_t)moves[(cipa - DATA) / PAGE] << 30);
}

static int populate(void *opaque, uint64_t cipa, uint32_t access, s2s_mapping_t *mapping)
{
    (void)access;
    ++*(atomic_ulong *)opaque;
    mapping->pa = pa_of(cipa & ~(PAGE - 1));
    return 1;
}

static s2s_vm_t *new_vm(uint32_t vcpus, atomic_ulong *populated)
{
    s2s_options_t options;
    s2s_populate_t policy = {sizeof policy, S2S_POPULATE_CALLBACK, 0, 0, 0, 0, populate, populated};
    s2s_vm_t *vm;
    s2s->options_init(&options, sizeof options);
    options.vcpus = vcpus;
    OK(s2s->create(&options, &vm));
    OK(s2s->set_populate(vm, &policy));
    return vm;
}

/* --- what is shown --------------------------------------------------------------------------------------------- */

/* Every answer against what L1's tables and the host say; how many ns one fault took, the check included. */
static double fault_all(s2s_vm_t *vm, uint32_t vcpu, uint8_t kind)
{
    s2s_fault_t fault;
    double began = now();
    for (uint64_t page = 0; page < PAGES; page++) {
        uint64_t ipa = page * PAGE + (page & 0xff8);
        OK(s2s->fault(vm, vcpu, ipa, S2S_READ, &fault));
        CHECK(fault.kind == kind);
        CHECK(fault.cipa == cipa_of(page) + (page & 0xff8));
        CHECK(fault.pa == pa_of(cipa_of(page)) + (page & 0xff8));
        CHECK(fault.size == PAGE && (fault.perm & (S2S_READ | S2S_WRITE)) == (S2S_READ | S2S_WRITE));
    }
    return (now() - began) / (double)PAGES;
}

static void million_faults(s2s_vm_t *vm)
{
    double cold = fault_all(vm, 0, S2S_MAPPED), mapped = 0, hit;
    for (int round = 1; round < ROUNDS; round++) {
        CHECK(tlbi(vm, TLBI_VMALLS12E1IS, 0) == PAGES);
        mapped += fault_all(vm, 0, S2S_MAPPED) / (ROUNDS - 1);
    }
    hit = fault_all(vm, 0, S2S_HIT);
    printf("%llu faults served: %.0f ns with the host's page, %.0f ns refilled, %.0f ns where the shadow has it\n",
           ROUNDS * PAGES, cold, mapped, hit);
}

/* Drain the queue; whether some row up to ``ticket`` covers ``ipa``. */
static int hardware_told(s2s_vm_t *vm, uint64_t ipa, uint64_t ticket)
{
    s2s_hw_tlbi_t rows[64];
    size_t n;
    int told = 0;
    do {
        OK(s2s->take_tlbis(vm, rows, 64, &n));
        for (size_t i = 0; i < n; i++)
            told |= rows[i].seq <= ticket &&
                    (rows[i].op == S2S_HW_VMALLS12 ||
                     (rows[i].op == S2S_HW_IPA && rows[i].start <= ipa && ipa < rows[i].end));
    } while (n);
    return told;
}

/* The host moves pages: the shadow must forget exactly those, and say so to the hardware. */
static void notifiers(s2s_vm_t *vm)
{
    const int events = 20000;
    s2s_change_t change;
    s2s_fault_t fault;
    double spent = 0;
    (void)hardware_told(vm, 0, 0);
    for (int i = 0; i < events; i++) {
        uint64_t page = (uint64_t)i * 7919 % PAGES, cipa = cipa_of(page), began;
        double start = now();
        OK(s2s->host_unmap(vm, cipa, cipa + PAGE, S2S_PARTIAL_DEFAULT, &change));
        spent += now() - start;
        began = moves[frame_of(page)]++;
        CHECK(change.leaves == 1);
        CHECK(hardware_told(vm, page * PAGE, change.ticket));
        OK(s2s->translate(vm, 0, page * PAGE, S2S_READ, &fault));
        CHECK(fault.kind == S2S_MISS);
        OK(s2s->fault(vm, 0, page * PAGE, S2S_READ, &fault));
        CHECK(fault.kind == S2S_MAPPED && fault.pa == cipa + HOST_OFFSET + ((began + 1) << 30));
    }
    printf("%d notifiers: %.0f ns each, every page refilled at its new place\n", events, spent / events);
}

/* L1 moves pages of L2: the old translation stays until the TLBI, and goes with it. */
static void l1_moves_pages(s2s_vm_t *vm)
{
    s2s_fault_t fault;
    for (uint64_t page = 0; page < 1000; page++) {
        uint64_t other = PAGES - 1 - page;
        *leaf_of(page) = cipa_of(other) | DESC_PAGE;
        OK(s2s->fault(vm, 0, page * PAGE, S2S_READ, &fault));
        CHECK(fault.kind == S2S_HIT && fault.cipa == cipa_of(page));
        CHECK(tlbi(vm, TLBI_IPAS2E1IS, page) == 1);
        OK(s2s->fault(vm, 0, page * PAGE, S2S_READ, &fault));
        CHECK(fault.kind == S2S_MAPPED && fault.cipa == cipa_of(other));
        *leaf_of(page) = 0; /* and takes it away altogether */
        CHECK(tlbi(vm, TLBI_IPAS2E1IS, page) == 1);
        OK(s2s->fault(vm, 0, page * PAGE, S2S_READ, &fault));
        CHECK(fault.kind == S2S_L1_FAULT && fault.fsc == 0x07 && fault.level == 3);
        CHECK(fault.hpfar == page << 4);
        *leaf_of(page) = cipa_of(page) | DESC_PAGE;
        OK(s2s->fault(vm, 0, page * PAGE, S2S_READ, &fault));
        CHECK(fault.kind == S2S_MAPPED && fault.pa == pa_of(cipa_of(page)));
    }
    puts("1000 pages moved and taken by L1: nothing stale after its TLBIs, its faults told");
}

/* Live migration: what L2 writes while logging is on is reported once, and nothing else. */
static void migration(s2s_vm_t *vm)
{
    static uint8_t bitmap[PAGES / 8], written[PAGES / 8];
    s2s_fault_t fault;
    OK(s2s->log_dirty(vm, DATA, DATA + PAGES * PAGE, 1, NULL));
    for (uint64_t page = 0; page < PAGES; page += 13) {
        OK(s2s->fault(vm, 0, page * PAGE, S2S_WRITE, &fault));
        CHECK(fault.kind == S2S_MAPPED && fault.perm & S2S_WRITE);
        written[frame_of(page) / 8] |= (uint8_t)(1 << frame_of(page) % 8);
    }
    OK(s2s->dirty_log(vm, DATA, DATA + PAGES * PAGE, bitmap, sizeof bitmap));
    CHECK(!memcmp(bitmap, written, sizeof bitmap));
    OK(s2s->dirty_log(vm, DATA, DATA + PAGES * PAGE, bitmap, sizeof bitmap));
    for (uint64_t i = 0; i < sizeof bitmap; i++)
        CHECK(!bitmap[i]);
    OK(s2s->log_dirty(vm, DATA, DATA + PAGES * PAGE, 0, NULL));
    OK(s2s->age(vm, DATA, DATA + PAGES * PAGE, bitmap, sizeof bitmap));
    CHECK(bitmap[frame_of(0) / 8] >> frame_of(0) % 8 & 1);
    OK(s2s->test_young(vm, DATA, DATA + PAGES * PAGE, bitmap, sizeof bitmap));
    CHECK(!bitmap[frame_of(0) / 8]);
    puts("dirty log: each page that was written, and no other");
}

/* --- threads --------------------------------------------------------------------------------------------------- */

typedef struct {
    s2s_vm_t *vm;
    uint32_t vcpu;
    uint64_t served;
} runner_t;

static void *run_vcpu(void *argument)
{
    runner_t *runner = argument;
    s2s_fault_t fault;
    enter_l2(runner->vm, runner->vcpu);
    for (int round = 0; round < 2; round++)
        for (uint64_t page = 0; page < PAGES; page++) {
            OK(s2s->fault(runner->vm, runner->vcpu, page * PAGE, S2S_READ, &fault));
            CHECK(fault.kind == S2S_HIT || fault.kind == S2S_MAPPED || fault.kind == S2S_RETRY);
            if (fault.kind != S2S_RETRY) {
                CHECK(fault.cipa == cipa_of(page));
                runner->served++;
            }
        }
    OK(s2s->put(runner->vm, runner->vcpu));
    return NULL;
}

static void two_vcpus_and_a_storm(void)
{
    atomic_ulong populated = 0;
    s2s_vm_t *vm = new_vm(2, &populated);
    runner_t runners[2] = {{vm, 0, 0}, {vm, 1, 0}};
    s2s_stats_t stats = {.size = sizeof stats};
    pthread_t threads[2];
    OK(s2s->add_ram(vm, TABLES, 4 << 20, tables, 0));
    OK(s2s->add_ram(vm, DATA, PAGES * PAGE, (char *)tables + (4 << 20), 0));
    for (int i = 0; i < 2; i++)
        CHECK(!pthread_create(&threads[i], NULL, run_vcpu, &runners[i]));
    for (uint64_t i = 0; i < 20000; i++) {
        uint64_t cipa = DATA + i * 104729 % PAGES * PAGE;
        OK(s2s->host_unmap(vm, cipa, cipa + PAGE, S2S_PARTIAL_DEFAULT, NULL));
        moves[(cipa - DATA) / PAGE]++;
    }
    for (int i = 0; i < 2; i++)
        CHECK(!pthread_join(threads[i], NULL));
    OK(s2s->check(vm));
    OK(s2s->stats(vm, &stats));
    CHECK(stats.faults == 4 * PAGES && stats.hits + stats.mapped == runners[0].served + runners[1].served);
    CHECK(stats.installed - stats.removed == stats.live);
    printf("2 vCPUs, 20000 notifiers meanwhile: %llu served, %llu to try again, every invariant holds\n",
           (unsigned long long)(stats.hits + stats.mapped), (unsigned long long)stats.retries);
    s2s->destroy(vm);
}

/* --- memory that only callbacks can read ------------------------------------------------------------------------ */

static int read_word(void *opaque, uint64_t cipa, uint64_t *word)
{
    ++*(uint64_t *)opaque;
    *word = __atomic_load_n(tables + (cipa - TABLES) / 8, __ATOMIC_ACQUIRE);
    return 1;
}

static int swap_word(void *opaque, uint64_t cipa, uint64_t *expected, uint64_t desired)
{
    ++*(uint64_t *)opaque;
    return __atomic_compare_exchange_n(tables + (cipa - TABLES) / 8, expected, desired, 0, __ATOMIC_ACQ_REL,
                                       __ATOMIC_ACQUIRE)
               ? S2S_CAS_DONE
               : S2S_CAS_LOST;
}

static void through_callbacks(void)
{
    atomic_ulong populated = 0;
    uint64_t calls = 0;
    s2s_memory_ops_t ops = {sizeof ops, 0, read_word, swap_word};
    s2s_vm_t *vm = new_vm(1, &populated);
    s2s_change_t change;
    s2s_fault_t fault;
    double spent;
    OK(s2s->add_callbacks(vm, TABLES, 4 << 20, &ops, &calls, 0));
    OK(s2s->add_ram(vm, DATA, PAGES * PAGE, (char *)tables + (4 << 20), 0));
    enter_l2(vm, 0);
    spent = fault_all(vm, 0, S2S_MAPPED);
    CHECK(calls == 3 * PAGES && populated == PAGES); /* three levels, each read once */
    OK(s2s->check(vm));
    OK(s2s->remove_region(vm, DATA, &change));
    CHECK(change.leaves == PAGES);
    OK(s2s->fault(vm, 0, 0, S2S_READ, &fault));
    CHECK(fault.kind == S2S_MMIO);
    s2s->destroy(vm);
    printf("tables behind callbacks: %.0f ns a fault, the same answers\n", spent);
}

/* --------------------------------------------------------------------------------------------------------------- */

static void embed(void)
{
    atomic_ulong populated = 0;
    s2s_vm_t *vm = new_vm(1, &populated);
    char *memory = mmap(NULL, (4 << 20) + PAGES * PAGE, PROT_READ | PROT_WRITE,
                        MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    CHECK(memory != MAP_FAILED);
    tables = (uint64_t *)memory;
    build_tables();
    OK(s2s->add_ram(vm, TABLES, 4 << 20, tables, 0));
    OK(s2s->add_ram(vm, DATA, PAGES * PAGE, memory + (4 << 20), 0));
    CHECK(s2s->add_ram(vm, DATA, PAGE, memory, 0) == S2S_E_INVALID); /* an error says what and changes nothing */
    CHECK(strstr(s2s->last_error(), "overlaps") != NULL);
    enter_l2(vm, 0);
    million_faults(vm);
    CHECK(populated == PAGES);
    notifiers(vm);
    l1_moves_pages(vm);
    migration(vm);
    OK(s2s->check(vm));
    s2s->destroy(vm);
    two_vcpus_and_a_storm();
    through_callbacks();
    munmap(memory, (4 << 20) + PAGES * PAGE);
}

int main(void)
{
    PyThreadState *state;
    Py_Initialize();
    s2s = s2s_import();
    if (s2s == NULL) {
        PyErr_Print();
        return 1;
    }
    state = PyEval_SaveThread(); /* the interpreter may do what it likes meanwhile */
    embed();
    PyEval_RestoreThread(state);
    return Py_FinalizeEx() ? 1 : 0;
}
