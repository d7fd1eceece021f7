/* Pages that go away while threads touch them.
 *
 *   guard ROUNDS
 *
 * Four sessions read their memory as fast as they can, and one more thread makes and drops mappings, so that the
 * registry of the guard changes all the time. The main thread shrinks the file of one session after the other, ROUNDS
 * times; that one makes itself anew. As long as a session is not lost it has read its own words and nothing else; it
 * is lost only when its own file was shrunk, and it is told where. A thread faults beside them in memory of its own,
 * where a handler that was there before us makes the page.
 * Built with the address and undefined-behaviour sanitizers, it ends at an entry that is used when it is gone.
 */
#define _GNU_SOURCE
#include <poll.h>
#include <pthread.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>
#include "memory/gm_internal.h"

#define SESSIONS 4
#define PAGE 4096u
#define PAGES 16u
#define SIZE (PAGES * PAGE)
#define GPA 0x10000u

#define CHECK(what)                                                                                          \
    do {                                                                                                     \
        if (!(what)) {                                                                                       \
            fprintf(stderr, "line %d: %s\n", __LINE__, #what);                                               \
            exit(2);                                                                                         \
        }                                                                                                    \
    } while (0)

struct session {
    pthread_t thread;
    int number;
    pthread_mutex_t lock; /* of its file */
    int fd;               /* -1: not open */
    atomic_int shrunk;    /* this file was */
    atomic_uint lost;     /* how often it has lost its memory */
};

static struct session sessions[SESSIONS];
static atomic_int done;
static atomic_ulong reads, churned, elsewhere, mended;
static unsigned char *foreign;

static struct vpc_map *map_file(struct vpc_supply *supply, int fd)
{
    struct vpc_map *map;

    CHECK(vpc_map_new(supply, fd, 0, SIZE, 0, &map) == 0);
    return map;
}

static int new_file(uint64_t word)
{
    int fd = memfd_create("guest", MFD_CLOEXEC);
    uint64_t words[PAGE / 8];

    CHECK(fd >= 0 && ftruncate(fd, SIZE) == 0);
    for (uint32_t i = 0; i < PAGE / 8; i++)
        words[i] = word;
    for (uint32_t i = 0; i < PAGES; i++)
        CHECK(pwrite(fd, words, PAGE, i * PAGE) == PAGE);
    return fd;
}

/* Until its memory is lost, or all is done. */
static void read_on(struct session *s, struct vpc_supply *supply, struct vpc_gm *gm, uint64_t word)
{
    uint64_t copy[3 * PAGE / 8];
    uint32_t at = 0;

    while (!atomic_load(&done)) {
        at = (at + 7 * 64) % (SIZE - sizeof copy);
        CHECK(vpc_gm_read(gm, GPA + at, copy, sizeof copy) == 0);
        if (vpc_gm_lost(gm)) {
            struct vpc_strike strike;
            struct pollfd told = {.fd = vpc_supply_strike_fd(supply), .events = POLLIN};

            CHECK(atomic_load(&s->shrunk));
            CHECK(poll(&told, 1, 10000) == 1 && vpc_supply_struck(supply, &strike) == 1);
            CHECK(strike.offset < SIZE && strike.size <= strike.offset && strike.use == VPC_USE_MEMORY);
            atomic_fetch_add(&s->lost, 1);
            return;
        }
        for (uint32_t i = 0; i < sizeof copy / 8; i++)
            CHECK(copy[i] == word);
        atomic_fetch_add_explicit(&reads, 1, memory_order_relaxed);
    }
}

static void *session(void *arg)
{
    struct session *s = arg;

    for (uint64_t turn = 1; !atomic_load(&done); turn++) {
        uint64_t word = turn * SESSIONS + (uint64_t)s->number;
        struct vpc_supply *supply;
        struct vpc_gm *gm;
        int fd = new_file(word);

        CHECK(vpc_supply_new(&supply) == 0 && vpc_gm_new(supply, &gm) == 0);
        struct vpc_map *map = map_file(supply, fd);
        CHECK(vpc_gm_add(gm, map, GPA, SIZE, GPA) == 0);
        vpc_map_unref(map);
        pthread_mutex_lock(&s->lock);
        atomic_store(&s->shrunk, 0);
        s->fd = fd;
        pthread_mutex_unlock(&s->lock);
        read_on(s, supply, gm, word);
        pthread_mutex_lock(&s->lock);
        s->fd = -1;
        pthread_mutex_unlock(&s->lock);
        close(fd);
        vpc_gm_unref(gm);
        vpc_supply_unref(supply);
    }
    return NULL;
}

static void *churn(void *arg)
{
    struct vpc_supply *supply;
    struct vpc_map *held[8] = {0};
    int fd = new_file(1);

    (void)arg;
    CHECK(vpc_supply_new(&supply) == 0);
    for (uint64_t i = 0; !atomic_load(&done); i++) {
        vpc_map_unref(held[i * 5 % 8]);
        held[i * 5 % 8] = map_file(supply, fd);
        atomic_fetch_add_explicit(&churned, 1, memory_order_relaxed);
    }
    for (int i = 0; i < 8; i++)
        vpc_map_unref(held[i]);
    CHECK(!vpc_supply_is_lost(supply));
    vpc_supply_unref(supply);
    close(fd);
    return NULL;
}

/* Was here first: makes pages of its own, and of nobody else's. */
static void mend(int number, siginfo_t *info, void *context)
{
    uintptr_t at = (uintptr_t)info->si_addr;

    (void)number;
    (void)context;
    if (at - (uintptr_t)foreign >= SIZE)
        _exit(3);
    if (mmap((void *)(at & ~(uintptr_t)(PAGE - 1)), PAGE, PROT_READ | PROT_WRITE,
             MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0) == MAP_FAILED)
        _exit(4);
    atomic_fetch_add(&mended, 1);
}

static void *fault_elsewhere(void *arg)
{
    int fd = memfd_create("elsewhere", MFD_CLOEXEC);

    (void)arg;
    CHECK(fd >= 0 && ftruncate(fd, SIZE) == 0);
    while (!atomic_load(&done)) {
        /* A new mapping of what is not in the file. */
        CHECK(mmap(foreign, SIZE, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_FIXED, fd, SIZE) == foreign);
        for (uint32_t i = 0; i < PAGES; i++)
            *(volatile unsigned char *)(foreign + i * PAGE) = 1;
        atomic_fetch_add(&elsewhere, PAGES);
    }
    close(fd);
    return NULL;
}

int main(int argc, char **argv)
{
    unsigned rounds = argc > 1 ? (unsigned)strtoul(argv[1], NULL, 0) : 100;
    struct sigaction before = {.sa_sigaction = mend, .sa_flags = SA_SIGINFO};
    pthread_t others[2];

    foreign = mmap(NULL, SIZE, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    CHECK(foreign != MAP_FAILED && sigaction(SIGBUS, &before, NULL) == 0);
    for (int i = 0; i < SESSIONS; i++) {
        sessions[i].number = i;
        sessions[i].fd = -1;
        pthread_mutex_init(&sessions[i].lock, NULL);
        CHECK(pthread_create(&sessions[i].thread, NULL, session, &sessions[i]) == 0);
    }
    CHECK(pthread_create(&others[0], NULL, churn, NULL) == 0);
    CHECK(pthread_create(&others[1], NULL, fault_elsewhere, NULL) == 0);
    for (unsigned i = 0; i < rounds;) {
        struct session *s = &sessions[i % SESSIONS];
        unsigned lost = atomic_load(&s->lost);

        pthread_mutex_lock(&s->lock);
        int open = s->fd >= 0;
        if (open) {
            atomic_store(&s->shrunk, 1);
            CHECK(ftruncate(s->fd, i % PAGES * PAGE) == 0);
        }
        pthread_mutex_unlock(&s->lock);
        while (open && atomic_load(&s->lost) == lost)
            sched_yield();
        i += (unsigned)open;
    }
    atomic_store(&done, 1);
    for (int i = 0; i < SESSIONS; i++)
        pthread_join(sessions[i].thread, NULL);
    pthread_join(others[0], NULL);
    pthread_join(others[1], NULL);
    unsigned lost = 0;
    for (int i = 0; i < SESSIONS; i++)
        lost += atomic_load(&sessions[i].lost);
    CHECK(lost == rounds && atomic_load(&mended) == atomic_load(&elsewhere));
    printf("lost %u reads %lu churned %lu elsewhere %lu\n", lost, atomic_load(&reads), atomic_load(&churned),
           atomic_load(&elsewhere));
    return 0;
}
