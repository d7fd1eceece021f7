#ifndef CLOCK_H
#define CLOCK_H
/* Time in nanoseconds: now, and counted in histograms. */
#include <stdint.h>
#include <time.h>

/* CLOCK_MONOTONIC. */
static inline uint64_t now_ns(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
}

/* Histograms of nanoseconds: four buckets an octave, so a percentile is known to 25 %. See vpc_histogram_floor. */
static inline uint32_t histogram_bucket(uint64_t ns)
{
    if (ns < 4)
        return (uint32_t)ns;
    unsigned top = 63u - (unsigned)__builtin_clzll(ns);
    return (top - 1) * 4 + (uint32_t)(ns >> (top - 2) & 3);
}

#endif
