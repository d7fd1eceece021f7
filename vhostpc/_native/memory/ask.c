/* Asking whether a page is here, without touching it. See ask_internal.h.
 *
 * tmpfs: lseek(SEEK_DATA). Not by mincore: for a file that we may not write by its mode bits it calls every page
 * resident.
 *
 * hugetlbfs: everything is data to lseek, mincore sees the page table of one mapping alone, cachestat is refused. But
 * UFFDIO_CONTINUE (Linux 5.13) maps a page that exists, and says EFAULT where there is none, without making it. That is
 * done in a second mapping, which has no access and is registered for minor faults with a ufd of our own; so the
 * front-end's ufd hears nothing of it.
 *
 * Nothing in the kernel wakes a thread when a page appears, so it asks again and again. */
#define _GNU_SOURCE
#include "memory/ask_internal.h"

#include <linux/userfaultfd.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

/* Headers older than Linux 5.13 do not name these. */
#ifndef UFFDIO_CONTINUE
struct uffdio_continue {
    struct uffdio_range range;
    uint64_t mode;
    int64_t mapped;
};
#define UFFDIO_CONTINUE _IOWR(UFFDIO, 0x07, struct uffdio_continue)
#define UFFDIO_CONTINUE_MODE_DONTWAKE ((uint64_t)1 << 0)
#define UFFDIO_REGISTER_MODE_MINOR ((uint64_t)1 << 2)
#endif

/* Pauses: an eighth of the time waited so far, so that asking adds about that much to a wait; never shorter than what a
 * thread needs to wake, never so long that a page would lie here unnoticed for long. Many waiters ask more seldom:
 * together they cost no more than a few. */
#define PAUSE_MIN_NS 50000u
#define PAUSE_MAX_NS 2000000u
#define WAITERS_AT_FULL_PACE 4

int vpc_ask_open(struct vpc_map *m)
{
    struct vpc_supply *s = m->supply;

    if (!s->no_fault || m->kind != VPC_KIND_HUGETLB)
        return 0;
    if (s->ask_ufd < 0)
        return -ENOSYS;
    void *p = mmap(NULL, m->len, PROT_NONE, MAP_SHARED | MAP_NORESERVE, m->fd, (off_t)m->file_off);
    if (p == MAP_FAILED)
        return -errno;
    (void)madvise(p, m->len, MADV_DONTFORK);
    (void)madvise(p, m->len, MADV_DONTDUMP);
    struct uffdio_register reg = {.range = {.start = (uintptr_t)p, .len = m->len}, .mode = UFFDIO_REGISTER_MODE_MINOR};
    if (ioctl(s->ask_ufd, UFFDIO_REGISTER, &reg) < 0) {
        int rc = -errno;
        munmap(p, m->len);
        return rc;
    }
    m->ask = p;
    return 0;
}

void vpc_ask_close(struct vpc_map *m)
{
    if (m->ask)
        munmap(m->ask, m->len);
}

static bool huge_present(const struct vpc_map *m, uint64_t page)
{
    struct uffdio_continue ask = {.range = {.start = (uintptr_t)m->ask + page * m->page_size, .len = m->page_size},
                                  .mode = UFFDIO_CONTINUE_MODE_DONTWAKE};

    if (ioctl(m->supply->ask_ufd, UFFDIO_CONTINUE, &ask) == 0)
        return true;
    /* Mapped by an earlier question; or the page is here and poisoned, which its touch will find out. */
    return errno == EEXIST || errno == EIO || errno == EHWPOISON;
}

bool vpc_ask_present(const struct vpc_map *m, uint64_t page)
{
    off_t off = (off_t)(m->file_off + page * m->page_size);

    return m->ask ? huge_present(m, page) : lseek(m->fd, off, SEEK_DATA) == off;
}

void vpc_ask_pause(uint64_t waited_ns, int waiters)
{
    uint64_t pause = waited_ns / 8;

    if (pause < PAUSE_MIN_NS)
        pause = PAUSE_MIN_NS;
    if (pause > PAUSE_MAX_NS)
        pause = PAUSE_MAX_NS;
    if (waiters > WAITERS_AT_FULL_PACE)
        pause = pause * (uint64_t)waiters / WAITERS_AT_FULL_PACE;
    struct timespec t = {.tv_sec = (time_t)(pause / 1000000000u), .tv_nsec = (long)(pause % 1000000000u)};
    (void)nanosleep(&t, NULL);
}
