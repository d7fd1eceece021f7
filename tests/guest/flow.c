/* A UDP flow in both directions, run in the guest and at the far end of its network: 500 frames a second of
 * 1400 bytes, each with a sequence number, the number of the newest frame seen from the other side, and a
 * CRC over all.  A bitmap tells a frame that comes twice from one that comes late.
 *
 * Prints a line a second:
 *   net NONCE tx=N rx=N bad=N dup=N late=N lost=N high=N acked=N gaps=A-B,C-D
 * tx: frames sent (also the next sequence number); rx: good ones received; high: one past the highest
 * sequence number received; acked: one past the highest of ours that the other side has received;
 * lost: numbers below high never received, gaps: which (the last of each range included).
 *
 * The far end also pings ten times a second and listens for announcements (gratuitous ARP and RARP):
 *   ping tx=N rx=N bad=N dup=N lost=N gaps=...        announce KIND mac=...
 * and reads commands from standard input:
 *   mark ID      mark ID next=N acked=N high=N pings=N echoed=N      and, at the next sign of the guest itself (a
 *                frame, an echo or an ARP):  moved ID by=KIND next=N ... (the same numbers)
 *                pings: pings sent, echoed: one past the highest that was answered
 *   report       prints the lines at once
 */
#define _GNU_SOURCE
#include "common.h"

#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/if_packet.h>
#include <net/ethernet.h>
#include <net/if_arp.h>
#include <netinet/in.h>
#include <netinet/ip.h>
#include <netinet/ip_icmp.h>
#include <poll.h>
#include <sched.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/timerfd.h>
#include <unistd.h>

enum {
    FRAME = 1400,
    PORT = 7001,
    INTERVAL_NS = 2000000, /* 500 a second */
    PING_EVERY = 50,       /* frames: ten a second */
    CATCH_UP = 25,         /* frames sent at once after a pause, at most */
    ON_A_QUEUE = 50,       /* frames that go by a queue before the next one's turn */
    MAX_SEEN = 1 << 22,    /* sequence numbers remembered: over two hours */
};
#define MAGIC 0x766d6f76u /* "vmov" */

struct frame {
    uint32_t magic;
    uint32_t reserved;
    uint64_t nonce;
    uint64_t sequence;
    uint64_t acked;
    uint8_t payload[FRAME - 36];
    uint32_t crc;
} __attribute__((packed));
_Static_assert(sizeof(struct frame) == FRAME, "frame size");

/* What was received of one numbered series. */
struct seen {
    uint64_t first, high, good, bad, dup, late;
    bool started;
    uint64_t bits[MAX_SEEN / 64];
};

struct flow {
    int udp, timer, icmp, sniff_arp, sniff_rarp;
    uint64_t nonce, peer_nonce;
    uint64_t sent, send_errors, acked, pings, next_line, queues;
    bool far, marked;
    char mark[64];
    struct sockaddr_in peer;
    struct seen frames, echoes;
};

static uint32_t crc_table[256];

static void crc_init(void)
{
    for (uint32_t n = 0; n < 256; n++) {
        uint32_t c = n;
        for (int k = 0; k < 8; k++)
            c = c & 1 ? 0xedb88320u ^ (c >> 1) : c >> 1;
        crc_table[n] = c;
    }
}

static uint32_t crc32_of(const void *data, size_t length)
{
    const uint8_t *p = data;
    uint32_t c = ~0u;
    for (size_t i = 0; i < length; i++)
        c = crc_table[(c ^ p[i]) & 0xff] ^ (c >> 8);
    return ~c;
}

static void note(struct seen *s, uint64_t n)
{
    if (n >= MAX_SEEN) {
        s->bad++;
        return;
    }
    uint64_t bit = (uint64_t)1 << (n % 64);
    if (s->bits[n / 64] & bit) {
        s->dup++;
        return;
    }
    s->bits[n / 64] |= bit;
    s->good++;
    if (!s->started) {
        s->started = true;
        s->first = n;
        s->high = n;
    }
    if (n < s->high)
        s->late++;
    else
        s->high = n + 1;
    if (n < s->first)
        s->first = n;
}

