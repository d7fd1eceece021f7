/*
 * Sends Ethernet frames in UDP datagrams, so many a second or as fast as it goes: by UDP_SEGMENT, as a
 * sender of today does, or each by itself with sendmmsg. Bytes 14
 * to 21 of each frame are its number. Paced sending sleeps between bursts, so it costs the other side no
 * more of the processor than it must.
 */
#ifndef BENCH_BLAST_H
#define BENCH_BLAST_H

#include "common.h"
#include <netinet/udp.h>

#ifndef UDP_SEGMENT
#define UDP_SEGMENT 103
#endif

enum { BLAST_BURST = 32, BLAST_MOST = 65507 };

/* Sends from fd and prints what was sent as one line of JSON. */
static inline void blast(int fd, struct sockaddr_in to, size_t size, double seconds, double rate, int joined)
{
    static char data[BLAST_MOST];
    union {
        char room[CMSG_SPACE(sizeof(uint16_t))];
        struct cmsghdr align;
    } control = {{0}};
    uint64_t sent = 0, failed = 0;

    if (size < 22 || size > 9000) {
        fprintf(stderr, "SIZE is 22 to 9000\n");
        exit(2);
    }
    size_t burst = BLAST_MOST / size < BLAST_BURST ? BLAST_MOST / size : BLAST_BURST;

    for (size_t i = 0; i < burst; i++) {
        memcpy(data + i * size, "\xff\xff\xff\xff\xff\xff\x02\x00\x00\x00\x00\x01\x88\xb5", 14);
        for (size_t k = 22; k < size; k++)
            data[i * size + k] = (char)k;
    }

    struct iovec iov = {data, burst * size};
    struct msghdr msg = {.msg_name = &to,
                         .msg_namelen = sizeof to,
                         .msg_iov = &iov,
                         .msg_iovlen = 1,
                         .msg_control = &control,
                         .msg_controllen = sizeof control.room};
    struct cmsghdr *cmsg = CMSG_FIRSTHDR(&msg);
    uint16_t segment = (uint16_t)size;

    cmsg->cmsg_level = SOL_UDP;
    cmsg->cmsg_type = UDP_SEGMENT;
    cmsg->cmsg_len = CMSG_LEN(sizeof segment);
    memcpy(CMSG_DATA(cmsg), &segment, sizeof segment);

    struct mmsghdr single[BLAST_BURST];
    struct iovec part[BLAST_BURST];

    memset(single, 0, sizeof single);
    for (size_t i = 0; i < burst; i++) {
        part[i] = (struct iovec){data + i * size, size};
        single[i].msg_hdr = (struct msghdr){
            .msg_name = &to, .msg_namelen = sizeof to, .msg_iov = &part[i], .msg_iovlen = 1};
    }

    uint64_t begin = now_ns(), end = begin + (uint64_t)(seconds * 1e9), now = begin;

    while (now < end) {
        uint64_t due = rate > 0 ? (uint64_t)((double)(now - begin) * 1e-9 * rate) : UINT64_MAX;

        if (sent + failed >= due) {
            struct timespec t;
            uint64_t at = begin + (uint64_t)((double)(sent + failed + burst) / rate * 1e9);

            t.tv_sec = (time_t)(at / 1000000000u);
            t.tv_nsec = (long)(at % 1000000000u);
            clock_nanosleep(CLOCK_MONOTONIC, TIMER_ABSTIME, &t, NULL);
        } else {
            for (size_t i = 0; i < burst; i++) {
                uint64_t number = sent + i;

                memcpy(data + i * size + 14, &number, sizeof number);
            }
            if ((joined ? (int)sendmsg(fd, &msg, 0) : sendmmsg(fd, single, (unsigned)burst, 0)) < 0) {
                /* Nobody listens yet or no memory: counted, not fatal. */
                if (errno != ECONNREFUSED && errno != ENOBUFS && errno != EAGAIN)
                    die("sendmsg");
                failed += burst;
            } else {
                sent += burst;
            }
        }
        now = now_ns();
    }
    printf("{\"sent\": %llu, \"failed\": %llu, \"seconds\": %.6f}\n", (unsigned long long)sent,
           (unsigned long long)failed, (double)(now - begin) * 1e-9);
    fflush(stdout);
}

#endif
