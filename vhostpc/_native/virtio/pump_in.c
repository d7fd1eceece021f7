/* File descriptor to guest. Frames are received into private slots and stay there until the guest has room:
 * a frame that was read is not lost because a page is absent or the ring is reconfigured. */
#define _GNU_SOURCE
#include <netinet/in.h>
#include <netinet/udp.h>
#include <string.h>
#include <unistd.h>
#include "virtio/pump_internal.h"

#ifndef UDP_GRO
#define UDP_GRO 104
#endif

/* How long a frame waits that is larger than all buffers which the guest has posted. It delays those behind it. */
#define SHORT_NS 1000000000u
#define DRAIN_LIMIT 100000u /* frames: a sender that never pauses must not keep the ring from starting */

static uint8_t *slot(struct vpc_pump *p, uint32_t i)
{
    return p->slots + (size_t)i * (VPC_MAX_FRAME + 1);
}

/* The frame at p->at of the first slot. */
static uint32_t frame_len(const struct vpc_pump *p)
{
    uint32_t left = p->slot_len[p->first] - p->at;

    return left < p->slot_seg[p->first] ? left : p->slot_seg[p->first];
}

static void next_frame(struct vpc_pump *p)
{
    p->short_since = 0;
    p->at += frame_len(p);
    if (p->at >= p->slot_len[p->first]) {
        p->first++;
        p->at = 0;
    }
}

static uint64_t frames_left(const struct vpc_pump *p)
{
    uint64_t n = 0;

    for (uint32_t i = p->first; i < p->count; i++) {
        uint32_t left = p->slot_len[i] - (i == p->first ? p->at : 0);
        n += p->slot_seg[i] ? (left + p->slot_seg[i] - 1) / p->slot_seg[i] : 1;
    }
    return n;
}

static bool joins_datagrams(int fd)
{
    int on = 0;
    socklen_t size = sizeof(on);

    return getsockopt(fd, SOL_UDP, UDP_GRO, &on, &size) == 0 && on;
}

/* The kernel's report of how it joined datagrams; without one there is one datagram. */
static uint32_t segment_len(struct msghdr *h, uint32_t len)
{
    for (struct cmsghdr *cm = CMSG_FIRSTHDR(h); cm; cm = CMSG_NXTHDR(h, cm)) {
        int size;

        if (cm->cmsg_level != SOL_UDP || cm->cmsg_type != UDP_GRO || cm->cmsg_len < CMSG_LEN(sizeof(size)))
            continue;
        memcpy(&size, CMSG_DATA(cm), sizeof(size));
        if (size > 0 && (uint32_t)size < len)
            return (uint32_t)size;
    }
    return len;
}

/* Receive up to max messages into the slots. Count, 0 for none now, -errno when the far side is dead. */
static int receive(struct vpc_pump *p, const struct vpc_pump_config *c, uint32_t max)
{
    p->first = p->count = p->at = 0;
    if (c->kind == VPC_FAR_SOCKET) {
        struct mmsghdr msgs[VPC_BATCH];
        struct iovec iov[VPC_BATCH];
        union {
            char buf[CMSG_SPACE(sizeof(int))];
            struct cmsghdr align;
        } control[VPC_BATCH];
        int n;

        for (uint32_t i = 0; i < max; i++) {
            iov[i] = (struct iovec){.iov_base = slot(p, i), .iov_len = VPC_MAX_FRAME};
            memset(&msgs[i].msg_hdr, 0, sizeof(msgs[i].msg_hdr));
            msgs[i].msg_hdr.msg_iov = &iov[i];
            msgs[i].msg_hdr.msg_iovlen = 1;
            if (p->gro) { /* elsewhere it would only be room for descriptors that nobody requested */
                msgs[i].msg_hdr.msg_control = control[i].buf;
                msgs[i].msg_hdr.msg_controllen = sizeof(control[i].buf);
            }
        }
        vpc_count(&p->syscalls, 1);
        n = recvmmsg(c->fd, msgs, max, MSG_DONTWAIT, NULL);
        if (n < 0)
            return vpc_far_is_dead(errno) ? -errno : 0;
        for (int i = 0; i < n; i++) {
            p->slot_len[i] = msgs[i].msg_len;
            p->slot_seg[i] = segment_len(&msgs[i].msg_hdr, msgs[i].msg_len);
        }
        p->count = (uint32_t)n;
        return n;
    }
    while (p->count < max) {
        ssize_t n = read(c->fd, slot(p, p->count), VPC_MAX_FRAME);
        vpc_count(&p->syscalls, 1);
        if (n < 0 && errno == EINTR)
            continue;
        if (n < 0 && (vpc_far_is_dead(errno) || errno == EIO))
            return -errno;
        if (n == 0 && p->count == 0)
            return -EPIPE;
        if (n <= 0)
            break;
        p->slot_len[p->count] = p->slot_seg[p->count] = (uint32_t)n;
        p->count++;
    }
    return (int)p->count;
}

