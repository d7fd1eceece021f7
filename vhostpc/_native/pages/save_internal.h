#ifndef SAVE_INTERNAL_H
#define SAVE_INTERNAL_H
/*
 * RAM records out, inside. saveleft.c knows which pages are left, savenear.c which of them go first, savescan.c which is
 * next and when; savewriter.c makes records of a page and writes them to a descriptor, saverequests.c reads the
 * destination's messages; ramsave.c has the loops that join them, saveurgent.c divides them between two connections.
 *
 * A scan may have several writers: a page is taken by clearing its DIRTY bit, so only one writer gets it.
 */
#include "pages/ram_internal.h"
#include "pages/records_internal.h"
#include "pages/vpc_save.h"

#define OUT_ROOM (128u << 10)
#define RECORD_MAX (8u + 256u + TARGET_PAGE)
#define IN_ROOM (16u << 10)
#define QUEUE 4096u /* requested host pages not yet handled; more stay in the socket */

struct host_page {
    int block; /* -1: none */
    uint64_t number;
};

#define NEAR_SIZES 4
#define NEAR_GROUPS 32u /* of each size that are remembered, the newest ones */
#define NEAR_TOLD 32u   /* requests between two pages of the background */

/* Pages [begin, end) around a request: looked at upwards from up, then downwards from down. */
struct near_group {
    int block;
    uint64_t begin, end, down, up;
};

/* The neighbourhood of what was requested. */
struct near {
    /* Of the loops that serve requests: hints, so one that is lost or old does no harm. */
    _Atomic uint64_t told[NEAR_TOLD]; /* as scan's place */
    _Atomic uint64_t told_count, told_from;
    /* Of the one loop that sends the background. */
    uint64_t heard, forgotten;
    struct near_groups {
        unsigned count;
        struct near_group list[NEAR_GROUPS]; /* the newest one last */
    } sizes[NEAR_SIZES];
};

struct vpc_scan {
    struct vpc_ram *ram;
    int keep_zeros; /* send zero pages as data */
    _Atomic int withhold_all;
    _Atomic uint64_t rate;
    _Atomic uint64_t place; /* where the scan continues: see place_behind */
    struct near near;
    /* Bytes that the background may send; below 0 it owes them. Of the one loop that sends it. */
    int64_t credit;
    uint64_t credit_time;
    struct vpc_scan_stats stats; /* see save_tally */
};

/* One connection's output. */
struct writer {
    int fd; /* a socket, a pipe or a file */
    int is_socket;
    int on_disk;
    unsigned char *out;
    size_t begin, end;
    int block; /* of the last record, for CONTINUE; -1 before the first */
    /* The current host page: its target pages that are still to be written. */
    int now_block; /* -1: none */
    uint64_t now_target, now_left;
    /* A stretch of a block's file that is a hole, or is taken for data. Looked up anew in each round: the next sync
     * finds pages that are written afterwards. */
    int extent_block, extent_hole;
    uint64_t extent_begin, extent_end;
    unsigned char *tail; /* the bytes after the EOS */
    size_t tail_at, tail_end;
    int eos_sent;
    uint64_t bytes; /* written */
    /* Records made and not yet counted in the scan's numbers: see vpc_scan_tell. */
    struct vpc_scan_stats made;
};

/* One connection's return path. */
struct requests {
    int fd; /* -1: none */
    unsigned char *in;
    size_t end;
    int block; /* of the last request, for REQ_PAGES; -1 before the first */
    /* A request being split into host pages, which go to the queue as it has room. */
    int ask_block;
    uint64_t ask_page, ask_count;
    struct host_page queue[QUEUE];
    unsigned head, tail; /* free-running */
    int notify;          /* an eventfd to signal withheld pages on; not ours */
    uint64_t count, useless, withheld, withheld_ever;
    uint32_t pongs, shut;
    int why, heard;
    int whole; /* a request that is not a multiple of its block's page size is refused, as QEMU's preempt has it */
};

/* A postcopy may have two connections: requested pages on the urgent one, all others in bulk on the main one. */
enum share { ALL, URGENT, BULK };

struct vpc_save {
    struct vpc_scan *scan;
    struct writer writer;
    struct requests requests; /* read by the urgent one, where there are two */
    int control, notify;
    _Atomic int stop;
    int now_asked; /* the current page was requested: its bytes are not charged to the background */
    int heard_told;
    enum share share;
    struct vpc_save *beside; /* of the two, the other one */
    int closing_word;        /* urgent: ends with an EOS */
    _Atomic int sent;        /* bulk: everything was written, the tail too */
    _Atomic int broken;      /* bulk: the result of its loop, if it has ended otherwise; only the urgent one judges */
};

/* The numbers: others read them while a loop runs. Those of a scan may have several that write. */
static inline void save_tally(uint64_t *what, uint64_t n)
{
    __atomic_fetch_add(what, n, __ATOMIC_RELAXED);
}

/* savescan.c */
/* Take a page that was requested: 1, or 0 if it was sent before. Its bit is cleared now: it is sent once. The background
 * goes on near it, and then behind it. */
