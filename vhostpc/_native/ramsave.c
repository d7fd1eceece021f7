/*
 * RAM records out: the loops of a source of pages.
 *
 * A round is one section of precopy; run is postcopy, where each dirty page is sent once and what is asked for goes
 * first. The blocks are this process's own memory, whole and never armed.
 */
#define _GNU_SOURCE
#include "save_internal.h"

#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <unistd.h>

void vpc_save_free(struct vpc_save *s)
{
    if (!s)
        return;
    if (s->fd >= 0)
        close(s->fd);
    if (s->in_fd >= 0)
        close(s->in_fd);
    if (s->control >= 0)
        close(s->control);
    if (s->notify >= 0)
        close(s->notify);
    free(s->in);
    free(s->out);
    free(s->rest);
    free(s);
}

struct vpc_save *vpc_save_new(struct vpc_ram *ram, int fd, int in_fd, uint64_t background_rate)
{
    struct vpc_save *s = calloc(1, sizeof *s);
    struct stat st;

    if (!s)
        return NULL;
    s->ram = ram;
    s->rp_block = s->out_block = s->now_block = -1;
    atomic_store(&s->rate, background_rate);
    s->fd = fcntl(fd, F_DUPFD_CLOEXEC, 0);
    s->in_fd = in_fd < 0 ? -1 : fcntl(in_fd, F_DUPFD_CLOEXEC, 0);
    s->control = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    s->notify = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    s->in = malloc(IN_ROOM);
    s->out = malloc(OUT_ROOM);
    if (s->fd < 0 || (in_fd >= 0 && s->in_fd < 0) || s->control < 0 || s->notify < 0 || !s->in || !s->out ||
        fstat(s->fd, &st) < 0) {
        vpc_save_free(s);
        return NULL;
    }
    s->is_socket = S_ISSOCK(st.st_mode);
    return s;
}

void vpc_save_poke(int fd)
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
    vpc_save_poke(s->control);
}

void vpc_save_kick(struct vpc_save *s)
{
    vpc_save_poke(s->control);
}

int vpc_save_set_rate(struct vpc_save *s, uint64_t background_rate)
{
    atomic_store(&s->rate, background_rate);
    vpc_save_poke(s->control);
    return 0;
}

int vpc_save_hold_all(struct vpc_save *s, int on)
{
    atomic_store(&s->hold_all, on != 0);
    vpc_save_poke(s->control);
    return 0;
}

int vpc_save_notify_fd(struct vpc_save *s)
{
    return s->notify;
}

int vpc_save_keep_zeros(struct vpc_save *s, int on)
{
    s->keep_zeros = on != 0;
    return 0;
}

