/* Guest memory: mappings, the table of regions, translation, copies. See vpc_gm.h and gm_internal.h. */
#define _GNU_SOURCE
#include <fcntl.h>
#include <linux/userfaultfd.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <unistd.h>
#include "memory/gm_internal.h"
#include "memory/ask_internal.h"
#include "memory/replace_internal.h"
#include "memory/supply_internal.h"

int vpc_map_new(struct vpc_supply *s, int fd, uint64_t offset, uint64_t size, int armed, struct vpc_map **out)
{
    uint32_t kind;
    uint64_t page, file_size, end, map_end;
    int rc = vpc_fd_kind(fd, &kind, &page, &file_size);

    if (rc < 0)
        return rc;
    /* A part of a page serves like any memory, but is not registered: nobody migrates such a region. */
    if (size == 0 || __builtin_add_overflow(offset, size, &end) || end > INT64_MAX ||
        (armed && (offset | size) % TARGET_PAGE))
        return -EINVAL;
    if (end > file_size)
        return -EFBIG;
    if (armed && kind == VPC_KIND_OTHER)
        return -EOPNOTSUPP;

    vpc_replace_reserve();
    struct vpc_map *m = calloc(1, sizeof(*m));
    if (!m)
        return -ENOMEM;
    map_end = (end + page - 1) & ~(page - 1);
    m->file_off = offset & ~(page - 1);
    m->skip = offset - m->file_off;
    m->len = map_end - m->file_off;
    m->page_size = page;
    m->kind = kind;
    m->ufd = -1;
    atomic_init(&m->refs, 1);
    atomic_init(&m->armed, armed != 0);
    m->fd = fcntl(fd, F_DUPFD_CLOEXEC, 3);
    if (m->fd < 0) {
        rc = -errno;
        free(m);
        return rc;
    }
    if (armed) {
        m->seen = calloc((m->len / page + 63) / 64, sizeof(*m->seen));
        m->requested = calloc((m->len / page + 63) / 64, sizeof(*m->requested));
        if (!m->seen || !m->requested) {
            rc = -ENOMEM;
            goto fail;
        }
    }
    int prot = armed ? PROT_NONE : PROT_READ | PROT_WRITE;
    void *p = mmap(NULL, m->len, prot, MAP_SHARED | MAP_NORESERVE, m->fd, (off_t)m->file_off);
    if (p == MAP_FAILED) {
        rc = -errno;
        goto fail;
    }
    m->base = p;
    /* A child that touches missing pages sees holes; a core dump would touch them all. */
    (void)madvise(p, m->len, MADV_DONTFORK);
    (void)madvise(p, m->len, MADV_DONTDUMP);
    m->guarded = vpc_guard_add(&(struct vpc_guard_range){.supply = s, .base = (uintptr_t)p, .len = m->len, .page = page,
                                                         .file_off = m->file_off, .fd = m->fd, .kind = kind});
    if (!m->guarded) {
        munmap(p, m->len);
        rc = -ENOMEM;
        goto fail;
    }
    m->supply = s;
    rc = armed ? vpc_ask_open(m) : 0;
    if (rc < 0) {
        vpc_guard_remove(m->guarded);
        munmap(p, m->len);
        goto fail;
    }
    vpc_supply_ref(s);
    vpc_supply_link(s, m);
    *out = m;
    return 0;
fail:
    free(m->seen);
    free(m->requested);
    close(m->fd);
    free(m);
    return rc;
}

static void map_free(struct vpc_map *m)
{
    /* Off the list first: vpc_supply_fail must not map over an address that is no longer ours. */
    vpc_supply_unlink(m->supply, m);
    vpc_guard_remove(m->guarded);
    munmap(m->base, m->len);
    vpc_ask_close(m);
    vpc_replace_reserve(); /* if the reserve was used, there is room for another */
    close(m->fd);
    if (m->ufd >= 0)
        close(m->ufd);
    free(m->seen);
    free(m->requested);
    vpc_supply_unref(m->supply);
    free(m);
}

