/* vCPUs and dirty tracking at work in one process: three write and read, one lets them, one collects and meddles.
 *
 *   vcpus ROUNDS
 *
 * Each round three vCPUs share 200 pages of two blocks and rewrite them as fast as they can, while writes are tracked:
 * in turns synchronously (a thread lets each first writer go on) and, where the kernel has it, asynchronously. The
 * main thread collects, keeps a copy of each page that it finds dirty, reads the numbers and changes the rates. At
 * the end the copy must be the memory, all pages must be as their vCPUs' steps say, and nobody may be left waiting.
 * Built with the thread sanitizer, it ends at the first data race.
 */
#define _GNU_SOURCE
#include <fcntl.h>
#include <linux/userfaultfd.h>
#include <poll.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>
#include "pages/ram_internal.h"
#include "pages/vpc_load.h"
#include "pages/vpc_dirty.h"
#include "ufd/vpc_uffd.h"
#include "guest/vpc_vcpu.h"

#define CPUS 3
#define PAGES 100u /* of each of the two blocks */
#define SYNCS 60
/* Not in older headers: UFFD_FEATURE_WP_HUGETLBFS_SHMEM and UFFD_FEATURE_WP_ASYNC. */
#define WP_SHMEM ((uint64_t)1 << 12)
#define WP_ASYNC ((uint64_t)1 << 15)

