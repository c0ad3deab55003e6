#include "kernels_body.h"

KERNELS(avx2)
