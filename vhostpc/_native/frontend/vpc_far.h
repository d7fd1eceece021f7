/* Frames that name themselves, and the far side of a driver's.
 *
 * A frame has its stream, number, length and a CRC-32 over all of it, so that a receiver of one knows whether it is
 * whole, and which it is. */
#ifndef VPC_FAR_H
#define VPC_FAR_H
#include <stdint.h>

/* cdef begin */
struct vpc_far;    /* a datagram socket that checks, and may echo, frames */

struct vpc_frame_stats {
    uint64_t frames;     /* whole frames received, each counted once */
    uint64_t bytes;
    uint64_t bad;        /* not ours, cut short, or with a wrong CRC */
    uint64_t duplicates;
    uint64_t reordered;  /* came after one with a higher number */
    uint64_t next;       /* highest number received, plus 1 */
};

/* Receive and check frames on the datagram socket fd; echo: send each whole one back to where it came from. */
int vpc_far_new(int fd, int echo, struct vpc_far **out);
void vpc_far_free(struct vpc_far *f);
/* Until stopped; returns 0 or -errno. */
int vpc_far_run(struct vpc_far *f);
void vpc_far_stop(struct vpc_far *f);
int vpc_far_stats(struct vpc_far *f, struct vpc_frame_stats *out, uint64_t *echoed);
/* cdef end */

#endif
