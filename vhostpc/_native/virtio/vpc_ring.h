/* Virtqueues: pop, push, notification, and pumps that join a queue to a file descriptor.
 *
 * A vq belongs to one task: never two calls at a time on it, except vpc_vq_stop, and those on chains of their
 * own: vpc_chain_load, vpc_chain_touch, vpc_chain_read and vpc_chain_write may run beside each other and beside pop,
 * push (of other chains) and enable_notify. Touching calls are these seven and the pumps; all others touch nothing.
 */
#ifndef VPC_RING_H
#define VPC_RING_H
#include "memory/vpc_gm.h"

/* cdef begin */
struct vpc_vq;
struct vpc_chain; /* a popped chain: private copies of its descriptors and of its first readable bytes */

int vpc_vq_new(struct vpc_vq **out);
void vpc_vq_free(struct vpc_vq *vq);

/* Negotiated feature bits that matter here: INDIRECT_DESC, EVENT_IDX. */
void vpc_vq_set_features(struct vpc_vq *vq, uint64_t features);
/* The table that addresses are looked up in, or NULL; counted. Ring addresses must be set again. */
void vpc_vq_set_memory(struct vpc_vq *vq, struct vpc_gm *gm);
/* Ring of num entries (a power of two) at front-end addresses. -EFAULT: outside one region.
 * -EINVAL: misaligned or num wrong. Touches nothing. */
int vpc_vq_set_ring(struct vpc_vq *vq, uint32_t num, uint64_t desc, uint64_t avail, uint64_t used);
/* Log writes: the log area (counted, NULL for none); used ring at guest address used_gpa if log_used. */
void vpc_vq_set_log(struct vpc_vq *vq, struct vpc_log *log, int log_used, uint64_t used_gpa);
/* Next avail index to take; also forgets the used index, which the next touching call reads. */
void vpc_vq_set_base(struct vpc_vq *vq, uint32_t avail_index);
uint32_t vpc_vq_base(const struct vpc_vq *vq);
/* --- the inflight region: chains that are taken and not answered, in a file that outlives the process --- */
struct vpc_inflight;
/* Map [offset, offset + size) of fd, shared. -EFBIG: longer than the file. -EINVAL: empty, wrapping, unaligned (8)
 * or no regular file. -EOPNOTSUPP: neither tmpfs nor hugetlbfs, so a touch might wait for others. */
int vpc_inflight_new(struct vpc_supply *s, int fd, uint64_t offset, uint64_t size, struct vpc_inflight **out);
void vpc_inflight_unref(struct vpc_inflight *region);
/* This ring's part of it begins at offset and has size entries; counted; NULL: no region. Only while no call runs. The
 * next touching call after set_base reads it. -EINVAL: not inside the region. -ENOMEM. */
int vpc_vq_set_inflight(struct vpc_vq *vq, struct vpc_inflight *region, uint64_t offset, uint32_t size);
/* Chains taken before us that have to be done again and were not popped yet; pop takes them first. */
uint32_t vpc_vq_again(const struct vpc_vq *vq);

/* Where the driver is called: duplicated onto the same number for its lifetime; -1: nowhere. */
int vpc_vq_set_call(struct vpc_vq *vq, int fd);
/* Call the driver, whatever it asked for. */
void vpc_vq_signal(struct vpc_vq *vq);
/* Touching calls end with -ECANCELED before their next touch of an absent page, until cleared. */
void vpc_vq_stop(struct vpc_vq *vq, int stopped);
/* Why the ring is broken: a sentence, or NULL. Cleared by set_base. */
const char *vpc_vq_error(const struct vpc_vq *vq);

struct vpc_popped {
    struct vpc_chain *chain;
    const unsigned char *data; /* the first readable bytes: private memory, valid until the chain is freed */
    uint64_t loaded;           /* how many: all of them, up to VPC_LOADED */
    uint64_t readable;
    uint64_t writable;
    int late; /* nothing is known of the chain yet: vpc_chain_load it */
    int again; /* it was taken before us, and one younger than it is answered: stepping back gives it to nobody */
};

/* Flags, besides VPC_TRY. */
#define VPC_LATE 2 /* pop: a chain whose own pages (not the ring's) are absent is taken late, none waits for it */
#define VPC_UNSTOPPED 4 /* chain_load, _touch, _read, _write: go on although the vq is stopped */
#define VPC_AGAIN 8 /* pop: only what was there again */

#define VPC_LOADED 262144 /* readable bytes of a chain that are copied when it is popped */

/* Pop up to max_chains, stopping after max_bytes of private memory (one chain is always taken).
 * Returns how many; 0: empty. -EAGAIN: (TRY) the first one is not resident. -EBADMSG: broken ring.
 * -EOWNERDEAD: lost. -ECANCELED: stopped. -ENOMEM. */
