/* Split virtqueues: indices, used entries, notification; the descriptors are read in walk.c. Virtio 1.2, section 2.7.
 *
 * The driver is hostile: every word is read once into private memory, checked, and the copy is used.
 */
#define _GNU_SOURCE
#include <stdlib.h>
#include <string.h>
#include <unistd.h>
#include "event_internal.h"
#include "virtio/ring_internal.h"

static uint16_t load16(const uint8_t *p)
{
    return atomic_load_explicit((const _Atomic uint16_t *)p, memory_order_relaxed);
}

static void store16(uint8_t *p, uint16_t v)
{
    atomic_store_explicit((_Atomic uint16_t *)p, v, memory_order_relaxed);
}

int vpc_vq_new(struct vpc_vq **out)
{
    struct vpc_vq *vq = calloc(1, sizeof(*vq));

    if (!vq)
        return -ENOMEM;
    vq->call_fd = event_new(); /* nobody listens */
    if (vq->call_fd < 0) {
        int rc = -errno;
        free(vq);
        return rc;
    }
    *out = vq;
    return 0;
}

void vpc_vq_free(struct vpc_vq *vq)
{
    if (!vq)
        return;
    vpc_gm_unref(vq->gm);
    vpc_log_unref(vq->log);
    vpc_inflight_drop(vq);
    close(vq->call_fd);
    free(vq);
}

void vpc_vq_set_features(struct vpc_vq *vq, uint64_t features)
{
    vq->event_idx = features & (1ull << VIRTIO_RING_F_EVENT_IDX);
    vq->indirect = features & (1ull << VIRTIO_RING_F_INDIRECT_DESC);
}

void vpc_vq_set_memory(struct vpc_vq *vq, struct vpc_gm *gm)
{
    if (gm)
        vpc_gm_ref(gm);
    vpc_gm_unref(vq->gm);
    vq->gm = gm;
    vq->desc = NULL;
    vq->avail = NULL;
    vq->used = NULL;
}

int vpc_vq_set_ring(struct vpc_vq *vq, uint32_t num, uint64_t desc, uint64_t avail, uint64_t used)
{
    if (num == 0 || num > VPC_MAX_RING || (num & (num - 1)))
        return -EINVAL;
    if (!vq->gm)
        return -EFAULT;
    /* With the event words after each ring, whether negotiated or not: the specification's layout has them. */
    vq->desc_r = vpc_gm_find_user(vq->gm, desc, 16ull * num);
    vq->avail_r = vpc_gm_find_user(vq->gm, avail, 6 + 2ull * num);
    vq->used_r = vpc_gm_find_user(vq->gm, used, 6 + 8ull * num);
    if (!vq->desc_r || !vq->avail_r || !vq->used_r)
        return -EFAULT;
    const uint8_t *own_desc = vq->desc_r->own + (desc - vq->desc_r->uaddr);
    const uint8_t *own_avail = vq->avail_r->own + (avail - vq->avail_r->uaddr);
    uint8_t *own_used = vq->used_r->own + (used - vq->used_r->uaddr);
    /* Where they lie here: words are read and written at once. Regions need not be aligned. */
    if ((uintptr_t)own_desc % 16 || (uintptr_t)own_avail % 2 || (uintptr_t)own_used % 4)
        return -EINVAL;
    vq->num = num;
    vq->desc = own_desc;
    vq->avail = own_avail;
    vq->used = own_used;
    return 0;
}

void vpc_vq_set_log(struct vpc_vq *vq, struct vpc_log *log, int log_used, uint64_t used_gpa)
{
    if (log)
        vpc_log_ref(log);
    vpc_log_unref(vq->log);
    vq->log = log;
    vq->log_used = log_used && log;
    vq->used_gpa = used_gpa;
}

void vpc_vq_set_base(struct vpc_vq *vq, uint32_t avail_index)
{
    vq->last_avail = vq->avail_idx = (uint16_t)avail_index;
    vq->used_known = false;
    vq->signalled_known = false;
    vq->notify_off = false;
    vq->inflight.again_n = vq->inflight.again_at = 0;
    atomic_store(&vq->error, NULL);
}

uint32_t vpc_vq_base(const struct vpc_vq *vq)
{
    return vq->last_avail;
}

void vpc_vq_stop(struct vpc_vq *vq, int stopped)
{
    atomic_store(&vq->stop, stopped);
}

const char *vpc_vq_error(const struct vpc_vq *vq)
{
    return atomic_load(&vq->error);
}

