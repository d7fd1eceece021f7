/* Frames that name themselves: built, checked and recorded in private memory; and the far side of a bridge. */
#define _GNU_SOURCE
#include "event_internal.h"
#include "frontend/frame_internal.h"

#include <errno.h>
#include <fcntl.h>
#include <netinet/in.h>
#include <poll.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

#define MAGIC 0x76686f73u
#define HEAD 14u /* Ethernet */
#define FRAME_MAX 65536u
#define BURST 64

struct head {
    uint32_t magic, stream;
    uint64_t number;
    uint32_t length, crc;
};

int vpc_frames_init(struct vpc_frames *f)
{
    memset(f, 0, sizeof *f);
    pthread_mutex_init(&f->lock, NULL);
    for (uint32_t i = 0; i < 256; i++) {
        uint32_t c = i;
        for (int bit = 0; bit < 8; bit++)
            c = c & 1 ? 0xedb88320u ^ (c >> 1) : c >> 1;
        f->crc[i] = c;
    }
    f->room = 1 << 16;
    f->seen = calloc(f->room / 64, sizeof *f->seen);
    return f->seen ? 0 : -ENOMEM;
}

void vpc_frames_free(struct vpc_frames *f)
{
    free(f->seen);
    pthread_mutex_destroy(&f->lock);
}

static uint32_t crc_of(const struct vpc_frames *f, const unsigned char *p, size_t length)
{
    uint32_t c = 0xffffffffu;

    while (length--)
        c = f->crc[(c ^ *p++) & 255] ^ (c >> 8);
    return ~c;
}

void vpc_frame_build(const struct vpc_frames *f, unsigned char *to, uint32_t length, uint32_t stream, uint64_t number)
{
    static const unsigned char ethernet[HEAD] = {0xff, 0xff, 0xff, 0xff, 0xff, 0xff, /* to everybody */
                                                 0x02, 0x76, 0x68, 0x70, 0x63, 0x00, /* local address */
                                                 0x88, 0xb5};                        /* local experiment */
    struct head h = {.magic = MAGIC, .stream = stream, .number = number, .length = length};
    uint64_t x = number * 0x9e3779b97f4a7c15u + stream;

    memcpy(to, ethernet, HEAD);
    for (uint32_t at = HEAD + (uint32_t)sizeof h; at < length; at += 8) {
        x = (x ^ (x >> 29)) * 0xbf58476d1ce4e5b9u;
        memcpy(to + at, &x, length - at < 8 ? length - at : 8);
    }
    memcpy(to + HEAD, &h, sizeof h);
    h.crc = crc_of(f, to, length); /* over the frame with a crc of 0 */
    memcpy(to + HEAD, &h, sizeof h);
}

static int book(struct vpc_frames *f, uint64_t number)
{
    if (number >= f->room) {
        uint64_t room = f->room;
        while (room <= number)
            room *= 2;
        uint64_t *seen = realloc(f->seen, room / 8);
        if (!seen)
            return 0;
        memset((unsigned char *)seen + f->room / 8, 0, (room - f->room) / 8);
        f->seen = seen;
        f->room = room;
    }
    uint64_t mask = (uint64_t)1 << (number & 63);
    if (f->seen[number >> 6] & mask) {
        f->stats.duplicates++;
        return 1;
    }
    f->seen[number >> 6] |= mask;
    f->stats.frames++;
    if (number < f->stats.next)
        f->stats.reordered++;
    else
        f->stats.next = number + 1;
    return 1;
}