int vpc_vq_pop(struct vpc_vq *vq, struct vpc_popped *out, uint32_t max_chains, uint64_t max_bytes, int flags);
/* Walk a late chain and read its first bytes; then it is as any other. Errors as pop; it stays late then. */
int vpc_chain_load(struct vpc_vq *vq, struct vpc_chain *chain, struct vpc_popped *out, int flags);
/* Make the writable bytes [skip, skip + len) resident. 0, or errors as pop; -EMSGSIZE: there are not so many. */
int vpc_chain_touch(const struct vpc_vq *vq, const struct vpc_chain *chain, uint64_t skip, uint64_t len, int flags);
/* Copy the readable bytes [skip, skip + len) to private memory. 0, or as vpc_chain_touch. */
int vpc_chain_read(const struct vpc_vq *vq, const struct vpc_chain *chain, uint64_t skip, unsigned char *data,
                   uint64_t len, int flags);
/* Copy private memory to the writable bytes [skip, skip + len) and log that; all of it or, unless it is 0, nothing. */
int vpc_chain_write(const struct vpc_vq *vq, const struct vpc_chain *chain, uint64_t skip, const unsigned char *data,
                    uint64_t len, int flags);

struct vpc_answer {
    struct vpc_chain *chain; /* freed by a push that returns 0 */
    const unsigned char *data; /* goes to the writable bytes [skip, skip + len); those before it are as they are */
    uint64_t skip, len;
};

/* Write answers, used entries in this order, log, publish once, call the driver if it wants it.
 * All or nothing: -EAGAIN (TRY), -EOWNERDEAD leave the ring as it was. A push is not stopped by vpc_vq_stop. */
int vpc_vq_push(struct vpc_vq *vq, const struct vpc_answer *answers, uint32_t n, int flags);
void vpc_chain_free(struct vpc_chain *chain);
/* Write the chain's answer to these mappings, if they hold all its buffers (else -EFAULT, and it keeps its own). */
int vpc_chain_rebase(struct vpc_chain *chain, struct vpc_gm *memory);
/* Give back the chain popped last, which is neither answered nor freed nor was there again: the next pop takes it. */
void vpc_vq_unpop(struct vpc_vq *vq, const struct vpc_chain *chain);
/* Ask for a kick at the next buffer. 1: more came since the last look, so look again. Else as pop. */
int vpc_vq_enable_notify(struct vpc_vq *vq, int flags);

/* --- pumps --- */
struct vpc_pump;

struct vpc_pump_stats {
    uint64_t frames;    /* moved */
    uint64_t bytes;     /* of frames, without the header */
    uint64_t dropped;   /* the far side took none: full, refused, or no room in the ring's buffers */
    uint64_t discarded; /* consumed while the ring was disabled, or stale when it started */
    uint64_t batches;
    uint64_t syscalls;  /* send, receive, poll, kick and call */
    uint64_t calls;     /* of the driver */
};

/* Kinds of far side. */
#define VPC_FAR_SOCKET 1 /* datagram socket: one frame a datagram; to addr if addr_len, else connected */
#define VPC_FAR_FILE 2   /* tap or the like: one frame a read or write */
#define VPC_FAR_NONE 3   /* out: frames are read whole and are gone; what VPC_FAR_FILE on the null device comes to */

struct vpc_pump_config {
    int fd;
    int kind;
    int kick_fd;
    uint32_t header;     /* bytes of device header before each frame in guest buffers */
    uint32_t mergeable;  /* the header's last two bytes count the buffers of a frame */
    uint32_t discard;    /* out: consume and drop. in: drop what had come before the start */
    uint32_t max_batch;  /* frames, at most 64; 0: 64 */
    unsigned char addr[32];
    uint32_t addr_len;
};

int vpc_pump_new(struct vpc_vq *vq, struct vpc_pump **out);
void vpc_pump_free(struct vpc_pump *p);
/* Guest to fd, until stopped (0), broken (-EBADMSG), lost (-EOWNERDEAD) or the fd fails (-errno).
 * A frame is sent and its buffer returned, or neither. Waits for pages. */
int vpc_pump_out(struct vpc_pump *p, const struct vpc_pump_config *config);
/* The fd to the guest; as vpc_pump_out. Frames received and not yet delivered stay in the pump. One that is larger
 * than all posted buffers (mergeable, few posted) is dropped when it has waited for a second. */
int vpc_pump_in(struct vpc_pump *p, const struct vpc_pump_config *config);
/* Make a running pump return soon; or the next one at once, until vpc_pump_clear. */
void vpc_pump_stop(struct vpc_pump *p);
void vpc_pump_clear(struct vpc_pump *p);
/* While no pump runs: drop the frame that waits for more buffers than are posted, if one does. */
void vpc_pump_drop(struct vpc_pump *p);
void vpc_pump_stats(struct vpc_pump *p, struct vpc_pump_stats *out);
/* cdef end */

#endif
