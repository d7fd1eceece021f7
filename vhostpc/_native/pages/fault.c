/* The fault service's life and its loop: reads the faults of any number of clients. See fault_internal.h. */
#define _GNU_SOURCE
#include "event_internal.h"
#include "clock.h"
#include "pages/fault_internal.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/userfaultfd.h>
#include <poll.h>
#include <pthread.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <unistd.h>

#define READY_A_WAIT 64
#define LAST_LOOKS 4096 /* after stop */
#define AGAIN_MS 64     /* the longest pause between two attempts at waiters that could not be answered */
#define STARVED_MS 16
#define CONTROL UINT32_MAX /* in place of a client's number */

/* ---- life */

int vpc_fault_new(struct vpc_ram *ram, struct vpc_fault **out)
{
    struct vpc_fault *s = calloc(1, sizeof *s);
    int rc;

    if (!s)
        return -ENOMEM;
    s->ready = -1;
    s->control = event_new();
    if (s->control < 0 || (s->ready = epoll_create1(EPOLL_CLOEXEC)) < 0)
        rc = -errno;
    else
        rc = vpc_fault_watch(s, s->control, CONTROL);
    if (rc < 0) {
        if (s->control >= 0)
            close(s->control);
        if (s->ready >= 0)
            close(s->ready);
        free(s);
        return rc;
    }
    s->ram = ram;
    s->out_fd = -1;
    s->vcpu_client = -1;
    pthread_mutex_init(&s->lock, NULL);
    pthread_mutex_init(&s->out_lock, NULL);
    *out = s;
    return 0;
}

void vpc_fault_free(struct vpc_fault *s)
{
    if (!s)
        return;
    for (int i = 0; i < s->client_count; i++)
        vpc_client_free(s->clients[i]);
    vpc_outbox_free(s);
    close(s->control);
    close(s->ready);
    pthread_mutex_destroy(&s->lock);
    pthread_mutex_destroy(&s->out_lock);
    free(s->waiters);
    free(s->trace);
    vpc_blocked_free(s);
    free(s);
}

void vpc_fault_stop(struct vpc_fault *s)
{
    atomic_store(&s->stop, 1);
    vpc_fault_kick(s);
}

/* ---- the loop */

/* Read and handle one batch of one client. Caller holds the lock. Returns events read. */
static int client_read(struct vpc_fault *s, int id)
{
    struct client *c = s->clients[id];
    struct vpc_uffd_event events[EVENTS_A_READ];
    int n;

    if (c->fd < 0 || c->stats.error)
        return 0;
    if (vpc_waiters_room(s) < 0) {
        s->starved = 1;
        return 0;
    }
    n = vpc_uffd_read(c->fd, events, EVENTS_A_READ);
    if (n == -EAGAIN || n == -EINTR)
        return 0;
    if (n <= 0) {
        c->stats.error = n ? -n : EPIPE;
        vpc_fault_unwatch(s, c->fd);
        return 0;
    }
    uint64_t when = now_ns();
    for (int i = 0; i < n; i++) {
        if (events[i].kind != UFFD_EVENT_PAGEFAULT) {
            c->stats.other_events++;
            if (events[i].kind == UFFD_EVENT_FORK)
                close((int)events[i].address); /* reading it gave us a descriptor that nobody requested */
            continue;
        }
        c->stats.faults++;
        s->stats.events++;
        if (vpc_waiter_resolve(s, vpc_waiter_add(s, id, &events[i], when)) == -ENXIO) {
            c->stats.found_nothing++;
            c->stats.last_unknown = events[i].address;
        }
    }
    return n;
}

/* Send as much as possible, then wait for a client, the control eventfd or room on the return path. */
static int wait_ready(struct vpc_fault *s, struct epoll_event *events, int timeout)
{
    pthread_mutex_lock(&s->out_lock);
    vpc_outbox_flush(s);
    struct pollfd fds[2] = {{.fd = s->ready, .events = POLLIN},
                            {.fd = s->out_begin < s->out_end ? s->out_fd : -1, .events = POLLOUT}};
    pthread_mutex_unlock(&s->out_lock);
    if (fds[1].fd >= 0) {
        if (poll(fds, 2, timeout) < 0)
            return -errno;
        timeout = 0;
    }
    int n = epoll_wait(s->ready, events, READY_A_WAIT, timeout);
    return n < 0 ? -errno : n;
}

static void handle(struct vpc_fault *s, const struct epoll_event *ev, int *got)
{
    if (ev->data.u32 == CONTROL) {
        event_drain(s->control);
        return;
    }
    struct client *c = s->clients[ev->data.u32];
    if (c->fd >= 0 && ev->events & (EPOLLERR | EPOLLHUP)) {
        /* A blocking ufd polls as an error: reading it could stop everybody. */
        c->stats.error = EINVAL;
        vpc_fault_unwatch(s, c->fd);
        return;
    }
    *got += client_read(s, (int)ev->data.u32);
}

/* Handle ready clients, and waiters that could not be answered before if they are due. Returns events read, or -EEXIST;
 * *again: some waiter cannot be answered yet. */
static int look(struct vpc_fault *s, const struct epoll_event *events, int n, int due, int *again)
{
    int got = 0;

    pthread_mutex_lock(&s->lock);
    for (int i = 0; i < n; i++)
        handle(s, &events[i], &got);
    if (s->again && due)
        vpc_waiters_again(s);
    if (s->born)
        got = -EEXIST;
    *again = s->again;
    pthread_mutex_unlock(&s->lock);
    return got;
}

