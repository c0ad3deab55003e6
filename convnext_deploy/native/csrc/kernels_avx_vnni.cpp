#include "kernels_body.h"

KERNELS(avx_vnni)
