/* The engine under libFuzzer, through its C API: a program of operations of a hostile L1 and of its host.
 *
 * Python gives the table once, at the start, and takes no part afterwards. A model holds what the host maps of each
 * page; every answer of the engine must lie inside it, at once and after the program, and check() must hold. Build and
 * options: .ci/long/fuzz. With -DREPLAY_ONLY it is a program without libFuzzer that runs the files it is given; with
 * -DLIE=… its model is wrong on purpose, and a run that ends well has seen nothing.
 */
#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <s2shadow/s2shadow.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { PAGE = 4096, RAM_PAGES = 32, ROM_PAGES = 4, TABLES = 16, MODEL_PAGES = 1024, IPAS = 128 };
#define RAM UINT64_C(0x40000000)
#define ROM (RAM + RAM_PAGES * PAGE)
#define DEVICE (ROM + ROM_PAGES * PAGE)
#define HOST UINT64_C(0x1000000000)
#define VTCR UINT64_C(0x80023558)

enum { NO_LIE, ANOTHER_PAGE, NO_PERMISSIONS, NO_UNMAP };
#ifndef LIE
#define LIE NO_LIE
#endif

static const s2s_api_t *api;
static _Alignas(PAGE) uint8_t ram[RAM_PAGES * PAGE];
static _Alignas(PAGE) uint8_t rom[ROM_PAGES * PAGE];

static void die(const char *what)
{
    fprintf(stderr, "%s: %s\n", what, api->last_error());
    abort();
}

/* --- input: past its end everything is 0 ----------------------------------------------------------------------- */

typedef struct {
    const uint8_t *at, *end;
} input_t;

static uint8_t byte(input_t *in)
{
    return in->at < in->end ? *in->at++ : 0;
}

static uint64_t word(input_t *in, int bytes)
{
    uint64_t value = 0;
    for (int i = 0; i < bytes; i++)
        value |= (uint64_t)byte(in) << 8 * i;
    return value;
}

static uint64_t page_address(input_t *in)
{
    uint8_t kind = byte(in);
    return kind < 0xF0 ? RAM + kind % (RAM_PAGES + 8) * PAGE : word(in, 7) & ~(uint64_t)0xFFF;
}

static uint64_t descriptor(input_t *in)
{
    uint8_t kind = byte(in), high;
    uint64_t low;
    if (kind >= 0xF8)
        return word(in, 8);
    low = word(in, 2);
    high = byte(in);
    if (kind < 0x60)
        return page_address(in) | 3 | (low & 0xFFC);
    if (kind < 0xC0)
        return page_address(in) | 0x7C0 | (low & 0x3F) | (uint64_t)high << 51;
    return page_address(in) | (low & 0xFFF) | (uint64_t)high << 56 | (low & 0xF000) << 36;
}

static uint64_t vtcr(input_t *in)
{
    static const uint64_t sound[4] = {VTCR, 0x80023598, 0x80023590, 0x80023518};
    uint8_t kind = byte(in);
    uint64_t value;
    if (kind < 0x20)
        return word(in, 8);
    value = sound[kind & 3] | (uint64_t)(kind & 0x10) << 17 | (uint64_t)(kind & 4) << 20;
    return kind & 8 ? (value & ~(uint64_t)0x3F) | (byte(in) & 0x3F) : value;
}

static uint64_t vttbr(input_t *in)
{
    uint8_t value = byte(in);
    return (uint64_t)(value & 7) << 48 | (RAM + (value >> 3 & 3) * PAGE * (value & 0x20 ? 2 : 1)) | value >> 6;
}

static uint64_t hcr(input_t *in)
{
    uint8_t value = byte(in);
    if (value < 0x80)
        return S2S_HCR_VM;
    return value >= 0xF0 ? word(in, 8)
                         : (uint64_t)(value & 1) | (uint64_t)(value & 2) << 45 | (uint64_t)(value & 4) << 30;
}

static uint64_t small_ipa(unsigned at)
{
    return (uint64_t)(at & 7) << 12 | (uint64_t)(at >> 3 & 3) << 21 | (uint64_t)(at >> 5 & 3) << 30;
}

static uint64_t ipa(input_t *in)
{
    uint8_t kind = byte(in);
    if (kind < IPAS)
        return small_ipa(kind);
    return kind >= 0xF8 ? word(in, 8) : word(in, 6) & ((UINT64_C(1) << (kind & 0x3F)) - 1);
}

/* --- the machine and its model --------------------------------------------------------------------------------- */

typedef struct {
    s2s_vm_t *vm;
    int populate;                   /* pages that the model does not know may be at cipa + HOST */
    uint64_t pa[MODEL_PAGES];       /* of a mapped page */
    uint8_t mapped[MODEL_PAGES];
    uint8_t perm[MODEL_PAGES];
} machine_t;

