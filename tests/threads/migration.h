/* Dirty logging: what a migration must find. */
#ifndef MIGRATION_H
#define MIGRATION_H

#include "machine.h"

/* Sessions of logging are odd. A write that was let through is owed a report by some pass from the one on that was
 * under way, or the next, when it began; and a copy that holds it, if the leaf still let it through once it was made. */
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

#endif
