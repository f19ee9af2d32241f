/* Lifetimes of VMs through the C API, without Python but for the start: lifetimes COUNT.
 *
 * Each is made, used and destroyed, or fails somewhere on the way, with what memory, callbacks and policies there are.
 * Afterwards the address space, the maps, the files and the heap of the process must be what they were when a tenth had
 * been lived. Under ASan its allocator counts otherwise, and LeakSanitizer looks at the end. Build: .ci/lifetimes.
 */
#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <dirent.h>
#include <malloc.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include <s2shadow/s2shadow.h>

enum { PAGE = 4096, PAGES = 48 };
#define ROOT UINT64_C(0x1000)
#define LEVEL_2 UINT64_C(0x2000)
#define LEVEL_3 UINT64_C(0x3000)
#define DATA UINT64_C(0x40000)
#define SIZE UINT64_C(0x80000)
#define DEVICE UINT64_C(0x200000)
#define HOST UINT64_C(0x100000000)
#define VTCR (25u | 1u << 6 | 5u << 16 | 1u << 19 | 1u << 21 | 1u << 22) /* 4 KiB, 39 bits, HA and HD */
#define CLEAN_LEAF (UINT64_C(0x3ff) | UINT64_C(1) << 51)                 /* AF 0, writable-clean: the walk sets both */
#define LEAF UINT64_C(0x7ff)

static const s2s_api_t *s2s;
static _Alignas(PAGE) uint64_t words[SIZE / 8];

static void fail(int line, const char *what)
{
    fprintf(stderr, "lifetimes: line %d: %s (%s)\n", line, what, s2s ? s2s->last_error() : "no table");
    exit(1);
}
#define CHECK(condition) ((condition) ? (void)0 : fail(__LINE__, #condition))
#define OK(call) CHECK((call) == S2S_OK)

/* --- one lifetime ---------------------------------------------------------------------------------------------- */

typedef struct {
    s2s_vm_t *vm;
    unsigned shape;
    atomic_int left; /* callbacks that are answered; then they fail */
} life_t;

static void build_tables(void)
{
    memset(words, 0, sizeof words);
    words[ROOT / 8] = LEVEL_2 | 3;
    words[LEVEL_2 / 8] = LEVEL_3 | 3;
    for (uint64_t page = 0; page < PAGES; page++)
        words[LEVEL_3 / 8 + page] = (DATA + page % 32 * PAGE) | (page & 1 ? LEAF : CLEAN_LEAF);
}

static int read_word(void *opaque, uint64_t cipa, uint64_t *word)
{
    life_t *life = opaque;
    *word = __atomic_load_n(words + cipa / 8, __ATOMIC_ACQUIRE);
    return life->left-- > 0;
}

static int swap_word(void *opaque, uint64_t cipa, uint64_t *expected, uint64_t desired)
{
    (void)opaque;
    return __atomic_compare_exchange_n(words + cipa / 8, expected, desired, 0, __ATOMIC_ACQ_REL, __ATOMIC_ACQUIRE)
               ? S2S_CAS_DONE
               : S2S_CAS_LOST;
}

static int populate(void *opaque, uint64_t cipa, uint32_t access, s2s_mapping_t *mapping)
{
    life_t *life = opaque;
    (void)access;
    if (life->left-- <= 0)
        return -1;
    if (cipa == DATA + 7 * PAGE) /* from inside a fault */
        OK(s2s->host_unmap(life->vm, DATA, DATA + 4 * PAGE, S2S_PARTIAL_DEFAULT, NULL));
    mapping->pa = (cipa & ~UINT64_C(0xfff)) + HOST;
    return 1;
}

/* Where callbacks may fail, and memory may be short, that is no failure. */
static void allowed(const life_t *life, int status)
{
    CHECK(status == S2S_OK || status == S2S_E_NO_MEMORY || (status == S2S_E_CALLBACK && life->left <= 0));
}

static void load(life_t *life, uint32_t vcpu, uint64_t vmid)
{
    s2s_registers_t registers = {sizeof registers, 0, ROOT | vmid << 48, VTCR, S2S_HCR_VM, 0};
    OK(s2s->load(life->vm, vcpu, &registers, NULL));
}

