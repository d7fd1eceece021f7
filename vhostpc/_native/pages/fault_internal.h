#ifndef FAULT_INTERNAL_H
#define FAULT_INTERNAL_H
/*
 * The fault service inside: outbox.c requests pages, waiters.c knows which threads wait where, blocktime.c for how long
 * vCPUs and clients stood still, fault.c is the loop.
 *
 * No lost wake. The loop: remember the waiter, then test "received". The loader: mark "received", then look for
 * waiters (both in sequentially consistent order, the waiters under the lock). Whichever comes second sees the
 * other, so every waiter is woken, and every page that was not requested yet is requested.
 *
 * The lock is held over non-blocking reads and ioctls, never over a touch of a block, a send or a poll.
 */
#include <pthread.h>
#include <stdatomic.h>
#include <sys/epoll.h>

#include "event_internal.h"
#include "pages/ram_internal.h"
#include "pages/vpc_fault.h"
#include "ufd/vpc_uffd.h"

#define MAX_CLIENTS 1024
#define EVENTS_A_READ 64

/* In place of a VPC_WAY_*: it could not be answered yet, for lack of memory or because its client's memory is being
 * changed. The loop tries again. */
#define WAY_AGAIN UINT32_MAX

/* Groups whose members stand still together or not. */
enum { GROUP_VCPUS, GROUP_ALL, BLOCKED_GROUPS };

struct blocked_group {
    uint32_t members, down;
    int all_down;
    uint64_t since_ns; /* while all are down */
    uint64_t total_ns; /* of the times before */
};

/* A vCPU, or a client as a whole. */
struct party {
    uint32_t open;     /* waits that have not ended */
    unsigned groups;   /* bit 1 << GROUP_*: it is a member */
    uint64_t since_ns; /* while some are open */
    uint64_t total_ns; /* of the times before */
};

struct vcpu {
    struct party party;
    struct vpc_vcpu_waits stats;
};

struct client {
    int fd; /* -1: removed */
    uint32_t range_count;
    struct vpc_client_range *ranges; /* sorted by base */
    uint64_t **seen;                 /* two bitmaps a range: host pages that faulted; those that were here by then */
    struct vpc_client_stats stats;
    struct party party;
};

struct vpc_fault {
    struct vpc_ram *ram;
    int control; /* eventfd: look at stop and the outbox again */
    int ready;   /* epoll: control and the clients that are read; poll would cost two more calls for each fault */
    _Atomic int stop;
    _Atomic int running;

    pthread_mutex_t lock; /* clients and waiters */
    int client_count;
    struct client *clients[MAX_CLIENTS];
    struct vpc_waiter *waiters;
    uint32_t waiter_count, waiter_room;
    struct vpc_fault_stats stats;
    struct vpc_traced *trace; /* a ring, NULL while nothing is traced */
    uint32_t trace_room;
    uint64_t traced; /* entries ever made */
    int vcpu_client; /* the one whose threads vCPUs are, -1: not known */
    uint32_t vcpu_count, slot_mask;
    struct vcpu *vcpus;
    uint32_t *slots; /* by thread id, open addressing: 1 + a vCPU's index; 0: empty */
    struct vcpu others;
    struct blocked_group groups[BLOCKED_GROUPS];
    uint64_t latest_ns; /* time of the last change of any of these */
    uint64_t latency[VPC_LATENCY_BUCKETS];
    int again;       /* some waiters are to be tried again */
    int ask_again;   /* and all requested pages are to be requested again */
    int starved;     /* no room for another event: unread ones stay unread for a moment */
    int born;        /* stats name the page: the loop ends */

    pthread_mutex_t out_lock; /* outbox; taken after lock, never the other way round */
    int out_fd;
    unsigned char *out;
    size_t out_begin, out_end, out_room;
    uint64_t out_batches, out_bytes;
    int out_errno;
    int out_used; /* there was a return path before */
    int out_mute; /* pages are not requested: see vpc_fault_mute */
};

/* Have the loop look again. */
static inline void vpc_fault_kick(struct vpc_fault *s)
{
    event_poke(s->control);
}

/* Let the loop read a client, or no longer. 0 or -errno. */
static inline int vpc_fault_watch(struct vpc_fault *s, int fd, uint32_t who)
{
    struct epoll_event ev = {.events = EPOLLIN, .data.u32 = who};

    return epoll_ctl(s->ready, EPOLL_CTL_ADD, fd, &ev) < 0 ? -errno : 0;
}

/* By hand, since the descriptor may be shared with its client's process, and then closing ours does not do it. */
static inline void vpc_fault_unwatch(struct vpc_fault *s, int fd)
{
    (void)epoll_ctl(s->ready, EPOLL_CTL_DEL, fd, NULL);
}

/* outbox.c; the first two with the lock held, the third with the outbox's. The first two: 0 or -ENOMEM. */
int vpc_outbox_request(struct vpc_fault *s, int block, uint64_t page);
int vpc_outbox_ask_again(struct vpc_fault *s);
void vpc_outbox_flush(struct vpc_fault *s);
void vpc_outbox_free(struct vpc_fault *s);

/* waiters.c; all with the lock held. */
/* Room for the events of one read: 0 or -ENOMEM. An event that was read and not kept would be a lost wake-up. */
int vpc_waiters_room(struct vpc_fault *s);
uint32_t vpc_waiter_add(struct vpc_fault *s, int client, const struct vpc_uffd_event *ev, uint64_t when);
/* 1: it was woken, or waits already, and is gone; 0: it waits; -ENXIO: its address is in no range. */
int vpc_waiter_resolve(struct vpc_fault *s, uint32_t i);
/* Waiters that could not be answered. */
void vpc_waiters_again(struct vpc_fault *s);
void vpc_client_free(struct client *c);

/* blocktime.c; all with the lock held. A waiter enters the list, leaves it, leaves it having waited so long for its page. */
void vpc_blocked_begin(struct vpc_fault *s, struct vpc_waiter *w);
void vpc_blocked_end(struct vpc_fault *s, const struct vpc_waiter *w, uint64_t now);
void vpc_blocked_count(struct vpc_fault *s, const struct vpc_waiter *w, uint64_t wait);
/* Be a member of these groups (bits) and of no others. */
void vpc_blocked_join(struct vpc_fault *s, struct party *p, unsigned groups);
uint64_t vpc_blocked_ns(const struct party *p, uint64_t now);
void vpc_blocked_free(struct vpc_fault *s);

/* With the lock held; NULL for a number that was never given. */
static inline struct client *vpc_client_of(struct vpc_fault *s, int id)
{
    return id >= 0 && id < s->client_count ? s->clients[id] : NULL;
}

#endif
