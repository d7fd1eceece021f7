/* SIGBUS in memory that a front-end gave us ends its session, not the process.
 *
 * A mapped page of a file can go away: a holder of the file shrinks it, the pool of huge pages or the file system is
 * empty, the disk fails, the page is poisoned. The touch then raises SIGBUS, in whichever thread made it. The handler
 * looks up the mapping's supply, marks it lost, maps zeros over the page, and returns: the touch goes on, reads or
 * writes memory that is nobody's, and the thread finds lost set before a byte of it is used.
 *
 * The handler may interrupt anything, so it takes no lock and allocates nothing: a list whose entries are written
 * under a counter (odd: valid) and never freed, only reused. The entry that a fault of ours needs cannot change
 * meanwhile: a thread that touches a mapping holds a reference to it. */
#define _GNU_SOURCE
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>
#include "event_internal.h"
#include "memory/gm_internal.h"
#include "memory/replace_internal.h"

struct vpc_guarded {
    struct vpc_guarded *next; /* set before the entry is in the list, and never changed */
    struct vpc_guarded *free; /* the next one that is not in use */
    atomic_uint turn;         /* odd: valid */
    _Atomic(struct vpc_supply *) supply;
    atomic_uintptr_t base;
    atomic_size_t len, page;
    atomic_uint_fast64_t file_off;
    atomic_int fd, use;
    atomic_uint_fast32_t kind;
    atomic_int pid; /* a child has our entries, but not our mappings */
};

static _Atomic(struct vpc_guarded *) registry;
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER; /* for changes; the handler takes no lock */
static struct vpc_guarded *unused;

/* The earlier action for SIGBUS: two copies, so that the handler never sees one half written. */
static struct sigaction before[2];
static atomic_int which;
static atomic_int handed_on;  /* a SIGBUS came from raise(), and no fault since */
static atomic_int inside_old; /* the thread that runs an earlier handler */

/* 1: *out is a valid entry, read whole. */
static int read_entry(struct vpc_guarded *e, struct vpc_guard_range *out)
{
    unsigned turn = atomic_load_explicit(&e->turn, memory_order_acquire);

    if (!(turn & 1) || atomic_load_explicit(&e->pid, memory_order_relaxed) != getpid())
        return 0;
    out->supply = atomic_load_explicit(&e->supply, memory_order_relaxed);
    out->base = atomic_load_explicit(&e->base, memory_order_relaxed);
    out->len = atomic_load_explicit(&e->len, memory_order_relaxed);
    out->page = atomic_load_explicit(&e->page, memory_order_relaxed);
    out->file_off = atomic_load_explicit(&e->file_off, memory_order_relaxed);
    out->fd = atomic_load_explicit(&e->fd, memory_order_relaxed);
    out->kind = (uint32_t)atomic_load_explicit(&e->kind, memory_order_relaxed);
    out->use = atomic_load_explicit(&e->use, memory_order_relaxed);
    atomic_thread_fence(memory_order_acquire);
    return atomic_load_explicit(&e->turn, memory_order_relaxed) == turn;
}

/* Tell the session, once: the strike is complete before the eventfd is written. */
static void tell(const struct vpc_guard_range *r, uintptr_t at, int poisoned)
{
    struct vpc_supply *s = r->supply;
    struct stat st;
    int none = 0;

    if (!atomic_compare_exchange_strong(&s->struck, &none, 1))
        return;
    s->strike = (struct vpc_strike){.address = at, .offset = r->file_off + (at - r->base), .kind = r->kind,
                                    .size = UINT64_MAX, .use = r->use, .poisoned = poisoned};
    if (fstat(r->fd, &st) == 0)
        s->strike.size = (uint64_t)st.st_size;
    atomic_store_explicit(&s->struck, 2, memory_order_release);
    event_poke(s->strike_fd);
}

/* Was the fault in a mapping of ours, and is there a page now? */
static bool strike(uintptr_t at, int poisoned)
{
    struct vpc_guard_range r;

    for (struct vpc_guarded *e = atomic_load(&registry); e; e = e->next) {
        if (!read_entry(e, &r) || at - r.base >= r.len)
            continue;
        uintptr_t page = at & ~(uintptr_t)(r.page - 1);
        atomic_store(&r.supply->lost, 1); /* before anybody can read a zero there */
        tell(&r, at, poisoned);
        /* The whole mapping, if this page fails: that splits none where the process is at its limit of mappings. */
        return vpc_replace_private((void *)page, r.page) == 0 || vpc_replace_private((void *)r.base, r.len) == 0;
    }
    return false;
}

