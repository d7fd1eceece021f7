/* Touching guest memory: which of its pages are here, waiting for them, asking for them ahead. */
#define _GNU_SOURCE
#include <unistd.h>
#include "clock.h"
#include "memory/ahead_internal.h"
#include "memory/ask_internal.h"
#include "memory/gm_internal.h"

/* hugetlbfs can be asked only where that was prepared: elsewhere a touch that took longer counts as one that waited. */
#define WAITED_NS 50000
#define LOOK 1024 /* pages that are looked at when some are asked for */

static void count_wait(struct vpc_supply *s, uint64_t ns)
{
    atomic_fetch_add(&s->waits, 1);
    atomic_fetch_add(&s->total_ns, ns);
    uint_fast64_t old = atomic_load(&s->longest_ns);
    while (ns > old && !atomic_compare_exchange_weak(&s->longest_ns, &old, ns))
        ;
}

/* Is this page known to be here? Where that cannot be asked it counts as absent. */
static bool present(const struct vpc_map *m, uint64_t page)
{
    return vpc_ask_can(m) && vpc_ask_present(m, page);
}

/* Wait for a page that must not be touched before it is here. */
static int ask_until_here(struct vpc_map *m, uint64_t page, const atomic_int *stop)
{
    struct vpc_supply *s = m->supply;
    uint64_t start = now_ns();
    int rc = 0;

    atomic_fetch_add(&m->waiting, 1);
    /* Every page has arrived when the memory is calm again; one that nobody sent is empty then, as it is for all. */
    while (!vpc_supply_lost(s) && atomic_load_explicit(&m->armed, memory_order_acquire) && !vpc_ask_present(m, page)) {
        if (stop && atomic_load(stop)) {
            rc = -ECANCELED;
            break;
        }
        vpc_ask_pause(now_ns() - start, atomic_load_explicit(&m->waiting, memory_order_relaxed));
    }
    count_wait(s, now_ns() - start);
    atomic_fetch_sub(&m->waiting, 1);
    return vpc_supply_lost(s) ? -EOWNERDEAD : rc;
}

/* The one place where a thread of ours waits for a page by touching it. */
static int wait_for(struct vpc_map *m, uint64_t page)
{
    struct vpc_supply *s = m->supply;
    uint64_t start = now_ns(), took;

    /* Counted before lost is read: after failing, a thread that is not counted will not sleep. */
    atomic_fetch_add(&m->waiting, 1);
    if (!vpc_supply_lost(s)) {
        (void)*(volatile const uint8_t *)(m->base + page * m->page_size);
        took = now_ns() - start;
        if (vpc_ask_can(m) || took > WAITED_NS)
            count_wait(s, took);
    }
    atomic_fetch_sub(&m->waiting, 1);
    return vpc_supply_lost(s) ? -EOWNERDEAD : 0;
}

/* On a thread of vpc_ahead_request's. */
static void serve(struct vpc_map *m, uint64_t page, bool wanted)
{
    uint64_t bit = 1ull << (page % 64);

    if (!wanted)
        atomic_fetch_and(&m->requested[page / 64], ~bit);
    else if (atomic_load_explicit(&m->armed, memory_order_acquire) && wait_for(m, page) == 0)
        atomic_fetch_or_explicit(&m->seen[page / 64], bit, memory_order_relaxed);
    vpc_map_let_go(m);
}

/* Ask for one page. False: there is no room. */
static bool request_page(struct vpc_map *m, uint64_t page)
{
    uint64_t bit = 1ull << (page % 64);

    if (atomic_fetch_or(&m->requested[page / 64], bit) & bit)
        return true; /* by another thread, just now */
    vpc_map_hold(m);
    if (vpc_ahead_request(m->supply->ahead, serve, m, page))
        return true;
    vpc_map_let_go(m);
    atomic_fetch_and(&m->requested[page / 64], ~bit);
    return false;
}

