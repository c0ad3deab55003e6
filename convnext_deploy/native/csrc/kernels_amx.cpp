#define ON_TILES
#include "kernels_body.h"

KERNELS(amx)
