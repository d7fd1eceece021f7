/*
 * udp_sink HOST:PORT CPU
 *
 * Counts datagrams where they arrive. Prints "ready"; then, for each line on stdin, "show" prints the
 * counts as JSON and "zero" sets them to zero and prints "ok"; "blast TO:PORT SIZE SECONDS RATE JOINED" sends
 * from the same socket (vhost-user-bridge answers the last sender) and prints what it sent. Ends at end of file.
 * One thread drains the socket by recvmmsg; "dropped" is what the kernel dropped for lack of space. Datagrams that
 * were sent joined (UDP_SEGMENT) are taken joined (UDP_GRO) and counted one by one: else the receiver, on the same
 * core as the sender, would be what is measured.
 */
#include "blast.h"
#include <linux/sock_diag.h>
#include <netinet/udp.h>
#include <pthread.h>

#ifndef SO_MEMINFO
#define SO_MEMINFO 55
#endif
#ifndef UDP_GRO
#define UDP_GRO 104
#endif

enum { BATCH = 256, ROOM = 2048, RCVBUF = 64 << 20 };

static struct {
    int fd;
    _Atomic uint64_t frames, bytes, calls, last_ns;
} sink;

/* Datagrams in one message: all but the last have the length that the kernel says, if it says one. */
static uint64_t datagrams(struct mmsghdr *m)
{
    for (struct cmsghdr *c = CMSG_FIRSTHDR(&m->msg_hdr); c; c = CMSG_NXTHDR(&m->msg_hdr, c))
        if (c->cmsg_level == SOL_UDP && c->cmsg_type == UDP_GRO) {
            int each;

            memcpy(&each, CMSG_DATA(c), sizeof each);
            if (each > 0)
                return (m->msg_len + (unsigned)each - 1) / (unsigned)each;
        }
    return 1;
}

static void *drain(void *unused)
{
    static char control[BATCH][CMSG_SPACE(sizeof(int))];
    static char data[BATCH][ROOM];
    static struct mmsghdr msg[BATCH];
    static struct iovec iov[BATCH];

    (void)unused;
    for (int i = 0; i < BATCH; i++) {
        iov[i] = (struct iovec){data[i], ROOM};
        msg[i].msg_hdr = (struct msghdr){.msg_iov = &iov[i], .msg_iovlen = 1};
    }
    for (;;) {
        uint64_t bytes = 0, frames = 0;

        for (int i = 0; i < BATCH; i++) {
            msg[i].msg_hdr.msg_control = control[i];
            msg[i].msg_hdr.msg_controllen = sizeof control[i];
        }
        int n = recvmmsg(sink.fd, msg, BATCH, MSG_WAITFORONE | MSG_TRUNC, NULL);

        if (n < 0) {
            if (errno == EINTR)
                continue;
            die("recvmmsg");
        }
        for (int i = 0; i < n; i++) {
            bytes += msg[i].msg_len;
            frames += datagrams(&msg[i]);
        }
        sink.bytes += bytes;
        sink.frames += frames;
        sink.calls++;
        sink.last_ns = now_ns();
    }
    return NULL;
}

static uint64_t kernel_drops(void)
{
    uint32_t info[SK_MEMINFO_VARS] = {0};
    socklen_t size = sizeof info;

    if (getsockopt(sink.fd, SOL_SOCKET, SO_MEMINFO, info, &size))
        die("SO_MEMINFO");
    return info[SK_MEMINFO_DROPS];
}

int main(int argc, char **argv)
{
    pthread_t thread;
    char line[128];
    uint64_t dropped = 0, frames = 0, bytes = 0, calls = 0;

    if (argc != 3) {
        fprintf(stderr, "usage: udp_sink HOST:PORT CPU\n");
        return 2;
    }
    start(atoi(argv[2]));
    sink.fd = udp_socket(argv[1], RCVBUF);
    int on = 1;
    if (setsockopt(sink.fd, SOL_UDP, UDP_GRO, &on, sizeof on))
        die("UDP_GRO");
    if (pthread_create(&thread, NULL, drain, NULL))
        die("pthread_create");
    prctl(PR_SET_TIMERSLACK, 1);
    puts("ready");
    fflush(stdout);
    while (fgets(line, sizeof line, stdin)) {
        if (!strcmp(line, "zero\n")) {
            /* The draining thread is the only writer of its counts: remember where they stood. */
            frames = sink.frames;
            bytes = sink.bytes;
            calls = sink.calls;
            dropped = kernel_drops();
            puts("ok");
        } else if (!strncmp(line, "blast ", 6)) {
            char to[32];
            unsigned size;
            double seconds, rate;
            int joined;

            if (sscanf(line, "blast %31s %u %lf %lf %d", to, &size, &seconds, &rate, &joined) != 5)
                return 2;
            blast(sink.fd, address(to), size, seconds, rate, joined);
        } else {
            printf("{\"now_ns\": %llu, \"last_ns\": %llu, \"frames\": %llu, \"bytes\": %llu, \"calls\": %llu, "
                   "\"dropped\": %llu}\n",
                   (unsigned long long)now_ns(), (unsigned long long)sink.last_ns,
                   (unsigned long long)(sink.frames - frames), (unsigned long long)(sink.bytes - bytes),
                   (unsigned long long)(sink.calls - calls), (unsigned long long)(kernel_drops() - dropped));
        }
        fflush(stdout);
    }
    return 0;
}
