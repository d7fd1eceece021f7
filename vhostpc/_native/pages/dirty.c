/* Dirty tracking: see vpc_dirty.h.
 *
 * No lost write, synchronous. A page is either protected, or its bit in written is set, or both. The loop sets the bit
 * and lets the page be written; a sync clears the bit and protects. Each takes both steps under the lock, so that
 * neither undoes a step of the other. DIRTY is set after the protection: it stands for writes before that, and a
 * later write is a fault.
 *
 * The lock is held over an ioctl, never over a touch: a thread that waits for a page waits for the loop alone. */
#define _GNU_SOURCE
#include "pages/vpc_dirty.h"
#include "clock.h"
#include "event_internal.h"
#include "pages/ram_internal.h"
#include "ufd/vpc_uffd.h"

#include <fcntl.h>
#include <linux/userfaultfd.h>
#include <poll.h>
#include <pthread.h>
#include <sched.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <unistd.h>

#define EVENTS_A_READ 64
#define REGIONS_A_SCAN 512
#define WORDS_A_CALL 8 /* of a bitmap: 512 pages, so that no writer waits long for the lock */
/* Bytes of one protecting call at the start, so that nobody's fault waits for all of a large block. */
#define PROTECT_STEP ((uint64_t)1 << 28)

/* Documentation/admin-guide/mm/pagemap.rst; headers older than Linux 6.7 do not have it. */
struct scan {
    uint64_t size, flags, start, end, walk_end, regions, region_count, max_pages;
    uint64_t inverted, mask, any_of, wanted;
};

struct region {
    uint64_t start, end, categories;
};

#define SCAN _IOWR('f', 16, struct scan)
#define SCAN_PROTECT 1u     /* PM_SCAN_WP_MATCHING */
#define SCAN_MUST_PROTECT 2u /* PM_SCAN_CHECK_WPASYNC */
#define WRITTEN 2u          /* PAGE_IS_WRITTEN */

struct vpc_dirty {
    struct vpc_ram *ram;
    int count; /* tracked blocks */
    int ufd, pagemap, control;
    _Atomic int stop;
    pthread_mutex_t lock; /* ended, written and the protection of the pages, stats */
    int ended;
    int registered; /* the first so many blocks */
    uint64_t *written[MAX_BLOCKS];
    struct region regions[REGIONS_A_SCAN];
    struct vpc_dirty_stats stats;
};

void vpc_dirty_free(struct vpc_dirty *d)
{
    if (!d)
        return;
    vpc_dirty_end(d);
    for (int i = 0; i < d->count; i++)
        free(d->written[i]);
    if (d->ufd >= 0)
        close(d->ufd);
    if (d->pagemap >= 0)
        close(d->pagemap);
    if (d->control >= 0)
        close(d->control);
    pthread_mutex_destroy(&d->lock);
    free(d);
}

int vpc_dirty_new(struct vpc_ram *ram, int ufd, int pagemap, struct vpc_dirty **out)
{
    struct vpc_dirty *d = calloc(1, sizeof *d);
    int rc = 0;

    if (!d)
        return -ENOMEM;
    pthread_mutex_init(&d->lock, NULL);
    d->ram = ram;
    d->stats.block = -1;
    d->ufd = d->pagemap = d->control = -1;
    if ((d->ufd = fcntl(ufd, F_DUPFD_CLOEXEC, 0)) < 0 || (d->control = event_new()) < 0 ||
        (pagemap >= 0 && (d->pagemap = fcntl(pagemap, F_DUPFD_CLOEXEC, 0)) < 0))
        rc = -errno;
    for (; rc == 0 && d->count < ram->count; d->count++) {
        d->written[d->count] = calloc((size_t)((ram->blocks[d->count]->pages + 63) / 64), sizeof(uint64_t));
        if (!d->written[d->count])
            rc = -ENOMEM;
    }
    if (rc < 0) {
        vpc_dirty_free(d);
        return rc;
    }
    *out = d;
    return 0;
}

/* ---- protecting */

static int protect(struct vpc_dirty *d, uint64_t start, uint64_t length, int on)
{
    struct uffdio_writeprotect w = {.range = {.start = start, .len = length},
                                    .mode = on ? UFFDIO_WRITEPROTECT_MODE_WP : 0};

    while (ioctl(d->ufd, UFFDIO_WRITEPROTECT, &w) < 0)
        if (errno != EAGAIN || sched_yield() < 0)
            return -errno;
    return 0;
}

