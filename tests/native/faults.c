/* The fault service at work in one process: many threads touch, one serves, one brings, one looks on and meddles.
 *
 *   faults ROUNDS
 *
 * Each round a block of 512 pages is absent. Six threads touch its pages through two mappings with a
 * userfaultfd each; the fault loop reads their faults and asks for pages over a socket; the source answers with RAM
 * records; the loader places them and wakes the waiters. Meanwhile another thread reads the numbers and the waiters,
 * sets the ranges again, says again which threads are vCPUs, and adds and removes a third client. In the end all waits are
 * counted, and nobody waited longer than all of it took. Every touch must find the page's own bytes, and each
 * page must have been asked for at most once. Behind them lie pages that the source never sends: a thread that touches one is
 * let go, by zeros, when all that was to come has come. The first growths of any list find no memory, as in a shortage: no
 * fault may be lost by that. Built with the thread sanitizer, it ends at the first data race.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/userfaultfd.h>
#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <unistd.h>
#include "pages/ram_internal.h"
#include "pages/records_internal.h"
#include "pages/vpc_load.h"
#include "ufd/vpc_uffd.h"

#define PAGES 512u
#define NEVER 32u
#define LENGTH ((PAGES + NEVER) * 4096ul)
#define CLIENTS 2
#define TOUCHERS 3 /* of each client */

