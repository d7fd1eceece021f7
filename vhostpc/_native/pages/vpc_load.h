/* RAM records in: a long loop that reads those of QEMU's migration stream and places their pages. */
#ifndef VPC_LOAD_H
#define VPC_LOAD_H
#include <stdint.h>

#include "pages/vpc_fault.h"

/* cdef begin */
struct vpc_load;

#define VPC_LOAD_EOS 1
#define VPC_LOAD_EOF 2
#define VPC_LOAD_STOPPED 3

/* Why a stream is malformed (stats.why). */
#define VPC_BAD_FLAGS 1
#define VPC_BAD_NO_BLOCK 2
#define VPC_BAD_NAME 3
#define VPC_BAD_OFFSET 4
#define VPC_BAD_HOST_PAGE 5
#define VPC_BAD_TRUNCATED 6
#define VPC_BAD_FOOTER 7
#define VPC_BAD_DELTA 8
#define VPC_BAD_COMPRESSED 9
#define VPC_BAD_PART 10

struct vpc_load_stats {
    uint64_t bytes;       /* consumed */
    uint64_t data_pages;  /* target pages that came as PAGE */
    uint64_t zero_pages;  /* target pages that came as ZERO */
    uint64_t placed;      /* host pages that this loader created */
    uint64_t already;     /* host pages that had arrived before: skipped */
    uint64_t runs;        /* placing calls */
    uint64_t reads;
    uint64_t sections;    /* RAM sections read to their EOS, with vpc_load_follow */
    uint64_t shortages;   /* pages for which there was no memory at once: they were waited for */
    uint64_t bad_offset;  /* byte of the stream where the broken record begins */
    uint64_t bad_page;    /* host page, after a run gave -EEXIST or while short_now */
    int32_t bad_block;
    int32_t short_now;    /* there is no memory for bad_page: it is waited for */
    int32_t why;
    int32_t ended;        /* with vpc_load_follow: the END was read, its footer too */
};

/* Read records from fd until told otherwise; pages are placed through place_ufd into the set's own
 * mapping; place_ufd -1 is calm mode: plain writes, the last copy wins. service may be null. */
int vpc_load_new(struct vpc_ram *ram, struct vpc_fault *service, int fd, int place_ufd, struct vpc_load **out);
void vpc_load_free(struct vpc_load *load);
/* Returns VPC_LOAD_*, -EBADMSG (see why and bad_offset), or -errno of reading or placing. -EEXIST: armed, and bad_page
 * exists although it was not received: it is neither overwritten nor taken for the received one. Armed, a page for
 * which there is no memory is tried again until there is. */
int vpc_load_run(struct vpc_load *load, uint64_t spin_ns);
/* Before a run: bytes of the stream that were read already (-ENOSPC: more than a buffer); after one, the bytes that it
 * read too far: returns how many were copied. */
int vpc_load_feed(struct vpc_load *load, const void *from, uint64_t length);
int vpc_load_take(struct vpc_load *load, void *to, uint32_t room);
/* Read the frames of this RAM section too, and go on while its PARTs follow one another: the next run begins
 * after a header (last: of the END) and ends before anything but a PART or END of it, or after the END's footer. The
 * numbers of sections are those of the stream. */
int vpc_load_follow(struct vpc_load *load, uint32_t section, int last);
/* The block that CONTINUE means, -1: none yet. */
int vpc_load_block(struct vpc_load *load);
int vpc_load_set_block(struct vpc_load *load, int block);
/* In calm mode: no page will be missing later either, so a zero page may stay a hole of its file. */
int vpc_load_keep_holes(struct vpc_load *load);
/* Of a connection beside which another one brings requested pages: give way to its thread, in short calls. */
int vpc_load_in_bulk(struct vpc_load *load);
/* Of that other one, also while it runs: end (VPC_LOAD_EOS) as soon as every page that was requested has come. */
int vpc_load_finish(struct vpc_load *load);
void vpc_load_stop(struct vpc_load *load);
int vpc_load_stats(struct vpc_load *load, struct vpc_load_stats *out);
/* cdef end */

#endif
