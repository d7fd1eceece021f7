/*
 * beat_watch SOURCE DESTINATION OFFSET
 *
 * When did a guest stand still? SOURCE and DESTINATION are memfds of the same RAM, as /proc/PID/fd/N; at OFFSET a guest
 * counts up a word of 4 bytes all the time. Prints, as JSON, when the source's count changed last and when the
 * destination's first was a later one, in nanoseconds of CLOCK_MONOTONIC. Both are read with pread, which makes no page
 * where one is missing, every 20 us or a little more: the figure may be late by that much, and by no more.
 */
#include "common.h"
#include <fcntl.h>

#define EVERY_NS 20000
#define LIMIT_NS 60000000000ull

static uint32_t count(int fd, off_t at)
{
    uint32_t word = 0;

    if (pread(fd, &word, sizeof word, at) != sizeof word)
        die("pread");
    return word;
}

int main(int argc, char **argv)
{
    if (argc != 4) {
        fprintf(stderr, "usage: beat_watch SOURCE DESTINATION OFFSET\n");
        return 2;
    }
    start(-1);

    int from = open(argv[1], O_RDONLY | O_CLOEXEC), to = open(argv[2], O_RDONLY | O_CLOEXEC);
    off_t at = (off_t)strtoull(argv[3], NULL, 0);
    struct timespec gap = {.tv_nsec = EVERY_NS};

    if (from < 0 || to < 0)
        die("memfd");
    prctl(PR_SET_TIMERSLACK, 1);
    printf("ready\n");
    fflush(stdout);

    uint32_t last = count(from, at), there;
    uint64_t begin = now_ns(), changed = begin;

    for (;;) {
        uint32_t here = count(from, at);
        uint64_t t = now_ns();

        if (here != last) {
            last = here;
            changed = t;
        }
        /* Precopy brings old counts: the guest runs there when its count is beyond the last one here. */
        there = count(to, at);
        if ((int32_t)(there - last) > 0 && count(from, at) == last) {
            printf("{\"last_ns\": %llu, \"first_ns\": %llu}\n", (unsigned long long)changed, (unsigned long long)now_ns());
            return 0;
        }
        if (t - begin > LIMIT_NS) {
            fprintf(stderr, "the guest did not move\n");
            return 1;
        }
        nanosleep(&gap, NULL);
    }
}
