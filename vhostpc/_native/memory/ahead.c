/* Threads that wait for pages which are asked for ahead of the thread that needs them.
 *
 * A userfaultfd reports a missing page only while a thread waits for it, so each page that is to be in flight together
 * with others needs a thread that waits: one of the few dozen of these. Such a thread touches one page by one byte and
 * has no other part in anything. Nobody depends on it: who needs the page meets it present, or waits as if there had
 * been no request. So it does not matter if no thread can be started, or if all of them are asleep. */
#define _GNU_SOURCE
#include "memory/ahead_internal.h"

#include <errno.h>
#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <sys/prctl.h>
#include <unistd.h>
#include "event_internal.h"

#define STACK (128u << 10) /* of which a page or two are used */

struct request {
    vpc_ahead_serve serve;
    struct vpc_map *map;
    uint64_t page;
};

/* All under the lock, unless stated otherwise. */
struct vpc_ahead {
    atomic_int refs; /* the owner's, and one for each thread */
    pthread_mutex_t lock; /* never held across a touch */
    pthread_cond_t work;
    bool open;
    uint32_t limit;
    uint32_t threads;
    bool starting;         /* one is being started, which starts the next if there are too few */
    uint32_t out;          /* requests that wait for a thread, and those that threads have */
    uint32_t first, count; /* of the requests that wait for a thread */
    struct request queue[VPC_AHEAD_MOST];
    uint64_t asked, failed;
    int fd;          /* eventfd: a page has come, or a thread has ended, since vpc_ahead_heard */
    atomic_int told; /* the eventfd was written */
};

int vpc_ahead_new(struct vpc_ahead **out)
{
    struct vpc_ahead *a = calloc(1, sizeof(*a));

    if (!a)
        return -ENOMEM;
    a->fd = event_new();
    if (a->fd < 0) {
        int rc = -errno;
        free(a);
        return rc;
    }
    atomic_init(&a->refs, 1);
    pthread_mutex_init(&a->lock, NULL);
    pthread_cond_init(&a->work, NULL);
    *out = a;
    return 0;
}

static void unref(struct vpc_ahead *a)
{
    if (atomic_fetch_sub(&a->refs, 1) != 1)
        return;
    close(a->fd);
    pthread_cond_destroy(&a->work);
    pthread_mutex_destroy(&a->lock);
    free(a);
}

void vpc_ahead_open(struct vpc_ahead *a, uint32_t limit)
{
    pthread_mutex_lock(&a->lock);
    a->open = true;
    a->limit = limit < VPC_AHEAD_MOST ? limit : VPC_AHEAD_MOST;
    pthread_mutex_unlock(&a->lock);
}

void vpc_ahead_close(struct vpc_ahead *a)
{
    pthread_mutex_lock(&a->lock);
    a->open = false;
    pthread_cond_broadcast(&a->work);
    pthread_mutex_unlock(&a->lock);
}

void vpc_ahead_drop(struct vpc_ahead *a)
{
    if (!a)
        return;
    vpc_ahead_close(a);
    unref(a);
}

static void tell(struct vpc_ahead *a)
{
    if (!atomic_exchange(&a->told, 1))
        event_poke(a->fd);
}

/* Serve the oldest request. Called with the lock, which is released meanwhile. */
static void serve_first(struct vpc_ahead *a, bool wanted)
{
    struct request r = a->queue[a->first];

    a->first = (a->first + 1) % VPC_AHEAD_MOST;
    a->count--;
    pthread_mutex_unlock(&a->lock);
    r.serve(r.map, r.page, wanted);
    pthread_mutex_lock(&a->lock);
    a->out--;
    tell(a);
}

static void *life(void *ahead);

/* SIGBUS alone reaches these threads: the guard's handler runs where the touch was. */
static int start(struct vpc_ahead *a)
{
    sigset_t all, before;
    pthread_attr_t how;
    pthread_t thread;
    int rc;

    sigfillset(&all);
    sigdelset(&all, SIGBUS);
    pthread_attr_init(&how);
    (void)pthread_attr_setstacksize(&how, STACK);
    (void)pthread_attr_setdetachstate(&how, PTHREAD_CREATE_DETACHED);
    atomic_fetch_add(&a->refs, 1);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    rc = pthread_create(&thread, &how, life, a);
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    pthread_attr_destroy(&how);
    if (rc)
        unref(a);
    return -rc;
}

/* No thread could be started: drop the requests that wait for one. Threads are short in this process, and others are
 * needed more: keep half of those that we have. */
static void do_without(struct vpc_ahead *a)
{
    pthread_mutex_lock(&a->lock);
    a->threads--;
    a->starting = false;
    a->limit = a->threads / 2;
    a->failed++;
    while (a->count)
        serve_first(a, false);
    pthread_cond_broadcast(&a->work);
    pthread_mutex_unlock(&a->lock);
}

/* Start a thread, if there are more requests than threads. Each new one starts the next: that is their time, not that
 * of a thread that has a page to wait for or a loop to turn. */
static void start_next(struct vpc_ahead *a)
{
    bool more;

    pthread_mutex_lock(&a->lock);
    more = a->out > a->threads && a->open;
    if (more)
        a->threads++;
    else
        a->starting = false;
    pthread_mutex_unlock(&a->lock);
    if (more && start(a) < 0)
        do_without(a);
}

static void *life(void *ahead)
{
    struct vpc_ahead *a = ahead;

    (void)prctl(PR_SET_NAME, "vpc-ahead", 0, 0, 0);
    start_next(a);
    pthread_mutex_lock(&a->lock);
    for (;;) {
        while (!a->count && a->open && a->threads <= a->limit)
            pthread_cond_wait(&a->work, &a->lock);
        if (!a->count)
            break;
        serve_first(a, a->open);
    }
    a->threads--;
    tell(a);
    pthread_mutex_unlock(&a->lock);
    unref(a);
    return NULL;
}

bool vpc_ahead_request(struct vpc_ahead *a, vpc_ahead_serve serve, struct vpc_map *map, uint64_t page)
{
    bool room, more = false;

    pthread_mutex_lock(&a->lock);
    room = a->open && a->out < a->limit;
    if (room) {
        a->queue[(a->first + a->count++) % VPC_AHEAD_MOST] = (struct request){serve, map, page};
        a->asked++;
        a->out++;
        more = a->out > a->threads && !a->starting;
        if (more) {
            a->starting = true;
            a->threads++;
        } else if (a->out <= a->threads) {
            pthread_cond_signal(&a->work);
        }
    }
    pthread_mutex_unlock(&a->lock);
    if (more && start(a) < 0)
        do_without(a);
    return room;
}

int vpc_ahead_fd(const struct vpc_ahead *a)
{
    return a->fd;
}

void vpc_ahead_heard(struct vpc_ahead *a)
{
    event_drain(a->fd);
    atomic_store(&a->told, 0); /* the caller looks after this */
}

void vpc_ahead_stats(struct vpc_ahead *a, struct vpc_ahead_stats *out)
{
    pthread_mutex_lock(&a->lock);
    *out = (struct vpc_ahead_stats){.threads = a->threads, .waiting = a->out, .asked = a->asked, .failed = a->failed};
    pthread_mutex_unlock(&a->lock);
}