static unsigned model_page(uint64_t cipa)
{
    return cipa < RAM || (cipa - RAM) / PAGE >= MODEL_PAGES ? MODEL_PAGES : (unsigned)((cipa - RAM) / PAGE);
}

/* An answer of the engine is inside what the host maps now, and allows no more. */
static void expect_inside(const machine_t *m, const s2s_fault_t *f)
{
    unsigned at = model_page(f->cipa);
    if (f->kind != S2S_HIT && f->kind != S2S_MAPPED)
        return;
    if (at < MODEL_PAGES && m->mapped[at]) {
        uint64_t pa = m->pa[at] + (LIE == ANOTHER_PAGE ? PAGE : 0);
        uint8_t perm = LIE == NO_PERMISSIONS ? 0 : m->perm[at];
        if (f->pa - f->cipa % PAGE != pa || f->perm & ~perm)
            die("not where the host has it, or more than it allows");
    } else if (!m->populate || f->pa != f->cipa + HOST)
        die("the host does not have it");
}

static void expect(int status, int allowed)
{
    if (status != S2S_OK && status != allowed && status != S2S_E_NO_MEMORY)
        die("status");
}

static void extent(input_t *in, uint64_t *start, uint64_t *end)
{
    uint8_t length;
    *start = RAM + byte(in) % (RAM_PAGES + 8) * PAGE;
    length = byte(in);
    *end = *start + (length < 0xF0 ? 1 + length % 16 : 512) * PAGE;
}

static void load(machine_t *m, uint32_t vcpu, uint64_t vttbr_, uint64_t vtcr_, uint64_t hcr_, int big_endian)
{
    s2s_registers_t registers = {sizeof registers, big_endian, vttbr_, vtcr_, hcr_, 0x123456789ABCDEF0};
    expect(api->load(m->vm, vcpu, &registers, NULL), S2S_OK);
}

static void fault(machine_t *m, uint32_t vcpu, uint64_t address, uint32_t access)
{
    s2s_fault_t f, again;
    expect(api->fault(m->vm, vcpu, address, access, &f), S2S_OK);
    if (f.kind > S2S_NO_MEMORY)
        die("kind of a fault");
    expect_inside(m, &f);
    if (f.kind != S2S_HIT && f.kind != S2S_MAPPED)
        return;
    expect(api->translate(m->vm, vcpu, address, access & 7, &again), S2S_OK);
    if (again.kind != S2S_HIT && !(access & ~(uint32_t)7))
        die("what was mapped is not there");
}

static void host_change(machine_t *m, unsigned what, input_t *in)
{
    static const uint8_t perms[6] = {S2S_RWX, S2S_READ | S2S_WRITE, S2S_READ | 36, S2S_READ, S2S_WRITE, 36};
    uint64_t start, end, pa;
    unsigned first, last;
    uint8_t perm;
    int status;
    extent(in, &start, &end);
    first = model_page(start);
    last = first + (unsigned)((end - start) / PAGE);
    pa = start + HOST + (uint64_t)(byte(in) & 3) * 512 * PAGE;
    perm = perms[byte(in) % 6];
    if (what == 0) {
        status = api->host_map(m->vm, start, pa, end - start, perm, S2S_NORMAL, NULL);
        for (unsigned at = first; at < last && status == S2S_OK; at++) {
            m->mapped[at] = 1;
            m->perm[at] = perm;
            m->pa[at] = pa + (uint64_t)(at - first) * PAGE;
        }
    } else if (what == 1) {
        status = LIE == NO_UNMAP ? S2S_OK : api->host_unmap(m->vm, start, end, S2S_PARTIAL_SPLIT, NULL);
        if (status == S2S_OK)
            memset(m->mapped + first, 0, last - first);
    } else {
        status = api->host_protect(m->vm, start, end, perm, NULL);
        if (status == S2S_OK)
            memset(m->perm + first, perm, last - first);
    }
    expect(status, S2S_OK);
}