/* The numbers between first and high that never came, as "a-b,c-d" (at most 40 ranges); gives their count. */
static uint64_t gaps(const struct seen *s, char *text, size_t size)
{
    uint64_t lost = 0, start = 0;
    size_t used = 0;
    bool open = false;
    text[0] = 0;
    for (uint64_t n = s->first; s->started && n <= s->high; n++) {
        bool missing = n < s->high && !(s->bits[n / 64] >> (n % 64) & 1);
        lost += missing;
        if (missing && !open)
            start = n;
        if (!missing && open && used + 48 < size)
            used += (size_t)snprintf(text + used, size - used, "%s%llu-%llu", used ? "," : "",
                                     (unsigned long long)start, (unsigned long long)(n - 1));
        open = missing;
    }
    return lost;
}

static void print_lines(const struct flow *f)
{
    char ranges[2048];
    uint64_t lost = gaps(&f->frames, ranges, sizeof ranges);
    say("net %016llx tx=%llu rx=%llu bad=%llu dup=%llu late=%llu lost=%llu high=%llu acked=%llu gaps=%s",
        (unsigned long long)f->nonce, (unsigned long long)f->sent, (unsigned long long)f->frames.good,
        (unsigned long long)f->frames.bad, (unsigned long long)f->frames.dup,
        (unsigned long long)f->frames.late, (unsigned long long)lost, (unsigned long long)f->frames.high,
        (unsigned long long)f->acked, ranges);
    if (!f->far)
        return;
    lost = gaps(&f->echoes, ranges, sizeof ranges);
    say("ping tx=%llu rx=%llu bad=%llu dup=%llu lost=%llu gaps=%s", (unsigned long long)f->pings,
        (unsigned long long)f->echoes.good, (unsigned long long)f->echoes.bad,
        (unsigned long long)f->echoes.dup, (unsigned long long)lost, ranges);
}

static void print_mark(const struct flow *f, const char *word, const char *by)
{
    say("%s %s%s%s next=%llu acked=%llu high=%llu pings=%llu echoed=%llu", word, f->mark, *by ? " by=" : "", by,
        (unsigned long long)f->sent, (unsigned long long)f->acked, (unsigned long long)f->frames.high,
        (unsigned long long)f->pings, (unsigned long long)f->echoes.high);
}

/* The guest gave a sign of life by what it sent, so the bridge knows its port from here on. */
static void guest_seen(struct flow *f, const char *by)
{
    if (f->marked) {
        f->marked = false;
        print_mark(f, "moved", by);
    }
}

static bool send_frame(struct flow *f)
{
    struct frame frame = {.magic = MAGIC, .nonce = f->nonce, .sequence = f->sent, .acked = f->frames.high};
    uint64_t word = mix64(f->nonce ^ f->sent);
    for (size_t i = 0; i + 8 <= sizeof frame.payload; i += 8) {
        memcpy(frame.payload + i, &word, 8);
        word = word * 6364136223846793005u + 1442695040888963407u;
    }
    frame.crc = crc32_of(&frame, FRAME - 4);
    /* A frame that could not be sent keeps its number for the next try: it was not lost on the way. */
    if (sendto(f->udp, &frame, sizeof frame, MSG_DONTWAIT, (struct sockaddr *)&f->peer, sizeof f->peer) ==
        FRAME) {
        f->sent++;
        return true;
    }
    f->send_errors++;
    return false;
}

static void receive_frames(struct flow *f)
{
    struct frame frame;
    for (;;) {
        ssize_t n = recv(f->udp, &frame, sizeof frame, MSG_DONTWAIT | MSG_TRUNC);
        if (n < 0)
            return;
        if (n != FRAME || frame.magic != MAGIC || frame.crc != crc32_of(&frame, FRAME - 4)) {
            f->frames.bad++;
            continue;
        }
        if (f->peer_nonce != frame.nonce) {
            if (f->peer_nonce)
                say("newpeer %016llx", (unsigned long long)frame.nonce);
            f->peer_nonce = frame.nonce;
            memset(&f->frames, 0, sizeof f->frames);
        }
        note(&f->frames, frame.sequence);
        if (frame.acked > f->acked)
            f->acked = frame.acked;
        guest_seen(f, "frame");
    }
}

/* Ping */

struct echo {
    struct icmphdr header;
    uint64_t nonce, sequence;
    uint8_t fill[984];
};

static uint16_t inet_sum(const void *data, size_t length)
{
    const uint8_t *p = data;
    uint32_t sum = 0;
    for (size_t i = 0; i + 1 < length; i += 2)
        sum += (uint32_t)p[i] | (uint32_t)p[i + 1] << 8;
    while (sum >> 16)
        sum = (sum & 0xffff) + (sum >> 16);
    return (uint16_t)~sum;
}

