/*
 * fault_touch SOCKET PAGES GAP_US CPU
 *
 * A process whose shared memory (memfd) has no pages: it gives its userfaultfd and the memfd to the handler
 * that listens at SOCKET, waits for one byte, then reads each page once in a random order and times each
 * touch. GAP_US microseconds lie between touches, spent in sleep. Prints percentiles and pages that were
 * not what they should be as JSON.
 */
#include "ufd_pass.h"
#include <fcntl.h>
#include <linux/userfaultfd.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/syscall.h>

#define PAGE 4096u

static int open_ufd(void)
{
    int fd = (int)syscall(SYS_userfaultfd, O_CLOEXEC | O_NONBLOCK);

    if (fd < 0) {
        int node = open("/dev/userfaultfd", O_RDWR | O_CLOEXEC);

        fd = node < 0 ? -1 : ioctl(node, USERFAULTFD_IOC_NEW, O_CLOEXEC | O_NONBLOCK);
    }
    if (fd < 0)
        die("userfaultfd");
    return fd;
}

int main(int argc, char **argv)
{
    if (argc != 5) {
        fprintf(stderr, "usage: fault_touch SOCKET PAGES GAP_US CPU\n");
        return 2;
    }
    start(atoi(argv[4]));

    uint64_t pages = strtoull(argv[2], NULL, 0), bad = 0, seed = 88172645463325252u;
    struct timespec gap = {.tv_nsec = atol(argv[3]) * 1000};
    struct ufd_hello hello = {.length = pages * PAGE};
    int memfd = memfd_create("fault", MFD_CLOEXEC), sock = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
    struct sockaddr_un to = unix_address(argv[1]);

    if (memfd < 0 || ftruncate(memfd, (off_t)hello.length) || sock < 0)
        die("memfd");
    volatile unsigned char *base = mmap(NULL, hello.length, PROT_READ | PROT_WRITE, MAP_SHARED, memfd, 0);
    if (base == MAP_FAILED)
        die("mmap");
    /* Have the machine find the memory once; what is measured is the fault, not the host's allocator. */
    for (uint64_t i = 0; i < pages; i++)
        base[i * PAGE] = 1;
    if (fallocate(memfd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, 0, (off_t)hello.length))
        die("fallocate");
    madvise((void *)base, hello.length, MADV_NOHUGEPAGE);

    int ufd = open_ufd();
    struct uffdio_api api = {.api = UFFD_API};
    struct uffdio_register reg = {.range = {(uintptr_t)base, hello.length}, .mode = UFFDIO_REGISTER_MODE_MISSING};

    if (ioctl(ufd, UFFDIO_API, &api) || ioctl(ufd, UFFDIO_REGISTER, &reg))
        die("UFFDIO_REGISTER");
    hello.base = (uintptr_t)base;

    int fds[2] = {ufd, memfd};
    union {
        char room[CMSG_SPACE(sizeof fds)];
        struct cmsghdr align;
    } control = {{0}};
    struct iovec iov = {&hello, sizeof hello};
    struct msghdr msg = {.msg_iov = &iov, .msg_iovlen = 1, .msg_control = &control, .msg_controllen = sizeof control.room};
    struct cmsghdr *cmsg = CMSG_FIRSTHDR(&msg);
    char ready;

    cmsg->cmsg_level = SOL_SOCKET;
    cmsg->cmsg_type = SCM_RIGHTS;
    cmsg->cmsg_len = CMSG_LEN(sizeof fds);
    memcpy(CMSG_DATA(cmsg), fds, sizeof fds);
    if (connect(sock, (struct sockaddr *)&to, sizeof to) || sendmsg(sock, &msg, 0) < 0 || read(sock, &ready, 1) != 1)
        die(argv[1]);

    uint64_t *order = calloc(pages, sizeof *order), *sample = calloc(pages, sizeof *sample);

    if (!order || !sample)
        die("calloc");
    for (uint64_t i = 0; i < pages; i++) {
        seed ^= seed << 13, seed ^= seed >> 7, seed ^= seed << 17;
        uint64_t j = seed % (i + 1);

        order[i] = order[j];
        order[j] = i;
    }
    prctl(PR_SET_TIMERSLACK, 1);
    for (uint64_t i = 0; i < pages; i++) {
        volatile uint64_t *page = (volatile uint64_t *)(base + order[i] * PAGE);
        uint64_t t = now_ns(), word = *page;

        sample[i] = now_ns() - t;
        bad += word != page_word(order[i]);
        if (gap.tv_nsec)
            nanosleep(&gap, NULL);
    }
    printf("{\"pages\": %llu, \"bad\": %llu, ", (unsigned long long)pages, (unsigned long long)bad);
    print_percentiles(sample, pages);
    puts("}");
    return 0;
}
