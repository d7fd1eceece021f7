/*
 * wait_watch MEMFD OFFSET
 *
 * When did a guest that waited go on? MEMFD is the memfd of its RAM, as /proc/PID/fd/N; at OFFSET it counts up a word of
 * 4 bytes all the time. Says "ready". For each line on its stdin it says, as JSON, when the count last changed before
 * the previous line, and when it first changed after that one (0: it has not), in nanoseconds of CLOCK_MONOTONIC. The
 * word is read with pread, which makes no page where one is missing, every 20 us or a little more: each time may be
 * late by that much.
 */
#include "common.h"
#include <fcntl.h>
#include <poll.h>

#define EVERY_NS 20000

int main(int argc, char **argv)
{
    if (argc != 3) {
        fprintf(stderr, "usage: wait_watch MEMFD OFFSET\n");
        return 2;
    }
    start(-1);

    int fd = open(argv[1], O_RDONLY | O_CLOEXEC);
    off_t at = (off_t)strtoull(argv[2], NULL, 0);
    const struct timespec gap = {.tv_nsec = EVERY_NS};
    struct pollfd line = {.fd = STDIN_FILENO, .events = POLLIN};
    uint32_t last = 0;
    uint64_t changed = now_ns(), before = changed, after = 0;

    if (fd < 0)
        die("memfd");
    prctl(PR_SET_TIMERSLACK, 1);
    puts("ready");
    fflush(stdout);
    for (;;) {
        uint32_t word = 0;

        if (pread(fd, &word, sizeof word, at) != sizeof word)
            die("pread");
        if (word != last) {
            last = word;
            changed = now_ns();
            if (!after)
                after = changed;
        }
        if (ppoll(&line, 1, &gap, NULL) > 0) {
            char text[64];

            if (read(STDIN_FILENO, text, sizeof text) <= 0)
                return 0;
            printf("{\"before_ns\": %llu, \"after_ns\": %llu}\n", (unsigned long long)before, (unsigned long long)after);
            fflush(stdout);
            before = changed;
            after = 0;
        }
    }
}