/* Nobody uses the map, except for requests for its pages: it is freed after the last of them. The front-end may have
 * forgotten our addresses here, so those pages may never come: as in failing, the threads go on over private memory. If
 * there is none, POSTCOPY_END or failing will release them. */
static void retire(struct vpc_map *m)
{
    pthread_mutex_lock(&m->supply->lock);
    bool now = m->requests == 0;
    m->retired = true;
    if (!now && !m->replaced && vpc_replace_private(m->base, m->len) == 0) {
        m->replaced = true;
        if (m->registered) {
            struct uffdio_range range = {.start = (uintptr_t)m->base, .len = m->len};
            (void)ioctl(m->ufd, UFFDIO_WAKE, &range);
            m->registered = false;
        }
    }
    pthread_mutex_unlock(&m->supply->lock);
    if (now)
        map_free(m);
}

void vpc_map_unref(struct vpc_map *m)
{
    if (m && atomic_fetch_sub(&m->refs, 1) == 1)
        retire(m);
}

void vpc_map_hold(struct vpc_map *m)
{
    pthread_mutex_lock(&m->supply->lock);
    m->requests++;
    pthread_mutex_unlock(&m->supply->lock);
}

void vpc_map_let_go(struct vpc_map *m)
{
    pthread_mutex_lock(&m->supply->lock);
    bool last = --m->requests == 0 && m->retired;
    pthread_mutex_unlock(&m->supply->lock);
    if (last)
        map_free(m);
}

uint64_t vpc_map_address(const struct vpc_map *m)
{
    return (uint64_t)(uintptr_t)m->base + m->skip;
}

uint32_t vpc_map_kind(const struct vpc_map *m)
{
    return m->kind;
}

int vpc_gm_new(struct vpc_supply *s, struct vpc_gm **out)
{
    struct vpc_gm *gm = calloc(1, sizeof(*gm));

    if (!gm)
        return -ENOMEM;
    atomic_init(&gm->refs, 1);
    vpc_supply_ref(s);
    gm->supply = s;
    *out = gm;
    return 0;
}

void vpc_gm_ref(struct vpc_gm *gm)
{
    atomic_fetch_add(&gm->refs, 1);
}

void vpc_gm_unref(struct vpc_gm *gm)
{
    if (!gm || atomic_fetch_sub(&gm->refs, 1) != 1)
        return;
    for (uint32_t i = 0; i < gm->n; i++)
        vpc_map_unref(gm->regions[i].map);
    vpc_supply_unref(gm->supply);
    free(gm->regions);
    free(gm);
}

int vpc_gm_users(const struct vpc_gm *gm)
{
    return atomic_load(&gm->refs) - 1;
}

static bool overlap(uint64_t a, uint64_t b, uint64_t a_size, uint64_t b_size)
{
    return a < b ? b - a < a_size : a - b < b_size;
}

int vpc_gm_add(struct vpc_gm *gm, struct vpc_map *m, uint64_t guest_addr, uint64_t size, uint64_t user_addr)
{
    uint64_t end;

    if (size == 0 || size > m->len - m->skip || (atomic_load(&m->armed) && (guest_addr | user_addr) % TARGET_PAGE) ||
        __builtin_add_overflow(guest_addr, size, &end) || __builtin_add_overflow(user_addr, size, &end))
        return -EINVAL;
    uint32_t at = 0;
    for (uint32_t i = 0; i < gm->n; i++) {
        const struct vpc_region *r = &gm->regions[i];
        if (overlap(r->gpa, guest_addr, r->size, size) || overlap(r->uaddr, user_addr, r->size, size))
            return -EEXIST;
        if (r->gpa < guest_addr)
            at = i + 1;
    }
    struct vpc_region *grown = realloc(gm->regions, (gm->n + 1) * sizeof(*grown));
    if (!grown)
        return -ENOMEM;
    gm->regions = grown;
    memmove(grown + at + 1, grown + at, (gm->n - at) * sizeof(*grown));
    grown[at] = (struct vpc_region){.gpa = guest_addr, .size = size, .uaddr = user_addr,
                                    .own = m->base + m->skip, .map = m};
    gm->n++;
    atomic_fetch_add(&m->refs, 1);
    return 0;
}

