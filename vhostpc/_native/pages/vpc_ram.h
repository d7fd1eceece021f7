#ifndef VPC_RAM_H
#define VPC_RAM_H
#include <stdint.h>
#include <stddef.h>

/* RAM blocks on memfd, and the two long loops that bring their pages: the fault service (fault.c) and the
 * loader of RAM records (ramload.c); vpc_save.h has those that send them. Record and message layouts are those
 * of QEMU's migration stream. Addresses are integers; "page" is a host page of the block (page_size) and
 * "target page" is 4096 bytes, the unit of the stream. */

/* cdef begin */
struct vpc_ram;
struct vpc_fault;
struct vpc_load;

/* A rate without a limit. */
#define VPC_RATE_UNLIMITED 0xffffffffffffffffULL

/* Bitmaps of a block, one bit a host page. */
#define VPC_BITS_RECEIVED 0
#define VPC_BITS_REQUESTED 1
#define VPC_BITS_DIRTY 2
#define VPC_BITS_HELD 3
#define VPC_BITS_ASKED 4
#define VPC_BITS_DISCARDED 5 /* the stream's RAM_DISCARD took it, or a part of it has come: it will be sent */

/* ---- ram.c: the set of blocks. Nothing here waits for a page unless it says so. */
int vpc_ram_new(struct vpc_ram **out);
void vpc_ram_free(struct vpc_ram *ram);
/* Map length bytes of fd (our own copy is kept) from fd_offset; returns the block's index. */
int vpc_ram_add(struct vpc_ram *ram, const char *name, int fd, uint64_t fd_offset, uint64_t length,
                uint64_t page_size);
uint64_t vpc_ram_base(struct vpc_ram *ram, int block);
int vpc_ram_set_bits(struct vpc_ram *ram, int block, int which, uint64_t first, uint64_t count, int value);
int vpc_ram_test_bit(struct vpc_ram *ram, int block, int which, uint64_t page);
int64_t vpc_ram_count_bits(struct vpc_ram *ram, int block, int which);
/* The same in each of this many equal parts of the block: part i begins at page i * pages / cells. */
int vpc_ram_count_cells(struct vpc_ram *ram, int block, int which, uint32_t *out, uint32_t cells);
/* Punch a hole (bytes, whole host pages) and clear RECEIVED, REQUESTED and DISCARDED. -EEXIST: the kernel has left a
 * page there, *left is its number. */
int vpc_ram_discard(struct vpc_ram *ram, int block, uint64_t offset, uint64_t length, uint64_t *left);
/* The first of these pages that is there and was not received: 1 and its number in *born; 0 if there is none.
 * -EOPNOTSUPP: the kernel does not tell (hugetlbfs, before 5.13). */
int vpc_ram_born(struct vpc_ram *ram, int block, uint64_t first, uint64_t count, uint64_t *born);
/* Host pages that are DISCARDED and not RECEIVED: the source owes them. */
int64_t vpc_ram_count_owed(struct vpc_ram *ram, int block);
/* RAM_DISCARD commands (QEMU's migration stream) for the block's DIRTY pages from page *at on, as many as there is room
 * for; *at gets the page to go on from, the block's number of pages when it is done. Returns bytes written. */
int vpc_ram_discards(struct vpc_ram *ram, int block, uint64_t *at, void *to, uint32_t room);
/* Set DIRTY for what the back-ends' dirty log in fd (size bytes, which may not shrink) says of the block, whose guest
 * address is gpa, and clear it there. Returns how many bits were not set before. -EINVAL: gpa is no multiple of
 * 256 KiB. -ERANGE: the log ends before the block. */
int64_t vpc_ram_merge_log(struct vpc_ram *ram, int block, int fd, uint64_t size, uint64_t gpa);
/* The pages of the block lie ready in fd from fd_offset (mapped private and read in, so this may take as long
 * as reading it): the fault loop places them through place_ufd (of our own mapping; we keep a copy) without
 * asking anybody. Before the loop runs. -ERANGE: the file is shorter than the block. */
int vpc_ram_set_local(struct vpc_ram *ram, int block, int fd, uint64_t fd_offset, int place_ufd);
/* The pages that miss will never come: put private memory in the place of all mappings, then wake the waiters in
 * them by our own ufd. No page is made in the files. The touching calls give -EOWNERDEAD from now on. -errno: nothing
 * could be put in some mapping's place, and its waiters go on waiting; a later call tries again. The ufd must
 * then stay open: its end would let them go, and they would make the pages. */
