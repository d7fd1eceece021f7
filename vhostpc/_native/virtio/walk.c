/* Chains of descriptors: walked into private copies, then touched and copied by them. Virtio 1.2, section 2.7.5.
 *
 * The driver is hostile: every word is read once into private memory, checked, and the copy is used.
 */
#define _GNU_SOURCE
#include <stdlib.h>
#include <string.h>
#include "virtio/ring_internal.h"

void vpc_walk_init(struct vpc_walk *w)
{
    w->segs = w->few;
    w->room = VPC_FEW_SEGS;
}

void vpc_walk_free(struct vpc_walk *w)
{
    if (w->segs != w->few)
        free(w->segs);
}

/* Room for another segment: 0 or -ENOMEM. */
static int grow(struct vpc_walk *w)
{
    uint32_t room = 4 * w->room;
    struct vpc_seg *segs = realloc(w->segs == w->few ? NULL : w->segs, room * sizeof(*segs));

    if (!segs)
        return -ENOMEM;
    if (w->segs == w->few)
        memcpy(segs, w->few, sizeof(w->few));
    w->segs = segs;
    w->room = room;
    return 0;
}

static int broken(struct vpc_vq *vq, int flags, const char *why)
{
    return flags & VPC_GLANCE ? -EBADMSG : vpc_vq_break(vq, why);
}

static int add_seg(struct vpc_vq *vq, struct vpc_walk *w, const struct vring_desc *d, int flags)
{
    bool write = d->flags & VRING_DESC_F_WRITE;

    if (d->len == 0)
        return 0; /* an empty segment does no harm */
    if (w->n == VPC_FEW_SEGS && flags & VPC_GLANCE)
        return -E2BIG;
    if (w->n == VPC_MAX_SEGS)
        return broken(vq, flags, "a chain has more than 32768 descriptors");
    if (w->n == w->room && grow(w) < 0)
        return -ENOMEM;
    if (!write && w->writable)
        return broken(vq, flags, "a readable descriptor follows a writable one");
    if (!vpc_gm_mapped(vq->gm, d->addr, d->len))
        return broken(vq, flags, "a descriptor points outside guest memory");
    w->segs[w->n++] = (struct vpc_seg){.gpa = d->addr, .len = d->len, .write = write};
    if (write) {
        w->writable += d->len;
    } else {
        w->readable += d->len;
        w->readable_segs = w->n;
    }
    /* Virtio 1.2, 2.7.4: a chain is at most 2^32 bytes long; it also keeps our sums in range. */
    if (w->readable + w->writable > UINT32_MAX)
        return broken(vq, flags, "a chain is longer than 4 GiB");
    return 0;
}

static int walk_indirect(struct vpc_vq *vq, struct vpc_walk *w, const struct vring_desc *table, int flags)
{
    uint32_t n = table->len / 16, i = 0, limit = flags & VPC_GLANCE && n > VPC_FEW_SEGS ? VPC_FEW_SEGS : n;
    uint64_t addr = table->addr;
    int rc;

    if (!vq->indirect)
        return broken(vq, flags, "an indirect descriptor without the feature");
    if (table->flags & VRING_DESC_F_NEXT)
        return broken(vq, flags, "an indirect descriptor with a next one");
    if (n == 0 || table->len % 16)
        return broken(vq, flags, "an indirect table whose length is no multiple of 16");
    if (n > VPC_MAX_RING)
        return broken(vq, flags, "an indirect table with more than 32768 entries");
    for (;;) {
        struct vring_desc d;
        uint64_t at;

        if (__builtin_add_overflow(addr, 16ull * i, &at) || !vpc_gm_mapped(vq->gm, at, 16))
            return broken(vq, flags, "an indirect table outside guest memory");
        rc = vpc_gm_touch(vq->gm, at, 16, flags, vpc_vq_stopper(vq, flags));
        if (rc < 0)
            return rc;
        (void)vpc_gm_read(vq->gm, at, &d, 16);
        if (vpc_gm_lost(vq->gm))
            return -EOWNERDEAD;
        if (d.flags & VRING_DESC_F_INDIRECT)
            return broken(vq, flags, "an indirect descriptor inside an indirect table");
        rc = add_seg(vq, w, &d, flags);
        if (rc < 0)
            return rc;
        if (!(d.flags & VRING_DESC_F_NEXT))
            return 0;
        if (d.next >= n)
            return broken(vq, flags, "a next field points outside its indirect table");
        if (--limit == 0 && flags & VPC_GLANCE)
            return -E2BIG;
        if (limit == 0)
            return broken(vq, flags, "a loop in an indirect table");
        i = d.next;
    }
}

int vpc_vq_walk_head(struct vpc_vq *vq, uint16_t head, struct vpc_walk *w, int flags)
{
    const atomic_int *stop = vpc_vq_stopper(vq, flags);
    uint32_t limit = flags & VPC_GLANCE && vq->num > VPC_FEW_SEGS ? VPC_FEW_SEGS : vq->num;
    uint16_t i = head;
    int rc;

    w->head = head;
    w->n = w->readable_segs = 0;
    w->readable = w->writable = 0;
    for (;;) {
        struct vring_desc d;

        if (i >= vq->num)
            return broken(vq, flags, "a descriptor index is outside the ring");
        rc = vpc_touch(vq->desc_r, vq->desc + 16u * i, 16, flags, stop);
        if (rc < 0)
            return rc;
        memcpy(&d, vq->desc + 16u * i, 16);
        atomic_signal_fence(memory_order_seq_cst); /* one copy, never read again */
        if (vpc_gm_lost(vq->gm))
            return -EOWNERDEAD;
        if (d.flags & VRING_DESC_F_INDIRECT)
            return walk_indirect(vq, w, &d, flags);
        rc = add_seg(vq, w, &d, flags);
        if (rc < 0)
            return rc;
        if (!(d.flags & VRING_DESC_F_NEXT))
            return 0;
        if (--limit == 0 && flags & VPC_GLANCE)
            return -E2BIG;
        if (limit == 0)
            return broken(vq, flags, "a loop in the descriptor table");
        i = d.next;
    }
}

