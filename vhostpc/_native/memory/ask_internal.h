/* Is a page of armed memory here? Asked without touching it: a touch would wait for the page, or make it. */
#ifndef VPC_ASK_INTERNAL_H
#define VPC_ASK_INTERNAL_H
#include "memory/gm_internal.h"

/* What a new armed map needs so that its pages can be asked for, where its supply never faults. -ENOSYS: huge pages, and
 * no ufd to ask by; another -errno. Nothing to close after an error. */
int vpc_ask_open(struct vpc_map *m);
void vpc_ask_close(struct vpc_map *m);

/* Can the pages of this map be asked for? If not, a page that no thread has touched counts as absent. */
static inline bool vpc_ask_can(const struct vpc_map *m)
{
    return m->kind == VPC_KIND_TMPFS || m->ask;
}

/* Is this page in the page cache? Only where that can be known. Never makes one. */
bool vpc_ask_present(const struct vpc_map *m, uint64_t page);

/* Sleep before the page is asked for again. waited_ns: for how long already; waiters: threads that do the same. */
void vpc_ask_pause(uint64_t waited_ns, int waiters);

#endif
