/* Which host pages were written through a RAM set's own mapping: by a userfaultfd that protects them from writing.
 *
 * Two ways. Asynchronous (WP_ASYNC and PAGEMAP_SCAN, Linux 6.7): the kernel lets the writer go on and records the
 * write; a sync collects the records. Synchronous (WP on shared memory, Linux 5.19): the first writer of a page waits until
 * vpc_dirty_run has noted the page and unprotected it. Nothing here touches a block, and no page is made: absent
 * pages are protected by marks in the page tables. */
#ifndef VPC_DIRTY_H
#define VPC_DIRTY_H
#include <stdint.h>
#include <stddef.h>
#include "pages/vpc_ram.h"

/* cdef begin */
struct vpc_dirty;

struct vpc_dirty_stats {
    uint64_t syncs;
    uint64_t found;     /* host pages that syncs found written */
    uint64_t faults;    /* synchronous: writers that waited */
    uint64_t calls;     /* scans; synchronous: protecting calls of syncs */
    uint64_t sync_ns;   /* time in syncs, together */
    int32_t block;      /* the block that a failed start was about, -1: none */
    int32_t error;      /* errno that ended vpc_dirty_run, 0: none */
};

/* A tracker of the blocks that the set has now. ufd: its handshake is made and it is non-blocking (we keep a
 * copy). pagemap: /proc/self/pagemap (a copy too), or -1 for the synchronous way. */
int vpc_dirty_new(struct vpc_ram *ram, int ufd, int pagemap, struct vpc_dirty **out);
void vpc_dirty_free(struct vpc_dirty *d);
/* Protect everything. On failure nothing is protected; -ENOTTY and -EINVAL with block -1: no PAGEMAP_SCAN. */
int vpc_dirty_start(struct vpc_dirty *d);
/* Set DIRTY for pages written since the last call and protect them again; returns how many bits were not set before.
 * One call at a time. -ESHUTDOWN: it has ended. */
int64_t vpc_dirty_sync(struct vpc_dirty *d);
/* The synchronous way's loop; before vpc_dirty_start. However it ends, nothing is protected any more and all
 * waiters go on. */
int vpc_dirty_run(struct vpc_dirty *d);
void vpc_dirty_stop(struct vpc_dirty *d);
/* Protect nothing any more; pages written since the last sync stay unknown. */
int vpc_dirty_end(struct vpc_dirty *d);
int vpc_dirty_stats(struct vpc_dirty *d, struct vpc_dirty_stats *out);
/* cdef end */

#endif
