/*
 * XBZRLE: a page as its difference to the destination's copy (QEMU's documents, xbzrle).
 *
 * Runs alternate: the length of an unchanged run (the first may be 0), the length of a changed run, and its bytes. A
 * length is a uleb128 of at most two bytes. The last unchanged run is left out. wire/migration/xbzrle.py is the model.
 */
#include "pages/load_internal.h"

#include <errno.h>
#include <string.h>

/* The length at *at, which moves on; -1 where there is none. */
static int run_length(const unsigned char *delta, size_t length, size_t *at)
{
    if (*at >= length)
        return -1;
    unsigned low = delta[(*at)++];
    if (!(low & 0x80))
        return (int)low;
    if (*at >= length || delta[*at] & 0x80)
        return -1;
    return (int)((low & 0x7f) | (unsigned)delta[(*at)++] << 7);
}

int vpc_delta_apply(unsigned char *page, const unsigned char *delta, size_t length)
{
    size_t at = 0, place = 0;

    while (at < length) {
        int stays = run_length(delta, length, &at);
        if (stays < 0 || (place && !stays))
            return -EBADMSG;
        int changes = run_length(delta, length, &at);
        if (changes <= 0)
            return -EBADMSG;
        place += (size_t)stays;
        if (place + (size_t)changes > TARGET_PAGE || at + (size_t)changes > length)
            return -EBADMSG;
        memcpy(page + place, delta + at, (size_t)changes);
        place += (size_t)changes;
        at += (size_t)changes;
    }
    return 0;
}
