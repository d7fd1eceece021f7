/*
 * vhost_touch SOCKET FIRST RANGE COUNT GAP_US
 *
 * The least vhost-user back-end that takes part in a postcopy: it listens at SOCKET, has a memory table, no rings.
 * When the front-end has stored its addresses after LISTEN, a thread touches COUNT missing pages of the RANGE
 * from page FIRST of guest memory on, in a fixed random order, with GAP_US microseconds of sleep between them,
 * and times each touch. A page that has come already is passed over. Prints percentiles as JSON when it is
 * done, and serves its front-end until that closes.
 */
#include "ufd_pass.h"
#include <fcntl.h>
#include <linux/userfaultfd.h>
#include <pthread.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/syscall.h>

#define PAGE 4096u
#define REGIONS 8u
#define NEED_REPLY 8u
#define REPLY 5u

enum { GET_FEATURES = 1, SET_MEM_TABLE = 5, SET_LOG_BASE = 6, GET_VRING_BASE = 11, GET_PROTOCOL_FEATURES = 15,
       GET_QUEUE_NUM = 17, ADVISE = 28, LISTEN = 29, END = 30 };

/* VERSION_1, PROTOCOL_FEATURES, LOG_ALL; LOG_SHMFD, REPLY_ACK, PAGEFAULT. */
static const uint64_t features = 1ull << 32 | 1ull << 30 | 1ull << 26, protocol = 1u << 1 | 1u << 3 | 1u << 8;

struct region {
    uint64_t guest, size, user, offset;
};

struct message {
    uint32_t request, flags, size;
    union {
        uint64_t u64;
        struct {
            uint32_t count, padding;
            struct region region[REGIONS];
        } table;
        unsigned char bytes[512];
    };
} __attribute__((packed));

static struct region table[REGIONS];
static unsigned regions;
static int files[REGIONS], ufd = -1, listening;
static uint64_t first, range, count;
static struct timespec gap;

static int open_ufd(void)
{
    int fd = (int)syscall(SYS_userfaultfd, O_CLOEXEC | O_NONBLOCK);
    struct uffdio_api api = {.api = UFFD_API};

    if (fd < 0) {
        int node = open("/dev/userfaultfd", O_RDWR | O_CLOEXEC);

        fd = node < 0 ? -1 : ioctl(node, USERFAULTFD_IOC_NEW, O_CLOEXEC | O_NONBLOCK);
    }
    if (fd < 0 || ioctl(fd, UFFDIO_API, &api))
        die("userfaultfd");
    return fd;
}

/* Where guest page n is here; NULL if it is in no region or has come already. */
static volatile uint64_t *missing(uint64_t n)
{
    uint64_t address = n * PAGE;

    for (unsigned i = 0; i < regions; i++)
        if (address >= table[i].guest && address - table[i].guest < table[i].size) {
            uint64_t in = address - table[i].guest;
            off_t at = (off_t)(table[i].offset + in);

            return lseek(files[i], at, SEEK_DATA) == at ? NULL : (volatile uint64_t *)(uintptr_t)(table[i].user + in);
        }
    return NULL;
}

static void *touch(void *nothing)
{
    uint64_t *order = calloc(range, sizeof *order), *sample = calloc(count, sizeof *sample);
    uint64_t seed = 88172645463325252u, done = 0, passed = 0, bad = 0;

    (void)nothing;
    if (!order || !sample)
        die("calloc");
    for (uint64_t i = 0; i < range; i++) {
        seed ^= seed << 13, seed ^= seed >> 7, seed ^= seed << 17;
        uint64_t j = seed % (i + 1);

        order[i] = order[j];
        order[j] = i;
    }
    prctl(PR_SET_TIMERSLACK, 1);
    for (uint64_t i = 0; i < range && done < count; i++) {
        uint64_t n = first + order[i];
        volatile uint64_t *page = missing(n);

        if (!page) {
            passed++;
            continue;
        }
        uint64_t t = now_ns(), word = *page;

        sample[done++] = now_ns() - t;
        bad += word != page_word(n);
        if (gap.tv_nsec)
            nanosleep(&gap, NULL);
    }
    printf("{\"touched\": %llu, \"passed\": %llu, \"bad\": %llu, ", (unsigned long long)done,
           (unsigned long long)passed, (unsigned long long)bad);
    print_percentiles(sample, done);
    puts("}");
    fflush(stdout);
    return NULL;
}

/* The table of the switch: mapped without access until the front-end can translate our addresses. */
static void map_table(struct message *m, const int *fds, unsigned n)
{
    if (m->table.count != n || n > REGIONS)
        die("a table whose descriptors do not fit");
    regions = n;
    for (unsigned i = 0; i < n; i++) {
        table[i] = m->table.region[i];
        void *at = mmap(NULL, table[i].size, PROT_NONE, MAP_SHARED | MAP_NORESERVE, fds[i], (off_t)table[i].offset);

        if (at == MAP_FAILED)
            die("mmap");
        files[i] = fds[i];
        table[i].user = (uintptr_t)at;
        m->table.region[i] = table[i];
    }
}