int vpc_frame_take(struct vpc_frames *f, const unsigned char *from, size_t length)
{
    struct head h;
    unsigned char zero[4] = {0};
    int good = 0;

    if (length < VPC_FRAME_MIN || length > FRAME_MAX)
        goto counted;
    memcpy(&h, from + HEAD, sizeof h);
    if (h.magic != MAGIC || h.length != length || h.number >= VPC_FRAME_NUMBERS)
        goto counted;
    /* The CRC without its own four bytes, which counted as zeros. */
    uint32_t c = 0xffffffffu;
    size_t at = HEAD + offsetof(struct head, crc);
    for (size_t i = 0; i < length; i++) {
        unsigned char byte = i >= at && i < at + sizeof zero ? 0 : from[i];
        c = f->crc[(c ^ byte) & 255] ^ (c >> 8);
    }
    good = ~c == h.crc;
counted:
    pthread_mutex_lock(&f->lock);
    good = good && book(f, h.number);
    if (good)
        f->stats.bytes += length;
    else
        f->stats.bad++;
    pthread_mutex_unlock(&f->lock);
    return good;
}

/* ---- the far side */

struct vpc_far {
    int fd, control, echo;
    _Atomic int stop;
    struct vpc_frames frames;
    uint64_t echoed;
    unsigned char *room; /* BURST frames */
};

void vpc_far_free(struct vpc_far *f)
{
    if (!f)
        return;
    if (f->fd >= 0)
        close(f->fd);
    if (f->control >= 0)
        close(f->control);
    vpc_frames_free(&f->frames);
    free(f->room);
    free(f);
}

int vpc_far_new(int fd, int echo, struct vpc_far **out)
{
    struct vpc_far *f = calloc(1, sizeof *f);
    int rc;

    if (!f)
        return -ENOMEM;
    f->echo = echo;
    f->control = -1;
    if ((f->fd = fcntl(fd, F_DUPFD_CLOEXEC, 0)) < 0 || (f->control = event_new()) < 0)
        rc = -errno;
    else
        rc = vpc_frames_init(&f->frames);
    f->room = malloc((size_t)BURST * FRAME_MAX);
    if (rc == 0 && !f->room)
        rc = -ENOMEM;
    if (rc < 0) {
        vpc_far_free(f);
        return rc;
    }
    *out = f;
    return 0;
}

void vpc_far_stop(struct vpc_far *f)
{
    atomic_store(&f->stop, 1);
    event_poke(f->control);
}

int vpc_far_run(struct vpc_far *f)
{
    struct mmsghdr in[BURST], out[BURST];
    struct iovec iov[BURST];
    struct sockaddr_storage from[BURST];
    int rc = 0;

    while (!atomic_load(&f->stop)) {
        struct pollfd fds[2] = {{.fd = f->fd, .events = POLLIN}, {.fd = f->control, .events = POLLIN}};
        if (poll(fds, 2, -1) < 0 && errno != EINTR) {
            rc = -errno;
            break;
        }
        memset(in, 0, sizeof in);
        for (size_t i = 0; i < BURST; i++) {
            iov[i] = (struct iovec){f->room + i * FRAME_MAX, FRAME_MAX};
            in[i].msg_hdr = (struct msghdr){
                .msg_name = &from[i], .msg_namelen = sizeof from[i], .msg_iov = &iov[i], .msg_iovlen = 1};
        }
        int n = recvmmsg(f->fd, in, BURST, MSG_DONTWAIT, NULL);
        unsigned whole = 0;
        for (int i = 0; i < n; i++) {
            if (!vpc_frame_take(&f->frames, iov[i].iov_base, in[i].msg_len) || !f->echo)
                continue;
            iov[i].iov_len = in[i].msg_len;
            out[whole] = in[i];
            out[whole++].msg_len = 0;
        }
        /* A full socket loses the rest: this is a network. */
        int sent = whole ? sendmmsg(f->fd, out, whole, MSG_DONTWAIT) : 0;
        if (sent > 0)
            f->echoed += (uint64_t)sent;
    }
    event_drain(f->control);
    atomic_store(&f->stop, 0);
    return rc;
}

int vpc_far_stats(struct vpc_far *f, struct vpc_frame_stats *out, uint64_t *echoed)
{
    pthread_mutex_lock(&f->frames.lock);
    *out = f->frames.stats;
    pthread_mutex_unlock(&f->frames.lock);
    *echoed = f->echoed;
    return 0;
}
