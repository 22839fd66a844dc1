/* The one translation unit of the test program that holds the implementation; all others see declarations only. */
#include <assert.h>
#define DSA_ASSERT(x) assert(x)
#define DSA_IMPLEMENTATION
#include "../dsa.h"