static void operate(machine_t *m, input_t *in)
{
    static const uint8_t accesses[10] = {1, 2, 4, 3, 12, 9, 17, 18, 31, 0};
    static const uint32_t tlbis[10] = {0xD50C8020, 0xD50C84A0, 0xD50C8040, 0xD50C80C0, 0xD50C83C0,
                                       0xD50C8380, 0xD5088700, 0xD5088320, 0xD50C8420, 0xD50C8440};
    static uint64_t ipas[256];
    static s2s_fault_t rows[256];
    static uint8_t bits[64 * 4];
    uint8_t op = byte(in), access;
    uint32_t vcpu = op & 1;
    unsigned what = op >> 1, count;
    uint64_t start, end, at;
    size_t done;
    if (what < 32) {
        for (count = 1 + (what & 3); count; count--) {
            unsigned page = byte(in) % TABLES, slot = byte(in);
            uint64_t desc = descriptor(in);
            memcpy(ram + page * PAGE + (slot < 0xE0 ? slot * 8 : (slot * 16 & 0xFF8)), &desc, 8);
        }
    } else if (what < 64) {
        at = ipa(in);
        fault(m, vcpu, at, accesses[byte(in) % 10]);
    } else if (what < 76) {
        count = byte(in);
        start = ipa(in) & ((UINT64_C(1) << 62) - 1);
        for (unsigned i = 0; i < count; i++)
            ipas[i] = start + (uint64_t)i * PAGE;
        access = (uint8_t)(1 + (what & 1));
        done = 0;
        expect(api->fault_many(m->vm, vcpu, ipas, &access, 0, rows, count, &done), S2S_OK);
        for (size_t i = 0; i < done; i++)
            expect_inside(m, rows + i);
    } else if (what < 80) {
        start = vttbr(in);
        end = vtcr(in);
        at = hcr(in);
        load(m, vcpu, start, end, at, byte(in) > 0xF0);
    } else if (what < 82) {
        expect(api->put(m->vm, vcpu), S2S_OK);
        load(m, vcpu, vttbr(in), VTCR, S2S_HCR_VM, 0);
    } else if (what < 92) {
        uint32_t insn = tlbis[what - 82];
        at = ipa(in) >> 12 & ((UINT64_C(1) << 36) - 1);
        s2s_tlbi_result_t result = {0, 0, 0};
        expect(api->tlbi(m->vm, vcpu, insn, at | word(in, 2) << (what & 1 ? 37 : 44), NULL, &result),
               S2S_E_UNDEFINED);
        if (result.required > result.removed)
            die("a TLBI left what it had to remove");
    } else if (what < 94) {
        uint32_t insn = 0xD5080000 | (uint32_t)word(in, 2);
        s2s_registers_t registers = {.size = sizeof registers};
        insn |= (uint32_t)(byte(in) & 7) << 16;
        registers.vttbr = vttbr(in);
        registers.vtcr = vtcr(in);
        registers.hcr = hcr(in);
        expect(api->tlbi(m->vm, vcpu, insn, word(in, 8), &registers, NULL), S2S_E_UNDEFINED);
    } else if (what < 112) {
        host_change(m, what < 98 ? 0 : what < 108 ? 1 : 2, in);
    } else if (what < 116) {
        extent(in, &start, &end);
        expect(api->log_dirty(m->vm, start, end, what & 1, NULL), S2S_OK);
    } else if (what < 122) {
        extent(in, &start, &end);
        expect((what < 118 ? api->dirty_log : what & 1 ? api->age : api->test_young)(m->vm, start, end, bits,
                                                                                     sizeof bits), S2S_OK);
    } else if (what < 124) {
        s2s_walk_t walk;
        at = ipa(in);
        expect(api->walk(m->vm, vcpu, at, accesses[byte(in) % 10], what & 1, &walk), S2S_OK);
    } else if (what < 126) {
        s2s_hw_tlbi_t owed[16];
        expect(api->take_tlbis(m->vm, owed, byte(in) % 17, &done), S2S_OK);
    } else {
        s2s_change_t change;
        int status = what & 1 ? api->remove_region(m->vm, DEVICE, &change) : api->add_device(m->vm, DEVICE, PAGE);
        expect(status, S2S_E_INVALID);
        if ((what & 1) && status == S2S_OK)     /* where there is no region, what the host has there stays */
            m->mapped[model_page(DEVICE)] = 0;
    }
}

static void set(unsigned page, unsigned slot, uint64_t desc)
{
    memcpy(ram + page * PAGE + slot * 8, &desc, 8);
}

/* What a decent L1 has: 32 pages and a block, seen at several places. The programs take it apart. */
static void decent_tables(void)
{
    enum { LEAF = 0x7DF, READ_ONLY = 0x75F, BLOCK = 0x7DD };
    memset(ram, 0, sizeof ram);
    set(0, 0, (RAM + 4 * PAGE) | 3);
    set(0, 1, (RAM + 4 * PAGE) | 3);
    set(0, 2, (RAM + 5 * PAGE) | 3);
    set(4, 0, (RAM + 6 * PAGE) | 3);
    set(4, 1, (RAM + 7 * PAGE) | 3);
    set(4, 2, RAM | BLOCK);
    set(5, 0, (RAM + 7 * PAGE) | 3);
    set(5, 1, RAM | BLOCK);
    for (unsigned i = 0; i < 16; i++) {
        set(6, i, (RAM + (TABLES + i) * PAGE) | LEAF);
        set(7, i, (RAM + (TABLES + 15 - i) * PAGE) | (i & 4 ? READ_ONLY : LEAF));
    }
    set(7, 6, ROM | LEAF);
    set(7, 7, DEVICE | LEAF);
}

