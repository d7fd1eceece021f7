/* The loader of RAM records alone, on streams from stdin.
 *
 *   loads < CASES
 *
 * A case is five u32 of this machine's order (framed, last, armed, bytes fed, bytes in all) and the stream. Each is
 * loaded into blocks of its own, ram0 and rom of 4 KiB pages and big of 16 KiB ones; a line tells how it ended, how many
 * bytes and sections were read, whether the END was, the host pages received, and a sum over all that the files hold.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/userfaultfd.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>
#include "pages/ram_internal.h"
#include "pages/vpc_load.h"
#include "ufd/vpc_uffd.h"

#define BLOCKS 3
#define SECTION 7u

#define CHECK(what)                                                                                          \
    do {                                                                                                     \
        if (!(what)) {                                                                                       \
            fprintf(stderr, "line %d: %s\n", __LINE__, #what);                                               \
            exit(2);                                                                                         \
        }                                                                                                    \
    } while (0)

static const struct {
    const char *name;
    uint64_t length, page_size;
} BLOCK[BLOCKS] = {{"ram0", 6 * 4096, 4096}, {"rom", 2 * 4096, 4096}, {"big", 32 * 1024, 16 * 1024}};

static int open_ufd(void)
{
    uint64_t offered, ioctls;
    int fd = vpc_uffd_open(VPC_UFFD_DEVICE);

    if (fd < 0)
        fd = vpc_uffd_open(VPC_UFFD_SYSCALL);
    if (fd < 0)
        fd = vpc_uffd_open(VPC_UFFD_USER_MODE);
    CHECK(fd >= 0 && vpc_uffd_api(fd, UFFD_FEATURE_MISSING_SHMEM, &offered, &ioctls) == 0);
    return fd;
}

/* Read from the file, which makes no page. */
static uint64_t sum_of(int fd, uint64_t length, uint64_t weight)
{
    unsigned char page[4096];
    uint64_t sum = 0;

    for (uint64_t at = 0; at < length; at += sizeof page) {
        uint64_t of_page = 0;
        CHECK(pread(fd, page, sizeof page, (off_t)at) == (ssize_t)sizeof page);
        for (size_t i = 0; i < sizeof page; i++)
            of_page += page[i];
        sum += of_page * (weight + at / sizeof page);
    }
    return sum;
}

static void one_case(const uint32_t *head, const unsigned char *stream)
{
    struct vpc_ram *ram;
    struct vpc_load *load;
    int fd[BLOCKS], place = head[2] ? open_ufd() : -1, input = memfd_create("input", MFD_CLOEXEC);
    struct vpc_load_stats stats;
    uint64_t ioctls, sum = 0, received = 0;

    CHECK(vpc_ram_new(&ram) == 0 && input >= 0);
    for (int i = 0; i < BLOCKS; i++) {
        fd[i] = memfd_create(BLOCK[i].name, MFD_CLOEXEC);
        CHECK(fd[i] >= 0 && ftruncate(fd[i], (off_t)BLOCK[i].length) == 0);
        CHECK(vpc_ram_add(ram, BLOCK[i].name, fd[i], 0, BLOCK[i].length, BLOCK[i].page_size) == i);
        if (place >= 0)
            CHECK(vpc_uffd_register(place, vpc_ram_base(ram, i), BLOCK[i].length, UFFDIO_REGISTER_MODE_MISSING,
                                    &ioctls) == 0);
    }
    size_t left = head[4] - head[3];
    CHECK(write(input, stream + head[3], left) == (ssize_t)left && lseek(input, 0, SEEK_SET) == 0);
    CHECK(vpc_load_new(ram, NULL, input, place, &load) == 0 && vpc_load_feed(load, stream, head[3]) == 0);
    if (head[0])
        CHECK(vpc_load_follow(load, SECTION, (int)head[1]) == 0);
    int rc = vpc_load_run(load, 0);
    CHECK(rc == VPC_LOAD_EOS || rc == VPC_LOAD_EOF || rc == -EBADMSG);
    vpc_load_stats(load, &stats);
    for (int i = 0; i < BLOCKS; i++) {
        sum += sum_of(fd[i], BLOCK[i].length, 1 + 100 * (uint64_t)i);
        received += (uint64_t)vpc_ram_count_bits(ram, i, VPC_BITS_RECEIVED);
    }
    printf("%d %d %llu %llu %d %llu %llu\n", rc, stats.why, (unsigned long long)stats.bytes,
           (unsigned long long)stats.sections, stats.ended, (unsigned long long)received, (unsigned long long)sum);
    vpc_load_free(load);
    vpc_ram_free(ram);
    for (int i = 0; i < BLOCKS; i++)
        close(fd[i]);
    if (place >= 0)
        close(place);
    close(input);
}

int main(void)
{
    uint32_t head[5];

    while (fread(head, sizeof head, 1, stdin) == 1) {
        unsigned char *stream = malloc(head[4] ? head[4] : 1); /* of its own size: reading behind it is found */
        CHECK(stream && head[3] <= head[4] && fread(stream, 1, head[4], stdin) == head[4]);
        one_case(head, stream);
        free(stream);
    }
    return 0;
}