static void send_ping(struct flow *f)
{
    struct echo echo = {.header = {.type = ICMP_ECHO}, .nonce = f->nonce, .sequence = f->pings};
    echo.header.un.echo.id = (uint16_t)f->nonce;
    echo.header.un.echo.sequence = htons((uint16_t)f->pings);
    memset(echo.fill, (int)(f->pings & 0xff), sizeof echo.fill);
    echo.header.checksum = inet_sum(&echo, sizeof echo);
    struct sockaddr_in to = f->peer;
    to.sin_port = 0;
    if (sendto(f->icmp, &echo, sizeof echo, MSG_DONTWAIT, (struct sockaddr *)&to, sizeof to) > 0)
        f->pings++;
}

static void receive_pings(struct flow *f)
{
    uint8_t packet[2048];
    struct echo echo;
    for (;;) {
        ssize_t n = recv(f->icmp, packet, sizeof packet, MSG_DONTWAIT);
        if (n < 0)
            return;
        size_t header = (size_t)(packet[0] & 15) * 4;
        if ((size_t)n < header + sizeof echo.header)
            continue;
        size_t length = (size_t)n - header;
        memset(&echo, 0, sizeof echo);
        memcpy(&echo, packet + header, length < sizeof echo ? length : sizeof echo);
        if (echo.header.type != ICMP_ECHOREPLY || echo.header.un.echo.id != (uint16_t)f->nonce)
            continue;
        bool good = length == sizeof echo && echo.nonce == f->nonce && inet_sum(&echo, sizeof echo) == 0;
        for (size_t i = 0; good && i < sizeof echo.fill; i++)
            good = echo.fill[i] == (uint8_t)echo.sequence;
        if (good)
            note(&f->echoes, echo.sequence);
        else
            f->echoes.bad++;
        guest_seen(f, "echo");
    }
}

/* Announcements: RARP requests (QEMU, or a back-end, in the guest's name) and gratuitous ARP (the guest). */
static void receive_announcements(struct flow *f, int sniff)
{
    uint8_t p[2048];
    for (;;) {
        struct sockaddr_ll from;
        socklen_t size = sizeof from;
        ssize_t n = recvfrom(sniff, p, sizeof p, MSG_DONTWAIT, (struct sockaddr *)&from, &size);
        if (n < 0)
            return;
        if (n < 42 || from.sll_pkttype == PACKET_OUTGOING)
            continue;
        unsigned type = (unsigned)p[12] << 8 | p[13];
        const char *kind = NULL;
        if (type == ETH_P_RARP)
            kind = "rarp";
        else if (type == ETH_P_ARP && memcmp(p + 28, p + 38, 4) == 0) /* sender and target address equal */
            kind = "arp";
        if (!kind)
            continue;
        say("announce %s mac=%02x:%02x:%02x:%02x:%02x:%02x", kind, p[6], p[7], p[8], p[9], p[10], p[11]);
        /* RARP comes from QEMU or the back-end, maybe before the guest's queues run there. */
        if (type == ETH_P_ARP)
            guest_seen(f, kind);
    }
}

static void read_commands(struct flow *f)
{
    char text[256];
    ssize_t n = read(0, text, sizeof text - 1);
    if (n == 0)
        _exit(0); /* the harness closed its end */
    if (n < 0)
        return;
    text[n] = 0;
    for (char *save, *line = strtok_r(text, "\n", &save); line; line = strtok_r(NULL, "\n", &save)) {
        if (sscanf(line, "mark %63s", f->mark) == 1) {
            /* What the stopped guest sent is in the sockets by now: it counts as before the mark. */
            receive_frames(f);
            receive_pings(f);
            receive_announcements(f, f->sniff_arp);
            receive_announcements(f, f->sniff_rarp);
            print_mark(f, "mark", "");
            f->marked = true;
        } else if (strcmp(line, "report") == 0) {
            print_lines(f);
            say("end");
        }
    }
}

/* A card with several queues sends by the one of the processor that the sender runs on. */
static void next_queue(const struct flow *f)
{
    cpu_set_t set;
    CPU_ZERO(&set);
    CPU_SET(f->sent / ON_A_QUEUE % f->queues, &set);
    if (f->sent % ON_A_QUEUE == 0 && sched_setaffinity(0, sizeof set, &set) < 0)
        fail("a processor for each queue");
}