/* The first frame lacks buffers, with so many chains there: has it lacked them for long? Where there is none at all the
 * guest has no room for any frame, and all wait. Not while it has not even seen what is ready for it. */
static bool waited_enough(struct vpc_pump *p, uint32_t chains, uint32_t ready)
{
    if (!chains || ready) {
        p->short_since = 0;
        return false;
    }
    uint64_t now = vpc_pump_now();
    if (!p->short_since)
        p->short_since = now;
    return now - p->short_since >= SHORT_NS;
}

/* In ms, for poll. */
static int patience(const struct vpc_pump *p)
{
    uint64_t waited = p->short_since ? vpc_pump_now() - p->short_since : 0;

    if (!p->short_since)
        return -1;
    return waited < SHORT_NS ? (int)((SHORT_NS - waited) / 1000000u + 1) : 0;
}

void vpc_pump_drop(struct vpc_pump *p)
{
    if (p->short_since) {
        vpc_count(&p->dropped, 1);
        next_frame(p);
    }
}

/* A page of the next buffers is absent: ask for those that the frames here will need, each as much as the first. */
static void request_buffers(struct vpc_pump *p, const struct vpc_pump_config *c, uint32_t ready)
{
    uint64_t frames = frames_left(p);

    uint32_t first = ready ? 0 : 1; /* it is waited for, unless there are others to publish before that */

    if (c->mergeable || frames > VPC_BATCH)
        frames = VPC_BATCH;
    vpc_vq_request(p->vq, first, (uint32_t)frames - first, true, c->header + frame_len(p), 0);
}

/* Put the next frame into the guest, `ready` used entries being written already and not published.
 * Returns the used entries it took; 0: no buffers now, or too few; -EAGAIN: publish the ready entries, then call again;
 * -EMSGSIZE: it fits nowhere, or has waited long enough for more buffers. */
static int deliver(struct vpc_pump *p, const struct vpc_pump_config *c, uint32_t ready)
{
    struct vpc_vq *vq = p->vq;
    struct vpc_walk *w = &p->walk;
    const uint8_t *data = slot(p, p->first) + p->at;
    uint32_t len = frame_len(p), need = c->header + len, segs = 0, chains = 0;
    uint64_t room = 0;
    uint32_t end[VPC_BATCH];
    uint64_t cap[VPC_BATCH];
    uint16_t head[VPC_BATCH];
    int flags = ready ? VPC_TRY | VPC_REQUEST_NOTHING : 0, rc;

    while (room < need) {
        rc = vpc_vq_available(vq);
        if (rc < 0)
            return rc;
        if ((uint32_t)rc <= chains) {
            rc = vpc_vq_refresh(vq);
            if (rc < 0)
                return rc;
            if ((uint32_t)rc <= chains) /* the whole ring is available and too small: there will never be more */
                return chains == vq->num || waited_enough(p, chains, ready) ? -EMSGSIZE : 0;
        }
        if (chains && !c->mergeable)
            return -EMSGSIZE;
        if (chains == VPC_BATCH)
            return -EMSGSIZE;
        rc = vpc_vq_walk(vq, (uint16_t)chains, w, flags);
        if (rc < 0)
            return rc;
        if (w->writable < c->header || w->writable == 0)
            return vpc_vq_break(vq, "a receive buffer has no room for the header");
        if (segs + w->n - w->readable_segs > VPC_IN_SEGS)
            return -EMSGSIZE;
        memcpy(p->segs + segs, w->segs + w->readable_segs, (w->n - w->readable_segs) * sizeof(*p->segs));
        segs += w->n - w->readable_segs;
        end[chains] = segs;
        cap[chains] = w->writable;
        head[chains] = w->head;
        room += w->writable;
        chains++;
    }
    /* All pages to be written are made resident before the first byte is written. */
    uint64_t left = need;
    for (uint32_t i = 0; i < segs && left; i++) {
        uint64_t take = p->segs[i].len < left ? p->segs[i].len : left;
        rc = vpc_gm_touch(vq->gm, p->segs[i].gpa, take, VPC_TRY | VPC_REQUEST_NOTHING, &vq->stop);
        if (rc == -EAGAIN) {
            request_buffers(p, c, ready);
            if (!ready)
                rc = vpc_gm_touch(vq->gm, p->segs[i].gpa, take, flags, &vq->stop);
        }
        if (rc < 0)
            return rc;
        left -= take;
    }
    rc = vpc_vq_touch_used(vq, ready + chains, flags, &vq->stop);
    if (rc < 0)
        return rc;
    if (vpc_gm_lost(vq->gm))
        return -EOWNERDEAD;

    uint8_t header[64] = {0};
    uint32_t from = 0, header_left = c->header;
    if (c->header >= 12) {
        header[c->header - 2] = (uint8_t)chains;
        header[c->header - 1] = (uint8_t)(chains >> 8);
    }
    left = len;
    for (uint32_t i = 0; i < chains; i++) {
        uint64_t take = cap[i] - header_left < left ? cap[i] - header_left : left;
        if (header_left)
            (void)vpc_segs_write(vq->gm, p->segs + from, end[i] - from, 0, header, header_left, vq->log);
        (void)vpc_segs_write(vq->gm, p->segs + from, end[i] - from, header_left, data, take, vq->log);
        vpc_vq_take(vq, head[i]);
        vpc_vq_put_used(vq, (uint16_t)(ready + i), head[i], (uint32_t)(take + header_left));
        data += take;
        left -= take;
        header_left = 0;
        from = end[i];
    }
    vpc_count(&p->frames, 1);
    vpc_count(&p->bytes, len);
    return (int)chains;
}

