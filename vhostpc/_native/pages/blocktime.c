/* How long vCPUs and clients stood still, each and all together. See fault_internal.h.
 *
 * A party is a vCPU, or a client as a whole: it stands still from the first of its open waits to the end of the last. All of
 * this is done where a waiter enters the list or leaves it, under the lock that is held there anyhow, with the times that
 * were taken there anyhow. */
#define _GNU_SOURCE
#include "clock.h"
#include "pages/fault_internal.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

/* A time, or the latest that was used: all faults of one read begin when it was made, and some end before others begin. */
static uint64_t not_before(struct vpc_fault *s, uint64_t when)
{
    if (when > s->latest_ns)
        s->latest_ns = when;
    return s->latest_ns;
}

/* ---- together */

static void group_look(struct blocked_group *g, uint64_t now)
{
    int all = g->members && g->down == g->members;

    if (all && !g->all_down) {
        g->since_ns = now;
    } else if (!all && g->all_down) {
        g->total_ns += now - g->since_ns;
    }
    g->all_down = all;
}

static uint64_t group_ns(const struct blocked_group *g, uint64_t now)
{
    return g->total_ns + (g->all_down ? now - g->since_ns : 0);
}

static void joined(struct vpc_fault *s, struct party *p, unsigned groups, uint64_t now)
{
    for (unsigned i = 0; i < BLOCKED_GROUPS; i++) {
        int is = p->groups >> i & 1, will = groups >> i & 1;
        struct blocked_group *g = &s->groups[i];
        if (is == will)
            continue;
        g->members += will ? 1u : -1u;
        if (p->open)
            g->down += will ? 1u : -1u;
        group_look(g, now);
    }
    p->groups = groups;
}

void vpc_blocked_join(struct vpc_fault *s, struct party *p, unsigned groups)
{
    joined(s, p, groups, not_before(s, now_ns()));
}

/* ---- one */

static void party_down(struct vpc_fault *s, struct party *p, uint64_t when)
{
    if (p->open++)
        return;
    when = not_before(s, when);
    p->since_ns = when;
    for (unsigned i = 0; i < BLOCKED_GROUPS; i++) {
        if (!(p->groups >> i & 1))
            continue;
        s->groups[i].down++;
        group_look(&s->groups[i], when);
    }
}

static void party_up(struct vpc_fault *s, struct party *p, uint64_t now)
{
    if (--p->open)
        return;
    now = not_before(s, now);
    p->total_ns += now - p->since_ns;
    for (unsigned i = 0; i < BLOCKED_GROUPS; i++) {
        if (!(p->groups >> i & 1))
            continue;
        s->groups[i].down--;
        group_look(&s->groups[i], now);
    }
}

uint64_t vpc_blocked_ns(const struct party *p, uint64_t now)
{
    return p->total_ns + (p->open ? now - p->since_ns : 0);
}

/* ---- vCPUs */

static uint32_t thread_slot(const struct vpc_fault *s, uint32_t thread)
{
    uint32_t slot = thread * 2654435761u & s->slot_mask;

    while (s->slots[slot] && s->vcpus[s->slots[slot] - 1].stats.thread != thread)
        slot = (slot + 1) & s->slot_mask;
    return slot;
}

/* Of a thread of our own mapping: a vCPU, or one of the others. */
static struct vcpu *vcpu_of(struct vpc_fault *s, const struct vpc_waiter *w)
{
    if (w->client != s->vcpu_client)
        return NULL;
    return w->vcpu < 0 ? &s->others : &s->vcpus[w->vcpu];
}

static void thread_begin(struct vpc_fault *s, struct vpc_waiter *w)
{
    struct vcpu *v;

    w->vcpu = -1;
    if (w->client == s->vcpu_client && w->thread)
        w->vcpu = (int32_t)s->slots[thread_slot(s, w->thread)] - 1;
    if ((v = vcpu_of(s, w)))
        party_down(s, &v->party, w->since_ns);
}

void vpc_blocked_begin(struct vpc_fault *s, struct vpc_waiter *w)
{
    party_down(s, &s->clients[w->client]->party, w->since_ns);
    thread_begin(s, w);
}

void vpc_blocked_end(struct vpc_fault *s, const struct vpc_waiter *w, uint64_t now)
{
    struct vcpu *v = vcpu_of(s, w);

    party_up(s, &s->clients[w->client]->party, now);
    if (v)
        party_up(s, &v->party, now);
}

