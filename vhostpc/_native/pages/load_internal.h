#ifndef LOAD_INTERNAL_H
#define LOAD_INTERNAL_H
/* RAM records in, inside: ramload.c reads and parses, ramplace.c puts received pages where they belong. */
#include "pages/ram_internal.h"
#include "pages/vpc_load.h"

#define RUN_PAGES 64u
#define BULK_PAGES 8u /* of a run, where another thread's pages are more urgent: short calls */

struct vpc_load {
    struct vpc_ram *ram;
    struct vpc_fault *service;
    int fd, place, control;
    int on_disk; /* fd: a file, which is always ready; a read of it may wait for the disk */
    int holes; /* calm: a zero page may stay a hole of the file */
    _Atomic int stop;
    int in_bulk; /* 1: another connection brings what is requested; 2: its thread gives way already */
    _Atomic int finish; /* end when nothing is awaited */

    unsigned char *input;
    size_t begin, end;
    int block; /* of the last record, for CONTINUE; -1 before the first */
    int64_t section; /* of the RAM section whose frames we read too, -1: records only */
    enum { RECORDS, FOOTER, NEXT } at;
    int last; /* in the section's END */

    /* The run: target pages that follow one another in one block, all data or all zero. */
    unsigned char *run; /* room for RUN_PAGES target pages or one host page, whichever is larger */
    size_t run_room;
    unsigned char *zeros; /* as much again, never written */
    int run_block;
    int run_zero;
    uint64_t run_first, run_count; /* target pages */
    uint64_t run_done;             /* host pages of it that a stopped flush has finished */

    struct vpc_load_stats stats;
};

/* The numbers: this thread alone writes them, others read them while it runs. */
static inline void tally(uint64_t *what, uint64_t n)
{
    __atomic_store_n(what, *what + n, __ATOMIC_RELAXED);
}

/* ramplace.c. Place the run, mark its pages and wake their waiters: 0 or -errno. A huge page that is not whole stays in
 * the run, as do the pages that are left after -ECANCELED (stopped while there was no memory). */
int vpc_load_flush(struct vpc_load *l);

/* delta.c. Make a target page (4096 bytes) from its old content and its XBZRLE difference: 0, or -EBADMSG for a
 * malformed one (then the page is spoilt). */
int vpc_delta_apply(unsigned char *page, const unsigned char *delta, size_t length);

#endif
