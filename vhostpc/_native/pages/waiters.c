/* The clients of the fault service, and which of their threads wait for which pages. See fault_internal.h. */
#define _GNU_SOURCE
#include "clock.h"
#include "pages/fault_internal.h"

#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

uint64_t vpc_histogram_floor(uint32_t i)
{
    if (i < 4)
        return i;
    unsigned top = i / 4 + 1;
    return top > 63 ? UINT64_MAX : (uint64_t)(4 + i % 4) << (top - 2);
}

/* Words of one bitmap of a range. */
static size_t seen_words(const struct vpc_block *b, const struct vpc_client_range *r)
{
    return (size_t)(((r->length >> b->shift) + 63) / 64);
}

static void ranges_free(struct client *c)
{
    for (uint32_t i = 0; i < c->range_count; i++)
        free(c->seen[i]);
    free(c->seen);
    free(c->ranges);
    c->seen = NULL;
    c->ranges = NULL;
    c->range_count = 0;
}

void vpc_client_free(struct client *c)
{
    if (c->fd >= 0)
        close(c->fd);
    ranges_free(c);
    free(c);
}

int vpc_fault_add_client(struct vpc_fault *s, int ufd)
{
    int rc = -ENOMEM;
    struct client *c = calloc(1, sizeof *c);

    if (!c)
        return rc;
    c->fd = fcntl(ufd, F_DUPFD_CLOEXEC, 0);
    if (c->fd < 0) {
        rc = -errno;
        free(c);
        return rc;
    }
    c->stats.alive = 1;
    pthread_mutex_lock(&s->lock);
    rc = s->client_count < MAX_CLIENTS ? vpc_fault_watch(s, c->fd, (uint32_t)s->client_count) : -ENOSPC;
    if (rc == 0) {
        rc = s->client_count++;
        s->clients[rc] = c;
        vpc_blocked_join(s, &c->party, 1u << GROUP_ALL);
    }
    pthread_mutex_unlock(&s->lock);
    if (rc < 0) {
        close(c->fd);
        free(c);
    }
    return rc;
}

/* Drop waiter i; the order of the others is kept. */
static void waiter_drop(struct vpc_fault *s, uint32_t i, uint64_t now)
{
    vpc_blocked_end(s, &s->waiters[i], now);
    s->waiter_count--;
    memmove(&s->waiters[i], &s->waiters[i + 1], (s->waiter_count - i) * sizeof s->waiters[0]);
}

/* Waiter i goes on: count it and forget it. */
static void waiter_done(struct vpc_fault *s, uint32_t i)
{
    struct vpc_waiter *w = &s->waiters[i];
    struct client *c = s->clients[w->client];
    uint64_t now = now_ns(), wait = now - w->since_ns;

    c->stats.wakes++;
    s->stats.wakes++;
    c->stats.histogram[histogram_bucket(wait)]++;
    if (wait > c->stats.longest_ns)
        c->stats.longest_ns = wait;
    vpc_blocked_count(s, w, wait);
    if (s->trace)
        s->trace[s->traced++ % s->trace_room] = (struct vpc_traced){.read_ns = w->since_ns,
                                                                    .woken_ns = now,
                                                                    .page = w->page,
                                                                    .client = w->client,
                                                                    .block = w->block,
                                                                    .thread = w->thread,
                                                                    .way = w->way == WAY_AGAIN ? VPC_WAY_THERE : w->way};
    waiter_drop(s, i, now);
}

static void waiter_wake(struct vpc_fault *s, uint32_t i)
{
    struct vpc_waiter *w = &s->waiters[i];
    struct client *c = s->clients[w->client];

    if (c->fd >= 0)
        vpc_uffd_wake(c->fd, w->address, s->ram->blocks[w->block]->page_size);
    waiter_done(s, i);
}

/* Waiter i stays, unless its thread waits at that address already: a signal interrupted it, and it has returned. Of a
 * client whose ufd does not report threads, all that wait at one page count as one. Returns 1 if it is gone. */
static int waiter_stays(struct vpc_fault *s, uint32_t i)
{
    const struct vpc_waiter *w = &s->waiters[i];

    for (uint32_t j = 0; j < i; j++) {
        const struct vpc_waiter *o = &s->waiters[j];
        if (o->client == w->client && o->thread == w->thread && o->address == w->address && o->block == w->block) {
            s->clients[w->client]->stats.repeated++;
            waiter_drop(s, i, now_ns());
            return 1;
        }
    }
    return 0;
}

/* Waiter i cannot be answered now. */
static int waiter_later(struct vpc_fault *s, uint32_t i)
{
    if (s->waiters[i].way != WAY_AGAIN)
        s->stats.shortages++;
    s->waiters[i].way = WAY_AGAIN;
    s->again = 1;
    return waiter_stays(s, i);
}

/* A page arrived, and its client was woken and has returned: the file has a hole there. */
static int fill_hole(struct vpc_block *b, const struct client *c, const struct vpc_waiter *w)
{
    if (b->local) /* it was answered to a client that had mapped something else there */
        return vpc_local_place(b, w->page);
    return c->fd >= 0 ? vpc_local_zero(b, c->fd, w->address) : 0;
}

