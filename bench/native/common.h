/* What the bench's small programs share: a clock, pinning, dying with the parent, numbers. */
#ifndef BENCH_COMMON_H
#define BENCH_COMMON_H

#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <netinet/in.h>
#include <sched.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

#define die(what)                                                                                  \
    do {                                                                                           \
        perror(what);                                                                              \
        exit(1);                                                                                   \
    } while (0)

static inline uint64_t now_ns(void)
{
    struct timespec t;

    clock_gettime(CLOCK_MONOTONIC, &t);
    return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
}

/* cpu < 0 leaves the scheduler free. */
static inline void start(int cpu)
{
    cpu_set_t set;

    prctl(PR_SET_PDEATHSIG, SIGKILL);
    if (cpu < 0)
        return;
    CPU_ZERO(&set);
    CPU_SET((size_t)cpu, &set);
    if (sched_setaffinity(0, sizeof set, &set))
        die("sched_setaffinity");
}

static inline struct sockaddr_in address(const char *text)
{
    struct sockaddr_in a = {.sin_family = AF_INET};
    char host[64];
    const char *colon = strrchr(text, ':');

    if (!colon || (size_t)(colon - text) >= sizeof host) {
        fprintf(stderr, "not HOST:PORT: %s\n", text);
        exit(2);
    }
    memcpy(host, text, (size_t)(colon - text));
    host[colon - text] = 0;
    a.sin_port = htons((uint16_t)atoi(colon + 1));
    if (!inet_aton(host, &a.sin_addr)) {
        fprintf(stderr, "not an IPv4 address: %s\n", host);
        exit(2);
    }
    return a;
}

/* A bound UDP socket; its buffers are asked for by force, which needs CAP_NET_ADMIN, else by rmem_max. */
static inline int udp_socket(const char *local, int buffer)
{
    struct sockaddr_in a = address(local);
    int fd = socket(AF_INET, SOCK_DGRAM | SOCK_CLOEXEC, 0);

    if (fd < 0)
        die("socket");
    if (setsockopt(fd, SOL_SOCKET, SO_RCVBUFFORCE, &buffer, sizeof buffer))
        setsockopt(fd, SOL_SOCKET, SO_RCVBUF, &buffer, sizeof buffer);
    if (setsockopt(fd, SOL_SOCKET, SO_SNDBUFFORCE, &buffer, sizeof buffer))
        setsockopt(fd, SOL_SOCKET, SO_SNDBUF, &buffer, sizeof buffer);
    if (bind(fd, (struct sockaddr *)&a, sizeof a))
        die("bind");
    return fd;
}

static int order_u64(const void *a, const void *b)
{
    uint64_t x = *(const uint64_t *)a, y = *(const uint64_t *)b;

    return x < y ? -1 : x > y;
}

/* Prints p50, p90, p99 and max of n samples in nanoseconds as the inside of a JSON object. Sorts them. */
static inline void print_percentiles(uint64_t *sample, size_t n)
{
    qsort(sample, n, sizeof *sample, order_u64);
    printf("\"p50_ns\": %llu, \"p90_ns\": %llu, \"p99_ns\": %llu, \"max_ns\": %llu",
           n ? (unsigned long long)sample[n / 2] : 0ull, n ? (unsigned long long)sample[n * 9 / 10] : 0ull,
           n ? (unsigned long long)sample[n * 99 / 100] : 0ull, n ? (unsigned long long)sample[n - 1] : 0ull);
}

#endif
