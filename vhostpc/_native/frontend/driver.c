/*
 * A virtio driver for one split queue (virtio 1.2, 2.7), in the front-end's own mapping.
 *
 * It may wait for a page at any touch, like a guest's processor, so it runs on a borrowed thread and holds no
 * lock. The device is hostile: used entries are read once and checked.
 */
#define _GNU_SOURCE
#include "clock.h"
#include "frontend/driver_internal.h"
#include "event_internal.h"

#include <errno.h>
#include <poll.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#define MAX_BUFFER 65536u
#define DESC_NEXT 1u
#define DESC_WRITE 2u
#define DESC_INDIRECT 4u
#define MAX_PARTS 256u

struct desc {
    uint64_t addr;
    uint32_t len;
    uint16_t flags, next;
};

void vpc_driver_free(struct vpc_driver *d)
{
    if (!d)
        return;
    if (d->control >= 0)
        close(d->control);
    vpc_frames_free(&d->frames);
    free(d->free_slots);
    free(d->in_flight);
    free(d->buffer);
    free(d);
}

/* Descriptors of a chain. */
static uint32_t chain_len(const struct vpc_driver_config *c)
{
    return c->parts + (c->answer_len ? 1 : 0);
}

static int config_ok(const struct vpc_driver_config *c)
{
    if (c->num == 0 || c->num > 32768 || (c->num & (c->num - 1)) || c->slots == 0 || c->slots > c->num)
        return 0;
    if (c->parts == 0 || c->parts > MAX_PARTS || (!c->tables && (uint64_t)c->slots * chain_len(c) > c->num))
        return 0;
    if (c->answer_len >= c->buffer_len || (c->answer_len && c->receive))
        return 0;
    if (c->buffer_len < c->parts || c->buffer_len > MAX_BUFFER || c->header >= c->buffer_len)
        return 0;
    return ((c->desc & 15) | (c->avail & 1) | (c->used & 3)) == 0;
}

static void all_free(struct vpc_driver *d)
{
    d->free_head = 0;
    d->free_count = d->c.slots;
    for (uint32_t i = 0; i < d->c.slots; i++)
        d->free_slots[i] = i;
    memset(d->in_flight, 0, d->c.slots);
}

int vpc_driver_new(struct vpc_ram *ram, const struct vpc_driver_config *config, struct vpc_driver **out)
{
    struct vpc_driver *d;
    int rc;

    if (!config_ok(config))
        return -EINVAL;
    d = calloc(1, sizeof *d);
    if (!d)
        return -ENOMEM;
    d->ram = ram;
    d->c = *config;
    d->control = event_new();
    rc = d->control < 0 ? -errno : vpc_frames_init(&d->frames);
    d->free_slots = calloc(config->slots, sizeof *d->free_slots);
    d->in_flight = calloc(config->slots, 1);
    d->buffer = malloc(MAX_BUFFER);
    if (rc == 0 && (!d->free_slots || !d->in_flight || !d->buffer))
        rc = -ENOMEM;
    if (rc < 0) {
        vpc_driver_free(d);
        return rc;
    }
    all_free(d);
    *out = d;
    return 0;
}

int vpc_driver_add_region(struct vpc_driver *d, uint64_t gpa, uint64_t size, int block, uint64_t offset)
{
    struct vpc_block *b = ram_block(d->ram, block);

    if (d->region_count == MAX_REGIONS)
        return -ENOSPC;
    if (!b || size == 0 || gpa + size < gpa || offset > b->length || size > b->length - offset)
        return -EINVAL;
    d->regions[d->region_count++] = (struct region){gpa, size, offset, block};
    return 0;
}

int vpc_driver_move(struct vpc_driver *d, struct vpc_ram *ram, int kick_fd, int call_fd)
{
    for (int i = 0; i < d->region_count; i++) {
        struct vpc_block *b = ram_block(ram, d->regions[i].block);
        if (!b || d->regions[i].offset > b->length || d->regions[i].size > b->length - d->regions[i].offset)
            return -EINVAL;
    }
    d->ram = ram;
    d->c.kick_fd = kick_fd;
    d->c.call_fd = call_fd;
    return 0;
}

void *driver_at(struct vpc_driver *d, uint64_t gpa, uint64_t length)
{
    for (int i = 0; i < d->region_count; i++) {
        struct region *r = &d->regions[i];
        if (gpa >= r->gpa && gpa - r->gpa < r->size && length <= r->size - (gpa - r->gpa))
            return d->ram->blocks[r->block]->map + r->offset + (gpa - r->gpa);
    }
    return NULL;
}

static int ring_parts(struct vpc_driver *d, struct desc **desc, uint16_t **avail, unsigned char **used)
{
    uint64_t n = d->c.num;

    *desc = driver_at(d, d->c.desc, 16 * n);
    *avail = driver_at(d, d->c.avail, 6 + 2 * n);
    *used = driver_at(d, d->c.used, 6 + 8 * n);
    return *desc && *avail && *used ? 0 : -EFAULT;
}

