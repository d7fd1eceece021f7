/*
 * fault_serve SOCKET CPU SPIN_US
 *
 * The least that can serve a fault: poll, read one event, UFFDIO_COPY into the process that faulted.
 * Polls without sleeping for SPIN_US microseconds after each event (0: never). Serves one toucher and ends
 * when it does.
 */
#include "ufd_pass.h"
#include <linux/userfaultfd.h>
#include <poll.h>
#include <sys/ioctl.h>

#define PAGE 4096u

int main(int argc, char **argv)
{
    if (argc != 4) {
        fprintf(stderr, "usage: fault_serve SOCKET CPU SPIN_US\n");
        return 2;
    }
    start(atoi(argv[2]));

    struct sockaddr_un at = unix_address(argv[1]);
    int listener = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0), conn, fds[2];

    if (listener < 0 || bind(listener, (struct sockaddr *)&at, sizeof at) || listen(listener, 1))
        die(argv[1]);
    puts("ready");
    fflush(stdout);
    conn = accept(listener, NULL, NULL);

    struct ufd_hello hello;
    union {
        char room[CMSG_SPACE(sizeof fds)];
        struct cmsghdr align;
    } control;
    struct iovec iov = {&hello, sizeof hello};
    struct msghdr msg = {.msg_iov = &iov, .msg_iovlen = 1, .msg_control = &control, .msg_controllen = sizeof control.room};

    if (recvmsg(conn, &msg, MSG_CMSG_CLOEXEC) != (ssize_t)sizeof hello || !CMSG_FIRSTHDR(&msg))
        die("recvmsg");
    memcpy(fds, CMSG_DATA(CMSG_FIRSTHDR(&msg)), sizeof fds);

    /* All pages lie ready, as they do on the other side. */
    uint64_t pages = hello.length / PAGE, spin_ns = strtoull(argv[3], NULL, 0) * 1000, last_event = 0;
    char *store = aligned_alloc(PAGE, hello.length);
    struct pollfd wait[2] = {{.fd = fds[0], .events = POLLIN}, {.fd = conn, .events = POLLIN}};

    if (!store)
        die("aligned_alloc");
    for (uint64_t i = 0; i < pages; i++) {
        memset(store + i * PAGE, (int)i, PAGE);
        *(uint64_t *)(store + i * PAGE) = page_word(i);
    }
    if (write(conn, "g", 1) != 1)
        die("write");
    for (;;) {
        struct uffd_msg event;

        int n = poll(wait, 2, spin_ns && now_ns() - last_event < spin_ns ? 0 : -1);

        if (n < 0)
            die("poll");
        if (!n)
            continue;
        if (wait[1].revents)
            return 0;
        if (read(fds[0], &event, sizeof event) != (ssize_t)sizeof event) {
            if (errno == EAGAIN)
                continue;
            die("read");
        }
        uint64_t page = (event.arg.pagefault.address - hello.base) / PAGE;
        struct uffdio_copy copy = {.dst = hello.base + page * PAGE, .src = (uintptr_t)(store + page * PAGE), .len = PAGE};

        if (ioctl(fds[0], UFFDIO_COPY, &copy))
            die("UFFDIO_COPY");
        if (spin_ns)
            last_event = now_ns();
    }
}
