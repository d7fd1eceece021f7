/* Threads that each wait for one page: see ahead.c. */
#ifndef VPC_AHEAD_INTERNAL_H
#define VPC_AHEAD_INTERNAL_H
#include <stdbool.h>
#include <stdint.h>
#include "memory/vpc_supply.h"

struct vpc_ahead;
struct vpc_map;

/* Wait for a page of a map, unless it is not wanted any more, and let go of the map. */
typedef void (*vpc_ahead_serve)(struct vpc_map *map, uint64_t page, bool wanted);

/* Without a thread yet, and closed; -errno. */
int vpc_ahead_new(struct vpc_ahead **out);
/* Take requests, at most so many at a time. */
void vpc_ahead_open(struct vpc_ahead *a, uint32_t limit);
/* Take no more, and drop those that no thread has; the threads end, each with the page that it waits for. */
void vpc_ahead_close(struct vpc_ahead *a);
/* The same, and its owner forgets it. */
void vpc_ahead_drop(struct vpc_ahead *a);
/* Have another thread call serve, soon. False: there is no room, and serve is not called. */
bool vpc_ahead_request(struct vpc_ahead *a, vpc_ahead_serve serve, struct vpc_map *map, uint64_t page);

int vpc_ahead_fd(const struct vpc_ahead *a);
void vpc_ahead_heard(struct vpc_ahead *a);
void vpc_ahead_stats(struct vpc_ahead *a, struct vpc_ahead_stats *out);

#endif
