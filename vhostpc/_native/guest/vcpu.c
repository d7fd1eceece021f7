/* vCPUs: see vpc_vcpu.h. */
#define _GNU_SOURCE
#include "guest/vpc_vcpu.h"
#include "clock.h"
#include "event_internal.h"
#include "pages/ram_internal.h"

#include <poll.h>
#include <pthread.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <unistd.h>

#define WORDS (TARGET_PAGE / 8)
#define MAX_AREAS 256
#define MOST_STEPS ((uint64_t)1 << 62)
/* A vCPU that was delayed for longer than this goes on at its rate and makes up for no more. */
#define MOST_BEHIND_NS 10000000u

/* From parked to parked: vpc_vcpu_go, the thread begins, vpc_vcpu_stop, the thread has ended its page. A run that is
 * stopped before the thread began never took place. */
enum { PARKED, GOING, RUNNING, STOPPING };

/* The first words of a page identify it; the rest follows from them. */
enum { INDEX, GENERATION, OWNER, SEED, REST };

struct area {
    int block;
    uint64_t first, count; /* target pages of the block */
    uint64_t start;        /* number of the first one, over all areas of the list */
};

struct areas {
    unsigned count;
    uint64_t pages;
    struct area list[MAX_AREAS];
};

struct vpc_vcpu {
    struct vpc_ram *ram;
    uint32_t index, count;
    struct areas listed, touch;
    struct vpc_vcpu_state state;
    /* The order of rewriting: place k is own page (factor * k + shift) mod mine. */
    uint64_t mine, factor, inverse, shift;
    _Atomic uint64_t write_rate, read_rate;
    int control; /* eventfd: look at phase, ended and the rates again */
    int parked;  /* eventfd: a run has ended */
    _Atomic int phase, ended;
    pthread_mutex_t lock; /* stats; never held over a touch */
    struct vpc_vcpu_stats stats;
    uint64_t page[WORDS]; /* private: the page that was read, the page that is about to be written */
};

/* ---- life */

int vpc_vcpu_new(struct vpc_ram *ram, uint32_t index, uint32_t count, struct vpc_vcpu **out)
{
    struct vpc_vcpu *v;

    if (index >= count)
        return -EINVAL;
    v = calloc(1, sizeof *v);
    if (!v)
        return -ENOMEM;
    v->control = event_new();
    v->parked = v->control < 0 ? -1 : event_new();
    if (v->parked < 0) {
        int rc = -errno;
        if (v->control >= 0)
            close(v->control);
        free(v);
        return rc;
    }
    pthread_mutex_init(&v->lock, NULL);
    v->ram = ram;
    v->index = index;
    v->count = count;
    v->stats.first_bad.block = -1;
    *out = v;
    return 0;
}

void vpc_vcpu_free(struct vpc_vcpu *v)
{
    if (!v)
        return;
    close(v->control);
    close(v->parked);
    pthread_mutex_destroy(&v->lock);
    free(v);
}

int vpc_vcpu_add_area(struct vpc_vcpu *v, int block, uint64_t first, uint64_t count, int touch)
{
    struct areas *a = touch ? &v->touch : &v->listed;
    struct vpc_block *b = ram_block(v->ram, block);
    uint64_t pages = b ? b->length >> TARGET_SHIFT : 0;

    if (!b || count == 0 || first > pages || count > pages - first)
        return -ERANGE;
    if (a->count == MAX_AREAS)
        return -ENOSPC;
    a->list[a->count++] = (struct area){.block = block, .first = first, .count = count, .start = a->pages};
    a->pages += count;
    return 0;
}

static int moves(struct vpc_vcpu *v, int from, int to)
{
    return atomic_compare_exchange_strong(&v->phase, &from, to);
}

static int parked(const struct vpc_vcpu *v)
{
    return atomic_load(&v->phase) == PARKED;
}

int vpc_vcpu_go(struct vpc_vcpu *v)
{
    if (!v->mine)
        return -EINVAL;
    if (!moves(v, PARKED, GOING))
        return -EBUSY;
    event_poke(v->control);
    return 0;
}

void vpc_vcpu_stop(struct vpc_vcpu *v)
{
    if (moves(v, GOING, PARKED))
        event_poke(v->parked);
    else if (moves(v, RUNNING, STOPPING))
        event_poke(v->control);
}

int vpc_vcpu_arm(struct vpc_vcpu *v)
{
    if (!parked(v))
        return -EBUSY;
    atomic_store(&v->ended, 0);
    return 0;
}

void vpc_vcpu_end(struct vpc_vcpu *v)
{
    atomic_store(&v->ended, 1);
    vpc_vcpu_stop(v);
    event_poke(v->control);
}

