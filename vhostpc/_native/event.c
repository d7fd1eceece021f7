/* See vpc_event.h. The one place where a descriptor that others have too is read or written. */
#define _GNU_SOURCE
#include "event_internal.h"

#include <errno.h>
#include <linux/aio_abi.h>
#include <poll.h>
#include <pthread.h>
#include <signal.h>
#include <sys/eventfd.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

#define SIGNALS 64 /* room for completions that nobody has taken yet */

/* ---- eventfds of our own */

int event_new(void)
{
    return eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
}

void event_poke(int fd)
{
    uint64_t one = 1;

    (void)!write(fd, &one, sizeof one); /* a full counter is as good */
}

void event_drain(int fd)
{
    uint64_t count;

    (void)!read(fd, &count, sizeof count);
}

/* ---- reading and writing shared descriptors */

/* Kernels that do not offer a read or write without waiting: before 6.10 for a userfaultfd, before 6.5 for a pipe.
 * There we can only poll first; another process with the file can still empty or fill it after the poll. */
static int ready(int fd, short what)
{
    struct pollfd p = {.fd = fd, .events = what};

    if (poll(&p, 1, 0) == 1 && p.revents & what)
        return 1;
    errno = EAGAIN;
    return 0;
}

static int is_unable(ssize_t rc)
{
    return rc < 0 && (errno == EOPNOTSUPP || errno == ESPIPE);
}

ssize_t read_now(int fd, void *to, size_t length)
{
    struct iovec iov = {.iov_base = to, .iov_len = length};
    ssize_t n = preadv2(fd, &iov, 1, -1, RWF_NOWAIT);

    if (is_unable(n))
        n = ready(fd, POLLIN) ? read(fd, to, length) : -1;
    return n;
}

ssize_t write_now(int fd, const void *from, size_t length)
{
    struct iovec iov = {.iov_base = (void *)(uintptr_t)from, .iov_len = length};
    ssize_t n = pwritev2(fd, &iov, 1, -1, RWF_NOWAIT);

    if (is_unable(n))
        n = ready(fd, POLLOUT) ? write(fd, from, length) : -1;
    return n;
}

int is_on_disk(int fd)
{
    struct stat st;

    return fstat(fd, &st) == 0 && (S_ISREG(st.st_mode) || S_ISBLK(st.st_mode));
}

int vpc_event_clear(int fd)
{
    uint64_t count;

    return read_now(fd, &count, sizeof count) > 0;
}

/* ---- signalling
 *
 * No flag keeps a write to an eventfd from waiting (RWF_NOWAIT is refused there). But the kernel itself signals
 * eventfds without waiting: here with the completion of an asynchronous read of no bytes, which is done at once. It is
 * one system call, where a poll and a write would be two. */

static pthread_once_t once = PTHREAD_ONCE_INIT;
static aio_context_t signals; /* 0: this kernel, or a filter of system calls, does not let us */

static void begin(void)
{
    if (syscall(SYS_io_setup, SIGNALS, &signals) < 0)
        signals = 0;
}

static void forget_completed(void)
{
    struct io_event done[SIGNALS];
    struct timespec now = {0, 0};

    (void)syscall(SYS_io_getevents, signals, 0L, (long)SIGNALS, done, &now);
}

static int submit(int fd)
{
    /* The read is of the eventfd itself, so that no other descriptor is needed; a refused one (under 8 bytes) completes
     * too. */
    struct iocb read = {.aio_lio_opcode = IOCB_CMD_PREAD,
                        .aio_fildes = (uint32_t)fd,
                        .aio_flags = IOCB_FLAG_RESFD,
                        .aio_resfd = (uint32_t)fd};
    struct iocb *list[1] = {&read};

    return syscall(SYS_io_submit, signals, 1L, list) == 1 ? 0 : -errno;
}

/* A front-end may have a pipe or a socket in the place of an eventfd. */
static int is_pipe(int fd)
{
    struct stat st;

    return fstat(fd, &st) == 0 && S_ISFIFO(st.st_mode);
}

/* If nobody reads it any more, the write raises SIGPIPE, which no flag prevents for a pipe. */
static ssize_t write_pipe(int fd, const void *from, size_t length)
{
    struct timespec now = {0, 0};
    sigset_t broken, before;
    ssize_t n;
    int error;

    sigemptyset(&broken);
    sigaddset(&broken, SIGPIPE);
    (void)pthread_sigmask(SIG_BLOCK, &broken, &before);
    n = write_now(fd, from, length);
    error = errno;
    if (n < 0 && error == EPIPE)
        (void)sigtimedwait(&broken, NULL, &now);
    (void)pthread_sigmask(SIG_SETMASK, &before, NULL);
    errno = error;
    return n;
}

static int write_event(int fd)
{
    uint64_t one = 1;
    ssize_t n = send(fd, &one, sizeof one, MSG_DONTWAIT | MSG_NOSIGNAL);

    if (n < 0 && errno == ENOTSOCK)
        n = is_pipe(fd) ? write_pipe(fd, &one, sizeof one) : ready(fd, POLLOUT) ? write(fd, &one, sizeof one) : -1;
    return n >= 0 || errno == EAGAIN ? 0 : -errno;
}

int vpc_event_signal(int fd)
{
    int rc = -ENOSYS;

    (void)pthread_once(&once, begin);
    if (signals) {
        rc = submit(fd);
        for (int i = 0; rc == -EAGAIN && i < 4; i++) { /* others may take the room that we make */
            forget_completed();
            rc = submit(fd);
        }
    }
    return rc < 0 ? write_event(fd) : rc;
}
