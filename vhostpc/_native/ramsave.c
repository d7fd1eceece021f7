/*
 * RAM records out: a source of pages behind a socket.
 *
 * Each dirty page is sent once; what is asked for goes first, and the background scan goes on from there,
 * since who touches a page touches its neighbours next. The blocks are this process's own memory, whole
 * and never armed. The peer is hostile: every message is checked before anything is done.
 */
#define _GNU_SOURCE
#include "ram_internal.h"

#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/socket.h>
#include <unistd.h>

#define OUT_ROOM (128u << 10)
#define RECORD_MAX (8u + 256u + TARGET_PAGE)
#define IN_ROOM (16u << 10)
#define QUEUE 4096u /* host pages asked for and not yet looked at; more stay in the socket */

struct vpc_save {
    struct vpc_ram *ram;
    int fd, control, notify;
    _Atomic int stop, hold_all;
    _Atomic uint64_t rate;

    unsigned char *in;
    size_t in_end;
    int rp_block; /* of the last request, for REQ_PAGES; -1 before the first */

    /* A request being taken apart into host pages: they go to the queue as it has room. */
    int ask_block;
    uint64_t ask_page, ask_count;
    struct { int block; uint64_t page; } queue[QUEUE];
    unsigned head, tail; /* free-running */

    unsigned char *out;
    size_t out_begin, out_end;
    int out_block; /* block of the last record, for CONTINUE */

    int now_block; /* the host page that is being sent; -1: none */
    uint64_t now_target, now_left;

    int scan_block;
    uint64_t scan_page;
    uint64_t credit, credit_time; /* bytes that the background may send */

    unsigned char *rest; /* what follows the EOS */
    size_t rest_at, rest_end;

    struct vpc_save_stats stats;
};

void vpc_save_free(struct vpc_save *s)
{
    if (!s)
        return;
    if (s->fd >= 0)
        close(s->fd);
    if (s->control >= 0)
        close(s->control);
    if (s->notify >= 0)
        close(s->notify);
    free(s->in);
    free(s->out);
    free(s->rest);
    free(s);
}

struct vpc_save *vpc_save_new(struct vpc_ram *ram, int fd, uint64_t background_rate)
{
    struct vpc_save *s = calloc(1, sizeof *s);

    if (!s)
        return NULL;
    s->ram = ram;
    s->rp_block = s->out_block = s->now_block = -1;
    atomic_store(&s->rate, background_rate);
    s->fd = fcntl(fd, F_DUPFD_CLOEXEC, 0);
    s->control = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    s->notify = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    s->in = malloc(IN_ROOM);
    s->out = malloc(OUT_ROOM);
    if (s->fd < 0 || s->control < 0 || s->notify < 0 || !s->in || !s->out) {
        vpc_save_free(s);
        return NULL;
    }
    return s;
}

static void poke(int fd)
{
    uint64_t one = 1;
    ssize_t n = write(fd, &one, sizeof one);
    (void)n;
}

static void drain(int fd)
{
    uint64_t count;
    ssize_t n = read(fd, &count, sizeof count);
    (void)n;
}

void vpc_save_stop(struct vpc_save *s)
{
    atomic_store(&s->stop, 1);
    poke(s->control);
}

void vpc_save_kick(struct vpc_save *s)
{
    poke(s->control);
}

int vpc_save_set_rate(struct vpc_save *s, uint64_t background_rate)
{
    atomic_store(&s->rate, background_rate);
    poke(s->control);
    return 0;
}

int vpc_save_hold_all(struct vpc_save *s, int on)
{
    atomic_store(&s->hold_all, on != 0);
    poke(s->control);
    return 0;
}

int vpc_save_notify_fd(struct vpc_save *s)
{
    return s->notify;
}

/* ---- requests in */

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
            s->stats.useless++;
        } else if (withheld(s, b, page)) {
            if (!bit_set(b, VPC_BITS_ASKED, page)) {
                s->stats.held++;
                s->stats.held_ever++;
                poke(s->notify);
            }
        } else {
            s->queue[s->tail % QUEUE].block = s->ask_block;
            s->queue[s->tail++ % QUEUE].page = page;
        }
    }
}

/* Something was released: queue what was asked for in the meantime. What finds no room now is found by
 * the next look, since its bit stays. */
