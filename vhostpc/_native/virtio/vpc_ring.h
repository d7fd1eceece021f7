/* Virtqueues: pop, push, notification.
 *
 * A vq belongs to one task: never two calls at a time on it, except vpc_vq_stop, and those on chains of their
 * own: vpc_chain_load, vpc_late_look, vpc_chain_touch, vpc_chain_read and vpc_chain_write may run beside each other and
 * beside pop, push (of other chains) and enable_notify. Touching calls are these eight and the pumps; all others touch
 * nothing.
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

/* Where the driver is called: duplicated onto the same number for its lifetime; -1: nowhere. */
int vpc_vq_set_call(struct vpc_vq *vq, int fd);
/* Call the driver, whatever it requested. */
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
    int late; /* the chain's content is not known yet: vpc_chain_load it */
    int again; /* it was taken before us, and a younger one is answered: stepping back cannot give it back */
};

/* Flags, besides VPC_TRY. */
#define VPC_LATE 2 /* pop: a chain whose own pages (not the ring's) are absent is taken late, none waits for it */
#define VPC_UNSTOPPED 4 /* chain_load, _touch, _read, _write: go on although the vq is stopped */
#define VPC_AGAIN 8 /* pop: only chains to be served again */

#define VPC_LOADED 262144 /* readable bytes of a chain that are copied when it is popped */

/* Pop up to max_chains, stopping after max_bytes of private memory (one chain is always taken).
 * Returns how many; 0: empty. -EAGAIN: (TRY) the first one is not resident. -EBADMSG: broken ring.
 * -EOWNERDEAD: lost. -ECANCELED: stopped. -ENOMEM. */
int vpc_vq_pop(struct vpc_vq *vq, struct vpc_popped *out, uint32_t max_chains, uint64_t max_bytes, int flags);
/* What a late chain waits for: its content, or pages of its answer. */
struct vpc_late {
    struct vpc_chain *chain; /* NULL: none */
    int answer;              /* its writable bytes [skip, skip + len), and not its content */
    uint64_t skip, len;
    struct vpc_popped popped; /* its content, when that has come */
};
/* Look at n of them, and ask for the pages that they lack; never waits. Returns how many have come, at most max, and
 * stops after max_bytes of private memory; which: in done. in_flight: those whose next page is in flight, so that the
 * supply's eventfd will be readable. If none has come: 0, -EBADMSG, -EOWNERDEAD, -ECANCELED, -ENOMEM as pop. */
int vpc_late_look(struct vpc_vq *vq, struct vpc_late *late, uint32_t n, uint32_t *done, uint32_t max, uint64_t max_bytes,
                  uint32_t *in_flight, int flags);
/* Walk a late chain and read its first bytes; then it is like any other. Errors as pop; it stays late then. */
int vpc_chain_load(struct vpc_vq *vq, struct vpc_chain *chain, struct vpc_popped *out, int flags);
/* Make the writable bytes [skip, skip + len) resident. 0, or errors as pop; -EMSGSIZE: there are fewer. */
int vpc_chain_touch(const struct vpc_vq *vq, const struct vpc_chain *chain, uint64_t skip, uint64_t len, int flags);
/* Copy the readable bytes [skip, skip + len) to private memory. 0, or as vpc_chain_touch. */
int vpc_chain_read(const struct vpc_vq *vq, const struct vpc_chain *chain, uint64_t skip, unsigned char *data,
                   uint64_t len, int flags);
/* Copy private memory to the writable bytes [skip, skip + len) and log that; all of it or, unless it is 0, nothing. */
int vpc_chain_write(const struct vpc_vq *vq, const struct vpc_chain *chain, uint64_t skip, const unsigned char *data,
                    uint64_t len, int flags);

struct vpc_answer {
    struct vpc_chain *chain; /* freed by a push that returns 0 */
    const unsigned char *data; /* goes to the writable bytes [skip, skip + len); earlier ones stay as they are */
    uint64_t skip, len;
};

/* Write answers, used entries in this order, log, publish once, call the driver if it wants it.
 * All or nothing: -EAGAIN (TRY), -EOWNERDEAD leave the ring as it was. A push is not stopped by vpc_vq_stop. */
int vpc_vq_push(struct vpc_vq *vq, const struct vpc_answer *answers, uint32_t n, int flags);
void vpc_chain_free(struct vpc_chain *chain);
/* Write the chain's answer to these mappings, if they have all its buffers (otherwise -EFAULT, and it keeps its own).
 * */
int vpc_chain_rebase(struct vpc_chain *chain, struct vpc_gm *memory);
/* Give back the chain popped last, which is not answered, freed or to be served again: the next pop takes it. */
void vpc_vq_unpop(struct vpc_vq *vq, const struct vpc_chain *chain);
/* Ask for a kick at the next buffer. 1: more came meanwhile, so pop again. Otherwise as pop. */
int vpc_vq_enable_notify(struct vpc_vq *vq, int flags);

/* cdef end */

#endif
