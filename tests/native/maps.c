/* A page goes away where the process has as many mappings as it may have, and no reserve of them.
 *
 *   maps
 *
 * A page of its own in the middle of a mapping makes three of it, which is impossible here. Replacing all of the mapping
 * makes no more than there are. Built without the sanitizers that have an allocator: theirs needs mappings, too.
 */
#define _GNU_SOURCE
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <unistd.h>
#include "memory/gm_internal.h"
#include "memory/replace_internal.h"

#define PAGE 4096u
#define SIZE (16u * PAGE)
#define GPA 0x10000u

#define CHECK(what)                                                                                          \
    do {                                                                                                     \
        if (!(what)) {                                                                                       \
            fprintf(stderr, "line %d: %s\n", __LINE__, #what);                                               \
            exit(2);                                                                                         \
        }                                                                                                    \
    } while (0)

static unsigned take_all(void)
{
    unsigned n = 0;

    /* By turns readable and not, so that no two are joined. */
    while (mmap(NULL, PAGE, n & 1 ? PROT_READ : PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0) != MAP_FAILED)
        n++;
    return n;
}

int main(void)
{
    struct vpc_supply *supply;
    struct vpc_gm *gm;
    struct vpc_map *map;
    unsigned char copy[PAGE];
    int fd = memfd_create("guest", MFD_CLOEXEC);
    void *spare = mmap(NULL, PAGE, PROT_NONE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);

    CHECK(fd >= 0 && ftruncate(fd, SIZE) == 0 && pwrite(fd, "x", 1, 0) == 1 && spare != MAP_FAILED);
    CHECK(vpc_supply_new(&supply) == 0 && vpc_gm_new(supply, &gm) == 0);
    CHECK(vpc_map_new(supply, fd, 0, SIZE, 0, &map) == 0 && vpc_gm_add(gm, map, GPA, SIZE, GPA) == 0);
    CHECK(vpc_gm_read(gm, GPA, copy, PAGE) == 0 && copy[0] == 'x');
    unsigned taken = take_all();
    /* There is no such address; but the reserve is gone now. */
    CHECK(vpc_replace_private((void *)(UINTPTR_MAX - PAGE + 1), PAGE) < 0);
    taken += take_all();
    /* mmap makes one more than the limit; so this is the limit. */
    CHECK(munmap(spare, PAGE) == 0);
    CHECK(mprotect((void *)(uintptr_t)(vpc_map_address(map) + PAGE), PAGE, PROT_READ) < 0 && errno == ENOMEM);
    CHECK(ftruncate(fd, 2 * PAGE) == 0);
    CHECK(vpc_gm_read(gm, GPA + 4 * PAGE, copy, PAGE) == 0 && copy[0] == 0 && vpc_gm_lost(gm));
    CHECK(vpc_gm_read(gm, GPA, copy, PAGE) == 0 && copy[0] == 0);
    vpc_map_unref(map);
    vpc_gm_unref(gm);
    vpc_supply_unref(supply);
    close(fd);
    printf("taken %u\n", taken);
    return 0;
}