/* Not ours: as if we were not here. */
static void hand_on(int number, siginfo_t *info, void *context)
{
    const struct sigaction *old = &before[atomic_load(&which)];
    bool sent = info->si_code <= 0; /* by a process, not by a touch */

    if (old->sa_handler == SIG_IGN && sent)
        return;
    if (old->sa_handler == SIG_DFL || old->sa_handler == SIG_IGN) {
        (void)sigaction(SIGBUS, &(struct sigaction){.sa_handler = SIG_DFL}, NULL);
        if (sent)
            raise(SIGBUS);
        return; /* otherwise the touch is repeated, and ends the process there */
    }
    atomic_store(&inside_old, gettid());
    if (old->sa_flags & SA_SIGINFO)
        old->sa_sigaction(number, info, context);
    else
        old->sa_handler(number);
    atomic_store(&inside_old, 0);
}

static void on_sigbus(int number, siginfo_t *info, void *context)
{
    int error = errno;
    bool fault = info->si_code == BUS_ADRERR || info->si_code == BUS_MCEERR_AR;

    if (fault)
        atomic_store(&handed_on, 0);
    if (fault && strike((uintptr_t)info->si_addr, info->si_code == BUS_MCEERR_AR)) {
        errno = error;
        return;
    }
    /* A handler that is done with a fault puts back the one that was there before it and raises the signal again: so
     * does Python's faulthandler. The number came without the address then. */
    if (info->si_code == SI_TKILL && info->si_pid == getpid()) {
        if (atomic_load(&inside_old) == gettid()) {
            /* Ours was before it, and it before ours: both have examined the fault. */
            (void)sigaction(SIGBUS, &(struct sigaction){.sa_handler = SIG_DFL}, NULL);
            return;
        }
        if (!atomic_exchange(&handed_on, 1))
            return; /* the touch is repeated, and reaches us with its address */
    }
    hand_on(number, info, context);
    errno = error;
}

/* Checked with each mapping: an older handler that is removed takes ours with it. */
static void install(void)
{
    struct sigaction ours = {.sa_sigaction = on_sigbus, .sa_flags = SA_SIGINFO | SA_ONSTACK | SA_NODEFER};
    int spare = !atomic_load(&which);

    sigemptyset(&ours.sa_mask);
    if (sigaction(SIGBUS, NULL, &before[spare]) < 0 ||
        (before[spare].sa_flags & SA_SIGINFO && before[spare].sa_sigaction == on_sigbus))
        return;
    atomic_store(&which, spare);
    (void)sigaction(SIGBUS, &ours, NULL);
}

struct vpc_guarded *vpc_guard_add(const struct vpc_guard_range *range)
{
    struct vpc_guarded *e;

    pthread_mutex_lock(&lock);
    install();
    e = unused;
    if (e) {
        unused = e->free;
    } else {
        e = calloc(1, sizeof(*e));
        if (e) {
            e->next = atomic_load(&registry);
            atomic_store(&registry, e);
        }
    }
    if (e) {
        atomic_thread_fence(memory_order_release); /* the turn that made it invalid before what follows */
        atomic_store_explicit(&e->supply, range->supply, memory_order_relaxed);
        atomic_store_explicit(&e->base, range->base, memory_order_relaxed);
        atomic_store_explicit(&e->len, range->len, memory_order_relaxed);
        atomic_store_explicit(&e->page, range->page, memory_order_relaxed);
        atomic_store_explicit(&e->file_off, range->file_off, memory_order_relaxed);
        atomic_store_explicit(&e->fd, range->fd, memory_order_relaxed);
        atomic_store_explicit(&e->kind, range->kind, memory_order_relaxed);
        atomic_store_explicit(&e->use, range->use, memory_order_relaxed);
        atomic_store_explicit(&e->pid, getpid(), memory_order_relaxed);
        atomic_fetch_add(&e->turn, 1);
    }
    pthread_mutex_unlock(&lock);
    return e;
}

void vpc_guard_remove(struct vpc_guarded *e)
{
    if (!e)
        return;
    pthread_mutex_lock(&lock);
    atomic_fetch_add(&e->turn, 1);
    e->free = unused;
    unused = e;
    pthread_mutex_unlock(&lock);
}
