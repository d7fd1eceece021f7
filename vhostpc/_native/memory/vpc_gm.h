/* Guest memory: what stands behind it (supply), one mapping (map), a table of regions (gm), the dirty log.
 *
 * No function here takes or returns a pointer to guest bytes: guest memory is named by integers.
 * Everything is counted by references; the trio thread makes and configures, any thread may drop.
 */
#ifndef VPC_GM_H
#define VPC_GM_H
#include <stdint.h>
#include <stddef.h>

/* cdef begin */
struct vpc_supply; /* one per session: who brings missing pages, and whether it is gone */
struct vpc_map;    /* one mmap of one descriptor */
struct vpc_gm;     /* an immutable table of regions */
struct vpc_log;    /* the dirty log shared with the front-end */

struct vpc_wait_stats {
    uint64_t waits;      /* touches that waited for a page */
    uint64_t total_ns;   /* their waiting, added up */
    uint64_t longest_ns; /* the longest of them */
};

/* Flag of calls that touch guest memory: never wait for a page, -EAGAIN before anything is touched or changed. */
#define VPC_TRY 1

/* A touch found that its page had gone: SIGBUS. */
#define VPC_USE_MEMORY 0
#define VPC_USE_LOG 1
#define VPC_USE_INFLIGHT 2

struct vpc_strike {
    uint64_t address; /* ours, of the touch */
    uint64_t offset;  /* the same in the file */
    uint64_t size;    /* of the file just then, in bytes; UINT64_MAX: not known */
    uint32_t kind;    /* of backing */
    int use;          /* VPC_USE_* */
    int poisoned;     /* the page is there, and may not be read: UFFDIO_POISON, faulty memory */
};

int vpc_supply_new(struct vpc_supply **out);
void vpc_supply_unref(struct vpc_supply *s);
/* From now on maps born armed belong to this ufd (duplicated here); -errno. */
int vpc_supply_arm(struct vpc_supply *s, int ufd);
/* Unregister all armed maps and close our copies of the ufd: every page has arrived. */
int vpc_supply_disarm(struct vpc_supply *s);
/* The pages that miss will never come: see architecture, "failing". -errno: not all maps could be replaced, and
 * waiters in the others sleep on; it may be tried again. */
int vpc_supply_fail(struct vpc_supply *s);
/* Threads that wait for a page of this supply. After vpc_supply_fail the number only falls. */
int vpc_supply_asleep(struct vpc_supply *s);
int vpc_supply_is_lost(const struct vpc_supply *s);
/* An eventfd that becomes readable when a SIGBUS has made the supply lost; it stays the supply's. */
int vpc_supply_strike_fd(const struct vpc_supply *s);
/* 1 and the first of them, or 0. */
int vpc_supply_struck(const struct vpc_supply *s, struct vpc_strike *out);
void vpc_supply_stats(struct vpc_supply *s, struct vpc_wait_stats *out);

/* Kind of backing. */
#define VPC_KIND_TMPFS 1
#define VPC_KIND_HUGETLB 2
#define VPC_KIND_OTHER 3

/* Map [offset, offset + size) of fd, shared. The fd is duplicated. armed: without access, until
 * vpc_map_register. -EFBIG: longer than the file. -EINVAL: empty or wrapping, or armed and unaligned (4096).
 * -EOPNOTSUPP: armed, but neither tmpfs nor hugetlbfs. */
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
/* Users of the table besides its owner: rings and chains in hand. */
int vpc_gm_users(const struct vpc_gm *gm);
/* Guest address after the highest region. */
uint64_t vpc_gm_end(const struct vpc_gm *gm);

/* Map [offset, offset + size) of fd, which is duplicated. A page of it that goes makes the supply lost. -EFBIG: longer
 * than the file. -EINVAL: empty, wrapping or no regular file. */
int vpc_log_new(struct vpc_supply *s, int fd, uint64_t offset, uint64_t size, struct vpc_log **out);
void vpc_log_unref(struct vpc_log *log);

/* 1 if mlockall(MCL_FUTURE) is in force: new mappings would be populated. */
int vpc_mlock_future(void);
/* cdef end */

#endif
