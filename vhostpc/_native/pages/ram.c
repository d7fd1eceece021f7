/* RAM blocks on memfd: mapping, bitmaps, and copies through the mapping. */
#define _GNU_SOURCE
#include "pages/ram_internal.h"
#include "memory/replace_internal.h"
#include "ufd/vpc_uffd.h"

#include <errno.h>
#include <fcntl.h>
#include <sched.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#define DISCARD_TRIES 8

int vpc_ram_new(struct vpc_ram **out)
{
    vpc_replace_reserve(); /* for vpc_ram_give_up */
    *out = calloc(1, sizeof(struct vpc_ram));
    return *out ? 0 : -ENOMEM;
}

static void block_free(struct vpc_block *b)
{
    vpc_local_free(b);
    if (b->map && !b->stays) /* a thread may wait there for ever */
        munmap(b->map, b->length);
    if (b->zeros)
        munmap(b->zeros, b->page_size);
    if (b->fd >= 0)
        close(b->fd);
    for (int i = 0; i < BITMAPS; i++)
        free((void *)b->bits[i]);
    free(b);
}

void vpc_ram_free(struct vpc_ram *ram)
{
    if (!ram)
        return;
    for (int i = 0; i < ram->count; i++)
        block_free(ram->blocks[i]);
    free(ram);
}

int vpc_ram_find(const struct vpc_ram *ram, const unsigned char *name, unsigned length)
{
    for (int i = 0; i < ram->count; i++)
        if (ram->blocks[i]->name_len == length && memcmp(ram->blocks[i]->name, name, length) == 0)
            return i;
    return -1;
}

