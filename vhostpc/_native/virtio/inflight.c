/* The inflight region of split rings: which chains were taken and not answered, in a file that outlives us.
 * Specification: vhost-user, "Inflight I/O tracking".
 *
 * A process may die between any two stores, so their order is the subject here. The region's content is believed only
 * as far as it can be checked: the front-end and our predecessor may have written anything there.
 */
#define _GNU_SOURCE
#include <stdlib.h>
#include <string.h>
#include "virtio/ring_internal.h"
#include "virtio/vpc_inflight.h"

#define VERSION 1

/* struct QueueRegionSplit: features u64, version u16, desc_num u16, last_batch_head u16, used_idx u16, entries. */
#define FEATURES 0
#define PART_VERSION 8
#define DESC_NUM 10
#define LAST_BATCH_HEAD 12
#define USED_IDX 14
#define ENTRIES 16
/* struct DescStateSplit: inflight u8, 5 unused, next u16, counter u64. */
#define ENTRY_SIZE 16u
#define ENTRY_NEXT 6
#define ENTRY_COUNTER 8

struct vpc_inflight {
    atomic_int refs;
    struct vpc_view view;
};

struct taken {
    uint64_t counter;
    uint16_t head;
};

/* Stores stay in the order they are written in: a reader after our death sees one moment. */

static uint16_t load16(const uint8_t *p)
{
    return atomic_load_explicit((const _Atomic uint16_t *)p, memory_order_relaxed);
}

static void store8(uint8_t *p, uint8_t v)
{
    atomic_store_explicit((_Atomic uint8_t *)p, v, memory_order_release);
}

static void store16(uint8_t *p, uint16_t v)
{
    atomic_store_explicit((_Atomic uint16_t *)p, v, memory_order_release);
}

static void store64(uint8_t *p, uint64_t v)
{
    atomic_store_explicit((_Atomic uint64_t *)p, v, memory_order_release);
}

static uint8_t *entry(const struct vpc_inflight_part *part, uint32_t head)
{
    return part->at + ENTRIES + ENTRY_SIZE * head;
}

int vpc_inflight_new(struct vpc_supply *s, int fd, uint64_t offset, uint64_t size, struct vpc_inflight **out)
{
    if (offset % 8)
        return -EINVAL;
    struct vpc_inflight *region = calloc(1, sizeof(*region));
    int rc = region ? vpc_view_open(&region->view, s, fd, offset, size, VPC_USE_INFLIGHT) : -ENOMEM;

    if (rc < 0) {
        free(region);
        return rc;
    }
    atomic_init(&region->refs, 1);
    *out = region;
    return 0;
}

void vpc_inflight_unref(struct vpc_inflight *region)
{
    if (!region || atomic_fetch_sub(&region->refs, 1) != 1)
        return;
    vpc_view_close(&region->view);
    free(region);
}

void vpc_inflight_drop(struct vpc_vq *vq)
{
    struct vpc_inflight_part *part = &vq->inflight;

    vpc_inflight_unref(part->region);
    free(part->batch);
    free(part->again);
    memset(part, 0, sizeof(*part));
}

int vpc_vq_set_inflight(struct vpc_vq *vq, struct vpc_inflight *region, uint64_t offset, uint32_t size)
{
    uint16_t *batch = NULL;

    if (region) {
        if (offset % 8 || size == 0 || size > VPC_MAX_RING || offset > region->view.size ||
            ENTRIES + ENTRY_SIZE * (uint64_t)size > region->view.size - offset)
            return -EINVAL;
        batch = calloc(size, sizeof(*batch));
        if (!batch)
            return -ENOMEM;
        atomic_fetch_add(&region->refs, 1);
    }
    vpc_inflight_drop(vq);
    vq->inflight = (struct vpc_inflight_part){.region = region, .size = size, .batch = batch};
    if (region)
        vq->inflight.at = region->view.at + offset;
    return 0;
}

uint32_t vpc_vq_again(const struct vpc_vq *vq)
{
    return vpc_vq_left(vq);
}

