/* The next dirty page of the RAM blocks to send, and when the background may send one. */
#define _GNU_SOURCE
#include "clock.h"
#include "pages/save_internal.h"

#include <errno.h>
#include <stdlib.h>

int vpc_scan_new(struct vpc_ram *ram, uint64_t background_rate, struct vpc_scan **out)
{
    struct vpc_scan *scan = calloc(1, sizeof *scan);

    if (!scan)
        return -ENOMEM;
    scan->ram = ram;
    atomic_store(&scan->rate, background_rate);
    *out = scan;
    return 0;
}

void vpc_scan_free(struct vpc_scan *scan)
{
    free(scan);
}

int vpc_scan_set_rate(struct vpc_scan *scan, uint64_t background_rate)
{
    atomic_store(&scan->rate, background_rate);
    return 0;
}

int vpc_scan_withhold_all(struct vpc_scan *scan, int on)
{
    atomic_store(&scan->withhold_all, on != 0);
    return 0;
}

int vpc_scan_keep_zeros(struct vpc_scan *scan, int on)
{
    scan->keep_zeros = on != 0;
    return 0;
}

int vpc_scan_stats(struct vpc_scan *scan, struct vpc_scan_stats *out)
{
    /* Of another thread: each number is whole, their sum may be of two moments. */
    const struct vpc_scan_stats *n = &scan->stats;
#define OF(field) .field = __atomic_load_n(&n->field, __ATOMIC_RELAXED)
    *out = (struct vpc_scan_stats){OF(data_pages), OF(zero_pages), OF(requested_pages), OF(background_pages),
                                   OF(dirty_left)};
#undef OF
    return 0;
}

/* The scan goes on behind a page. */
static int claim_and_go_on(struct vpc_scan *scan, struct host_page page)
{
    if (!vpc_left_claim(scan, page))
        return 0;
    atomic_store_explicit(&scan->place, place_behind(page), memory_order_relaxed);
    return 1;
}

int vpc_scan_take(struct vpc_scan *scan, struct host_page page)
{
    if (!claim_and_go_on(scan, page))
        return 0;
    vpc_near_tell(&scan->near, page);
    return 1;
}

void vpc_scan_forget(struct vpc_scan *scan)
{
    vpc_near_forget(&scan->near);
}

struct host_page vpc_scan_next(struct vpc_scan *scan)
{
    struct vpc_ram *ram = scan->ram;
    struct host_page page = vpc_near_next(scan);

    if (page.block >= 0)
        return page;
    page = page_at(atomic_load_explicit(&scan->place, memory_order_relaxed));
    for (int step = 0; step <= ram->count; step++) {
        uint64_t end = ram->blocks[page.block]->pages;

        while ((page.number = vpc_left_up(scan, page.block, page.number, end)) < end) {
            if (claim_and_go_on(scan, page))
                return page;
            page.number++; /* another writer was faster */
        }
        page.block = (page.block + 1) % ram->count;
        page.number = 0;
    }
    return (struct host_page){-1, 0};
}

static void refill_credit(struct vpc_scan *scan, uint64_t rate)
{
    uint64_t now = now_ns(), passed = now - scan->credit_time;
    int64_t most = (int64_t)(rate / 20 + 2 * TARGET_PAGE);

    scan->credit_time = now;
    if (passed > 1000000000u)
        passed = 1000000000u;
    /* Nanoseconds times bytes a second fits up to 18 GB/s; above that there is no limit. */
    scan->credit += rate > 18000000000u ? most : (int64_t)(passed * rate / 1000000000u);
    if (scan->credit > most)
        scan->credit = most;
}

int vpc_scan_due(struct vpc_scan *scan, uint64_t rate)
{
    if (rate == VPC_RATE_UNLIMITED)
        return 0;
    refill_credit(scan, rate);
    if (scan->credit >= (int64_t)TARGET_PAGE)
        return 0;
    uint64_t ms = (uint64_t)(TARGET_PAGE - scan->credit) * 1000 / rate + 1;
    return ms > 1000 ? 1000 : (int)ms;
}

void vpc_scan_begin(struct vpc_scan *scan)
{
    scan->credit_time = now_ns();
}

void vpc_scan_tell(struct vpc_scan *scan, struct vpc_scan_stats *made)
{
    save_tally(&scan->stats.data_pages, made->data_pages);
    save_tally(&scan->stats.zero_pages, made->zero_pages);
    save_tally(&scan->stats.requested_pages, made->requested_pages);
    save_tally(&scan->stats.background_pages, made->background_pages);
    *made = (struct vpc_scan_stats){0};
}

void vpc_scan_rewind(struct vpc_scan *scan)
{
    vpc_scan_forget(scan);
    atomic_store_explicit(&scan->place, 0, memory_order_relaxed);
}

void vpc_scan_recount(struct vpc_scan *scan)
{
    uint64_t sum = 0;

    for (int i = 0; i < scan->ram->count; i++)
        sum += (uint64_t)vpc_ram_count_bits(scan->ram, i, VPC_BITS_DIRTY);
    __atomic_store_n(&scan->stats.dirty_left, sum, __ATOMIC_RELAXED);
}
