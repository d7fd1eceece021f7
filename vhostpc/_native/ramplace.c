/*
 * Where RAM pages that came are put.
 *
 * Armed: by ioctl, each host page once, from private memory; a page that is there already is never overwritten. Calm, where
 * nothing is missing: into the block's file, the last copy wins.
 */
#define _GNU_SOURCE
#include "load_internal.h"
#include "vpc_uffd.h"

#include <errno.h>
#include <sched.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#define DONTWAKE 1u
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

/* Room for zeros, made when first needed: 0 or -ENOMEM. */
static int need_zeros(struct vpc_load *l)
{
    if (!l->zeros)
        l->zeros = vpc_load_pages(l->run_room);
    return l->zeros ? 0 : -ENOMEM;
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
    /* SEEK_HOLE is not asked: it walks over all data that follows. */
    return (uint64_t)data < end ? write_file(b, l->zeros, end - (uint64_t)data, (uint64_t)data) : 0;
}

static int place_calm(struct vpc_load *l, struct vpc_block *b)
{
    unsigned char *to = b->map + (l->run_first << TARGET_SHIFT);
    size_t length = (size_t)l->run_count << TARGET_SHIFT;
    uint64_t at = b->fd_offset + (l->run_first << TARGET_SHIFT);
    int rc = l->run_zero ? need_zeros(l) : 0;

    if (rc < 0)
        return rc;
    if (b->page_size > TARGET_PAGE) /* hugetlbfs can not be written to, and tells no holes */
        memcpy(to, l->run_zero ? l->zeros : l->run, length);
    else if (l->run_zero && l->holes)
        rc = zero_file(l, b, at, at + length);
    else
        rc = write_file(b, l->run_zero ? l->zeros : l->run, length, at);
    if (rc < 0)
        return rc;
    /* Into our page table at once, many for one call: who sends it on, or runs on it, would pay a fault for each few. It
     * is no more than that: a kernel before 5.14 refuses. */
    if (b->page_size == TARGET_PAGE && !l->run_zero)
        (void)madvise(to, length, MADV_POPULATE_READ);
    /* A host page of which anything has come counts as received: a source discards whole ones. */
    uint64_t first = (l->run_first << TARGET_SHIFT) >> b->shift;
    uint64_t last = ((l->run_first + l->run_count - 1) << TARGET_SHIFT) >> b->shift;
    tally(&l->stats.placed, last - first + 1);
    mark_and_wake(l, l->run_block, first, last - first + 1);
    return 0;
}

/* Place the host pages [first, first + count) of the run, whose private bytes begin at from. */
static int place_pages(struct vpc_load *l, struct vpc_block *b, uint64_t first, uint64_t count, uint64_t from)
{
    int huge = b->page_size > TARGET_PAGE;

    while (count) {
        uint64_t to = (uint64_t)(uintptr_t)b->map + (first << b->shift);
        int64_t done = 0;
        int rc;

        if (l->run_zero && !huge)
            rc = vpc_uffd_zero(l->place, to, count << b->shift, DONTWAKE, &done);
        else
            rc = vpc_uffd_copy(l->place, to, from, count << b->shift, DONTWAKE, &done);
        tally(&l->stats.runs, 1);
        uint64_t pages = (uint64_t)done >> b->shift;
        if (pages) {
            tally(&l->stats.placed, pages);
            mark_and_wake(l, l->run_block, first, pages);
            first += pages;
            count -= pages;
            from += pages << b->shift;
        }
        if (rc == 0)
            continue;
        if (rc == -EEXIST) {
            /* There already: newer than ours or the same. Never overwritten. */
            tally(&l->stats.already, 1);
            mark_and_wake(l, l->run_block, first, 1);
            first++;
            count--;
            from += b->page_size;
        } else if (rc == -EAGAIN) {
            if (atomic_load(&l->stop))
                return -ECANCELED;
            sched_yield();
        } else {
            return rc;
        }
    }
    return 0;
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

    if (l->run_zero && b->page_size > TARGET_PAGE && (rc = need_zeros(l)) < 0)
        return rc;
    unsigned char *bytes = l->run_zero && b->page_size > TARGET_PAGE ? l->zeros : l->run;
    for (uint64_t i = 0; i < count && rc == 0;) {
        uint64_t n = 0;
        if (bit_test(b, VPC_BITS_RECEIVED, first + i)) {
            tally(&l->stats.already, 1);
            i++;
            continue;
        }
        while (i + n < count && !bit_test(b, VPC_BITS_RECEIVED, first + i + n))
            n++;
        rc = place_pages(l, b, first + i, n, (uint64_t)(uintptr_t)bytes + (i << b->shift));
        i += n;
    }
    l->run_count = 0;
    return rc;
}
