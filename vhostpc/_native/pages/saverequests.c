/* The messages of a migration's destination to its source: page requests above all. Every message is checked before it
 * has any effect: the peer is hostile. */
#define _GNU_SOURCE
#include "event_internal.h"
#include "pages/save_internal.h"
#include "pages/vpc_load.h"

#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

int vpc_requests_init(struct requests *r, struct vpc_ram *ram, int fd, int notify)
{
    r->block = -1;
    r->notify = notify;
    r->fd = fd < 0 ? -1 : fcntl(fd, F_DUPFD_CLOEXEC, 0);
    if (fd >= 0 && r->fd < 0)
        return -errno;
    r->in = malloc(IN_ROOM);
    if (!r->in)
        return -ENOMEM;
    /* Requests on another connection mean nothing on this one. */
    for (int i = 0; i < ram->count; i++)
        vpc_ram_set_bits(ram, i, VPC_BITS_ASKED, 0, ram->blocks[i]->pages, 0);
    return 0;
}

void vpc_requests_move(struct requests *r, struct requests *to)
{
    free(to->in);
    *to = *r;
    /* Pages to be sent first were not requested: nobody waits for them at the end of the urgent connection. */
    to->head = to->tail = 0;
    r->fd = r->block = -1;
    r->in = NULL;
    r->end = 0;
    r->ask_count = 0;
    r->count = r->useless = r->withheld = r->withheld_ever = 0;
}

void vpc_requests_destroy(struct requests *r)
{
    if (r->fd >= 0)
        close(r->fd);
    free(r->in);
}

int vpc_requests_pull(struct requests *r)
{
    ssize_t n = read_now(r->fd, r->in + r->end, IN_ROOM - r->end);

    if (n < 0)
        return errno == EAGAIN || errno == EINTR ? 0 : -errno;
    if (n == 0)
        return VPC_SAVE_PEER_CLOSED;
    r->end += (size_t)n;
    return 0;
}

static int is_withheld(struct vpc_scan *scan, struct vpc_block *b, uint64_t page)
{
    return atomic_load(&scan->withhold_all) || bit_test(b, VPC_BITS_WITHHELD, page);
}

/* Move host pages of the current request to the queue, or note them as requested and withheld. */
static void spread_request(struct requests *r, struct vpc_scan *scan)
{
    struct vpc_block *b = scan->ram->blocks[r->ask_block];

    while (r->ask_count && r->tail - r->head < QUEUE) {
        uint64_t page = r->ask_page++;
        r->ask_count--;
        if (!bit_test(b, VPC_BITS_DIRTY, page)) {
            save_tally(&r->useless, 1);
        } else if (is_withheld(scan, b, page)) {
            if (!bit_set(b, VPC_BITS_ASKED, page)) {
                save_tally(&r->withheld, 1);
                save_tally(&r->withheld_ever, 1);
                event_poke(r->notify);
            }
        } else {
            r->queue[r->tail % QUEUE].block = r->ask_block;
            r->queue[r->tail++ % QUEUE].number = page;
        }
    }
}

/* The next call finds pages for which there is no room now, because their bits stay. */
void vpc_requests_look_at_withheld(struct requests *r, struct vpc_scan *scan)
{
    if (r->withheld == 0 || atomic_load(&scan->withhold_all))
        return;
    for (int i = 0; i < scan->ram->count; i++) {
        struct vpc_block *b = scan->ram->blocks[i];
        for (uint64_t word = 0; word < (b->pages + 63) / 64; word++) {
            uint64_t asked = atomic_load(&b->bits[VPC_BITS_ASKED][word]) &
                             ~atomic_load(&b->bits[VPC_BITS_WITHHELD][word]);
            for (; asked && r->tail - r->head < QUEUE; asked &= asked - 1) {
                uint64_t page = word * 64 + (uint64_t)__builtin_ctzll(asked);
                bit_clear(b, VPC_BITS_ASKED, page);
                save_tally(&r->withheld, (uint64_t)-1);
                r->queue[r->tail % QUEUE].block = i;
                r->queue[r->tail++ % QUEUE].number = page;
            }
        }
    }
}

