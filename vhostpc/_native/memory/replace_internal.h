#ifndef REPLACE_INTERNAL_H
#define REPLACE_INTERNAL_H
/* The memory that is put in the place of guest memory that is given up; not part of the interface to Python. */
#include <stddef.h>

/* Keep room for a replacement that must not fail for lack of mappings. Called wherever memory is mapped that may have
 * to be replaced. May be repeated; if it fails there is no reserve. */
void vpc_replace_reserve(void);

/* Put empty memory in the place of a mapping (whole pages of it), so that no touch of it reaches what was mapped: 0 or
 * -errno. Private memory, or, where that is not available, shared memory that nobody else has. After an error
 * wake no waiter there: the old mapping may stand, and a retry would make the missing page for everybody. */
int vpc_replace_private(void *at, size_t length);

#endif
