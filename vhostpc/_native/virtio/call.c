/* Calling the driver: the eventfd of a ring, which the front-end replaces while others write to it. */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <unistd.h>
#include "event_internal.h"
#include "virtio/ring_internal.h"

int vpc_vq_set_call(struct vpc_vq *vq, int fd)
{
    int nowhere = -1, rc;

    if (fd < 0) {
        fd = nowhere = event_new();
        if (fd < 0)
            return -errno;
    }
    /* The same number for its lifetime: another thread may be about to signal it. */
    rc = dup3(fd, vq->call_fd, O_CLOEXEC) < 0 ? -errno : 0;
    if (nowhere >= 0)
        close(nowhere);
    /* A thread may be signalling the old file: a matter of microseconds, unless it lost its processor there, so some
     * 60 ms at most. No guest page is waited for. */
    for (int i = 0; i < 1000 && atomic_load(&vq->signalling); i++)
        usleep(10);
    return rc;
}

void vpc_vq_signal(struct vpc_vq *vq)
{
    atomic_fetch_add(&vq->signalling, 1);
    (void)vpc_event_signal(vq->call_fd);
    atomic_fetch_sub(&vq->signalling, 1);
}
