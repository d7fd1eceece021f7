/* Pumps: each joins a queue to a file descriptor. Both directions touch guest memory. */
#ifndef VPC_PUMP_H
#define VPC_PUMP_H
#include "virtio/vpc_ring.h"

/* cdef begin */
struct vpc_pump;

struct vpc_pump_stats {
    uint64_t frames;    /* moved */
    uint64_t bytes;     /* of frames, without the header */
    uint64_t dropped;   /* not accepted: the far side was full or refused, or there was no room in the ring's buffers */
    uint64_t discarded; /* consumed while the ring was disabled, or stale when it started */
    uint64_t batches;
    uint64_t syscalls;  /* send, receive, poll, kick and call */
    uint64_t calls;     /* of the driver */
};

/* Kinds of far side. */
#define VPC_FAR_SOCKET 1 /* datagram socket: one frame a datagram; to addr if addr_len, otherwise connected */
#define VPC_FAR_FILE 2   /* tap or the like: one frame a read or write */
#define VPC_FAR_NONE 3   /* out: frames are read whole and dropped, as by VPC_FAR_FILE on the null device */

struct vpc_pump_config {
    int fd;
    int kind;
    int kick_fd;
    uint32_t header;     /* bytes of device header before each frame in guest buffers */
    uint32_t mergeable;  /* the header's last two bytes count the buffers of a frame */
    uint32_t discard;    /* out: consume and drop. in: drop frames from before the start */
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
