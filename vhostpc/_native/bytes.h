#ifndef BYTES_H
#define BYTES_H
/* Numbers of n bytes in big-endian order, as in the migration stream. */
#include <stdint.h>

static inline uint64_t get_be(const unsigned char *p, unsigned n)
{
    uint64_t v = 0;
    while (n--)
        v = v << 8 | *p++;
    return v;
}

static inline void put_be(unsigned char *p, uint64_t v, unsigned n)
{
    while (n--) {
        p[n] = (unsigned char)v;
        v >>= 8;
    }
}

#endif
