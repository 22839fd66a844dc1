/* Runs every suite; -h prints the options. */
#include "harness.h"

SUITE_EXTERN(numeric_suite);
SUITE_EXTERN(select_suite);
SUITE_EXTERN(score_suite);
SUITE_EXTERN(cache_suite);
SUITE_EXTERN(attend_suite);
SUITE_EXTERN(step_suite);
SUITE_EXTERN(layer_suite);
SUITE_EXTERN(threads_suite);
SUITE_EXTERN(errors_suite);
SUITE_EXTERN(golden_suite);

GREATEST_MAIN_DEFS();

int main(int argc, char **argv)
{
    GREATEST_MAIN_BEGIN();
    RUN_SUITE(numeric_suite);
    RUN_SUITE(select_suite);
    RUN_SUITE(score_suite);
    RUN_SUITE(cache_suite);
    RUN_SUITE(attend_suite);
    RUN_SUITE(step_suite);
    RUN_SUITE(layer_suite);
    RUN_SUITE(threads_suite);
    RUN_SUITE(errors_suite);
    RUN_SUITE(golden_suite);
    GREATEST_MAIN_END();
}
