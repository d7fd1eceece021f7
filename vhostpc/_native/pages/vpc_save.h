/* RAM records out, on one connection of a scan: its writer, the requests of its destination, and the loops that join
 * them, requests first. */
#ifndef VPC_SAVE_H
#define VPC_SAVE_H
#include <stdint.h>

#include "pages/vpc_scan.h"

/* cdef begin */
struct vpc_save;

#define VPC_SAVE_PEER_CLOSED 2
#define VPC_SAVE_SHUT 3
#define VPC_SAVE_STOPPED 4
#define VPC_SAVE_HEARD 5 /* PONG VPC_MUST_HEAR came, for the first time: run again */
#define VPC_SAVE_SENT 6 /* in bulk: everything is written */
#define VPC_MUST_HEAR 66

struct vpc_save_stats {
    uint64_t bytes;          /* sent */
    uint64_t requests;       /* request messages read */
    uint64_t useless;        /* requested host pages that were not dirty */
    uint64_t withheld;       /* requested host pages that are being withheld now */
    uint64_t withheld_ever;
    int32_t eos_sent;
    int32_t why;             /* VPC_BAD_* of a message that was refused */
    uint32_t pongs;          /* a bit for each PONG value below 32 that came */
    uint32_t shut;           /* the value of the destination's SHUT: 0 is success */
    int32_t heard;           /* PONG VPC_MUST_HEAR came */
};

/* Serve the scan's pages on fd (a socket, a pipe or a file). in_fd: the return path, -1 for none; both may be the same.
 * Pages that were requested on an earlier connection and withheld are forgotten: the destination requests them again.
 * */
int vpc_save_new(struct vpc_scan *scan, int fd, int in_fd, struct vpc_save **out);
void vpc_save_free(struct vpc_save *save);
/* One section of precopy, with its frames: a PART of about budget_ns at the background rate, or (last) the END with
 * all dirty pages, without a limit. Returns 1 if pages are still dirty, 0 if none is, or as vpc_save_run; a section
 * that was stopped is left in the middle. */
int vpc_save_round(struct vpc_save *save, uint32_t section, int last, uint64_t budget_ns);
/* Before vpc_save_run: this host page is sent ahead of those that nobody asks for, as a requested one is. */
int vpc_save_first(struct vpc_save *save, int block, uint64_t page);
/* Nothing is to be sent any more: read the return path to its end. Returns as vpc_save_run. */
int vpc_save_wait(struct vpc_save *save);
/* Nothing is to be sent until the PONG of this value, below 32, is here, or for so many milliseconds: 0. Returns as
 * vpc_save_run otherwise. */
int vpc_save_hear(struct vpc_save *save, unsigned pong, unsigned ms);
/* Postcopy begins: the next record names its block again, the scan begins anew. Before a run. */
int vpc_save_switch(struct vpc_save *save);
/* Returns VPC_SAVE_* or -errno; -EBADMSG: the peer sent a malformed message. */
int vpc_save_run(struct vpc_save *save);
/* Before a run: bytes that follow the EOS behind the last page (we keep a copy). */
int vpc_save_set_tail(struct vpc_save *save, const void *from, uint64_t length);
void vpc_save_stop(struct vpc_save *save);
/* After changing WITHHELD bits, the rate or withhold_all: look again. */
void vpc_save_kick(struct vpc_save *save);
int vpc_save_stats(struct vpc_save *save, struct vpc_save_stats *out);
/* An eventfd that counts withheld requests and the end of stream: then the numbers have changed. */
int vpc_save_notify_fd(struct vpc_save *save);

/* ---- A second connection for requested pages, as with QEMU's postcopy-preempt. */
/* closing_word: it ends with an EOS, behind all of main (machine types up to 7.2). It reports withheld requests as main
 * does, and is freed before it. */
int vpc_save_new_urgent(struct vpc_save *main, int fd, int closing_word, struct vpc_save **out);
/* Behind vpc_save_switch of main, while neither runs: the urgent one reads the return path from now on, with what was
 * read of it. Then both are run, each on its thread. The urgent run returns as one alone does; main's returns
 * VPC_SAVE_SENT, or what ends the urgent one, too. A page goes to the one that takes it first. */
int vpc_save_divide(struct vpc_save *urgent);
/* cdef end */

#endif
