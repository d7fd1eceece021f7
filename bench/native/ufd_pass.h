/* How the toucher hands its userfaultfd to a handler: one message on a unix stream socket. */
#ifndef BENCH_UFD_PASS_H
#define BENCH_UFD_PASS_H

#include "common.h"
#include <sys/un.h>

struct ufd_hello {
    uint64_t base;   /* address of the memory in the toucher */
    uint64_t length; /* bytes */
};

static inline struct sockaddr_un unix_address(const char *path)
{
    struct sockaddr_un a = {.sun_family = AF_UNIX};

    if (strlen(path) >= sizeof a.sun_path) {
        fprintf(stderr, "path too long: %s\n", path);
        exit(2);
    }
    strcpy(a.sun_path, path);
    return a;
}

/* The word that page number i begins with; a handler writes it, the toucher checks it. */
static inline uint64_t page_word(uint64_t i)
{
    return (i + 1) * 0x9e3779b97f4a7c15u;
}

#endif
