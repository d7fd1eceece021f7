/* Pages that exist, no matter how they were made: found in a block's file, without a touch. */
#define _GNU_SOURCE
#include "pages/ram_internal.h"
#include "ufd/vpc_uffd.h"

#include <errno.h>
#include <linux/magic.h>
#include <linux/userfaultfd.h>
#include <sched.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/vfs.h>
#include <unistd.h>

/* Headers older than Linux 5.13 do not name these. */
#ifndef UFFD_FEATURE_MINOR_HUGETLBFS
#define UFFD_FEATURE_MINOR_HUGETLBFS (1 << 9)
#endif
#ifndef UFFDIO_REGISTER_MODE_MINOR
#define UFFDIO_REGISTER_MODE_MINOR ((uint64_t)1 << 2)
#endif

int vpc_is_hugetlb(int fd)
{
    struct statfs fs;

    return fstatfs(fd, &fs) == 0 && fs.f_type == HUGETLBFS_MAGIC;
}

/* The first page from page on, before end, that was not received; end if there is none. */
static uint64_t next_missing(struct vpc_block *b, uint64_t page, uint64_t end)
{
    while (page < end) {
        uint64_t word = ~atomic_load(&b->bits[VPC_BITS_RECEIVED][page >> 6]) & ~(uint64_t)0 << (page & 63);
        if (word) {
            page = (page & ~(uint64_t)63) + (uint64_t)__builtin_ctzll(word);
            return page < end ? page : end;
        }
        page = (page | 63) + 1;
    }
    return end;
}

/* From gap to gap: SEEK_DATA skips holes at once; SEEK_HOLE, which walks over all data, is not used. */
static int look_in_file(struct vpc_block *b, uint64_t first, uint64_t end, uint64_t *born)
{
    for (uint64_t page = next_missing(b, first, end); page < end; page = next_missing(b, page, end)) {
        off_t data = lseek(b->fd, (off_t)(b->fd_offset + (page << b->shift)), SEEK_DATA);

        if (data < 0)
            return errno == ENXIO ? 0 : -errno;
        page = ((uint64_t)data - b->fd_offset) >> b->shift;
        if (page >= end)
            return 0;
        if (!bit_test(b, VPC_BITS_RECEIVED, page)) {
            *born = page;
            return 1;
        }
    }
    return 0;
}

/* A ufd that can map existing pages, and reports pages that do not exist. */
static int open_minor(void)
{
    static const int ways[] = {VPC_UFFD_DEVICE, VPC_UFFD_SYSCALL, VPC_UFFD_USER_MODE};
    uint64_t offered, ioctls;
    int fd = -ENOSYS, rc;

    for (size_t i = 0; i < sizeof ways / sizeof ways[0] && fd < 0; i++)
        fd = vpc_uffd_open(ways[i]);
    if (fd < 0)
        return fd;
    rc = vpc_uffd_api(fd, UFFD_FEATURE_MINOR_HUGETLBFS, &offered, &ioctls);
    if (rc == 0)
        return fd;
    close(fd);
    return rc == -EINVAL ? -EOPNOTSUPP : rc; /* a kernel before 5.13 */
}

/* hugetlbfs reports its holes as data. A second mapping, page by page: UFFDIO_CONTINUE maps an existing page and
 * creates none. any: received pages are examined, too. */
static int look_by_mapping(struct vpc_block *b, uint64_t first, uint64_t end, int any, uint64_t *born)
{
    size_t length = (size_t)(end - first) << b->shift;
    uint64_t ioctls, page;
    struct stat st;
    int fd, rc;

    if (fstat(b->fd, &st) == 0 && st.st_blocks == 0)
        return 0; /* not a page in the whole file */
    fd = open_minor();
    if (fd < 0)
        return fd;
    /* Without access: nothing touches it, and a lock on future mappings creates no page. */
    unsigned char *map = mmap(NULL, length, PROT_NONE, MAP_SHARED | MAP_NORESERVE, b->fd,
                              (off_t)(b->fd_offset + (first << b->shift)));
    if (map == MAP_FAILED) {
        rc = -errno;
        close(fd);
        return rc;
    }
    rc = vpc_uffd_register(fd, (uintptr_t)map, length, UFFDIO_REGISTER_MODE_MINOR, &ioctls);
    for (page = first; rc == 0 && page < end; page++) {
        if (!any && (page = next_missing(b, page, end)) == end)
            break;
        do
            rc = vpc_uffd_continue(fd, (uintptr_t)map + ((page - first) << b->shift), b->page_size);
        while (rc == -EAGAIN && sched_yield() == 0);
        if (rc == 0) {
            *born = page;
            rc = 1;
        } else if (rc == -EFAULT) {
            rc = 0; /* not there */
        }
    }
    munmap(map, length);
    close(fd);
    return rc;
}

int vpc_block_born(struct vpc_block *b, uint64_t first, uint64_t count, uint64_t *born)
{
    if (next_missing(b, first, first + count) == first + count)
        return 0;
    if (!b->hugetlb)
        return look_in_file(b, first, first + count, born);
    return look_by_mapping(b, first, first + count, 0, born);
}

int vpc_no_memory(struct vpc_block *b, uint64_t page, int rc)
{
    uint64_t there;

    if (rc == -ENOMEM || rc == -ENOSPC)
        return 1;
    if (rc != -EEXIST || !b->hugetlb)
        return 0;
    /* An empty pool is an -EEXIST, too, where the page's neighbours have a page table. */
    rc = look_by_mapping(b, page, page + 1, 1, &there);
    return rc == 0 || rc == -EMFILE || rc == -ENFILE || rc == -ENOMEM;
}

int vpc_ram_born(struct vpc_ram *ram, int block, uint64_t first, uint64_t count, uint64_t *born)
{
    struct vpc_block *b = ram_block(ram, block);

    if (!b || first > b->pages || count > b->pages - first)
        return -ERANGE;
    return vpc_block_born(b, first, count, born);
}
