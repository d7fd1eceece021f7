/* Dirty pages of RAM blocks as records of the migration stream: what is asked for first, then the scan from there,
 * since who touches a page touches its neighbours next. */
#define _GNU_SOURCE
#include "save_internal.h"

#include <errno.h>
#include <string.h>
#include <unistd.h>

static int all_zero(const unsigned char *page)
{
    const uint64_t *w = (const uint64_t *)(const void *)page;

    for (unsigned i = 0; i < TARGET_PAGE / 8; i += 8)
        if (w[i] | w[i + 1] | w[i + 2] | w[i + 3] | w[i + 4] | w[i + 5] | w[i + 6] | w[i + 7])
            return 0;
    return 1;
}

/* Is the page a hole of the block's file? Then it is zero, and reading it through the mapping would make it. */
static int is_hole(struct vpc_save *s, int block, uint64_t target)
{
    struct vpc_block *b = s->ram->blocks[block];
    uint64_t at = b->fd_offset + (target << TARGET_SHIFT);

    if (b->page_size > TARGET_PAGE)
        return 0; /* hugetlbfs does not tell */
    if (s->extent_block != block || at < s->extent_begin || at >= s->extent_end) {
        off_t data = lseek(b->fd, (off_t)at, SEEK_DATA);

        if (data < 0 && errno != ENXIO)
            return 0;
        int follows = s->extent_block == block && !s->extent_hole && at == s->extent_end;
        s->extent_hole = data != (off_t)at;
        /* Where data ends is not asked: SEEK_HOLE walks over all of it. The longer it was, the longer it may be. */
        uint64_t step = follows ? 2 * (s->extent_end - s->extent_begin) : TARGET_PAGE;
        step = step < DATA_STEP_MOST ? step : DATA_STEP_MOST;
        s->extent_block = block;
        s->extent_begin = at;
        s->extent_end = !s->extent_hole ? at + step : data < 0 ? UINT64_MAX : (uint64_t)data;
    }
    return s->extent_hole;
}

/* Append records of the host page in hand while there is room. */
static void emit(struct vpc_save *s)
{
    struct vpc_block *b = s->ram->blocks[s->now_block];
    size_t before = s->out_end;

    while (s->now_left && OUT_ROOM - s->out_end >= RECORD_MAX) {
        const unsigned char *page = b->map + (s->now_target << TARGET_SHIFT);
        unsigned char *p = s->out + s->out_end;
        unsigned flags = s->out_block == s->now_block ? REC_CONTINUE : 0;
        int zero = !s->keep_zeros && (is_hole(s, s->now_block, s->now_target) || all_zero(page));

        put_be(p, s->now_target << TARGET_SHIFT | flags | (zero ? REC_ZERO : REC_PAGE), 8);
        p += 8;
        if (!flags) {
            *p++ = (unsigned char)b->name_len;
            memcpy(p, b->name, b->name_len);
            p += b->name_len;
        }
        if (zero) {
            *p++ = 0;
            save_tally(&s->stats.zero_pages, 1);
        } else {
            memcpy(p, page, TARGET_PAGE);
            p += TARGET_PAGE;
            save_tally(&s->stats.data_pages, 1);
        }
        s->out_end = (size_t)(p - s->out);
        s->out_block = s->now_block;
        s->now_target++;
        s->now_left--;
    }
    if (s->now_background)
        s->credit -= (int64_t)(s->out_end - before);
    if (s->now_left == 0)
        s->now_block = -1;
}

/* Take a host page in hand, unless it was sent before. Its bit is cleared now: it goes out once. */
static int begin_page(struct vpc_save *s, int block, uint64_t page)
{
    struct vpc_block *b = s->ram->blocks[block];

    if (!bit_clear(b, VPC_BITS_DIRTY, page))
        return 0;
    save_tally(&s->stats.dirty_left, (uint64_t)-1);
    s->now_block = block;
    s->now_background = 0;
    s->now_target = page << (b->shift - TARGET_SHIFT);
    s->now_left = b->page_size >> TARGET_SHIFT;
    s->scan_block = block;
    s->scan_page = page + 1;
    return 1;
}

/* The next dirty page that is not withheld, from where the scan stands, once around. */
static int scan(struct vpc_save *s)
{
    for (int step = 0; step <= s->ram->count; step++) {
        struct vpc_block *b = s->ram->blocks[s->scan_block];
        uint64_t page = s->scan_page;

        while (page < b->pages) {
            uint64_t word = atomic_load(&b->bits[VPC_BITS_DIRTY][page >> 6]) &
                            ~atomic_load(&b->bits[VPC_BITS_HELD][page >> 6]);
            word &= ~(uint64_t)0 << (page & 63);
            if (word) {
                page = (page & ~(uint64_t)63) + (uint64_t)__builtin_ctzll(word);
                return begin_page(s, s->scan_block, page);
            }
            page = (page | 63) + 1;
        }
        s->scan_block = (s->scan_block + 1) % s->ram->count;
        s->scan_page = 0;
    }
    return 0;
}

static void refill_credit(struct vpc_save *s, uint64_t rate)
{
    uint64_t now = now_ns(), passed = now - s->credit_time;
    int64_t most = (int64_t)(rate / 20 + 2 * TARGET_PAGE);

    s->credit_time = now;
    if (passed > 1000000000u)
        passed = 1000000000u;
    /* Nanoseconds times bytes a second fits up to 18 GB/s; above that the limit is none. */
    s->credit += rate > 18000000000u ? most : (int64_t)(passed * rate / 1000000000u);
    if (s->credit > most)
        s->credit = most;
}

int vpc_save_produce(struct vpc_save *s, uint64_t rate)
{
    for (;;) {
        if (s->now_block >= 0)
            emit(s);
        if (s->now_block >= 0 || OUT_ROOM - s->out_end < RECORD_MAX)
            return PRODUCE_ROOM;
        if (s->head != s->tail) {
            int block = s->queue[s->head % QUEUE].block;
            uint64_t page = s->queue[s->head++ % QUEUE].page;
            if (begin_page(s, block, page))
                save_tally(&s->stats.requested_pages, 1);
            else
                save_tally(&s->stats.useless, 1);
            continue;
        }
        if (s->ask_count)
            return PRODUCE_ROOM;
        if (rate == 0 || atomic_load(&s->hold_all) || s->stats.dirty_left == 0)
            return PRODUCE_NOTHING;
        /* Only a little of the background at a time: a request must not wait behind much of it. */
        if (s->out_end - s->out_begin > OUT_ROOM / 2)
            return PRODUCE_ROOM;
        if (rate != VPC_RATE_UNLIMITED) {
            refill_credit(s, rate);
            if (s->credit < (int64_t)TARGET_PAGE) {
                uint64_t ms = (uint64_t)(TARGET_PAGE - s->credit) * 1000 / rate + 1;
                return ms > 1000 ? 1000 : (int)ms;
            }
        }
        if (!scan(s))
            return PRODUCE_NOTHING;
        save_tally(&s->stats.background_pages, 1);
        s->now_background = 1;
    }
}

uint64_t vpc_save_count_dirty(struct vpc_save *s)
{
    uint64_t sum = 0;
    for (int i = 0; i < s->ram->count; i++)
        sum += (uint64_t)vpc_ram_count_bits(s->ram, i, VPC_BITS_DIRTY);
    return sum;
}
