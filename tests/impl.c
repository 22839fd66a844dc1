/* The one translation unit of the test program that holds the implementation; all others see declarations only. */
#define DSA_IMPLEMENTATION
#include "../dsa.h"