int vpc_driver_reset(struct vpc_driver *d)
{
    struct desc *desc;
    uint16_t *avail;
    unsigned char *used;
    int rc = ring_parts(d, &desc, &avail, &used);

    if (rc < 0)
        return rc;
    memset(desc, 0, 16 * (size_t)d->c.num);
    memset(avail, 0, 6 + 2 * (size_t)d->c.num);
    memset(used, 0, 6 + 8 * (size_t)d->c.num);
    if (ram_lost(d->ram))
        return -EOWNERDEAD;
    d->avail_idx = d->kicked_idx = d->used_idx = 0;
    all_free(d);
    return 0;
}

/* Write the descriptors of a slot: in the ring, or in its table. Returns the head, or -EFAULT. */
static int describe(struct vpc_driver *d, struct desc *ring, uint32_t slot, uint32_t bytes)
{
    uint32_t parts = d->c.parts, all = chain_len(&d->c), head = slot, first = slot * all;
    uint64_t buffer = d->c.buffers + slot * d->c.buffer_stride, addr = buffer;
    struct desc *table = ring;

    if (d->c.tables) {
        uint64_t where = d->c.tables + slot * d->c.table_stride;
        table = driver_at(d, where, 16 * (uint64_t)all);
        if (!table)
            return -EFAULT;
        ring[slot] = (struct desc){where, 16 * all, DESC_INDIRECT, 0};
        first = 0;
    } else {
        head = first;
    }
    for (uint32_t i = 0; i < all; i++) {
        uint32_t len = i + 1 < parts ? bytes / parts : bytes - (parts - 1) * (bytes / parts);
        unsigned flags = i + 1 < all ? DESC_NEXT : 0;
        if (i == parts) {
            len = d->c.answer_len;
            addr = buffer + d->c.buffer_len - len;
        }
        if (d->c.receive || i == parts)
            flags |= DESC_WRITE;
        table[first + i] = (struct desc){addr, len, (uint16_t)flags, (uint16_t)(i + 1 < all ? first + i + 1 : 0)};
        addr += len;
    }
    return (int)head;
}

static int wants_kick(struct vpc_driver *d, const unsigned char *used)
{
    uint16_t fresh = d->avail_idx, old = d->kicked_idx;

    if (!d->c.event_idx)
        return !(__atomic_load_n((const uint16_t *)(const void *)used, __ATOMIC_SEQ_CST) & 1);
    uint16_t event = __atomic_load_n((const uint16_t *)(const void *)(used + 4 + 8 * (size_t)d->c.num), __ATOMIC_SEQ_CST);
    return (uint16_t)(fresh - event - 1) < (uint16_t)(fresh - old);
}

int vpc_driver_post(struct vpc_driver *d, uint32_t count, uint32_t frame_len)
{
    struct desc *desc;
    uint16_t *avail;
    unsigned char *used;
    uint32_t bytes = d->c.receive ? d->c.buffer_len : d->c.header + frame_len;
    int rc = ring_parts(d, &desc, &avail, &used);
    uint32_t done = 0;

    if (rc < 0)
        return rc;
    if (bytes > d->c.buffer_len - d->c.answer_len || bytes < d->c.parts || (!d->c.receive && frame_len < VPC_FRAME_MIN))
        return -EINVAL;
    for (; done < count && d->free_count; done++) {
        uint32_t slot = d->free_slots[d->free_head];
        if (!d->c.receive) {
            unsigned char *to = driver_at(d, d->c.buffers + slot * d->c.buffer_stride, bytes);
            if (!to)
                return -EFAULT;
            memset(d->buffer, 0, d->c.header);
            vpc_frame_build(&d->frames, d->buffer + d->c.header, frame_len, d->c.stream, d->next_number);
            memcpy(to, d->buffer, bytes);
        } else if (!driver_at(d, d->c.buffers + slot * d->c.buffer_stride, bytes)) {
            return -EFAULT;
        }
        int head = describe(d, desc, slot, bytes);
        if (head < 0)
            return head;
        d->next_number++;
        d->free_head = (d->free_head + 1) % d->c.slots;
        d->free_count--;
        d->in_flight[slot] = 1;
        avail[2 + (d->avail_idx & (d->c.num - 1))] = (uint16_t)head;
        d->avail_idx++;
        d->stats.posted++;
    }
    if (ram_lost(d->ram))
        return -EOWNERDEAD;
    if (done == 0)
        return 0;
    __atomic_store_n(&avail[1], d->avail_idx, __ATOMIC_RELEASE);
    __atomic_thread_fence(__ATOMIC_SEQ_CST);
    if (wants_kick(d, used)) {
        (void)vpc_event_signal(d->c.kick_fd);
        d->stats.kicks++;
    }
    d->kicked_idx = d->avail_idx;
    return (int)done;
}

