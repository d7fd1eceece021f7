/*
 * A queue's state with bytes changed at random, loaded under the sanitizers: state ROUNDS [SEED].
 *
 * Whatever is taken must save to the same bytes, and the queue must go on with it; nothing may be read or written
 * out of bounds.
 */
#define _GNU_SOURCE
#include "frontend/vpc_driver.h"

#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <unistd.h>

#define LENGTH ((uint64_t)1 << 20)
#define ROOM (1 << 20)

static uint64_t seed;

static uint32_t draw(uint32_t below)
{
    seed = seed * 6364136223846793005u + 1442695040888963407u;
    return (uint32_t)(seed >> 33) % below;
}

int main(int argc, char **argv)
{
    long rounds = argc > 1 ? atol(argv[1]) : 1000, taken = 0;
    struct vpc_driver_config c = {.desc = 0, .avail = 4096, .used = 8192, .buffers = 16384, .buffer_stride = 4096,
                                  .num = 64, .slots = 64, .parts = 1, .buffer_len = 2048, .header = 12, .receive = 1};
    int fd = memfd_create("ram", MFD_CLOEXEC);
    struct vpc_ram *ram;
    struct vpc_driver *d;
    unsigned char *good = malloc(ROOM), *bad = malloc(ROOM), *again = malloc(ROOM);

    seed = argc > 2 ? strtoull(argv[2], NULL, 10) : 1;
    c.kick_fd = eventfd(0, EFD_NONBLOCK);
    c.call_fd = eventfd(0, EFD_NONBLOCK);
    if (vpc_ram_new(&ram) < 0 || !good || !bad || !again || ftruncate(fd, LENGTH) < 0 ||
        vpc_ram_add(ram, "ram", fd, 0, LENGTH, 4096) < 0)
        return 1;
    if (vpc_driver_new(ram, &c, &d) < 0 || vpc_driver_add_region(d, 0, LENGTH, 0, 0) < 0 || vpc_driver_reset(d) < 0 ||
        vpc_driver_post(d, 20, 0) != 20)
        return 1;
    int64_t size = vpc_driver_save(d, good, ROOM);
    for (long i = 0; i < rounds; i++) {
        /* A buffer of just its size, so that the sanitizer sees the first byte too far. */
        int64_t length = draw(8) ? size : (int64_t)draw((uint32_t)size + 1);
        unsigned char *exact = malloc(length ? (size_t)length : 1);
        memcpy(bad, good, (size_t)size);
        for (uint32_t n = draw(4); n; n--)
            bad[draw((uint32_t)size)] = draw(3) ? (unsigned char)draw(256) : (unsigned char)draw(4);
        memcpy(exact, bad, (size_t)length);
        if (vpc_driver_load(d, exact, (uint64_t)length) == 0) {
            taken++;
            if (vpc_driver_save(d, again, ROOM) != length || memcmp(again, exact, (size_t)length) != 0) {
                fprintf(stderr, "round %ld: taken, and saved otherwise\n", i);
                return 1;
            }
            vpc_driver_unseen(d, draw(1000), draw(2000));
            vpc_driver_look(d);
            vpc_driver_post(d, 64, 0);
            vpc_driver_reap(d);
        }
        free(exact);
    }
    vpc_driver_free(d);
    vpc_ram_free(ram);
    close(fd);
    close(c.kick_fd);
    close(c.call_fd);
    free(good);
    free(bad);
    free(again);
    printf("rounds %ld taken %ld\n", rounds, taken);
    return taken && taken < rounds ? 0 : 1;
}