/* Map at a multiple of the host page size, also where the kernel's own pages are smaller. */
static void *map_aligned(struct vpc_block *b)
{
    unsigned char *room, *at;
    size_t slack = b->page_size - TARGET_PAGE;

    room = mmap(NULL, b->length + slack, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (room == MAP_FAILED)
        return MAP_FAILED;
    at = room + ((b->page_size - ((uintptr_t)room & (b->page_size - 1))) & (b->page_size - 1));
    if (at > room)
        munmap(room, (size_t)(at - room));
    if (room + slack > at)
        munmap(at + b->length, (size_t)(room + slack - at));
    /* Huge pages are reserved now, so too few of them are an error, not a SIGBUS at the first touch. */
    void *map = mmap(at, b->length, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_FIXED, b->fd, (off_t)b->fd_offset);
    if (map == MAP_FAILED) {
        int error = errno;
        munmap(at, b->length);
        errno = error;
    }
    return map;
}

int vpc_ram_add(struct vpc_ram *ram, const char *name, int fd, uint64_t fd_offset, uint64_t length,
                uint64_t page_size)
{
    size_t name_len = strlen(name);
    struct stat st;
    struct vpc_block *b;
    int error;

    if (ram->count == MAX_BLOCKS)
        return -ENOSPC;
    if (name_len == 0 || name_len > 255 || page_size < TARGET_PAGE || (page_size & (page_size - 1)))
        return -EINVAL;
    if (length == 0 || ((length | fd_offset) & (page_size - 1)) || fd_offset + length < length)
        return -EINVAL;
    if (vpc_ram_find(ram, (const unsigned char *)name, (unsigned)name_len) >= 0)
        return -EEXIST;
    if (fstat(fd, &st) < 0)
        return -errno;
    if (st.st_size < 0 || fd_offset + length > (uint64_t)st.st_size)
        return -ERANGE;
    b = calloc(1, sizeof *b);
    if (!b)
        return -ENOMEM;
    memcpy(b->name, name, name_len);
    b->name_len = (unsigned)name_len;
    b->shift = (unsigned)__builtin_ctzll(page_size);
    b->fd_offset = fd_offset;
    b->length = length;
    b->page_size = page_size;
    b->pages = length >> b->shift;
    b->fd = fcntl(fd, F_DUPFD_CLOEXEC, 0);
    if (b->fd < 0)
        goto fail;
    b->hugetlb = vpc_is_hugetlb(fd);
    if (page_size > TARGET_PAGE) {
        void *zeros = mmap(NULL, page_size, PROT_READ, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        if (zeros == MAP_FAILED)
            goto fail;
        b->zeros = zeros;
    }
    for (int i = 0; i < BITMAPS; i++) {
        b->bits[i] = calloc((size_t)((b->pages + 63) / 64), sizeof(uint64_t));
        if (!b->bits[i]) {
            errno = ENOMEM;
            goto fail;
        }
    }
    void *map = map_aligned(b);
    if (map == MAP_FAILED)
        goto fail;
    b->map = map;
    /* A child would see missing pages as holes; a huge page would exist before its parts have arrived. */
    madvise(map, length, MADV_DONTFORK);
    madvise(map, length, MADV_NOHUGEPAGE);
    ram->blocks[ram->count] = b;
    return ram->count++;
fail:
    error = errno;
    block_free(b);
    return -error;
}

uint64_t vpc_ram_base(struct vpc_ram *ram, int block)
{
    struct vpc_block *b = ram_block(ram, block);
    return b ? (uint64_t)(uintptr_t)b->map : 0;
}

static int pages_ok(struct vpc_block *b, int which, uint64_t first, uint64_t count)
{
    return b && which >= 0 && which < BITMAPS && first <= b->pages && count <= b->pages - first;
}

int vpc_ram_set_bits(struct vpc_ram *ram, int block, int which, uint64_t first, uint64_t count, int value)
{
    struct vpc_block *b = ram_block(ram, block);

    if (!pages_ok(b, which, first, count))
        return -ERANGE;
    for (uint64_t page = first; page < first + count;) {
        uint64_t mask = ~(uint64_t)0;
        if ((page & 63) == 0 && first + count - page >= 64) {
            page += 64;
        } else {
            mask = (uint64_t)1 << (page & 63);
            page += 1;
        }
        if (value)
            atomic_fetch_or(&b->bits[which][(page - 1) >> 6], mask);
        else
            atomic_fetch_and(&b->bits[which][(page - 1) >> 6], ~mask);
    }
    return 0;
}

int vpc_ram_test_bit(struct vpc_ram *ram, int block, int which, uint64_t page)
{
    struct vpc_block *b = ram_block(ram, block);
    return pages_ok(b, which, page, 1) ? bit_test(b, which, page) : -ERANGE;
}

int64_t vpc_ram_count_bits(struct vpc_ram *ram, int block, int which)
{
    struct vpc_block *b = ram_block(ram, block);
    int64_t sum = 0;

    if (!pages_ok(b, which, 0, 0))
        return -ERANGE;
    for (uint64_t i = 0; i < (b->pages + 63) / 64; i++)
        sum += __builtin_popcountll(atomic_load_explicit(&b->bits[which][i], memory_order_acquire));
    return sum;
}

int64_t vpc_ram_count_owed(struct vpc_ram *ram, int block)
{
    struct vpc_block *b = ram_block(ram, block);
    int64_t sum = 0;

    if (!b)
        return -ERANGE;
    for (uint64_t i = 0; i < (b->pages + 63) / 64; i++)
        sum += __builtin_popcountll(atomic_load(&b->bits[VPC_BITS_DISCARDED][i]) &
                                    ~atomic_load(&b->bits[VPC_BITS_RECEIVED][i]));
    return sum;
}

int64_t vpc_ram_count_awaited(struct vpc_ram *ram, int block)
{
    struct vpc_block *b = ram_block(ram, block);
    int64_t sum = 0;

    if (!b)
        return -ERANGE;
    for (uint64_t i = 0; i < (b->pages + 63) / 64; i++)
        sum += __builtin_popcountll(atomic_load(&b->bits[VPC_BITS_REQUESTED][i]) &
                                    atomic_load(&b->bits[VPC_BITS_DISCARDED][i]) &
                                    ~atomic_load(&b->bits[VPC_BITS_RECEIVED][i]));
    return sum;
}

int vpc_ram_count_cells(struct vpc_ram *ram, int block, int which, uint32_t *out, uint32_t cells)
{
    struct vpc_block *b = ram_block(ram, block);

    if (!pages_ok(b, which, 0, 0) || cells == 0 || cells > b->pages)
        return -ERANGE;
    uint64_t page = 0;
    for (uint32_t i = 0; i < cells; i++) {
        uint64_t end = (uint64_t)((unsigned __int128)(i + 1) * b->pages / cells);
        for (out[i] = 0; page < end; page++)
            out[i] += (uint32_t)bit_test(b, which, page);
    }
    return 0;
}

int vpc_ram_discard(struct vpc_ram *ram, int block, uint64_t offset, uint64_t length, uint64_t *left)
{
    struct vpc_block *b = ram_block(ram, block);
    uint64_t first, count;
    int there = 1;

    if (!b || offset > b->length || length > b->length - offset)
        return -ERANGE;
    if ((offset | length) & (b->page_size - 1))
        return -EINVAL;
    if (length == 0)
        return 0;
    first = offset >> b->shift;
    count = length >> b->shift;
    /* A part of a huge page of shared memory with another reference is only cleared: it reads as zeros, and a touch
     * does not fault. Often the reference is gone a moment later. */
    for (int i = 0; i < DISCARD_TRIES && there > 0; i++) {
        if (i)
            sched_yield();
        if (fallocate(b->fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, (off_t)(b->fd_offset + offset),
                      (off_t)length) < 0)
            return -errno;
        vpc_ram_set_bits(ram, block, VPC_BITS_RECEIVED, first, count, 0);
        vpc_ram_set_bits(ram, block, VPC_BITS_REQUESTED, first, count, 0);
        vpc_ram_set_bits(ram, block, VPC_BITS_DISCARDED, first, count, 0);
        there = vpc_block_born(b, first, count, left);
    }
    return there > 0 ? -EEXIST : there == -EOPNOTSUPP ? 0 : there;
}

int vpc_ram_discard_ranges(struct vpc_ram *ram, int block, const uint64_t *ranges, uint32_t count, uint64_t *left)
{
    struct vpc_block *b = ram_block(ram, block);
    int rc = 0;

    for (uint32_t i = 0; rc == 0 && i < count; i++) {
        rc = vpc_ram_discard(ram, block, ranges[2 * i], ranges[2 * i + 1], left);
        if (rc == 0)
            vpc_ram_set_bits(ram, block, VPC_BITS_DISCARDED, ranges[2 * i] >> b->shift,
                             ranges[2 * i + 1] >> b->shift, 1);
    }
    return rc;
}

int vpc_ram_give_up(struct vpc_ram *ram, int ufd)
{
    int again = atomic_exchange(&ram->lost, 1), rc = 0;

    for (int i = 0; i < ram->count; i++) {
        struct vpc_block *b = ram->blocks[i];
        if (again && !b->stays)
            continue;
        /* Neither unregister nor close: a waiter released that way would create the page in the shared file. */
        int error = vpc_replace_private(b->map, b->length);
        b->stays = error < 0;
        if (error < 0)
            rc = error; /* no waiter is woken there: a retry would create pages that nobody sent */
        else
            (void)vpc_uffd_wake(ufd, (uint64_t)(uintptr_t)b->map, b->length);
    }
    return rc;
}

int vpc_ram_is_lost(struct vpc_ram *ram)
{
    return ram_lost(ram) != 0;
}

int vpc_ram_read(struct vpc_ram *ram, int block, uint64_t offset, void *to, uint64_t length)
{
    struct vpc_block *b = ram_block(ram, block);

    if (!b || offset > b->length || length > b->length - offset)
        return -ERANGE;
    if (ram_lost(ram))
        return -EOWNERDEAD;
    memcpy(to, b->map + offset, length);
    return ram_lost(ram);
}

int vpc_ram_write(struct vpc_ram *ram, int block, uint64_t offset, const void *from, uint64_t length)
{
    struct vpc_block *b = ram_block(ram, block);

    if (!b || offset > b->length || length > b->length - offset)
        return -ERANGE;
    if (ram_lost(ram))
        return -EOWNERDEAD;
    memcpy(b->map + offset, from, length);
    return ram_lost(ram);
}

/* A mix of splitmix64: cheap, and no two pages look alike. */
static uint64_t page_word(uint64_t block, uint64_t page, uint64_t seed, uint64_t i)
{
    uint64_t z = seed + (block << 56) + (page << 9) + i + 0x9e3779b97f4a7c15u * (page + 1);
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    return z ^ (z >> 31);
}

static int target_pages_ok(struct vpc_block *b, uint64_t first, uint64_t count)
{
    uint64_t pages = b ? b->length >> TARGET_SHIFT : 0;
    return b && first <= pages && count <= pages - first;
}

int vpc_ram_fill(struct vpc_ram *ram, int block, uint64_t first, uint64_t count, uint64_t seed)
{
    struct vpc_block *b = ram_block(ram, block);

    if (!target_pages_ok(b, first, count))
        return -ERANGE;
    for (uint64_t page = first; page < first + count; page++) {
        if (ram_lost(ram))
            break;
        uint64_t *words = (uint64_t *)(void *)(b->map + (page << TARGET_SHIFT));
        for (uint64_t i = 0; i < TARGET_PAGE / 8; i++)
            words[i] = page_word((uint64_t)block, page, seed, i);
    }
    return ram_lost(ram);
}

int64_t vpc_ram_verify(struct vpc_ram *ram, int block, uint64_t first, uint64_t count, uint64_t seed,
                       uint64_t *first_bad)
{
    struct vpc_block *b = ram_block(ram, block);
    int64_t bad = 0;

    *first_bad = UINT64_MAX;
    if (!target_pages_ok(b, first, count))
        return -ERANGE;
    for (uint64_t page = first; page < first + count; page++) {
        if (ram_lost(ram))
            break;
        const volatile uint64_t *words = (const volatile uint64_t *)(void *)(b->map + (page << TARGET_SHIFT));
        for (uint64_t i = 0; i < TARGET_PAGE / 8; i++) {
            if (words[i] != page_word((uint64_t)block, page, seed, i)) {
                if (bad++ == 0)
                    *first_bad = page;
                break;
            }
        }
    }
    return ram_lost(ram) ? -EOWNERDEAD : bad;
}
