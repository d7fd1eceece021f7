/* The structures of guest memory that the C files share; never part of the cdef. */
#ifndef VPC_GM_INTERNAL_H
#define VPC_GM_INTERNAL_H
#include <errno.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>
#include "memory/guard_internal.h"
#include "page.h"
#include "memory/vpc_gm.h"

#if __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "virtio 1 is little-endian, and so must the host be"
#endif

struct vpc_supply {
    atomic_int refs;
    atomic_int lost;
    atomic_int armed;
    atomic_int struck; /* 0: no; 1: the first thread writes strike; 2: it is whole */
    struct vpc_strike strike;
    int strike_fd; /* eventfd, readable from then on */
    int ufd; /* our copy, kept until disarm: failing needs it to wake */
    bool no_fault; /* absent pages of armed memory are never touched; set before the first armed map, and then fixed */
    int ask_ufd;   /* no_fault: for asking whether a huge page is there; -1: none. Kept for the supply's life */
    pthread_mutex_t lock; /* the list below; never held across a touch */
    struct vpc_map *maps;
    struct vpc_ahead *ahead; /* set once, before the first armed map */
    uint32_t ahead_limit;
    atomic_uint_fast64_t waits, total_ns, longest_ns;
};

struct vpc_map {
    atomic_int refs;
    struct vpc_supply *supply;
    struct vpc_map *next, *prev;
    uint8_t *base;      /* of the mapping */
    uint64_t len;       /* of the mapping */
    uint64_t file_off;  /* of base */
    uint64_t skip;      /* region's first byte = base + skip */
    uint64_t page_size;
    uint32_t kind;
    int fd;             /* for the residency probe */
    atomic_bool armed;  /* pages may be missing */
    bool registered;
    bool replaced;      /* failing has put private memory here */
    atomic_int waiting; /* threads that wait for a page, or are about to look at lost before they do */
    int ufd;            /* that it was registered with; our own copy */
    atomic_uint_fast64_t *seen; /* armed: a bit per page that is known to be resident */
    atomic_uint_fast64_t *requested; /* armed: the same, that was requested ahead and has come or will come */
    uint32_t requests; /* for its pages that are in flight; under the supply's lock */
    bool retired;       /* nobody else uses it; under the supply's lock */
    uint8_t *ask; /* no_fault, hugetlbfs: a second mapping, without access and never touched, for asking */
    struct vpc_guarded *guarded;
};

struct vpc_region {
    uint64_t gpa, size, uaddr;
    uint8_t *own; /* address of the region's first byte here */
    struct vpc_map *map;
};

struct vpc_gm {
    atomic_int refs;
    struct vpc_supply *supply;
    uint32_t n;
    struct vpc_region *regions; /* by gpa */
};

/* A mapped part of a front-end's file that is not guest memory: if a page of it goes, the supply is lost. */
struct vpc_view {
    struct vpc_supply *supply;
    struct vpc_guarded *guarded;
    int fd; /* for the guard, which queries its size */
    uint8_t *map;
    uint64_t map_len;
    uint8_t *at; /* its first byte */
    uint64_t size;
};

struct vpc_log {
    atomic_int refs;
    struct vpc_view view;
    atomic_uchar *bits;
};

/* Kind (VPC_KIND_*) and page size in bytes of what an fd names, and its size in bytes; -errno. */
int vpc_fd_kind(int fd, uint32_t *kind, uint64_t *page_size, uint64_t *size);
/* Map [offset, offset + size) of fd, which is duplicated. -EFBIG: longer than the file. -EINVAL: empty, wrapping or no
 * regular file. -EOPNOTSUPP: VPC_USE_INFLIGHT, and neither tmpfs nor hugetlbfs. After an error there is nothing to
 * close. */
int vpc_view_open(struct vpc_view *v, struct vpc_supply *s, int fd, uint64_t offset, uint64_t size, int use);
void vpc_view_close(struct vpc_view *v);