static int by_counter(const void *a, const void *b)
{
    uint64_t x = ((const struct taken *)a)->counter, y = ((const struct taken *)b)->counter;

    return x < y ? -1 : x > y;
}

/* Nobody has used the part before. */
static void begin(struct vpc_vq *vq)
{
    struct vpc_inflight_part *part = &vq->inflight;

    for (uint32_t i = 0; i < part->size; i++)
        store8(entry(part, i), 0);
    store16(part->at + DESC_NUM, (uint16_t)part->size);
    store16(part->at + LAST_BATCH_HEAD, 0);
    store16(part->at + USED_IDX, vq->used_idx);
    store16(part->at + PART_VERSION, VERSION);
    part->counter = 0;
    part->last_head = 0;
}

/* Which entries are marked; -EBADMSG. */
static int collect(struct vpc_vq *vq, uint8_t *marks)
{
    const struct vpc_inflight_part *part = &vq->inflight;
    int n = 0;

    for (uint32_t i = 0; i < part->size; i++) {
        marks[i] = atomic_load_explicit((const _Atomic uint8_t *)entry(part, i), memory_order_relaxed);
        if (marks[i] > 1)
            return vpc_vq_break(vq, "the inflight region has a mark that is neither 0 nor 1");
        n += marks[i];
    }
    return n;
}

/* The used entries of the last batch are published, its marks may have stayed. -EBADMSG. */
static int without_last_batch(struct vpc_vq *vq, uint8_t *marks, uint16_t batch)
{
    const struct vpc_inflight_part *part = &vq->inflight;
    uint16_t head = load16(part->at + LAST_BATCH_HEAD);

    if (batch > vq->num)
        return vpc_vq_break(vq, "the inflight region is not of this ring: their used indices are too far apart");
    for (uint32_t i = 0; i < batch; i++) {
        if (head >= part->size)
            return vpc_vq_break(vq, "the inflight region's last batch has a head outside the ring");
        marks[head] = 0;
        head = load16(entry(part, head) + ENTRY_NEXT);
    }
    return 0;
}

/* The marked ones in the order in which they were taken. How many, or -EBADMSG when that is impossible. */
static int in_order(struct vpc_vq *vq, const uint8_t *marks, struct taken *found)
{
    const struct vpc_inflight_part *part = &vq->inflight;
    uint16_t available = (uint16_t)(load16(vq->avail + 2) - vq->used_idx);
    int n = 0;

    atomic_thread_fence(memory_order_acquire); /* the index before the entries */
    for (uint32_t i = 0; i < part->size; i++) {
        const _Atomic uint64_t *counter = (const _Atomic uint64_t *)(entry(part, i) + ENTRY_COUNTER);

        if (!marks[i])
            continue;
        if (i >= vq->num)
            return vpc_vq_break(vq, "the inflight region has a head outside the ring");
        found[n++] = (struct taken){.counter = atomic_load_explicit(counter, memory_order_relaxed),
                                    .head = (uint16_t)i};
    }
    if (n && (n > available || available > vq->num))
        return vpc_vq_break(vq, "the inflight region has more chains than the driver has made available");
    qsort(found, (size_t)n, sizeof(*found), by_counter);
    for (int i = 0; i < n; i++)
        if (found[i].counter == UINT64_MAX || (i && found[i].counter == found[i - 1].counter))
            return vpc_vq_break(vq, "the inflight region has a counter twice, or the last one there is");
    return n;
}

/* How many of the chains were taken before one that is answered. The others are the youngest of all that were taken,
 * and so lie at the end of the part taken from the avail ring: stepping back gives them to us again. */
static int older_than_answered(struct vpc_vq *vq, const struct taken *found, int n, int flags)
{
    for (; n > 0; n--) {
        uint32_t slot = (uint32_t)(uint16_t)(vq->used_idx + n - 1) & (vq->num - 1);
        const uint8_t *at = vq->avail + 4 + 2 * slot;
        int rc = vpc_touch(vq->avail_r, at, 2, flags, &vq->stop);

        if (rc < 0)
            return rc;
        if (load16(at) != found[n - 1].head)
            break;
    }
    return n;
}