bool vpc_request(const struct vpc_region *r, const uint8_t *p, uint64_t len, bool absent, const atomic_int *stop)
{
    struct vpc_map *m = r->map;
    struct vpc_supply *s = m->supply;

    if (!atomic_load_explicit(&m->armed, memory_order_acquire) || !len)
        return true;
    uint64_t page = (uint64_t)(p - m->base) / m->page_size, last = ((uint64_t)(p - m->base) + len - 1) / m->page_size;
    for (uint64_t end = page + LOOK; page <= last && page < end; page++, absent = false) {
        uint64_t bit = 1ull << (page % 64);

        if ((atomic_load_explicit(&m->seen[page / 64], memory_order_relaxed) |
             atomic_load_explicit(&m->requested[page / 64], memory_order_relaxed)) & bit)
            continue;
        if (!absent && present(m, page)) {
            atomic_fetch_or_explicit(&m->seen[page / 64], bit, memory_order_relaxed);
            continue;
        }
        if ((stop && atomic_load(stop)) || vpc_supply_lost(s) || s->no_fault || !request_page(m, page))
            return false;
    }
    return true;
}

bool vpc_gm_request(const struct vpc_gm *gm, uint64_t gpa, uint64_t len, const atomic_int *stop)
{
    while (len) {
        const struct vpc_region *r = vpc_gm_find(gm, gpa);
        if (!r)
            return false;
        uint64_t at = gpa - r->gpa, n = r->size - at < len ? r->size - at : len;
        if (!vpc_request(r, r->own + at, n, false, stop))
            return false;
        gpa += n;
        len -= n;
    }
    return true;
}

/* A page is absent, and a call may not wait for it: it is asked for, with those behind it. */
static int absent(const struct vpc_region *r, const uint8_t *p, uint64_t len, int flags, const atomic_int *stop)
{
    struct vpc_map *m = r->map;
    uint64_t page = (uint64_t)(p - m->base) / m->page_size;

    if (!(flags & VPC_REQUEST_NOTHING))
        (void)vpc_request(r, p, len, true, stop);
    return flags & VPC_TELL_REQUESTED && atomic_load(&m->requested[page / 64]) & 1ull << (page % 64) ? -EALREADY : -EAGAIN;
}

int vpc_touch_slow(const struct vpc_region *r, const uint8_t *p, uint64_t len, int flags, const atomic_int *stop)
{
    struct vpc_map *m = r->map;
    struct vpc_supply *s = m->supply;
    const uint8_t *end = p + len;
    uint64_t last, page = (uint64_t)(p - m->base) / m->page_size;

    if (!len)
        return 0;
    last = ((uint64_t)(p - m->base) + len - 1) / m->page_size;
    for (; page <= last; page++) {
        uint64_t bit = 1ull << (page % 64);

        if (atomic_load_explicit(&m->seen[page / 64], memory_order_relaxed) & bit)
            continue;
        if (stop && atomic_load(stop))
            return -ECANCELED;
        if (vpc_supply_lost(s))
            return -EOWNERDEAD;
        if (!present(m, page)) {
            const uint8_t *at = m->base + page * m->page_size, *next = at + m->page_size;

            if (flags & VPC_TRY)
                return absent(r, at, (uint64_t)(end - at), flags, stop);
            if (next < end)
                (void)vpc_request(r, next, (uint64_t)(end - next), false, stop);
            int rc = s->no_fault ? ask_until_here(m, page, stop) : wait_for(m, page);
            if (rc < 0)
                return rc;
        }
        /* A resident page stays so while armed: discards came before rings. */
        atomic_fetch_or_explicit(&m->seen[page / 64], bit, memory_order_relaxed);
    }
    return 0;
}

int vpc_gm_touch(const struct vpc_gm *gm, uint64_t gpa, uint64_t len, int flags, const atomic_int *stop)
{
    if (!atomic_load_explicit(&gm->supply->armed, memory_order_acquire))
        return 0; /* calm: no lookup is needed */
    while (len) {
        const struct vpc_region *r = vpc_gm_find(gm, gpa);
        if (!r)
            return -EFAULT;
        uint64_t at = gpa - r->gpa, n = r->size - at < len ? r->size - at : len;
        int rc = vpc_touch(r, r->own + at, n, flags, stop);
        if (rc < 0)
            return rc;
        gpa += n;
        len -= n;
    }
    return 0;
}
