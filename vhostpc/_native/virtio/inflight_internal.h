/* A vq's view of its inflight region; never part of the cdef. */
#ifndef VPC_INFLIGHT_INTERNAL_H
#define VPC_INFLIGHT_INTERNAL_H
#include <stdbool.h>
#include <stdint.h>

struct vpc_vq;
struct vpc_inflight;

/* One queue's part of a region. Without a region only the zero in again_n is used. */
struct vpc_inflight_part {
    struct vpc_inflight *region;
    uint8_t *at;           /* of the part; shared, and everybody may write there */
    uint32_t size;         /* entries */
    uint64_t counter;      /* of the next chain that is taken */
    uint16_t last_head;    /* as last written to the part */
    uint16_t *batch;       /* heads whose used entries are written and not published */
    uint16_t *again;       /* heads that were taken before us, oldest first, each older than an answered one */
    uint32_t again_n, again_at;
};

/* A ring starts, its used index is read: finish a batch that the last one left half done, find the chains to be served
 * again, set the avail index. 0, -EBADMSG, -ENOMEM, and -EAGAIN, -ECANCELED, -EOWNERDEAD before anything was changed.
 * */
int vpc_inflight_recover(struct vpc_vq *vq, int flags);
/* The chain at head is taken from the avail ring. */
void vpc_inflight_take(struct vpc_vq *vq, uint16_t head);
/* It is given back to the driver, not served. */
void vpc_inflight_give_back(struct vpc_vq *vq, uint16_t head);
/* The used entry of the chain at head is written, as the at-th that is not published. */
void vpc_inflight_put(struct vpc_vq *vq, uint16_t at, uint16_t head);
/* All n of them are published. */
void vpc_inflight_published(struct vpc_vq *vq, uint16_t n);
void vpc_inflight_drop(struct vpc_vq *vq);

#endif
