#ifndef PAGE_H
#define PAGE_H
/* A page as the guest, the migration stream and the dirty log count it; a host page is one or more of them. */

#define TARGET_SHIFT 12
#define TARGET_PAGE (1u << TARGET_SHIFT)

#endif
