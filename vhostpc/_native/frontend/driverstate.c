/*
 * A driver's state for another process: numbers, free slots, and the record of received frames.
 *
 * Big-endian, all of it in the caller's private buffer. A state to be loaded was made elsewhere and may be hostile: it
 * is checked as a whole before the driver changes, and no number in it becomes an index unchecked.
 */
#define _GNU_SOURCE
#include "bytes.h"
#include "frontend/driver_internal.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

#define MOST_HOLES 65536u

/* num, slots; avail, kicked, used; next number; posted, completed, kicks, calls, bad_used; frames, bytes, bad,
 * duplicates, reordered, next; free slots, holes. */
#define HEAD (2 * 4 + 3 * 2 + 8 + 5 * 8 + 6 * 8 + 2 * 4)

static int is_seen(const struct vpc_frames *f, uint64_t number)
{
    return number < f->room && f->seen[number >> 6] >> (number & 63) & 1;
}

uint64_t vpc_driver_unseen(struct vpc_driver *d, uint64_t first, uint64_t end)
{
    uint64_t count = 0;

    pthread_mutex_lock(&d->frames.lock);
    for (uint64_t n = first; n < end; n++) {
        if ((n & 63) == 0 && end - n >= 64) {
            uint64_t word = n < d->frames.room ? d->frames.seen[n >> 6] : 0;
            count += 64 - (uint64_t)__builtin_popcountll(word);
            n += 63;
        } else {
            count += !is_seen(&d->frames, n);
        }
    }
    pthread_mutex_unlock(&d->frames.lock);
    return count;
}

/* The newest holes, at most MOST_HOLES: *from is the lowest number from which on all are listed. */
static uint32_t holes(struct vpc_driver *d, uint64_t *from)
{
    uint32_t count = 0;
    uint64_t n = d->frames.stats.next;

    while (n > 0 && count < MOST_HOLES) {
        if ((n & 63) == 0 && d->frames.seen[(n >> 6) - 1] == ~(uint64_t)0) {
            n -= 64;
            continue;
        }
        n--;
        count += !is_seen(&d->frames, n);
    }
    *from = n;
    return count;
}

int64_t vpc_driver_save(struct vpc_driver *d, unsigned char *data, uint64_t room)
{
    uint64_t from;
    uint32_t count = holes(d, &from);
    uint64_t size = HEAD + 4 * (uint64_t)d->free_count + 4 * (uint64_t)count;
    unsigned char *p = data;
    const struct vpc_frame_stats *f = &d->frames.stats;
    const uint64_t wide[] = {d->next_number,      d->stats.posted, d->stats.completed, d->stats.kicks,
                             d->stats.calls,      d->stats.bad_used, f->frames,        f->bytes,
                             f->bad,              f->duplicates,   f->reordered,       f->next};

    if (room < size)
        return (int64_t)size;
    put_be(p, d->c.num, 4), p += 4;
    put_be(p, d->c.slots, 4), p += 4;
    put_be(p, d->avail_idx, 2), p += 2;
    put_be(p, d->kicked_idx, 2), p += 2;
    put_be(p, d->used_idx, 2), p += 2;
    for (size_t i = 0; i < sizeof wide / sizeof *wide; i++, p += 8)
        put_be(p, wide[i], 8);
    put_be(p, d->free_count, 4), p += 4;
    put_be(p, count, 4), p += 4;
    for (uint32_t i = 0; i < d->free_count; i++, p += 4)
        put_be(p, d->free_slots[(d->free_head + i) % d->c.slots], 4);
    for (uint64_t n = from; n < f->next; n++) {
        if ((n & 63) == 0 && d->frames.seen[n >> 6] == ~(uint64_t)0) {
            n += 63;
            continue;
        }
        if (!is_seen(&d->frames, n)) {
            put_be(p, n, 4);
            p += 4;
        }
    }
    return (int64_t)size;
}