static int resume(struct vpc_vq *vq, uint8_t *marks, struct taken *found, int flags)
{
    struct vpc_inflight_part *part = &vq->inflight;
    uint16_t batch = (uint16_t)(vq->used_idx - load16(part->at + USED_IDX));
    uint16_t *again = NULL;
    int n, older, rc = collect(vq, marks);

    if (rc > 0 && batch)
        rc = without_last_batch(vq, marks, batch);
    n = rc < 0 ? rc : in_order(vq, marks, found);
    older = n < 0 ? n : older_than_answered(vq, found, n, flags);
    if (older < 0)
        return older;
    if (vpc_gm_lost(vq->gm))
        return -EOWNERDEAD;
    if (older) {
        again = malloc((size_t)older * sizeof(*again));
        if (!again)
            return -ENOMEM;
        for (int i = 0; i < older; i++)
            again[i] = found[i].head;
    }
    /* Nothing was changed before here. The last batch first: as long as used_idx is the old one, its marks mean
     * nothing. Then the chains that the avail ring gives again, the youngest first: a successor after our death at any
     * of these stores finds the same chains, in the same order. */
    if (batch) {
        for (uint32_t i = 0; i < part->size; i++)
            if (!marks[i])
                store8(entry(part, i), 0);
        store16(part->at + USED_IDX, vq->used_idx);
    }
    for (int i = n - 1; i >= older; i--)
        store8(entry(part, found[i].head), 0);
    store16(part->at + DESC_NUM, (uint16_t)part->size);
    part->last_head = load16(part->at + LAST_BATCH_HEAD);
    part->counter = n ? found[n - 1].counter + 1 : 0;
    part->again = again;
    part->again_n = (uint32_t)older;
    return 0;
}

int vpc_inflight_recover(struct vpc_vq *vq, int flags)
{
    struct vpc_inflight_part *part = &vq->inflight;
    uint16_t version = load16(part->at + PART_VERSION);
    int rc = 0;

    free(part->again);
    part->again = NULL;
    part->again_n = part->again_at = 0;
    if (vq->num > part->size)
        return vpc_vq_break(vq, "the ring has more entries than the inflight region");
    if (version > VERSION || atomic_load_explicit((const _Atomic uint64_t *)(part->at + FEATURES), memory_order_relaxed))
        return vpc_vq_break(vq, "the inflight region has a version, or features, that nobody here knows");
    if (version == 0) {
        begin(vq);
    } else {
        uint8_t *marks = malloc(part->size);
        struct taken *found = malloc(part->size * sizeof(*found));

        rc = marks && found ? resume(vq, marks, found, flags) : -ENOMEM;
        free(found);
        free(marks);
    }
    if (rc < 0)
        return rc;
    vq->last_avail = vq->avail_idx = (uint16_t)(vq->used_idx + part->again_n);
    return 0;
}

void vpc_inflight_take(struct vpc_vq *vq, uint16_t head)
{
    struct vpc_inflight_part *part = &vq->inflight;

    if (head >= part->size)
        return;
    store64(entry(part, head) + ENTRY_COUNTER, part->counter++);
    store8(entry(part, head), 1);
}

void vpc_inflight_give_back(struct vpc_vq *vq, uint16_t head)
{
    struct vpc_inflight_part *part = &vq->inflight;

    if (head < part->size)
        store8(entry(part, head), 0);
}

void vpc_inflight_put(struct vpc_vq *vq, uint16_t at, uint16_t head)
{
    struct vpc_inflight_part *part = &vq->inflight;

    if (head >= part->size || at >= part->size)
        return;
    part->batch[at] = head;
    store16(entry(part, head) + ENTRY_NEXT, part->last_head);
    store16(part->at + LAST_BATCH_HEAD, head);
    part->last_head = head;
}

void vpc_inflight_published(struct vpc_vq *vq, uint16_t n)
{
    struct vpc_inflight_part *part = &vq->inflight;

    for (uint32_t i = 0; i < n && i < part->size; i++)
        store8(entry(part, part->batch[i]), 0);
    store16(part->at + USED_IDX, vq->used_idx);
}
