/* Shared by vq.c, walk.c, chain.c and the pumps; never part of the cdef. */
#ifndef VPC_RING_INTERNAL_H
#define VPC_RING_INTERNAL_H
#include <linux/virtio_config.h>
#include <linux/virtio_ring.h>
#include "memory/gm_internal.h"
#include "virtio/inflight_internal.h"
#include "virtio/vpc_ring.h"

#define VPC_MAX_RING 32768
#define VPC_MAX_SEGS VPC_MAX_RING /* of one chain: QEMU takes 1024, but no table that a driver may make is refused here */
#define VPC_FEW_SEGS 128

struct vpc_seg {
    uint64_t gpa;
    uint32_t len;
    uint32_t write;
};

struct vpc_vq {
    struct vpc_gm *gm;
    struct vpc_log *log;
    bool log_used;
    uint64_t used_gpa;
    uint32_t num;
    const struct vpc_region *desc_r, *avail_r, *used_r;
    const uint8_t *desc; /* ours */
    const uint8_t *avail;
    uint8_t *used;
    bool event_idx, indirect;
    uint16_t last_avail, used_idx, avail_idx; /* avail_idx: as last read from the driver */
    bool used_known;
    uint16_t signalled;
    bool signalled_known;
    bool notify_off;
    int call_fd;
    _Atomic int signalling; /* threads that are calling */
    atomic_int stop;
    _Atomic(const char *) error;
    struct vpc_inflight_part inflight;
};

/* One chain as walked: segments are private copies, all of them mapped. May be walked into again and again;
 * begin with vpc_walk_init, end with vpc_walk_free. */
struct vpc_walk {
    uint16_t head;
    uint32_t n, readable_segs, room;
    uint64_t readable, writable;
    struct vpc_seg *segs; /* few, until a chain has more */
    struct vpc_seg few[VPC_FEW_SEGS];
};

void vpc_walk_init(struct vpc_walk *w);
void vpc_walk_free(struct vpc_walk *w);

struct vpc_chain {
    struct vpc_gm *gm;
    uint16_t head;
    bool late; /* only the head is known yet */
    uint32_t n, readable_segs;
    uint64_t readable, writable;
    struct vpc_seg *segs;
    unsigned char *data; /* the first `loaded` readable bytes */
    uint64_t loaded;
};

/* Flag of a walk, with VPC_TRY: the chain is only looked at ahead of its turn. It breaks nothing (-EBADMSG), and -E2BIG
 * is returned for one of more than VPC_FEW_SEGS descriptors. */
#define VPC_GLANCE 64

/* The driver has broken the rules: the ring does nothing more. -EBADMSG. */
static inline int vpc_vq_break(struct vpc_vq *vq, const char *why)
{
    atomic_store(&vq->error, why); /* late chains are walked beside other calls */
    return -EBADMSG;
}

/* Make the ring ready for popping: touches its index words, reads the used index the first time. */
int vpc_vq_ready(struct vpc_vq *vq, int flags);
/* Chains that the driver has made available and that are not popped, by a fresh look at its index. */
int vpc_vq_refresh(struct vpc_vq *vq);
/* The same, reading the index only when all chains seen before are taken. */
int vpc_vq_available(struct vpc_vq *vq);
/* The word that tells a call to end before its next absent page. */
static inline const atomic_int *vpc_vq_stopper(const struct vpc_vq *vq, int flags)
{
    return flags & VPC_UNSTOPPED ? NULL : &vq->stop;
}

/* Ask for no kicks, if the used ring is resident: never waits. */
void vpc_vq_disable_notify(struct vpc_vq *vq);

/* The head of the chain that is taken after `ahead` others. */
int vpc_vq_head(struct vpc_vq *vq, uint16_t ahead, uint16_t *head, int flags);
/* Walk the chain that begins at head. Changes nothing of the vq but its error. */
int vpc_vq_walk_head(struct vpc_vq *vq, uint16_t head, struct vpc_walk *w, int flags);
/* Walk the chain that is taken after `ahead` others, without taking it. */
int vpc_vq_walk(struct vpc_vq *vq, uint16_t ahead, struct vpc_walk *w, int flags);
/* Make the used slots of the next n pushes and the event words resident. */
int vpc_vq_touch_used(struct vpc_vq *vq, uint32_t n, int flags, const atomic_int *stop);
/* Chains to be served again that were not taken yet. */
static inline uint32_t vpc_vq_left(const struct vpc_vq *vq)
{
    return vq->inflight.again_n - vq->inflight.again_at;
}

/* The chain at head, which is the next one, is taken: the one place. Its pages are resident then, or it is late. */
static inline void vpc_vq_take(struct vpc_vq *vq, uint16_t head)
{
    if (vpc_vq_left(vq)) { /* its mark is there, and its place in the order */
        vq->inflight.again_at++;
        return;
    }
    if (vq->inflight.region)
        vpc_inflight_take(vq, head);
    vq->last_avail++;
}

/* The reverse, for the chain taken last, unless it was to be served again: its head is the next one again. */
static inline void vpc_vq_give_back(struct vpc_vq *vq, uint16_t head)
{
    if (vq->inflight.region)
        vpc_inflight_give_back(vq, head);
    vq->last_avail--;
}

void vpc_vq_put_used(struct vpc_vq *vq, uint16_t at, uint16_t head, uint32_t len);
/* Publish n used entries and call the driver if it wants that. 1: it was called. -EOWNERDEAD: nothing was published. */
int vpc_vq_publish(struct vpc_vq *vq, uint16_t n);
/* Make the bytes [skip, skip + len) of segments resident, as vpc_touch; counts are checked by the caller. Where a page
 * is absent, those of the bytes behind it are asked for too. */
int vpc_segs_touch(const struct vpc_gm *gm, const struct vpc_seg *segs, uint64_t skip, uint64_t len, int flags,
                   const atomic_int *stop);
/* Ask for the absent pages of the next n chains behind `ahead` others: descriptors, and up to len readable or writable
 * bytes of each. Waits for none. */
void vpc_vq_request(struct vpc_vq *vq, uint32_t ahead, uint32_t n, bool write, uint64_t len, int flags);
/* Copy out of the segments' bytes [skip, skip + len), or into them. Counts are checked by the caller. */
int vpc_segs_read(const struct vpc_gm *gm, const struct vpc_seg *segs, uint32_t n, uint64_t skip, void *to,
                  uint64_t len);
int vpc_segs_write(const struct vpc_gm *gm, const struct vpc_seg *segs, uint32_t n, uint64_t skip,
                   const void *from, uint64_t len, struct vpc_log *log);

#endif
