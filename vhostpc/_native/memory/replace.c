/* Empty memory in the place of guest memory that is given up. See replace_internal.h. */
#define _GNU_SOURCE
#include "memory/replace_internal.h"

#include <errno.h>
#include <stdatomic.h>
#include <sys/mman.h>
#include <unistd.h>

#define SPARE 4 /* mappings: a replacement inside a larger one splits it into three */

static _Atomic(void *) reserve;

static size_t reserve_length(void)
{
    return SPARE * (size_t)sysconf(_SC_PAGESIZE);
}

void vpc_replace_reserve(void)
{
    size_t length = reserve_length(), page = length / SPARE;
    void *none = NULL;

    if (atomic_load(&reserve))
        return;
    /* Shared: the kernel never joins it to a neighbour. Protected by turns: each page counts as a mapping. */
    char *fresh = mmap(NULL, length, PROT_NONE, MAP_SHARED | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (fresh == MAP_FAILED)
        return;
    for (size_t i = 1; i < SPARE; i += 2)
        (void)mprotect(fresh + i * page, page, PROT_READ);
    if (!atomic_compare_exchange_strong(&reserve, &none, fresh))
        munmap(fresh, length);
}

/* Give the reserve back to the process; 0 if there is none. */
static int use_reserve(void)
{
    void *kept = atomic_exchange(&reserve, NULL);

    return kept && munmap(kept, reserve_length()) == 0;
}

static int replace(void *at, size_t length, int kind)
{
    void *map = mmap(at, length, PROT_READ | PROT_WRITE, kind | MAP_ANONYMOUS | MAP_FIXED | MAP_NORESERVE, -1, 0);

    return map == MAP_FAILED ? -errno : 0;
}

int vpc_replace_private(void *at, size_t length)
{
    int rc = replace(at, length, MAP_PRIVATE);

    if (rc < 0 && use_reserve())
        rc = replace(at, length, MAP_PRIVATE);
    if (rc < 0) /* not data, for RLIMIT_DATA */
        rc = replace(at, length, MAP_SHARED);
    return rc;
}