static void verify(machine_t *m)
{
    if (api->check(m->vm) != S2S_OK)
        die("check");
    for (uint32_t vcpu = 0; vcpu < 2; vcpu++)
        for (unsigned at = 0; at < IPAS; at++) {
            s2s_fault_t f;
            expect(api->translate(m->vm, vcpu, small_ipa(at), S2S_READ, &f), S2S_OK);
            expect_inside(m, &f);
        }
}

/* Other features than the defaults, as long as HOST is an address. */
static void choose_features(s2s_features_t *f, input_t *in)
{
    unsigned bits = (unsigned)word(in, 2);
    api->features_init(f, sizeof *f);
    if (!bits)
        return;
    f->pa_bits = bits & 1 ? 40 : bits & 2 ? 44 : 48;
    f->hafdbs = (bits >> 2 & 3) % 3;
    f->vmid_bits = bits & 0x10 ? 8 : 16;
    f->ttl = bits >> 5 & 1;
    f->range = bits >> 6 & 1;
    f->fwb = bits >> 7 & 1;
    f->ttst = bits >> 8 & 1;
    f->tlbios = bits >> 9 & 1;
    f->xs = bits >> 10 & 1;
    f->bbm = bits >> 11 & 1;
    f->s2pie = bits >> 12 & 1;
    f->xnx = f->s2pie | (bits >> 13 & 1);
}

static void run(const uint8_t *data, size_t size)
{
    static machine_t m;
    input_t in = {data, data + size};
    uint8_t shape = byte(&in);
    s2s_options_t options;
    s2s_features_t features;
    s2s_populate_t populate = {.size = sizeof populate, .policy = S2S_POPULATE_LINEAR, .offset = (int64_t)HOST};
    memset(&m, 0, sizeof m);
    decent_tables();
    api->options_init(&options, sizeof options);
    choose_features(&features, &in);
    options.features = &features;
    options.vcpus = 2;
    options.contexts = 2 + (shape >> 2 & 1);
    options.teardown = shape & 3;
    options.max_table_bytes = shape & 8 ? 1 << 19 : 0;
    options.tlbi = shape >> 4 & 1;
    options.attributes = shape >> 5 & 1;
    if (api->create(&options, &m.vm) != S2S_OK)
        die("create");
    if (api->add_ram(m.vm, RAM, sizeof ram, ram, 0) || api->add_ram(m.vm, ROM, sizeof rom, rom, S2S_READONLY) ||
        api->add_device(m.vm, DEVICE, PAGE))
        die("regions");
    m.populate = shape >> 6 & 1;
    if (m.populate && api->set_populate(m.vm, &populate) != S2S_OK)
        die("set_populate");
    if (shape & 0x80) {
        expect(api->host_map(m.vm, RAM, RAM + HOST, sizeof ram, S2S_RWX, S2S_NORMAL, NULL), S2S_OK);
        for (unsigned at = 0; at < RAM_PAGES; at++) {
            m.mapped[at] = 1;
            m.perm[at] = S2S_RWX;
            m.pa[at] = RAM + HOST + at * PAGE;
        }
    }
    for (uint32_t vcpu = 0; vcpu < 2; vcpu++)
        load(&m, vcpu, UINT64_C(1) << 48 | RAM, VTCR, S2S_HCR_VM, 0);
    for (unsigned step = 0; step < 512 && in.at < in.end; step++) {
        operate(&m, &in);
        if (step % 32 == 31)
            verify(&m);
    }
    verify(&m);
    api->destroy(m.vm);
}

int LLVMFuzzerInitialize(int *argc, char ***argv)
{
    (void)argc, (void)argv;
    Py_InitializeEx(0);
    api = s2s_import();
    if (api == NULL) {
        PyErr_Print();
        return 1;
    }
    PyEval_SaveThread(); /* no Python from here on */
    return 0;
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    run(data, size);
    return 0;
}

#ifdef REPLAY_ONLY /* each argument is a file with one program */
int main(int argc, char **argv)
{
    if (LLVMFuzzerInitialize(&argc, &argv))
        return 2;
    for (int i = 1; i < argc; i++) {
        static uint8_t data[1 << 16];
        FILE *file = fopen(argv[i], "rb");
        if (file == NULL) {
            perror(argv[i]);
            return 2;
        }
        size_t size = fread(data, 1, sizeof data, file);
        fclose(file);
        run(data, size);
    }
    printf("%d programs\n", argc - 1);
    return 0;
}
#endif
