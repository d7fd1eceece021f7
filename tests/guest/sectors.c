/* The reader of the documentation's disk, whose sectors say their number: read with O_DIRECT all the time, at random.
 *
 * Each read goes into a page at random out of many that were filled once and not touched since: so it is the device
 * that meets the pages that a migration has not brought.
 *
 * Prints a line a second:  sectors NONCE reads=N bad=N
 */
#define _GNU_SOURCE
#include "common.h"

#include <fcntl.h>
#include <stdbool.h>
#include <stdio.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <linux/fs.h>
#include <time.h>
#include <unistd.h>

enum {
    SECTOR = 512,
    PAGE = 4096,
    TARGETS = 4096,
};

static bool right(uint64_t number, const char *sector)
{
    char want[SECTOR + 1];
    snprintf(want, sizeof want, "sector %-504llu\n", (unsigned long long)number);
    return memcmp(sector, want, SECTOR) == 0;
}

int sectors_main(int argc, char **argv)
{
    if (argc != 2)
        return 2;
    int fd = open(argv[1], O_RDONLY | O_DIRECT | O_CLOEXEC);
    uint64_t bytes = 0;
    if (fd < 0 || ioctl(fd, BLKGETSIZE64, &bytes) < 0 || bytes < PAGE)
        fail(argv[1]);
    char *targets = mmap(NULL, (size_t)TARGETS * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (targets == MAP_FAILED)
        fail("mmap");
    memset(targets, 0x5a, (size_t)TARGETS * PAGE);
    make_file("/tmp/disk-ready");
    uint64_t nonce = nonce64(), random = nonce, reads = 0, bad = 0, next = now_ns();
    for (;;) {
        random = mix64(random);
        uint64_t at = random % (bytes / PAGE) * PAGE;
        char *page = targets + (size_t)(random >> 32) % TARGETS * PAGE;
        if (pread(fd, page, PAGE, (off_t)at) != PAGE)
            fail("reading from the disk");
        reads++;
        for (unsigned i = 0; i < PAGE / SECTOR; i++) {
            if (right(at / SECTOR + i, page + i * SECTOR))
                continue;
            if (++bad <= 16)
                say("BAD sector=%llu: %.32s", (unsigned long long)(at / SECTOR + i), page + i * SECTOR);
        }
        if (now_ns() >= next) {
            next += 1000000000u;
            say("sectors %016llx reads=%llu bad=%llu", (unsigned long long)nonce, (unsigned long long)reads,
                (unsigned long long)bad);
        }
        nanosleep(&(struct timespec){.tv_nsec = 4000000}, NULL);
    }
}
