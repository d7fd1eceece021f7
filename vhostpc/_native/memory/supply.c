/* The supply behind a session's memory: the ufd that it is registered with, and failing. */
#define _GNU_SOURCE
#include <fcntl.h>
#include <linux/userfaultfd.h>
#include <stdlib.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <unistd.h>
#include "event_internal.h"
#include "memory/ahead_internal.h"
#include "memory/gm_internal.h"
#include "memory/ask_internal.h"
#include "memory/replace_internal.h"
#include "memory/supply_internal.h"

int vpc_supply_new(struct vpc_supply **out)
{
    struct vpc_supply *s = calloc(1, sizeof(*s));

    if (!s)
        return -ENOMEM;
    atomic_init(&s->refs, 1);
    s->strike_fd = event_new();
    if (s->strike_fd < 0) {
        int rc = -errno;
        free(s);
        return rc;
    }
    s->ufd = s->ask_ufd = -1;
    s->ahead_limit = VPC_AHEAD_MOST;
    pthread_mutex_init(&s->lock, NULL);
    *out = s;
    return 0;
}

void vpc_supply_ref(struct vpc_supply *s)
{
    atomic_fetch_add(&s->refs, 1);
}

void vpc_supply_unref(struct vpc_supply *s)
{
    if (!s || atomic_fetch_sub(&s->refs, 1) != 1)
        return;
    if (s->ufd >= 0)
        close(s->ufd);
    if (s->ask_ufd >= 0)
        close(s->ask_ufd);
    close(s->strike_fd);
    vpc_ahead_drop(s->ahead);
    pthread_mutex_destroy(&s->lock);
    free(s);
}

void vpc_supply_link(struct vpc_supply *s, struct vpc_map *m)
{
    pthread_mutex_lock(&s->lock);
    m->next = s->maps;
    if (m->next)
        m->next->prev = m;
    s->maps = m;
    pthread_mutex_unlock(&s->lock);
}

void vpc_supply_unlink(struct vpc_supply *s, struct vpc_map *m)
{
    pthread_mutex_lock(&s->lock);
    if (m->prev)
        m->prev->next = m->next;
    else
        s->maps = m->next;
    if (m->next)
        m->next->prev = m->prev;
    m->next = m->prev = NULL;
    pthread_mutex_unlock(&s->lock);
}

int vpc_supply_arm(struct vpc_supply *s, int ufd)
{
    int rc = s->ahead ? 0 : vpc_ahead_new(&s->ahead), copy;

    if (rc < 0)
        return rc;
    copy = fcntl(ufd, F_DUPFD_CLOEXEC, 3);
    if (copy < 0)
        return -errno;
    vpc_ahead_open(s->ahead, s->ahead_limit);
    if (s->ufd >= 0)
        close(s->ufd);
    s->ufd = copy;
    atomic_store(&s->armed, 1);
    return 0;
}

int vpc_supply_never_fault(struct vpc_supply *s, int ufd)
{
    if (s->no_fault)
        return 0; /* maps exist that were registered with the first one */
    if (ufd >= 0) {
        s->ask_ufd = fcntl(ufd, F_DUPFD_CLOEXEC, 3);
        if (s->ask_ufd < 0)
            return -errno;
    }
    s->no_fault = true;
    return 0;
}

int vpc_map_register(struct vpc_map *m)
{
    struct vpc_supply *s = m->supply;

    if (s->ufd < 0)
        return -ENOTCONN;
    /* A fresh mapping has no page table entries, so nothing needs to be dropped. Huge pages off: one would
     * be mapped whole when a waiter is woken for 4 KiB of it. Kernels without THP answer EINVAL. */
    (void)madvise(m->base, m->len, MADV_NOHUGEPAGE);
    struct uffdio_register reg = {.range = {.start = (uintptr_t)m->base, .len = m->len},
                                  .mode = UFFDIO_REGISTER_MODE_MISSING};
    /* Each map keeps its own copy: a repeated ADVISE replaces the supply's, not that of older maps. */
    m->ufd = fcntl(s->ufd, F_DUPFD_CLOEXEC, 3);
    if (m->ufd < 0)
        return -errno;
    if (ioctl(m->ufd, UFFDIO_REGISTER, &reg) < 0)
        return -errno;
    m->registered = true;
    if (mprotect(m->base, m->len, PROT_READ | PROT_WRITE) < 0)
        return -errno;
    return 0;
}

