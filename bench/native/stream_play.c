/*
 * stream_play SOCKET HEAD TAIL BLOCK PAGES full|zero
 *
 * Plays a precopy stream to the destination that listens at SOCKET: the bytes of the file HEAD, a RAM record
 * for each page of BLOCK (4096 bytes of data, or a mark of zeros), the bytes of the file TAIL. Then waits until
 * the peer closes. Prints when the first byte went and when the last had gone (CLOCK_MONOTONIC), and the bytes.
 */
#include "ram_stream.h"
#include <fcntl.h>
#include <sys/stat.h>
#include <sys/uio.h>

#define BATCH 64u /* records a call */

struct bytes {
    unsigned char *at;
    size_t length;
};

static struct bytes whole_file(const char *path)
{
    int fd = open(path, O_RDONLY | O_CLOEXEC);
    struct stat st;
    struct bytes b;

    if (fd < 0 || fstat(fd, &st))
        die(path);
    b.length = (size_t)st.st_size;
    b.at = malloc(b.length + 1);
    if (!b.at || read(fd, b.at, b.length) != (ssize_t)b.length)
        die(path);
    close(fd);
    return b;
}

static uint64_t sent;

static void send_vector(int fd, struct iovec *v, unsigned n)
{
    while (n) {
        ssize_t done = writev(fd, v, (int)n);

        if (done < 0)
            die("writev");
        sent += (uint64_t)done;
        while (n && (size_t)done >= v->iov_len) {
            done -= (ssize_t)v->iov_len;
            v++;
            n--;
        }
        if (n) {
            v->iov_base = (char *)v->iov_base + done;
            v->iov_len -= (size_t)done;
        }
    }
}

static void send_bytes(int fd, struct bytes b)
{
    struct iovec v = {b.at, b.length};

    send_vector(fd, &v, 1);
}

int main(int argc, char **argv)
{
    if (argc != 7) {
        fprintf(stderr, "usage: stream_play SOCKET HEAD TAIL BLOCK PAGES full|zero\n");
        return 2;
    }
    start(-1);
    signal(SIGPIPE, SIG_IGN);

    struct bytes head = whole_file(argv[2]), tail = whole_file(argv[3]);
    size_t name = strlen(argv[4]);
    uint64_t pages = strtoull(argv[5], NULL, 0);
    int full = !strcmp(argv[6], "full");
    unsigned char *pool = aligned_alloc(PAGE, (size_t)POOL * PAGE);
    static unsigned char words[BATCH][9 + 256]; /* a record's bytes before its data; a zero record's all */
    struct sockaddr_un to = unix_address(argv[1]);
    int fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);

    if (!pool || name > 255)
        die("pool");
    for (uint64_t i = 0; i < POOL; i++)
        for (uint64_t w = 0; w < PAGE / 8; w++)
            ((uint64_t *)(pool + i * PAGE))[w] = page_word(i * (PAGE / 8) + w);
    if (fd < 0 || connect(fd, (struct sockaddr *)&to, sizeof to))
        die(argv[1]);

    uint64_t begin = now_ns(), end;

    send_bytes(fd, head);
    for (uint64_t page = 0; page < pages;) {
        struct iovec v[2 * BATCH];
        unsigned n = 0;

        for (unsigned i = 0; i < BATCH && page < pages; i++, page++) {
            unsigned char *p = words[i];
            uint64_t flags = (full ? REC_PAGE : REC_ZERO) | (page ? REC_CONTINUE : 0);

            put_be(p, page * PAGE | flags, 8);
            p += 8;
            if (!page) {
                *p++ = (unsigned char)name;
                memcpy(p, argv[4], name);
                p += name;
            }
            if (!full)
                *p++ = 0;
            v[n++] = (struct iovec){words[i], (size_t)(p - words[i])};
            if (full)
                v[n++] = (struct iovec){pool + page % POOL * PAGE, PAGE};
        }
        send_vector(fd, v, n);
    }
    send_bytes(fd, tail);
    end = now_ns();
    printf("{\"first_ns\": %llu, \"last_ns\": %llu, \"bytes\": %llu}\n", (unsigned long long)begin,
           (unsigned long long)end, (unsigned long long)sent);
    fflush(stdout);
    while (read(fd, pool, PAGE) > 0)
        ;
    return 0;
}
