/* The next page to send, each dirty one once: it lives as long as a migration, and its connections (vpc_save.h) share
 * it. */
#ifndef VPC_SCAN_H
#define VPC_SCAN_H
#include <stdint.h>

#include "pages/vpc_ram.h"

/* cdef begin */
struct vpc_scan;

/* Of all connections. */
struct vpc_scan_stats {
    uint64_t data_pages;     /* target pages sent as PAGE */
    uint64_t zero_pages;     /* target pages sent as ZERO */
    uint64_t requested_pages;/* host pages sent because they were requested */
    uint64_t background_pages;
    uint64_t dirty_left;     /* host pages */
};

/* The blocks' DIRTY pages, at background_rate bytes a second besides requested pages. */
int vpc_scan_new(struct vpc_ram *ram, uint64_t background_rate, struct vpc_scan **out);
void vpc_scan_free(struct vpc_scan *scan);
/* A loop looks at these two when it is kicked (vpc_save_kick). withhold_all: withhold every page that is requested, and
 * the background, until called with 0. */
int vpc_scan_set_rate(struct vpc_scan *scan, uint64_t background_rate);
int vpc_scan_withhold_all(struct vpc_scan *scan, int on);
/* Send pages of zeros as data. Before a round or run. */
int vpc_scan_keep_zeros(struct vpc_scan *scan, int on);
int vpc_scan_stats(struct vpc_scan *scan, struct vpc_scan_stats *out);
/* cdef end */

#endif