int vpc_ram_give_up(struct vpc_ram *ram, int ufd);
int vpc_ram_is_lost(struct vpc_ram *ram);
/* These four touch the block and MAY WAIT FOR A PAGE. Copies go to and from private memory. */
int vpc_ram_read(struct vpc_ram *ram, int block, uint64_t offset, void *to, uint64_t length);
int vpc_ram_write(struct vpc_ram *ram, int block, uint64_t offset, const void *from, uint64_t length);
/* Target pages that name themselves: every word is a function of block, page, seed and position. */
int vpc_ram_fill(struct vpc_ram *ram, int block, uint64_t first, uint64_t count, uint64_t seed);
/* Number of target pages that are not what vpc_ram_fill wrote; first_bad gets the first or UINT64_MAX. */
int64_t vpc_ram_verify(struct vpc_ram *ram, int block, uint64_t first, uint64_t count, uint64_t seed,
                       uint64_t *first_bad);

/* ---- fault.c: clients' faults in, page requests out, wakes. Never touches a block. */
struct vpc_client_range {
    uint64_t base;   /* address in the client's process, whole host pages */
    uint64_t length; /* bytes */
    uint64_t offset; /* bytes in the block */
    uint32_t block;
    uint32_t pad;
};

struct vpc_client_stats {
    uint64_t faults;            /* fault events read */
    uint64_t distinct;          /* host pages that faulted at least once */
    uint64_t wakes;             /* UFFDIO_WAKE calls */
    uint64_t found_nothing;     /* events whose address is in no range */
    uint64_t received_already;  /* woken at once: the page had come in the meantime */
    uint64_t requested_already; /* somebody had asked before */
    uint64_t repeated;          /* of a thread that waited for that page already, back from a signal; of a client whose
                                 * ufd does not tell its threads, also of another thread */
    uint64_t other_events;      /* events that are no faults */
    uint64_t waiting_now;
    uint64_t waiting_for_page;  /* of those, at addresses of a range */
    uint64_t longest_ns;        /* longest time from reading a fault to waking it */
    uint64_t last_unknown;      /* address of the last event that found nothing */
    int32_t error;              /* errno that ended reading this client, 0 if none */
    int32_t alive;
    uint64_t histogram[256];    /* waits, see vpc_histogram_floor */
};

struct vpc_fault_stats {
    uint64_t events;        /* fault events read, all clients */
    uint64_t requests;      /* page requests appended to the outbox: distinct pages */
    uint64_t batches;       /* sends of the outbox */
    uint64_t bytes_sent;
    uint64_t wakes;
    uint64_t outbox_bytes;  /* not yet sent */
    uint64_t waiting_now;
    uint64_t shortages;     /* waiters that could not be answered at once, for lack of memory */
    uint64_t short_now;     /* those that are being tried again */
    uint64_t born_page;     /* after vpc_fault_run gave -EEXIST */
    int32_t born_block;
    int32_t send_errno;     /* the return path broke: 0 if it did not */
    int32_t running;
    int32_t pad;
};

struct vpc_waiter {
    uint64_t address; /* of the host page in the client's process */
    uint64_t page;    /* host page in the block */
    uint64_t since_ns;/* CLOCK_MONOTONIC when the fault was read */
    int32_t client;
    int32_t block;    /* -1: the address is in no range */
    uint32_t thread;  /* kernel thread id, 0 when the ufd does not tell */
    uint32_t way;     /* VPC_WAY_*, once the page is known */
};

/* How a fault was answered. */
#define VPC_WAY_ASKED 0   /* its page was asked for because of it */
#define VPC_WAY_JOINED 1  /* somebody had asked for it before */
#define VPC_WAY_THERE 2   /* it had come meanwhile */
#define VPC_WAY_LOCAL 3   /* from a file of our own */

/* A fault that was answered, for a trace. */
struct vpc_traced {
    uint64_t read_ns;  /* CLOCK_MONOTONIC when the fault was read */
    uint64_t woken_ns; /* and when who waited was woken */
    uint64_t page;     /* host page in the block */
    int32_t client;
    int32_t block;
    uint32_t thread;   /* as in vpc_waiter */
    uint32_t way;      /* VPC_WAY_* */
};

/* What one thread of a client waited for; only where the ufd tells its threads' ids. */
struct vpc_thread_waits {
    uint64_t waits;
    uint64_t longest_ns;
    uint32_t thread; /* kernel thread id; 0: threads of which the table had no room */
    uint32_t pad;
    uint64_t histogram[256];
};

