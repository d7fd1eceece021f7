/* The background's order: pages near those that were requested go first.
 *
 * A thread that touches a page touches its neighbours next, in both directions and not all at once. So each request
 * begins a group of pages around it at each of a few sizes, aligned as a kernel's allocator aligns what it gives out
 * together. The rest of the smallest groups goes first, the newest group before older ones, then that of the next size.
 * (bench/prefetch.py compares this with other orders.)
 */
#define _GNU_SOURCE
#include "pages/save_internal.h"

#include <string.h>

static const uint64_t SIZES[NEAR_SIZES] = {64u << 10, 256u << 10, 1u << 20, 4u << 20}; /* bytes */

void vpc_near_tell(struct near *n, struct host_page page)
{
    uint64_t number = atomic_fetch_add_explicit(&n->told_count, 1, memory_order_relaxed);

    atomic_store_explicit(&n->told[number % NEAR_TOLD], place_behind(page), memory_order_release);
}

void vpc_near_forget(struct near *n)
{
    atomic_store(&n->told_from, atomic_load(&n->told_count));
}

static void begin_group(struct near_groups *of, struct near_group group)
{
    unsigned at = 0;

    while (at < of->count && (of->list[at].block != group.block || of->list[at].begin != group.begin))
        at++;
    if (at == NEAR_GROUPS)
        at = 0; /* the oldest one gives way */
    if (at < of->count)
        memmove(of->list + at, of->list + at + 1, (--of->count - at) * sizeof *of->list);
    of->list[of->count++] = group;
}

static void note(struct vpc_scan *scan, struct host_page page)
{
    const struct vpc_block *b = scan->ram->blocks[page.block];

    for (int i = 0; i < NEAR_SIZES; i++) {
        uint64_t pages = SIZES[i] >> b->shift;
        if (pages < 2)
            continue;
        uint64_t begin = page.number & ~(pages - 1), end = begin + pages;
        begin_group(&scan->near.sizes[i],
                    (struct near_group){page.block, begin, end < b->pages ? end : b->pages, page.number, page.number + 1});
    }
}

/* What was told since the last time. Where that is more than is kept, the oldest are lost. */
static void listen_to(struct vpc_scan *scan)
{
    struct near *n = &scan->near;
    uint64_t count = atomic_load_explicit(&n->told_count, memory_order_acquire);
    uint64_t from = atomic_load_explicit(&n->told_from, memory_order_relaxed);

    if (from != n->forgotten) {
        for (int i = 0; i < NEAR_SIZES; i++)
            n->sizes[i].count = 0;
        n->forgotten = from;
        n->heard = from;
    }
    if (count - n->heard > NEAR_TOLD)
        n->heard = count - NEAR_TOLD;
    for (; n->heard < count; n->heard++) {
        uint64_t place = atomic_load_explicit(&n->told[n->heard % NEAR_TOLD], memory_order_acquire);
        if (place) { /* otherwise another thread has counted it and not stored it yet */
            struct host_page page = page_at(place);
            page.number--;
            note(scan, page);
        }
    }
}

struct host_page vpc_near_next(struct vpc_scan *scan)
{
    if (!atomic_load_explicit(&scan->near.told_count, memory_order_relaxed))
        return (struct host_page){-1, 0}; /* precopy: nothing was ever requested */
    listen_to(scan);
    for (int i = 0; i < NEAR_SIZES; i++) {
        struct near_groups *of = &scan->near.sizes[i];
        while (of->count) {
            struct near_group *g = &of->list[of->count - 1];
            struct host_page page = {g->block, vpc_left_up(scan, g->block, g->up, g->end)};
            g->up = page.number < g->end ? page.number + 1 : g->end;
            if (page.number == g->end) {
                page.number = vpc_left_down(scan, g->block, g->begin, g->down);
                if (page.number == g->down) {
                    of->count--;
                    continue;
                }
                g->down = page.number;
            }
            if (vpc_left_claim(scan, page))
                return page;
        }
    }
    return (struct host_page){-1, 0};
}