#define CHECK(what)                                                                                          \
    do {                                                                                                     \
        if (!(what)) {                                                                                       \
            fprintf(stderr, "line %d: %s\n", __LINE__, #what);                                               \
            exit(2);                                                                                         \
        }                                                                                                    \
    } while (0)

#define SHORTAGES 6

/* The linker puts this in the place of realloc. */
void *__real_realloc(void *old, size_t length);
void *__wrap_realloc(void *old, size_t length);
static atomic_int shortages;

void *__wrap_realloc(void *old, size_t length)
{
    return atomic_fetch_sub(&shortages, 1) > 0 ? NULL : __real_realloc(old, length);
}

static struct vpc_ram *ram;
static struct vpc_fault *service;
static struct vpc_load *load;
static unsigned char *view[CLIENTS];
static int client[CLIENTS], ufd[CLIENTS];
static int back[2], records[2]; /* return path: ours, the source's; records: the loader's, the source's */
static atomic_int over, named;
static atomic_uint thread[TOUCHERS]; /* of the first client: these are vCPUs */
static atomic_ulong asked, found;

static int open_ufd(void)
{
    uint64_t offered, ioctls;
    int fd = vpc_uffd_open(VPC_UFFD_DEVICE);

    if (fd < 0)
        fd = vpc_uffd_open(VPC_UFFD_SYSCALL);
    if (fd < 0)
        fd = vpc_uffd_open(VPC_UFFD_USER_MODE);
    CHECK(fd >= 0 && vpc_uffd_api(fd, UFFD_FEATURE_MISSING_SHMEM | UFFD_FEATURE_THREAD_ID, &offered, &ioctls) == 0);
    return fd;
}

static unsigned char byte_of(uint64_t page)
{
    return (unsigned char)(1 + page % 251);
}

static void *touch(void *arg)
{
    uintptr_t me = (uintptr_t)arg;
    const unsigned char *at = view[me % CLIENTS];

    if (me % CLIENTS == 0)
        atomic_store(&thread[me / CLIENTS], (unsigned)syscall(SYS_gettid));
    while (!atomic_load(&named))
        sched_yield();
    for (uint64_t i = 0; i < PAGES; i++) {
        uint64_t page = me % 3 == 0 ? i : me % 3 == 1 ? PAGES - 1 - i : i * 77 % PAGES;
        CHECK(*(const volatile unsigned char *)(at + page * 4096 + 9) == byte_of(page));
        atomic_fetch_add(&found, 1);
    }
    for (uint64_t page = PAGES; page < PAGES + NEVER; page++)
        CHECK(*(const volatile unsigned char *)(at + page * 4096 + 9) == 0);
    return NULL;
}

static void *serve(void *arg)
{
    (void)arg;
    CHECK(vpc_fault_run(service, 0) == 0);
    return NULL;
}

static void *bring(void *arg)
{
    (void)arg;
    int rc = vpc_load_run(load, 0);
    CHECK(rc == VPC_LOAD_EOS);
    return NULL;
}

static void send_all(const unsigned char *data, size_t length)
{
    while (length) {
        ssize_t n = write(records[1], data, length);
        CHECK(n > 0);
        data += n;
        length -= (size_t)n;
    }
}

/* The source: answers each request with the page asked for; an end of section when told to stop. */
static void *source(void *arg)
{
    static unsigned char record[8 + 2 + 4096];
    unsigned char m[4 + 13 + 1];
    ssize_t n;

    (void)arg;
    while ((n = recv(back[1], m, sizeof m, MSG_WAITALL)) == (ssize_t)sizeof m) {
        uint64_t offset = get_be(m + 4, 8);
        CHECK(get_be(m, 2) == RP_REQ_PAGES_ID && get_be(m + 12, 4) == 4096 && offset < LENGTH);
        if (offset >= PAGES * 4096ul)
            continue;
        put_be(record, offset | REC_PAGE, 8);
        record[8] = 1;
        record[9] = 'm';
        memset(record + 10, byte_of(offset / 4096), 4096);
        send_all(record, sizeof record);
        atomic_fetch_add(&asked, 1);
    }
    CHECK(n == 0);
    put_be(record, REC_EOS, 8);
    send_all(record, 8);
    return NULL;
}

/* Which threads are vCPUs; the one left out has none just now. */
static void name_vcpus(int left_out)
{
    uint32_t ids[TOUCHERS];

    for (int i = 0; i < TOUCHERS; i++)
        ids[i] = i == left_out ? 0 : atomic_load(&thread[i]);
    CHECK(vpc_fault_set_vcpus(service, client[0], ids, TOUCHERS) == 0);
    CHECK(vpc_fault_set_vcpus(service, client[1], ids, TOUCHERS) == -EINVAL);
    CHECK(vpc_fault_set_vcpus(service, client[0], ids, TOUCHERS - 1) == -EINVAL);
}

static uint64_t now(void)
{
    struct timespec t;

    clock_gettime(CLOCK_MONOTONIC, &t);
    return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
}

static void check_times(uint64_t passed)
{
    struct vpc_blocked blocked;
    struct vpc_vcpu_waits vcpu;
    struct vpc_client_stats stats;
    uint64_t waits = 0, remote = 0;

    CHECK(vpc_fault_blocked(service, &blocked) == 0);
    CHECK(blocked.all_ns <= blocked.all_vcpus_ns && blocked.all_vcpus_ns <= passed);
    for (uint32_t i = 0; i <= TOUCHERS; i++) {
        if (i < TOUCHERS)
            CHECK(vpc_fault_vcpu_waits(service, i, &vcpu) == 0);
        else
            vcpu = blocked.others;
        CHECK(vcpu.waiting_now == 0 && vcpu.blocked_ns <= passed && vcpu.longest_ns <= vcpu.blocked_ns);
        CHECK(vcpu.remote <= vcpu.waits && vcpu.remote_ns <= passed * (i < TOUCHERS ? 1 : TOUCHERS));
        waits += vcpu.waits;
        remote += vcpu.remote;
    }
    CHECK(vpc_fault_vcpu_waits(service, TOUCHERS, &vcpu) == -ENOENT);
    CHECK(vpc_fault_client_stats(service, client[0], &stats) == 0);
    CHECK(waits == stats.wakes && stats.blocked_ns <= passed);
    for (int i = 0; i < VPC_LATENCY_BUCKETS; i++)
        remote -= blocked.latency[i];
    CHECK(remote == 0);
}

static void *meddle(void *arg)
{
    struct vpc_client_range range[CLIENTS];
    struct vpc_blocked blocked;

    (void)arg;
    int left_out = 0;
    for (int i = 0; i < CLIENTS; i++)
        range[i] = (struct vpc_client_range){.base = (uintptr_t)view[i], .length = LENGTH};
    while (!atomic_load(&over)) {
        struct vpc_fault_stats stats;
        struct vpc_client_stats numbers;
        struct vpc_load_stats loaded;
        struct vpc_waiter waiters[16];
        int spare = open_ufd();
        int third = vpc_fault_add_client(service, spare);

        CHECK(third >= 0 || third == -ENOSPC);
        vpc_fault_stats(service, &stats);
        vpc_load_stats(load, &loaded);
        CHECK(vpc_fault_client_stats(service, client[0], &numbers) == 0);
        CHECK(vpc_fault_waiting(service, waiters, 16) >= 0);
        for (int i = 0; i < CLIENTS; i++)
            CHECK(vpc_fault_set_ranges(service, client[i], &range[i], 1) == 0);
        name_vcpus(left_out++ % (TOUCHERS + 1));
        CHECK(vpc_fault_blocked(service, &blocked) == 0);
        if (third >= 0)
            CHECK(vpc_fault_remove_client(service, third) == 0);
        close(spare);
        (void)vpc_ram_count_bits(ram, 0, VPC_BITS_RECEIVED);
    }
    return NULL;
}

static void one_round(void)
{
    pthread_t touchers[CLIENTS * TOUCHERS], server, loader, origin, other;
    struct vpc_client_range range = {.length = LENGTH};
    int fd = memfd_create("block", MFD_CLOEXEC), place = open_ufd();
    uint64_t ioctls;

    CHECK(fd >= 0 && ftruncate(fd, (off_t)LENGTH) == 0);
    CHECK(socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, back) == 0);
    CHECK(socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, records) == 0);
    CHECK(vpc_ram_new(&ram) == 0 && vpc_ram_add(ram, "m", fd, 0, LENGTH, 4096) == 0);
    CHECK(vpc_fault_new(ram, &service) == 0);
    CHECK(vpc_uffd_register(place, vpc_ram_base(ram, 0), LENGTH, UFFDIO_REGISTER_MODE_MISSING, &ioctls) == 0);
    for (int i = 0; i < CLIENTS; i++) {
        view[i] = mmap(NULL, LENGTH, PROT_READ, MAP_SHARED, fd, 0);
        CHECK(view[i] != MAP_FAILED);
        ufd[i] = open_ufd();
        CHECK(vpc_uffd_register(ufd[i], (uintptr_t)view[i], LENGTH, UFFDIO_REGISTER_MODE_MISSING, &ioctls) == 0);
        client[i] = vpc_fault_add_client(service, ufd[i]);
        range.base = (uintptr_t)view[i];
        CHECK(client[i] == i && vpc_fault_set_ranges(service, i, &range, 1) == 0);
    }
    CHECK(vpc_fault_set_return_path(service, back[0]) == 0);
    CHECK(vpc_load_new(ram, service, records[0], place, &load) == 0);
    atomic_store(&shortages, SHORTAGES);
    atomic_store(&over, 0);
    atomic_store(&asked, 0);
    atomic_store(&found, 0);
    atomic_store(&named, 0);
    for (int i = 0; i < TOUCHERS; i++)
        atomic_store(&thread[i], 0);
    uint64_t begun = now();
    CHECK(pthread_create(&server, NULL, serve, NULL) == 0);
    CHECK(pthread_create(&loader, NULL, bring, NULL) == 0);
    CHECK(pthread_create(&origin, NULL, source, NULL) == 0);
    for (uintptr_t i = 0; i < CLIENTS * TOUCHERS; i++)
        CHECK(pthread_create(&touchers[i], NULL, touch, (void *)i) == 0);
    for (int i = 0; i < TOUCHERS; i++)
        while (!atomic_load(&thread[i]))
            sched_yield();
    name_vcpus(TOUCHERS);
    atomic_store(&named, 1);
    CHECK(pthread_create(&other, NULL, meddle, NULL) == 0);
    while (atomic_load(&found) < (unsigned long)PAGES * CLIENTS * TOUCHERS)
        sched_yield();
    CHECK(vpc_fault_settle(service) == 0);
    for (int i = 0; i < CLIENTS * TOUCHERS; i++)
        pthread_join(touchers[i], NULL);
    atomic_store(&over, 1);
    pthread_join(other, NULL);
    vpc_fault_stop(service);
    pthread_join(server, NULL);
    /* The service's copy of the return path goes, and with ours the source hears the end. */
    CHECK(vpc_fault_set_return_path(service, -1) == 0);
    close(back[0]);
    pthread_join(origin, NULL);
    pthread_join(loader, NULL);
    CHECK(atomic_load(&found) == (unsigned long)PAGES * CLIENTS * TOUCHERS);
    CHECK(atomic_load(&asked) == PAGES);
    CHECK(atomic_load(&shortages) <= 0);
    check_times(now() - begun);
    vpc_load_free(load);
    vpc_fault_free(service);
    for (int i = 0; i < CLIENTS; i++) {
        munmap(view[i], LENGTH);
        close(ufd[i]);
    }
    vpc_ram_free(ram);
    close(back[1]);
    close(records[0]);
    close(records[1]);
    close(place);
    close(fd);
}

int main(int argc, char **argv)
{
    unsigned long rounds = argc > 1 ? strtoul(argv[1], NULL, 0) : 1;

    for (unsigned long i = 0; i < rounds; i++)
        one_round();
    printf("rounds %lu pages %lu\n", rounds, rounds * PAGES);
    return 0;
}