/* Ask for the ring's own pages; of a large one for the first few of each part. */
static void request_ring(const struct vpc_vq *vq)
{
    const uint64_t most = 4 * TARGET_PAGE;
    uint64_t desc = 16ull * vq->num, avail = 6 + 2ull * vq->num, used = 6 + 8ull * vq->num;

    (void)(vpc_request(vq->avail_r, vq->avail, avail < most ? avail : most, false, &vq->stop) &&
           vpc_request(vq->used_r, vq->used, used < most ? used : most, false, &vq->stop) &&
           vpc_request(vq->desc_r, vq->desc, desc < most ? desc : most, false, &vq->stop));
}

int vpc_vq_ready(struct vpc_vq *vq, int flags)
{
    int rc;

    if (atomic_load(&vq->error))
        return -EBADMSG;
    if (!vq->gm || !vq->used)
        return vpc_vq_break(vq, "the ring has no addresses");
    if (vpc_gm_lost(vq->gm))
        return -EOWNERDEAD;
    if (!vq->used_known && vpc_touch(vq->avail_r, vq->avail, 4, VPC_TRY | VPC_REQUEST_NOTHING, &vq->stop) == -EAGAIN)
        request_ring(vq);
    rc = vpc_touch(vq->avail_r, vq->avail, 4, flags, &vq->stop);
    if (!rc)
        rc = vpc_touch(vq->used_r, vq->used, 4, flags, &vq->stop);
    if (rc < 0)
        return rc;
    if (!vq->used_known) {
        uint16_t used = load16(vq->used + 2);
        if (vpc_gm_lost(vq->gm))
            return -EOWNERDEAD;
        vq->used_idx = used;
        if (vq->inflight.region) {
            rc = vpc_inflight_recover(vq, flags);
            if (!rc)
                vq->used_known = true;
            return rc;
        }
        vq->used_known = true;
        /* Here every chain taken has been given back, so the two agree. They do not when the back-end before us
         * died, or when the front-end does not know: DPDK's virtio-user gives 0 to one that reconnects. The ring is
         * right: unused chains have to be served, used ones must not be served twice. */
        if (used != vq->last_avail)
            vq->last_avail = vq->avail_idx = used;
    }
    return 0;
}

int vpc_vq_refresh(struct vpc_vq *vq)
{
    uint16_t idx = load16(vq->avail + 2), n = (uint16_t)(idx - vq->last_avail);

    atomic_thread_fence(memory_order_acquire); /* index before entries and descriptors */
    if (vpc_gm_lost(vq->gm))
        return -EOWNERDEAD;
    if (n > vq->num)
        return vpc_vq_break(vq, "the avail index jumped by more than the ring holds");
    if ((uint16_t)(idx - vq->used_idx) > vq->num)
        return vpc_vq_break(vq, "more chains are in flight than the ring holds");
    vq->avail_idx = idx;
    return n + (int)vpc_vq_left(vq);
}

int vpc_vq_available(struct vpc_vq *vq)
{
    int n = (uint16_t)(vq->avail_idx - vq->last_avail) + (int)vpc_vq_left(vq);

    return n ? n : vpc_vq_refresh(vq);
}

int vpc_vq_head(struct vpc_vq *vq, uint16_t ahead, uint16_t *head, int flags)
{
    const struct vpc_inflight_part *part = &vq->inflight;
    uint32_t left = vpc_vq_left(vq);

    if (ahead < left) { /* taken by our predecessor on this ring: first, and not in the avail ring */
        *head = part->again[part->again_at + ahead];
        return 0;
    }
    const uint8_t *slot = vq->avail + 4 + 2 * ((uint32_t)(uint16_t)(vq->last_avail + ahead - left) & (vq->num - 1));
    int rc = vpc_touch(vq->avail_r, slot, 2, flags, &vq->stop);

    if (rc < 0)
        return rc;
    *head = load16(slot);
    return vpc_gm_lost(vq->gm) ? -EOWNERDEAD : 0;
}

