/* Guest memory: one mapping (map), a table of regions (gm), the dirty log; the supply behind it is in vpc_supply.h.
 *
 * No function here takes or returns a pointer to guest bytes: guest memory is named by integers.
 * Everything is counted by references; the trio thread makes and configures, any thread may drop.
 */
#ifndef VPC_GM_H
#define VPC_GM_H
#include <stdint.h>
#include <stddef.h>

#include "memory/vpc_supply.h"

/* cdef begin */
struct vpc_map;    /* one mmap of one descriptor */
struct vpc_gm;     /* an immutable table of regions */
struct vpc_log;    /* the dirty log shared with the front-end */

/* Kind of backing. */
#define VPC_KIND_TMPFS 1
#define VPC_KIND_HUGETLB 2
#define VPC_KIND_OTHER 3

/* Map [offset, offset + size) of fd, shared. The fd is duplicated. armed: without access, until
 * vpc_map_register. -EFBIG: longer than the file. -EINVAL: empty or wrapping, or armed and unaligned (4096).
 * -EOPNOTSUPP: armed, but neither tmpfs nor hugetlbfs. -ENOSYS: armed hugetlbfs that may not fault and cannot be asked. */
int vpc_map_new(struct vpc_supply *s, int fd, uint64_t offset, uint64_t size, int armed, struct vpc_map **out);
void vpc_map_unref(struct vpc_map *m);
/* Our address of the first byte of the region: for the reply in postcopy, and for nothing else. */
uint64_t vpc_map_address(const struct vpc_map *m);
uint32_t vpc_map_kind(const struct vpc_map *m);
/* No huge pages, register MISSING with the supply's ufd, then allow access. -errno. */
int vpc_map_register(struct vpc_map *m);

int vpc_gm_new(struct vpc_supply *s, struct vpc_gm **out);
void vpc_gm_unref(struct vpc_gm *gm);
/* Add a region; only before the table is used. -EEXIST: overlaps another in guest or front-end addresses. */
int vpc_gm_add(struct vpc_gm *gm, struct vpc_map *m, uint64_t guest_addr, uint64_t size, uint64_t user_addr);
/* Users of the table besides its owner: rings and chains in flight. */
int vpc_gm_users(const struct vpc_gm *gm);
/* Guest address after the highest region. */
uint64_t vpc_gm_end(const struct vpc_gm *gm);

/* Map [offset, offset + size) of fd, which is duplicated. If a page of it goes, the supply is lost. -EFBIG: longer than
 * the file. -EINVAL: empty, wrapping or not a regular file. */
int vpc_log_new(struct vpc_supply *s, int fd, uint64_t offset, uint64_t size, struct vpc_log **out);
void vpc_log_unref(struct vpc_log *log);

/* 1 if mlockall(MCL_FUTURE) is in force: new mappings would be populated. */
int vpc_mlock_future(void);
/* cdef end */

#endif
