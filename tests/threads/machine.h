/* L1's tables and memory, the host's map, and VMs over both. */
#ifndef MACHINE_H
#define MACHINE_H

#include "states.h"

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

#endif
