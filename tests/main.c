/* Runs every suite; -h prints the options. Suites that look at results of the vector kernels run once per ISA. */
#include "brute.h"
#include "harness.h"

SUITE_EXTERN(numeric_suite);
SUITE_EXTERN(select_suite);
SUITE_EXTERN(score_suite);
SUITE_EXTERN(cache_suite);
SUITE_EXTERN(attend_suite);
SUITE_EXTERN(step_suite);
SUITE_EXTERN(matmul_suite);
SUITE_EXTERN(layer_suite);
SUITE_EXTERN(backward_suite);
SUITE_EXTERN(threads_suite);
SUITE_EXTERN(random_suite);
SUITE_EXTERN(shards_suite);
SUITE_EXTERN(pages_suite);
SUITE_EXTERN(errors_suite);
SUITE_EXTERN(device_suite);
SUITE_EXTERN(golden_suite);
SUITE_EXTERN(models_suite);
SUITE_EXTERN(faults_suite);

GREATEST_MAIN_DEFS();

dsa_isa test_isa = DSA_ISA_SCALAR;

static void run_per_isa(void (*suite)(void), const char *name)
{
    dsa_isa isas[BRUTE_ISAS];
    int n = brute_isas(isas);
    for (int i = 0; i < n; i++) {
        char full[64];
        snprintf(full, sizeof full, "%s (%s)", name, dsa_isa_name(isas[i]));
        test_isa = isas[i];
        greatest_run_suite(suite, full);
    }
    test_isa = DSA_ISA_SCALAR;
}
#define RUN_SUITE_PER_ISA(NAME) run_per_isa(NAME, #NAME)

int main(int argc, char **argv)
{
    GREATEST_MAIN_BEGIN();
    RUN_SUITE(numeric_suite);
    RUN_SUITE(select_suite);
    RUN_SUITE(score_suite);
    RUN_SUITE(cache_suite);
    RUN_SUITE_PER_ISA(attend_suite);
    RUN_SUITE_PER_ISA(step_suite);
    RUN_SUITE_PER_ISA(matmul_suite);
    RUN_SUITE_PER_ISA(layer_suite);
    RUN_SUITE_PER_ISA(backward_suite);
    RUN_SUITE_PER_ISA(threads_suite);
    RUN_SUITE_PER_ISA(random_suite);
    RUN_SUITE_PER_ISA(shards_suite);
    RUN_SUITE(pages_suite);
    RUN_SUITE(errors_suite);
    RUN_SUITE(device_suite);
    RUN_SUITE_PER_ISA(golden_suite);
    RUN_SUITE_PER_ISA(models_suite);
    RUN_SUITE_PER_ISA(faults_suite);
    GREATEST_MAIN_END();
}
