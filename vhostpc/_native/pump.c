/* Pumps: a queue joined to a file descriptor. What both directions share. */
#define _GNU_SOURCE
#include <poll.h>
#include <sched.h>
#include <stdlib.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>
#include "pump_internal.h"

#define LINGER_NS 30000u /* about what a sleep, a kick and a wake-up cost where they are dear */
#define SLOTS_LEN ((size_t)VPC_BATCH * (VPC_MAX_FRAME + 1))

int vpc_pump_new(struct vpc_vq *vq, struct vpc_pump **out)
{
    struct vpc_pump *p = calloc(1, sizeof(*p));
    int rc = -ENOMEM;

    if (!p)
        return rc;
    p->vq = vq;
    p->arena = p->slots = MAP_FAILED;
    p->stop_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
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
    free(p);
}

void vpc_pump_stop(struct vpc_pump *p)
{
    uint64_t one = 1;

    atomic_store(&p->stop, 1);
    vpc_vq_stop(p->vq, 1);
    (void)!write(p->stop_fd, &one, sizeof(one));
}

void vpc_pump_clear(struct vpc_pump *p)
{
    atomic_store(&p->stop, 0);
    vpc_vq_stop(p->vq, 0);
    (void)vpc_clear_event(p->stop_fd);
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

int vpc_pump_wait(struct vpc_pump *p, int a, int b)
{
    struct pollfd fds[3] = {{.fd = p->stop_fd, .events = POLLIN},
                            {.fd = a, .events = POLLIN},
                            {.fd = b, .events = POLLIN}};

    vpc_count(&p->syscalls, 1);
    if (poll(fds, 3, -1) < 0)
        return errno == EINTR ? !vpc_pump_stopped(p) : -errno;
    if (vpc_pump_stopped(p))
        return 0;
    if ((fds[1].revents | fds[2].revents) & POLLNVAL)
        return -EBADF;
    return 1;
}

static uint64_t now_ns(void)
{
    struct timespec t;

    clock_gettime(CLOCK_MONOTONIC, &t);
    return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
}

/* Look at the ring for a while, letting everybody else run first: the driver need not kick and nobody has to be
 * woken. Only while buffers come that fast: a pump with little to do sleeps at once and costs nothing. */
static int linger(struct vpc_pump *p, uint64_t begin)
{
    uint16_t seen = p->vq->avail_idx; /* buffers that were seen already are too few for the frame in hand */
    int rc = 0;

    while (p->linger && !rc && !vpc_pump_stopped(p) && now_ns() - begin < LINGER_NS) {
        (void)sched_yield();
        vpc_count(&p->syscalls, 1);
        rc = vpc_vq_refresh(p->vq);
        if (rc > 0 && p->vq->avail_idx == seen)
            rc = 0;
    }
    return rc;
}

int vpc_pump_idle(struct vpc_pump *p, int kick_fd)
{
    uint64_t begin = now_ns();
    int rc = linger(p, begin);

    if (!rc)
        rc = vpc_vq_enable_notify(p->vq, 0);
    if (rc)
        return rc;
    rc = vpc_pump_wait(p, kick_fd, -1);
    p->linger = now_ns() - begin < LINGER_NS;
    if (rc > 0) {
        (void)vpc_clear_event(kick_fd);
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
