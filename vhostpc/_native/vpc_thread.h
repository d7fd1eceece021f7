/* Threads: Python makes them, C names them. */
#ifndef VPC_THREAD_H
#define VPC_THREAD_H

/* cdef begin */
/* Name the calling thread, as /proc/PID/task/TID/comm shows it: 15 bytes at most. */
int vpc_thread_name(const char *name);
/* cdef end */

#endif