static void look_at_held(struct vpc_save *s)
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
                s->stats.held--;
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
        return length == 4 ? VPC_SAVE_SHUT : refuse(s, VPC_BAD_FLAGS);
    case RP_PONG:
        return length == 4 ? 0 : refuse(s, VPC_BAD_FLAGS);
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
    s->stats.requests++;
    if (bytes) {
        s->ask_block = block;
        s->ask_page = start >> b->shift;
        s->ask_count = ((start + bytes - 1) >> b->shift) - s->ask_page + 1;
        spread_request(s);
    }
    return 0;
}

/* Take the messages that are whole, as long as the queue has room. */
static int parse_requests(struct vpc_save *s)
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

/* ---- pages out */

static int all_zero(const unsigned char *page)
{
    const uint64_t *w = (const uint64_t *)(const void *)page;

    for (unsigned i = 0; i < TARGET_PAGE / 8; i += 8)
        if (w[i] | w[i + 1] | w[i + 2] | w[i + 3] | w[i + 4] | w[i + 5] | w[i + 6] | w[i + 7])
            return 0;
    return 1;
}

/* Append records of the host page in hand while there is room. */
static void emit(struct vpc_save *s)
{
    struct vpc_block *b = s->ram->blocks[s->now_block];

    while (s->now_left && OUT_ROOM - s->out_end >= RECORD_MAX) {
        const unsigned char *page = b->map + (s->now_target << TARGET_SHIFT);
        unsigned char *p = s->out + s->out_end;
        unsigned flags = s->out_block == s->now_block ? REC_CONTINUE : 0;
        int zero = all_zero(page);

        put_be(p, s->now_target << TARGET_SHIFT | flags | (zero ? REC_ZERO : REC_PAGE), 8);
        p += 8;
        if (!flags) {
            *p++ = (unsigned char)b->name_len;
            memcpy(p, b->name, b->name_len);
            p += b->name_len;
        }
        if (zero) {
            *p++ = 0;
            s->stats.zero_pages++;
        } else {
            memcpy(p, page, TARGET_PAGE);
            p += TARGET_PAGE;
            s->stats.data_pages++;
        }
        s->out_end = (size_t)(p - s->out);
        s->out_block = s->now_block;
        s->now_target++;
        s->now_left--;
    }
    if (s->now_left == 0)
        s->now_block = -1;
}

/* Take a host page in hand, unless it was sent before. Its bit is cleared now: it goes out once. */
static int begin_page(struct vpc_save *s, int block, uint64_t page)
{
    struct vpc_block *b = s->ram->blocks[block];

    if (!bit_clear(b, VPC_BITS_DIRTY, page))
        return 0;
    s->stats.dirty_left--;
    s->now_block = block;
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
    uint64_t now = now_ns(), most = rate / 20 + 2 * TARGET_PAGE;
    uint64_t passed = now - s->credit_time;

    s->credit_time = now;
    if (passed > 1000000000u)
        passed = 1000000000u;
    /* Nanoseconds times bytes a second fits up to 18 GB/s; above that the limit is none. */
    s->credit += rate > (uint64_t)18 << 30 ? most : passed * rate / 1000000000u;
    if (s->credit > most)
        s->credit = most;
}

/* Fill the output: requests first, then the background. Returns 0 if there would be more with more room,
 * milliseconds until the background may go on, or -1: nothing to do until somebody asks or releases. */
static int produce(struct vpc_save *s)
{
    for (;;) {
        uint64_t rate = atomic_load(&s->rate);

        if (s->now_block >= 0)
            emit(s);
        if (s->now_block >= 0 || OUT_ROOM - s->out_end < RECORD_MAX)
            return 0;
        if (s->head != s->tail) {
            int block = s->queue[s->head % QUEUE].block;
            uint64_t page = s->queue[s->head++ % QUEUE].page;
            if (begin_page(s, block, page))
                s->stats.requested_pages++;
            else
                s->stats.useless++;
            continue;
        }
        if (s->ask_count)
            return 0;
        if (rate == 0 || atomic_load(&s->hold_all) || s->stats.dirty_left == 0)
            return -1;
        /* Only a little of the background at a time: a request must not wait behind much of it. */
        if (s->out_end - s->out_begin > OUT_ROOM / 2)
            return 0;
        if (rate != VPC_RATE_UNLIMITED) {
            refill_credit(s, rate);
            if (s->credit < TARGET_PAGE) {
                uint64_t ms = TARGET_PAGE * 1000 / rate + 1;
                return ms > 1000 ? 1000 : (int)ms;
            }
        }
        if (!scan(s))
            return -1;
        s->stats.background_pages++;
        if (rate != VPC_RATE_UNLIMITED) {
            uint64_t cost = s->ram->blocks[s->now_block]->page_size;
            s->credit -= cost < s->credit ? cost : s->credit;
        }
    }
}

