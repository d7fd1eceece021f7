/*
 * Back-ends' dirty log into the blocks' DIRTY bits.
 *
 * A bit of the log is 4096 bytes of guest memory (vhost-user, "Migration"): byte p >> 3, bit p & 7 for page p. It is
 * fetched and cleared in one atomic step, while back-ends go on setting bits: the next call finds bits that they set
 * later. The log is private to us and them; no guest memory is touched.
 */
#define _GNU_SOURCE
#include "pages/ram_internal.h"

#include <sys/mman.h>

#define WORD_BYTES ((uint64_t)64 << TARGET_SHIFT)

#if __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "a word of the log holds its pages in ascending bits"
#endif

int64_t vpc_ram_merge_log(struct vpc_ram *ram, int block, int fd, uint64_t size, uint64_t gpa)
{
    struct vpc_block *b = ram_block(ram, block);
    int64_t fresh = 0;

    if (!b || gpa % WORD_BYTES)
        return -EINVAL;
    uint64_t first = gpa / WORD_BYTES, words = (b->length + WORD_BYTES - 1) / WORD_BYTES;
    if (gpa + b->length < gpa || size / 8 < first || size / 8 - first < words)
        return -ERANGE;
    _Atomic uint64_t *log = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    if (log == MAP_FAILED)
        return -errno;
    for (uint64_t w = 0; w < words; w++) {
        if (!atomic_load_explicit(&log[first + w], memory_order_relaxed))
            continue;
        uint64_t bits = atomic_exchange_explicit(&log[first + w], 0, memory_order_seq_cst);
        while (bits) {
            uint64_t offset = ((w << 6) + (uint64_t)__builtin_ctzll(bits)) << TARGET_SHIFT;
            bits &= bits - 1;
            if (offset < b->length)
                fresh += !bit_set(b, VPC_BITS_DIRTY, offset >> b->shift);
        }
    }
    munmap((void *)log, size);
    return fresh;
}