/* Set a client's bit of a page; returns what it was. */
static int mark(uint64_t *bits, uint64_t bit)
{
    uint64_t mask = (uint64_t)1 << (bit & 63), was = bits[bit >> 6] & mask;

    bits[bit >> 6] |= mask;
    return was != 0;
}

/* The page of a waiter lies ready here. As vpc_waiter_resolve; -ENOENT: it has to be requested after all. */
static int answer_here(struct vpc_fault *s, struct vpc_block *b, uint32_t i)
{
    struct vpc_waiter *w = &s->waiters[i];
    const struct client *c = s->clients[w->client];
    int rc = c->fd >= 0 ? vpc_local_answer(b, w->page, c->fd, w->address) : -ENOENT;

    if (rc == 0) {
        w->way = VPC_WAY_LOCAL;
        bit_set(b, VPC_BITS_RECEIVED, w->page);
        waiter_done(s, i);
        return 1;
    }
    if (rc != -EAGAIN && rc != -EEXIST && !vpc_no_memory(b, w->page, rc))
        rc = vpc_local_place(b, w->page);
    if (rc == 0) {
        w->way = VPC_WAY_LOCAL;
        bit_set(b, VPC_BITS_RECEIVED, w->page);
        waiter_wake(s, i);
        return 1;
    }
    if (rc == -EAGAIN || vpc_no_memory(b, w->page, rc))
        return waiter_later(s, i);
    if (rc != -EEXIST)
        return -ENOENT;
    /* The loader places pages of such a block with the lock held: this one was made by somebody else. */
    s->born = 1;
    s->stats.born_block = w->block;
    s->stats.born_page = w->page;
    return waiter_stays(s, i);
}

/* Find the page of a waiter whose address is new to us, or that is tried again; request it or wake. */
int vpc_waiter_resolve(struct vpc_fault *s, uint32_t i)
{
    struct vpc_waiter *w = &s->waiters[i];
    struct client *c = s->clients[w->client];
    uint32_t low = 0, high = c->range_count;
    int fresh = w->way != WAY_AGAIN, rc;

    while (low < high) { /* the last range that begins at or before the address */
        uint32_t mid = (low + high) / 2;
        if (c->ranges[mid].base <= w->address)
            low = mid + 1;
        else
            high = mid;
    }
    if (low == 0 || w->address - c->ranges[low - 1].base >= c->ranges[low - 1].length) {
        w->block = -1;
        w->way = VPC_WAY_ASKED;
        return waiter_stays(s, i) ? 1 : -ENXIO;
    }
    const struct vpc_client_range *r = &c->ranges[low - 1];
    struct vpc_block *b = s->ram->blocks[r->block];
    uint64_t in_range = w->address - r->base;
    uint64_t bit = in_range >> b->shift;

    w->block = (int32_t)r->block;
    w->page = (r->offset + in_range) >> b->shift;
    w->address &= ~(b->page_size - 1);
    if (!mark(c->seen[low - 1], bit))
        c->stats.distinct++;
    /* The waiter is in the list: from here on the loader finds it. */
    if (bit_test(b, VPC_BITS_RECEIVED, w->page)) {
        if (fresh)
            c->stats.received_already++;
        /* Usually it arrived while the fault was in transit. */
        if (mark(c->seen[low - 1] + seen_words(b, r), bit)) {
            rc = fill_hole(b, c, w);
            if (rc == -EAGAIN || vpc_no_memory(b, w->page, rc))
                return waiter_later(s, i);
        }
        w->way = VPC_WAY_THERE;
        waiter_wake(s, i);
        return 1;
    }
    if (b->local && (rc = answer_here(s, b, i)) != -ENOENT)
        return rc;
    if (bit_set(b, VPC_BITS_REQUESTED, w->page)) {
        if (fresh)
            c->stats.requested_already++;
        w->way = VPC_WAY_JOINED;
        return waiter_stays(s, i);
    }
    if (vpc_outbox_request(s, w->block, w->page) < 0) {
        bit_clear(b, VPC_BITS_REQUESTED, w->page);
        return waiter_later(s, i);
    }
    w->way = VPC_WAY_ASKED;
    return 0;
}

void vpc_waiters_again(struct vpc_fault *s)
{
    s->again = 0;
    if (s->ask_again)
        s->again = s->ask_again = vpc_outbox_ask_again(s) < 0;
    for (uint32_t i = 0; i < s->waiter_count;) {
        if (s->waiters[i].way == WAY_AGAIN && vpc_waiter_resolve(s, i) == 1)
            continue;
        i++;
    }
}

int vpc_waiters_room(struct vpc_fault *s)
{
    uint32_t room = s->waiter_room ? s->waiter_room * 2 : 4 * EVENTS_A_READ;

    if (s->waiter_room - s->waiter_count >= EVENTS_A_READ)
        return 0;
    struct vpc_waiter *more = realloc(s->waiters, room * sizeof *more);
    if (!more)
        return -ENOMEM;
    s->waiters = more;
    s->waiter_room = room;
    return 0;
}

