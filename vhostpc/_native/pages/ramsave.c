/*
 * RAM records out: the loops of one connection of a source of pages.
 *
 * A round is one section of precopy; run is postcopy, where each dirty page is sent once and requested pages go first.
 * The blocks are this process's own memory, complete and never armed.
 */
#define _GNU_SOURCE
#include "event_internal.h"
#include "clock.h"
#include "pages/save_internal.h"

#include <errno.h>
#include <poll.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#define BULK_TURN (16u << 10) /* a long system call keeps the threads that serve requests from running */

/* Results of produce besides milliseconds. */
#define PRODUCE_ROOM 0     /* there would be more with more room */
#define PRODUCE_NOTHING -1 /* nothing to do until a page is requested or released */

void vpc_save_free(struct vpc_save *s)
{
    if (!s)
        return;
    if (s->beside)
        s->beside->beside = NULL;
    vpc_writer_destroy(&s->writer);
    vpc_requests_destroy(&s->requests);
    if (s->control >= 0)
        close(s->control);
    if (s->notify >= 0 && s->share != URGENT)
        close(s->notify);
    free(s);
}

int vpc_save_new(struct vpc_scan *scan, int fd, int in_fd, struct vpc_save **out)
{
    struct vpc_save *s = calloc(1, sizeof *s);

    if (!s)
        return -ENOMEM;
    s->scan = scan;
    vpc_scan_forget(scan);
    s->writer.fd = s->requests.fd = -1;
    s->control = event_new();
    s->notify = event_new();
    int rc = s->control < 0 || s->notify < 0 ? -errno : vpc_writer_init(&s->writer, fd);
    if (rc == 0)
        rc = vpc_requests_init(&s->requests, scan->ram, in_fd, s->notify);
    if (rc < 0) {
        vpc_save_free(s);
        return rc;
    }
    *out = s;
    return 0;
}

int vpc_save_new_urgent(struct vpc_save *main, int fd, int closing_word, struct vpc_save **out)
{
    struct vpc_save *s = calloc(1, sizeof *s);

    if (!s)
        return -ENOMEM;
    s->scan = main->scan;
    s->share = URGENT;
    s->closing_word = closing_word != 0;
    s->notify = main->notify;
    s->writer.fd = s->requests.fd = -1;
    s->control = event_new();
    int rc = s->control < 0 ? -errno : vpc_writer_init(&s->writer, fd);
    if (rc < 0) {
        vpc_save_free(s);
        return rc;
    }
    s->beside = main;
    main->beside = s;
    *out = s;
    return 0;
}

void vpc_save_stop(struct vpc_save *s)
{
    atomic_store(&s->stop, 1);
    event_poke(s->control);
}

void vpc_save_kick(struct vpc_save *s)
{
    event_poke(s->control);
}

int vpc_save_notify_fd(struct vpc_save *s)
{
    return s->notify;
}

int vpc_save_set_tail(struct vpc_save *s, const void *from, uint64_t length)
{
    unsigned char *copy = malloc(length ? (size_t)length : 1);

    if (!copy)
        return -ENOMEM;
    memcpy(copy, from, (size_t)length);
    free(s->writer.tail);
    s->writer.tail = copy;
    s->writer.tail_at = 0;
    s->writer.tail_end = (size_t)length;
    return 0;
}

/* Fill the output at rate bytes a second, requests first; see PRODUCE_*, or milliseconds to wait. */
static int fill(struct vpc_save *s, uint64_t rate)
{
    struct writer *w = &s->writer;
    struct requests *r = &s->requests;
    struct vpc_scan *scan = s->scan;

    for (;;) {
        if (w->now_block >= 0) {
            size_t bytes = vpc_writer_emit(w, scan);
            if (!s->now_asked)
                scan->credit -= (int64_t)bytes;
        }
        if (w->now_block >= 0 || writer_room(w) < RECORD_MAX)
            return PRODUCE_ROOM;
        if (r->head != r->tail) {
            struct host_page page = r->queue[r->head++ % QUEUE];
            if (vpc_scan_take(scan, page)) {
                w->made.requested_pages++;
                s->now_asked = 1;
                vpc_writer_take(w, scan, page);
            } else {
                save_tally(&r->useless, 1);
            }
            continue;
        }
        if (r->ask_count)
            return PRODUCE_ROOM;
        if (rate == 0 || atomic_load(&scan->withhold_all) || scan_left(scan) == 0)
            return PRODUCE_NOTHING;
        /* Only a little of the background at once: a request must not wait behind much of it. */
        if (w->end - w->begin > (s->share == BULK ? BULK_TURN : OUT_ROOM / 2))
            return PRODUCE_ROOM;
        int ms = vpc_scan_due(scan, rate);
        if (ms)
            return ms;
        struct host_page page = vpc_scan_next(scan);
        if (page.block < 0)
            return PRODUCE_NOTHING;
        w->made.background_pages++;
        s->now_asked = 0;
        vpc_writer_take(w, scan, page);
    }
}