int vpc_vcpu_parked(struct vpc_vcpu *v)
{
    return parked(v);
}

int vpc_vcpu_parked_fd(struct vpc_vcpu *v)
{
    return v->parked;
}

int vpc_vcpu_set_rates(struct vpc_vcpu *v, uint64_t writes, uint64_t reads)
{
    atomic_store(&v->write_rate, writes);
    atomic_store(&v->read_rate, reads);
    event_poke(v->control);
    return 0;
}

/* ---- numbers */

/* splitmix64's last step. */
static inline uint64_t mix(uint64_t z)
{
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    return z ^ (z >> 31);
}

#define GOLDEN 0x9e3779b97f4a7c15u

__extension__ typedef unsigned __int128 wide;

static uint64_t times_mod(uint64_t a, uint64_t b, uint64_t m)
{
    return (uint64_t)((wide)a * b % m);
}

static uint64_t common_divisor(uint64_t a, uint64_t b)
{
    while (b) {
        uint64_t rest = a % b;
        a = b;
        b = rest;
    }
    return a;
}

/* x with a * x mod m = 1; m is at most 2^52 (pages of 64 bits of bytes), so signed numbers suffice. */
static uint64_t inverse_mod(uint64_t a, uint64_t m)
{
    int64_t x = 0, y = 1, low = (int64_t)m, high = (int64_t)a;

    while (high > 1) {
        int64_t q = low / high, rest = low % high, next = x - q * y;
        low = high;
        high = rest;
        x = y;
        y = next;
    }
    return (uint64_t)(y < 0 ? y + (int64_t)m : y);
}

static void choose_order(struct vpc_vcpu *v)
{
    uint64_t m = v->mine, draw = mix(v->state.seed + GOLDEN * (v->index + 1));

    v->factor = v->inverse = 1;
    v->shift = mix(draw + GOLDEN) % m;
    if (m > 2) {
        v->factor = 1 + draw % (m - 1);
        while (common_divisor(v->factor, m) != 1)
            v->factor = 1 + v->factor % (m - 1);
        v->inverse = inverse_mod(v->factor, m);
    }
}

int vpc_vcpu_set_state(struct vpc_vcpu *v, const struct vpc_vcpu_state *state)
{
    if (!parked(v))
        return -EBUSY;
    if (v->listed.pages < v->count || state->step > MOST_STEPS)
        return -EINVAL;
    v->state = *state;
    v->mine = (v->listed.pages - v->index - 1) / v->count + 1;
    choose_order(v);
    v->stats.step = state->step;
    return 0;
}

int vpc_vcpu_state(struct vpc_vcpu *v, struct vpc_vcpu_state *out)
{
    if (!parked(v))
        return -EBUSY;
    *out = v->state;
    return 0;
}

/* Which of the own pages is rewritten at a step. */
static uint64_t page_of_step(const struct vpc_vcpu *v, uint64_t step)
{
    return (times_mod(step % v->mine, v->factor, v->mine) + v->shift) % v->mine;
}

static uint64_t generation_of(const struct vpc_vcpu *v, uint64_t own)
{
    uint64_t place = times_mod((own + v->mine - v->shift) % v->mine, v->inverse, v->mine);

    return v->state.step / v->mine + (place < v->state.step % v->mine);
}

static uint64_t draw(struct vpc_vcpu *v)
{
    return mix(mix(v->state.seed ^ ((uint64_t)v->index << 32)) + GOLDEN * ++v->state.draws);
}

int vpc_vcpu_stats(struct vpc_vcpu *v, struct vpc_vcpu_stats *out)
{
    pthread_mutex_lock(&v->lock);
    *out = v->stats;
    pthread_mutex_unlock(&v->lock);
    out->running = !parked(v);
    return 0;
}

/* ---- pages */

static const struct area *area_of(const struct areas *a, uint64_t index)
{
    unsigned low = 0, high = a->count;

    while (high - low > 1) {
        unsigned mid = (low + high) / 2;
        if (a->list[mid].start <= index)
            low = mid;
        else
            high = mid;
    }
    return &a->list[low];
}

int64_t vpc_vcpu_next(struct vpc_vcpu *v, int *block)
{
    uint64_t index;
    const struct area *in;

    if (!parked(v) || !v->mine)
        return -EBUSY;
    index = page_of_step(v, v->state.step) * v->count + v->index;
    in = area_of(&v->listed, index);
    *block = in->block;
    return (int64_t)(in->first + index - in->start);
}

static unsigned char *page_at(const struct vpc_vcpu *v, const struct areas *a, uint64_t index)
{
    const struct area *in = area_of(a, index);

    return v->ram->blocks[in->block]->map + ((in->first + index - in->start) << TARGET_SHIFT);
}

