/* The fault service: clients' faults in, page requests out, wakes; a long loop. It never touches a block. Messages are
 * those of QEMU's return path; pages are counted as in vpc_ram.h. */
#ifndef VPC_FAULT_H
#define VPC_FAULT_H
#include <stdint.h>

#include "pages/vpc_ram.h"

/* cdef begin */
struct vpc_fault;

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
    uint64_t received_already;  /* woken at once: the page had arrived in the meantime */
    uint64_t requested_already; /* the page had been requested before */
    uint64_t repeated;          /* of a thread that waited for that page already, back from a signal; of a client whose
                                 * ufd does not tell its threads, also of another thread */
    uint64_t other_events;      /* events that are not faults */
    uint64_t waiting_now;
    uint64_t waiting_for_page;  /* of those, at addresses of a range */
    uint64_t longest_ns;        /* longest time from reading a fault to waking it */
    uint64_t blocked_ns;        /* in which at least one of its threads waited, until now */
    uint64_t last_unknown;      /* address of the last event that found nothing */
    int32_t error;              /* errno that ended reading this client, 0 if none */
    int32_t alive;
    uint64_t histogram[256];    /* waits, see vpc_histogram_floor */
};

struct vpc_fault_stats {
    uint64_t events;        /* fault events read, all clients */
    uint64_t requests;      /* page requests appended to the outbox: distinct pages */
    uint64_t asked_again;   /* of what was asked for, or noted in a pause, and had not come: asked for over another link */
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
    uint32_t thread;  /* kernel thread id, 0 when the ufd does not report it */
    uint32_t way;     /* VPC_WAY_*, once the page is known */
    int32_t vcpu;     /* index, -1: not the thread of a vCPU */
    uint32_t pad;
};

/* How a fault was answered. */
#define VPC_WAY_ASKED 0   /* its page was requested because of it */
#define VPC_WAY_JOINED 1  /* its page had been requested before */
#define VPC_WAY_THERE 2   /* its page had arrived meanwhile */
#define VPC_WAY_LOCAL 3   /* from a file of our own */

/* A fault that was answered, for a trace. */
struct vpc_traced {
    uint64_t read_ns;  /* CLOCK_MONOTONIC when the fault was read */
    uint64_t woken_ns; /* and when the waiting thread was woken */
    uint64_t page;     /* host page in the block */
    int32_t client;
    int32_t block;
    uint32_t thread;   /* as in vpc_waiter */
    uint32_t way;      /* VPC_WAY_* */
};

/* The waits of a vCPU, or of all other threads of the mapping that vCPUs touch. remote: as QEMU counts faults, those
 * whose page had to come, of threads that are told apart. */
struct vpc_vcpu_waits {
    uint64_t waits;      /* that have ended */
    uint64_t longest_ns;
    uint64_t blocked_ns; /* in which it waited (others: at least one of them), until now */
    uint64_t remote;     /* of the waits */
    uint64_t remote_ns;  /* all of those together */
    uint32_t waiting_now;
    uint32_t thread;     /* kernel thread id; 0: it has none, or all others */
    uint64_t histogram[256];
};

#define VPC_LATENCY_BUCKETS 24
#define VPC_MOST_VCPUS 65536

/* Those who stood still at the same time. A client stands still while at least one of its threads waits. */
struct vpc_blocked {
    uint64_t all_vcpus_ns; /* all vCPUs */
    uint64_t all_ns;       /* all vCPUs, and all clients but the one that they are threads of */
    uint64_t latency[24];  /* remote waits, by the power of two of their microseconds */
    struct vpc_vcpu_waits others;
};

int vpc_fault_new(struct vpc_ram *ram, struct vpc_fault **out);
void vpc_fault_free(struct vpc_fault *service);
/* Poll ufd (we keep our own copy of it; it must be non-blocking); returns the client's number. */
int vpc_fault_add_client(struct vpc_fault *service, int ufd);
/* Replace the client's ranges; earlier faults that found nothing are examined again. */
int vpc_fault_set_ranges(struct vpc_fault *service, int client, const struct vpc_client_range *ranges,
                         uint32_t count);
/* Close our copy of its ufd and forget its waiters; its numbers stay readable. */
int vpc_fault_remove_client(struct vpc_fault *service, int client);
/* Where requests go (we keep our own copy); -1: they wait in the outbox. A second one is another source: requested
 * pages that have not arrived are requested again. */
int vpc_fault_set_return_path(struct vpc_fault *service, int fd);
/* As vpc_fault_set_return_path, but no page is requested until vpc_fault_resume, and unsent messages are dropped. fd
 * -1: nothing can be sent either. */
int vpc_fault_mute(struct vpc_fault *service, int fd);
/* Append one whole message and then requests for all requested pages that have not arrived; request from now on. */
int vpc_fault_resume(struct vpc_fault *service, const void *message, uint32_t length);
/* Append one whole return-path message. */
int vpc_fault_send(struct vpc_fault *service, const void *message, uint32_t length);
/* The source has sent everything, so absent pages are zero: they count as received, a thread that waits for one is
 * woken, and a thread that returns to one, or touches one from now on, gets a page of zeros. */
int vpc_fault_settle(struct vpc_fault *service);
/* The loop; returns 0 after vpc_fault_stop, when earlier faults are answered. spin_ns: keep polling for so long after
 * an event, 0 sleeps at once. -EEXIST: somebody else made a page that lies ready here (born_block and born_page of the
 * numbers); its waiters go on waiting. */
int vpc_fault_run(struct vpc_fault *service, uint64_t spin_ns);
void vpc_fault_stop(struct vpc_fault *service);
int vpc_fault_client_stats(struct vpc_fault *service, int client, struct vpc_client_stats *out);
int vpc_fault_stats(struct vpc_fault *service, struct vpc_fault_stats *out);
/* The waiters, oldest first as read; returns how many were written. */
int vpc_fault_waiting(struct vpc_fault *service, struct vpc_waiter *out, uint32_t max);
/* Which threads of a client are vCPUs: their kernel thread ids, 0 for one that has none now. May be repeated when threads
 * have come or gone; -EINVAL: for another client, or with another number of vCPUs. */
int vpc_fault_set_vcpus(struct vpc_fault *service, int client, const uint32_t *threads, uint32_t count);
int vpc_fault_blocked(struct vpc_fault *service, struct vpc_blocked *out);
int vpc_fault_vcpu_waits(struct vpc_fault *service, uint32_t index, struct vpc_vcpu_waits *out);
/* Record the last entries answered faults; before vpc_fault_run. -EBUSY: they are recorded already. */
int vpc_fault_trace(struct vpc_fault *service, uint32_t entries);
/* Recorded faults from number *next on, oldest first; *next becomes the number after the last one written. Returns how
 * many. */
int vpc_fault_traced(struct vpc_fault *service, uint64_t *next, struct vpc_traced *out, uint32_t max);
/* Smallest number of nanoseconds that is counted in bucket i of a histogram. */
uint64_t vpc_histogram_floor(uint32_t i);
/* cdef end */

/* The pages were made: mark, then wake their waiters. */
void vpc_fault_placed(struct vpc_fault *service, int block, uint64_t first, uint64_t count);
/* The service's lock, for a block whose pages the fault loop places too: so it never looks between the placing of a
 * page and its mark. */
void vpc_fault_lock(struct vpc_fault *service);
void vpc_fault_unlock(struct vpc_fault *service);

#endif
