/* What may be answered of a page, and when. */
#ifndef STATES_H
#define STATES_H

#include "basics.h"

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
    /* What is not remembered any more ended before the second oldest began; and none was overwritten meanwhile. */
    if (LOAD(cell->count) == newest && (!oldest || second <= start))
        return 0;
    ADD(unknown, 1);
    return 1;
}

#endif
