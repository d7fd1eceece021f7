/* A driver that writes its rings while the device reads them.
 *
 *   flip pop|out|in ROUNDS [SEED]
 *
 * One thread flips next, len, flags and addresses of descriptors and of indirect tables, the tables' own lengths,
 * the avail ring and its index, and the bytes of the inflight region; another pops ROUNDS chains (pop), or lets a pump
 * move as many frames (out, in).
 * Built with the address and undefined-behaviour sanitizers, it ends at the first byte read or written that is
 * not the device's to touch: guest memory lies between two ranges that nobody may touch.
 */
#define _GNU_SOURCE
#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <unistd.h>
#include "virtio/ring_internal.h"
#include "virtio/vpc_inflight.h"
#include "virtio/vpc_pump.h"

#define SIZE (1u << 20)
#define GUARD (64u << 20)
#define GPA 0x10000u
#define UADDR 0x7f0000000000u
#define NUM 64u
#define DESC 0x1000u
#define AVAIL 0x2000u
#define USED 0x3000u
#define TABLES 0x10000u
#define TABLE_LEN 32u
#define BUFFERS 0x40000u
#define HEADER 12u
#define REGION (16u + 16u * NUM)

static unsigned char *guest, *region; /* the driver's own mappings */
static atomic_int done;
static enum { POP, OUT, IN } mode;
static struct vpc_pump *pump;
static uint64_t rounds;
static int kick, far[2];