/* Send [*begin, end) of bytes, as much as the socket takes. */
static int push_bytes(struct vpc_save *s, const unsigned char *bytes, size_t *begin, size_t end)
{
    while (*begin < end) {
        ssize_t n = s->is_socket ? send(s->fd, bytes + *begin, end - *begin, MSG_DONTWAIT | MSG_NOSIGNAL)
                                 : write(s->fd, bytes + *begin, end - *begin);
        if (n < 0 && errno == EINTR)
            continue;
        if (n < 0)
            return errno == EAGAIN ? 0 : -errno;
        *begin += (size_t)n;
        save_tally(&s->stats.bytes, (uint64_t)n);
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
    ssize_t n = read(s->in_fd, s->in + s->in_end, IN_ROOM - s->in_end);

    if (n < 0)
        return errno == EAGAIN || errno == EINTR ? 0 : -errno;
    if (n == 0)
        return VPC_SAVE_PEER_CLOSED;
    s->in_end += (size_t)n;
    return 0;
}

/* Wait for room, a message of the peer or the control eventfd, ms milliseconds (-1: no limit); read messages. */
static int wait_ready(struct vpc_save *s, int more, int ms)
{
    int room = IN_ROOM - s->in_end > 4 + RP_MAX_LEN && s->ask_count == 0;
    struct pollfd fds[3] = {
        {.fd = s->in_fd, .events = (short)(room ? POLLIN : 0)},
        {.fd = more || s->in_fd < 0 ? s->fd : -1, .events = (short)(more ? POLLOUT : 0)},
        {.fd = s->control, .events = POLLIN},
    };
    int ready = poll(fds, 3, ms);

    if (ready < 0)
        return errno == EINTR ? 0 : -errno;
    if (ready == 0)
        return 0;
    if (fds[2].revents)
        drain(s->control);
    /* Nobody listens and nothing is to be sent: a write would not tell. */
    if (s->in_fd < 0 && !more && fds[1].revents & (POLLERR | POLLHUP))
        return VPC_SAVE_PEER_CLOSED;
    return fds[0].revents && room ? pull(s) : 0;
}

/* What the loops return: a broken pipe is a peer that is gone. Its last word may still be there to be read. */
static int ended(struct vpc_save *s, int rc)
{
    if (rc == -EPIPE || rc == -ECONNRESET)
        rc = VPC_SAVE_PEER_CLOSED;
    while (rc == VPC_SAVE_PEER_CLOSED && s->in_fd >= 0 && IN_ROOM - s->in_end > 4 + RP_MAX_LEN) {
        size_t before = s->in_end;
        int more = pull(s) == 0 && s->in_end > before;
        int said = vpc_save_parse(s);
        if (said == VPC_SAVE_SHUT)
            return said;
        if (said || !more)
            break;
    }
    if (rc == VPC_SAVE_STOPPED) {
        drain(s->control);
        atomic_store(&s->stop, 0);
    }
    return rc;
}

static void recount(struct vpc_save *s)
{
    __atomic_store_n(&s->stats.dirty_left, vpc_save_count_dirty(s), __ATOMIC_RELAXED);
}

static void put_head(struct vpc_save *s, unsigned type, uint32_t section)
{
    s->out[s->out_end] = (unsigned char)type;
    put_be(s->out + s->out_end + 1, section, 4);
    s->out_end += 5;
}

static void put_eos(struct vpc_save *s)
{
    put_be(s->out + s->out_end, REC_EOS, 8);
    s->out_end += 8;
}

int vpc_save_round(struct vpc_save *s, uint32_t section, int last, uint64_t budget_ns)
{
    uint64_t until = now_ns() + budget_ns;
    int rc = 0, closed = 0, left = 0;

    if (s->ram->count == 0 || s->stats.eos_sent)
        return -EINVAL;
    recount(s);
    s->extent_block = -1;
    if (s->credit_time == 0)
        s->credit_time = now_ns();
    put_head(s, last ? SECTION_END : SECTION_PART, section);
    for (;;) {
        int wait = PRODUCE_NOTHING;

        if (atomic_load(&s->stop))
            rc = VPC_SAVE_STOPPED;
        else
            rc = vpc_save_parse(s);
        if (rc)
            break;
        if (!closed) {
            wait = vpc_save_produce(s, last ? VPC_RATE_UNLIMITED : atomic_load(&s->rate));
            int over = !last && now_ns() >= until;
            if (s->now_block < 0 && (wait == PRODUCE_NOTHING || over) && OUT_ROOM - s->out_end >= 13) {
                left = s->stats.dirty_left != 0;
                put_eos(s);
                put_head(s, SECTION_FOOTER, section);
                closed = 1;
            }
        }
        rc = push(s);
        if (rc)
            break;
        int more = pending(s);
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
        rc = atomic_load(&s->stop) ? VPC_SAVE_STOPPED : vpc_save_parse(s);
        if (rc == 0)
            rc = wait_ready(s, 0, -1);
    } while (rc == 0);
    return ended(s, rc);
}

int vpc_save_run(struct vpc_save *s)
{
    int rc = 0;

    if (s->ram->count == 0)
        return -EINVAL;
    recount(s);
    s->extent_block = -1;
    s->credit_time = now_ns();
    while (rc == 0) {
        if (atomic_load(&s->stop)) {
            rc = VPC_SAVE_STOPPED;
            break;
        }
        vpc_save_look_at_held(s);
        rc = vpc_save_parse(s);
        if (rc)
            break;
        int wait = vpc_save_produce(s, atomic_load(&s->rate));
        if (s->stats.dirty_left == 0 && s->now_block < 0 && !s->stats.eos_sent && OUT_ROOM - s->out_end >= 8) {
            put_eos(s);
            __atomic_store_n(&s->stats.eos_sent, 1, __ATOMIC_RELAXED);
            vpc_save_poke(s->notify);
        }
        rc = push(s);
        if (rc)
            break;
        int more = pending(s);
        rc = wait_ready(s, more, more && wait == PRODUCE_ROOM ? -1 : wait);
    }
    return ended(s, rc);
}

int vpc_save_switch(struct vpc_save *s)
{
    s->out_block = -1;
    s->scan_block = 0;
    s->scan_page = 0;
    return 0;
}

int vpc_save_stats(struct vpc_save *s, struct vpc_save_stats *out)
{
    /* Of another thread: each number is whole, their sum may be of two moments. */
    const struct vpc_save_stats *n = &s->stats;
#define OF(field) .field = __atomic_load_n(&n->field, __ATOMIC_RELAXED)
    *out = (struct vpc_save_stats){
        OF(bytes), OF(data_pages), OF(zero_pages), OF(requests), OF(requested_pages), OF(background_pages),
        OF(useless), OF(held), OF(held_ever), OF(eos_sent), OF(why), OF(dirty_left), OF(pongs), OF(shut)};
#undef OF
    return 0;
}
