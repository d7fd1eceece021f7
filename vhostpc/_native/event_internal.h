#ifndef EVENT_INTERNAL_H
#define EVENT_INTERNAL_H
/* Reads and writes that never wait, for the rest of the C. */
#include <stddef.h>
#include <sys/types.h>

#include "vpc_event.h"

/* An eventfd of our own, which no peer ever gets: non-blocking, close-on-exec. -1 and errno. */
int event_new(void);
/* Write and read such a one: one plain system call each, also in a signal handler. */
void event_poke(int fd);
void event_drain(int fd);

/* read(2) and write(2) of a descriptor that others may have made blocking; -1 and EAGAIN where they would wait. Not for
 * files on a disk: those have no readiness to wait for, and may answer EAGAIN for ever. */
ssize_t read_now(int fd, void *to, size_t length);
ssize_t write_now(int fd, const void *from, size_t length);

/* Is it such a file? */
int is_on_disk(int fd);

#endif
