/* The guest's side: a virtio driver on split rings in our own mapping, which sends and checks frames (vpc_far.h).
 * Guest addresses are integers; buffers are never handed out. */
#ifndef VPC_DRIVER_H
#define VPC_DRIVER_H
#include <stdint.h>
#include <stddef.h>

#include "frontend/vpc_far.h"
#include "pages/vpc_ram.h"

/* cdef begin */
struct vpc_driver; /* one queue */

struct vpc_driver_config {
    uint64_t desc, avail, used;      /* guest addresses of the ring's parts */
    uint64_t buffers, buffer_stride; /* slot i's buffer is at buffers + i * buffer_stride */
    uint64_t tables, table_stride;   /* slot i's indirect table; tables 0: descriptors in the ring */
    uint32_t num;                    /* entries of the ring */
    uint32_t slots;                  /* chains in flight at most; slots * descriptors <= num unless indirect */
    uint32_t parts;                  /* descriptors that the buffer is cut into */
    uint32_t answer_len;             /* last bytes of a buffer, in a descriptor of their own that the device
                                        writes a frame into, without header; 0: none. Not with receive. */
    uint32_t buffer_len;             /* bytes of a buffer, header included */
    uint32_t header;                 /* bytes of device header before each frame */
    uint32_t receive;                /* 1: the device writes */
    uint32_t event_idx;              /* VIRTIO_F_EVENT_IDX was negotiated */
    uint32_t stream;                 /* number in our frames; received frames of any stream are taken */
    int kick_fd, call_fd;            /* eventfds of the caller, which must outlive the driver */
};

struct vpc_driver_stats {
    uint64_t posted;      /* chains made available */
    uint64_t completed;   /* chains used by the device */
    uint64_t kicks;
    uint64_t calls;       /* times the call fd was readable */
    uint64_t bad_used;    /* used entries that name no chain in flight, or too many bytes */
    uint64_t in_flight;
    uint32_t avail_index, used_index; /* free running, 16 bits */
    struct vpc_frame_stats received;
};

/* -EINVAL: a ring cannot be laid out like this. */
int vpc_driver_new(struct vpc_ram *ram, const struct vpc_driver_config *config, struct vpc_driver **out);
void vpc_driver_free(struct vpc_driver *d);
/* Guest addresses [gpa, gpa + size) are block from offset. */
int vpc_driver_add_region(struct vpc_driver *d, uint64_t gpa, uint64_t size, int block, uint64_t offset);
/* The guest moved: the same guest addresses and blocks, another mapping, other eventfds. Touches nothing. */
int vpc_driver_move(struct vpc_driver *d, struct vpc_ram *ram, int kick_fd, int call_fd);
/* The rest touch the ring and MAY WAIT FOR A PAGE. -EFAULT: an address outside the regions. -EOWNERDEAD: the
 * blocks were given up. */
int vpc_driver_reset(struct vpc_driver *d); /* an empty ring */
/* Make up to count chains available (frames numbered on from the last, of frame_len bytes, or empty receive
 * buffers) and kick if the device wants it. Returns how many there was room for. */
int vpc_driver_post(struct vpc_driver *d, uint32_t count, uint32_t frame_len);
/* Take back the chains that the device has used; received frames are checked. Returns how many chains. */
int vpc_driver_reap(struct vpc_driver *d);
/* Post and reap until count chains were posted and all came back (count 0: until stopped), one chain every
 * interval_ns at most. Returns 0, or 1 when stopped. */
int vpc_driver_run(struct vpc_driver *d, uint64_t count, uint32_t frame_len, uint64_t interval_ns);
void vpc_driver_stop(struct vpc_driver *d);
/* Read the used index: how many entries wait to be reaped. -EBADMSG: more than chains are in flight. */
int vpc_driver_look(struct vpc_driver *d);
/* The rest touch nothing. How many numbers from first and below end no frame received so far had. */
uint64_t vpc_driver_unseen(struct vpc_driver *d, uint64_t first, uint64_t end);
/* The state that a driver of the same layout needs to continue; no call may run. Returns its bytes; nothing is written
 * if there is less room. Of frames that never came the newest 65536 are included. */
int64_t vpc_driver_save(struct vpc_driver *d, unsigned char *data, uint64_t room);
/* -EINVAL: another ring size or number of slots. -EBADMSG: an impossible state. Then nothing has changed. */
int vpc_driver_load(struct vpc_driver *d, const unsigned char *data, uint64_t length);
int vpc_driver_stats(struct vpc_driver *d, struct vpc_driver_stats *out);
/* cdef end */

#endif