int vpc_vq_walk(struct vpc_vq *vq, uint16_t ahead, struct vpc_walk *w, int flags)
{
    uint16_t head;
    int rc = vpc_vq_head(vq, ahead, &head, flags);

    return rc < 0 ? rc : vpc_vq_walk_head(vq, head, w, flags);
}

/* --- segments --- */

/* Ask for bytes behind an absent page. */
static void request_behind(const struct vpc_gm *gm, const struct vpc_seg *segs, uint64_t len, const atomic_int *stop)
{
    for (uint32_t i = 0; len && i < VPC_FEW_SEGS; i++) {
        uint64_t take = segs[i].len < len ? segs[i].len : len;

        if (!vpc_gm_request(gm, segs[i].gpa, take, stop))
            return;
        len -= take;
    }
}

int vpc_segs_touch(const struct vpc_gm *gm, const struct vpc_seg *segs, uint64_t skip, uint64_t len, int flags,
                   const atomic_int *stop)
{
    for (; len; segs++) {
        uint64_t take = segs->len;

        if (skip >= take) {
            skip -= take;
            continue;
        }
        take = take - skip < len ? take - skip : len;
        bool may_wait = !(flags & VPC_TRY);
        int rc = vpc_gm_touch(gm, segs->gpa + skip, take, may_wait ? VPC_TRY | VPC_REQUEST_NOTHING : flags, stop);
        if ((rc == -EAGAIN || rc == -EALREADY) && len > take)
            request_behind(gm, segs + 1, len - take, stop);
        if (rc == -EAGAIN && may_wait)
            rc = vpc_gm_touch(gm, segs->gpa + skip, take, flags, stop);
        if (rc < 0)
            return rc;
        len -= take;
        skip = 0;
    }
    return 0;
}

void vpc_vq_request(struct vpc_vq *vq, uint32_t ahead, uint32_t n, bool write, uint64_t len, int flags)
{
    struct vpc_walk w;
    int there;

    flags |= VPC_TRY | VPC_TELL_REQUESTED | VPC_GLANCE;

    if (!atomic_load_explicit(&vq->gm->supply->armed, memory_order_acquire))
        return;
    there = (int)(uint16_t)(vq->avail_idx - vq->last_avail) + (int)vpc_vq_left(vq); /* as last read: breaks nothing */
    vpc_walk_init(&w);
    for (uint32_t i = 0; i < n && (int)(ahead + i) < there; i++) {
        int rc = vpc_vq_walk(vq, (uint16_t)(ahead + i), &w, flags);
        uint64_t most = write ? w.writable : w.readable;

        if (rc == -EALREADY || rc == -E2BIG)
            continue; /* its descriptors are in flight, or it is long */
        if (rc < 0)
            break;
        rc = vpc_segs_touch(vq->gm, w.segs + (write ? w.readable_segs : 0), 0, most < len ? most : len, flags,
                            vpc_vq_stopper(vq, flags));
        if (rc < 0 && rc != -EALREADY)
            break; /* no room for more */
    }
    vpc_walk_free(&w);
}

/* The pieces of the segments' bytes [skip, skip + len): sets gpa and take for the body, and lowers len. */
#define EACH_SEG(segs, n, skip, len, body)                                                                   \
    for (uint32_t i = 0; i < (n) && (len); i++) {                                                            \
        uint64_t take = (segs)[i].len;                                                                       \
        if ((skip) >= take) {                                                                                \
            (skip) -= take;                                                                                  \
            continue;                                                                                        \
        }                                                                                                    \
        uint64_t gpa = (segs)[i].gpa + (skip);                                                               \
        take = take - (skip) < (len) ? take - (skip) : (len);                                                \
        int rc = body;                                                                                       \
        if (rc < 0)                                                                                          \
            return rc;                                                                                       \
        at += take;                                                                                          \
        (len) -= take;                                                                                       \
        (skip) = 0;                                                                                          \
    }

int vpc_segs_read(const struct vpc_gm *gm, const struct vpc_seg *segs, uint32_t n, uint64_t skip, void *to,
                  uint64_t len)
{
    uint8_t *at = to;

    EACH_SEG(segs, n, skip, len, vpc_gm_read(gm, gpa, at, take))
    return len ? -EFAULT : 0;
}

int vpc_segs_write(const struct vpc_gm *gm, const struct vpc_seg *segs, uint32_t n, uint64_t skip,
                   const void *from, uint64_t len, struct vpc_log *log)
{
    const uint8_t *at = from;

    EACH_SEG(segs, n, skip, len, vpc_gm_write(gm, gpa, at, take, log))
    return len ? -EFAULT : 0;
}
