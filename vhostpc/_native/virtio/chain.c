/* Batches of chains for a device in plain Python: bytes are copied here, the device sees private memory. */
#define _GNU_SOURCE
#include <stdlib.h>
#include <string.h>
#include "virtio/ring_internal.h"

void vpc_chain_free(struct vpc_chain *c)
{
    if (!c)
        return;
    vpc_gm_unref(c->gm);
    free(c->segs);
    free(c->data);
    free(c);
}

static struct vpc_chain *chain_new(struct vpc_gm *gm, uint16_t head)
{
    struct vpc_chain *c = calloc(1, sizeof(*c));

    if (!c)
        return NULL;
    c->late = true;
    c->head = head;
    vpc_gm_ref(gm);
    c->gm = gm;
    return c;
}

/* Walk the chain and read its first bytes into private memory. */
static int load_walked(struct vpc_vq *vq, struct vpc_chain *c, struct vpc_walk *w, int flags)
{
    int rc = vpc_vq_walk_head(vq, c->head, w, flags);

    if (rc < 0)
        return rc;
    uint64_t loaded = w->readable < VPC_LOADED ? w->readable : VPC_LOADED;
    rc = vpc_segs_touch(vq->gm, w->segs, 0, loaded, flags, vpc_vq_stopper(vq, flags));
    if (rc < 0)
        return rc;
    struct vpc_seg *segs = malloc((w->n ? w->n : 1) * sizeof(*segs));
    unsigned char *data = malloc(loaded ? loaded : 1);
    if (!segs || !data) {
        rc = -ENOMEM;
        goto fail;
    }
    memcpy(segs, w->segs, w->n * sizeof(*segs));
    rc = vpc_segs_read(vq->gm, segs, w->readable_segs, 0, data, loaded);
    if (!rc && vpc_gm_lost(vq->gm))
        rc = -EOWNERDEAD;
    if (rc < 0)
        goto fail;
    c->n = w->n;
    c->readable_segs = w->readable_segs;
    c->readable = w->readable;
    c->writable = w->writable;
    c->segs = segs;
    c->data = data;
    c->loaded = loaded;
    c->late = false;
    return 0;
fail:
    free(segs);
    free(data);
    return rc;
}

static int load(struct vpc_vq *vq, struct vpc_chain *c, int flags)
{
    struct vpc_walk w;

    vpc_walk_init(&w);
    int rc = load_walked(vq, c, &w, flags);
    vpc_walk_free(&w);
    return rc;
}

/* The same on a thread that may wait. The others are requested again once the descriptors are here: until then their
 * pages are not known. */
static int load_waiting(struct vpc_vq *vq, struct vpc_chain *c, uint32_t others, int flags)
{
    struct vpc_walk w;

    vpc_walk_init(&w);
    int rc = vpc_vq_walk_head(vq, c->head, &w, flags);
    if (!rc) {
        vpc_vq_request(vq, 1, others, false, VPC_LOADED, flags);
        rc = load_walked(vq, c, &w, flags);
    }
    vpc_walk_free(&w);
    return rc;
}

static void describe(const struct vpc_chain *c, struct vpc_popped *out)
{
    *out = (struct vpc_popped){.chain = (struct vpc_chain *)(uintptr_t)c, .data = c->data, .loaded = c->loaded,
                               .readable = c->readable, .writable = c->writable, .late = c->late};
}

int vpc_chain_load(struct vpc_vq *vq, struct vpc_chain *c, struct vpc_popped *out, int flags)
{
    int rc = vq->gm && vq->used ? load(vq, c, flags) : -ENOTCONN;

    if (!rc)
        describe(c, out);
    return rc;
}

int vpc_chain_rebase(struct vpc_chain *c, struct vpc_gm *gm)
{
    for (uint32_t i = 0; i < c->n; i++)
        if (!vpc_gm_mapped(gm, c->segs[i].gpa, c->segs[i].len))
            return -EFAULT;
    vpc_gm_ref(gm);
    vpc_gm_unref(c->gm);
    c->gm = gm;
    return 0;
}

int vpc_vq_pop(struct vpc_vq *vq, struct vpc_popped *out, uint32_t max_chains, uint64_t max_bytes, int flags)
{
    uint64_t bytes = 0;
    uint32_t n = 0;
    int rc = vpc_vq_ready(vq, flags);

    if (rc < 0)
        return rc;
    vpc_vq_disable_notify(vq);
    while (n < max_chains && (!n || bytes < max_bytes)) {
        uint16_t head;
        rc = flags & VPC_AGAIN ? (int)vpc_vq_left(vq) : vpc_vq_available(vq);
        if (rc <= 0)
            break;
        rc = vpc_vq_head(vq, 0, &head, flags);
        if (rc < 0)
            break;
        struct vpc_chain *c = chain_new(vq->gm, head);
        if (!c) {
            rc = -ENOMEM;
            break;
        }
        rc = load(vq, c, flags | VPC_TRY);
        if (rc == -EAGAIN && !(flags & VPC_LATE)) { /* a late one has asked for its pages, and so will the next */
            vpc_vq_request(vq, 1, max_chains - n - 1, false, VPC_LOADED, flags);
            if (!(flags & VPC_TRY))
                rc = load_waiting(vq, c, max_chains - n - 1, flags);
        }
        if (rc < 0 && !(rc == -EAGAIN && flags & VPC_LATE)) {
            vpc_chain_free(c);
            break;
        }
        bool again = vpc_vq_left(vq) > 0;
        vpc_vq_take(vq, head);
        bytes += c->loaded + c->n * sizeof(*c->segs);
        describe(c, &out[n]);
        out[n++].again = again;
        /* A hop that had to wait returns its one chain: a missing page delays no chain before it. */
        if (!(flags & VPC_TRY) && atomic_load_explicit(&vq->gm->supply->armed, memory_order_relaxed))
            break;
    }
    /* Chains popped before the error are good; the next call meets the error again. */
    return n ? (int)n : rc;
}