uint32_t vpc_waiter_add(struct vpc_fault *s, int client, const struct vpc_uffd_event *ev, uint64_t when)
{
    s->waiters[s->waiter_count] = (struct vpc_waiter){
        .address = ev->address, .since_ns = when, .client = client, .block = -1, .thread = ev->thread};
    vpc_blocked_begin(s, &s->waiters[s->waiter_count]);
    return s->waiter_count++;
}

static int range_order(const void *a, const void *b)
{
    const struct vpc_client_range *x = a, *y = b;
    return x->base < y->base ? -1 : x->base > y->base;
}

int vpc_fault_set_ranges(struct vpc_fault *s, int id, const struct vpc_client_range *ranges, uint32_t count)
{
    struct client fresh = {.range_count = count};
    struct client *c;
    int rc = -ENOMEM;

    fresh.ranges = calloc(count ? count : 1, sizeof *fresh.ranges);
    fresh.seen = calloc(count ? count : 1, sizeof *fresh.seen);
    if (!fresh.ranges || !fresh.seen) {
        fresh.range_count = 0;
        goto fail;
    }
    if (count)
        memcpy(fresh.ranges, ranges, count * sizeof *ranges);
    qsort(fresh.ranges, count, sizeof *fresh.ranges, range_order);
    for (uint32_t i = 0; i < count; i++) {
        struct vpc_client_range *r = &fresh.ranges[i];
        struct vpc_block *b = r->block <= INT32_MAX ? ram_block(s->ram, (int)r->block) : NULL;
        rc = -EINVAL;
        if (!b || r->length == 0 || ((r->base | r->length | r->offset) & (b->page_size - 1)))
            goto fail;
        if (r->offset > b->length || r->length > b->length - r->offset || r->base + r->length < r->base)
            goto fail;
        if (i && r->base - fresh.ranges[i - 1].base < fresh.ranges[i - 1].length)
            goto fail;
        fresh.seen[i] = calloc(2 * seen_words(b, r), sizeof(uint64_t));
        rc = -ENOMEM;
        if (!fresh.seen[i])
            goto fail;
    }
    pthread_mutex_lock(&s->lock);
    c = vpc_client_of(s, id);
    if (!c || c->fd < 0) {
        pthread_mutex_unlock(&s->lock);
        rc = -ENOENT;
        goto fail;
    }
    ranges_free(c);
    c->ranges = fresh.ranges;
    c->seen = fresh.seen;
    c->range_count = count;
    for (uint32_t i = 0; i < s->waiter_count;) {
        if (s->waiters[i].client == id && s->waiters[i].block < 0 && vpc_waiter_resolve(s, i) == 1)
            continue;
        i++;
    }
    pthread_mutex_unlock(&s->lock);
    vpc_fault_kick(s); /* requests may wait in the outbox */
    return 0;
fail:
    ranges_free(&fresh);
    return rc;
}

int vpc_fault_remove_client(struct vpc_fault *s, int id)
{
    pthread_mutex_lock(&s->lock);
    struct client *c = vpc_client_of(s, id);
    int fd = c ? c->fd : -1;
    if (fd >= 0) {
        vpc_fault_unwatch(s, fd);
        c->fd = -1;
        c->stats.alive = 0;
        for (uint32_t i = 0; i < s->waiter_count;) {
            if (s->waiters[i].client == id)
                waiter_drop(s, i, now_ns());
            else
                i++;
        }
        vpc_blocked_join(s, &c->party, 0);
    }
    pthread_mutex_unlock(&s->lock);
    if (fd < 0)
        return -ENOENT;
    close(fd); /* the loop reads only what is in the list, under the lock */
    return 0;
}

int vpc_fault_settle(struct vpc_fault *s)
{
    pthread_mutex_lock(&s->lock);
    for (int block = 0; block < s->ram->count; block++)
        vpc_ram_set_bits(s->ram, block, VPC_BITS_RECEIVED, 0, s->ram->blocks[block]->pages, 1);
    for (uint32_t i = 0; i < s->waiter_count;) {
        if (s->waiters[i].block >= 0)
            waiter_wake(s, i);
        else
            i++;
    }
    pthread_mutex_unlock(&s->lock);
    return 0;
}

void vpc_fault_placed(struct vpc_fault *s, int block, uint64_t first, uint64_t count)
{
    struct vpc_block *b = s->ram->blocks[block];

    for (uint64_t page = first; page < first + count; page++)
        bit_set(b, VPC_BITS_RECEIVED, page);
    pthread_mutex_lock(&s->lock);
    for (uint32_t i = 0; i < s->waiter_count;) {
        struct vpc_waiter *w = &s->waiters[i];
        if (w->block == block && w->page - first < count)
            waiter_wake(s, i);
        else
            i++;
    }
    pthread_mutex_unlock(&s->lock);
}

void vpc_fault_lock(struct vpc_fault *s)
{
    pthread_mutex_lock(&s->lock);
}

void vpc_fault_unlock(struct vpc_fault *s)
{
    pthread_mutex_unlock(&s->lock);
}
