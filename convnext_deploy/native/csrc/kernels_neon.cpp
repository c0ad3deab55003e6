#include "kernels_body.h"

KERNELS(neon)
