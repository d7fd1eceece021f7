/* The fault service's requests to its source: whole messages, sent as far as possible without waiting. */
#define _GNU_SOURCE
#include "event_internal.h"
#include "pages/fault_internal.h"
#include "pages/records_internal.h"

#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

void vpc_outbox_free(struct vpc_fault *s)
{
    if (s->out_fd >= 0)
        close(s->out_fd);
    free(s->out);
}

/* Caller holds out_lock. */
static int out_append(struct vpc_fault *s, const void *data, size_t length)
{
    if (s->out_errno)
        return -s->out_errno;
    if (s->out_begin == s->out_end)
        s->out_begin = s->out_end = 0;
    if (s->out_room - s->out_end < length && s->out_begin > 0) {
        memmove(s->out, s->out + s->out_begin, s->out_end - s->out_begin);
        s->out_end -= s->out_begin;
        s->out_begin = 0;
    }
    if (s->out_room - s->out_end < length) {
        size_t room = s->out_room ? s->out_room * 2 : 4096;
        while (room - s->out_end < length)
            room *= 2;
        unsigned char *out = realloc(s->out, room);
        if (!out)
            return -ENOMEM;
        s->out = out;
        s->out_room = room;
    }
    memcpy(s->out + s->out_end, data, length);
    s->out_end += length;
    return 0;
}

/* Never waits, even if a peer made the descriptor blocking. */
static ssize_t out_write(int fd, const void *data, size_t length)
{
    ssize_t n = send(fd, data, length, MSG_DONTWAIT | MSG_NOSIGNAL);

    return n < 0 && errno == ENOTSOCK ? write_now(fd, data, length) : n;
}

/* Send the messages, as far as possible without waiting. Caller holds out_lock. */
void vpc_outbox_flush(struct vpc_fault *s)
{
    while (s->out_begin < s->out_end && s->out_fd >= 0 && !s->out_errno) {
        ssize_t n = out_write(s->out_fd, s->out + s->out_begin, s->out_end - s->out_begin);
        if (n < 0 && errno == EINTR)
            continue;
        if (n < 0 && errno == EAGAIN)
            return;
        if (n < 0) {
            s->out_errno = errno;
            s->out_begin = s->out_end = 0;
            return;
        }
        s->out_batches++;
        s->out_bytes += (uint64_t)n;
        s->out_begin += (size_t)n;
    }
}

int vpc_fault_send(struct vpc_fault *s, const void *message, uint32_t length)
{
    pthread_mutex_lock(&s->out_lock);
    int rc = out_append(s, message, length);
    vpc_outbox_flush(s);
    int left = s->out_begin < s->out_end;
    pthread_mutex_unlock(&s->out_lock);
    if (left)
        vpc_fault_kick(s); /* the loop sends the rest when the socket takes it */
    return rc;
}

/* Request one host page; the caller flushes later. 0 or -ENOMEM. A broken path is no error: over another one it is
 * requested again. */
static int ask_for(struct vpc_fault *s, struct vpc_block *b, uint64_t page)
{
    unsigned char m[4 + 13 + 255];
    unsigned length = 13 + b->name_len;

    put_be(m, RP_REQ_PAGES_ID, 2);
    put_be(m + 2, length, 2);
    put_be(m + 4, page << b->shift, 8);
    put_be(m + 12, b->page_size, 4);
    m[16] = (unsigned char)b->name_len;
    memcpy(m + 17, b->name, b->name_len);
    pthread_mutex_lock(&s->out_lock);
    int rc = s->out_mute ? 0 : out_append(s, m, 4 + length);
    pthread_mutex_unlock(&s->out_lock);
    return rc == -ENOMEM ? rc : 0;
}

int vpc_outbox_request(struct vpc_fault *s, int block, uint64_t page)
{
    int rc = ask_for(s, s->ram->blocks[block], page);

    if (rc == 0)
        s->stats.requests++;
    return rc;
}

/* Another source knows nothing of the requests to the last one. */
int vpc_outbox_ask_again(struct vpc_fault *s)
{
    int rc = 0;

    for (int i = 0; i < s->ram->count; i++) {
        struct vpc_block *b = s->ram->blocks[i];
        for (uint64_t word = 0; word < (b->pages + 63) / 64; word++) {
            uint64_t open = atomic_load(&b->bits[VPC_BITS_REQUESTED][word]) & ~atomic_load(&b->bits[VPC_BITS_RECEIVED][word]);
            for (; open && rc == 0; open &= open - 1) {
                rc = ask_for(s, b, word * 64 + (uint64_t)__builtin_ctzll(open));
                s->stats.asked_again += rc == 0;
            }
        }
    }
    return rc;
}

/* Another descriptor to send on, with an empty outbox if there was one before, as *again says. Caller holds lock. */
static int out_replace(struct vpc_fault *s, int fd, int mute, int *again)
{
    int copy = -1, old;

    if (fd >= 0) {
        copy = fcntl(fd, F_DUPFD_CLOEXEC, 0);
        if (copy < 0)
            return -errno;
    }
    pthread_mutex_lock(&s->out_lock);
    old = s->out_fd;
    *again = fd >= 0 && s->out_used;
    s->out_fd = copy;
    s->out_errno = 0;
    s->out_mute = mute;
    if (fd >= 0)
        s->out_used = 1;
    if (*again || mute)
        s->out_begin = s->out_end = 0; /* the first message may have been sent in part */
    pthread_mutex_unlock(&s->out_lock);
    if (old >= 0)
        close(old); /* the loop may still poll its number once: harmless, it sends only under the lock */
    return 0;
}

int vpc_fault_set_return_path(struct vpc_fault *s, int fd)
{
    int again;

    pthread_mutex_lock(&s->lock);
    int rc = out_replace(s, fd, 0, &again);
    if (rc == 0 && again && vpc_outbox_ask_again(s) < 0)
        s->ask_again = s->again = 1;
    pthread_mutex_unlock(&s->lock);
    vpc_fault_kick(s);
    return rc;
}

int vpc_fault_mute(struct vpc_fault *s, int fd)
{
    int again;

    pthread_mutex_lock(&s->lock);
    int rc = out_replace(s, fd, 1, &again);
    pthread_mutex_unlock(&s->lock);
    vpc_fault_kick(s);
    return rc;
}

int vpc_fault_resume(struct vpc_fault *s, const void *message, uint32_t length)
{
    /* Threads that request a page hold this lock, so nothing comes between the two. */
    pthread_mutex_lock(&s->lock);
    pthread_mutex_lock(&s->out_lock);
    int rc = out_append(s, message, length);
    if (rc == 0)
        s->out_mute = 0;
    pthread_mutex_unlock(&s->out_lock);
    if (rc == 0 && vpc_outbox_ask_again(s) < 0)
        s->ask_again = s->again = 1;
    pthread_mutex_unlock(&s->lock);
    vpc_fault_kick(s);
    return rc;
}
