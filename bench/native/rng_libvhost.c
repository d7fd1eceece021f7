/*
 * rng_libvhost SOCKET CPU
 *
 * D1's peer: an entropy device on QEMU's libvhost-user. Fills each buffer with random bytes. One front-end,
 * ends with it.
 */
#include "ufd_pass.h"

/* Known only to the bench, which builds it; a compiler that just looks for warnings does without. */
#if __has_include("libvhost-user.h")
#include <poll.h>
#include <sys/random.h>
#include <sys/uio.h>

#include "libvhost-user.h"

enum { WATCHES = 16 };

static struct {
    VuDev dev;
    struct pollfd fds[WATCHES];
    vu_watch_cb calls[WATCHES];
    void *data[WATCHES];
    int count, over;
} rng;

static void on_panic(VuDev *dev, const char *text)
{
    (void)dev;
    fprintf(stderr, "libvhost-user: %s\n", text);
    rng.over = 1;
}

static void remove_watch(VuDev *dev, int fd)
{
    (void)dev;
    for (int i = 0; i < rng.count; i++) {
        if (rng.fds[i].fd != fd)
            continue;
        rng.count--;
        rng.fds[i] = rng.fds[rng.count];
        rng.calls[i] = rng.calls[rng.count];
        rng.data[i] = rng.data[rng.count];
        return;
    }
}

static void set_watch(VuDev *dev, int fd, int condition, vu_watch_cb call, void *data)
{
    (void)condition;
    remove_watch(dev, fd); /* a later watch takes the place of an earlier one */
    if (rng.count == WATCHES)
        exit(1);
    rng.fds[rng.count] = (struct pollfd){.fd = fd, .events = POLLIN};
    rng.calls[rng.count] = call;
    rng.data[rng.count++] = data;
}

static void handle(VuDev *dev, int index)
{
    VuVirtq *vq = vu_get_queue(dev, index);
    VuVirtqElement *elem;

    while ((elem = vu_queue_pop(dev, vq, sizeof *elem))) {
        size_t length = 0;

        for (unsigned i = 0; i < elem->in_num; i++) {
            ssize_t n = getrandom(elem->in_sg[i].iov_base, elem->in_sg[i].iov_len, 0);

            if (n > 0)
                length += (size_t)n;
        }
        vu_queue_push(dev, vq, elem, (unsigned)length);
        vu_queue_notify(dev, vq);
        free(elem);
    }
}

static uint64_t get_features(VuDev *dev)
{
    (void)dev;
    return 1ull << 32; /* VERSION_1 */
}

static void set_features(VuDev *dev, uint64_t features)
{
    (void)dev;
    (void)features;
}

static void queue_set_started(VuDev *dev, int index, bool started)
{
    vu_set_queue_handler(dev, vu_get_queue(dev, index), started ? handle : NULL);
}

int main(int argc, char **argv)
{
    static const VuDevIface iface = {
        .get_features = get_features, .set_features = set_features, .queue_set_started = queue_set_started};

    if (argc != 3) {
        fprintf(stderr, "usage: rng_libvhost SOCKET CPU\n");
        return 2;
    }
    start(atoi(argv[2]));

    struct sockaddr_un at = unix_address(argv[1]);
    int listener = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);

    if (listener < 0 || bind(listener, (struct sockaddr *)&at, sizeof at) || listen(listener, 1))
        die(argv[1]);
    int conn = accept(listener, NULL, NULL);

    if (!vu_init(&rng.dev, 1, conn, on_panic, NULL, set_watch, remove_watch, &iface))
        return 1;
    while (!rng.over) {
        struct pollfd fds[WATCHES + 1];
        int count = rng.count;

        memcpy(fds, rng.fds, sizeof rng.fds[0] * (size_t)count);
        fds[count] = (struct pollfd){.fd = conn, .events = POLLIN};
        if (poll(fds, (nfds_t)count + 1, -1) < 0)
            die("poll");
        if (fds[count].revents && !vu_dispatch(&rng.dev))
            break;
        for (int i = 0; i < count; i++)
            for (int k = 0; fds[i].revents && k < rng.count; k++)
                if (rng.fds[k].fd == fds[i].fd)
                    rng.calls[k](&rng.dev, VU_WATCH_IN, rng.data[k]);
    }
    return 0;
}

#else

int main(void)
{
    fprintf(stderr, "rng_libvhost was built without libvhost-user\n");
    return 3;
}

#endif
