/* A translation unit that only uses the library, to be linked with implementation.c; included twice on purpose.
   Compiled as C and as C++, also across: C calling a library built as C++ and the other way round. */
#include "../../dsa.h"
#include "../../dsa.h"

int main(void)
{
    dsa_ctx ctx;
    return dsa_version() == DSA_VERSION_MAJOR * 10000 + DSA_VERSION_MINOR * 100 + DSA_VERSION_PATCH
        && dsa_init(&ctx, NULL) == DSA_OK && ctx.config.n_heads == 128 ? 0 : 1;
}
