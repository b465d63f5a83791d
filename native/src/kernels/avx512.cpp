#define KERNEL_LANES 16
#define KERNEL_TILE 28
#define KERNEL_NAME "avx512"
#define KERNEL_TABLE avx512_table

#include "table.inc"
