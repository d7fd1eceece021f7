/* RAM_DISCARD commands: which pages the destination of a migration must forget before it runs. */
#define _GNU_SOURCE
#include "bytes.h"
#include "pages/ram_internal.h"

#include <string.h>

#define COMMAND 0x08u
#define RAM_DISCARD 6u
#define RANGES 12u /* in a command, as QEMU sends them */
#define COMMAND_MAX (5u + 3u + 255u + 16u * RANGES)

/* The first page from page on that is to be told, or that is not; the number of pages if there is none. */
static uint64_t next_page(struct vpc_block *b, uint64_t page, int value)
{
    while (page < b->pages) {
        uint64_t word = atomic_load(&b->bits[VPC_BITS_DIRTY][page >> 6]) &
                        ~atomic_load(&b->bits[VPC_BITS_DISCARDED][page >> 6]);
        word = (value ? word : ~word) & ~(uint64_t)0 << (page & 63);
        if (word) {
            page = (page & ~(uint64_t)63) + (uint64_t)__builtin_ctzll(word);
            return page < b->pages ? page : b->pages;
        }
        page = (page | 63) + 1;
    }
    return b->pages;
}

int vpc_ram_discards(struct vpc_ram *ram, int block, uint64_t *at, void *to, uint32_t room)
{
    struct vpc_block *b = ram_block(ram, block);
    unsigned char *begin = to, *p = begin;
    uint64_t page = *at;

    if (!b)
        return -ERANGE;
    while (room - (uint32_t)(p - begin) >= COMMAND_MAX && (page = next_page(b, page, 1)) < b->pages) {
        unsigned char *head = p;

        p += 5;
        *p++ = 0; /* version */
        *p++ = (unsigned char)b->name_len;
        memcpy(p, b->name, b->name_len);
        p += b->name_len;
        *p++ = 0;
        for (unsigned i = 0; i < RANGES && page < b->pages; i++) {
            uint64_t end = next_page(b, page, 0);
            put_be(p, page << b->shift, 8);
            put_be(p + 8, (end - page) << b->shift, 8);
            p += 16;
            vpc_ram_set_bits(ram, block, VPC_BITS_DISCARDED, page, end - page, 1);
            page = next_page(b, end, 1);
        }
        *head = COMMAND;
        put_be(head + 1, RAM_DISCARD, 2);
        put_be(head + 3, (uint64_t)(p - head) - 5, 2);
    }
    *at = page;
    return (int)(p - begin);
}
