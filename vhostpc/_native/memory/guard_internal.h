/* SIGBUS in mappings of a front-end's files: see guard.c. Never part of the cdef. */
#ifndef VPC_GUARD_INTERNAL_H
#define VPC_GUARD_INTERNAL_H
#include <stddef.h>
#include <stdint.h>

struct vpc_supply;
struct vpc_guarded; /* an entry of the registry */

/* The handler's view of a mapping. */
struct vpc_guard_range {
    struct vpc_supply *supply; /* whose session a SIGBUS in it ends; the mapping holds a reference */
    uintptr_t base;
    size_t len, page; /* bytes; both base and len are multiples of page, which is what the kernel maps */
    uint64_t file_off; /* of base */
    int fd; /* its file, open for as long as the entry is in the registry */
    uint32_t kind;
    int use; /* VPC_USE_* */
};

/* After mmap, before the first touch: from now on a SIGBUS in the range is ours. NULL: no memory. */
struct vpc_guarded *vpc_guard_add(const struct vpc_guard_range *range);
/* Before munmap, when nobody touches the range any more. NULL is allowed. */
void vpc_guard_remove(struct vpc_guarded *entry);

#endif
