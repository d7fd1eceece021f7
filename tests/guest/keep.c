/* Keeps what a flood brings for a while: UDP datagrams wait in the socket until newer ones push them out.
 *
 * The pages of a large datagram are written by the device alone until they are given back.  Those of a receiver
 * that took each at once would be cleared for the next, by the guest: QEMU sees that without any log.
 */
#define _GNU_SOURCE
#include "common.h"

#include <arpa/inet.h>
#include <errno.h>
#include <linux/sock_diag.h>
#include <stdlib.h>
#include <sys/socket.h>
#include <unistd.h>

enum {
    KEPT = 2 << 20, /* bytes, with the kernel's own for each datagram */
};

int keep_main(int argc, char **argv)
{
    if (argc != 2)
        return 2;
    int fd = socket(AF_INET, SOCK_DGRAM | SOCK_CLOEXEC, 0), room = 2 * KEPT;
    struct sockaddr_in local = {.sin_family = AF_INET, .sin_port = htons((uint16_t)atoi(argv[1]))};
    if (fd < 0 || bind(fd, (struct sockaddr *)&local, sizeof local) < 0 ||
        setsockopt(fd, SOL_SOCKET, SO_RCVBUFFORCE, &room, sizeof room) < 0)
        fail("a socket that keeps");
    for (;;) {
        uint32_t used[SK_MEMINFO_VARS];
        socklen_t length = sizeof used;
        if (getsockopt(fd, SOL_SOCKET, SO_MEMINFO, used, &length) < 0)
            fail("SO_MEMINFO");
        if (used[SK_MEMINFO_RMEM_ALLOC] < KEPT)
            usleep(20000);
        else if (recv(fd, NULL, 0, MSG_TRUNC) < 0 && errno != EINTR)
            fail("recv");
    }
}
