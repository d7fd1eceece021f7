#ifndef VPC_SUPPLY_INTERNAL_H
#define VPC_SUPPLY_INTERNAL_H
#include "memory/gm_internal.h"

void vpc_supply_ref(struct vpc_supply *s);
void vpc_supply_link(struct vpc_supply *s, struct vpc_map *m);
void vpc_supply_unlink(struct vpc_supply *s, struct vpc_map *m);

#endif