void vpc_vq_unpop(struct vpc_vq *vq, const struct vpc_chain *c)
{
    vpc_vq_give_back(vq, c->head);
}

static int touch_answer(const struct vpc_chain *c, uint64_t skip, uint64_t len, int flags, const atomic_int *stop)
{
    if (skip > c->writable || len > c->writable - skip)
        return -EMSGSIZE;
    return vpc_segs_touch(c->gm, c->segs + c->readable_segs, skip, len, flags, stop);
}

int vpc_chain_touch(const struct vpc_vq *vq, const struct vpc_chain *c, uint64_t skip, uint64_t len, int flags)
{
    return touch_answer(c, skip, len, flags, vpc_vq_stopper(vq, flags));
}

int vpc_late_look(struct vpc_vq *vq, struct vpc_late *late, uint32_t n, uint32_t *done, uint32_t max, uint64_t max_bytes,
                  uint32_t *in_flight, int flags)
{
    uint64_t bytes = 0;
    uint32_t come = 0;
    int rc = 0;

    *in_flight = 0;
    flags |= VPC_TRY | VPC_TELL_REQUESTED;
    for (uint32_t i = 0; i < n && come < max && bytes < max_bytes; i++) {
        struct vpc_late *at = &late[i];

        if (!at->chain)
            continue;
        rc = at->answer ? vpc_chain_touch(vq, at->chain, at->skip, at->len, flags)
                        : vpc_chain_load(vq, at->chain, &at->popped, flags);
        if (rc == -EALREADY)
            ++*in_flight;
        else if (!rc)
            done[come++] = i;
        else if (rc != -EAGAIN)
            break;
        if (!rc && !at->answer)
            bytes += at->chain->loaded + at->chain->n * sizeof(*at->chain->segs);
        rc = 0;
    }
    return come ? (int)come : rc;
}

int vpc_chain_read(const struct vpc_vq *vq, const struct vpc_chain *c, uint64_t skip, unsigned char *data,
                   uint64_t len, int flags)
{
    int rc;

    if (skip > c->readable || len > c->readable - skip)
        return -EMSGSIZE;
    if (vpc_gm_lost(c->gm))
        return -EOWNERDEAD;
    rc = vpc_segs_touch(c->gm, c->segs, skip, len, flags, vpc_vq_stopper(vq, flags));
    if (!rc)
        rc = vpc_segs_read(c->gm, c->segs, c->readable_segs, skip, data, len);
    if (!rc && vpc_gm_lost(c->gm))
        rc = -EOWNERDEAD;
    return rc;
}

int vpc_chain_write(const struct vpc_vq *vq, const struct vpc_chain *c, uint64_t skip, const unsigned char *data,
                    uint64_t len, int flags)
{
    int rc = touch_answer(c, skip, len, flags, vpc_vq_stopper(vq, flags));

    if (rc < 0)
        return rc;
    if (vpc_gm_lost(c->gm))
        return -EOWNERDEAD;
    return vpc_segs_write(c->gm, c->segs + c->readable_segs, c->n - c->readable_segs, skip, data, len, vq->log);
}

/* The pages of an answer are absent: ask for those of the answers behind it, and for as much of the chains that were
 * not even taken. */
static void request_answers(struct vpc_vq *vq, const struct vpc_answer *answers, uint32_t n)
{
    for (uint32_t i = 1; i < n; i++) {
        const struct vpc_answer *a = &answers[i];

        if (touch_answer(a->chain, a->skip, a->len, VPC_TRY | VPC_TELL_REQUESTED, NULL) == -EAGAIN)
            return; /* no room for more */
    }
    vpc_vq_request(vq, 0, VPC_AHEAD_MOST, true, answers->skip + answers->len, 0);
}

int vpc_vq_push(struct vpc_vq *vq, const struct vpc_answer *answers, uint32_t n, int flags)
{
    int rc;

    if (!n)
        return 0;
    if (!vq->gm || !vq->used || !vq->used_known)
        return -ENOTCONN;
    if (n > vq->num)
        return -EINVAL;
    for (uint32_t i = 0; i < n; i++) {
        rc = touch_answer(answers[i].chain, answers[i].skip, answers[i].len, flags | VPC_TRY, NULL);
        if (rc == -EAGAIN) {
            request_answers(vq, answers + i, n - i);
            if (!(flags & VPC_TRY))
                rc = touch_answer(answers[i].chain, answers[i].skip, answers[i].len, flags, NULL);
        }
        if (rc < 0)
            return rc;
    }
    rc = vpc_vq_touch_used(vq, n, flags, NULL);
    if (rc < 0)
        return rc;
    if (vpc_gm_lost(vq->gm))
        return -EOWNERDEAD;
    for (uint32_t i = 0; i < n; i++) {
        const struct vpc_chain *c = answers[i].chain;
        (void)vpc_segs_write(c->gm, c->segs + c->readable_segs, c->n - c->readable_segs, answers[i].skip,
                             answers[i].data, answers[i].len, vq->log);
        vpc_vq_put_used(vq, (uint16_t)i, c->head, (uint32_t)(answers[i].skip + answers[i].len));
    }
    rc = vpc_vq_publish(vq, (uint16_t)n);
    if (rc < 0)
        return rc;
    for (uint32_t i = 0; i < n; i++)
        vpc_chain_free(answers[i].chain);
    return 0;
}
