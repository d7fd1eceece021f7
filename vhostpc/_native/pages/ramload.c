/*
 * RAM records in: parse, gather runs, have them placed (ramplace.c).
 *
 * Records are parsed from a private buffer and pages are gathered in another, so what the kernel copies
 * from is never guest memory, and this loop never waits for a page (in calm mode nothing is missing).
 */
#define _GNU_SOURCE
#include "event_internal.h"
#include "clock.h"
#include "pages/load_internal.h"
#include "pages/records_internal.h"

#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <unistd.h>

#define INPUT_ROOM (256u << 10)

static uint64_t number(const uint64_t *what)
{
    return __atomic_load_n(what, __ATOMIC_RELAXED);
}

static void *pages(size_t length, int access)
{
    void *p = mmap(NULL, length, access, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    return p == MAP_FAILED ? NULL : p;
}

void vpc_load_free(struct vpc_load *l)
{
    if (!l)
        return;
    if (l->run)
        munmap(l->run, l->run_room);
    if (l->zeros)
        munmap(l->zeros, l->run_room);
    if (l->fd >= 0)
        close(l->fd);
    if (l->place >= 0)
        close(l->place);
    if (l->control >= 0)
        close(l->control);
    free(l->input);
    free(l);
}

int vpc_load_new(struct vpc_ram *ram, struct vpc_fault *service, int fd, int place_ufd, struct vpc_load **out)
{
    struct vpc_load *l = calloc(1, sizeof *l);
    int rc = 0;

    if (!l)
        return -ENOMEM;
    l->ram = ram;
    l->service = service;
    l->block = -1;
    l->section = -1;
    l->stats.bad_offset = UINT64_MAX;
    l->run_room = RUN_PAGES * TARGET_PAGE;
    for (int i = 0; i < ram->count; i++)
        if (ram->blocks[i]->page_size > l->run_room)
            l->run_room = ram->blocks[i]->page_size;
    l->on_disk = is_on_disk(fd);
    l->fd = l->place = l->control = -1;
    /* Map the zeros now: later there may be no room for them. */
    if ((l->fd = fcntl(fd, F_DUPFD_CLOEXEC, 0)) < 0 || (l->control = event_new()) < 0 ||
        (place_ufd >= 0 && (l->place = fcntl(place_ufd, F_DUPFD_CLOEXEC, 0)) < 0) ||
        !(l->input = malloc(INPUT_ROOM)) || !(l->run = pages(l->run_room, PROT_READ | PROT_WRITE)) ||
        !(l->zeros = pages(l->run_room, PROT_READ)))
        rc = -errno;
    if (rc < 0) {
        vpc_load_free(l);
        return rc;
    }
    *out = l;
    return 0;
}

void vpc_load_stop(struct vpc_load *l)
{
    atomic_store(&l->stop, 1);
    event_poke(l->control);
}

int vpc_load_feed(struct vpc_load *l, const void *from, uint64_t length)
{
    if (l->begin) {
        memmove(l->input, l->input + l->begin, l->end - l->begin);
        l->end -= l->begin;
        l->begin = 0;
    }
    if (length > INPUT_ROOM - l->end)
        return -ENOSPC;
    memcpy(l->input + l->end, from, (size_t)length);
    l->end += (size_t)length;
    return 0;
}

int vpc_load_take(struct vpc_load *l, void *to, uint32_t room)
{
    size_t n = l->end - l->begin;

    if (n > room)
        n = room;
    memcpy(to, l->input + l->begin, n);
    l->begin += n;
    return (int)n;
}

int vpc_load_follow(struct vpc_load *l, uint32_t section, int last)
{
    l->section = section;
    l->last = last != 0;
    l->at = RECORDS;
    return 0;
}

int vpc_load_in_bulk(struct vpc_load *l)
{
    l->in_bulk = 1;
    return 0;
}

int vpc_load_finish(struct vpc_load *l)
{
    atomic_store(&l->finish, 1);
    event_poke(l->control);
    return 0;
}

static int is_finished(struct vpc_load *l)
{
    if (!atomic_load(&l->finish))
        return 0;
    for (int i = 0; i < l->ram->count; i++)
        if (vpc_ram_count_awaited(l->ram, i) > 0)
            return 0;
    return 1;
}

int vpc_load_keep_holes(struct vpc_load *l)
{
    l->holes = 1;
    return 0;
}

int vpc_load_block(struct vpc_load *l)
{
    return l->block;
}

int vpc_load_set_block(struct vpc_load *l, int block)
{
    if (block < -1 || block >= l->ram->count)
        return -EINVAL;
    l->block = block;
    return 0;
}

static int bad(struct vpc_load *l, int why)
{
    __atomic_store_n(&l->stats.why, why, __ATOMIC_RELAXED);
    __atomic_store_n(&l->stats.bad_offset, l->stats.bytes, __ATOMIC_RELAXED);
    return -EBADMSG;
}

/* One target page has arrived. 0, 1 if a thread waits for it (flush it), or -errno: then it was not taken. */
static int take_page(struct vpc_load *l, int block, uint64_t page, const unsigned char *data, int fill)
{
    struct vpc_block *b = l->ram->blocks[block];
    /* Nothing is placed in calm mode, so a huge page may arrive in any parts and order. */
    uint64_t per_host = l->place < 0 ? 1 : b->page_size >> TARGET_SHIFT;
    int zero = !data && fill == 0;
    int partial = 0, rc;

    if (l->run_count) {
        struct vpc_block *rb = l->ram->blocks[l->run_block];
        uint64_t host = l->place < 0 ? 1 : rb->page_size >> TARGET_SHIFT;
        partial = (l->run_count & (host - 1)) != 0;
        int follows = l->run_block == block && page == l->run_first + l->run_count;
        if (partial && !follows)
            return bad(l, VPC_BAD_HOST_PAGE);
        /* A huge page goes out as soon as it is whole; small ones gather. */
        uint64_t most = host > 1 ? host : l->in_bulk ? BULK_PAGES : RUN_PAGES;
        if (!partial && (!follows || l->run_zero != zero || l->run_count >= most)) {
            rc = vpc_load_flush(l);
            if (rc < 0)
                return rc;
        }
    }
    if (l->run_count == 0) {
        if (page & (per_host - 1))
            return bad(l, VPC_BAD_HOST_PAGE);
        l->run_block = block;
        l->run_first = page;
        l->run_zero = zero;
        if (per_host > 1) /* the rest of it must follow */
            bit_set(b, VPC_BITS_DISCARDED, page >> (b->shift - TARGET_SHIFT));
    }
    if (l->run_zero && !zero) {
        /* A host page that began with zeros and goes on with data. */
        memset(l->run, 0, (size_t)l->run_count << TARGET_SHIFT);
        l->run_zero = 0;
    }
    unsigned char *to = l->run + (l->run_count << TARGET_SHIFT);
    if (data)
        memcpy(to, data, TARGET_PAGE);
    else if (!l->run_zero)
        memset(to, fill, TARGET_PAGE);
    l->run_count++;
    if (data)
        tally(&l->stats.data_pages, 1);
    else
        tally(&l->stats.zero_pages, 1);
    /* A thread waits for it, so it does not wait for further pages. (A huge page goes out only when it is whole.) */
    return l->place >= 0 && bit_test(b, VPC_BITS_REQUESTED, page >> (b->shift - TARGET_SHIFT));
}

/* A page as its difference to the received one, which only precopy has, where no page is missing. The old page is read
 * from the file, not from our mapping: a page that nobody wrote is zero, and stays a hole. As take_page. */
static int take_delta(struct vpc_load *l, int block, uint64_t page, const unsigned char *delta, size_t length)
{
    struct vpc_block *b = l->ram->blocks[block];
    unsigned char whole[TARGET_PAGE];
    int rc = vpc_load_flush(l); /* it may be in the run */

    if (rc < 0)
        return rc;
    if (pread(b->fd, whole, sizeof whole, (off_t)(b->fd_offset + (page << TARGET_SHIFT))) != sizeof whole)
        return -EIO;
    if (vpc_delta_apply(whole, delta, length) < 0)
        return bad(l, VPC_BAD_DELTA);
    return take_page(l, block, page, whole, 0);
}

/* Parse one record. 0: more input needed; 1: one taken; VPC_LOAD_EOS + 1: end of section; or -errno. */
static int take_record(struct vpc_load *l)
{
    const unsigned char *p = l->input + l->begin;
    size_t have = l->end - l->begin, need = 8;

    if (have < need)
        return 0;
    uint64_t word = get_be(p, 8);
    unsigned flags = (unsigned)(word & (TARGET_PAGE - 1));
    uint64_t offset = word & ~(uint64_t)(TARGET_PAGE - 1);
    unsigned kind = flags & ~REC_CONTINUE;

    if (word == REC_EOS) {
        int flushed = vpc_load_flush(l); /* before the end is read, so that a stopped call returns to it */
        if (flushed < 0)
            return flushed;
        l->begin += 8;
        tally(&l->stats.bytes, 8);
        return VPC_LOAD_EOS + 1;
    }
    int calm = l->place < 0;
    if (kind == REC_COMPRESSED && calm)
        return bad(l, VPC_BAD_COMPRESSED);
    if (kind != REC_ZERO && kind != REC_PAGE && !(kind == REC_XBZRLE && calm))
        return bad(l, VPC_BAD_FLAGS);
    int block = l->block;
    if (flags & REC_CONTINUE) {
        if (block < 0)
            return bad(l, VPC_BAD_NO_BLOCK);
    } else {
        if (have < need + 1)
            return 0;
        unsigned length = p[need];
        if (length == 0)
            return bad(l, VPC_BAD_NAME);
        if (have < need + 1 + length)
            return 0;
        block = vpc_ram_find(l->ram, p + need + 1, length);
        if (block < 0)
            return bad(l, VPC_BAD_NAME);
        need += 1 + length;
    }
    if (offset >= l->ram->blocks[block]->length)
        return bad(l, VPC_BAD_OFFSET);
    size_t payload = kind == REC_PAGE ? TARGET_PAGE : 1;
    if (kind == REC_XBZRLE) { /* u8 1, u16 length */
        if (have < need + 3)
            return 0;
        payload = (size_t)get_be(p + need + 1, 2);
        if (p[need] != 1 || payload > TARGET_PAGE)
            return bad(l, VPC_BAD_DELTA);
        need += 3;
    }
    if (have < need + payload)
        return 0;
    uint64_t page = offset >> TARGET_SHIFT;
    int rc = kind == REC_PAGE     ? take_page(l, block, page, p + need, 0)
             : kind == REC_XBZRLE ? take_delta(l, block, page, p + need, payload)
                                  : take_page(l, block, page, NULL, p[need]);
    if (rc < 0)
        return rc;
    l->block = block;
    l->begin += need + payload;
    tally(&l->stats.bytes, need + payload);
    if (rc > 0 && (rc = vpc_load_flush(l)) < 0)
        return rc;
    return 1;
}

/* The frames between the records of one section and those of the next: footer, header. As take_record. */
static int take_frame(struct vpc_load *l)
{
    const unsigned char *p = l->input + l->begin;
    size_t have = l->end - l->begin;

    if (l->at == NEXT && have && p[0] != SECTION_PART && p[0] != SECTION_END)
        return VPC_LOAD_EOS + 1;
    if (have < 5)
        return 0;
    if (l->at == NEXT) {
        if (get_be(p + 1, 4) != (uint64_t)l->section)
            return VPC_LOAD_EOS + 1;
        l->last = p[0] == SECTION_END;
        l->at = RECORDS;
    } else {
        if (p[0] != SECTION_FOOTER || get_be(p + 1, 4) != (uint64_t)l->section)
            return bad(l, VPC_BAD_FOOTER);
        l->at = NEXT;
    }
    l->begin += 5;
    tally(&l->stats.bytes, 5);
    if (l->at != NEXT || !l->last)
        return 1;
    __atomic_store_n(&l->stats.ended, 1, __ATOMIC_RELAXED);
    return VPC_LOAD_EOS + 1;
}

static int take(struct vpc_load *l)
{
    if (l->section < 0)
        return take_record(l);
    if (l->at != RECORDS)
        return take_frame(l);
    int taken = take_record(l);
    if (taken != VPC_LOAD_EOS + 1)
        return taken;
    l->at = FOOTER;
    tally(&l->stats.sections, 1);
    return 1;
}

/* Wait for input (or a stop) and read it. 0, VPC_LOAD_EOF, VPC_LOAD_STOPPED or -errno. */
static int fill(struct vpc_load *l, uint64_t spin_ns)
{
    uint64_t until = spin_ns ? now_ns() + spin_ns : 0;

    if (l->begin) {
        memmove(l->input, l->input + l->begin, l->end - l->begin);
        l->end -= l->begin;
        l->begin = 0;
    }
    for (;;) {
        struct pollfd fds[2] = {{.fd = l->fd, .events = POLLIN}, {.fd = l->control, .events = POLLIN}};
        if (atomic_load(&l->stop))
            return VPC_LOAD_STOPPED;
        if (is_finished(l))
            return VPC_LOAD_EOS;
        int ready = poll(fds, 2, until && now_ns() < until ? 0 : -1);
        if (ready < 0 && errno != EINTR)
            return -errno;
        if (ready > 0 && fds[1].revents && !atomic_load(&l->stop))
            event_drain(l->control); /* it says that there is something to finish */
        if (ready <= 0 || !fds[0].revents)
            continue;
        unsigned char *to = l->input + l->end;
        size_t room = INPUT_ROOM - l->end;
        ssize_t n = l->on_disk ? read(l->fd, to, room) : read_now(l->fd, to, room);
        if (n < 0 && (errno == EINTR || errno == EAGAIN))
            continue;
        if (n < 0)
            return -errno;
        if (n == 0)
            return VPC_LOAD_EOF;
        l->end += (size_t)n;
        tally(&l->stats.reads, 1);
        return 0;
    }
}

int vpc_load_run(struct vpc_load *l, uint64_t spin_ns)
{
    int rc = 0, flushed;

    if (l->in_bulk == 1) { /* for this thread's life */
        l->in_bulk = 2;
        (void)setpriority(PRIO_PROCESS, 0, BULK_NICE);
    }
    while (rc == 0) {
        int taken;
        while ((taken = take(l)) == 1)
            ;
        if (taken < 0)
            rc = taken;
        else if (taken == VPC_LOAD_EOS + 1)
            rc = VPC_LOAD_EOS;
        /* The buffer has no whole record left: no received page waits for one that has not arrived. */
        flushed = vpc_load_flush(l);
        if (flushed < 0 && rc >= 0)
            rc = flushed;
        if (rc == 0)
            rc = fill(l, spin_ns);
        if (rc == VPC_LOAD_EOF && (l->begin < l->end || l->run_count || l->at == FOOTER))
            rc = bad(l, VPC_BAD_TRUNCATED);
    }
    if (rc == -ECANCELED)
        rc = VPC_LOAD_STOPPED; /* while it waited for memory */
    if (rc == VPC_LOAD_STOPPED) {
        event_drain(l->control);
        atomic_store(&l->stop, 0);
    }
    return rc;
}

int vpc_load_stats(struct vpc_load *l, struct vpc_load_stats *out)
{
    /* Of another thread: each number is whole, their sum may be of two moments. */
    const struct vpc_load_stats *s = &l->stats;
    *out = (struct vpc_load_stats){
        .bytes = number(&s->bytes), .data_pages = number(&s->data_pages), .zero_pages = number(&s->zero_pages),
        .placed = number(&s->placed), .already = number(&s->already), .runs = number(&s->runs),
        .reads = number(&s->reads), .sections = number(&s->sections), .bad_offset = number(&s->bad_offset),
        .shortages = number(&s->shortages), .bad_page = number(&s->bad_page),
        .bad_block = __atomic_load_n(&s->bad_block, __ATOMIC_RELAXED),
        .short_now = __atomic_load_n(&s->short_now, __ATOMIC_ACQUIRE),
        .why = __atomic_load_n(&s->why, __ATOMIC_RELAXED),
        .ended = __atomic_load_n(&s->ended, __ATOMIC_RELAXED)};
    return 0;
}
