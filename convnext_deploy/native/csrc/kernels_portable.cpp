#define PORTABLE  // whatever vectors the machine has
#include "kernels_body.h"

KERNELS(portable)
