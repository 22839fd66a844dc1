/* The second private copy, see static_main.c. */
#define DSA_STATIC
#define DSA_IMPLEMENTATION
#include "../../dsa.h"

extern int other_version(void);

int other_version(void)
{
    return dsa_version();
}
