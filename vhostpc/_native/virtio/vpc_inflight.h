/* The inflight region: chains that are taken and not answered, in a file that outlives the process. */
#ifndef VPC_INFLIGHT_H
#define VPC_INFLIGHT_H
#include "virtio/vpc_ring.h"

/* cdef begin */
struct vpc_inflight;
/* Map [offset, offset + size) of fd, shared. -EFBIG: longer than the file. -EINVAL: empty, wrapping, unaligned (8)
 * or not a regular file. -EOPNOTSUPP: neither tmpfs nor hugetlbfs, so a touch might wait for others. */
int vpc_inflight_new(struct vpc_supply *s, int fd, uint64_t offset, uint64_t size, struct vpc_inflight **out);
void vpc_inflight_unref(struct vpc_inflight *region);
/* This ring's part of it begins at offset and has size entries; counted; NULL: no region. Only while no call runs. The
 * next touching call after set_base reads it. -EINVAL: not inside the region. -ENOMEM. */
int vpc_vq_set_inflight(struct vpc_vq *vq, struct vpc_inflight *region, uint64_t offset, uint32_t size);
/* Chains taken before us that have to be served again and were not popped yet; pop takes them first. */
uint32_t vpc_vq_again(const struct vpc_vq *vq);
/* cdef end */

#endif
