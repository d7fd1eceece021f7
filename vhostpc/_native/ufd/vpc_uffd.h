/*
 * userfaultfd(2) on plain integers: open, negotiate, register, place, wake, read events.
 *
 * Every address is a number of the process that created the ufd; `src` of a copy is an address in a
 * private buffer of the caller, never guest memory. Nothing here touches guest memory, so nothing
 * here waits for a page. All functions return >= 0 or -errno.
 *
 * Sources: ioctl_userfaultfd(2), userfaultfd(2), Documentation/admin-guide/mm/userfaultfd.rst.
 */
#ifndef VPC_UFFD_H
#define VPC_UFFD_H
#include <stdint.h>
#include <stddef.h>

/* cdef begin */
/* Ways to get a ufd, in the order in which to try them. */
#define VPC_UFFD_DEVICE 0
#define VPC_UFFD_SYSCALL 1
#define VPC_UFFD_USER_MODE 2

/* One decoded event. `kind` is UFFD_EVENT_*; the fields that it does not use are 0. */
struct vpc_uffd_event {
    uint32_t kind;
    uint32_t thread;  /* page fault: thread id, 0 unless UFFD_FEATURE_THREAD_ID is on */
    uint64_t flags;   /* page fault: UFFD_PAGEFAULT_FLAG_* */
    uint64_t address; /* page fault: address; remap, remove, unmap: start; fork: the new ufd */
    uint64_t length;  /* remap, remove, unmap: bytes */
    uint64_t to;      /* remap: new address */
};

/* A new ufd, close-on-exec and non-blocking. The handshake (vpc_uffd_api) is still to be made.
 * DEVICE: open("/dev/userfaultfd") and USERFAULTFD_IOC_NEW (Linux 6.1). USER_MODE: UFFD_USER_MODE_ONLY
 * (Linux 5.11), no privilege needed; faults of the kernel on the process's behalf then fail. */
int vpc_uffd_open(int way);

/* UFFDIO_API: enable `features`; `offered` is every feature the kernel knows, `ioctls` the general ones.
 * -EINVAL when the kernel does not know one of `features`, or when the handshake was made before. */
int vpc_uffd_api(int fd, uint64_t features, uint64_t *offered, uint64_t *ioctls);

/* UFFDIO_REGISTER; `ioctls` is what the range can do. -EBUSY: registered with another ufd. */
int vpc_uffd_register(int fd, uint64_t start, uint64_t len, uint64_t mode, uint64_t *ioctls);

/* UFFDIO_UNREGISTER. Waiters return and find zeros, which their touch puts into a shared file. */
int vpc_uffd_unregister(int fd, uint64_t start, uint64_t len);

/* UFFDIO_WAKE: threads that wait in the range retry. */
int vpc_uffd_wake(int fd, uint64_t start, uint64_t len);

/* UFFDIO_COPY / UFFDIO_ZEROPAGE over a run of whole pages. `done` gets the bytes placed from the start,
 * also on failure; 0 is returned only when all of `len` was placed. The failure belongs to the page
 * at `done`:
 *   -EEXIST  a page exists there and was left unchanged. Skip it, go on.
 *   -EAGAIN  the layout is changing (an event waits to be read, or the range is being remapped): try again.
 *   -ENOENT  not registered, or no longer mapped.      -ESRCH  the process that created the ufd is gone.
 *   -ENOSPC, -ENOMEM  no memory (hugetlbfs: no huge page left).   -EINVAL  not aligned, or not supported.
 *   -EFAULT  `src` is not readable.
 * Waiters for placed pages are woken unless `mode` has DONTWAKE (1). */
int vpc_uffd_copy(int fd, uint64_t dst, uint64_t src, uint64_t len, uint64_t mode, int64_t *done);
int vpc_uffd_zero(int fd, uint64_t start, uint64_t len, uint64_t mode, int64_t *done);

/* Up to `max` (at most 64 a call) waiting events; how many, or -EAGAIN when there is none. */
int vpc_uffd_read(int fd, struct vpc_uffd_event *events, int max);
/* cdef end */

/* UFFDIO_CONTINUE of one page, in a mapping registered for minor faults: 0 when it existed and is mapped now, -EFAULT
 * when it does not exist. No page is made. */
int vpc_uffd_continue(int fd, uint64_t start, uint64_t len);

#endif
