/* The memory checker: pages that name themselves, rewritten at random and checked whenever they are read.
 *
 * Word 0 of a page is its number, word 1 its generation, the others a function of both and of a nonce that
 * lives only in this guest's RAM.  What a page ought to hold is known from a table of generations kept in
 * the same RAM twice, once inverted, so that a lost page of the table is found too.
 *
 * It takes nearly all memory that is free and then gives single pages back, spread over all of it: so whatever
 * the kernel allocates later, network buffers first of all, lies scattered as in a machine that has run for
 * long, and not in one run that a migration would bring with the first of them.  What the kernel keeps free
 * beside that lies below 16 MiB, where it looks last.
 *
 * Checks so many pages at a time and pauses so many milliseconds then:  guest mem [PAGES [MILLISECONDS [HOLES]]]
 * On huge pages a few checks a second bring all memory, so that no device would miss any.
 *
 * Prints a line a second:  mem NONCE beat=N rewrites=N checked=N bad=N
 * Reads commands, one a line, from standard input:
 *   sweep ID     check every page once:  sweep ID pages=N bad=N
 *   touch NAME   make the file /tmp/NAME, a word to another program
 */
#define _GNU_SOURCE
#include "common.h"

#include <errno.h>
#include <fcntl.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

enum {
    PAGE = 4096,
    WORDS = PAGE / 8,
    HELD = 384,           /* pages taken for good: more than the kernel has left over for itself */
    KEEP = 8 << 20,       /* bytes left free */
    GIVE_UP = 1 << 20,    /* pages: more than any test has */
};

struct checker {
    uint64_t nonce;
    uint64_t pages;
    uint64_t holes; /* pages given back, about */
    uint64_t *memory;
    uint32_t *generation;
    uint32_t *inverted;
    uint64_t rewrites, checked, bad;
};

static uint64_t word_of(uint64_t seed, unsigned i)
{
    return seed * (2u * i + 1u) + (seed >> 7);
}

static uint64_t seed_of(const struct checker *c, uint64_t page, uint32_t generation)
{
    return mix64(c->nonce ^ mix64(page) ^ ((uint64_t)generation << 32));
}

static bool is_hole(const struct checker *c, uint64_t page)
{
    return mix64(page ^ 0x686f6c65) % (c->pages / c->holes) == 0;
}

static void write_page(struct checker *c, uint64_t page, uint32_t generation)
{
    volatile uint64_t *words = c->memory + page * WORDS;
    uint64_t seed = seed_of(c, page, generation);
    words[0] = page;
    words[1] = generation;
    for (unsigned i = 2; i < WORDS; i++)
        words[i] = word_of(seed, i);
    c->generation[page] = generation;
    c->inverted[page] = ~generation;
}

static void check_page(struct checker *c, uint64_t page)
{
    const volatile uint64_t *words = c->memory + page * WORDS;
    uint32_t generation = c->generation[page];
    uint64_t seed = seed_of(c, page, generation);
    c->checked++;
    for (unsigned i = 0; i < WORDS; i++) {
        uint64_t want = i == 0 ? page : i == 1 ? generation : word_of(seed, i);
        uint64_t got = words[i];
        if (got != want || c->inverted[page] != ~generation) {
            c->bad++;
            if (c->bad <= 16)
                say("BAD page=%llu generation=%u/%u word=%u got=%016llx want=%016llx",
                    (unsigned long long)page, generation, ~c->inverted[page], i, (unsigned long long)got,
                    (unsigned long long)want);
            /* Mend it, so that each fault is counted once. */
            write_page(c, page, generation);
            return;
        }
    }
}

static void *take(size_t bytes)
{
    void *p = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (p == MAP_FAILED)
        fail("mmap");
    madvise(p, bytes, MADV_NOHUGEPAGE); /* or the holes would not be single pages */
    return p;
}

static uint64_t free_bytes(void)
{
    FILE *f = fopen("/proc/meminfo", "r");
    char line[128];
    unsigned long long kib = 0;
    while (f && fgets(line, sizeof line, f) && sscanf(line, "MemFree: %llu kB", &kib) != 1)
        ;
    if (f)
        fclose(f);
    return kib << 10;
}

/* The kernel keeps its own (unmovable) pages apart from those of programs and has some of its kind left, all
 * close together.  A pipe takes them for good, so that later ones come from the holes. */
