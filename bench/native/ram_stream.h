/* What the players and readers of a migration stream share. */
#ifndef BENCH_RAM_STREAM_H
#define BENCH_RAM_STREAM_H

#include "ufd_pass.h"

#define PAGE 4096u
#define REC_ZERO 0x02u
#define REC_PAGE 0x08u
#define REC_CONTINUE 0x20u
#define POOL 256u /* different pages of data: page i has the content of i % POOL */

static inline void put_be(unsigned char *p, uint64_t v, unsigned n)
{
    while (n--) {
        p[n] = (unsigned char)v;
        v >>= 8;
    }
}

static inline uint64_t get_be(const unsigned char *p, unsigned n)
{
    uint64_t v = 0;

    while (n--)
        v = v << 8 | *p++;
    return v;
}

#endif
