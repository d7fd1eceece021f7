/* Guest to file descriptor. Frames are copied to a private arena first, so that the kernel never touches guest
 * memory for us, a guest cannot change a frame that it has sent, and no frame goes out before `lost` was checked. */
#define _GNU_SOURCE
#include <netinet/in.h>
#include <netinet/udp.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/sysmacros.h>
#include <unistd.h>
#include "virtio/pump_internal.h"

#ifndef UDP_SEGMENT
#define UDP_SEGMENT 103
#endif
#define GSO_SEGS 64
#define GSO_BYTES 65507u

struct frame {
    uint32_t at, len; /* in the arena; len 0: nothing to send */
    uint16_t head;
};

/* Walk the next chain, behind n others of this batch, and make all of it resident that sending and pushing need. Only
 * the first may wait for its pages: one that is absent delays none before it. Those of the chains behind it are
 * requested meanwhile. *len: of its frame, which lies behind `used` bytes of the arena; -ENOSPC: it does not fit. */
static int prepare(struct vpc_pump *p, const struct vpc_pump_config *c, uint32_t n, uint32_t used, uint32_t *len)
{
    struct vpc_vq *vq = p->vq;
    struct vpc_walk *w = &p->walk;
    int flags = n ? VPC_TRY | VPC_REQUEST_NOTHING : 0;
    int rc = vpc_vq_touch_used(vq, n + 1, flags, &vq->stop);

    if (!rc)
        rc = vpc_vq_walk(vq, 0, w, flags);
    if (rc < 0)
        return rc;
    *len = w->readable > c->header ? (uint32_t)(w->readable - c->header) : 0;
    if (*len > VPC_MAX_FRAME && !c->discard)
        vpc_count(&p->dropped, 1); /* never cut short */
    if (*len > VPC_MAX_FRAME || c->discard)
        *len = 0;
    if (used + *len > VPC_OUT_ARENA)
        return -ENOSPC;
    if (!*len)
        return 0;
    rc = vpc_segs_touch(vq->gm, w->segs, 0, w->readable, VPC_TRY | VPC_REQUEST_NOTHING, &vq->stop);
    if (rc == -EAGAIN) {
        vpc_vq_request(vq, n ? 0 : 1, VPC_BATCH, false, c->header + VPC_MAX_FRAME, 0);
        if (!n)
            rc = vpc_segs_touch(vq->gm, w->segs, 0, w->readable, flags, &vq->stop);
    }
    return rc;
}

/* Take chains until the batch is full, the ring is empty, or an error (*rc). Everything that sending and pushing need
 * is resident afterwards. */
static uint32_t collect(struct vpc_pump *p, const struct vpc_pump_config *c, struct frame *frames, uint32_t max,
                        int *rc)
{
    struct vpc_vq *vq = p->vq;
    struct vpc_walk *w = &p->walk;
    uint32_t n = 0, used = 0;

    *rc = vpc_vq_ready(vq, 0);
    if (*rc < 0)
        return 0;
    vpc_vq_disable_notify(vq);
    while (n < max) {
        uint32_t len;

        *rc = vpc_vq_available(vq);
        if (*rc <= 0)
            break;
        *rc = prepare(p, c, n, used, &len);
        if (*rc < 0)
            break;
        if (len)
            (void)vpc_segs_read(vq->gm, w->segs, w->readable_segs, c->header, p->arena + used, len);
        frames[n++] = (struct frame){.at = used, .len = len, .head = w->head};
        used += len;
        vpc_vq_take(vq, w->head);
    }
    return n;
}

struct out_batch {
    struct mmsghdr msgs[VPC_BATCH];
    struct iovec iov[VPC_BATCH];
    uint32_t first[VPC_BATCH + 1]; /* index of a message's first frame */
    union {
        char buf[CMSG_SPACE(sizeof(uint16_t))];
        struct cmsghdr align;
    } control[VPC_BATCH];
};

/* Join frames to messages: runs of equal length (the last may be shorter) go as one with UDP_SEGMENT. */
static uint32_t build(struct vpc_pump *p, const struct vpc_pump_config *c, const struct frame *frames, uint32_t n,
                      struct out_batch *b)
{
    uint32_t m = 0;
    bool gso = c->addr_len && !p->no_gso; /* an address means UDP here */

    for (uint32_t i = 0; i < n;) {
        uint32_t size = frames[i].len, total = size, k = i + 1;

        if (!size) {
            i++;
            continue;
        }
        while (gso && k < n && k - i < GSO_SEGS && frames[k].len && frames[k].len <= size &&
               total + frames[k].len <= GSO_BYTES) {
            total += frames[k].len;
            if (frames[k++].len < size)
                break;
        }
        struct msghdr *h = &b->msgs[m].msg_hdr;
        memset(h, 0, sizeof(*h));
        b->iov[m] = (struct iovec){.iov_base = p->arena + frames[i].at, .iov_len = total};
        h->msg_iov = &b->iov[m];
        h->msg_iovlen = 1;
        if (c->addr_len) {
            h->msg_name = (void *)(uintptr_t)c->addr;
            h->msg_namelen = c->addr_len;
        }
        if (k - i > 1) {
            uint16_t segment = (uint16_t)size;
            h->msg_control = b->control[m].buf;
            h->msg_controllen = sizeof(b->control[m].buf);
            struct cmsghdr *cm = CMSG_FIRSTHDR(h);
            cm->cmsg_level = SOL_UDP;
            cm->cmsg_type = UDP_SEGMENT;
            cm->cmsg_len = CMSG_LEN(sizeof(segment));
            memcpy(CMSG_DATA(cm), &segment, sizeof(segment));
        }
        b->first[m++] = i;
        i = k;
    }
    b->first[m] = n;
    return m;
}