static void take_frame(struct vpc_driver *d, uint32_t slot, uint32_t len)
{
    uint64_t where = d->c.buffers + slot * d->c.buffer_stride;
    uint32_t header = d->c.header;

    if (d->c.answer_len) {
        where += d->c.buffer_len - d->c.answer_len;
        header = 0;
    }
    unsigned char *from = driver_at(d, where, len);
    if (!from || len < header) {
        pthread_mutex_lock(&d->frames.lock);
        d->frames.stats.bad++;
        pthread_mutex_unlock(&d->frames.lock);
        return;
    }
    memcpy(d->buffer, from, len);
    if (ram_lost(d->ram))
        return; /* zeros in the place of a page that never came are not a frame */
    vpc_frame_take(&d->frames, d->buffer + header, len - header);
}

int vpc_driver_reap(struct vpc_driver *d)
{
    struct desc *desc;
    uint16_t *avail;
    unsigned char *used;
    int rc = ring_parts(d, &desc, &avail, &used), reaped = 0;

    if (rc < 0)
        return rc;
    for (;;) {
        uint16_t there = __atomic_load_n((uint16_t *)(void *)(used + 2), __ATOMIC_ACQUIRE);
        if (ram_lost(d->ram))
            return -EOWNERDEAD;
        if ((uint16_t)(there - d->used_idx) > d->c.num) {
            d->stats.bad_used++;
            return -EBADMSG;
        }
        if ((uint32_t)reaped >= d->c.num)
            return reaped; /* a device that is always one entry ahead must not keep us: the caller checks for a stop */
        if (there == d->used_idx) {
            /* Ask for a call at the next entry, then look once more. */
            __atomic_store_n(&avail[2 + d->c.num], d->used_idx, __ATOMIC_RELAXED);
            __atomic_thread_fence(__ATOMIC_SEQ_CST);
            if (__atomic_load_n((uint16_t *)(void *)(used + 2), __ATOMIC_ACQUIRE) == d->used_idx)
                return reaped;
            continue;
        }
        const volatile uint32_t *e =
            (const volatile uint32_t *)(void *)(used + 4 + 8 * (size_t)(d->used_idx & (d->c.num - 1)));
        uint32_t id = e[0], len = e[1];
        if (ram_lost(d->ram))
            return -EOWNERDEAD;
        uint32_t slot = d->c.tables ? id : id / chain_len(&d->c);
        uint32_t most = d->c.receive ? d->c.buffer_len : d->c.answer_len;
        if (slot >= d->c.slots || (!d->c.tables && id % chain_len(&d->c)) || !d->in_flight[slot] || (most && len > most)) {
            d->stats.bad_used++;
        } else {
            d->in_flight[slot] = 0;
            d->free_slots[(d->free_head + d->free_count++) % d->c.slots] = slot;
            d->stats.completed++;
            if (most)
                take_frame(d, slot, len);
        }
        d->used_idx++;
        reaped++;
    }
}

/* Milliseconds rounded up, so that a short wait is one. */
static int until_ms(uint64_t when)
{
    uint64_t now = now_ns();
    return when <= now ? 0 : (int)((when - now + 999999) / 1000000);
}

int vpc_driver_run(struct vpc_driver *d, uint64_t count, uint32_t frame_len, uint64_t interval_ns)
{
    uint64_t begun = now_ns(), posted = 0;
    int rc = 0;

    while (!atomic_load(&d->stop)) {
        rc = vpc_driver_reap(d);
        if (rc < 0)
            break;
        if ((uint32_t)rc >= d->c.num)
            continue; /* there may be more, without a call for it */
        uint64_t due = count ? count - posted : d->c.slots;
        if (interval_ns) {
            uint64_t by_now = (now_ns() - begun) / interval_ns + 1;
            uint64_t rest = by_now > posted ? by_now - posted : 0;
            due = due < rest ? due : rest;
        }
        rc = vpc_driver_post(d, due > d->c.slots ? d->c.slots : (uint32_t)due, frame_len);
        if (rc < 0)
            break;
        posted += (uint64_t)rc;
        if (count && posted == count && d->free_count == d->c.slots) {
            rc = 0;
            break;
        }
        int wait = -1;
        if (interval_ns && d->free_count && (!count || posted < count))
            wait = until_ms(begun + posted * interval_ns);
        /* Chains used while we posted show in the used index, and used_event asked for a call. */
        struct pollfd fds[2] = {{.fd = d->c.call_fd, .events = POLLIN}, {.fd = d->control, .events = POLLIN}};
        if (poll(fds, 2, wait) > 0 && fds[0].revents & POLLIN)
            d->stats.calls += (uint64_t)vpc_event_clear(d->c.call_fd);
    }
    if (atomic_load(&d->stop)) {
        event_drain(d->control);
        atomic_store(&d->stop, 0);
        rc = rc < 0 ? rc : 1;
    }
    return rc;
}

void vpc_driver_stop(struct vpc_driver *d)
{
    atomic_store(&d->stop, 1);
    event_poke(d->control);
}

int vpc_driver_stats(struct vpc_driver *d, struct vpc_driver_stats *out)
{
    *out = d->stats;
    out->in_flight = d->c.slots - d->free_count;
    out->avail_index = d->avail_idx;
    out->used_index = d->used_idx;
    pthread_mutex_lock(&d->frames.lock);
    out->received = d->frames.stats;
    pthread_mutex_unlock(&d->frames.lock);
    return 0;
}