/* As fill, and the numbers are updated. */
static int produce(struct vpc_save *s, uint64_t rate)
{
    int rc = fill(s, rate);

    vpc_scan_tell(s->scan, &s->writer.made);
    return rc;
}

/* Wait for room, a message of the peer or the control eventfd, ms milliseconds (-1: no limit); read messages. */
static int wait_ready(struct vpc_save *s, int more, int ms)
{
    int in = s->requests.fd, out = s->writer.fd;
    int room = requests_room(&s->requests) && s->requests.ask_count == 0;
    int looks = s->share == URGENT && vpc_urgent_is_needed(s);
    struct pollfd fds[3] = {
        {.fd = in, .events = (short)(room ? POLLIN : 0)},
        {.fd = more || in < 0 || looks ? out : -1, .events = (short)((more ? POLLOUT : 0) | (looks ? POLLRDHUP : 0))},
        {.fd = s->control, .events = POLLIN},
    };
    int ready = poll(fds, 3, ms);

    if (ready < 0)
        return errno == EINTR ? 0 : -errno;
    if (ready == 0)
        return 0;
    if (fds[2].revents)
        event_drain(s->control);
    /* The peer is gone and nothing is to be sent: no write would show that. */
    if (in < 0 && !more && fds[1].revents & (POLLERR | POLLHUP))
        return VPC_SAVE_PEER_CLOSED;
    /* Looked at again: it may have been closed because all was there. */
    if (looks && fds[1].revents & (POLLERR | POLLHUP | POLLRDHUP) && vpc_urgent_is_needed(s))
        return VPC_SAVE_PEER_CLOSED;
    /* No more is read, for lack of room, so the end would not be seen; poll would return at once for ever. */
    if (!room && fds[0].revents & (POLLERR | POLLHUP))
        return VPC_SAVE_PEER_CLOSED;
    return fds[0].revents && room ? vpc_requests_pull(&s->requests) : 0;
}

/* Read everything that the destination has said, though nothing can be sent any more: its last word may be in it. */
static int last_word(struct vpc_save *s)
{
    struct requests *r = &s->requests;

    for (;;) {
        size_t before = r->end;

        r->head = r->tail; /* requested pages cannot be sent: they must not delay the bytes behind them */
        r->ask_count = 0;
        int said = vpc_requests_parse(r, s->scan);
        if (said)
            return said;
        if (r->end == before && (vpc_requests_pull(r) || r->end == before))
            return 0;
        if (atomic_load(&s->stop)) /* a peer that goes on for ever */
            return 0;
    }
}

/* The loops' result: a broken pipe means that the peer is gone. Whatever the error was, the peer's word has precedence. */
static int ended(struct vpc_save *s, int rc)
{
    if (rc == -EPIPE || rc == -ECONNRESET)
        rc = VPC_SAVE_PEER_CLOSED;
    if ((rc == VPC_SAVE_PEER_CLOSED || (rc < 0 && rc != -EBADMSG)) && s->requests.fd >= 0 &&
        last_word(s) == VPC_SAVE_SHUT)
        return VPC_SAVE_SHUT;
    if (rc == VPC_SAVE_STOPPED) {
        event_drain(s->control);
        atomic_store(&s->stop, 0);
    }
    return rc;
}

int vpc_save_round(struct vpc_save *s, uint32_t section, int last, uint64_t budget_ns)
{
    struct writer *w = &s->writer;
    struct vpc_scan *scan = s->scan;
    uint64_t until = now_ns() + budget_ns;
    int rc = 0, closed = 0, left = 0;

    if (scan->ram->count == 0 || w->eos_sent)
        return -EINVAL;
    vpc_scan_recount(scan);
    w->extent_block = -1;
    if (scan->credit_time == 0)
        vpc_scan_begin(scan);
    vpc_writer_head(w, last ? SECTION_END : SECTION_PART, section);
    for (;;) {
        int wait = PRODUCE_NOTHING;

        if (atomic_load(&s->stop))
            rc = VPC_SAVE_STOPPED;
        else
            rc = vpc_requests_parse(&s->requests, scan);
        if (rc)
            break;
        if (!closed) {
            wait = produce(s, last ? VPC_RATE_UNLIMITED : atomic_load(&scan->rate));
            int over = !last && now_ns() >= until;
            if (w->now_block < 0 && (wait == PRODUCE_NOTHING || over) && writer_room(w) >= 13) {
                left = scan_left(scan) != 0;
                vpc_writer_eos(w);
                vpc_writer_head(w, SECTION_FOOTER, section);
                closed = 1;
            }
        }
        rc = vpc_writer_push(w);
        if (rc)
            break;
        int more = writer_pending(w);
        if (closed && !more)
            return left;
        if (!more && wait == PRODUCE_ROOM)
            continue;
        rc = wait_ready(s, more, more ? -1 : wait);
        if (rc)
            break;
    }
    return ended(s, rc);
}

