#ifndef FRAME_INTERNAL_H
#define FRAME_INTERNAL_H
/* Frames that name themselves, and the record of received ones. */
#include <pthread.h>
#include <stdint.h>
#include <stddef.h>

#include "frontend/vpc_far.h"

/* Smallest frame in bytes: 14 of Ethernet and 24 of ours. */
#define VPC_FRAME_MIN 38
#define VPC_FRAME_NUMBERS ((uint64_t)1 << 28) /* frames with higher numbers are not ours */

struct vpc_frames {
    uint32_t crc[256];
    pthread_mutex_t lock; /* seen, room and stats: they are read while frames arrive */
    uint64_t *seen; /* a bit a number */
    uint64_t room;  /* numbers that seen has bits for */
    struct vpc_frame_stats stats;
};

int vpc_frames_init(struct vpc_frames *f);
void vpc_frames_free(struct vpc_frames *f);
/* Fill length bytes (at least VPC_FRAME_MIN) of private memory. */
void vpc_frame_build(const struct vpc_frames *f, unsigned char *to, uint32_t length, uint32_t stream, uint64_t number);
/* Check a frame in private memory and record it. 1: whole. */
int vpc_frame_take(struct vpc_frames *f, const unsigned char *from, size_t length);

#endif
