#define KERNEL_LANES 8
#define KERNEL_TILE 14
#define KERNEL_NAME "avx2"
#define KERNEL_TABLE avx2_table

#include "table.inc"