static void on_timer(struct flow *f)
{
    uint64_t expired = 0;
    if (read(f->timer, &expired, sizeof expired) != (ssize_t)sizeof expired)
        return;
    for (uint64_t i = 0; i < expired && i < CATCH_UP; i++) {
        if (f->queues > 1)
            next_queue(f);
        if (send_frame(f) && f->far && f->sent % PING_EVERY == 0)
            send_ping(f);
    }
    if (now_ns() >= f->next_line) {
        f->next_line = now_ns() + 1000000000u;
        print_lines(f);
    }
}

static int flow_socket(int domain, int type, int protocol)
{
    int fd = socket(domain, type | SOCK_NONBLOCK | SOCK_CLOEXEC, protocol);
    if (fd < 0)
        fail("socket");
    int bytes = 8 << 20;
    if (setsockopt(fd, SOL_SOCKET, SO_RCVBUFFORCE, &bytes, sizeof bytes) < 0)
        fail("SO_RCVBUFFORCE");
    return fd;
}

/* In the guest: run before the memory checker, and never ask for the other side's hardware address (an
 * answer that comes late would be a second reason for loss). */
static void settle(const struct flow *f, const char *mac)
{
    struct arpreq entry = {.arp_flags = ATF_COM | ATF_PERM, .arp_dev = "eth0"};
    unsigned char *a = (unsigned char *)entry.arp_ha.sa_data;
    memcpy(&entry.arp_pa, &f->peer, sizeof f->peer);
    ((struct sockaddr_in *)&entry.arp_pa)->sin_port = 0;
    entry.arp_ha.sa_family = ARPHRD_ETHER;
    if (sscanf(mac, "%hhx:%hhx:%hhx:%hhx:%hhx:%hhx", a, a + 1, a + 2, a + 3, a + 4, a + 5) != 6 ||
        ioctl(f->udp, SIOCSARP, &entry) < 0)
        fail("SIOCSARP");
    if (setpriority(PRIO_PROCESS, 0, -10) < 0)
        fail("setpriority");
}

int flow_main(int argc, char **argv)
{
    static struct flow f;
    if (argc < 4)
        return 2;
    crc_init();
    f.far = strcmp(argv[3], "far") == 0;
    f.nonce = nonce64();
    f.queues = argc > 4 ? strtoul(argv[4], NULL, 10) : 1;
    struct sockaddr_in local = {.sin_family = AF_INET, .sin_port = htons(PORT)};
    f.peer = local;
    if (inet_pton(AF_INET, argv[1], &local.sin_addr) != 1 || inet_pton(AF_INET, argv[2], &f.peer.sin_addr) != 1)
        return 2;
    f.udp = flow_socket(AF_INET, SOCK_DGRAM, 0);
    if (bind(f.udp, (struct sockaddr *)&local, sizeof local) < 0)
        fail("bind");
    f.icmp = f.sniff_arp = f.sniff_rarp = -1;
    if (f.far) {
        f.icmp = flow_socket(AF_INET, SOCK_RAW, IPPROTO_ICMP);
        /* Not ETH_P_ALL: that would see every frame of the flow, once for each port of the bridge. */
        f.sniff_arp = flow_socket(AF_PACKET, SOCK_RAW, htons(ETH_P_ARP));
        f.sniff_rarp = flow_socket(AF_PACKET, SOCK_RAW, htons(ETH_P_RARP));
    }
    if (!f.far)
        settle(&f, argv[3]);
    f.timer = timerfd_create(CLOCK_MONOTONIC, TFD_NONBLOCK | TFD_CLOEXEC);
    struct itimerspec every = {{0, INTERVAL_NS}, {0, INTERVAL_NS}};
    if (f.timer < 0 || timerfd_settime(f.timer, 0, &every, NULL) < 0)
        fail("timerfd");
    say("flow %016llx %s to %s", (unsigned long long)f.nonce, argv[1], argv[2]);

    struct pollfd fds[] = {{f.timer, POLLIN, 0},     {f.far ? 0 : -1, POLLIN, 0}, {f.udp, POLLIN, 0},
                           {f.icmp, POLLIN, 0},      {f.sniff_arp, POLLIN, 0},    {f.sniff_rarp, POLLIN, 0}};
    for (;;) {
        if (poll(fds, 6, -1) < 0 && errno != EINTR)
            fail("poll");
        receive_frames(&f);
        if (f.far) {
            receive_pings(&f);
            receive_announcements(&f, f.sniff_arp);
            receive_announcements(&f, f.sniff_rarp);
        }
        if (fds[1].revents)
            read_commands(&f);
        if (fds[0].revents)
            on_timer(&f);
    }
}
