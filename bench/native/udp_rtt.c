/*
 * udp_rtt FROM:PORT TO:PORT SIZE COUNT CPU
 *
 * Sends COUNT frames of SIZE bytes one after the other, each when the last has come back (or half a
 * second has gone by), and prints the round trips' percentiles and the number that never came as JSON.
 */
#include "common.h"
#include <sys/time.h>

int main(int argc, char **argv)
{
    if (argc != 6) {
        fprintf(stderr, "usage: udp_rtt FROM:PORT TO:PORT SIZE COUNT CPU\n");
        return 2;
    }
    start(atoi(argv[5]));

    struct sockaddr_in to = address(argv[2]);
    size_t size = (size_t)atoi(argv[3]), count = (size_t)atoi(argv[4]), n = 0;
    int fd = udp_socket(argv[1], 1 << 20);
    struct timeval limit = {.tv_usec = 500000};
    char out[9000] = {0}, in[9000];
    uint64_t *sample = calloc(count, sizeof *sample), lost = 0;

    if (!sample || size < 22 || size > sizeof out)
        return 2;
    setsockopt(fd, SOL_SOCKET, SO_RCVTIMEO, &limit, sizeof limit);
    memcpy(out, "\xff\xff\xff\xff\xff\xff\x02\x00\x00\x00\x00\x01\x88\xb5", 14);
    for (uint64_t i = 0; i < count; i++) {
        uint64_t t = now_ns(), number;

        memcpy(out + 14, &i, sizeof i);
        if (sendto(fd, out, size, 0, (struct sockaddr *)&to, sizeof to) < 0)
            die("sendto");
        for (;;) {
            if (recv(fd, in, sizeof in, 0) < 0) {
                lost++;
                break;
            }
            memcpy(&number, in + 14, sizeof number);
            /* A late answer to a frame given up is not this one's. */
            if (number == i) {
                sample[n++] = now_ns() - t;
                break;
            }
        }
        if (lost > 20)
            break;
    }
    printf("{\"count\": %zu, \"lost\": %llu, ", n, (unsigned long long)lost);
    print_percentiles(sample, n);
    puts("}");
    return 0;
}