static void hold_kernel_pages(void)
{
    static const char page[PAGE];
    int ends[2];
    if (pipe2(ends, O_NONBLOCK | O_CLOEXEC) < 0 || fcntl(ends[1], F_SETPIPE_SZ, HELD * PAGE) < 0)
        fail("pipe");
    for (int i = 0; i < HELD; i++)
        if (write(ends[1], page, PAGE) != PAGE)
            fail("filling a pipe");
}

static uint64_t gcd(uint64_t a, uint64_t b)
{
    return b ? gcd(b, a % b) : a;
}

/* Fill memory, then punch the holes; /tmp/filled tells the init script that the network may come up. */
static void fill(struct checker *c)
{
    uint64_t bytes = free_bytes();
    if (bytes < 4 * (uint64_t)KEEP)
        fail("too little memory");
    c->pages = (bytes - KEEP) / (PAGE + 2 * sizeof(uint32_t) + 8 /* page tables */);
    if (c->pages > GIVE_UP)
        c->pages = GIVE_UP;
    c->memory = take(c->pages * PAGE);
    c->generation = take(c->pages * sizeof *c->generation);
    c->inverted = take(c->pages * sizeof *c->inverted);
    for (uint64_t page = 0; page < c->pages; page++)
        write_page(c, page, 1);
    /* All over memory also in the order of time, in which the kernel will use them again: else neighbours in a
     * ring were neighbours in memory, and one that a migration brings would bring those that come next. */
    uint64_t holes = 0, stride = (uint64_t)((double)c->pages * 0.6180339887); /* steps that never cluster */
    while (gcd(stride, c->pages) != 1)
        stride++;
    for (uint64_t k = 0, page = 0; k < c->pages; k++, page = (page + stride) % c->pages)
        if (is_hole(c, page)) {
            holes++;
            madvise(c->memory + page * WORDS, PAGE, MADV_DONTNEED);
        }
    hold_kernel_pages();
    make_file("/tmp/filled");
    say("filled %016llx pages=%llu holes=%llu", (unsigned long long)c->nonce, (unsigned long long)c->pages,
        (unsigned long long)holes);
}

static void obey(struct checker *c, const char *command)
{
    char id[64], path[sizeof id + 8];
    if (sscanf(command, "sweep %63s", id) == 1) {
        uint64_t before = c->bad;
        uint64_t checked = c->checked;
        for (uint64_t page = 0; page < c->pages; page++)
            if (!is_hole(c, page))
                check_page(c, page);
        say("sweep %s pages=%llu bad=%llu", id, (unsigned long long)(c->checked - checked),
            (unsigned long long)(c->bad - before));
    } else if (sscanf(command, "touch %63s", id) == 1) {
        snprintf(path, sizeof path, "/tmp/%s", id);
        make_file(path);
    } else {
        say("unknown command: %s", command);
    }
}

static void read_commands(struct checker *c, char *line, size_t *length)
{
    char byte;
    while (read(0, &byte, 1) == 1) {
        if (byte != '\n' && byte != '\r') {
            if (*length < 127)
                line[(*length)++] = byte;
            continue;
        }
        line[*length] = 0;
        if (*length)
            obey(c, line);
        *length = 0;
    }
}

int mem_main(int argc, char **argv)
{
    int burst = argc > 1 ? atoi(argv[1]) : 32;
    long pause_ms = argc > 2 ? atol(argv[2]) : 4;
    struct checker c = {.nonce = nonce64(), .holes = argc > 3 ? strtoul(argv[3], NULL, 10) : 1100};
    fill(&c);
    fcntl(0, F_SETFL, fcntl(0, F_GETFL) | O_NONBLOCK);
    char line[128];
    size_t length = 0;
    uint64_t random = c.nonce, beat = 0, next_beat = now_ns();
    for (;;) {
        for (int i = 0; i < burst; i++) {
            random = mix64(random);
            uint64_t page = random % c.pages;
            if (is_hole(&c, page))
                continue;
            check_page(&c, page);
            if (random >> 63) {
                write_page(&c, page, c.generation[page] + 1);
                c.rewrites++;
            }
        }
        read_commands(&c, line, &length);
        if (now_ns() >= next_beat) {
            next_beat = now_ns() + 1000000000u;
            say("mem %016llx beat=%llu rewrites=%llu checked=%llu bad=%llu", (unsigned long long)c.nonce,
                (unsigned long long)beat++, (unsigned long long)c.rewrites, (unsigned long long)c.checked,
                (unsigned long long)c.bad);
        }
        /* Leave the processor to the network flow: this guest has one, and it is emulated. */
        nanosleep(&(struct timespec){.tv_nsec = pause_ms * 1000000}, NULL);
    }
}
