/* Batches of chains for a device in plain Python: bytes are copied here, the device sees private memory. */
#define _GNU_SOURCE
#include <stdlib.h>
#include <string.h>
#include "ring_internal.h"

/* Readable bytes of one chain that are copied at once; no device here takes larger requests. */
#define MAX_CHAIN_BYTES (64u << 20)

void vpc_chain_free(struct vpc_chain *c)
{
    if (!c)
        return;
    vpc_gm_unref(c->gm);
    free(c->segs);
    free(c->data);
    free(c);
}

static struct vpc_chain *chain_new(struct vpc_gm *gm, const struct vpc_walk *w)
{
    struct vpc_chain *c = calloc(1, sizeof(*c));

    if (!c)
        return NULL;
    c->head = w->head;
    c->n = w->n;
    c->readable_segs = w->readable_segs;
    c->readable = w->readable;
    c->writable = w->writable;
    c->segs = malloc((w->n ? w->n : 1) * sizeof(*c->segs));
    c->data = malloc(w->readable ? w->readable : 1);
    if (!c->segs || !c->data) {
        free(c->segs);
        free(c->data);
        free(c);
        return NULL;
    }
    memcpy(c->segs, w->segs, w->n * sizeof(*c->segs));
    vpc_gm_ref(gm);
    c->gm = gm;
    return c;
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
    struct vpc_walk w;
    uint64_t bytes = 0;
    uint32_t n = 0;
    int rc = vpc_vq_ready(vq, flags);

    if (rc < 0)
        return rc;
    vpc_vq_disable_notify(vq);
    while (n < max_chains && (!n || bytes < max_bytes)) {
        rc = vpc_vq_available(vq);
        if (rc <= 0)
            break;
        rc = vpc_vq_walk(vq, 0, &w, flags);
        if (rc < 0)
            break;
        if (w.readable > MAX_CHAIN_BYTES) {
            rc = vpc_vq_break(vq, "a chain has more than 64 MiB of readable bytes");
            break;
        }
        rc = vpc_segs_touch(vq->gm, w.segs, 0, w.readable_segs, flags, &vq->stop);
        if (rc < 0)
            break;
        struct vpc_chain *c = chain_new(vq->gm, &w);
        if (!c) {
            rc = -ENOMEM;
            break;
        }
        rc = vpc_segs_read(vq->gm, c->segs, c->readable_segs, 0, c->data, c->readable);
        if (!rc && vpc_gm_lost(vq->gm))
            rc = -EOWNERDEAD;
        if (rc < 0) {
            vpc_chain_free(c);
            break;
        }
        vq->last_avail++;
        bytes += c->readable;
        out[n++] = (struct vpc_popped){.chain = c, .data = c->data, .readable = c->readable,
                                       .writable = c->writable};
        /* A hop that had to wait hands over its one chain: a missing page delays no chain before it. */
        if (!(flags & VPC_TRY) && atomic_load_explicit(&vq->gm->supply->armed, memory_order_relaxed))
            break;
    }
    /* What was popped before the trouble is good; the trouble is met again by the next call. */
    return n ? (int)n : rc;
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
        const struct vpc_chain *c = answers[i].chain;
        uint64_t left = answers[i].len;
        if (left > c->writable)
            return -EMSGSIZE;
        for (uint32_t k = c->readable_segs; k < c->n && left; k++) {
            uint64_t take = c->segs[k].len < left ? c->segs[k].len : left;
            rc = vpc_gm_touch(c->gm, c->segs[k].gpa, take, flags, NULL);
            if (rc < 0)
                return rc;
            left -= take;
        }
    }
    rc = vpc_vq_touch_used(vq, n, flags, NULL);
    if (rc < 0)
        return rc;
    if (vpc_gm_lost(vq->gm))
        return -EOWNERDEAD;
    for (uint32_t i = 0; i < n; i++) {
        const struct vpc_chain *c = answers[i].chain;
        (void)vpc_segs_write(c->gm, c->segs + c->readable_segs, c->n - c->readable_segs, 0, answers[i].data,
                             answers[i].len, vq->log);
        vpc_vq_put_used(vq, (uint16_t)i, c->head, (uint32_t)answers[i].len);
    }
    vpc_vq_publish(vq, (uint16_t)n);
    for (uint32_t i = 0; i < n; i++)
        vpc_chain_free(answers[i].chain);
    return 0;
}
