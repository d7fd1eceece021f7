/* A back-end that dies between any two instructions, and the one that comes after it.
 *
 *   restart ROUNDS [SEED]
 *
 * A child is the device: it takes chains, answers some of them in any order and in batches, gives young ones back. It
 * shares the ring and its inflight region with the parent, which lets it do one instruction at a time (ptrace) and looks
 * whether either has changed. Each state seen is one that a kill leaves behind: on a copy of it another device starts,
 * and must find every chain that was not answered, once, the taken ones in the order in which they were taken. Now and
 * then the child is killed there, and the next one goes on from the very state.
 */
#define _GNU_SOURCE
#include <sched.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <sys/ptrace.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>
#include "virtio/ring_internal.h"
#include "virtio/vpc_inflight.h"

#define SIZE 0x8000u
#define GPA 0x10000u
#define UADDR 0x7f0000000000u
#define NUM 8u
#define DESC 0x0u
#define AVAIL 0x100u
#define USED 0x200u
#define BUFFERS 0x1000u
#define PART (16u + 16u * NUM)

#define CHECK(what)                                                                                          \
    do {                                                                                                     \
        if (!(what)) {                                                                                       \
            fprintf(stderr, "line %d: %s\n", __LINE__, #what);                                               \
            exit(2);                                                                                         \
        }                                                                                                    \
    } while (0)

/* What outlives the device: guest memory, the region, and what the driver knows. */
struct shared {
    unsigned char *ring, *region;
    int ring_fd, region_fd;
};

/* The device's notes for the test, in memory of its own that is shared: which chain it takes or answers. */
struct notes {
    uint64_t taken;          /* how many chains were taken, ever */
    uint64_t order[NUM];     /* by head: when it was taken; 0: it is not */
};

static uint64_t dice(uint64_t *state)
{
    uint64_t x = *state; /* xorshift64 */
    x ^= x << 13;
    x ^= x >> 7;
    return *state = x ^ x << 17;
}

static uint16_t get16(const unsigned char *p)
{
    return __atomic_load_n((const uint16_t *)(const void *)p, __ATOMIC_RELAXED);
}

static void put16(unsigned char *p, uint16_t v)
{
    __atomic_store_n((uint16_t *)(void *)p, v, __ATOMIC_RELAXED);
}

static struct shared new_shared(void)
{
    struct shared s = {.ring_fd = memfd_create("ring", MFD_CLOEXEC), .region_fd = memfd_create("region", MFD_CLOEXEC)};

    CHECK(s.ring_fd >= 0 && s.region_fd >= 0);
    CHECK(ftruncate(s.ring_fd, SIZE) == 0 && ftruncate(s.region_fd, 4096) == 0);
    s.ring = mmap(NULL, SIZE, PROT_READ | PROT_WRITE, MAP_SHARED, s.ring_fd, 0);
    s.region = mmap(NULL, 4096, PROT_READ | PROT_WRITE, MAP_SHARED, s.region_fd, 0);
    CHECK(s.ring != MAP_FAILED && s.region != MAP_FAILED);
    return s;
}

struct device {
    struct vpc_supply *supply;
    struct vpc_gm *gm;
    struct vpc_map *map;
    struct vpc_vq *vq;
    struct vpc_inflight *region;
};

static struct device open_device(const struct shared *s)
{
    struct device d;

    CHECK(vpc_supply_new(&d.supply) == 0 && vpc_gm_new(d.supply, &d.gm) == 0 && vpc_vq_new(&d.vq) == 0);
    CHECK(vpc_map_new(d.supply, s->ring_fd, 0, SIZE, 0, &d.map) == 0);
    CHECK(vpc_gm_add(d.gm, d.map, GPA, SIZE, UADDR) == 0);
    vpc_vq_set_memory(d.vq, d.gm);
    CHECK(vpc_vq_set_ring(d.vq, NUM, UADDR + DESC, UADDR + AVAIL, UADDR + USED) == 0);
    CHECK(vpc_inflight_new(d.supply, s->region_fd, 0, PART, &d.region) == 0);
    CHECK(vpc_vq_set_inflight(d.vq, d.region, 0, NUM) == 0);
    vpc_vq_set_base(d.vq, 0); /* the front-end may say anything: the ring and the region are right */
    return d;
}

static void close_device(struct device *d)
{
    vpc_vq_free(d->vq);
    vpc_gm_unref(d->gm);
    vpc_map_unref(d->map);
    vpc_inflight_unref(d->region);
    vpc_supply_unref(d->supply);
}

/* --- the driver: posts chains, knows what was answered --- */

struct driver {
    uint16_t posted;        /* avail index */
    uint16_t reaped;
    uint32_t out;           /* a bit for each head that is with the device */
};

static void post(const struct shared *s, struct driver *d, uint64_t *luck)
{
    while ((uint32_t)__builtin_popcount(d->out) < NUM && dice(luck) % 4) {
        uint32_t head = (uint32_t)dice(luck) % NUM;

        while (d->out & 1u << head)
            head = (head + 1) % NUM;
        put16(s->ring + AVAIL + 4 + 2 * (d->posted % NUM), (uint16_t)head);
        d->out |= 1u << head;
        put16(s->ring + AVAIL + 2, ++d->posted);
    }
}

/* Take what was used: each chain once, and one that was with the device. */
static void reap(const unsigned char *ring, struct driver *d, struct notes *notes)
{
    for (uint16_t used = get16(ring + USED + 2); d->reaped != used; d->reaped++) {
        uint32_t id;

        memcpy(&id, ring + USED + 4 + 8 * (d->reaped % NUM), 4);
        CHECK(id < NUM && d->out & 1u << id);
        d->out &= ~(1u << id);
        if (notes)
            notes->order[id] = 0;
    }
}

/* --- a device that starts on what another left behind --- */

static void recover(const struct shared *s, const struct driver *driver, const struct notes *notes)
{
    struct driver d = *driver;
    struct vpc_popped out[NUM];
    struct vpc_answer answers[NUM];
    struct device next = open_device(s);
    uint64_t last = 0;

    reap(s->ring, &d, NULL);
    int n = vpc_vq_pop(next.vq, out, NUM, 1 << 20, 0);
    if (n < 0)
        fprintf(stderr, "%s\n", vpc_vq_error(next.vq) ? vpc_vq_error(next.vq) : "no reason");
    CHECK(n == __builtin_popcount(d.out)); /* none is lost, none is there twice: heads are checked by the reaping below */
    CHECK(vpc_vq_base(next.vq) == d.posted);
    for (int i = 0; i < n; i++) {
        uint16_t head = out[i].chain->head;

        CHECK(d.out & 1u << head);
        if (notes->order[head]) { /* taken before those that were not, and in order */
            CHECK(last != UINT64_MAX && notes->order[head] > last);
            last = notes->order[head];
        } else {
            last = UINT64_MAX;
        }
        answers[i] = (struct vpc_answer){.chain = out[i].chain, .data = (const unsigned char *)""};
    }
    if (n)
        CHECK(vpc_vq_push(next.vq, answers, (uint32_t)n, 0) == 0);
    reap(s->ring, &d, NULL);
    CHECK(d.out == 0);
    for (uint32_t i = 0; i < NUM; i++)
        CHECK(s->region[16 + 16 * i] == 0);
    CHECK(get16(s->region + 14) == get16(s->ring + USED + 2));
    close_device(&next);
}

/* --- the device that dies --- */

static void stop_point(void)
{
    raise(SIGSTOP);
}

/* Rounds of: look, take, answer some, give back some. The parent steps through those parts between two stops. */
static void live(const struct shared *s, struct notes *notes, uint64_t luck)
{
    struct device d;
    struct vpc_chain *open[NUM];
    int again[NUM], count = 0;

    d = open_device(s);
    for (;;) {
        struct vpc_popped out[NUM];
        struct vpc_answer answers[NUM];
        uint32_t room = NUM - (uint32_t)count, n = 0;

        stop_point(); /* the driver posts */
        int got = room ? vpc_vq_pop(d.vq, out, 1 + (uint32_t)dice(&luck) % room, 1 << 20, 0) : 0;
        if (got < 0)
            _exit(3);
        stop_point();
        for (int i = 0; i < got; i++) {
            uint16_t head = out[i].chain->head;
            if (!notes->order[head])
                notes->order[head] = ++notes->taken;
            again[count] = out[i].again;
            open[count++] = out[i].chain;
        }
        uint32_t wanted = count ? (uint32_t)dice(&luck) % ((uint32_t)count + 1) : 0;
        while (n < wanted) {
            int i = (int)(dice(&luck) % (uint64_t)count);
            answers[n++] = (struct vpc_answer){.chain = open[i], .data = (const unsigned char *)""};
            memmove(open + i, open + i + 1, (size_t)(count - i - 1) * sizeof(*open));
            memmove(again + i, again + i + 1, (size_t)(count - i - 1) * sizeof(*again));
            count--;
        }
        uint16_t heads[NUM];
        for (uint32_t i = 0; i < n; i++)
            heads[i] = answers[i].chain->head;
        stop_point();
        if (n && vpc_vq_push(d.vq, answers, n, 0) < 0)
            _exit(4);
        stop_point();
        for (uint32_t i = 0; i < n; i++)
            notes->order[heads[i]] = 0;
        /* Give back: only what nothing younger than it was answered before, here just after all was taken anew. */
        if (count && wanted == 0 && got > 0 && !again[count - 1]) {
            struct vpc_chain *c = open[--count];
            stop_point();
            vpc_vq_unpop(d.vq, c);
            stop_point();
            vpc_chain_free(c); /* its place in the order stays: it comes again before what is younger */
        }
    }
}

int main(int argc, char **argv)
{
    struct shared s = new_shared(), copy = new_shared();
    struct driver driver = {0};
    struct notes *notes = mmap(NULL, sizeof(*notes), PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    unsigned char seen_ring[0x400], seen_region[PART];
    uint64_t rounds = argc > 1 ? strtoull(argv[1], NULL, 0) : 100, luck = argc > 2 ? strtoull(argv[2], NULL, 0) : 1;
    uint64_t states = 0, kills = 0, steps = 0, stops = 0;

    cpu_set_t one;

    CHECK(notes != MAP_FAILED && luck);
    /* Both on one processor: a step is then a switch, and no wake-up of another one. */
    CPU_ZERO(&one);
    CPU_SET(sched_getcpu(), &one);
    CHECK(sched_setaffinity(0, sizeof one, &one) == 0);
    for (uint32_t i = 0; i < NUM; i++) {
        struct vring_desc desc = {.addr = GPA + BUFFERS + 64 * i, .len = 64};
        memcpy(s.ring + DESC + 16 * i, &desc, 16);
    }
    while (kills < rounds) {
        uint64_t seed = dice(&luck), until = 1 + dice(&luck) % 100;
        pid_t child = fork();
        int status, stepping = 0;

        CHECK(child >= 0);
        if (child == 0) {
            CHECK(ptrace(PTRACE_TRACEME, 0, NULL, NULL) == 0);
            live(&s, notes, seed);
        }
        memcpy(seen_ring, s.ring, sizeof seen_ring);
        memcpy(seen_region, s.region, sizeof seen_region);
        for (;;) {
            CHECK(waitpid(child, &status, 0) == child);
            CHECK(WIFSTOPPED(status));
            if (WSTOPSIG(status) == SIGSTOP) {
                stops++;
                stepping = !stepping; /* between two of them lies a call */
                reap(s.ring, &driver, notes);
                post(&s, &driver, &luck);
                memcpy(seen_ring, s.ring, sizeof seen_ring);
            } else {
                CHECK(WSTOPSIG(status) == SIGTRAP && stepping);
                steps++;
            }
            if (memcmp(seen_ring, s.ring, sizeof seen_ring) || memcmp(seen_region, s.region, sizeof seen_region)) {
                memcpy(seen_ring, s.ring, sizeof seen_ring);
                memcpy(seen_region, s.region, sizeof seen_region);
                memcpy(copy.ring, s.ring, SIZE);
                memcpy(copy.region, s.region, 4096);
                recover(&copy, &driver, notes);
                states++;
                if (--until == 0) {
                    CHECK(kill(child, SIGKILL) == 0 && waitpid(child, &status, 0) == child);
                    kills++;
                    break;
                }
            }
            CHECK(ptrace(stepping ? PTRACE_SINGLESTEP : PTRACE_CONT, child, NULL, NULL) == 0);
        }
    }
    printf("kills %lu states %lu steps %lu stops %lu\n", (unsigned long)kills, (unsigned long)states,
           (unsigned long)steps, (unsigned long)stops);
    return 0;
}