int vpc_scan_take(struct vpc_scan *scan, struct host_page page);
/* Take the next page of the background: dirty and not withheld; block -1 if there is none. Of one loop. */
struct host_page vpc_scan_next(struct vpc_scan *scan);
/* Requests up to now, of another connection, have no neighbourhood any more. */
void vpc_scan_forget(struct vpc_scan *scan);
/* Milliseconds until the background may send at this rate; 0: now. */
int vpc_scan_due(struct vpc_scan *scan, uint64_t rate);
void vpc_scan_begin(struct vpc_scan *scan);
/* Add a writer's counts to the numbers, once for each buffer: an atomic addition for each page would cost more than a
 * zero page does. */
void vpc_scan_tell(struct vpc_scan *scan, struct vpc_scan_stats *made);
void vpc_scan_rewind(struct vpc_scan *scan);
void vpc_scan_recount(struct vpc_scan *scan);

static inline uint64_t scan_left(const struct vpc_scan *scan)
{
    return __atomic_load_n(&scan->stats.dirty_left, __ATOMIC_RELAXED);
}

#define PAGE_BITS 48 /* of a place: the page's number in the low bits, its block's above */

static inline uint64_t place_behind(struct host_page page)
{
    return (uint64_t)page.block << PAGE_BITS | (page.number + 1);
}

static inline struct host_page page_at(uint64_t place)
{
    return (struct host_page){(int)(place >> PAGE_BITS), place & (((uint64_t)1 << PAGE_BITS) - 1)};
}

/* saveleft.c */
/* Clear a page's bit: 1, or 0 if it was sent before. */
int vpc_left_claim(struct vpc_scan *scan, struct host_page page);
/* The first or the last page of [from, to) that is dirty and not withheld; to if there is none. */
uint64_t vpc_left_up(const struct vpc_scan *scan, int block, uint64_t from, uint64_t to);
uint64_t vpc_left_down(const struct vpc_scan *scan, int block, uint64_t from, uint64_t to);

/* savenear.c */
/* A request was served. */
void vpc_near_tell(struct near *near, struct host_page page);
void vpc_near_forget(struct near *near);
/* Take the next page near a request; block -1 if there is none. */
struct host_page vpc_near_next(struct vpc_scan *scan);

/* savewriter.c */
int vpc_writer_init(struct writer *w, int fd);
void vpc_writer_destroy(struct writer *w);
/* Make this the current host page; there must be none. */
void vpc_writer_take(struct writer *w, struct vpc_scan *scan, struct host_page page);
/* Append records of the current page while there is room; returns how many bytes. */
size_t vpc_writer_emit(struct writer *w, struct vpc_scan *scan);
void vpc_writer_head(struct writer *w, unsigned type, uint32_t section);
void vpc_writer_eos(struct writer *w);
/* Write as much as the descriptor takes: 0 or -errno. */
int vpc_writer_push(struct writer *w);

static inline size_t writer_room(const struct writer *w)
{
    return OUT_ROOM - w->end;
}

/* Is there something to write? */
static inline int writer_pending(const struct writer *w)
{
    return w->begin < w->end || (w->eos_sent && w->tail_at < w->tail_end);
}

/* saveurgent.c, about the two. The urgent loop: the bulk is to look again, if that was the last page. */
void vpc_urgent_tell(struct vpc_save *s);
/* Write the closing word, once it is due. */
void vpc_urgent_close(struct vpc_save *s);
/* Pages may still be requested: main's records have not ended. Until then no destination closes this connection. */
int vpc_urgent_is_needed(struct vpc_save *s);
/* Writing has failed with rc: 0 where nothing but the closing word is lost. A destination may have gone from there as
 * soon as it had all; what became of it, it says on the return path. */
int vpc_urgent_lost(struct vpc_save *s, int rc);
/* The bulk's loop begins: it gives way to the threads that somebody waits for. */
void vpc_bulk_begin(struct vpc_save *s);
/* It has ended with rc. */
int vpc_bulk_ended(struct vpc_save *s, int rc);

/* saverequests.c */
int vpc_requests_init(struct requests *r, struct vpc_ram *ram, int fd, int notify);
void vpc_requests_destroy(struct requests *r);
/* Read the incoming messages: 0, VPC_SAVE_PEER_CLOSED or -errno. */
int vpc_requests_pull(struct requests *r);
/* Take the messages that are whole, as long as the queue has room: 0, VPC_SAVE_SHUT or -EBADMSG. */
/* As if the page had been requested, as long as there is room. */
void vpc_requests_first(struct requests *r, struct vpc_scan *scan, int block, uint64_t page);
int vpc_requests_parse(struct requests *r, struct vpc_scan *scan);
/* Have them read by another one, whose loop does not run; this one has none any more. */
void vpc_requests_move(struct requests *r, struct requests *to);
/* Pages were released: queue those that were requested in the meantime. */
void vpc_requests_look_at_withheld(struct requests *r, struct vpc_scan *scan);

/* May another message be read? */
static inline int requests_room(const struct requests *r)
{
    return IN_ROOM - r->end > 4 + RP_MAX_LEN;
}

#endif
