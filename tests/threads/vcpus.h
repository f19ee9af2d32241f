/* vCPUs: their faults, stores, batches and walks, and whether the answers are allowed. */
#ifndef VCPUS_H
#define VCPUS_H

#include "migration.h"

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

#endif
