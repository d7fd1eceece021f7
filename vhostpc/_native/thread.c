/* Threads: see vpc_thread.h. */
#define _GNU_SOURCE
#include "vpc_thread.h"

#include <errno.h>
#include <sys/prctl.h>

int vpc_thread_name(const char *name)
{
    return prctl(PR_SET_NAME, name, 0, 0, 0) < 0 ? -errno : 0;
}
