/* Virtqueues: pop, push, notification, and pumps that join a queue to a file descriptor.
 *
 * A vq belongs to one task: never two calls at a time on it, except vpc_vq_stop, and those on chains of their
 * own: vpc_chain_load and vpc_chain_touch may run beside each other and beside pop, push and enable_notify.
 * Touching calls are these five and the pumps; all others touch nothing.
 */
#ifndef VPC_RING_H
#define VPC_RING_H
#include "vpc_gm.h"

/* cdef begin */
struct vpc_vq;
struct vpc_chain; /* a popped chain: private copies of its descriptors and of its readable bytes */

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
/* The used index as last written or read here, or -1 before the first touching call. */
int64_t vpc_vq_used(const struct vpc_vq *vq);
/* Where the driver is called: duplicated onto one number for life; -1: nowhere. */
int vpc_vq_set_call(struct vpc_vq *vq, int fd);
/* Call the driver, whatever it asked for. */
void vpc_vq_signal(struct vpc_vq *vq);
/* Touching calls end with -ECANCELED before their next touch of an absent page, until cleared. */
void vpc_vq_stop(struct vpc_vq *vq, int stopped);
/* Why the ring is broken: a sentence, or NULL. Cleared by set_base. */
const char *vpc_vq_error(const struct vpc_vq *vq);

struct vpc_popped {
    struct vpc_chain *chain;
    const unsigned char *data; /* the readable bytes: private memory, valid until the chain is freed */
    uint64_t readable;
    uint64_t writable;
    int late; /* nothing is known of the chain yet: vpc_chain_load it */
};

/* Flags. */
#define VPC_TRY 1 /* never wait for a page: -EAGAIN before anything is touched or changed */
#define VPC_LATE 2 /* pop: a chain whose own pages (not the ring's) are absent is taken late, none waits for it */
#define VPC_UNSTOPPED 4 /* chain_load, chain_touch: go on although the vq is stopped */

/* Pop up to max_chains, stopping after max_bytes readable bytes (one chain is always taken whole).
 * Returns how many; 0: empty. -EAGAIN: (TRY) the first one is not resident. -EBADMSG: broken ring.
 * -EOWNERDEAD: lost. -ECANCELED: stopped. -ENOMEM. */
int vpc_vq_pop(struct vpc_vq *vq, struct vpc_popped *out, uint32_t max_chains, uint64_t max_bytes, int flags);
/* Walk a late chain and read its bytes; then it is as any other. Errors as pop; it stays late then. */
int vpc_chain_load(struct vpc_vq *vq, struct vpc_chain *chain, struct vpc_popped *out, int flags);
/* Make the buffers resident that an answer of len bytes is written to. 0, or errors as pop. */
int vpc_chain_touch(const struct vpc_vq *vq, const struct vpc_chain *chain, uint64_t len, int flags);

struct vpc_answer {
    struct vpc_chain *chain; /* freed by a push that returns 0 */
    const unsigned char *data;
    uint64_t len; /* at most the chain's writable bytes */
};

/* Write answers, used entries in this order, log, publish once, call the driver if it wants it.
 * All or nothing: -EAGAIN (TRY), -EOWNERDEAD leave the ring as it was. A push is not stopped by vpc_vq_stop. */
int vpc_vq_push(struct vpc_vq *vq, const struct vpc_answer *answers, uint32_t n, int flags);
void vpc_chain_free(struct vpc_chain *chain);
/* Write the chain's answer to these mappings, if they hold all its buffers (else -EFAULT, and it keeps its own). */
int vpc_chain_rebase(struct vpc_chain *chain, struct vpc_gm *memory);
/* Give back the n chains popped last (none of them answered): the next pop takes them again. */
void vpc_vq_unpop(struct vpc_vq *vq, uint32_t n);
/* Ask for a kick at the next buffer. 1: more came since the last look, so look again. Else as pop. */
int vpc_vq_enable_notify(struct vpc_vq *vq, int flags);
void vpc_vq_disable_notify(struct vpc_vq *vq);

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
/* The fd to the guest; as vpc_pump_out. Frames received and not yet delivered stay in the pump. */
int vpc_pump_in(struct vpc_pump *p, const struct vpc_pump_config *config);
/* Make a running pump return soon; or the next one at once, until vpc_pump_clear. */
void vpc_pump_stop(struct vpc_pump *p);
void vpc_pump_clear(struct vpc_pump *p);
void vpc_pump_stats(struct vpc_pump *p, struct vpc_pump_stats *out);
/* Read an eventfd dry without ever waiting. 1: it was readable. */
int vpc_clear_event(int fd);
/* cdef end */

#endif