void vpc_blocked_count(struct vpc_fault *s, const struct vpc_waiter *w, uint64_t wait)
{
    struct vcpu *v = vcpu_of(s, w);
    uint64_t us = wait / 1000;

    if (!v)
        return;
    v->stats.waits++;
    v->stats.histogram[histogram_bucket(wait)]++;
    if (wait > v->stats.longest_ns)
        v->stats.longest_ns = wait;
    /* As QEMU counts them: faults whose page had to come, of threads that are told apart. */
    if (!w->thread || w->block < 0 || (w->way != VPC_WAY_ASKED && w->way != VPC_WAY_JOINED))
        return;
    v->stats.remote++;
    v->stats.remote_ns += wait;
    unsigned bucket = us ? 63u - (unsigned)__builtin_clzll(us) : 0;
    s->latency[bucket < VPC_LATENCY_BUCKETS ? bucket : VPC_LATENCY_BUCKETS - 1]++;
}

void vpc_blocked_free(struct vpc_fault *s)
{
    free(s->vcpus);
    free(s->slots);
}

/* Room for that many vCPUs, none of which has a thread: 0 or -ENOMEM. */
static int vcpus_room(struct vpc_fault *s, uint32_t count)
{
    uint32_t room = 4;

    while (room < 2 * count)
        room *= 2;
    s->vcpus = calloc(count ? count : 1, sizeof *s->vcpus);
    s->slots = calloc(room, sizeof *s->slots);
    if (!s->vcpus || !s->slots) {
        vpc_blocked_free(s);
        s->vcpus = NULL;
        s->slots = NULL;
        return -ENOMEM;
    }
    s->vcpu_count = count;
    s->slot_mask = room - 1;
    return 0;
}

int vpc_fault_set_vcpus(struct vpc_fault *s, int id, const uint32_t *threads, uint32_t count)
{
    int rc = 0, first;

    if (count > VPC_MOST_VCPUS)
        return -EINVAL;
    pthread_mutex_lock(&s->lock);
    struct client *c = vpc_client_of(s, id);
    if (!c)
        rc = -ENOENT;
    else if (s->vcpus && (count != s->vcpu_count || id != s->vcpu_client))
        rc = -EINVAL;
    first = !s->vcpus;
    if (rc == 0 && first)
        rc = vcpus_room(s, count);
    if (rc == 0) {
        uint64_t now = not_before(s, now_ns());

        s->vcpu_client = id;
        joined(s, &c->party, 0, now);
        memset(s->slots, 0, (s->slot_mask + 1) * sizeof *s->slots);
        for (uint32_t i = 0; i < count; i++)
            s->vcpus[i].stats.thread = 0;
        for (uint32_t i = 0; i < count; i++) {
            struct vcpu *v = &s->vcpus[i];
            uint32_t slot = threads[i] ? thread_slot(s, threads[i]) : 0;
            int is_new = threads[i] && !s->slots[slot];
            if (is_new) {
                v->stats.thread = threads[i];
                s->slots[slot] = i + 1;
            }
            /* One that has no thread can neither wait nor keep the others from waiting together. */
            joined(s, &v->party, is_new ? 1u << GROUP_VCPUS | 1u << GROUP_ALL : 0, now);
        }
        for (uint32_t i = 0; first && i < s->waiter_count; i++)
            if (s->waiters[i].client == id)
                thread_begin(s, &s->waiters[i]);
    }
    pthread_mutex_unlock(&s->lock);
    return rc;
}

/* ---- numbers */

static void numbers_of(const struct vcpu *v, struct vpc_vcpu_waits *out, uint64_t now)
{
    *out = v->stats;
    out->waiting_now = v->party.open;
    out->blocked_ns = vpc_blocked_ns(&v->party, now);
}

int vpc_fault_blocked(struct vpc_fault *s, struct vpc_blocked *out)
{
    pthread_mutex_lock(&s->lock);
    uint64_t now = not_before(s, now_ns());
    out->all_vcpus_ns = group_ns(&s->groups[GROUP_VCPUS], now);
    out->all_ns = group_ns(&s->groups[GROUP_ALL], now);
    memcpy(out->latency, s->latency, sizeof out->latency);
    numbers_of(&s->others, &out->others, now);
    pthread_mutex_unlock(&s->lock);
    return 0;
}

int vpc_fault_vcpu_waits(struct vpc_fault *s, uint32_t index, struct vpc_vcpu_waits *out)
{
    int rc = -ENOENT;

    pthread_mutex_lock(&s->lock);
    if (index < s->vcpu_count) {
        numbers_of(&s->vcpus[index], out, not_before(s, now_ns()));
        rc = 0;
    }
    pthread_mutex_unlock(&s->lock);
    return rc;
}
