#ifndef SAVE_INTERNAL_H
#define SAVE_INTERNAL_H
/*
 * RAM records out, inside: saverequests.c reads what the destination says, savepages.c makes records of dirty
 * pages, ramsave.c has the loops that send them.
 */
#include "ram_internal.h"

#define OUT_ROOM (128u << 10)
#define DATA_STEP_MOST (64u * TARGET_PAGE) /* taken for data behind what is, at most */
#define RECORD_MAX (8u + 256u + TARGET_PAGE)
#define IN_ROOM (16u << 10)
#define QUEUE 4096u /* host pages asked for and not yet looked at; more stay in the socket */

struct vpc_save {
    struct vpc_ram *ram;
    int fd;       /* out; a socket, a pipe or a file */
    int in_fd;    /* the return path; -1: none */
    int is_socket;
    int control, notify;
    _Atomic int stop, hold_all;
    _Atomic uint64_t rate;
    int keep_zeros; /* send zero pages as data */

    unsigned char *in;
    size_t in_end;
    int rp_block; /* of the last request, for REQ_PAGES; -1 before the first */

    /* A request being taken apart into host pages: they go to the queue as it has room. */
    int ask_block;
    uint64_t ask_page, ask_count;
    struct { int block; uint64_t page; } queue[QUEUE];
    unsigned head, tail; /* free-running */

    unsigned char *out;
    size_t out_begin, out_end;
    int out_block; /* block of the last record, for CONTINUE */

    int now_block; /* the host page that is being sent; -1: none */
    int now_background; /* nobody asked for it: its bytes are charged */
    uint64_t now_target, now_left;

    int scan_block;
    uint64_t scan_page;
    /* A stretch of a block's file that is a hole, or is taken for data. Looked up anew in each round: what is written
     * afterwards is found by the next look at what is dirty. */
    int extent_block, extent_hole;
    uint64_t extent_begin, extent_end;
    int64_t credit; /* bytes that the background may send; below 0 it owes them */
    uint64_t credit_time;

    unsigned char *rest; /* what follows the EOS */
    size_t rest_at, rest_end;

    struct vpc_save_stats stats; /* this thread alone writes them; see save_tally */
};


/* The numbers: the loop's thread alone writes them, others read them while it runs. */
static inline void save_tally(uint64_t *what, uint64_t n)
{
    __atomic_store_n(what, *what + n, __ATOMIC_RELAXED);
}

/* Milliseconds; what produce says besides. */
#define PRODUCE_ROOM 0     /* there would be more with more room */
#define PRODUCE_NOTHING -1 /* nothing to do until somebody asks or releases */

/* saverequests.c. Take the messages that are whole: 0, VPC_SAVE_SHUT or -EBADMSG. */
int vpc_save_parse(struct vpc_save *s);
/* Something was released: queue what was asked for in the meantime. */
void vpc_save_look_at_held(struct vpc_save *s);

/* savepages.c. Fill the output at rate bytes a second, requests first; see PRODUCE_*, or milliseconds to wait. */
int vpc_save_produce(struct vpc_save *s, uint64_t rate);
uint64_t vpc_save_count_dirty(struct vpc_save *s);

void vpc_save_poke(int fd);

#endif