static int protect_block(struct vpc_dirty *d, int i)
{
    struct vpc_block *b = d->ram->blocks[i];
    uint64_t base = vpc_ram_base(d->ram, i), ioctls;
    int rc;

    pthread_mutex_lock(&d->lock);
    rc = d->ended ? -ESHUTDOWN : vpc_uffd_register(d->ufd, base, b->length, UFFDIO_REGISTER_MODE_WP, &ioctls);
    if (rc == 0)
        d->registered = i + 1;
    if (rc == 0 && !(ioctls & (uint64_t)1 << _UFFDIO_WRITEPROTECT))
        rc = -EOPNOTSUPP;
    pthread_mutex_unlock(&d->lock);
    uint64_t most = b->page_size > PROTECT_STEP ? b->page_size : PROTECT_STEP, step; /* whole pages */
    for (uint64_t at = 0; rc == 0 && at < b->length; at += step) {
        step = b->length - at < most ? b->length - at : most;
        pthread_mutex_lock(&d->lock);
        rc = d->ended ? -ESHUTDOWN : protect(d, base + at, step, 1);
        pthread_mutex_unlock(&d->lock);
    }
    return rc;
}

/* Caller holds the lock. The kernel takes the protection away and wakes the waiters. */
static void end(struct vpc_dirty *d)
{
    for (int i = 0; i < d->registered; i++) {
        (void)vpc_uffd_unregister(d->ufd, vpc_ram_base(d->ram, i), d->ram->blocks[i]->length);
        /* Also those whose mapping was replaced meanwhile. */
        (void)vpc_uffd_wake(d->ufd, vpc_ram_base(d->ram, i), d->ram->blocks[i]->length);
    }
    d->registered = 0;
    d->ended = 1;
}

int vpc_dirty_end(struct vpc_dirty *d)
{
    pthread_mutex_lock(&d->lock);
    end(d);
    pthread_mutex_unlock(&d->lock);
    return 0;
}

/* Scan an empty range: does the kernel know the call? */
static int can_scan(struct vpc_dirty *d)
{
    uint64_t base = vpc_ram_base(d->ram, 0);
    struct scan s = {.size = sizeof s, .start = base, .end = base, .mask = WRITTEN, .wanted = WRITTEN};

    return ioctl(d->pagemap, SCAN, &s) < 0 ? -errno : 0;
}

int vpc_dirty_start(struct vpc_dirty *d)
{
    int rc = d->pagemap >= 0 && d->count ? can_scan(d) : 0;

    for (int i = 0; rc == 0 && i < d->count; i++) {
        rc = protect_block(d, i);
        if (rc < 0)
            d->stats.block = i;
    }
    if (rc < 0)
        vpc_dirty_end(d);
    return rc;
}

/* ---- collecting */

struct found {
    uint64_t pages, fresh, calls; /* fresh: whose bits were not set before */
};

static void mark(struct vpc_block *b, uint64_t first, uint64_t count, struct found *found)
{
    for (uint64_t page = first; page < first + count; page++)
        found->fresh += !bit_set(b, VPC_BITS_DIRTY, page);
    found->pages += count;
}

static int scan_block(struct vpc_dirty *d, int i, struct found *found)
{
    struct vpc_block *b = d->ram->blocks[i];
    uint64_t base = vpc_ram_base(d->ram, i);
    /* With just these masks the kernel counts each page without a mark of protection as written, including a written
     * page that it has since removed from the page table. */
    struct scan s = {.size = sizeof s,
                     .flags = SCAN_PROTECT | SCAN_MUST_PROTECT,
                     .start = base,
                     .end = base + b->length,
                     .regions = (uint64_t)(uintptr_t)d->regions,
                     .region_count = REGIONS_A_SCAN,
                     .mask = WRITTEN,
                     .wanted = WRITTEN};

    while (s.start < s.end) {
        int n = ioctl(d->pagemap, SCAN, &s);
        if (n < 0 && errno == EINTR)
            continue;
        if (n < 0)
            return -errno;
        found->calls++;
        for (int r = 0; r < n; r++)
            mark(b, (d->regions[r].start - base) >> b->shift,
                 (d->regions[r].end - d->regions[r].start) >> b->shift, found);
        if (s.walk_end <= s.start)
            return -EIO; /* no kernel does this, and it must not spin */
        s.start = s.walk_end;
    }
    return 0;
}

/* Protect the written pages in the words [word, word + WORDS_A_CALL) of the bitmap again, in one call: the pages
 * between them are protected already. */
static int collect_words(struct vpc_dirty *d, int i, uint64_t word, uint64_t words, struct found *found)
{
    struct vpc_block *b = d->ram->blocks[i];
    uint64_t taken[WORDS_A_CALL], first = UINT64_MAX, after = 0;
    int rc = 0;

    pthread_mutex_lock(&d->lock);
    for (uint64_t w = 0; w < words; w++) {
        taken[w] = d->written[i][word + w];
        d->written[i][word + w] = 0;
        if (!taken[w])
            continue;
        if (first == UINT64_MAX)
            first = (word + w) * 64 + (uint64_t)__builtin_ctzll(taken[w]);
        after = (word + w) * 64 + 64 - (uint64_t)__builtin_clzll(taken[w]);
    }
    if (after)
        rc = d->ended ? -ESHUTDOWN
                      : protect(d, vpc_ram_base(d->ram, i) + (first << b->shift), (after - first) << b->shift, 1);
    pthread_mutex_unlock(&d->lock);
    found->calls += after != 0;
    for (uint64_t w = 0; w < words; w++) /* also when protecting failed: they were written */
        for (uint64_t rest = taken[w]; rest; rest &= rest - 1)
            mark(b, (word + w) * 64 + (uint64_t)__builtin_ctzll(rest), 1, found);
    return rc;
}

