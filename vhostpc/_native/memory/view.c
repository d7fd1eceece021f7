/* Files of a front-end: their kind, and a part of one mapped for our use. Guest memory is in gm.c. */
#define _GNU_SOURCE
#include <fcntl.h>
#include <linux/magic.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/vfs.h>
#include <unistd.h>
#include "memory/gm_internal.h"
#include "memory/replace_internal.h"
#include "memory/supply_internal.h"

#ifndef HUGETLBFS_MAGIC
#define HUGETLBFS_MAGIC 0x958458f6
#endif

int vpc_fd_kind(int fd, uint32_t *kind, uint64_t *page_size, uint64_t *size)
{
    struct stat st;
    struct statfs fs;

    if (fstat(fd, &st) < 0 || fstatfs(fd, &fs) < 0)
        return -errno;
    if (!S_ISREG(st.st_mode))
        return -EINVAL;
    *size = (uint64_t)st.st_size;
    *page_size = (uint64_t)sysconf(_SC_PAGESIZE);
    *kind = VPC_KIND_OTHER;
    if ((uint32_t)fs.f_type == HUGETLBFS_MAGIC) {
        *kind = VPC_KIND_HUGETLB;
        *page_size = (uint64_t)fs.f_bsize;
    } else if ((uint32_t)fs.f_type == TMPFS_MAGIC) {
        *kind = VPC_KIND_TMPFS;
    }
    return 0;
}

int vpc_view_open(struct vpc_view *v, struct vpc_supply *s, int fd, uint64_t offset, uint64_t size, int use)
{
    uint32_t kind;
    uint64_t page, file_size, end;
    int rc = vpc_fd_kind(fd, &kind, &page, &file_size);

    if (rc < 0)
        return rc;
    if (size == 0 || __builtin_add_overflow(offset, size, &end) || end > INT64_MAX)
        return -EINVAL;
    if (end > file_size)
        return -EFBIG;
    if (use == VPC_USE_INFLIGHT && kind == VPC_KIND_OTHER)
        return -EOPNOTSUPP;
    vpc_replace_reserve();
    uint64_t start = offset & ~(page - 1);
    /* Whole pages, also of hugetlbfs, which unmaps no part of one. */
    v->map_len = ((end + page - 1) & ~(page - 1)) - start;
    v->fd = fcntl(fd, F_DUPFD_CLOEXEC, 3);
    if (v->fd < 0)
        return -errno;
    v->map = mmap(NULL, v->map_len, PROT_READ | PROT_WRITE, MAP_SHARED, v->fd, (off_t)start);
    if (v->map == MAP_FAILED) {
        rc = -errno;
        close(v->fd);
        return rc;
    }
    (void)madvise(v->map, v->map_len, MADV_DONTFORK);
    v->guarded = vpc_guard_add(&(struct vpc_guard_range){.supply = s, .base = (uintptr_t)v->map, .len = v->map_len,
                                                         .page = page, .file_off = start, .fd = v->fd, .kind = kind,
                                                         .use = use});
    if (!v->guarded) {
        munmap(v->map, v->map_len);
        close(v->fd);
        return -ENOMEM;
    }
    vpc_supply_ref(s);
    v->supply = s;
    v->at = v->map + (offset - start);
    v->size = size;
    return 0;
}

void vpc_view_close(struct vpc_view *v)
{
    vpc_guard_remove(v->guarded);
    munmap(v->map, v->map_len);
    close(v->fd);
    vpc_supply_unref(v->supply);
}