static uint64_t count_dirty(struct vpc_save *s)
{
    uint64_t sum = 0;
    for (int i = 0; i < s->ram->count; i++)
        sum += (uint64_t)vpc_ram_count_bits(s->ram, i, VPC_BITS_DIRTY);
    return sum;
}

/* Send [*begin, end) of bytes, as much as the socket takes. */
static int push_bytes(struct vpc_save *s, const unsigned char *bytes, size_t *begin, size_t end)
{
    while (*begin < end) {
        ssize_t n = send(s->fd, bytes + *begin, end - *begin, MSG_DONTWAIT | MSG_NOSIGNAL);
        if (n < 0 && errno == EINTR)
            continue;
        if (n < 0)
            return errno == EAGAIN ? 0 : -errno;
        *begin += (size_t)n;
        s->stats.bytes += (uint64_t)n;
    }
    return 0;
}

/* Is there something to send? */
static int pending(const struct vpc_save *s)
{
    return s->out_begin < s->out_end || (s->stats.eos_sent && s->rest_at < s->rest_end);
}

static int push(struct vpc_save *s)
{
    int rc = push_bytes(s, s->out, &s->out_begin, s->out_end);

    if (rc || s->out_begin < s->out_end)
        return rc;
    s->out_begin = s->out_end = 0;
    return s->stats.eos_sent ? push_bytes(s, s->rest, &s->rest_at, s->rest_end) : 0;
}

int vpc_save_set_tail(struct vpc_save *s, const void *from, uint64_t length)
{
    unsigned char *copy = malloc(length ? (size_t)length : 1);

    if (!copy)
        return -ENOMEM;
    memcpy(copy, from, (size_t)length);
    free(s->rest);
    s->rest = copy;
    s->rest_at = 0;
    s->rest_end = (size_t)length;
    return 0;
}

static int pull(struct vpc_save *s)
{
    ssize_t n = recv(s->fd, s->in + s->in_end, IN_ROOM - s->in_end, MSG_DONTWAIT);

    if (n < 0)
        return errno == EAGAIN || errno == EINTR ? 0 : -errno;
    if (n == 0)
        return VPC_SAVE_PEER_CLOSED;
    s->in_end += (size_t)n;
    return 0;
}

int vpc_save_run(struct vpc_save *s)
{
    int rc = 0;

    if (s->ram->count == 0)
        return -EINVAL;
    s->stats.dirty_left = count_dirty(s);
    s->credit_time = now_ns();
    while (rc == 0) {
        if (atomic_load(&s->stop)) {
            rc = VPC_SAVE_STOPPED;
            break;
        }
        look_at_held(s);
        rc = parse_requests(s);
        if (rc)
            break;
        int wait = produce(s);
        if (s->stats.dirty_left == 0 && s->now_block < 0 && !s->stats.eos_sent && OUT_ROOM - s->out_end >= 8) {
            put_be(s->out + s->out_end, REC_EOS, 8);
            s->out_end += 8;
            s->stats.eos_sent = 1;
            poke(s->notify);
        }
        rc = push(s);
        if (rc)
            break;
        int more = pending(s);
        int room = IN_ROOM - s->in_end > 4 + RP_MAX_LEN && s->ask_count == 0;
        struct pollfd fds[2] = {
            {.fd = s->fd, .events = (short)((room ? POLLIN : 0) | (more ? POLLOUT : 0))},
            {.fd = s->control, .events = POLLIN},
        };
        int ready = poll(fds, 2, more && wait == 0 ? -1 : wait);
        if (ready < 0 && errno != EINTR)
            rc = -errno;
        if (ready <= 0)
            continue;
        if (fds[1].revents)
            drain(s->control);
        if (fds[0].revents & ~POLLOUT && room)
            rc = pull(s);
    }
    if (rc == -EPIPE || rc == -ECONNRESET)
        rc = VPC_SAVE_PEER_CLOSED;
    if (rc == VPC_SAVE_STOPPED) {
        drain(s->control);
        atomic_store(&s->stop, 0);
    }
    return rc;
}

int vpc_save_stats(struct vpc_save *s, struct vpc_save_stats *out)
{
    *out = s->stats;
    return 0;
}
