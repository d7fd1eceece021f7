/* The threads that wait for pages ahead, without any page: what they serve is a sleep that the driver ends.
 *
 *   ahead ROUNDS
 *
 * Each round three threads make requests of one pool, with a limit of its own, while the main thread lets those that
 * are being served go, listens for reports and closes and opens the pool again. In some rounds threads cannot be
 * started, from a moment on or now and then. Each request that was accepted must be served once, wanted or not; no more than
 * the limit at a time; all threads must end. Built with the thread sanitizer, it ends at the first data race.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <poll.h>
#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include "memory/ahead_internal.h"

#define CALLERS 3
#define REQUESTS 300u

#define CHECK(what)                                                                                          \
    do {                                                                                                     \
        if (!(what)) {                                                                                       \
            fprintf(stderr, "line %d: %s\n", __LINE__, #what);                                               \
            exit(2);                                                                                         \
        }                                                                                                    \
    } while (0)

static struct vpc_ahead *pool;
static atomic_int now, most, calling, served[CALLERS * REQUESTS];
static atomic_ulong accepted, unwanted, refused, not_started;
static atomic_int refuse; /* of the threads that are to be started, one in so many is not; 0: all are */
static pthread_mutex_t gate = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t go = PTHREAD_COND_INITIALIZER;
static int let_go; /* under gate */

int __real_pthread_create(pthread_t *thread, const pthread_attr_t *attr, void *(*life)(void *), void *arg);

int __wrap_pthread_create(pthread_t *thread, const pthread_attr_t *attr, void *(*life)(void *), void *arg)
{
    static atomic_uint calls;
    int every = attr ? atomic_load(&refuse) : 0; /* the callers' own have none */

    if (every && atomic_fetch_add(&calls, 1) % (unsigned)every == 0) {
        atomic_fetch_add(&not_started, 1);
        return EAGAIN;
    }
    return __real_pthread_create(thread, attr, life, arg);
}

static void serve(struct vpc_map *map, uint64_t page, bool wanted)
{
    CHECK(!map);
    atomic_fetch_add(&served[page], 1);
    if (!wanted) {
        atomic_fetch_add(&unwanted, 1);
        return;
    }
    int n = atomic_fetch_add(&now, 1) + 1, old = atomic_load(&most);
    while (n > old && !atomic_compare_exchange_weak(&most, &old, n))
        ;
    pthread_mutex_lock(&gate);
    while (!let_go)
        pthread_cond_wait(&go, &gate);
    if (let_go > 0)
        let_go--;
    pthread_mutex_unlock(&gate);
    atomic_fetch_sub(&now, 1);
}

static void *caller(void *first)
{
    uint64_t at = (uint64_t)(uintptr_t)first;

    for (uint32_t i = 0; i < REQUESTS; i++) {
        if (vpc_ahead_request(pool, serve, NULL, at + i))
            atomic_fetch_add(&accepted, 1);
        else
            atomic_fetch_add(&refused, 1);
        if (i % 8 == 7)
            sched_yield();
    }
    atomic_fetch_sub(&calling, 1);
    return NULL;
}

static void let(int how_many)
{
    pthread_mutex_lock(&gate);
    let_go = how_many;
    pthread_cond_broadcast(&go);
    pthread_mutex_unlock(&gate);
}

static struct vpc_ahead_stats stats(void)
{
    struct vpc_ahead_stats s;

    vpc_ahead_stats(pool, &s);
    return s;
}

/* Wait for the eventfd until no thread is left. */
static void until_ended(void)
{
    while (stats().threads || stats().waiting) {
        struct pollfd fd = {.fd = vpc_ahead_fd(pool), .events = POLLIN};

        CHECK(poll(&fd, 1, 30000) == 1);
        vpc_ahead_heard(pool);
    }
}

static void play(unsigned round)
{
    uint32_t limit = round % 3 == 0 ? 64 : round % 3 == 1 ? 5 : 1;
    pthread_t threads[CALLERS];
    unsigned long before = atomic_load(&accepted);

    atomic_store(&most, 0);
    atomic_store(&refuse, round % 4 == 2 ? 1 : round % 4 == 3 ? 7 : 0);
    for (uint32_t i = 0; i < CALLERS * REQUESTS; i++)
        atomic_store(&served[i], 0);
    vpc_ahead_open(pool, limit);
    atomic_store(&calling, CALLERS);
    for (uint64_t i = 0; i < CALLERS; i++)
        CHECK(pthread_create(&threads[i], NULL, caller, (void *)(uintptr_t)(i * REQUESTS)) == 0);
    while (atomic_load(&calling)) {
        let(1);
        vpc_ahead_heard(pool);
        CHECK(stats().threads <= limit && stats().waiting <= limit);
        if (round % 5 == 4 && atomic_load(&calling) == 1) {
            vpc_ahead_close(pool);
            vpc_ahead_open(pool, limit);
        }
    }
    for (int i = 0; i < CALLERS; i++)
        pthread_join(threads[i], NULL);
    if (round % 2)
        vpc_ahead_close(pool); /* requests that no thread has are dropped */
    let(-1);
    vpc_ahead_close(pool);
    until_ended();
    let(0);
    CHECK(atomic_load(&most) <= (int)limit);
    unsigned long all = 0;
    for (uint32_t i = 0; i < CALLERS * REQUESTS; i++) {
        CHECK(atomic_load(&served[i]) <= 1);
        all += (unsigned long)atomic_load(&served[i]);
    }
    CHECK(all == atomic_load(&accepted) - before);
}

int main(int argc, char **argv)
{
    unsigned rounds = argc > 1 ? (unsigned)atoi(argv[1]) : 10;

    CHECK(vpc_ahead_new(&pool) == 0);
    CHECK(!vpc_ahead_request(pool, serve, NULL, 0)); /* not open yet */
    for (unsigned i = 0; i < rounds; i++)
        play(i);
    vpc_ahead_drop(pool);
    printf("rounds %u accepted %lu refused %lu unwanted %lu not_started %lu\n", rounds, atomic_load(&accepted),
           atomic_load(&refused), atomic_load(&unwanted), atomic_load(&not_started));
    return 0;
}
