/* eventfds whose other holder is not trusted, and pipes and sockets in their place: neither call waits, whatever its
 * flags and its counter are.
 *
 * A holder of the same open file may clear O_NONBLOCK, fill the counter or empty it at any moment, also between a look
 * and a call. So each call here says itself that it does not wait.
 */
#ifndef VPC_EVENT_H
#define VPC_EVENT_H
#include <stdint.h>

/* cdef begin */
/* Add 1 to the counter of an eventfd; a full one is as good. Write that as 8 bytes to a pipe or socket. 0 or -errno; no
 * signal is raised. */
int vpc_event_signal(int fd);
/* Read an eventfd dry (EFD_SEMAPHORE: one), or 8 bytes of a pipe or socket. 1: there was something, 0: not. */
int vpc_event_clear(int fd);
/* cdef end */

#endif
