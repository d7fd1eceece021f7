/* vCPUs: threads that read, check and rewrite target pages which name themselves, as a guest's processors would.
 *
 * The pages of all areas are numbered one after the other; of n vCPUs number i owns those with number % n == i.
 * A page contains its number, its owner and how often it was rewritten (its generation), and each of its words is a
 * function of all these and the seed. So a page that is stale, torn, doubled or in the wrong place is found.
 *
 * No generation is stored. A vCPU rewrites its m pages round by round in one order, which the seed chooses:
 * step t rewrites the page at place t mod m of that order and gives it generation t / m + 1. So t gives them all. */
#ifndef VPC_VCPU_H
#define VPC_VCPU_H
#include <stdint.h>
#include <stddef.h>
#include "pages/vpc_ram.h"

/* cdef begin */
struct vpc_vcpu;

struct vpc_vcpu_state {
    uint64_t seed;
    uint64_t step;  /* pages rewritten since the fill */
    uint64_t draws; /* of the random numbers that choose the pages to read */
};

/* What was wrong with a page. */
struct vpc_vcpu_bad {
    int32_t block;  /* -1: none */
    uint32_t word;  /* first word of the page that is not as expected */
    uint64_t page;  /* target page in the block */
    uint64_t index; /* its number, and its own claim */
    uint64_t generation;
    uint64_t found_index;
    uint64_t found_generation;
    uint64_t found_owner;
    uint64_t found_seed;
};

struct vpc_vcpu_stats {
    uint64_t beats;       /* things done, all kinds */
    uint64_t reads;       /* pages read, all kinds */
    uint64_t writes;      /* own pages rewritten; each was checked before */
    uint64_t checks;      /* own pages compared word by word */
    uint64_t glances;     /* pages of the other vCPUs: the one word that never changes */
    uint64_t touches;     /* pages of the touch areas: one byte each */
    uint64_t bad;         /* pages that were not as expected */
    uint64_t longest_ns;  /* longest first touch of a page: in it the thread waits for the page */
    uint64_t stalled_ns;  /* all first touches together */
    uint64_t first_beat_ns; /* CLOCK_MONOTONIC at the end of the first beat of this run, 0: none yet */
    uint64_t last_beat_ns;  /* and of the last one, of any run */
    uint64_t step;
    uint32_t thread;      /* kernel's thread id of the last run, 0: it never ran */
    int32_t running;
    struct vpc_vcpu_bad first_bad;
    uint64_t histogram[256]; /* first touches, see vpc_histogram_floor */
};

/* vCPU index of count. Areas, then vpc_vcpu_set_state, before anything else. */
int vpc_vcpu_new(struct vpc_ram *ram, uint32_t index, uint32_t count, struct vpc_vcpu **out);
void vpc_vcpu_free(struct vpc_vcpu *v);
/* count target pages of block from first; touch: they are somebody else's, one byte of them is read now and then.
 * -ERANGE: they leave the block. -ENOSPC: too many areas. */
int vpc_vcpu_add_area(struct vpc_vcpu *v, int block, uint64_t first, uint64_t count, int touch);
/* -EINVAL: fewer pages than vCPUs, or a step out of range. -EBUSY: it runs. */
int vpc_vcpu_set_state(struct vpc_vcpu *v, const struct vpc_vcpu_state *state);
/* The target page that it rewrites next, and its block. -EBUSY: it runs. Touches nothing. */
int64_t vpc_vcpu_next(struct vpc_vcpu *v, int *block);
int vpc_vcpu_state(struct vpc_vcpu *v, struct vpc_vcpu_state *out);
/* Pages rewritten and pages read a second, each 0 or VPC_RATE_UNLIMITED too; also while it runs. */
int vpc_vcpu_set_rates(struct vpc_vcpu *v, uint64_t writes, uint64_t reads);
/* Before vpc_vcpu_run: forget an earlier vpc_vcpu_end. -EBUSY: it runs. */
int vpc_vcpu_arm(struct vpc_vcpu *v);
/* Let the parked thread run. -EBUSY: it runs already; -EINVAL: there is no state. */
int vpc_vcpu_go(struct vpc_vcpu *v);
/* Let it park again, after the page that it is at. */
void vpc_vcpu_stop(struct vpc_vcpu *v);
/* Let it return, after the page that it is at. */
void vpc_vcpu_end(struct vpc_vcpu *v);
/* 1: it touches nothing; otherwise the descriptor, an eventfd, becomes readable when that is so. */
int vpc_vcpu_parked(struct vpc_vcpu *v);
int vpc_vcpu_parked_fd(struct vpc_vcpu *v);
int vpc_vcpu_stats(struct vpc_vcpu *v, struct vpc_vcpu_stats *out);
/* These three touch the areas and MAY WAIT FOR A PAGE; -EOWNERDEAD: the blocks were given up. One at a time. The life
 * of its thread: parked, touching nothing, until vpc_vcpu_go; then a run, which checks between two pages whether it is
 * stopped; and so on to vpc_vcpu_end. once: one run, begun by an earlier vpc_vcpu_go. Returns 0. */
int vpc_vcpu_run(struct vpc_vcpu *v, int once);
/* Write all own pages in generation 0; only at step 0. */
int vpc_vcpu_fill(struct vpc_vcpu *v);
/* Check all own pages; returns how many are bad. */
int64_t vpc_vcpu_sweep(struct vpc_vcpu *v, struct vpc_vcpu_bad *first);
/* cdef end */

#endif