#define CHECK(what)                                                                                          \
    do {                                                                                                     \
        if (!(what)) {                                                                                       \
            fprintf(stderr, "line %d: %s\n", __LINE__, #what);                                               \
            exit(2);                                                                                         \
        }                                                                                                    \
    } while (0)

static struct vpc_dirty *tracker;
static unsigned char copy[2][PAGES * 4096u];

static int open_ufd(uint64_t features)
{
    uint64_t offered, ioctls;
    int fd = vpc_uffd_open(VPC_UFFD_DEVICE);

    if (fd < 0)
        fd = vpc_uffd_open(VPC_UFFD_SYSCALL);
    if (fd < 0)
        fd = vpc_uffd_open(VPC_UFFD_USER_MODE);
    CHECK(fd >= 0);
    if (vpc_uffd_api(fd, features, &offered, &ioctls) == 0)
        return fd;
    close(fd);
    return -1;
}

static void *run_cpu(void *cpu)
{
    CHECK(vpc_vcpu_run(cpu, 0) == 0);
    return NULL;
}

static void *run_tracker(void *unused)
{
    (void)unused;
    CHECK(vpc_dirty_run(tracker) == 0);
    return NULL;
}

/* What is dirty goes into the copy; read from the file, as the kernel does for a source that sends it. */
static uint64_t copy_dirty(struct vpc_ram *ram)
{
    uint64_t pages = 0;

    for (int i = 0; i < 2; i++)
        for (uint64_t page = 0; page < PAGES; page++)
            if (bit_clear(ram->blocks[i], VPC_BITS_DIRTY, page)) {
                ssize_t got = pread(ram->blocks[i]->fd, copy[i] + page * 4096, 4096, (off_t)(page * 4096));
                CHECK(got == 4096);
                pages++;
            }
    return pages;
}

/* As a machine that stops and goes on; its state is read between. */
static void park_and_go(struct vpc_vcpu *cpu)
{
    struct pollfd p = {.fd = vpc_vcpu_parked_fd(cpu), .events = POLLIN};
    struct vpc_vcpu_state state;
    uint64_t n;

    vpc_vcpu_stop(cpu);
    for (;;) {
        (void)!read(p.fd, &n, sizeof n);
        if (vpc_vcpu_parked(cpu))
            break;
        CHECK(poll(&p, 1, -1) == 1);
    }
    CHECK(vpc_vcpu_state(cpu, &state) == 0 && vpc_vcpu_go(cpu) == 0);
}

static uint64_t one_round(int synchronous)
{
    struct vpc_ram *ram;
    struct vpc_vcpu *cpu[CPUS];
    struct vpc_vcpu_stats stats;
    struct vpc_vcpu_state state = {.seed = 11};
    struct vpc_vcpu_bad bad;
    struct vpc_dirty_stats found;
    pthread_t threads[CPUS], loop;
    int ufd = open_ufd(synchronous ? WP_SHMEM | UFFD_FEATURE_PAGEFAULT_FLAG_WP : WP_SHMEM | WP_ASYNC);
    int pagemap = synchronous ? -1 : open("/proc/self/pagemap", O_RDONLY | O_CLOEXEC);
    uint64_t steps = 0;

    CHECK(vpc_ram_new(&ram) == 0 && ufd >= 0 && (synchronous || pagemap >= 0));
    for (int i = 0; i < 2; i++) {
        int fd = memfd_create("block", MFD_CLOEXEC);
        CHECK(fd >= 0 && ftruncate(fd, PAGES * 4096) == 0);
        CHECK(vpc_ram_add(ram, i ? "b" : "a", fd, 0, PAGES * 4096, 4096) == i);
        CHECK(vpc_ram_set_bits(ram, i, VPC_BITS_DIRTY, 0, PAGES, 1) == 0);
        close(fd);
    }
    for (uint32_t i = 0; i < CPUS; i++) {
        CHECK(vpc_vcpu_new(ram, i, CPUS, &cpu[i]) == 0 && vpc_vcpu_add_area(cpu[i], 0, 0, PAGES, 0) == 0);
        CHECK(vpc_vcpu_add_area(cpu[i], 1, 0, PAGES, 0) == 0);
        CHECK(vpc_vcpu_set_state(cpu[i], &state) == 0 && vpc_vcpu_fill(cpu[i]) == 0);
        vpc_vcpu_set_rates(cpu[i], VPC_RATE_UNLIMITED, VPC_RATE_UNLIMITED);
    }
    CHECK(vpc_dirty_new(ram, ufd, pagemap, &tracker) == 0);
    if (synchronous)
        CHECK(pthread_create(&loop, NULL, run_tracker, NULL) == 0);
    for (int i = 0; i < CPUS; i++)
        CHECK(vpc_vcpu_arm(cpu[i]) == 0 && pthread_create(&threads[i], NULL, run_cpu, cpu[i]) == 0);
    for (int i = 0; i < CPUS; i++)
        CHECK(vpc_vcpu_go(cpu[i]) == 0 && vpc_vcpu_go(cpu[i]) == -EBUSY);
    CHECK(vpc_dirty_start(tracker) == 0);
    for (int i = 0; i < SYNCS; i++) {
        copy_dirty(ram);
        CHECK(vpc_dirty_sync(tracker) >= 0 && vpc_dirty_stats(tracker, &found) == 0);
        for (int k = 0; k < CPUS; k++) {
            CHECK(vpc_vcpu_stats(cpu[k], &stats) == 0 && stats.bad == 0);
            vpc_vcpu_set_rates(cpu[k], i % 3 ? VPC_RATE_UNLIMITED : 5000, VPC_RATE_UNLIMITED);
        }
        park_and_go(cpu[i % CPUS]);
    }
    for (int i = 0; i < CPUS; i++)
        vpc_vcpu_end(cpu[i]);
    for (int i = 0; i < CPUS; i++)
        pthread_join(threads[i], NULL);
    CHECK(vpc_dirty_sync(tracker) >= 0);
    copy_dirty(ram);
    CHECK(vpc_dirty_sync(tracker) == 0);
    if (synchronous) {
        vpc_dirty_stop(tracker);
        pthread_join(loop, NULL);
    }
    vpc_dirty_free(tracker);
    for (int i = 0; i < CPUS; i++) {
        CHECK(vpc_vcpu_sweep(cpu[i], &bad) == 0);
        CHECK(vpc_vcpu_stats(cpu[i], &stats) == 0 && stats.bad == 0);
        steps += stats.step;
        vpc_vcpu_free(cpu[i]);
    }
    for (int i = 0; i < 2; i++)
        CHECK(memcmp(copy[i], ram->blocks[i]->map, sizeof copy[i]) == 0);
    vpc_ram_free(ram);
    close(ufd);
    if (pagemap >= 0)
        close(pagemap);
    return steps;
}

int main(int argc, char **argv)
{
    unsigned long rounds = argc > 1 ? strtoul(argv[1], NULL, 0) : 1, steps = 0;
    int fd = open_ufd(WP_SHMEM | WP_ASYNC);

    for (unsigned long i = 0; i < rounds; i++) {
        steps += one_round(1);
        if (fd >= 0)
            steps += one_round(0);
    }
    printf("rounds %lu steps %lu\n", rounds, steps);
    return 0;
}
