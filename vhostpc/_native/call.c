/* Calling the driver: the eventfd of a ring, which the front-end replaces while others write to it. */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <unistd.h>
#include "ring_internal.h"

int vpc_vq_set_call(struct vpc_vq *vq, int fd)
{
    int null = -1, rc;

    if (fd < 0) {
        fd = null = open("/dev/null", O_WRONLY | O_CLOEXEC);
        if (fd < 0)
            return -errno;
    }
    /* One number for life: another thread may be about to write to it. */
    rc = dup3(fd, vq->call_fd, O_CLOEXEC) < 0 ? -errno : 0;
    if (null >= 0)
        close(null);
    /* A thread may be inside write(2) on the old file: a matter of microseconds, unless it lost its processor there.
     * A front-end that fills a blocking descriptor behind our poll could keep it there: so not for ever, some
     * 60 ms at most. No guest page is waited for. */
    for (int i = 0; i < 1000 && atomic_load(&vq->signalling); i++)
        usleep(10);
    return rc;
}

void vpc_vq_signal(struct vpc_vq *vq)
{
    uint64_t one = 1;
    struct pollfd p = {.fd = vq->call_fd, .events = POLLOUT};

    /* A full counter means that the driver has been called; a blocking descriptor must not hold us. */
    atomic_fetch_add(&vq->signalling, 1);
    if (poll(&p, 1, 0) == 1 && (p.revents & POLLOUT))
        (void)!write(vq->call_fd, &one, sizeof(one));
    atomic_fetch_sub(&vq->signalling, 1);
}