/* 0, or -EOWNERDEAD. */
static int publish(struct vpc_pump *p, uint32_t n)
{
    int rc = n ? vpc_vq_publish(p->vq, (uint16_t)n) : 0;

    if (rc > 0)
        vpc_count(&p->calls, 1);
    return rc < 0 ? rc : 0;
}

/* Deliver pending frames and publish. 1: all gone, 0: the guest has no room, -errno. */
static int deliver_all(struct vpc_pump *p, const struct vpc_pump_config *c)
{
    struct vpc_vq *vq = p->vq;
    uint32_t ready = 0;
    int rc = 1, told;

    while (p->first < p->count) {
        if (p->slot_len[p->first] == 0) {
            p->first++;
            continue;
        }
        rc = deliver(p, c, ready);
        if (rc > 0) {
            ready += (uint32_t)rc;
            next_frame(p);
            if (ready < vq->num / 2 + 1)
                continue;
        } else if (rc == -EMSGSIZE) {
            vpc_count(&p->dropped, 1); /* never cut short */
            next_frame(p);
            rc = 1;
            continue;
        }
        if (ready) {
            told = publish(p, ready);
            if (told < 0)
                return told;
            ready = 0;
            if (rc == 0) { /* examined again with nothing ready: it may lack buffers from now on */
                rc = 1;
                continue;
            }
        }
        if (rc <= 0 && rc != -EAGAIN)
            return rc;
        rc = 1;
    }
    told = publish(p, ready);
    if (told < 0)
        return told;
    vpc_count(&p->batches, 1);
    return 1;
}

int vpc_pump_in(struct vpc_pump *p, const struct vpc_pump_config *config)
{
    const struct vpc_pump_config c = *config;
    struct vpc_vq *vq = p->vq;
    uint32_t max = c.max_batch && c.max_batch < VPC_BATCH ? c.max_batch : VPC_BATCH;
    bool emptied = false; /* the last receive got less than it could: another would get nothing */
    int rc;

    if (c.header > 64)
        return -EINVAL;
    p->gro = c.kind == VPC_FAR_SOCKET && joins_datagrams(c.fd);
    if (c.discard) {
        /* Frames from while the guest was not running belong to nobody: they may have been delivered elsewhere. */
        uint64_t gone = frames_left(p);
        while (gone < DRAIN_LIMIT && !vpc_pump_stopped(p) && receive(p, &c, VPC_BATCH) > 0)
            gone += frames_left(p);
        p->first = p->count = p->at = 0;
        p->short_since = 0;
        vpc_count(&p->discarded, gone);
    }
    while (!vpc_pump_stopped(p)) {
        rc = vpc_vq_ready(vq, 0);
        if (rc == -ECANCELED)
            return 0;
        if (rc < 0)
            return rc;
        vpc_vq_disable_notify(vq);
        if (p->first == p->count) {
            rc = vpc_vq_available(vq);
            if (rc > 0) {
                rc = emptied ? 0 : receive(p, &c, max);
                if (rc < 0)
                    return rc;
                emptied = rc > 0 && (uint32_t)rc < max;
                if (rc == 0) {
                    rc = vpc_pump_wait(p, c.fd, -1, -1);
                    if (rc <= 0)
                        return rc;
                    continue;
                }
            }
        } else {
            rc = 1;
        }
        if (rc > 0)
            rc = deliver_all(p, &c);
        if (rc == 0) /* no buffers: frames stay where they are */
            rc = vpc_pump_idle(p, c.kick_fd, patience(p));
        if (rc == -ECANCELED)
            return 0;
        if (rc < 0)
            return rc;
    }
    return 0;
}