void vpc_requests_first(struct requests *r, struct vpc_scan *scan, int block, uint64_t page)
{
    struct vpc_block *b = scan->ram->blocks[block];

    if (r->tail - r->head == QUEUE || !bit_test(b, VPC_BITS_DIRTY, page) || is_withheld(scan, b, page))
        return; /* it comes in its turn */
    r->queue[r->tail % QUEUE].block = block;
    r->queue[r->tail++ % QUEUE].number = page;
}

static int refuse(struct requests *r, int why)
{
    r->why = why;
    return -EBADMSG;
}

/* One whole message. 0, VPC_SAVE_SHUT or -EBADMSG. */
static int take_message(struct requests *r, struct vpc_scan *scan, unsigned type, const unsigned char *p, unsigned length)
{
    int block = r->block;

    switch (type) {
    case RP_SHUT:
        if (length != 4)
            return refuse(r, VPC_BAD_FLAGS);
        __atomic_store_n(&r->shut, (uint32_t)get_be(p, 4), __ATOMIC_RELAXED);
        return VPC_SAVE_SHUT;
    case RP_PONG:
        if (length != 4)
            return refuse(r, VPC_BAD_FLAGS);
        if (get_be(p, 4) < 32)
            __atomic_store_n(&r->pongs, r->pongs | 1u << get_be(p, 4), __ATOMIC_RELAXED);
        if (get_be(p, 4) == VPC_MUST_HEAR)
            __atomic_store_n(&r->heard, 1, __ATOMIC_RELAXED);
        return 0;
    case RP_REQ_PAGES_ID:
        if (length < 14 || p[12] == 0 || length != 13u + p[12])
            return refuse(r, VPC_BAD_NAME);
        block = vpc_ram_find(scan->ram, p + 13, p[12]);
        if (block < 0)
            return refuse(r, VPC_BAD_NAME);
        break;
    case RP_REQ_PAGES:
        if (length != 12)
            return refuse(r, VPC_BAD_FLAGS);
        if (block < 0)
            return refuse(r, VPC_BAD_NO_BLOCK);
        break;
    default:
        return refuse(r, VPC_BAD_FLAGS);
    }
    struct vpc_block *b = scan->ram->blocks[block];
    uint64_t start = get_be(p, 8), bytes = get_be(p + 8, 4);
    if (((start | bytes) & (TARGET_PAGE - 1)) || start > b->length || bytes > b->length - start)
        return refuse(r, VPC_BAD_OFFSET);
    if (r->whole && (bytes & (b->page_size - 1)))
        return refuse(r, VPC_BAD_PART);
    r->block = block;
    save_tally(&r->count, 1);
    if (bytes) {
        r->ask_block = block;
        r->ask_page = start >> b->shift;
        r->ask_count = ((start + bytes - 1) >> b->shift) - r->ask_page + 1;
        spread_request(r, scan);
    }
    return 0;
}

/* As long as the queue has room. */
int vpc_requests_parse(struct requests *r, struct vpc_scan *scan)
{
    size_t at = 0;
    int rc = 0;

    if (r->ask_count)
        spread_request(r, scan);
    while (rc == 0 && r->ask_count == 0 && r->end - at >= 4) {
        unsigned type = (unsigned)get_be(r->in + at, 2), length = (unsigned)get_be(r->in + at + 2, 2);
        if (length > RP_MAX_LEN)
            return refuse(r, VPC_BAD_FLAGS);
        if (r->end - at < 4 + length)
            break;
        rc = take_message(r, scan, type, r->in + at + 4, length);
        at += 4 + length;
    }
    if (at)
        memmove(r->in, r->in + at, r->end - at);
    r->end -= at;
    return rc;
}
