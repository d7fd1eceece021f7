/* The pages of the RAM blocks that are left to send. */
#define _GNU_SOURCE
#include "pages/save_internal.h"

int vpc_left_claim(struct vpc_scan *scan, struct host_page page)
{
    if (!bit_clear(scan->ram->blocks[page.block], VPC_BITS_DIRTY, page.number))
        return 0;
    save_tally(&scan->stats.dirty_left, (uint64_t)-1);
    return 1;
}

/* Of 64 pages those that may be sent. */
static uint64_t sendable(const struct vpc_block *b, uint64_t word)
{
    return atomic_load(&b->bits[VPC_BITS_DIRTY][word]) & ~atomic_load(&b->bits[VPC_BITS_WITHHELD][word]);
}

uint64_t vpc_left_up(const struct vpc_scan *scan, int block, uint64_t from, uint64_t to)
{
    const struct vpc_block *b = scan->ram->blocks[block];

    while (from < to) {
        uint64_t word = sendable(b, from >> 6) & ~(uint64_t)0 << (from & 63);
        if (word) {
            uint64_t found = (from & ~(uint64_t)63) + (uint64_t)__builtin_ctzll(word);
            return found < to ? found : to;
        }
        from = (from | 63) + 1;
    }
    return to;
}

uint64_t vpc_left_down(const struct vpc_scan *scan, int block, uint64_t from, uint64_t to)
{
    const struct vpc_block *b = scan->ram->blocks[block];

    for (uint64_t end = to; end > from; end = (end - 1) & ~(uint64_t)63) {
        uint64_t word = sendable(b, (end - 1) >> 6) & ~(uint64_t)0 >> (63 - ((end - 1) & 63));
        if (word) {
            uint64_t found = ((end - 1) | 63) - (uint64_t)__builtin_clzll(word);
            return found >= from ? found : to;
        }
    }
    return to;
}
