#ifndef RAM_INTERNAL_H
#define RAM_INTERNAL_H
/* RAM blocks and their bits, as C knows them; not part of the interface to Python. */
#include <errno.h>
#include <stdatomic.h>
#include <stdint.h>

#include "page.h"
#include "pages/vpc_ram.h"

#define MAX_BLOCKS 64
#define BITMAPS 6
#define BULK_NICE 10 /* of a thread that moves pages nobody waits for, beside one that moves those */

struct vpc_block {
    char name[256];
    unsigned name_len;
    int fd;
    unsigned shift; /* log2 of page_size */
    int hugetlb; /* fd is of hugetlbfs */
    int stays;   /* given up, and nothing could be put in its place: map is what it was */
    uint64_t fd_offset, length, page_size, pages;
    unsigned char *map; /* our own mapping; armed or calm */
    unsigned char *zeros; /* a page of them, never written; large pages only */
    _Atomic uint64_t *bits[BITMAPS];
    const unsigned char *local; /* our own bytes of all pages, or NULL */
    int local_place;            /* the ufd that they are placed through */
};

struct vpc_ram {
    int count;
    _Atomic int lost; /* given up: the mappings are empty private memory now */
    /* Calls that place pages: between the two a page may exist that is not marked yet. */
    _Atomic uint64_t placing_begun, placing_done;
    struct vpc_block *blocks[MAX_BLOCKS];
};

/* Make a page of a block that has local bytes, in our own mapping; wakes nobody. This and the next two: see
 * vpc_no_memory; -EAGAIN: the client's memory is being changed, try again later; -EEXIST: a page exists there. */
int vpc_local_place(struct vpc_block *block, uint64_t page);
/* Make it where a client waits for it and wake the client: one system call, and its retry finds the page mapped. */
int vpc_local_answer(struct vpc_block *block, uint64_t page, int ufd, uint64_t address);
/* The same with zeros, for a received page of which the file has only a hole. */
int vpc_local_zero(struct vpc_block *block, int ufd, uint64_t address);
void vpc_local_free(struct vpc_block *block);
/* present.c. The first of these pages that was not received and exists all the same: 1 and its number, 0 if there is
 * none, or -errno (-EOPNOTSUPP: hugetlbfs of a kernel before 5.13, which cannot tell). Touches nothing. */
int vpc_block_born(struct vpc_block *block, uint64_t first, uint64_t count, uint64_t *born);
int vpc_is_hugetlb(int fd);
/* Whether placing this page failed with rc for lack of memory. hugetlbfs returns -EEXIST for that, too. */
int vpc_no_memory(struct vpc_block *block, uint64_t page, int rc);
/* Number of the block with this name, or -1. */
int vpc_ram_find(const struct vpc_ram *ram, const unsigned char *name, unsigned length);

static inline struct vpc_block *ram_block(const struct vpc_ram *ram, int block)
{
    return block >= 0 && block < ram->count ? ram->blocks[block] : NULL;
}

/* Check after every copy out of a block, and before a byte of it is used: 0 or -EOWNERDEAD. */
static inline int ram_lost(struct vpc_ram *ram)
{
    atomic_thread_fence(memory_order_acquire); /* keep the copy before this check; a load orders only later accesses */
    return atomic_load_explicit(&ram->lost, memory_order_seq_cst) ? -EOWNERDEAD : 0;
}

static inline int bit_test(struct vpc_block *b, int which, uint64_t page)
{
    return (int)(atomic_load_explicit(&b->bits[which][page >> 6], memory_order_seq_cst) >> (page & 63) & 1);
}

/* Returns what the bit was. */
static inline int bit_set(struct vpc_block *b, int which, uint64_t page)
{
    uint64_t mask = (uint64_t)1 << (page & 63);
    return (atomic_fetch_or_explicit(&b->bits[which][page >> 6], mask, memory_order_seq_cst) & mask) != 0;
}

static inline int bit_clear(struct vpc_block *b, int which, uint64_t page)
{
    uint64_t mask = (uint64_t)1 << (page & 63);
    return (atomic_fetch_and_explicit(&b->bits[which][page >> 6], ~mask, memory_order_seq_cst) & mask) != 0;
}

#endif
