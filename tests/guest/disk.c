/* The disk checker: blocks that name themselves, read and written with O_DIRECT all the time.
 *
 * Word 0 of a block is its number, word 1 its generation, word 2 a nonce of this boot, the others a function of
 * the three.  What a block ought to hold is known from a table of generations in RAM.  A thread for each of two
 * processors, so that each of two queues is used; a block belongs to one thread.
 *
 * A read goes into a page at random out of many that were filled once and not touched since, and what is
 * written lies ready long before: so it is the device that meets the pages that a migration has not brought.
 *
 * With THREADS there are as many, on both processors by turns, they do not pause, and half of what they do is writing:
 * requests of one queue overtake each other.
 *
 * Prints a line a second, with THREADS five:  disk NONCE reads=N writes=N bad=N
 * When /tmp/disk-stop appears: ends, reads every block once more, and tells what the disk must hold:
 *   disk NONCE generations FIRST N N N ...      for every block
 *   disk NONCE verified blocks=N bad=N
 */
#define _GNU_SOURCE
#include "common.h"

#include <fcntl.h>
#include <pthread.h>
#include <sched.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

enum {
    BLOCK = 4096,
    WORDS = BLOCK / 8,
    BLOCKS = 2048,
    MOST_THREADS = 32,
    PROCESSORS = 2,
    TARGETS = 4096, /* pages that are read into, of all threads */
    READY = 1024,   /* blocks that lie ready to be written, of all threads */
    SHOWN = 128,    /* generations a line */
};

struct worker {
    unsigned number;
    int fd;
    uint64_t nonce, random;
    uint64_t reads, writes, bad;
    unsigned char *targets, *ready;
    unsigned head;                    /* in ready: the oldest */
    uint32_t written[BLOCKS], next[BLOCKS]; /* generations: on the disk, of the newest that lies ready */
    unsigned block_at[READY];
    pthread_t thread;
};

static bool stopping, hurry;
static unsigned processors = PROCESSORS, threads = PROCESSORS, own_blocks, own_targets, own_ready;

static uint64_t word_at(uint64_t block, uint32_t generation, uint64_t nonce, unsigned i)
{
    uint64_t seed = mix64(nonce ^ mix64(block) ^ ((uint64_t)generation << 32));
    return i == 0 ? block : i == 1 ? generation : i == 2 ? nonce : seed * (2u * i + 1u) + (seed >> 7);
}

static uint64_t number_of(const struct worker *w, unsigned own)
{
    return (uint64_t)own * threads + w->number;
}

static void check(struct worker *w, unsigned own, const unsigned char *page)
{
    const uint64_t *words = (const uint64_t *)page;
    for (unsigned i = 0; i < WORDS; i++) {
        uint64_t want = word_at(number_of(w, own), w->written[own], w->nonce, i);
        if (words[i] == want)
            continue;
        w->bad++;
        if (w->bad <= 16)
            say("BAD block=%llu generation=%u word=%u got=%016llx want=%016llx",
                (unsigned long long)number_of(w, own), w->written[own], i, (unsigned long long)words[i],
                (unsigned long long)want);
        return;
    }
}

static void make_ready(struct worker *w, unsigned at, unsigned own)
{
    uint64_t *words = (uint64_t *)(w->ready + (size_t)at * BLOCK);
    w->next[own]++;
    w->block_at[at] = own;
    for (unsigned i = 0; i < WORDS; i++)
        words[i] = word_at(number_of(w, own), w->next[own], w->nonce, i);
}

static void write_one(struct worker *w, unsigned next)
{
    unsigned own = w->block_at[w->head];
    const unsigned char *page = w->ready + (size_t)w->head * BLOCK;
    if (pwrite(w->fd, page, BLOCK, (off_t)number_of(w, own) * BLOCK) != BLOCK)
        fail("writing to the disk");
    w->written[own]++;
    w->writes++;
    make_ready(w, w->head, next);
    w->head = (w->head + 1) % own_ready;
}

static void read_one(struct worker *w, unsigned own, unsigned target)
{
    unsigned char *page = w->targets + (size_t)target * BLOCK;
    if (pread(w->fd, page, BLOCK, (off_t)number_of(w, own) * BLOCK) != BLOCK)
        fail("reading from the disk");
    check(w, own, page);
    w->reads++;
}

