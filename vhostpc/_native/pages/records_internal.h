#ifndef RECORDS_INTERNAL_H
#define RECORDS_INTERNAL_H
/* The numbers of RAM records, of the frames around them and of the return path, in QEMU's migration stream. */
#include "bytes.h"

/* First bytes of a section's frames (QEMU's migration stream). */
#define SECTION_PART 0x02u
#define SECTION_END 0x03u
#define SECTION_FOOTER 0x7eu
/* Flags of a RAM record's word, and the return path's message types. */
#define REC_ZERO 0x002u
#define REC_PAGE 0x008u
#define REC_EOS 0x010u
#define REC_CONTINUE 0x020u
#define REC_XBZRLE 0x040u
#define REC_COMPRESSED 0x100u
#define RP_SHUT 1u
#define RP_PONG 2u
#define RP_REQ_PAGES_ID 3u
#define RP_REQ_PAGES 4u
#define RP_MAX_LEN 512u

#endif