int vpc_supply_disarm(struct vpc_supply *s)
{
    int rc = 0;

    pthread_mutex_lock(&s->lock);
    for (struct vpc_map *m = s->maps; m; m = m->next) {
        if (!atomic_load(&m->armed))
            continue;
        if (m->registered) {
            struct uffdio_range range = {.start = (uintptr_t)m->base, .len = m->len};
            if (ioctl(m->ufd, UFFDIO_UNREGISTER, &range) < 0 && !rc)
                rc = -errno;
            m->registered = false;
            close(m->ufd);
            m->ufd = -1;
        }
        atomic_store_explicit(&m->armed, false, memory_order_release);
    }
    atomic_store(&s->armed, 0); /* the sum of the maps' flags: down when the last of them is */
    if (s->ahead)
        vpc_ahead_close(s->ahead);
    pthread_mutex_unlock(&s->lock);
    if (s->ufd >= 0)
        close(s->ufd);
    s->ufd = -1;
    return rc;
}

int vpc_supply_fail(struct vpc_supply *s)
{
    int rc = 0;

    atomic_store(&s->lost, 1);
    pthread_mutex_lock(&s->lock);
    if (s->ahead)
        vpc_ahead_close(s->ahead);
    for (struct vpc_map *m = s->maps; m; m = m->next) {
        if (!atomic_load(&m->armed) || m->replaced)
            continue;
        /* Neither unregister nor close: a waiter released that way reads zeros and so creates the page in the
         * shared file, for the guest too. Over private memory it reads zeros that are nobody's. So where none is
         * available, the waiters sleep on. */
        int error = vpc_replace_private(m->base, m->len);
        if (error < 0) {
            rc = error;
            continue;
        }
        m->replaced = true;
        if (m->registered) {
            struct uffdio_range range = {.start = (uintptr_t)m->base, .len = m->len};
            (void)ioctl(m->ufd, UFFDIO_WAKE, &range);
            m->registered = false;
        }
    }
    pthread_mutex_unlock(&s->lock);
    return rc;
}

int vpc_supply_asleep(struct vpc_supply *s)
{
    int threads = 0;

    pthread_mutex_lock(&s->lock);
    for (struct vpc_map *m = s->maps; m; m = m->next)
        threads += atomic_load(&m->waiting);
    pthread_mutex_unlock(&s->lock);
    return threads;
}

int vpc_supply_strike_fd(const struct vpc_supply *s)
{
    return s->strike_fd;
}

int vpc_supply_struck(const struct vpc_supply *s, struct vpc_strike *out)
{
    if (atomic_load_explicit(&s->struck, memory_order_acquire) != 2)
        return 0;
    *out = s->strike;
    return 1;
}

int vpc_supply_is_lost(const struct vpc_supply *s)
{
    return vpc_supply_lost(s);
}

void vpc_supply_stats(struct vpc_supply *s, struct vpc_wait_stats *out)
{
    out->waits = atomic_load(&s->waits);
    out->total_ns = atomic_load(&s->total_ns);
    out->longest_ns = atomic_load(&s->longest_ns);
}

void vpc_supply_ahead_limit(struct vpc_supply *s, uint32_t pages)
{
    s->ahead_limit = pages;
}

int vpc_supply_ahead_fd(const struct vpc_supply *s)
{
    return s->ahead ? vpc_ahead_fd(s->ahead) : -ENOTCONN;
}

void vpc_supply_ahead_heard(struct vpc_supply *s)
{
    vpc_ahead_heard(s->ahead);
}

void vpc_supply_ahead_stats(struct vpc_supply *s, struct vpc_ahead_stats *out)
{
    *out = (struct vpc_ahead_stats){0};
    if (s->ahead)
        vpc_ahead_stats(s->ahead, out);
}

int vpc_mlock_future(void)
{
    size_t page = (size_t)sysconf(_SC_PAGESIZE);
    unsigned char vec = 0;
    void *p = mmap(NULL, page, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);

    if (p == MAP_FAILED)
        return errno == EAGAIN; /* over RLIMIT_MEMLOCK, which only a locked mapping meets */
    if (mincore(p, page, &vec) < 0)
        vec = 0;
    munmap(p, page);
    return vec & 1;
}
