/* The received pages, as a destination reports them to its source when a migration is recovered. */
#define _GNU_SOURCE
#include "pages/ram_internal.h"

#include <endian.h>
#include <string.h>

/* Target pages of a host page; a power of two. */
static unsigned targets(const struct vpc_block *b)
{
    return 1u << (b->shift - TARGET_SHIFT);
}

static uint64_t bits_of(unsigned count)
{
    return count >= 64 ? ~(uint64_t)0 : ((uint64_t)1 << count) - 1;
}

static uint64_t words_of(const struct vpc_block *b)
{
    return ((b->length >> TARGET_SHIFT) + 63) / 64;
}

uint64_t vpc_ram_bitmap_size(struct vpc_ram *ram, int block)
{
    struct vpc_block *b = ram_block(ram, block);

    return b ? words_of(b) * 8 : 0;
}

int vpc_ram_bitmap(struct vpc_ram *ram, int block, void *to, uint64_t size)
{
    struct vpc_block *b = ram_block(ram, block);

    if (!b || size != words_of(b) * 8)
        return -EINVAL;
    unsigned each = targets(b);
    for (uint64_t word = 0; word < words_of(b); word++) {
        uint64_t bits = 0;
        if (each == 1) {
            bits = atomic_load(&b->bits[VPC_BITS_RECEIVED][word]);
        } else if (each >= 64) {
            bits = bit_test(b, VPC_BITS_RECEIVED, word * 64 / each) ? ~(uint64_t)0 : 0;
        } else {
            for (unsigned at = 0; at < 64 && (word * 64 + at) / each < b->pages; at += each)
                if (bit_test(b, VPC_BITS_RECEIVED, (word * 64 + at) / each))
                    bits |= bits_of(each) << at;
        }
        bits = htole64(bits);
        memcpy((unsigned char *)to + word * 8, &bits, 8);
    }
    return 0;
}

static uint64_t word_at(const void *bitmap, uint64_t word)
{
    uint64_t bits;

    memcpy(&bits, (const unsigned char *)bitmap + word * 8, 8);
    return le64toh(bits);
}

/* Whether a whole host page has arrived. */
static int whole(const void *bitmap, uint64_t first, unsigned each)
{
    if (each < 64)
        return (word_at(bitmap, first / 64) >> first % 64 & bits_of(each)) == bits_of(each);
    for (uint64_t word = first / 64; word < (first + each) / 64; word++)
        if (word_at(bitmap, word) != ~(uint64_t)0)
            return 0;
    return 1;
}

int vpc_ram_take_bitmap(struct vpc_ram *ram, int block, const void *from, uint64_t size)
{
    struct vpc_block *b = ram_block(ram, block);

    if (!b || size != words_of(b) * 8)
        return -EINVAL;
    unsigned each = targets(b), last = (unsigned)(b->length >> TARGET_SHIFT) % 64;
    if (last && word_at(from, words_of(b) - 1) & ~bits_of(last))
        return -ERANGE;
    for (uint64_t word = 0; word < (b->pages + 63) / 64; word++) {
        unsigned left = b->pages - word * 64 < 64 ? (unsigned)(b->pages - word * 64) : 64;
        uint64_t dirty = 0;
        if (each == 1) {
            dirty = ~word_at(from, word) & bits_of(left);
        } else {
            for (unsigned at = 0; at < left; at++)
                if (!whole(from, (word * 64 + at) * each, each))
                    dirty |= (uint64_t)1 << at;
        }
        atomic_store(&b->bits[VPC_BITS_DIRTY][word], dirty);
    }
    return 0;
}
