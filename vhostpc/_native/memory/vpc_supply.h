/* The supply of a session's guest memory: who delivers its missing pages, and whether it is lost. Counted by
 * references; any thread may drop it. */
#ifndef VPC_SUPPLY_H
#define VPC_SUPPLY_H
#include <stdint.h>

/* cdef begin */
struct vpc_supply; /* one per session: who delivers missing pages, and whether that peer is gone */

/* Flag of calls that touch guest memory: never wait for a page, -EAGAIN before anything is touched or changed. */
#define VPC_TRY 1

struct vpc_wait_stats {
    uint64_t waits;      /* touches that waited for a page */
    uint64_t total_ns;   /* their waiting, added up */
    uint64_t longest_ns; /* the longest of them */
};

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
    int poisoned;     /* the page is present, and must not be read: UFFDIO_POISON, faulty memory */
};

int vpc_supply_new(struct vpc_supply **out);
void vpc_supply_unref(struct vpc_supply *s);
/* From now on maps created armed belong to this ufd (duplicated here); -errno. */
int vpc_supply_arm(struct vpc_supply *s, int ufd);
/* From now on no thread of ours touches an absent page of armed memory: it asks again and again whether the page has come.
 * ufd: one of ours that can report minor faults of hugetlbfs (duplicated here), by which huge pages are asked for; -1: there
 * is none, and armed maps of huge pages are refused. -errno. */
int vpc_supply_never_fault(struct vpc_supply *s, int ufd);
/* Unregister all armed maps and close our copies of the ufd: every page has arrived. */
int vpc_supply_disarm(struct vpc_supply *s);
/* Missing pages will never arrive: see architecture, "failing". -errno: not all maps could be replaced, and waiters in
 * the others sleep on; it may be called again. */
int vpc_supply_fail(struct vpc_supply *s);
/* Threads that wait for a page of this supply. After vpc_supply_fail the number only falls. */
int vpc_supply_asleep(struct vpc_supply *s);
int vpc_supply_is_lost(const struct vpc_supply *s);
/* An eventfd that becomes readable when a SIGBUS has made the supply lost; it stays the supply's. */
int vpc_supply_strike_fd(const struct vpc_supply *s);
/* 1 and the first of them, or 0. */
int vpc_supply_struck(const struct vpc_supply *s, struct vpc_strike *out);
void vpc_supply_stats(struct vpc_supply *s, struct vpc_wait_stats *out);

/* Pages that are asked for ahead, each by a thread of its own, which waits for it and for nothing else. */
#define VPC_AHEAD_MOST 64

struct vpc_ahead_stats {
    uint32_t threads; /* now */
    uint32_t waiting; /* pages that were asked for and have not come */
    uint64_t asked;   /* pages */
    uint64_t failed;  /* threads that could not be started */
};

/* At most so many pages at a time, and threads; 0: none. Before vpc_supply_arm; VPC_AHEAD_MOST otherwise. */
void vpc_supply_ahead_limit(struct vpc_supply *s, uint32_t pages);
/* An eventfd, readable when a page has come, or a thread has ended, since vpc_supply_ahead_heard; it stays the
 * supply's. -ENOTCONN: never armed, so there will be neither. */
int vpc_supply_ahead_fd(const struct vpc_supply *s);
void vpc_supply_ahead_heard(struct vpc_supply *s);
void vpc_supply_ahead_stats(struct vpc_supply *s, struct vpc_ahead_stats *out);
/* cdef end */

#endif
