/*
 * stream_sink SOCKET
 *
 * The cheapest destination there is: takes one precopy stream, looks at nothing but its end (the description of
 * the devices), and says SHUT then, as a destination with a return path does. Prints when the first and the last
 * byte came (CLOCK_MONOTONIC), the bytes, and whether the end was that of a stream.
 */
#include "ram_stream.h"
#include <poll.h>

#define ROOM (1u << 19)  /* bytes kept, the newest */
#define CHUNK (1u << 18) /* divides ROOM */

static unsigned char kept[ROOM], line[ROOM];

/* Do the bytes until now end with 00 (end of stream), 06, a length, and so many bytes of JSON? */
static int is_whole(uint64_t bytes)
{
    size_t n = bytes < ROOM ? (size_t)bytes : ROOM, at = (size_t)(bytes % ROOM);

    if (n < 8 || kept[(at + ROOM - 1) % ROOM] != '}')
        return 0;
    for (size_t i = 0; i < n; i++)
        line[i] = kept[(at + ROOM - n + i) % ROOM];
    for (size_t i = n - 8; i > 0; i--)
        if (line[i] == 0 && line[i + 1] == 6 && line[i + 6] == '{' && get_be(line + i + 2, 4) == n - i - 6)
            return 1;
    return 0;
}

int main(int argc, char **argv)
{
    if (argc != 2) {
        fprintf(stderr, "usage: stream_sink SOCKET\n");
        return 2;
    }
    start(-1);

    struct sockaddr_un at = unix_address(argv[1]);
    int listener = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0), fd;
    static const unsigned char shut[8] = {0, 1, 0, 4};
    uint64_t bytes = 0, first = 0, last = 0;
    int whole = 0;

    if (listener < 0 || bind(listener, (struct sockaddr *)&at, sizeof at) || listen(listener, 1))
        die(argv[1]);
    puts("ready");
    fflush(stdout);
    fd = accept(listener, NULL, NULL);
    for (;;) {
        size_t from = (size_t)(bytes % ROOM), room = CHUNK < ROOM - from ? CHUNK : ROOM - from;
        ssize_t n = recv(fd, kept + from, room, MSG_DONTWAIT);

        if (n > 0) {
            last = now_ns();
            first = first ? first : last;
            bytes += (uint64_t)n;
            continue;
        }
        if (n == 0 || (errno != EAGAIN && errno != EINTR))
            break;
        if (!whole && is_whole(bytes)) {
            whole = 1;
            if (send(fd, shut, sizeof shut, MSG_NOSIGNAL) < 0 && errno != EPIPE)
                die("send");
        }
        struct pollfd wait = {.fd = fd, .events = POLLIN};

        poll(&wait, 1, -1);
    }
    whole = whole || is_whole(bytes);
    printf("{\"first_ns\": %llu, \"last_ns\": %llu, \"bytes\": %llu, \"whole\": %d}\n", (unsigned long long)first,
           (unsigned long long)last, (unsigned long long)bytes, whole);
    return 0;
}
