/* One static program for the guest and for the far end of its network:
 *   guest mem                     memory checker (mem.c)
 *   guest flow LOCAL PEER far|MAC [QUEUES]  UDP flow both ways (flow.c)
 *   guest disk DEVICE [THREADS]   disk checker (disk.c)
 *   guest keep PORT               keeper of datagrams (keep.c)
 *   guest sectors DEVICE          reader of the documentation's disk (sectors.c)
 */
#define _GNU_SOURCE
#include "common.h"

#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/random.h>
#include <time.h>
#include <unistd.h>

uint64_t now_ns(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (uint64_t)now.tv_sec * 1000000000u + (uint64_t)now.tv_nsec;
}

uint64_t nonce64(void)
{
    uint64_t value = 0;
    /* GRND_INSECURE: a guest this small may wait long for entropy, and this is no secret. */
    if (getrandom(&value, sizeof value, GRND_INSECURE) != (ssize_t)sizeof value || value == 0)
        value = mix64(now_ns());
    return value;
}

void say(const char *format, ...)
{
    char line[4096];
    va_list args;
    va_start(args, format);
    int length = vsnprintf(line, sizeof line - 1, format, args);
    va_end(args);
    if (length < 0)
        return;
    if (length > (int)sizeof line - 2)
        length = (int)sizeof line - 2;
    line[length++] = '\n';
    for (int done = 0; done < length;) {
        ssize_t n = write(1, line + done, (size_t)(length - done));
        if (n < 0 && errno != EINTR)
            return;
        if (n > 0)
            done += (int)n;
    }
}

void fail(const char *what)
{
    say("FAILED %s: %s", what, strerror(errno));
    _exit(1);
}

void make_file(const char *path)
{
    int fd = open(path, O_CREAT | O_WRONLY | O_CLOEXEC, 0600);
    if (fd < 0)
        fail(path);
    close(fd);
}

int main(int argc, char **argv)
{
    static const struct {
        const char *name;
        int (*run)(int argc, char **argv);
    } programs[] = {{"mem", mem_main},
                  {"flow", flow_main},
                  {"disk", disk_main},
                  {"keep", keep_main},
                  {"sectors", sectors_main}};
    for (size_t i = 0; argc >= 2 && i < sizeof programs / sizeof *programs; i++)
        if (strcmp(argv[1], programs[i].name) == 0)
            return programs[i].run(argc - 1, argv + 1);
    fprintf(stderr, "usage: guest mem [PAGES [MILLISECONDS [HOLES]]] | flow LOCAL PEER far|MAC [QUEUES] | disk DEVICE [THREADS] | keep PORT | sectors DEVICE\n");
    return 2;
}
