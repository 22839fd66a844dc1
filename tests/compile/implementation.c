/* The one translation unit that holds the library. The declarations come first, as they would through another header
   of the user's: the implementation must appear all the same. Compiled as C and as C++. */
#include "../../dsa.h"
#define DSA_IMPLEMENTATION
#include "../../dsa.h"
