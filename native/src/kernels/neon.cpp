#define KERNEL_LANES 4
#define KERNEL_TILE 24
#define KERNEL_NAME "neon"
#define KERNEL_TABLE neon_table

#include "table.inc"