int vpc_vq_touch_used(struct vpc_vq *vq, uint32_t n, int flags, const atomic_int *stop)
{
    uint32_t at = vq->used_idx & (vq->num - 1), run;
    int rc = 0;

    if (!atomic_load_explicit(&vq->used_r->map->armed, memory_order_acquire) &&
        !atomic_load_explicit(&vq->avail_r->map->armed, memory_order_acquire))
        return 0;
    while (n && !rc) {
        run = vq->num - at < n ? vq->num - at : n;
        rc = vpc_touch(vq->used_r, vq->used + 4 + 8 * at, 8ull * run, flags, stop);
        n -= run;
        at = 0;
    }
    if (!rc) /* the index, and the driver's flags: the ring may have been moved since an answer's chain was popped */
        rc = vpc_touch(vq->used_r, vq->used, 4, flags, stop);
    if (!rc)
        rc = vpc_touch(vq->avail_r, vq->avail, 4, flags, stop);
    if (!rc) /* avail_event, which follows the used ring, and used_event, which follows the avail ring */
        rc = vpc_touch(vq->used_r, vq->used + 4 + 8 * vq->num, 2, flags, stop);
    if (!rc)
        rc = vpc_touch(vq->avail_r, vq->avail + 4 + 2 * vq->num, 2, flags, stop);
    return rc;
}

static void log_used(struct vpc_vq *vq, uint32_t offset, uint32_t len)
{
    if (vq->log_used)
        vpc_log_mark(vq->log, vq->used_gpa + offset, len);
}

void vpc_vq_put_used(struct vpc_vq *vq, uint16_t at, uint16_t head, uint32_t len)
{
    uint32_t slot = (uint32_t)(uint16_t)(vq->used_idx + at) & (vq->num - 1);
    struct vring_used_elem elem = {.id = head, .len = len};

    memcpy(vq->used + 4 + 8 * slot, &elem, 8);
    log_used(vq, 4 + 8 * slot, 8);
    if (vq->inflight.region)
        vpc_inflight_put(vq, at, head);
}

int vpc_vq_publish(struct vpc_vq *vq, uint16_t n)
{
    uint16_t old = vq->used_idx, new = (uint16_t)(old + n);
    bool call;

    /* Answers and entries before the index, and before the check: the driver is not told of data that were written
     * where a page had gone, or where memory was given up. */
    atomic_thread_fence(memory_order_seq_cst);
    if (vpc_gm_lost(vq->gm))
        return -EOWNERDEAD;
    store16(vq->used + 2, new);
    log_used(vq, 0, 4);
    vq->used_idx = new;
    atomic_thread_fence(memory_order_seq_cst); /* the index before the driver's request is read and lost is checked */
    if (vq->inflight.region && !vpc_gm_lost(vq->gm)) /* otherwise the index may be lost: the next call finds out */
        vpc_inflight_published(vq, n);
    if (vq->event_idx) {
        uint16_t event = load16(vq->avail + 4 + 2 * vq->num);
        if (vq->signalled_known)
            old = vq->signalled;
        call = !vq->signalled_known || (uint16_t)(new - event - 1) < (uint16_t)(new - old);
        vq->signalled = new;
        vq->signalled_known = true;
    } else {
        call = !(load16(vq->avail) & VRING_AVAIL_F_NO_INTERRUPT);
    }
    if (vpc_gm_lost(vq->gm))
        return 0;
    if (call)
        vpc_vq_signal(vq);
    return call;
}

void vpc_vq_disable_notify(struct vpc_vq *vq)
{
    /* With the event index the last avail_event simply falls behind. Before the first touching call the ring is
     * as its driver left it. */
    if (vq->notify_off || !vq->used_known || vq->event_idx)
        return;
    if (vpc_touch(vq->used_r, vq->used, 2, VPC_TRY, NULL) < 0)
        return;
    store16(vq->used, VRING_USED_F_NO_NOTIFY);
    log_used(vq, 0, 2);
    vq->notify_off = true;
}

int vpc_vq_enable_notify(struct vpc_vq *vq, int flags)
{
    int rc = vpc_vq_ready(vq, flags);
    uint16_t seen = vq->avail_idx;

    if (rc < 0)
        return rc;
    if (vq->event_idx) {
        uint32_t at = 4 + 8 * vq->num;
        rc = vpc_touch(vq->used_r, vq->used + at, 2, flags, &vq->stop);
        if (rc < 0)
            return rc;
        store16(vq->used + at, vq->avail_idx);
        log_used(vq, at, 2);
    } else if (vq->notify_off) {
        store16(vq->used, 0);
        log_used(vq, 0, 2);
        vq->notify_off = false;
    }
    atomic_thread_fence(memory_order_seq_cst); /* the request before the index is read again */
    rc = vpc_vq_refresh(vq);
    return rc < 0 ? rc : vq->avail_idx != seen;
}
