/* Two private copies of the library in one program: this file has one, static_other.c the other. */
#define DSA_STATIC
#define DSA_IMPLEMENTATION
#include "../../dsa.h"

extern int other_version(void);

int main(void)
{
    dsa_ctx ctx;
    return dsa_version() == other_version() && dsa_init(&ctx, NULL) == DSA_OK ? 0 : 1;
}
