/* RAM records out, on two connections: requested pages on the urgent one, which nothing else delays, and all others in
 * bulk on the main one. A page goes to the loop that clears its DIRTY bit, so it is sent once, whole, on one of them. */
#define _GNU_SOURCE
#include "event_internal.h"
#include "pages/save_internal.h"

#include <errno.h>
#include <stdlib.h>
#include <sys/resource.h>

#define CLOSING_WORD 8u

int vpc_save_divide(struct vpc_save *s)
{
    struct vpc_save *bulk = s->beside;

    if (s->share != URGENT || bulk->share != ALL)
        return -EINVAL;
    vpc_requests_move(&bulk->requests, &s->requests);
    s->requests.whole = 1;
    s->heard_told = bulk->heard_told;
    bulk->share = BULK;
    vpc_scan_recount(s->scan); /* before either takes one */
    return 0;
}

void vpc_urgent_tell(struct vpc_save *s)
{
    struct vpc_save *bulk = s->beside;

    /* It may be asleep, because of its rate or because all that was left was withheld. */
    if (scan_left(s->scan) == 0 && !atomic_load(&bulk->sent))
        event_poke(bulk->control);
}

void vpc_urgent_close(struct vpc_save *s)
{
    struct writer *w = &s->writer;
    const struct requests *r = &s->requests;

    if (!s->closing_word || w->eos_sent || !atomic_load(&s->beside->sent))
        return;
    if (w->now_block >= 0 || r->head != r->tail || r->ask_count || writer_room(w) < 8)
        return;
    vpc_writer_eos(w);
    __atomic_store_n(&w->eos_sent, 1, __ATOMIC_RELAXED);
}

int vpc_urgent_is_needed(struct vpc_save *s)
{
    return !__atomic_load_n(&s->beside->writer.eos_sent, __ATOMIC_ACQUIRE);
}

int vpc_urgent_lost(struct vpc_save *s, int rc)
{
    struct writer *w = &s->writer;

    if (!w->eos_sent || w->end - w->begin > CLOSING_WORD)
        return rc;
    w->begin = w->end = 0;
    return 0;
}

void vpc_bulk_begin(struct vpc_save *s)
{
    (void)s;
    /* Of this thread alone, which ends with the connection. Without the right to undo it, a process may do it. */
    (void)setpriority(PRIO_PROCESS, 0, BULK_NICE);
}

int vpc_bulk_ended(struct vpc_save *s, int rc)
{
    if (rc == VPC_SAVE_SENT)
        atomic_store(&s->sent, 1);
    else if (rc != VPC_SAVE_STOPPED)
        atomic_store(&s->broken, rc);
    event_poke(s->beside->control);
    return rc;
}
