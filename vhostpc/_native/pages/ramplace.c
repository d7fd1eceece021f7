/*
 * Placing received RAM pages.
 *
 * Armed: by ioctl, each host page once, from private memory; an existing page is never overwritten. Calm, where no page
 * is missing: into the block's file, the last copy wins.
 */
#define _GNU_SOURCE
#include "pages/load_internal.h"
#include "ufd/vpc_uffd.h"

#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <sched.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#define DONTWAKE 1u
#define LONGEST_PAUSE 128 /* ms between two tries of a page for which there is no memory */
/* Headers older than Linux 5.14 do not name it. */
#ifndef MADV_POPULATE_READ
#define MADV_POPULATE_READ 22
#endif

static void mark_and_wake(struct vpc_load *l, int block, uint64_t first, uint64_t count)
{
    if (l->service) {
        vpc_fault_placed(l->service, block, first, count);
        return;
    }
    for (uint64_t page = first; page < first + count; page++)
        bit_set(l->ram->blocks[block], VPC_BITS_RECEIVED, page);
}

/* Into the block's file: the kernel makes pages there without a fault for each, and without clearing them first. */
static int write_file(struct vpc_block *b, const unsigned char *from, size_t length, uint64_t at)
{
    while (length) {
        ssize_t n = pwrite(b->fd, from, length, (off_t)at);

        if (n < 0 && errno == EINTR)
            continue;
        if (n <= 0)
            return n < 0 ? -errno : -EIO;
        from += n;
        at += (uint64_t)n;
        length -= (size_t)n;
    }
    return 0;
}

/* Zeros into the block's file, from its first data on; the hole before is zero and stays one. */
static int zero_file(struct vpc_load *l, struct vpc_block *b, uint64_t at, uint64_t end)
{
    off_t data = lseek(b->fd, (off_t)at, SEEK_DATA);

    if (data < 0)
        return errno == ENXIO ? 0 : -errno;
    /* SEEK_HOLE is not used: it walks over all data that follows. */
    return (uint64_t)data < end ? write_file(b, l->zeros, end - (uint64_t)data, (uint64_t)data) : 0;
}

/* A discarded huge page is no longer reserved for us: where none is free, a touch would raise SIGBUS. */
static int make_pages(struct vpc_block *b, uint64_t first, uint64_t last)
{
    for (uint64_t page = first; page <= last; page++) {
        if (bit_test(b, VPC_BITS_RECEIVED, page))
            continue;
        while (fallocate(b->fd, FALLOC_FL_KEEP_SIZE, (off_t)(b->fd_offset + (page << b->shift)), (off_t)b->page_size) < 0)
            if (errno != EINTR)
                return -errno;
    }
    return 0;
}

static int place_calm(struct vpc_load *l, struct vpc_block *b)
{
    unsigned char *to = b->map + (l->run_first << TARGET_SHIFT);
    size_t length = (size_t)l->run_count << TARGET_SHIFT;
    uint64_t at = b->fd_offset + (l->run_first << TARGET_SHIFT);
    /* A host page of which a part has arrived counts as received: a source discards whole ones. */
    uint64_t first = (l->run_first << TARGET_SHIFT) >> b->shift;
    uint64_t last = ((l->run_first + l->run_count - 1) << TARGET_SHIFT) >> b->shift;
    int rc = 0;

    if (b->page_size > TARGET_PAGE) { /* hugetlbfs has no write(2), and does not report holes */
        if (b->hugetlb)
            rc = make_pages(b, first, last);
        if (rc == 0)
            memcpy(to, l->run_zero ? l->zeros : l->run, length);
    } else if (l->run_zero && l->holes)
        rc = zero_file(l, b, at, at + length);
    else
        rc = write_file(b, l->run_zero ? l->zeros : l->run, length, at);
    if (rc < 0)
        return rc;
    /* Into our page table at once, many in one call: otherwise the next reader would take a fault for every few pages.
     * It is only an optimization: a kernel before 5.14 refuses. */
    if (b->page_size == TARGET_PAGE && !l->run_zero)
        (void)madvise(to, length, MADV_POPULATE_READ);
    tally(&l->stats.placed, last - first + 1);
    mark_and_wake(l, l->run_block, first, last - first + 1);
    return 0;
}

static void name_page(struct vpc_load *l, uint64_t page)
{
    __atomic_store_n(&l->stats.bad_block, l->run_block, __ATOMIC_RELAXED);
    __atomic_store_n(&l->stats.bad_page, page, __ATOMIC_RELAXED);
}

/* There is no memory for this page: wait a little, longer each time. 0, or -ECANCELED at once when stopped. */
static int wait_for_memory(struct vpc_load *l, uint64_t page, int *pause)
{
    struct pollfd control = {.fd = l->control, .events = POLLIN};

    if (!*pause) {
        name_page(l, page);
        __atomic_store_n(&l->stats.short_now, 1, __ATOMIC_RELEASE);
        tally(&l->stats.shortages, 1);
    }
    *pause = !*pause ? 1 : *pause < LONGEST_PAUSE ? 2 * *pause : LONGEST_PAUSE;
    if (!atomic_load(&l->stop))
        (void)poll(&control, 1, *pause);
    return atomic_load(&l->stop) ? -ECANCELED : 0;
}