static void use_table(void)
{
    pthread_t thread;

    for (unsigned i = 0; i < regions; i++) {
        void *at = (void *)(uintptr_t)table[i].user;
        struct uffdio_register reg = {.range = {table[i].user, table[i].size}, .mode = UFFDIO_REGISTER_MODE_MISSING};

        madvise(at, table[i].size, MADV_NOHUGEPAGE);
        if (ioctl(ufd, UFFDIO_REGISTER, &reg) || mprotect(at, table[i].size, PROT_READ | PROT_WRITE))
            die("UFFDIO_REGISTER");
    }
    if (pthread_create(&thread, NULL, touch, NULL))
        die("pthread_create");
    pthread_detach(thread);
}

static void end_postcopy(void)
{
    for (unsigned i = 0; i < regions; i++) {
        struct uffdio_range all = {table[i].user, table[i].size};

        ioctl(ufd, UFFDIO_UNREGISTER, &all);
    }
}

static void reply(int conn, struct message *m, uint32_t size, int fd)
{
    union {
        char room[CMSG_SPACE(sizeof fd)];
        struct cmsghdr align;
    } control = {{0}};
    struct iovec iov = {m, 12 + size};
    struct msghdr msg = {.msg_iov = &iov, .msg_iovlen = 1};

    m->flags = REPLY;
    m->size = size;
    if (fd >= 0) {
        msg.msg_control = &control;
        msg.msg_controllen = sizeof control.room;
        struct cmsghdr *cmsg = CMSG_FIRSTHDR(&msg);

        cmsg->cmsg_level = SOL_SOCKET;
        cmsg->cmsg_type = SCM_RIGHTS;
        cmsg->cmsg_len = CMSG_LEN(sizeof fd);
        memcpy(CMSG_DATA(cmsg), &fd, sizeof fd);
    }
    if (sendmsg(conn, &msg, MSG_NOSIGNAL) != (ssize_t)(12 + size))
        die("sendmsg");
}

/* One message and its descriptors; how many came, -1 at the end. */
static int receive(int conn, struct message *m, int *fds)
{
    union {
        char room[CMSG_SPACE(REGIONS * sizeof(int))];
        struct cmsghdr align;
    } control;
    struct iovec iov = {m, 12};
    struct msghdr msg = {.msg_iov = &iov, .msg_iovlen = 1, .msg_control = &control, .msg_controllen = sizeof control.room};
    int n = 0;

    if (recvmsg(conn, &msg, MSG_CMSG_CLOEXEC | MSG_WAITALL) != 12)
        return -1;
    for (struct cmsghdr *c = CMSG_FIRSTHDR(&msg); c; c = CMSG_NXTHDR(&msg, c))
        if (c->cmsg_type == SCM_RIGHTS) {
            n = (int)((c->cmsg_len - CMSG_LEN(0)) / sizeof(int));
            memcpy(fds, CMSG_DATA(c), (size_t)n * sizeof(int));
        }
    if (m->size > sizeof m->bytes || (m->size && recv(conn, m->bytes, m->size, MSG_WAITALL) != (ssize_t)m->size))
        return -1;
    return n;
}

static void serve(int conn)
{
    struct message m;
    int fds[REGIONS], n;

    while ((n = receive(conn, &m, fds)) >= 0) {
        int kept = 0;

        switch (m.request) {
        case GET_FEATURES:
        case GET_PROTOCOL_FEATURES:
            m.u64 = m.request == GET_FEATURES ? features : protocol;
            reply(conn, &m, 8, -1);
            break;
        case GET_QUEUE_NUM:
            m.u64 = 1;
            reply(conn, &m, 8, -1);
            break;
        case GET_VRING_BASE:
        case SET_LOG_BASE:
            reply(conn, &m, m.size, -1);
            break;
        case ADVISE:
            ufd = open_ufd();
            reply(conn, &m, 0, ufd);
            break;
        case LISTEN:
        case END:
            listening = m.request == LISTEN;
            if (!listening)
                end_postcopy();
            m.u64 = 0;
            reply(conn, &m, 8, -1);
            break;
        case SET_MEM_TABLE:
            if (listening && m.size == 8) {
                use_table();
                break;
            }
            if (listening) {
                map_table(&m, fds, (unsigned)n);
                kept = 1;
                reply(conn, &m, m.size, -1);
                break;
            }
            /* fall through */
        default:
            if (m.flags & NEED_REPLY) {
                m.u64 = 0;
                reply(conn, &m, 8, -1);
            }
        }
        for (int i = 0; i < n && !kept; i++)
            close(fds[i]);
    }
}

int main(int argc, char **argv)
{
    if (argc != 6) {
        fprintf(stderr, "usage: vhost_touch SOCKET FIRST RANGE COUNT GAP_US\n");
        return 2;
    }
    start(-1);
    first = strtoull(argv[2], NULL, 0);
    range = strtoull(argv[3], NULL, 0);
    count = strtoull(argv[4], NULL, 0);
    gap.tv_nsec = atol(argv[5]) * 1000;

    struct sockaddr_un at = unix_address(argv[1]);
    int listener = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0), conn;

    if (listener < 0 || bind(listener, (struct sockaddr *)&at, sizeof at) || listen(listener, 1))
        die(argv[1]);
    puts("ready");
    fflush(stdout);
    conn = accept(listener, NULL, NULL);
    if (conn < 0)
        die("accept");
    serve(conn);
    return 0;
}
