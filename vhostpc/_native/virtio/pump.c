/* Pumps: a queue joined to a file descriptor. What both directions share. */
#define _GNU_SOURCE
#include <poll.h>
#include <sched.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>
#include "event_internal.h"
#include "virtio/pump_internal.h"

#define VAIN 16            /* kicks in a row without work, after which the ring is polled */
#define CALM_MS 10         /* then between two polls of the ring */
#define AT_ONCE_NS 500000u /* a shorter wait does not count as one, also on a busy machine */
#define LINGER_NS 30000u /* about the cost of a sleep, a kick and a wake-up where they are expensive */
#define SLOTS_LEN ((size_t)VPC_BATCH * (VPC_MAX_FRAME + 1))

int vpc_pump_new(struct vpc_vq *vq, struct vpc_pump **out)
{
    struct vpc_pump *p = calloc(1, sizeof(*p));
    int rc = -ENOMEM;

    if (!p)
        return rc;
    p->vq = vq;
    p->arena = p->slots = MAP_FAILED;
    vpc_walk_init(&p->walk);
    p->stop_fd = event_new();
    if (p->stop_fd < 0) {
        rc = -errno;
        goto fail;
    }
    p->arena = mmap(NULL, VPC_OUT_ARENA, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    p->slots = mmap(NULL, SLOTS_LEN, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    p->segs = malloc(VPC_IN_SEGS * sizeof(*p->segs));
    if (p->arena == MAP_FAILED || p->slots == MAP_FAILED || !p->segs)
        goto fail;
    /* A huge page would make 64 short frames cost 4 MiB. */
    (void)madvise(p->slots, SLOTS_LEN, MADV_NOHUGEPAGE);
    *out = p;
    return 0;
fail:
    vpc_pump_free(p);
    return rc;
}

void vpc_pump_free(struct vpc_pump *p)
{
    if (!p)
        return;
    if (p->stop_fd >= 0)
        close(p->stop_fd);
    if (p->arena != MAP_FAILED)
        munmap(p->arena, VPC_OUT_ARENA);
    if (p->slots != MAP_FAILED)
        munmap(p->slots, SLOTS_LEN);
    free(p->segs);
    vpc_walk_free(&p->walk);
    free(p);
}

void vpc_pump_stop(struct vpc_pump *p)
{
    atomic_store(&p->stop, 1);
    vpc_vq_stop(p->vq, 1);
    event_poke(p->stop_fd);
}

void vpc_pump_clear(struct vpc_pump *p)
{
    atomic_store(&p->stop, 0);
    vpc_vq_stop(p->vq, 0);
    event_drain(p->stop_fd);
}

void vpc_pump_stats(struct vpc_pump *p, struct vpc_pump_stats *out)
{
    out->frames = atomic_load(&p->frames);
    out->bytes = atomic_load(&p->bytes);
    out->dropped = atomic_load(&p->dropped);
    out->discarded = atomic_load(&p->discarded);
    out->batches = atomic_load(&p->batches);
    out->syscalls = atomic_load(&p->syscalls);
    out->calls = atomic_load(&p->calls);
}

int vpc_pump_wait(struct vpc_pump *p, int a, int b, int ms)
{
    struct pollfd fds[3] = {{.fd = p->stop_fd, .events = POLLIN},
                            {.fd = a, .events = POLLIN},
                            {.fd = b, .events = POLLIN}};

    vpc_count(&p->syscalls, 1);
    if (poll(fds, 3, ms) < 0)
        return errno == EINTR ? !vpc_pump_stopped(p) : -errno;
    if (vpc_pump_stopped(p))
        return 0;
    if ((fds[1].revents | fds[2].revents) & POLLNVAL)
        return -EBADF;
    return 1;
}

uint64_t vpc_pump_now(void)
{
    struct timespec t;

    clock_gettime(CLOCK_MONOTONIC, &t);
    return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
}

/* Poll the ring for a while, letting all other threads run first: the driver need not kick and nobody has to be
 * woken. Only while buffers come that fast: a pump with little to do sleeps at once and costs nothing. */
static int linger(struct vpc_pump *p, uint64_t begin)
{
    uint16_t seen = p->vq->avail_idx; /* buffers that were seen already are too few for the current frame */
    int rc = 0;

    while (p->linger && !rc && !vpc_pump_stopped(p) && vpc_pump_now() - begin < LINGER_NS) {
        (void)sched_yield();
        vpc_count(&p->syscalls, 1);
        rc = vpc_vq_refresh(p->vq);
        if (rc > 0 && p->vq->avail_idx == seen)
            rc = 0;
    }
    return rc;
}

/* A kick may come late and bring no work. Where many in a row do, and at once, its counter never empties
 * (EFD_SEMAPHORE, eventfd(2)) or somebody writes it without reason: poll the ring at intervals. */
static int calm_down(struct vpc_pump *p)
{
    if (p->vq->avail_idx != p->vain_at)
        p->vain = 0;
    p->vain_at = p->vq->avail_idx;
    return p->vain < VAIN ? 1 : vpc_pump_wait(p, -1, -1, CALM_MS);
}

int vpc_pump_idle(struct vpc_pump *p, int kick_fd, int ms)
{
    uint64_t begin = vpc_pump_now(), asleep;
    int rc = linger(p, begin);

    if (!rc)
        rc = vpc_vq_enable_notify(p->vq, 0);
    if (rc)
        return rc;
    rc = calm_down(p);
    if (rc <= 0)
        return rc ? rc : -ECANCELED;
    asleep = vpc_pump_now();
    rc = vpc_pump_wait(p, kick_fd, -1, ms);
    p->linger = vpc_pump_now() - begin < LINGER_NS;
    if (rc > 0) {
        if (vpc_event_clear(kick_fd) && vpc_pump_now() - asleep < AT_ONCE_NS && p->vain < VAIN)
            p->vain++;
        vpc_count(&p->syscalls, 1);
        /* A long wait and a batch at its end: it was the wake-up that took so long. */
        if (!p->linger) {
            int came = vpc_vq_refresh(p->vq);

            if (came < 0)
                return came;
            p->linger = came >= VPC_BATCH;
        }
    }
    return rc ? rc : -ECANCELED;
}