static void *work(void *argument)
{
    struct worker *w = argument;
    cpu_set_t set;
    CPU_ZERO(&set);
    CPU_SET(w->number % processors, &set);
    if (sched_setaffinity(0, sizeof set, &set) < 0)
        fail("a processor for each queue");
    while (!__atomic_load_n(&stopping, __ATOMIC_ACQUIRE)) {
        w->random = mix64(w->random);
        unsigned own = (unsigned)(w->random % own_blocks), target = (unsigned)((w->random >> 32) % own_targets);
        if (w->random >> (hurry ? 63 : 62) == 0)
            write_one(w, own);
        else
            read_one(w, own, target);
        if (!hurry)
            nanosleep(&(struct timespec){.tv_nsec = 4000000}, NULL);
    }
    return NULL;
}

static void *take(size_t bytes)
{
    void *p = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (p == MAP_FAILED)
        fail("mmap");
    return p;
}

/* All pages in RAM, all blocks on the disk. */
static void prepare(struct worker *w)
{
    w->targets = take((size_t)own_targets * BLOCK);
    memset(w->targets, 0x5a, (size_t)own_targets * BLOCK);
    w->ready = take((size_t)own_ready * BLOCK);
    for (unsigned own = 0; own < own_blocks; own++) {
        if (own >= own_ready)
            write_one(w, own);
        else
            make_ready(w, own, own);
    }
    for (unsigned i = 0; i < own_ready; i++)
        write_one(w, i);
}

static void tell(const struct worker *workers)
{
    for (unsigned first = 0; first < BLOCKS; first += SHOWN) {
        char text[SHOWN * 11 + 1];
        size_t length = 0;
        for (unsigned b = first; b < first + SHOWN; b++)
            length += (size_t)snprintf(text + length, sizeof text - length, " %u",
                                       workers[b % threads].written[b / threads]);
        say("disk %016llx generations %u%s", (unsigned long long)workers->nonce, first, text);
    }
}

static void tell_progress(const struct worker *workers, uint64_t nonce)
{
    uint64_t reads = 0, writes = 0, bad = 0;

    for (unsigned i = 0; i < threads; i++) {
        reads += workers[i].reads;
        writes += workers[i].writes;
        bad += workers[i].bad;
    }
    say("disk %016llx reads=%llu writes=%llu bad=%llu", (unsigned long long)nonce, (unsigned long long)reads,
        (unsigned long long)writes, (unsigned long long)bad);
}

int disk_main(int argc, char **argv)
{
    if (argc != 2 && argc != 3)
        return 2;
    if (argc == 3) {
        hurry = true;
        threads = (unsigned)atoi(argv[2]);
        if (!threads || threads > MOST_THREADS || BLOCKS % threads)
            return 2;
    }
    if (sysconf(_SC_NPROCESSORS_ONLN) < PROCESSORS) /* User-Mode Linux has one */
        processors = 1;
    own_blocks = BLOCKS / threads;
    own_targets = TARGETS / threads;
    own_ready = READY / threads;
    int fd = open(argv[1], O_RDWR | O_DIRECT | O_CLOEXEC);
    if (fd < 0)
        fail(argv[1]);
    static struct worker workers[MOST_THREADS];
    uint64_t nonce = nonce64();
    for (unsigned i = 0; i < threads; i++) {
        workers[i].number = i;
        workers[i].fd = fd;
        workers[i].nonce = nonce;
        workers[i].random = nonce + i;
        prepare(&workers[i]);
    }
    for (unsigned i = 0; i < threads; i++)
        if (pthread_create(&workers[i].thread, NULL, work, &workers[i]))
            fail("a thread");
    make_file("/tmp/disk-ready");
    uint64_t next = now_ns();
    while (access("/tmp/disk-stop", F_OK) < 0) {
        if (now_ns() >= next) {
            next += hurry ? 200000000u : 1000000000u;
            tell_progress(workers, nonce);
        }
        nanosleep(&(struct timespec){.tv_nsec = 50000000}, NULL);
    }
    __atomic_store_n(&stopping, true, __ATOMIC_RELEASE);
    uint64_t bad = 0;
    for (unsigned i = 0; i < threads; i++)
        pthread_join(workers[i].thread, NULL);
    if (fsync(fd) < 0)
        fail("fsync");
    tell(workers);
    for (unsigned i = 0; i < threads; i++) {
        for (unsigned own = 0; own < own_blocks; own++)
            read_one(&workers[i], own, own % own_targets);
        bad += workers[i].bad;
    }
    say("disk %016llx verified blocks=%d bad=%llu", (unsigned long long)nonce, BLOCKS, (unsigned long long)bad);
    return 0;
}