int vpc_fault_new(struct vpc_ram *ram, struct vpc_fault **out);
void vpc_fault_free(struct vpc_fault *service);
/* Poll ufd (we keep our own copy of it; it must be non-blocking); returns the client's number. */
int vpc_fault_add_client(struct vpc_fault *service, int ufd);
/* Replace the client's ranges; faults that found nothing until now are looked at again. */
int vpc_fault_set_ranges(struct vpc_fault *service, int client, const struct vpc_client_range *ranges,
                         uint32_t count);
/* Close our copy of its ufd and forget who waited; its numbers stay readable. */
int vpc_fault_remove_client(struct vpc_fault *service, int client);
/* Where requests go (we keep our own copy); -1: they wait in the outbox. A second one is another source: what
 * was requested and has not come is asked for again. */
int vpc_fault_set_return_path(struct vpc_fault *service, int fd);
/* Append one whole return-path message. */
int vpc_fault_send(struct vpc_fault *service, const void *message, uint32_t length);
/* All that the source had to send has come, so what is absent is zero: it counts as received, a thread that waits for such a page
 * is woken, and one that returns, or touches one from now on, gets a page of zeros. */
int vpc_fault_settle(struct vpc_fault *service);
/* The loop; returns 0 after vpc_fault_stop, when what had faulted until then was answered. spin_ns: keep polling so long
 * after an event, 0 sleeps at once. -EEXIST: a page that lies ready here was made by somebody else (born_block and
 * born_page of the numbers); its waiters go on waiting. */
int vpc_fault_run(struct vpc_fault *service, uint64_t spin_ns);
void vpc_fault_stop(struct vpc_fault *service);
int vpc_fault_client_stats(struct vpc_fault *service, int client, struct vpc_client_stats *out);
int vpc_fault_stats(struct vpc_fault *service, struct vpc_fault_stats *out);
/* The waiters, oldest first as read; returns how many were written. */
int vpc_fault_waiting(struct vpc_fault *service, struct vpc_waiter *out, uint32_t max);
/* Who of a client's threads has waited; returns how many rows were written. */
int vpc_fault_threads(struct vpc_fault *service, int client, struct vpc_thread_waits *out, uint32_t max);
/* Remember the last entries faults that were answered; before vpc_fault_run. -EBUSY: they are remembered already. */
int vpc_fault_trace(struct vpc_fault *service, uint32_t entries);
/* Those from number *next on that are still remembered, oldest first; *next becomes the number behind the last one
 * written. Returns how many. */
int vpc_fault_traced(struct vpc_fault *service, uint64_t *next, struct vpc_traced *out, uint32_t max);
/* Smallest number of nanoseconds that is counted in bucket i of a histogram. */
uint64_t vpc_histogram_floor(uint32_t i);

/* ---- ramload.c: RAM records in. */
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

struct vpc_load_stats {
    uint64_t bytes;       /* consumed */
    uint64_t data_pages;  /* target pages that came as PAGE */
    uint64_t zero_pages;  /* target pages that came as ZERO */
    uint64_t placed;      /* host pages that this loader created */
    uint64_t already;     /* host pages that had come before: skipped */
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
/* Returns VPC_LOAD_*, -EBADMSG (see why and bad_offset), or -errno of reading or placing. -EEXIST: armed, and bad_page is
 * there although it has not come: it is neither overwritten nor taken for the one that came. Armed, a page for which
 * there is no memory is tried again until there is. */
int vpc_load_run(struct vpc_load *load, uint64_t spin_ns);
/* Before a run: bytes of the stream that were read already (-ENOSPC: more than a buffer), and after one what it
 * read too far; returns how many were copied. */
int vpc_load_feed(struct vpc_load *load, const void *from, uint64_t length);
int vpc_load_take(struct vpc_load *load, void *to, uint32_t room);
/* Read the frames of this RAM section too, and go on while its PARTs follow one another: the next run begins
 * behind a header (last: of the END) and ends before what is no PART and no END of it, or behind the END's
 * footer. The numbers of sections are those of the stream. */
int vpc_load_follow(struct vpc_load *load, uint32_t section, int last);
/* The block that CONTINUE means, -1: none yet. */
int vpc_load_block(struct vpc_load *load);
int vpc_load_set_block(struct vpc_load *load, int block);
/* In calm mode: no page will be missing later either, so what is zero may stay a hole of its file. */
int vpc_load_keep_holes(struct vpc_load *load);
void vpc_load_stop(struct vpc_load *load);
int vpc_load_stats(struct vpc_load *load, struct vpc_load_stats *out);
/* cdef end */

#endif
