/* Pages that the fault loop places itself, without a request: those of a block that lie ready in a file of our own, and
 * zeros where a received page is a hole. */
#define _GNU_SOURCE
#include "pages/ram_internal.h"
#include "ufd/vpc_uffd.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/userfaultfd.h>
#include <sched.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#define TRIES 4 /* of a copy, while the kernel says that the client's memory is being changed */

void vpc_local_free(struct vpc_block *b)
{
    if (!b->local)
        return;
    munmap((void *)b->local, b->length);
    close(b->local_place);
    b->local = NULL;
}

int vpc_ram_set_local(struct vpc_ram *ram, int block, int fd, uint64_t fd_offset, int place_ufd)
{
    struct vpc_block *b = ram_block(ram, block);
    struct stat st;
    void *map;
    int place;

    if (!b || b->local)
        return b ? -EBUSY : -ENOENT;
    if (fstat(fd, &st) < 0)
        return -errno;
    if (fd_offset > (uint64_t)st.st_size || b->length > (uint64_t)st.st_size - fd_offset)
        return -ERANGE;
    place = fcntl(place_ufd, F_DUPFD_CLOEXEC, 0);
    if (place < 0)
        return -errno;
    /* Read in now: the loop must not wait for a disk while others wait for the loop. */
    map = mmap(NULL, b->length, PROT_READ, MAP_PRIVATE | MAP_POPULATE, fd, (off_t)fd_offset);
    if (map == MAP_FAILED) {
        int rc = -errno;
        close(place);
        return rc;
    }
    b->local_place = place;
    b->local = map;
    return 0;
}

/* Never for long: the fault loop calls this with its lock held. */
static int copy(struct vpc_block *b, uint64_t from, int ufd, uint64_t to, uint64_t mode)
{
    int64_t done;
    int rc = -EAGAIN;

    for (int i = 0; i < TRIES && rc == -EAGAIN; i++) {
        if (i)
            sched_yield();
        rc = vpc_uffd_copy(ufd, to, from, b->page_size, mode, &done);
    }
    return rc;
}

static uint64_t local_bytes(struct vpc_block *b, uint64_t page)
{
    return (uint64_t)(uintptr_t)b->local + (page << b->shift);
}

int vpc_local_place(struct vpc_block *b, uint64_t page)
{
    uint64_t to = (uint64_t)(uintptr_t)b->map + (page << b->shift);

    return copy(b, local_bytes(b, page), b->local_place, to, UFFDIO_COPY_MODE_DONTWAKE);
}

int vpc_local_answer(struct vpc_block *b, uint64_t page, int ufd, uint64_t address)
{
    return copy(b, local_bytes(b, page), ufd, address, 0);
}

int vpc_local_zero(struct vpc_block *b, int ufd, uint64_t address)
{
    int64_t done;

    if (b->zeros) /* UFFDIO_ZEROPAGE makes small pages only */
        return copy(b, (uint64_t)(uintptr_t)b->zeros, ufd, address, 0);
    return vpc_uffd_zero(ufd, address, b->page_size, 0, &done);
}