/* No memory for the events that wait to be read, which would make us read again at once. */
static void rest(struct vpc_fault *s)
{
    struct pollfd control = {.fd = s->control, .events = POLLIN};

    s->starved = 0;
    (void)poll(&control, 1, STARVED_MS);
}

int vpc_fault_run(struct vpc_fault *s, uint64_t spin_ns)
{
    struct epoll_event events[READY_A_WAIT];
    uint64_t last_event = 0, due = 0;
    int rc = 0, again;
    int pause = 0; /* ms until waiters that could not be answered are tried again; 0: there are none */

    atomic_store(&s->running, 1);
    while (rc == 0 && !atomic_load(&s->stop)) {
        int spin = spin_ns && now_ns() - last_event < spin_ns;
        int n = wait_ready(s, events, spin ? 0 : pause ? pause : -1);

        if (n < 0 && n != -EINTR) {
            rc = n;
            break;
        }
        int got = look(s, events, n, pause && now_ns() >= due, &again);
        if (got < 0)
            rc = got;
        if (got && spin_ns)
            last_event = now_ns();
        if (!again) {
            pause = 0;
        } else if (!pause || now_ns() >= due) {
            pause = !pause ? 1 : pause < AGAIN_MS ? 2 * pause : AGAIN_MS;
            due = now_ns() + (uint64_t)pause * 1000000u;
        }
        if (s->starved)
            rest(s);
    }
    /* Faults from before the stop are answered, because nobody reads them later. Not for ever: clients may go on
     * faulting. */
    for (int i = 0; rc == 0 && i < LAST_LOOKS; i++) {
        int n = epoll_wait(s->ready, events, READY_A_WAIT, 0);

        if (n == 0 || (n < 0 && errno != EINTR) || s->starved)
            break;
        if (look(s, events, n, 0, &again) < 0)
            rc = -EEXIST;
    }
    s->starved = 0;
    atomic_store(&s->running, 0);
    atomic_store(&s->stop, 0);
    return rc;
}

/* ---- numbers */

static uint64_t count_waiters(struct vpc_fault *s, int client, int for_page)
{
    uint64_t n = 0;
    for (uint32_t i = 0; i < s->waiter_count; i++)
        n += (client < 0 || s->waiters[i].client == client) && (!for_page || s->waiters[i].block >= 0);
    return n;
}

int vpc_fault_client_stats(struct vpc_fault *s, int id, struct vpc_client_stats *out)
{
    int rc = -ENOENT;

    pthread_mutex_lock(&s->lock);
    struct client *c = vpc_client_of(s, id);
    if (c) {
        *out = c->stats;
        out->blocked_ns = vpc_blocked_ns(&c->party, now_ns());
        out->waiting_now = count_waiters(s, id, 0);
        out->waiting_for_page = count_waiters(s, id, 1);
        rc = 0;
    }
    pthread_mutex_unlock(&s->lock);
    return rc;
}

int vpc_fault_stats(struct vpc_fault *s, struct vpc_fault_stats *out)
{
    pthread_mutex_lock(&s->lock);
    *out = s->stats;
    out->waiting_now = count_waiters(s, -1, 0);
    out->short_now = 0;
    for (uint32_t i = 0; i < s->waiter_count; i++)
        out->short_now += s->waiters[i].way == WAY_AGAIN;
    pthread_mutex_unlock(&s->lock);
    pthread_mutex_lock(&s->out_lock);
    out->batches = s->out_batches;
    out->bytes_sent = s->out_bytes;
    out->outbox_bytes = s->out_end - s->out_begin;
    out->send_errno = s->out_errno;
    pthread_mutex_unlock(&s->out_lock);
    out->running = atomic_load(&s->running);
    return 0;
}

int vpc_fault_waiting(struct vpc_fault *s, struct vpc_waiter *out, uint32_t max)
{
    pthread_mutex_lock(&s->lock);
    uint32_t n = s->waiter_count < max ? s->waiter_count : max;
    if (n)
        memcpy(out, s->waiters, n * sizeof *out);
    pthread_mutex_unlock(&s->lock);
    return (int)n;
}

int vpc_fault_trace(struct vpc_fault *s, uint32_t entries)
{
    struct vpc_traced *ring = entries ? calloc(entries, sizeof *ring) : NULL;
    int rc = ring ? 0 : entries ? -ENOMEM : -EINVAL;

    pthread_mutex_lock(&s->lock);
    if (rc == 0 && s->trace)
        rc = -EBUSY;
    if (rc == 0) {
        s->trace = ring;
        s->trace_room = entries;
    }
    pthread_mutex_unlock(&s->lock);
    if (rc < 0)
        free(ring);
    return rc;
}

int vpc_fault_traced(struct vpc_fault *s, uint64_t *next, struct vpc_traced *out, uint32_t max)
{
    uint32_t n = 0;

    pthread_mutex_lock(&s->lock);
    if (s->traced - *next > s->trace_room || *next > s->traced)
        *next = s->traced > s->trace_room ? s->traced - s->trace_room : 0;
    for (; n < max && *next < s->traced; n++)
        out[n] = s->trace[(*next)++ % s->trace_room];
    pthread_mutex_unlock(&s->lock);
    return (int)n;
}