static void count_sent(struct vpc_pump *p, const struct frame *frames, uint32_t from, uint32_t to)
{
    uint64_t bytes = 0, count = 0;

    for (uint32_t i = from; i < to; i++) {
        bytes += frames[i].len;
        count += frames[i].len != 0;
    }
    vpc_count(&p->frames, count);
    vpc_count(&p->bytes, bytes);
}

static int send_socket(struct vpc_pump *p, const struct vpc_pump_config *c, const struct frame *frames, uint32_t n)
{
    struct out_batch b;
    uint32_t m = build(p, c, frames, n, &b), done = 0;

    while (done < m) {
        int sent = sendmmsg(c->fd, b.msgs + done, m - done, MSG_DONTWAIT | MSG_NOSIGNAL);
        vpc_count(&p->syscalls, 1);
        if (sent > 0) {
            count_sent(p, frames, b.first[done], b.first[done + (uint32_t)sent]);
            done += (uint32_t)sent;
            continue;
        }
        if (errno == EINTR)
            continue;
        if (b.msgs[done].msg_hdr.msg_controllen &&
            (errno == EINVAL || errno == EMSGSIZE || errno == EIO || errno == EOPNOTSUPP)) {
            /* The path cannot segment (a small MTU, a device without checksums): one by one from now on. */
            p->no_gso = true;
            uint32_t from = b.first[done];
            return send_socket(p, c, frames + from, n - from);
        }
        if (vpc_far_is_dead(errno))
            return -errno;
        /* Full, unreachable, refused: a network drops frames. */
        vpc_count(&p->dropped, b.first[done + 1] - b.first[done]);
        done++;
    }
    return 0;
}

static int send_file(struct vpc_pump *p, const struct vpc_pump_config *c, const struct frame *frames, uint32_t n)
{
    for (uint32_t i = 0; i < n; i++) {
        ssize_t w;

        if (!frames[i].len)
            continue;
        do
            w = write(c->fd, p->arena + frames[i].at, frames[i].len);
        while (w < 0 && errno == EINTR);
        vpc_count(&p->syscalls, 1);
        if (w >= 0)
            count_sent(p, frames, i, i + 1);
        else if (vpc_far_is_dead(errno) && errno != EINVAL) /* tap: EINVAL for a frame it does not like */
            return -errno;
        else
            vpc_count(&p->dropped, 1);
    }
    return 0;
}

/* Only read every byte, as a far side would. */
static int send_nowhere(struct vpc_pump *p, const struct frame *frames, uint32_t n)
{
    uint64_t seen = 0;

    for (uint32_t i = 0; i < n; i++) {
        const uint8_t *at = p->arena + frames[i].at;
        uint32_t left = frames[i].len;
        uint64_t word;

        for (; left >= sizeof(word); left -= (uint32_t)sizeof(word), at += sizeof(word)) {
            memcpy(&word, at, sizeof(word));
            seen ^= word;
        }
        while (left--)
            seen ^= *at++;
    }
    p->seen ^= seen;
    count_sent(p, frames, 0, n);
    return 0;
}

static bool is_null_device(int fd)
{
    struct stat st;

    return fstat(fd, &st) == 0 && S_ISCHR(st.st_mode) && st.st_rdev == makedev(1, 3);
}

int vpc_pump_out(struct vpc_pump *p, const struct vpc_pump_config *config)
{
    struct vpc_pump_config c = *config;
    struct vpc_vq *vq = p->vq;
    uint32_t max = c.max_batch && c.max_batch < VPC_BATCH ? c.max_batch : VPC_BATCH;

    if (c.kind == VPC_FAR_FILE && is_null_device(c.fd))
        c.kind = VPC_FAR_NONE; /* it accepts anything: a call for each frame would make no difference */

    while (!vpc_pump_stopped(p)) {
        struct frame frames[VPC_BATCH];
        int rc, far = 0;
        uint32_t n = collect(p, &c, frames, max, &rc);

        if (n) {
            if (vpc_gm_lost(vq->gm)) /* the chains stay taken: nobody reads the index, an inflight region keeps them */
                return -EOWNERDEAD;
            if (c.discard)
                vpc_count(&p->discarded, n);
            else if (c.kind == VPC_FAR_SOCKET)
                far = send_socket(p, &c, frames, n);
            else if (c.kind == VPC_FAR_NONE)
                far = send_nowhere(p, frames, n);
            else
                far = send_file(p, &c, frames, n);
            for (uint32_t i = 0; i < n; i++)
                vpc_vq_put_used(vq, (uint16_t)i, frames[i].head, 0);
            rc = vpc_vq_publish(vq, (uint16_t)n);
            if (rc < 0)
                return rc;
            vpc_count(&p->calls, (uint64_t)rc);
            vpc_count(&p->batches, 1);
            if (far < 0)
                return far;
            continue; /* the next call meets an error behind the batch again */
        }
        if (rc >= 0)
            rc = vpc_pump_idle(p, c.kick_fd, -1);
        if (rc == -ECANCELED)
            return 0;
        if (rc < 0)
            return rc;
    }
    return 0;
}
