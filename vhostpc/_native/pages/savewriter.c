/* Host pages as records of the migration stream, written to one descriptor. */
#define _GNU_SOURCE
#include "event_internal.h"
#include "pages/save_internal.h"

#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <unistd.h>

#define DATA_STEP_MOST (64u * TARGET_PAGE) /* taken for data behind known data, at most */

int vpc_writer_init(struct writer *w, int fd)
{
    struct stat st;

    w->block = w->now_block = w->extent_block = -1;
    w->fd = fcntl(fd, F_DUPFD_CLOEXEC, 0);
    w->out = malloc(OUT_ROOM);
    if (w->fd < 0 || fstat(w->fd, &st) < 0)
        return -errno;
    if (!w->out)
        return -ENOMEM;
    w->is_socket = S_ISSOCK(st.st_mode);
    w->on_disk = is_on_disk(fd);
    return 0;
}

void vpc_writer_destroy(struct writer *w)
{
    if (w->fd >= 0)
        close(w->fd);
    free(w->out);
    free(w->tail);
}

static int all_zero(const unsigned char *page)
{
    const uint64_t *w = (const uint64_t *)(const void *)page;

    for (unsigned i = 0; i < TARGET_PAGE / 8; i += 8)
        if (w[i] | w[i + 1] | w[i + 2] | w[i + 3] | w[i + 4] | w[i + 5] | w[i + 6] | w[i + 7])
            return 0;
    return 1;
}

/* Whether the page is a hole of the block's file. Then it is zero, and reading it through the mapping would create it.
 * */
static int is_hole(struct writer *w, struct vpc_block *b, uint64_t target)
{
    uint64_t at = b->fd_offset + (target << TARGET_SHIFT);

    if (b->page_size > TARGET_PAGE)
        return 0; /* hugetlbfs does not report it */
    if (w->extent_block != w->now_block || at < w->extent_begin || at >= w->extent_end) {
        off_t data = lseek(b->fd, (off_t)at, SEEK_DATA);

        if (data < 0 && errno != ENXIO)
            return 0;
        int follows = w->extent_block == w->now_block && !w->extent_hole && at == w->extent_end;
        w->extent_hole = data != (off_t)at;
        /* The end of data is not looked up: SEEK_HOLE walks over all of it. The longer it was so far, the longer it may
         * be. */
        uint64_t step = follows ? 2 * (w->extent_end - w->extent_begin) : TARGET_PAGE;
        step = step < DATA_STEP_MOST ? step : DATA_STEP_MOST;
        w->extent_block = w->now_block;
        w->extent_begin = at;
        w->extent_end = !w->extent_hole ? at + step : data < 0 ? UINT64_MAX : (uint64_t)data;
    }
    return w->extent_hole;
}

void vpc_writer_take(struct writer *w, struct vpc_scan *scan, struct host_page page)
{
    struct vpc_block *b = scan->ram->blocks[page.block];

    w->now_block = page.block;
    w->now_target = page.number << (b->shift - TARGET_SHIFT);
    w->now_left = b->page_size >> TARGET_SHIFT;
}

size_t vpc_writer_emit(struct writer *w, struct vpc_scan *scan)
{
    struct vpc_block *b = scan->ram->blocks[w->now_block];
    size_t before = w->end;

    while (w->now_left && writer_room(w) >= RECORD_MAX) {
        const unsigned char *page = b->map + (w->now_target << TARGET_SHIFT);
        unsigned char *p = w->out + w->end;
        unsigned flags = w->block == w->now_block ? REC_CONTINUE : 0;
        int zero = !scan->keep_zeros && (is_hole(w, b, w->now_target) || all_zero(page));

        put_be(p, w->now_target << TARGET_SHIFT | flags | (zero ? REC_ZERO : REC_PAGE), 8);
        p += 8;
        if (!flags) {
            *p++ = (unsigned char)b->name_len;
            memcpy(p, b->name, b->name_len);
            p += b->name_len;
        }
        if (zero) {
            *p++ = 0;
            w->made.zero_pages++;
        } else {
            memcpy(p, page, TARGET_PAGE);
            p += TARGET_PAGE;
            w->made.data_pages++;
        }
        w->end = (size_t)(p - w->out);
        w->block = w->now_block;
        w->now_target++;
        w->now_left--;
    }
    if (w->now_left == 0)
        w->now_block = -1;
    return w->end - before;
}

void vpc_writer_head(struct writer *w, unsigned type, uint32_t section)
{
    w->out[w->end] = (unsigned char)type;
    put_be(w->out + w->end + 1, section, 4);
    w->end += 5;
}

void vpc_writer_eos(struct writer *w)
{
    put_be(w->out + w->end, REC_EOS, 8);
    w->end += 8;
}

/* Write [*begin, end) of bytes, as much as the descriptor takes. */
static int push_bytes(struct writer *w, const unsigned char *bytes, size_t *begin, size_t end)
{
    while (*begin < end) {
        const unsigned char *from = bytes + *begin;
        size_t left = end - *begin;
        ssize_t n = w->is_socket ? send(w->fd, from, left, MSG_DONTWAIT | MSG_NOSIGNAL)
                    : w->on_disk ? write(w->fd, from, left)
                                 : write_now(w->fd, from, left);
        if (n < 0 && errno == EINTR)
            continue;
        if (n < 0)
            return errno == EAGAIN ? 0 : -errno;
        *begin += (size_t)n;
        save_tally(&w->bytes, (uint64_t)n);
    }
    return 0;
}

int vpc_writer_push(struct writer *w)
{
    int rc = push_bytes(w, w->out, &w->begin, w->end);

    if (rc || w->begin < w->end)
        return rc;
    w->begin = w->end = 0;
    return w->eos_sent ? push_bytes(w, w->tail, &w->tail_at, w->tail_end) : 0;
}