const struct vpc_region *vpc_gm_find_user(const struct vpc_gm *gm, uint64_t uaddr, uint64_t len)
{
    for (uint32_t i = 0; i < gm->n; i++) {
        const struct vpc_region *r = &gm->regions[i];
        if (uaddr >= r->uaddr && uaddr - r->uaddr < r->size)
            return len <= r->size - (uaddr - r->uaddr) ? r : NULL;
    }
    return NULL;
}

uint64_t vpc_gm_end(const struct vpc_gm *gm)
{
    return gm->n ? gm->regions[gm->n - 1].gpa + gm->regions[gm->n - 1].size : 0;
}

/* Call body with p (here) and n (bytes up to the region's end) over a guest range. */
#define EACH_PIECE(gm, gpa, len, body)                                                                       \
    while (len) {                                                                                            \
        const struct vpc_region *r = vpc_gm_find(gm, gpa);                                                   \
        if (!r)                                                                                              \
            return -EFAULT;                                                                                  \
        uint64_t at = gpa - r->gpa, n = r->size - at < len ? r->size - at : len;                             \
        uint8_t *p = r->own + at;                                                                            \
        body;                                                                                                \
        gpa += n;                                                                                            \
        len -= n;                                                                                            \
    }

bool vpc_gm_mapped(const struct vpc_gm *gm, uint64_t gpa, uint64_t len)
{
    while (len) {
        const struct vpc_region *r = vpc_gm_find(gm, gpa);
        if (!r)
            return false;
        uint64_t room = r->size - (gpa - r->gpa);
        if (room >= len)
            return true;
        gpa += room;
        len -= room;
    }
    return true;
}

int vpc_gm_read(const struct vpc_gm *gm, uint64_t gpa, void *to, uint64_t len)
{
    uint8_t *dst = to;

    EACH_PIECE(gm, gpa, len, {
        memcpy(dst, p, n);
        dst += n;
    })
    return 0;
}

int vpc_gm_write(const struct vpc_gm *gm, uint64_t gpa, const void *from, uint64_t len, struct vpc_log *log)
{
    const uint8_t *src = from;
    uint64_t first = gpa, whole = len;

    EACH_PIECE(gm, gpa, len, {
        memcpy(p, src, n);
        src += n;
    })
    if (log)
        vpc_log_mark(log, first, whole);
    return 0;
}

/* --- the dirty log --- */

int vpc_log_new(struct vpc_supply *s, int fd, uint64_t offset, uint64_t size, struct vpc_log **out)
{
    struct vpc_log *log = calloc(1, sizeof(*log));
    int rc = log ? vpc_view_open(&log->view, s, fd, offset, size, VPC_USE_LOG) : -ENOMEM;

    if (rc < 0) {
        free(log);
        return rc;
    }
    atomic_init(&log->refs, 1);
    log->bits = (atomic_uchar *)log->view.at;
    *out = log;
    return 0;
}

void vpc_log_ref(struct vpc_log *log)
{
    atomic_fetch_add(&log->refs, 1);
}

void vpc_log_unref(struct vpc_log *log)
{
    if (!log || atomic_fetch_sub(&log->refs, 1) != 1)
        return;
    vpc_view_close(&log->view);
    free(log);
}

void vpc_log_mark(struct vpc_log *log, uint64_t gpa, uint64_t len)
{
    if (!len)
        return;
    uint64_t last = (gpa + len - 1) >> TARGET_SHIFT;
    for (uint64_t page = gpa >> TARGET_SHIFT; page <= last; page++) {
        if (page >> 3 >= log->view.size)
            return;
        uint8_t bit = (uint8_t)(1u << (page & 7));
        /* One log serves all devices of the VM and the front-end clears it with atomic exchange.
         * Setting a set bit again is skipped: the line stays shared between cores. The fence orders the
         * data write before the test: an earlier clear saw the data, a later one sees the bit. */
        atomic_thread_fence(memory_order_seq_cst);
        if (!(atomic_load_explicit(&log->bits[page >> 3], memory_order_relaxed) & bit))
            atomic_fetch_or(&log->bits[page >> 3], bit);
    }
}
