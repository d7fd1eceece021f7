/* What the in-guest programs share: time, random numbers, one line at a time. */
#ifndef GUEST_COMMON_H
#define GUEST_COMMON_H

#include <stddef.h>
#include <stdint.h>

int mem_main(int argc, char **argv);
int flow_main(int argc, char **argv);
int disk_main(int argc, char **argv);
int keep_main(int argc, char **argv);
int sectors_main(int argc, char **argv);

/* CLOCK_MONOTONIC in nanoseconds. */
uint64_t now_ns(void);

/* A number that no other boot has: read from the kernel's random device. */
uint64_t nonce64(void);

/* One well-mixed word from another (splitmix64's finalizer). */
static inline uint64_t mix64(uint64_t x)
{
    x += 0x9e3779b97f4a7c15u;
    x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9u;
    x = (x ^ (x >> 27)) * 0x94d049bb133111ebu;
    return x ^ (x >> 31);
}

/* Print one line with a single write, so that lines of two processes never mix. */
__attribute__((format(printf, 1, 2))) void say(const char *format, ...);

/* Make an empty file: a word from one program of the guest to another. */
void make_file(const char *path);

/* Leave with a line that says what failed. */
__attribute__((noreturn)) void fail(const char *what);

#endif