static int collect_block(struct vpc_dirty *d, int i, struct found *found)
{
    uint64_t words = (d->ram->blocks[i]->pages + 63) / 64;
    int rc = 0;

    for (uint64_t at = 0; rc == 0 && at < words; at += WORDS_A_CALL)
        rc = collect_words(d, i, at, words - at < WORDS_A_CALL ? words - at : WORDS_A_CALL, found);
    return rc;
}

int64_t vpc_dirty_sync(struct vpc_dirty *d)
{
    uint64_t begun = now_ns();
    struct found found = {0};
    int rc = 0;

    pthread_mutex_lock(&d->lock);
    int ended = d->ended;
    pthread_mutex_unlock(&d->lock);
    if (ended)
        return -ESHUTDOWN;
    for (int i = 0; rc == 0 && i < d->count; i++)
        rc = d->pagemap >= 0 ? scan_block(d, i, &found) : collect_block(d, i, &found);
    pthread_mutex_lock(&d->lock);
    d->stats.syncs++;
    d->stats.found += found.pages;
    d->stats.calls += found.calls;
    d->stats.sync_ns += now_ns() - begun;
    pthread_mutex_unlock(&d->lock);
    return rc < 0 ? rc : (int64_t)found.fresh;
}

/* ---- the synchronous way's loop */

static int by_address(const void *a, const void *b)
{
    const struct vpc_uffd_event *x = a, *y = b;
    return x->address < y->address ? -1 : x->address > y->address;
}

/* Note pages of block i as written, and unprotect them. Caller holds the lock. */
static int let_write(struct vpc_dirty *d, int i, uint64_t first, uint64_t count)
{
    struct vpc_block *b = d->ram->blocks[i];

    for (uint64_t page = first; page < first + count; page++)
        d->written[i][page >> 6] |= (uint64_t)1 << (page & 63);
    return protect(d, vpc_ram_base(d->ram, i) + (first << b->shift), count << b->shift, 0);
}

static int block_at(struct vpc_dirty *d, uint64_t address)
{
    int i = 0;

    while (i < d->count && address - vpc_ram_base(d->ram, i) >= d->ram->blocks[i]->length)
        i++;
    return i;
}

/* Caller holds the lock. */
static int answer(struct vpc_dirty *d, struct vpc_uffd_event *events, int n)
{
    int rc = 0;

    qsort(events, (size_t)n, sizeof *events, by_address);
    for (int at = 0; rc == 0 && at < n;) {
        int i = block_at(d, events[at].address);
        if (i == d->count) {
            at++;
            continue;
        }
        struct vpc_block *b = d->ram->blocks[i];
        uint64_t base = vpc_ram_base(d->ram, i), first = (events[at].address - base) >> b->shift, after = first + 1;
        for (at++; at < n && (events[at].address - base) >> b->shift <= after && after < b->pages; at++)
            after = ((events[at].address - base) >> b->shift) + 1;
        rc = let_write(d, i, first, after - first);
    }
    d->stats.faults += (uint64_t)n;
    return rc;
}

int vpc_dirty_run(struct vpc_dirty *d)
{
    struct vpc_uffd_event events[EVENTS_A_READ];
    struct pollfd fds[2] = {{.fd = d->ufd, .events = POLLIN}, {.fd = d->control, .events = POLLIN}};
    int rc = 0;

    while (rc == 0 && !atomic_load(&d->stop)) {
        if (poll(fds, 2, -1) < 0 && errno != EINTR) {
            rc = -errno;
            break;
        }
        int n = vpc_uffd_read(d->ufd, events, EVENTS_A_READ);
        if (n == -EAGAIN || n == -EINTR)
            continue;
        pthread_mutex_lock(&d->lock);
        rc = n < 0 ? n : answer(d, events, n);
        pthread_mutex_unlock(&d->lock);
    }
    pthread_mutex_lock(&d->lock);
    d->stats.error = -rc;
    end(d);
    pthread_mutex_unlock(&d->lock);
    return rc;
}

void vpc_dirty_stop(struct vpc_dirty *d)
{
    atomic_store(&d->stop, 1);
    event_poke(d->control);
}

int vpc_dirty_stats(struct vpc_dirty *d, struct vpc_dirty_stats *out)
{
    pthread_mutex_lock(&d->lock);
    *out = d->stats;
    pthread_mutex_unlock(&d->lock);
    return 0;
}
