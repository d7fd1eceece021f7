#ifndef DRIVER_INTERNAL_H
#define DRIVER_INTERNAL_H
/* A virtio driver's queue: what driver.c works on and driverstate.c saves. */
#include "frontend/frame_internal.h"
#include "frontend/vpc_driver.h"
#include "pages/ram_internal.h"

#define MAX_REGIONS 32

struct region {
    uint64_t gpa, size, offset;
    int block;
};

struct vpc_driver {
    struct vpc_ram *ram;
    struct vpc_driver_config c;
    struct region regions[MAX_REGIONS];
    int region_count;
    int control;
    _Atomic int stop;

    uint16_t avail_idx, kicked_idx, used_idx;
    uint32_t *free_slots; /* a queue, so that all slots are used in turn */
    uint32_t free_head, free_count;
    unsigned char *in_flight; /* by slot */
    uint64_t next_number;
    unsigned char *buffer; /* private, one frame */
    struct vpc_frames frames;
    struct vpc_driver_stats stats;
};

/* Our address of guest bytes that lie in one region, or NULL. */
void *driver_at(struct vpc_driver *d, uint64_t gpa, uint64_t length);

#endif
