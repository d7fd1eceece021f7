/* The disk checker: blocks that name themselves, read and written with O_DIRECT all the time.
 *
 * Word 0 of a block is its number, word 1 its generation, word 2 a nonce of this boot, the others a function of
 * the three.  What a block ought to hold is known from a table of generations in RAM.  A thread for each of two
 * processors, so that each of two queues is used; a block belongs to one thread.
 *
 * A read goes into a page at random out of many that were filled once and not touched since, and what is
 * written lies ready long before: so it is the device that meets the pages that a migration has not brought.
 *
 * Prints a line a second:  disk NONCE reads=N writes=N bad=N
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
    THREADS = 2,
    OWN = BLOCKS / THREADS,
    TARGETS = 2048, /* pages that a thread reads into */
    READY = 512,    /* blocks that a thread has ready to write */
    SHOWN = 128,    /* generations a line */
};

struct worker {
    unsigned number;
    int fd;
    uint64_t nonce, random;
    uint64_t reads, writes, bad;
    unsigned char *targets, *ready;
    unsigned head;                    /* in ready: the oldest */
    uint32_t written[OWN], next[OWN]; /* generations: on the disk, of the newest that lies ready */
    unsigned block_at[READY];
    pthread_t thread;
};

static bool stopping;

static uint64_t word_at(uint64_t block, uint32_t generation, uint64_t nonce, unsigned i)
{
    uint64_t seed = mix64(nonce ^ mix64(block) ^ ((uint64_t)generation << 32));
    return i == 0 ? block : i == 1 ? generation : i == 2 ? nonce : seed * (2u * i + 1u) + (seed >> 7);
}

static uint64_t number_of(const struct worker *w, unsigned own)
{
    return (uint64_t)own * THREADS + w->number;
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
    w->head = (w->head + 1) % READY;
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
    CPU_SET(w->number, &set);
    if (sched_setaffinity(0, sizeof set, &set) < 0)
        fail("a processor for each queue");
    while (!__atomic_load_n(&stopping, __ATOMIC_ACQUIRE)) {
        w->random = mix64(w->random);
        unsigned own = w->random % OWN, target = (w->random >> 32) % TARGETS;
        if (w->random >> 62 == 0)
            write_one(w, own);
        else
            read_one(w, own, target);
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
    w->targets = take((size_t)TARGETS * BLOCK);
    memset(w->targets, 0x5a, (size_t)TARGETS * BLOCK);
    w->ready = take((size_t)READY * BLOCK);
    for (unsigned own = 0; own < OWN; own++) {
        if (own >= READY)
            write_one(w, own);
        else
            make_ready(w, own, own);
    }
    for (unsigned i = 0; i < READY; i++)
        write_one(w, i);
}

static void tell(const struct worker *workers)
{
    for (unsigned first = 0; first < BLOCKS; first += SHOWN) {
        char text[SHOWN * 11 + 1];
        size_t length = 0;
        for (unsigned b = first; b < first + SHOWN; b++)
            length += (size_t)snprintf(text + length, sizeof text - length, " %u",
                                       workers[b % THREADS].written[b / THREADS]);
        say("disk %016llx generations %u%s", (unsigned long long)workers->nonce, first, text);
    }
}

int disk_main(int argc, char **argv)
{
    if (argc != 2)
        return 2;
    int fd = open(argv[1], O_RDWR | O_DIRECT | O_CLOEXEC);
    if (fd < 0)
        fail(argv[1]);
    static struct worker workers[THREADS];
    uint64_t nonce = nonce64();
    for (unsigned i = 0; i < THREADS; i++) {
        workers[i] = (struct worker){.number = i, .fd = fd, .nonce = nonce, .random = nonce + i};
        prepare(&workers[i]);
    }
    for (unsigned i = 0; i < THREADS; i++)
        if (pthread_create(&workers[i].thread, NULL, work, &workers[i]))
            fail("a thread");
    make_file("/tmp/disk-ready");
    uint64_t next = now_ns();
    while (access("/tmp/disk-stop", F_OK) < 0) {
        if (now_ns() >= next) {
            next += 1000000000u;
            say("disk %016llx reads=%llu writes=%llu bad=%llu", (unsigned long long)nonce,
                (unsigned long long)(workers[0].reads + workers[1].reads),
                (unsigned long long)(workers[0].writes + workers[1].writes),
                (unsigned long long)(workers[0].bad + workers[1].bad));
        }
        nanosleep(&(struct timespec){.tv_nsec = 50000000}, NULL);
    }
    __atomic_store_n(&stopping, true, __ATOMIC_RELEASE);
    uint64_t bad = 0;
    for (unsigned i = 0; i < THREADS; i++)
        pthread_join(workers[i].thread, NULL);
    if (fsync(fd) < 0)
        fail("fsync");
    tell(workers);
    for (unsigned i = 0; i < THREADS; i++) {
        for (unsigned own = 0; own < OWN; own++)
            read_one(&workers[i], own, own % TARGETS);
        bad += workers[i].bad;
    }
    say("disk %016llx verified blocks=%d bad=%llu", (unsigned long long)nonce, BLOCKS, (unsigned long long)bad);
    return 0;
}