int vpc_save_wait(struct vpc_save *s)
{
    int rc;

    do {
        rc = atomic_load(&s->stop) ? VPC_SAVE_STOPPED : vpc_requests_parse(&s->requests, s->scan);
        if (rc == 0)
            rc = wait_ready(s, 0, -1);
    } while (rc == 0);
    return ended(s, rc);
}

int vpc_save_hear(struct vpc_save *s, unsigned pong, unsigned ms)
{
    uint64_t now = now_ns(), until = now + (uint64_t)ms * 1000000u;
    int rc;

    do {
        rc = atomic_load(&s->stop) ? VPC_SAVE_STOPPED : vpc_requests_parse(&s->requests, s->scan);
        if (rc == 0 && (s->requests.pongs >> pong & 1 || now >= until))
            return 0;
        if (rc == 0)
            rc = wait_ready(s, 0, (int)((until - now) / 1000000u) + 1);
        now = now_ns();
    } while (rc == 0);
    return ended(s, rc);
}

int vpc_save_run(struct vpc_save *s)
{
    struct writer *w = &s->writer;
    struct vpc_scan *scan = s->scan;
    int rc = 0;

    if (scan->ram->count == 0)
        return -EINVAL;
    if (s->share == ALL)
        vpc_scan_recount(scan);
    if (s->share == BULK)
        vpc_bulk_begin(s);
    w->extent_block = -1;
    if (s->share != URGENT)
        vpc_scan_begin(scan);
    while (rc == 0) {
        if (atomic_load(&s->stop)) {
            rc = VPC_SAVE_STOPPED;
            break;
        }
        if (s->share == URGENT && (rc = atomic_load(&s->beside->broken)))
            break;
        vpc_requests_look_at_withheld(&s->requests, scan);
        rc = vpc_requests_parse(&s->requests, scan);
        if (rc)
            break;
        if (s->requests.heard && !s->heard_told) {
            s->heard_told = 1;
            return VPC_SAVE_HEARD;
        }
        int wait = produce(s, s->share == URGENT ? 0 : atomic_load(&scan->rate));
        if (s->share == URGENT)
            vpc_urgent_close(s);
        else if (scan_left(scan) == 0 && w->now_block < 0 && !w->eos_sent && writer_room(w) >= 8) {
            vpc_writer_eos(w);
            __atomic_store_n(&w->eos_sent, 1, __ATOMIC_RELAXED);
            event_poke(s->notify);
        }
        rc = vpc_writer_push(w);
        if (rc && s->share == URGENT)
            rc = vpc_urgent_lost(s, rc);
        if (rc)
            break;
        if (s->share == URGENT)
            vpc_urgent_tell(s);
        int more = writer_pending(w);
        if (s->share == BULK && w->eos_sent && !more)
            rc = VPC_SAVE_SENT;
        else
            rc = wait_ready(s, more, more && wait == PRODUCE_ROOM ? -1 : wait);
    }
    return s->share == BULK ? vpc_bulk_ended(s, ended(s, rc)) : ended(s, rc);
}

int vpc_save_first(struct vpc_save *s, int block, uint64_t page)
{
    struct vpc_block *b = ram_block(s->scan->ram, block);

    if (!b || page >= b->pages)
        return -ERANGE;
    vpc_requests_first(&s->requests, s->scan, block, page);
    return 0;
}

int vpc_save_switch(struct vpc_save *s)
{
    s->writer.block = -1;
    vpc_scan_rewind(s->scan);
    return 0;
}

int vpc_save_stats(struct vpc_save *s, struct vpc_save_stats *out)
{
    /* Of another thread: each number is whole, their sum may be of two moments. */
    const struct writer *w = &s->writer;
    const struct requests *r = &s->requests;
#define N(of) __atomic_load_n(&(of), __ATOMIC_RELAXED)
    *out = (struct vpc_save_stats){
        .bytes = N(w->bytes), .requests = N(r->count), .useless = N(r->useless), .withheld = N(r->withheld),
        .withheld_ever = N(r->withheld_ever), .eos_sent = N(w->eos_sent), .why = N(r->why), .pongs = N(r->pongs),
        .shut = N(r->shut), .heard = N(r->heard)};
#undef N
    return 0;
}
