/* eventfds that an untrusted peer has too, and pipes and sockets in their place: neither call waits, whatever the flags
 * and the counter are.
 *
 * The peer may clear O_NONBLOCK, fill the counter or empty it at any moment, also between a poll and a call. So each
 * call here asks by itself not to wait.
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
