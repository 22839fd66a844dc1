/* blis.h - the layer's dense projections through BLIS (Debian: libblis-dev), for `make BLIS=1`.

       dsa_config config = {0};
       config.gemm = dsa_blis_gemm;

   The config's GEMM hook is all that a BLAS needs: dsa.h itself neither includes nor links one. BLIS's own
   threads are set by the environment (BLIS_NUM_THREADS); the bits of a projection may depend on their number. */
#ifndef DSA_TOOLS_BLIS_H_INCLUDED
#define DSA_TOOLS_BLIS_H_INCLUDED

#include <stdint.h>
#include <blis.h>

/* A dsa_gemm: C[m, n] = A[m, k] . B[n, k]^T, row-major. BLIS takes a row and a column stride of each matrix, so
   that B is transposed by swapping its two. Its 0.9 prototypes lack const; it writes to C only. */
static void dsa_blis_gemm(void *user, int64_t m, int64_t n, int64_t k,
                          const float *a, int64_t lda, const float *b, int64_t ldb, float *c, int64_t ldc)
{
    float one = 1.0f, zero = 0.0f;
    (void)user;
    bli_sgemm(BLIS_NO_TRANSPOSE, BLIS_NO_TRANSPOSE, (dim_t)m, (dim_t)n, (dim_t)k,
              &one, (float *)(uintptr_t)a, (inc_t)lda, 1, (float *)(uintptr_t)b, 1, (inc_t)ldb,
              &zero, c, (inc_t)ldc, 1);
}

#endif /* DSA_TOOLS_BLIS_H_INCLUDED */