struct stamp {
    uint64_t head[REST];
    uint64_t key;
};

static struct stamp stamp_of(const struct vpc_vcpu *v, uint64_t index, uint64_t generation)
{
    struct stamp s = {.head = {index, generation, v->index | (uint64_t)v->count << 32, v->state.seed}};

    for (int i = 0; i < REST; i++)
        s.key = mix(s.key + s.head[i] + GOLDEN);
    return s;
}

static inline uint64_t word_of(const struct stamp *s, uint64_t i)
{
    return i < REST ? s->head[i] : mix(s->key + i * GOLDEN);
}

/* Compare the private copy with the expected page; returns 1 if they agree, otherwise describes it in bad. */
static int compare(const struct vpc_vcpu *v, uint64_t index, struct vpc_vcpu_bad *bad)
{
    struct stamp s = stamp_of(v, index, generation_of(v, index / v->count));

    for (uint64_t i = 0; i < WORDS; i++) {
        if (v->page[i] == word_of(&s, i))
            continue;
        const struct area *in = area_of(&v->listed, index);
        *bad = (struct vpc_vcpu_bad){.block = in->block,
                                     .word = (uint32_t)i,
                                     .page = in->first + index - in->start,
                                     .index = index,
                                     .generation = s.head[GENERATION],
                                     .found_index = v->page[INDEX],
                                     .found_generation = v->page[GENERATION],
                                     .found_owner = v->page[OWNER],
                                     .found_seed = v->page[SEED]};
        return 0;
    }
    return 1;
}

/* ---- what a vCPU does */

/* What one beat was. */
struct beat {
    uint64_t waited;
    unsigned reads, writes, checks, glances, touches, bad;
    struct vpc_vcpu_bad what;
};

static void book(struct vpc_vcpu *v, const struct beat *b)
{
    struct vpc_vcpu_stats *s = &v->stats;
    uint64_t now = now_ns();

    pthread_mutex_lock(&v->lock);
    s->beats++;
    s->reads += b->reads;
    s->writes += b->writes;
    s->checks += b->checks;
    s->glances += b->glances;
    s->touches += b->touches;
    s->histogram[histogram_bucket(b->waited)]++;
    s->stalled_ns += b->waited;
    if (b->waited > s->longest_ns)
        s->longest_ns = b->waited;
    if (b->bad && s->bad++ == 0)
        s->first_bad = b->what;
    if (s->first_beat_ns == 0)
        s->first_beat_ns = now;
    s->last_beat_ns = now;
    s->step = v->state.step;
    pthread_mutex_unlock(&v->lock);
}

/* Wait for the page if it is missing; returns how long that took. */
static uint64_t first_touch(unsigned char *at)
{
    uint64_t begun = now_ns();

    (void)*(volatile unsigned char *)at;
    return now_ns() - begun;
}

static int check_page(struct vpc_vcpu *v, uint64_t index, struct beat *b)
{
    unsigned char *at = page_at(v, &v->listed, index);

    b->waited = first_touch(at);
    memcpy(v->page, at, TARGET_PAGE);
    if (ram_lost(v->ram))
        return -EOWNERDEAD;
    b->reads = b->checks = 1;
    b->bad = !compare(v, index, &b->what);
    return 0;
}

static void write_page(struct vpc_vcpu *v, uint64_t index, uint64_t generation, uint64_t *waited)
{
    struct stamp s = stamp_of(v, index, generation);
    unsigned char *at = page_at(v, &v->listed, index);

    for (uint64_t i = 0; i < WORDS; i++)
        v->page[i] = word_of(&s, i);
    uint64_t begun = now_ns();
    /* The word that never changes: others read it meanwhile. A page that is protected waits here. */
    __atomic_store_n((uint64_t *)(void *)at, s.head[INDEX], __ATOMIC_RELAXED);
    *waited += now_ns() - begun;
    memcpy(at + 8, v->page + 1, TARGET_PAGE - 8);
}

/* A step: the page is checked for the last time in this generation, and rewritten. */
static int rewrite(struct vpc_vcpu *v)
{
    uint64_t index = page_of_step(v, v->state.step) * v->count + v->index;
    struct beat b = {.writes = 1};
    int rc = check_page(v, index, &b);

    if (rc < 0)
        return rc;
    write_page(v, index, v->state.step / v->mine + 1, &b.waited);
    if (ram_lost(v->ram))
        return -EOWNERDEAD;
    v->state.step++;
    book(v, &b);
    return 0;
}

