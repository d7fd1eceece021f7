/* See vpc_uffd.h. */
#define _GNU_SOURCE
#include "event_internal.h"
#include "ufd/vpc_uffd.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/userfaultfd.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/syscall.h>
#include <unistd.h>

/* Headers older than Linux 6.1 and 5.11 do not name these. */
#ifndef USERFAULTFD_IOC_NEW
#define USERFAULTFD_IOC_NEW _IO(0xAA, 0x00)
#endif
#ifndef UFFD_USER_MODE_ONLY
#define UFFD_USER_MODE_ONLY 1
#endif

/* Nor those older than Linux 5.13 this. */
#ifndef UFFDIO_CONTINUE
struct uffdio_continue {
    struct uffdio_range range;
    uint64_t mode;
    int64_t mapped;
};
#define UFFDIO_CONTINUE _IOWR(UFFDIO, 0x07, struct uffdio_continue)
#endif

#define EVENTS_A_READ 64

static int open_device(int flags)
{
    int dev = open("/dev/userfaultfd", O_RDWR | O_CLOEXEC);
    int fd, err;

    if (dev < 0)
        return -errno;
    fd = ioctl(dev, USERFAULTFD_IOC_NEW, (unsigned long)flags);
    err = errno;
    close(dev);
    return fd < 0 ? -err : fd;
}

int vpc_uffd_open(int way)
{
    int flags = O_CLOEXEC | O_NONBLOCK;
    long fd;

    switch (way) {
    case VPC_UFFD_DEVICE:
        return open_device(flags);
    case VPC_UFFD_SYSCALL:
        break;
    case VPC_UFFD_USER_MODE:
        flags |= UFFD_USER_MODE_ONLY;
        break;
    default:
        return -EINVAL;
    }
    fd = syscall(__NR_userfaultfd, flags);
    return fd < 0 ? -errno : (int)fd;
}

int vpc_uffd_api(int fd, uint64_t features, uint64_t *offered, uint64_t *ioctls)
{
    struct uffdio_api api = {.api = UFFD_API, .features = features};

    if (ioctl(fd, UFFDIO_API, &api) < 0)
        return -errno;
    *offered = api.features;
    *ioctls = api.ioctls;
    return 0;
}

int vpc_uffd_register(int fd, uint64_t start, uint64_t len, uint64_t mode, uint64_t *ioctls)
{
    struct uffdio_register reg = {.range = {.start = start, .len = len}, .mode = mode};

    if (ioctl(fd, UFFDIO_REGISTER, &reg) < 0)
        return -errno;
    *ioctls = reg.ioctls;
    return 0;
}

int vpc_uffd_unregister(int fd, uint64_t start, uint64_t len)
{
    struct uffdio_range range = {.start = start, .len = len};

    return ioctl(fd, UFFDIO_UNREGISTER, &range) < 0 ? -errno : 0;
}

int vpc_uffd_wake(int fd, uint64_t start, uint64_t len)
{
    struct uffdio_range range = {.start = start, .len = len};

    return ioctl(fd, UFFDIO_WAKE, &range) < 0 ? -errno : 0;
}

/*
 * The kernel reports a run that stops in the middle as EAGAIN with a positive count, and hides the reason; another
 * call from there on returns the reason (EEXIST, for instance) with no page placed.
 */
static int run_result(int rc, int err, int64_t step, uint64_t len, int64_t *done)
{
    if (step > 0)
        *done += step;
    if ((uint64_t)*done >= len)
        return 0;
    if (rc == 0)
        return -EIO; /* success with fewer pages than requested: no kernel does this, and it must not spin */
    return step > 0 && err == EAGAIN ? 1 : -err;
}

int vpc_uffd_copy(int fd, uint64_t dst, uint64_t src, uint64_t len, uint64_t mode, int64_t *done)
{
    int more;

    *done = 0;
    if (len == 0 || len > INT64_MAX || dst + len < dst || src + len < src)
        return -EINVAL;
    do {
        uint64_t at = (uint64_t)*done;
        struct uffdio_copy copy = {.dst = dst + at, .src = src + at, .len = len - at, .mode = mode};
        int rc = ioctl(fd, UFFDIO_COPY, &copy);

        more = run_result(rc, errno, copy.copy, len, done);
    } while (more > 0);
    return more;
}

int vpc_uffd_zero(int fd, uint64_t start, uint64_t len, uint64_t mode, int64_t *done)
{
    int more;

    *done = 0;
    if (len == 0 || len > INT64_MAX || start + len < start)
        return -EINVAL;
    do {
        uint64_t at = (uint64_t)*done;
        struct uffdio_zeropage zero = {.range = {.start = start + at, .len = len - at}, .mode = mode};
        int rc = ioctl(fd, UFFDIO_ZEROPAGE, &zero);

        more = run_result(rc, errno, zero.zeropage, len, done);
    } while (more > 0);
    return more;
}

int vpc_uffd_continue(int fd, uint64_t start, uint64_t len)
{
    struct uffdio_continue more = {.range = {.start = start, .len = len}};

    return ioctl(fd, UFFDIO_CONTINUE, &more) < 0 ? -errno : 0;
}

static void decode(const struct uffd_msg *msg, struct vpc_uffd_event *ev)
{
    memset(ev, 0, sizeof *ev);
    ev->kind = msg->event;
    switch (msg->event) {
    case UFFD_EVENT_PAGEFAULT:
        ev->flags = msg->arg.pagefault.flags;
        ev->address = msg->arg.pagefault.address;
        ev->thread = msg->arg.pagefault.feat.ptid;
        break;
    case UFFD_EVENT_FORK:
        ev->address = msg->arg.fork.ufd;
        break;
    case UFFD_EVENT_REMAP:
        ev->address = msg->arg.remap.from;
        ev->to = msg->arg.remap.to;
        ev->length = msg->arg.remap.len;
        break;
    case UFFD_EVENT_REMOVE:
    case UFFD_EVENT_UNMAP:
        ev->address = msg->arg.remove.start;
        ev->length = msg->arg.remove.end - msg->arg.remove.start;
        break;
    default:
        break;
    }
}

int vpc_uffd_read(int fd, struct vpc_uffd_event *events, int max)
{
    struct uffd_msg msgs[EVENTS_A_READ];
    int want = max < EVENTS_A_READ ? max : EVENTS_A_READ;
    int count;
    ssize_t got;

    if (want <= 0)
        return -EINVAL;
    got = read_now(fd, msgs, (size_t)want * sizeof msgs[0]);
    if (got < 0)
        return -errno;
    count = (int)((size_t)got / sizeof msgs[0]);
    for (int i = 0; i < count; i++)
        decode(&msgs[i], &events[i]);
    return count;
}