static void work(life_t *life)
{
    static uint8_t bits[DATA / PAGE / 8 + 8];
    static s2s_fault_t rows[PAGES];
    uint64_t ipas[PAGES];
    uint8_t access = life->shape & 1 ? S2S_READ : S2S_WRITE;
    s2s_hw_tlbi_t owed[8];
    s2s_stats_t stats = {.size = sizeof stats};
    s2s_walk_t walk;
    size_t n;
    for (unsigned i = 0; i < PAGES; i++)
        ipas[i] = (uint64_t)i * PAGE;
    for (uint64_t vmid = 1; vmid < 5; vmid++) { /* more keys than contexts */
        load(life, 0, vmid);
        allowed(life, s2s->fault_many(life->vm, 0, ipas, &access, 0, rows, PAGES, &n));
    }
    allowed(life, s2s->fault(life->vm, 0, 0, S2S_WRITE, rows));
    OK(s2s->translate_many(life->vm, 0, ipas, &access, 0, rows, PAGES));
    allowed(life, s2s->walk(life->vm, 0, PAGE, S2S_WRITE, 1, &walk));
    OK(s2s->host_unmap(life->vm, DATA, DATA + 4 * PAGE, S2S_PARTIAL_DEFAULT, NULL));
    allowed(life, s2s->host_map(life->vm, DATA, 2 * HOST, PAGE, S2S_RWX, S2S_NORMAL, NULL));
    OK(s2s->host_protect(life->vm, DATA + 8 * PAGE, DATA + 9 * PAGE, S2S_READ, NULL));
    allowed(life, s2s->log_dirty(life->vm, DATA, DATA + 16 * PAGE, 1, NULL));
    allowed(life, s2s->fault(life->vm, 0, 5 * PAGE, S2S_WRITE, rows));
    OK(s2s->dirty_log(life->vm, DATA, DATA + 16 * PAGE, bits, sizeof bits));
    OK(s2s->age(life->vm, DATA, DATA + 16 * PAGE, bits, sizeof bits));
    OK(s2s->tlbi(life->vm, 0, 0xd50c803f, 3, NULL, NULL));
    OK(s2s->take_tlbis(life->vm, owed, life->shape % 9, &n));
    OK(s2s->stats(life->vm, &stats));
    if (life->shape % 16 == 3)
        OK(s2s->check(life->vm));
}

static void *run_beside(void *argument)
{
    life_t *life = argument;
    s2s_fault_t fault;
    load(life, 1, 9);
    for (uint64_t page = 0; page < PAGES; page++)
        allowed(life, s2s->fault(life->vm, 1, page * PAGE, S2S_READ, &fault));
    OK(s2s->put(life->vm, 1));
    return NULL;
}

static void wrong_use(life_t *life)
{
    s2s_memory_ops_t ops = {.size = sizeof ops};
    s2s_fault_t fault;
    CHECK(s2s->add_ram(life->vm, DATA, SIZE, words, 0) == S2S_E_INVALID);
    CHECK(s2s->add_callbacks(life->vm, 8 * SIZE, PAGE, &ops, NULL, 0) == S2S_E_INVALID);
    CHECK(s2s->remove_region(life->vm, 5 * PAGE, NULL) == S2S_E_INVALID);
    CHECK(s2s->fault(life->vm, 99, 0, S2S_READ, &fault) == S2S_E_INVALID);
    CHECK(s2s->host_unmap(life->vm, 1, 2, 0, NULL) == S2S_E_INVALID);
    CHECK(s2s->tlbi(life->vm, 0, 0, 0, NULL, NULL) == S2S_E_UNDEFINED);
}

static void not_made(unsigned shape)
{
    s2s_options_t options;
    s2s_vm_t *vm = NULL;
    s2s->options_init(&options, sizeof options);
    if (shape & 1)
        options.max_table_bytes = PAGE; /* no room for the roots */
    else
        options.vcpus = 0;
    CHECK(s2s->create(&options, &vm) == S2S_E_INVALID && vm == NULL);
}