/* Make the record: all numbers below next were seen except the holes, which ascend. */
static int load_book(uint64_t **seen, uint64_t *room, const unsigned char *p, uint32_t count, uint64_t next)
{
    uint64_t wanted = 1 << 16, last = 0;

    while (wanted <= next)
        wanted *= 2;
    uint64_t *book = calloc(wanted / 64, sizeof *book);
    if (!book)
        return -ENOMEM;
    memset(book, 0xff, next / 64 * 8);
    if (next & 63)
        book[next >> 6] = ((uint64_t)1 << (next & 63)) - 1;
    for (uint32_t i = 0; i < count; i++, p += 4) {
        uint64_t n = get_be(p, 4);
        if (n >= next || (i && n <= last)) {
            free(book);
            return -EBADMSG;
        }
        book[n >> 6] &= ~((uint64_t)1 << (n & 63));
        last = n;
    }
    *seen = book;
    *room = wanted;
    return 0;
}

int vpc_driver_load(struct vpc_driver *d, const unsigned char *data, uint64_t length)
{
    const unsigned char *p = data;
    uint16_t avail, kicked, used;
    uint64_t wide[12], *seen, room;

    if (length < HEAD)
        return -EBADMSG;
    if (get_be(p, 4) != d->c.num || get_be(p + 4, 4) != d->c.slots)
        return -EINVAL;
    avail = (uint16_t)get_be(p + 8, 2);
    kicked = (uint16_t)get_be(p + 10, 2);
    used = (uint16_t)get_be(p + 12, 2);
    p += 14;
    for (size_t i = 0; i < 12; i++, p += 8)
        wide[i] = get_be(p, 8);
    uint32_t free_count = (uint32_t)get_be(p, 4), count = (uint32_t)get_be(p + 4, 4);
    p += 8;
    uint64_t frames = wide[6], next = wide[11];
    if (free_count > d->c.slots || count > MOST_HOLES || next > VPC_FRAME_NUMBERS ||
        length != HEAD + 4 * (uint64_t)free_count + 4 * (uint64_t)count)
        return -EBADMSG;
    if ((uint16_t)(avail - used) > d->c.slots - free_count || (uint16_t)(avail - kicked) > d->c.num ||
        frames > next || frames + count > next)
        return -EBADMSG;
    unsigned char *flying = malloc(d->c.slots);
    if (!flying)
        return -ENOMEM;
    memset(flying, 1, d->c.slots);
    int rc = 0;
    for (uint32_t i = 0; i < free_count && !rc; i++) {
        uint64_t slot = get_be(p + 4 * i, 4);
        if (slot >= d->c.slots || !flying[slot])
            rc = -EBADMSG;
        else
            flying[slot] = 0;
    }
    if (!rc)
        rc = load_book(&seen, &room, p + 4 * (size_t)free_count, count, next);
    if (rc) {
        free(flying);
        return rc;
    }
    for (uint32_t i = 0; i < free_count; i++)
        d->free_slots[i] = (uint32_t)get_be(p + 4 * i, 4);
    d->free_head = 0;
    d->free_count = free_count;
    free(d->in_flight);
    d->in_flight = flying;
    d->avail_idx = avail;
    d->kicked_idx = kicked;
    d->used_idx = used;
    d->next_number = wide[0];
    d->stats = (struct vpc_driver_stats){
        .posted = wide[1], .completed = wide[2], .kicks = wide[3], .calls = wide[4], .bad_used = wide[5]};
    d->frames.stats = (struct vpc_frame_stats){.frames = frames,
                                               .bytes = wide[7],
                                               .bad = wide[8],
                                               .duplicates = wide[9],
                                               .reordered = wide[10],
                                               .next = next};
    free(d->frames.seen);
    d->frames.seen = seen;
    d->frames.room = room;
    return 0;
}

int vpc_driver_look(struct vpc_driver *d)
{
    unsigned char *used = driver_at(d, d->c.used, 6 + 8 * (uint64_t)d->c.num);
    uint16_t there;

    if (!used)
        return -EFAULT;
    there = __atomic_load_n((uint16_t *)(void *)(used + 2), __ATOMIC_ACQUIRE);
    if (ram_lost(d->ram))
        return -EOWNERDEAD;
    there = (uint16_t)(there - d->used_idx);
    return there > (uint16_t)(d->avail_idx - d->used_idx) ? -EBADMSG : there;
}
