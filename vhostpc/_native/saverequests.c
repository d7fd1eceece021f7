/* What the destination of a migration says to its source: page requests above all. Every message is checked before
 * anything is done: the peer is hostile. */
#define _GNU_SOURCE
#include "save_internal.h"

#include <errno.h>
#include <string.h>

static int withheld(struct vpc_save *s, struct vpc_block *b, uint64_t page)
{
    return atomic_load(&s->hold_all) || bit_test(b, VPC_BITS_HELD, page);
}

/* Move host pages of the request in hand to the queue, or note them as asked for and withheld. */
static void spread_request(struct vpc_save *s)
{
    struct vpc_block *b = s->ram->blocks[s->ask_block];

    while (s->ask_count && s->tail - s->head < QUEUE) {
        uint64_t page = s->ask_page++;
        s->ask_count--;
        if (!bit_test(b, VPC_BITS_DIRTY, page)) {
            save_tally(&s->stats.useless, 1);
        } else if (withheld(s, b, page)) {
            if (!bit_set(b, VPC_BITS_ASKED, page)) {
                save_tally(&s->stats.held, 1);
                save_tally(&s->stats.held_ever, 1);
                vpc_save_poke(s->notify);
            }
        } else {
            s->queue[s->tail % QUEUE].block = s->ask_block;
            s->queue[s->tail++ % QUEUE].page = page;
        }
    }
}

/* What finds no room now is found by the next look, since its bit stays. */
void vpc_save_look_at_held(struct vpc_save *s)
{
    if (s->stats.held == 0 || atomic_load(&s->hold_all))
        return;
    for (int i = 0; i < s->ram->count; i++) {
        struct vpc_block *b = s->ram->blocks[i];
        for (uint64_t word = 0; word < (b->pages + 63) / 64; word++) {
            uint64_t asked = atomic_load(&b->bits[VPC_BITS_ASKED][word]) & ~atomic_load(&b->bits[VPC_BITS_HELD][word]);
            for (; asked && s->tail - s->head < QUEUE; asked &= asked - 1) {
                uint64_t page = word * 64 + (uint64_t)__builtin_ctzll(asked);
                bit_clear(b, VPC_BITS_ASKED, page);
                save_tally(&s->stats.held, (uint64_t)-1);
                s->queue[s->tail % QUEUE].block = i;
                s->queue[s->tail++ % QUEUE].page = page;
            }
        }
    }
}

static int refuse(struct vpc_save *s, int why)
{
    s->stats.why = why;
    return -EBADMSG;
}

/* One whole message. 0, VPC_SAVE_SHUT or -EBADMSG. */
static int take_message(struct vpc_save *s, unsigned type, const unsigned char *p, unsigned length)
{
    int block = s->rp_block;

    switch (type) {
    case RP_SHUT:
        if (length != 4)
            return refuse(s, VPC_BAD_FLAGS);
        __atomic_store_n(&s->stats.shut, (uint32_t)get_be(p, 4), __ATOMIC_RELAXED);
        return VPC_SAVE_SHUT;
    case RP_PONG:
        if (length != 4)
            return refuse(s, VPC_BAD_FLAGS);
        if (get_be(p, 4) < 32)
            __atomic_store_n(&s->stats.pongs, s->stats.pongs | 1u << get_be(p, 4), __ATOMIC_RELAXED);
        return 0;
    case RP_REQ_PAGES_ID:
        if (length < 14 || p[12] == 0 || length != 13u + p[12])
            return refuse(s, VPC_BAD_NAME);
        block = vpc_ram_find(s->ram, p + 13, p[12]);
        if (block < 0)
            return refuse(s, VPC_BAD_NAME);
        break;
    case RP_REQ_PAGES:
        if (length != 12)
            return refuse(s, VPC_BAD_FLAGS);
        if (block < 0)
            return refuse(s, VPC_BAD_NO_BLOCK);
        break;
    default:
        return refuse(s, VPC_BAD_FLAGS);
    }
    struct vpc_block *b = s->ram->blocks[block];
    uint64_t start = get_be(p, 8), bytes = get_be(p + 8, 4);
    if (((start | bytes) & (TARGET_PAGE - 1)) || start > b->length || bytes > b->length - start)
        return refuse(s, VPC_BAD_OFFSET);
    s->rp_block = block;
    save_tally(&s->stats.requests, 1);
    if (bytes) {
        s->ask_block = block;
        s->ask_page = start >> b->shift;
        s->ask_count = ((start + bytes - 1) >> b->shift) - s->ask_page + 1;
        spread_request(s);
    }
    return 0;
}

/* As long as the queue has room. */
int vpc_save_parse(struct vpc_save *s)
{
    size_t at = 0;
    int rc = 0;

    if (s->ask_count)
        spread_request(s);
    while (rc == 0 && s->ask_count == 0 && s->in_end - at >= 4) {
        unsigned type = (unsigned)get_be(s->in + at, 2), length = (unsigned)get_be(s->in + at + 2, 2);
        if (length > RP_MAX_LEN)
            return refuse(s, VPC_BAD_FLAGS);
        if (s->in_end - at < 4 + length)
            break;
        rc = take_message(s, type, s->in + at + 4, length);
        at += 4 + length;
    }
    memmove(s->in, s->in + at, s->in_end - at);
    s->in_end -= at;
    return rc;
}