/* A request for a page keeps the map, but does not use it: when nobody else does, its thread is released. */
void vpc_map_hold(struct vpc_map *m);
void vpc_map_let_go(struct vpc_map *m);

void vpc_gm_ref(struct vpc_gm *gm);
void vpc_log_ref(struct vpc_log *log);

/* The one way to read lost: after every copy out of guest memory, before a byte of it is used. */
static inline bool vpc_supply_lost(const struct vpc_supply *s)
{
    /* An acquire load orders only later accesses; this keeps the plain loads of the copy before it. */
    atomic_thread_fence(memory_order_acquire);
    return atomic_load_explicit(&s->lost, memory_order_seq_cst) != 0;
}

static inline bool vpc_gm_lost(const struct vpc_gm *gm)
{
    return vpc_supply_lost(gm->supply);
}

/* The region that holds gpa, or NULL. */
static inline const struct vpc_region *vpc_gm_find(const struct vpc_gm *gm, uint64_t gpa)
{
    uint32_t lo = 0, hi = gm->n;
    while (lo < hi) {
        uint32_t mid = lo + (hi - lo) / 2;
        const struct vpc_region *r = &gm->regions[mid];
        if (gpa < r->gpa)
            hi = mid;
        else if (gpa - r->gpa >= r->size)
            lo = mid + 1;
        else
            return r;
    }
    return NULL;
}

/* The region that holds [uaddr, uaddr + len) whole, or NULL. */
const struct vpc_region *vpc_gm_find_user(const struct vpc_gm *gm, uint64_t uaddr, uint64_t len);

/* Flag, with VPC_TRY: -EALREADY in place of -EAGAIN where the absent page has been asked for. */
#define VPC_TELL_REQUESTED 16
/* Flag, with VPC_TRY: do not ask for anything. */
#define VPC_REQUEST_NOTHING 32

int vpc_touch_slow(const struct vpc_region *r, const uint8_t *p, uint64_t len, int flags, const atomic_int *stop);

/* Make [p, p + len) of a region resident: after 0 a copy waits for nothing.
 * With VPC_TRY: -EAGAIN when a page is absent; the absent pages are requested. Otherwise it waits; -ECANCELED when *stop
 * is seen set before the next page, -EOWNERDEAD when the supply is lost. Calm memory costs one test: the check after
 * every copy finds out that it was lost. */
static inline int vpc_touch(const struct vpc_region *r, const uint8_t *p, uint64_t len, int flags,
                            const atomic_int *stop)
{
    if (!atomic_load_explicit(&r->map->armed, memory_order_acquire))
        return 0;
    return vpc_touch_slow(r, p, len, flags, stop);
}

/* Ask for the absent pages of [p, p + len), as far as there is room: raises their faults on other threads, and returns
 * without waiting. absent: the first one is known to be. False: a page that is absent was not asked for, and is not in
 * flight. */
bool vpc_request(const struct vpc_region *r, const uint8_t *p, uint64_t len, bool absent, const atomic_int *stop);
/* The same over guest addresses that are known to be mapped. */
bool vpc_gm_request(const struct vpc_gm *gm, uint64_t gpa, uint64_t len, const atomic_int *stop);

/* Are all pages of [gpa, gpa + len) mapped? */
bool vpc_gm_mapped(const struct vpc_gm *gm, uint64_t gpa, uint64_t len);
/* vpc_touch over guest addresses that may cross regions and are known to be mapped. */
int vpc_gm_touch(const struct vpc_gm *gm, uint64_t gpa, uint64_t len, int flags, const atomic_int *stop);
/* Copies between private memory and the guest; -EFAULT outside memory. Touch before. */
int vpc_gm_read(const struct vpc_gm *gm, uint64_t gpa, void *to, uint64_t len);
int vpc_gm_write(const struct vpc_gm *gm, uint64_t gpa, const void *from, uint64_t len, struct vpc_log *log);

/* Mark [gpa, gpa + len) dirty; pages outside the log are not marked. */
void vpc_log_mark(struct vpc_log *log, uint64_t gpa, uint64_t len);

#endif