#define CHECK(what)                                                                                          \
    do {                                                                                                     \
        if (!(what)) {                                                                                       \
            fprintf(stderr, "line %d: %s\n", __LINE__, #what);                                               \
            exit(2);                                                                                         \
        }                                                                                                    \
    } while (0)

static uint64_t dice(uint64_t *state)
{
    uint64_t x = *state; /* xorshift64 */
    x ^= x << 13;
    x ^= x >> 7;
    return *state = x ^ x << 17;
}

/* Whole words, as a processor writes them. */
static void put16(uint32_t at, uint16_t v)
{
    __atomic_store_n((uint16_t *)(void *)(guest + at), v, __ATOMIC_RELAXED);
}

static uint16_t get16(uint32_t at)
{
    return __atomic_load_n((uint16_t *)(void *)(guest + at), __ATOMIC_RELAXED);
}

static void put_desc(uint32_t at, uint64_t addr, uint32_t len, uint16_t flags, uint16_t next)
{
    __atomic_store_n((uint64_t *)(void *)(guest + at), addr, __ATOMIC_RELAXED);
    __atomic_store_n((uint32_t *)(void *)(guest + at + 8), len, __ATOMIC_RELAXED);
    put16(at + 12, flags);
    put16(at + 14, next);
}

/* A good descriptor of a ring (entry i of NUM) or of a table (entry i of TABLE_LEN). */
static void mend(uint32_t base, uint32_t i, uint32_t n, uint64_t luck)
{
    uint16_t write = mode == IN ? VRING_DESC_F_WRITE : 0;
    uint32_t table = TABLES + (uint32_t)(luck >> 8) % NUM * TABLE_LEN * 16;

    if (n == NUM && luck & 1)
        put_desc(base + 16 * i, GPA + table, 16 * (1 + (uint32_t)(luck >> 20) % TABLE_LEN), VRING_DESC_F_INDIRECT, 0);
    else if (luck & 2 && i + 1 < n)
        put_desc(base + 16 * i, GPA + BUFFERS + 1024 * i, 1 + (uint32_t)(luck >> 32) % 600, VRING_DESC_F_NEXT | write,
                 (uint16_t)(i + 1));
    else
        put_desc(base + 16 * i, GPA + BUFFERS + 1024 * i, 1 + (uint32_t)(luck >> 32) % 600, VRING_DESC_F_WRITE, 0);
}

static void flip(uint64_t *state)
{
    static const uint16_t nexts[] = {0, 1, TABLE_LEN - 1, TABLE_LEN, NUM - 1, NUM, 0x7fff, 0x8000, 0xffff};
    static const uint32_t lens[] = {0, 1, 15, 16, 17, 512, 0x80000, 0x80010, 0x7ffffff0, 0xfffffff0, 0xffffffff};
    static const uint64_t addrs[] = {0, GPA - 1, GPA + SIZE - 16, GPA + SIZE - 1, GPA + SIZE, 1ull << 63, UINT64_MAX - 15};
    uint64_t luck = dice(state), value = luck >> 32;
    uint32_t base = DESC, n = NUM, at;

    if (luck & 1) {
        base = TABLES + (uint32_t)(luck >> 8) % NUM * TABLE_LEN * 16;
        n = TABLE_LEN;
    }
    uint32_t i = (uint32_t)(luck >> 16) % n;
    at = base + 16 * i;
    switch (luck >> 1 & 15) {
    case 0:
        put16(at + 14, luck & 1024 ? nexts[value % 9] : (uint16_t)value);
        break;
    case 1:
        put16(at + 12, (uint16_t)(value & 7));
        break;
    case 2:
        __atomic_store_n((uint32_t *)(void *)(guest + at + 8), luck & 1024 ? lens[value % 11] : (uint32_t)value % 4096,
                         __ATOMIC_RELAXED);
        break;
    case 3:
        __atomic_store_n((uint64_t *)(void *)(guest + at), addrs[value % 7], __ATOMIC_RELAXED);
        break;
    case 4:
        put16(AVAIL + 4 + 2 * (i % NUM), (uint16_t)value);
        break;
    case 5:
        if (value % 64 == 0) /* rarely: the ring is then broken until it is set up again */
            put16(AVAIL + 2, (uint16_t)(value >> 8));
        break;
    case 6:
        put16(AVAIL + 4 + 2 * (i % NUM), (uint16_t)(value % NUM));
        break;
    case 7:
        if (value % 64 == 0)
            put16(USED + 2, (uint16_t)(value >> 8));
        break;
    case 8: /* a mark, a next, or the head of the part */
        if (value & 1)
            __atomic_store_n(region + 16 + 16 * ((luck >> 24) % NUM), (uint8_t)(value >> 1 & 1), __ATOMIC_RELAXED);
        else if (value & 2)
            __atomic_store_n(region + 16 + 16 * ((luck >> 24) % NUM) + 6, (uint8_t)(value >> 8), __ATOMIC_RELAXED);
        else if (value % 64 == 0)
            __atomic_store_n(region + (luck >> 24) % REGION, (uint8_t)(value >> 8), __ATOMIC_RELAXED);
        break;
    default:
        mend(base, i, n, dice(state));
    }
}

/* The driver's honest half: keep the ring as full as it can be. */
static void offer(void)
{
    put16(AVAIL + 2, (uint16_t)(get16(USED + 2) + NUM / 2));
}

/* As after a reset by the driver: elsewhere in the ring, where a good chain begins for a moment. */
static void restart(struct vpc_vq *vq)
{
    static uint64_t luck = 99;
    uint16_t base = (uint16_t)dice(&luck);

    for (uint32_t i = 0; i < 4; i++) {
        uint32_t slot = (base + i) % NUM;
        mend(DESC, slot, NUM, dice(&luck));
        put16(AVAIL + 4 + 2 * slot, (uint16_t)slot);
    }
    put16(USED + 2, base);
    offer();
    if (luck >> 8 & 3)
        memset(region, 0, REGION);
    else /* of this ring, but for what was written there */
        __atomic_store_n((uint16_t *)(void *)(region + 14), (uint16_t)(base - (luck >> 16) % 4), __ATOMIC_RELAXED);
    vpc_vq_set_base(vq, base);
}

static void *flipper(void *arg)
{
    uint64_t *state = arg;
    struct vpc_pump_stats stats;
    unsigned char frame[1500] = {0};

    for (uint64_t i = 0; !atomic_load_explicit(&done, memory_order_relaxed); i++) {
        flip(state);
        if (mode == POP || i % 16)
            continue;
        offer();
        eventfd_write(kick, 1);
        if (mode == IN)
            (void)!send(far[1], frame, 1 + dice(state) % sizeof frame, MSG_DONTWAIT);
        vpc_pump_stats(pump, &stats);
        if (stats.frames + stats.dropped >= rounds) {
            atomic_store(&done, 1);
            vpc_pump_stop(pump);
        }
    }
    return NULL;
}

/* Map the guest between two guards. Higher holes of the address space are filled until the one between them is taken. */
static struct vpc_map *between_guards(struct vpc_supply *supply, int fd)
{
    struct vpc_map *map, *fill[256];
    unsigned char *range = mmap(NULL, 2ul * GUARD + SIZE, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    int n = 0;

    CHECK(range != MAP_FAILED);
    CHECK(munmap(range + GUARD, SIZE) == 0);
    for (;;) {
        CHECK(vpc_map_new(supply, fd, 0, SIZE, 0, &map) == 0);
        if (vpc_map_address(map) == (uintptr_t)range + GUARD)
            break;
        CHECK(n < 256);
        fill[n++] = map;
    }
    while (n)
        vpc_map_unref(fill[--n]);
    return map;
}

static uint64_t pop_all(struct vpc_vq *vq, uint64_t *broken, uint64_t *bytes)
{
    static unsigned char answer[4096], piece[4096];
    struct vpc_popped out[16];
    struct vpc_answer answers[16];
    uint64_t popped = 0, sum = 0;

    while (popped < rounds) {
        offer();
        int n = vpc_vq_pop(vq, out, 16, 1 << 20, 0);
        if (n == -EBADMSG) {
            CHECK(vpc_vq_error(vq) != NULL);
            ++*broken;
            restart(vq);
            continue;
        }
        CHECK(n >= 0);
        for (int i = 0; i < n; i++) {
            CHECK(!out[i].late && out[i].writable <= UINT32_MAX && out[i].loaded <= VPC_LOADED);
            CHECK(out[i].loaded == out[i].readable || (out[i].loaded == VPC_LOADED && out[i].readable > VPC_LOADED));
            for (uint64_t k = 0; k < out[i].loaded; k += 61)
                sum += out[i].data[k];
            if (out[i].loaded)
                sum += out[i].data[out[i].loaded - 1];
            /* The last piece of each side: what was checked is a copy, so it is there whatever the driver does. */
            uint64_t in = out[i].readable < sizeof piece ? out[i].readable : sizeof piece;
            uint64_t room = out[i].writable < sizeof answer ? out[i].writable : sizeof answer;
            CHECK(vpc_chain_read(vq, out[i].chain, out[i].readable - in, piece, in, 0) == 0);
            CHECK(vpc_chain_read(vq, out[i].chain, out[i].readable - in, piece, in + 1, 0) == -EMSGSIZE);
            CHECK(vpc_chain_write(vq, out[i].chain, out[i].writable - room, answer, room, 0) == 0);
            CHECK(vpc_chain_write(vq, out[i].chain, UINT64_MAX, answer, 2, 0) == -EMSGSIZE);
            *bytes += out[i].loaded + in;
            answers[i] = (struct vpc_answer){out[i].chain, answer, out[i].writable - room, room};
        }
        if (n)
            CHECK(vpc_vq_push(vq, answers, (uint32_t)n, 0) == 0);
        popped += (uint64_t)n;
    }
    return sum ? popped : popped; /* what was read counts for something */
}

static void pump_all(struct vpc_vq *vq, uint64_t *broken)
{
    struct vpc_pump_config config = {.fd = far[0], .kind = mode == IN ? VPC_FAR_SOCKET : VPC_FAR_NONE,
                                     .kick_fd = kick, .header = HEADER, .mergeable = mode == IN};

    while (!atomic_load(&done)) {
        int rc = mode == IN ? vpc_pump_in(pump, &config) : vpc_pump_out(pump, &config);
        CHECK(rc == 0 || rc == -EBADMSG);
        if (rc < 0) {
            CHECK(vpc_vq_error(vq) != NULL);
            ++*broken;
            restart(vq);
        }
    }
}

int main(int argc, char **argv)
{
    struct vpc_supply *supply;
    struct vpc_gm *gm;
    struct vpc_vq *vq;
    struct vpc_inflight *inflight;
    int region_fd = memfd_create("region", MFD_CLOEXEC);
    uint64_t state = argc > 3 ? strtoull(argv[3], NULL, 0) : 1, broken = 0, bytes = 0, count;
    pthread_t thread;
    int fd = memfd_create("guest", MFD_CLOEXEC);

    CHECK(argc > 2 && fd >= 0 && ftruncate(fd, SIZE) == 0 && state);
    mode = strcmp(argv[1], "pop") == 0 ? POP : strcmp(argv[1], "out") == 0 ? OUT : IN;
    rounds = strtoull(argv[2], NULL, 0);
    guest = mmap(NULL, SIZE, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    CHECK(guest != MAP_FAILED);
    CHECK(vpc_supply_new(&supply) == 0 && vpc_gm_new(supply, &gm) == 0 && vpc_vq_new(&vq) == 0);
    struct vpc_map *map = between_guards(supply, fd);
    CHECK(vpc_gm_add(gm, map, GPA, SIZE, UADDR) == 0);
    vpc_vq_set_features(vq, 1ull << VIRTIO_RING_F_INDIRECT_DESC | 1ull << VIRTIO_RING_F_EVENT_IDX);
    vpc_vq_set_memory(vq, gm);
    CHECK(vpc_vq_set_ring(vq, NUM, UADDR + DESC, UADDR + AVAIL, UADDR + USED) == 0);
    CHECK(region_fd >= 0 && ftruncate(region_fd, REGION) == 0);
    region = mmap(NULL, REGION, PROT_READ | PROT_WRITE, MAP_SHARED, region_fd, 0);
    CHECK(region != MAP_FAILED && vpc_inflight_new(supply, region_fd, 0, REGION, &inflight) == 0);
    CHECK(vpc_vq_set_inflight(vq, inflight, 0, NUM) == 0);
    vpc_inflight_unref(inflight);
    CHECK(vpc_pump_new(vq, &pump) == 0);
    kick = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    CHECK(kick >= 0 && socketpair(AF_UNIX, SOCK_DGRAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0, far) == 0);
    for (uint32_t i = 0; i < NUM; i++) {
        put16(AVAIL + 4 + 2 * i, (uint16_t)i);
        mend(DESC, i, NUM, dice(&state));
        for (uint32_t k = 0; k < TABLE_LEN; k++)
            mend(TABLES + i * TABLE_LEN * 16, k, TABLE_LEN, dice(&state));
    }
    CHECK(pthread_create(&thread, NULL, flipper, &state) == 0);
    if (mode == POP) {
        count = pop_all(vq, &broken, &bytes);
        atomic_store(&done, 1);
    } else {
        struct vpc_pump_stats stats;
        pump_all(vq, &broken);
        vpc_pump_stats(pump, &stats);
        count = stats.frames + stats.dropped;
        bytes = stats.bytes;
    }
    pthread_join(thread, NULL);
    printf("moved %lu broken %lu bytes %lu\n", (unsigned long)count, (unsigned long)broken, (unsigned long)bytes);
    vpc_pump_free(pump);
    vpc_vq_free(vq);
    vpc_gm_unref(gm);
    vpc_map_unref(map);
    vpc_supply_unref(supply);
    munmap(guest, SIZE);
    munmap(region, REGION);
    close(region_fd);
    close(fd);
    close(kick);
    close(far[0]);
    close(far[1]);
    return 0;
}