static int glance(struct vpc_vcpu *v, uint64_t index, struct beat *b)
{
    uint64_t begun = now_ns();
    uint64_t found = __atomic_load_n((uint64_t *)(void *)page_at(v, &v->listed, index), __ATOMIC_RELAXED);

    b->waited = now_ns() - begun;
    if (ram_lost(v->ram))
        return -EOWNERDEAD;
    b->reads = b->glances = 1;
    b->bad = found != index;
    const struct area *in = area_of(&v->listed, index);
    b->what = (struct vpc_vcpu_bad){
        .block = in->block, .page = in->first + index - in->start, .index = index, .found_index = found};
    return 0;
}

/* Read one page: most often an own one. */
static int look(struct vpc_vcpu *v)
{
    uint64_t kind = draw(v) & 15, number = draw(v);
    struct beat b = {0};
    int rc = 0;

    if (kind < 2 && v->touch.count) {
        b.waited = first_touch(page_at(v, &v->touch, number % v->touch.pages));
        b.reads = b.touches = 1;
        rc = ram_lost(v->ram);
    } else if (kind < 4 && number % v->listed.pages % v->count != v->index) {
        rc = glance(v, number % v->listed.pages, &b);
    } else {
        rc = check_page(v, number % v->mine * v->count + v->index, &b);
    }
    if (rc == 0)
        book(v, &b);
    return rc;
}

/* When the next operation is due, at this rate. */
static uint64_t next_due(uint64_t due, uint64_t rate, uint64_t now)
{
    due += rate == VPC_RATE_UNLIMITED ? 0 : 1000000000u / rate;
    return due + MOST_BEHIND_NS < now ? now - MOST_BEHIND_NS : due;
}

/* Sleep until the time, or until kicked; returns 1 then. */
static int sleep_until(struct vpc_vcpu *v, uint64_t when)
{
    uint64_t now = now_ns(), rest = when > now ? when - now : 0;
    struct timespec t = {.tv_sec = (time_t)(rest / 1000000000u), .tv_nsec = (long)(rest % 1000000000u)};
    struct pollfd p = {.fd = v->control, .events = POLLIN};

    if (ppoll(&p, 1, when == UINT64_MAX ? NULL : &t, NULL) <= 0)
        return 0;
    event_drain(v->control);
    return 1;
}

static void begin(struct vpc_vcpu *v)
{
    pthread_mutex_lock(&v->lock);
    v->stats.thread = (uint32_t)syscall(SYS_gettid);
    v->stats.first_beat_ns = 0;
    pthread_mutex_unlock(&v->lock);
}

/* One run: until stopped. */
static int run(struct vpc_vcpu *v)
{
    uint64_t write_due, read_due;
    int rc = 0;

    begin(v);
    write_due = read_due = now_ns();
    while (rc == 0 && atomic_load(&v->phase) == RUNNING) {
        uint64_t writes = atomic_load(&v->write_rate), reads = atomic_load(&v->read_rate), now = now_ns();
        int idle = 1;

        if (writes && now >= write_due) {
            rc = rewrite(v);
            write_due = next_due(write_due, writes, now);
            idle = 0;
        }
        if (rc == 0 && reads && now >= read_due && atomic_load(&v->phase) == RUNNING) {
            rc = look(v);
            read_due = next_due(read_due, reads, now);
            idle = 0;
        }
        if (!idle)
            continue;
        uint64_t when = writes ? write_due : UINT64_MAX;
        if (reads && read_due < when)
            when = read_due;
        if (sleep_until(v, when))
            write_due = read_due = now_ns(); /* perhaps for another rate */
    }
    return rc;
}

int vpc_vcpu_run(struct vpc_vcpu *v, int once)
{
    int rc = 0;

    while (rc == 0 && !atomic_load(&v->ended)) {
        if (moves(v, GOING, RUNNING)) {
            rc = run(v);
            atomic_store(&v->phase, PARKED);
            event_poke(v->parked);
        } else if (once) {
            break;
        } else {
            sleep_until(v, UINT64_MAX);
        }
    }
    return rc;
}

int vpc_vcpu_fill(struct vpc_vcpu *v)
{
    uint64_t waited = 0;

    if (!v->mine || v->state.step)
        return -EINVAL;
    for (uint64_t own = 0; own < v->mine; own++)
        write_page(v, own * v->count + v->index, 0, &waited);
    return ram_lost(v->ram);
}

int64_t vpc_vcpu_sweep(struct vpc_vcpu *v, struct vpc_vcpu_bad *first)
{
    int64_t bad = 0;

    *first = (struct vpc_vcpu_bad){.block = -1};
    for (uint64_t own = 0; own < v->mine; own++) {
        struct beat b = {0};
        int rc = check_page(v, own * v->count + v->index, &b);
        if (rc < 0)
            return rc;
        if (b.bad && bad++ == 0)
            *first = b.what;
    }
    return bad;
}
