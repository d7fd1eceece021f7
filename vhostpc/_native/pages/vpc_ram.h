#ifndef VPC_RAM_H
#define VPC_RAM_H
#include <stdint.h>
#include <stddef.h>

/* RAM blocks on memfd, in sets. Addresses are integers; "page" is a host page of the block (page_size) and
 * "target page" is 4096 bytes, the unit of QEMU's migration stream. vpc_load.h and vpc_fault.h receive and serve
 * pages, vpc_save.h sends them. */

/* cdef begin */
struct vpc_ram;

/* A rate without a limit. */
#define VPC_RATE_UNLIMITED 0xffffffffffffffffULL

/* Bitmaps of a block, one bit a host page. */
#define VPC_BITS_RECEIVED 0
#define VPC_BITS_REQUESTED 1
#define VPC_BITS_DIRTY 2
#define VPC_BITS_WITHHELD 3
#define VPC_BITS_ASKED 4
#define VPC_BITS_DISCARDED 5 /* a RAM_DISCARD told of it, at either end, or a part of it has arrived: it will be sent */

/* Nothing here waits for a page unless it says so. */
int vpc_ram_new(struct vpc_ram **out);
void vpc_ram_free(struct vpc_ram *ram);
/* Map length bytes of fd (our own copy is kept) from fd_offset; returns the block's index. */
int vpc_ram_add(struct vpc_ram *ram, const char *name, int fd, uint64_t fd_offset, uint64_t length,
                uint64_t page_size);
uint64_t vpc_ram_base(struct vpc_ram *ram, int block);
int vpc_ram_set_bits(struct vpc_ram *ram, int block, int which, uint64_t first, uint64_t count, int value);
int vpc_ram_test_bit(struct vpc_ram *ram, int block, int which, uint64_t page);
int64_t vpc_ram_count_bits(struct vpc_ram *ram, int block, int which);
/* The same in each of this many equal parts of the block: part i begins at page i * pages / cells. */
int vpc_ram_count_cells(struct vpc_ram *ram, int block, int which, uint32_t *out, uint32_t cells);
/* Punch a hole (bytes, whole host pages) and clear RECEIVED, REQUESTED and DISCARDED. -EEXIST: the kernel has left a
 * page there, *left is its number. */
int vpc_ram_discard(struct vpc_ram *ram, int block, uint64_t offset, uint64_t length, uint64_t *left);
/* The same for count ranges, each two numbers (offset, length), and set DISCARDED for their pages: the source will send
 * them. Stops at the first that fails. */
int vpc_ram_discard_ranges(struct vpc_ram *ram, int block, const uint64_t *ranges, uint32_t count, uint64_t *left);
/* The first of these pages that exists and was not received: 1 and its number in *born; 0 if there is none.
 * -EOPNOTSUPP: the kernel cannot tell (hugetlbfs, before 5.13). */
int vpc_ram_born(struct vpc_ram *ram, int block, uint64_t first, uint64_t count, uint64_t *born);
/* Host pages that are DISCARDED and not RECEIVED: the source owes them. */
int64_t vpc_ram_count_owed(struct vpc_ram *ram, int block);
/* Of them, those that are REQUESTED. */
int64_t vpc_ram_count_awaited(struct vpc_ram *ram, int block);
/* RAM_DISCARD commands (QEMU's migration stream) for the block's pages from page *at on that are DIRTY and not DISCARDED,
 * as many as there is room for; they are DISCARDED then, so that each is told once. *at gets the page to go on from, the
 * block's number of pages when it is done. Returns bytes written. */
int vpc_ram_discards(struct vpc_ram *ram, int block, uint64_t *at, void *to, uint32_t room);
/* Set DIRTY for the block's pages that the back-ends' dirty log in fd (size bytes, which may not shrink) marks, and
 * clear the marks; gpa is the block's guest address. Returns how many bits were not set before. -EINVAL: gpa is no
 * multiple of 256 KiB. -ERANGE: the log ends before the block. */
int64_t vpc_ram_merge_log(struct vpc_ram *ram, int block, int fd, uint64_t size, uint64_t gpa);
/* The pages of the block lie ready in fd from fd_offset (mapped private and read in, so this may take as long
 * as reading it): the fault loop places them through place_ufd (of our own mapping; we keep a copy) without
 * a request. Before the loop runs. -ERANGE: the file is shorter than the block. */
int vpc_ram_set_local(struct vpc_ram *ram, int block, int fd, uint64_t fd_offset, int place_ufd);
/* Missing pages will never arrive: map private memory over all mappings, then wake the waiters in them by our own ufd.
 * No page is made in the files. The touching calls return -EOWNERDEAD from now on. -errno: some mapping could not be
 * replaced, and its waiters go on waiting; a later call tries again. The ufd must then stay open: closing it would
 * release them, and they would make the pages. */
int vpc_ram_give_up(struct vpc_ram *ram, int ufd);
int vpc_ram_is_lost(struct vpc_ram *ram);
/* These four touch the block and MAY WAIT FOR A PAGE. Copies go to and from private memory. */
int vpc_ram_read(struct vpc_ram *ram, int block, uint64_t offset, void *to, uint64_t length);
int vpc_ram_write(struct vpc_ram *ram, int block, uint64_t offset, const void *from, uint64_t length);
/* Target pages that name themselves: every word is a function of block, page, seed and position. */
int vpc_ram_fill(struct vpc_ram *ram, int block, uint64_t first, uint64_t count, uint64_t seed);
/* Number of target pages that differ from those of vpc_ram_fill; first_bad gets the first or UINT64_MAX. */
int64_t vpc_ram_verify(struct vpc_ram *ram, int block, uint64_t first, uint64_t count, uint64_t seed,
                       uint64_t *first_bad);

/* ---- bitmap.c: the bitmaps of a recovery, as they stand in the stream: a bit for each target page, the lowest first,
 * in whole words of 8 bytes. */
uint64_t vpc_ram_bitmap_size(struct vpc_ram *ram, int block);
/* RECEIVED. -EINVAL: another size. */
int vpc_ram_bitmap(struct vpc_ram *ram, int block, void *to, uint64_t size);
/* Set DIRTY for pages that are not received according to the bitmap, a host page as a whole, and clear it for the rest.
 * -EINVAL: another size; -ERANGE: bits behind the last page are set. Then nothing has changed. */
int vpc_ram_take_bitmap(struct vpc_ram *ram, int block, const void *from, uint64_t size);
/* cdef end */

#endif
