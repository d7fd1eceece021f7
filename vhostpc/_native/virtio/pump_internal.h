#ifndef VPC_PUMP_INTERNAL_H
#define VPC_PUMP_INTERNAL_H
#include <sys/socket.h>

#include "virtio/ring_internal.h"
#include "virtio/vpc_pump.h"

#define VPC_BATCH 64
#define VPC_MAX_FRAME 65535u
#define VPC_OUT_ARENA (512u << 10)
#define VPC_IN_SEGS 2048

struct vpc_pump {
    struct vpc_vq *vq;
    atomic_int stop;
    int stop_fd;
    unsigned vain;    /* kicks in a row that came at once and brought no work */
    uint16_t vain_at; /* the avail index at the last of them */
    bool linger; /* the last wait for a kick was short: poll a little longer before the next */
    atomic_uint_fast64_t frames, bytes, dropped, discarded, batches, syscalls, calls;
    /* out */
    uint8_t *arena;
    bool no_gso; /* the path refused UDP_SEGMENT once */
    uint64_t seen; /* of discarded frames: nobody needs it, but it proves that they were read */
    /* in: frames received and not yet in the guest: [first, count) of the slots */
    uint8_t *slots; /* VPC_BATCH times VPC_MAX_FRAME + 1; only the used part takes memory */
    uint32_t slot_len[VPC_BATCH];
    uint32_t slot_seg[VPC_BATCH]; /* frames of this length lie in it, the last may be shorter (UDP_GRO) */
    uint32_t first, count;
    uint32_t at; /* bytes of the first slot that the guest has */
    bool gro;    /* the socket may join datagrams and reports how */
    uint64_t short_since; /* since when the first frame has had buffers, and not enough of them; 0: it has not */
    struct vpc_seg *segs; /* of the chains that one frame goes to */
    struct vpc_walk walk;
};

static inline void vpc_count(atomic_uint_fast64_t *what, uint64_t n)
{
    /* One writer: a plain add; readers only need whole words. */
    atomic_store_explicit(what, atomic_load_explicit(what, memory_order_relaxed) + n, memory_order_relaxed);
}

/* Wait for a (or -1), b (or -1), the stop event, or so many ms (-1: for ever). 1: go on, 0: stopped, -errno. */
int vpc_pump_wait(struct vpc_pump *p, int a, int b, int ms);

/* Ask for a kick and wait for it, up to ms, unless there is work. > 0: look again; -ECANCELED: stopped; -errno. */
int vpc_pump_idle(struct vpc_pump *p, int kick_fd, int ms);

/* CLOCK_MONOTONIC. */
uint64_t vpc_pump_now(void);

static inline bool vpc_pump_stopped(struct vpc_pump *p)
{
    return atomic_load_explicit(&p->stop, memory_order_relaxed) != 0;
}

/* Whether this error of a far side is permanent. Networks come and go; a bad descriptor stays bad. */
static inline bool vpc_far_is_dead(int err)
{
    return err == EBADF || err == EBADFD || err == ENOTSOCK || err == EFAULT || err == EINVAL;
}

#endif