static void live(unsigned shape)
{
    life_t life = {NULL, shape, shape % 5 ? 1000000 : (int)(shape % 61)};
    s2s_options_t options;
    s2s_populate_t linear = {.size = sizeof linear, .policy = S2S_POPULATE_LINEAR, .offset = (int64_t)HOST};
    s2s_populate_t asked = {.size = sizeof asked, .policy = S2S_POPULATE_CALLBACK, .callback = populate,
                            .opaque = &life};
    s2s_memory_ops_t ops = {sizeof ops, 0, read_word, swap_word};
    int threads = shape % 16 == 7;
    pthread_t beside;
    build_tables();
    s2s->options_init(&options, sizeof options);
    options.vcpus = 1 + threads;
    options.contexts = 2 + threads;
    options.teardown = shape & 3;
    options.tlbi = shape >> 2 & 1;
    options.attributes = shape >> 3 & 1;
    options.track_tlbis = shape % 7 != 0;
    options.max_table_bytes = shape % 3 ? 0 : 1 << 19;
    OK(s2s->create(&options, &life.vm));
    if (shape >> 4 & 1)
        OK(s2s->add_callbacks(life.vm, 0, DATA, &ops, &life, 0));
    else
        OK(s2s->add_ram(life.vm, 0, DATA, words, 0));
    OK(s2s->add_ram(life.vm, DATA, SIZE - DATA, words + DATA / 8, shape & 1 ? S2S_READONLY : 0));
    OK(s2s->add_device(life.vm, DEVICE, PAGE));
    OK(s2s->set_populate(life.vm, shape >> 5 & 1 ? &asked : &linear));
    if (threads)
        CHECK(!pthread_create(&beside, NULL, run_beside, &life));
    work(&life);
    if (threads)
        CHECK(!pthread_join(beside, NULL));
    if (shape % 11 == 0)
        wrong_use(&life);
    if (shape % 13 == 0)
        OK(s2s->remove_region(life.vm, shape & 1 ? DATA : 0, NULL));
    s2s->destroy(life.vm);
}

/* --- what the process holds ------------------------------------------------------------------------------------ */

typedef struct {
    long pages, resident, maps, files;
    size_t heap;
} held_t;

static held_t held(void)
{
    held_t now = {0};
    FILE *file;
    DIR *folder;
#if defined(__GLIBC__) && !defined(__SANITIZE_ADDRESS__)
    malloc_trim(0);
    struct mallinfo2 info = mallinfo2();
    now.heap = info.uordblks + info.hblkhd;
#endif
    CHECK((file = fopen("/proc/self/statm", "r")) != NULL);
    CHECK(fscanf(file, "%ld %ld", &now.pages, &now.resident) == 2);
    fclose(file);
    CHECK((file = fopen("/proc/self/maps", "r")) != NULL);
    for (int c = getc(file); c != EOF; c = getc(file))
        now.maps += c == '\n';
    fclose(file);
    CHECK((folder = opendir("/proc/self/fd")) != NULL);
    while (readdir(folder))
        now.files++;
    closedir(folder);
    return now;
}

static void show(const char *when, held_t h)
{
    printf("%-8s %12ld KiB mapped in %ld maps, %ld KiB resident, %zu bytes of heap, %ld files\n", when,
           h.pages * (PAGE / 1024), h.maps, h.resident * (PAGE / 1024), h.heap, h.files - 3);
}

static int lifetimes(unsigned count)
{
    held_t before = {0}, after;
    for (unsigned i = 0; i < count; i++) {
        if (i == count / 10)
            before = held();
        live(i);
        if (i % 8 == 0)
            not_made(i / 8);
    }
    after = held();
    show("before", before);
    show("after", after);
    CHECK(after.files == before.files);
#ifndef __SANITIZE_ADDRESS__
    /* room for the system's own few pages, and less than the smallest thing of a VM for each of them */
    CHECK(after.maps <= before.maps + 4);
    CHECK(after.pages <= before.pages + 64);
    CHECK(after.resident <= before.resident + 64);
    CHECK(after.heap <= before.heap + 512);
#endif
    printf("%u lifetimes\n", count);
    return 0;
}

int main(int argc, char **argv)
{
    PyThreadState *state;
    int status;
    if (argc != 2 || atoi(argv[1]) < 100) {
        fprintf(stderr, "usage: lifetimes COUNT (100 or more)\n");
        return 2;
    }
    Py_Initialize();
    s2s = s2s_import();
    if (s2s == NULL) {
        PyErr_Print();
        return 1;
    }
    state = PyEval_SaveThread();
    status = lifetimes((unsigned)atoi(argv[1]));
    PyEval_RestoreThread(state);
    return Py_FinalizeEx() ? 1 : status;
}