/* One call for the pages from first on; those that it made are marked and their waiters are woken. */
static int place_some(struct vpc_load *l, struct vpc_block *b, uint64_t first, uint64_t count, uint64_t from,
                      uint64_t *made)
{
    uint64_t to = (uint64_t)(uintptr_t)b->map + (first << b->shift);
    struct vpc_fault *shared = b->local ? l->service : NULL; /* the fault loop places pages of this block, too */
    int64_t done = 0;
    int rc;

    atomic_fetch_add(&l->ram->placing_begun, 1);
    if (shared)
        vpc_fault_lock(shared);
    if (l->run_zero && b->page_size == TARGET_PAGE)
        rc = vpc_uffd_zero(l->place, to, count << b->shift, DONTWAKE, &done);
    else
        rc = vpc_uffd_copy(l->place, to, from, count << b->shift, DONTWAKE, &done);
    *made = (uint64_t)done >> b->shift;
    if (shared) {
        for (uint64_t page = first; page < first + *made; page++)
            bit_set(b, VPC_BITS_RECEIVED, page);
        vpc_fault_unlock(shared);
    }
    tally(&l->stats.runs, 1);
    if (*made) {
        tally(&l->stats.placed, *made);
        mark_and_wake(l, l->run_block, first, *made);
    }
    atomic_fetch_add(&l->ram->placing_done, 1);
    return rc;
}

/* A page exists. Was it received: by now, or on the other connection, whose thread has not marked it yet? */
static int is_received(struct vpc_load *l, struct vpc_block *b, uint64_t page)
{
    uint64_t begun = atomic_load(&l->ram->placing_begun);

    /* Not longer than one call of the other thread: a connection has no more than one beside it. */
    while (!bit_test(b, VPC_BITS_RECEIVED, page) && atomic_load(&l->ram->placing_done) < begun && !atomic_load(&l->stop))
        sched_yield();
    return bit_test(b, VPC_BITS_RECEIVED, page);
}

/* Place the host pages [first, first + count) of the run, whose private bytes begin at from. */
static int place_pages(struct vpc_load *l, struct vpc_block *b, uint64_t first, uint64_t count, uint64_t from)
{
    int pause = 0, rc = 0;

    while (count && rc == 0) {
        uint64_t made;

        rc = place_some(l, b, first, count, from, &made);
        first += made;
        count -= made;
        from += made << b->shift;
        l->run_done += made;
        if (rc == 0)
            break;
        if (made)
            pause = 0;
        if (vpc_no_memory(b, first, rc)) {
            rc = wait_for_memory(l, first, &pause);
        } else if (rc == -EAGAIN) {
            rc = atomic_load(&l->stop) ? -ECANCELED : 0;
            sched_yield();
        } else if (rc == -EEXIST && is_received(l, b, first)) {
            /* It arrived another way meanwhile: newer than ours or the same. Never overwritten. */
            tally(&l->stats.already, 1);
            first++;
            count--;
            from += b->page_size;
            l->run_done++;
            pause = rc = 0;
        } else if (rc == -EEXIST) {
            /* Somebody made it. Not marked, and its waiters are not woken: it is not the page that arrived. */
            name_page(l, first);
        }
    }
    __atomic_store_n(&l->stats.short_now, 0, __ATOMIC_RELAXED);
    return rc;
}

int vpc_load_flush(struct vpc_load *l)
{
    if (l->run_count == 0)
        return 0;
    struct vpc_block *b = l->ram->blocks[l->run_block];
    if (l->place < 0) {
        int placed = place_calm(l, b);
        l->run_count = 0;
        return placed;
    }
    if (((l->run_first | l->run_count) << TARGET_SHIFT) & (b->page_size - 1))
        return 0; /* a host page that is not whole yet */
    uint64_t first = (l->run_first << TARGET_SHIFT) >> b->shift;
    uint64_t count = (l->run_count << TARGET_SHIFT) >> b->shift;
    int rc = 0;

    unsigned char *bytes = l->run_zero && b->page_size > TARGET_PAGE ? l->zeros : l->run;
    while (l->run_done < count && rc == 0) {
        uint64_t i = l->run_done, n = 0;
        if (bit_test(b, VPC_BITS_RECEIVED, first + i)) {
            tally(&l->stats.already, 1);
            l->run_done++;
            continue;
        }
        while (i + n < count && !bit_test(b, VPC_BITS_RECEIVED, first + i + n))
            n++;
        rc = place_pages(l, b, first + i, n, (uint64_t)(uintptr_t)bytes + (i << b->shift));
    }
    if (rc != -ECANCELED) /* stopped: the next call places the rest */
        l->run_count = l->run_done = 0;
    return rc;
}
