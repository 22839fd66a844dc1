/* harness.h - the test runner of dsa.h: about 150 lines in the style and with the macro names of greatest.h
   (https://github.com/silentbicycle/greatest), so that greatest.h may be put in its place. Written for this
   repository; nothing is copied from there.

       #include "harness.h"

       TEST two_and_two(void) { ASSERT_EQ_FMT(4, 2 + 2, "%d"); PASS(); }
       SUITE(sums) { RUN_TEST(two_and_two); }

       GREATEST_MAIN_DEFS();                        in exactly one file
       int main(int argc, char **argv) {
           GREATEST_MAIN_BEGIN();
           RUN_SUITE(sums);
           GREATEST_MAIN_END();
       }

   A test ends with PASS, SKIP or FAIL; a failed ASSERT leaves it at once. A helper that asserts returns
   `enum greatest_test_res` like a test and is called through CHECK_CALL. Options: run with -h. */
#ifndef HARNESS_H_INCLUDED
#define HARNESS_H_INCLUDED

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum greatest_test_res { GREATEST_TEST_RES_PASS = 0, GREATEST_TEST_RES_FAIL = -1, GREATEST_TEST_RES_SKIP = 1 };

struct greatest_run {
    int passed, failed, skipped;
    int verbose, list_only, stop_at_first;
    const char *suite_filter, *test_filter;
    const char *suite;                 /* the running one */
    char suffix[80];                   /* appended to the next test's name, see greatest_set_test_suffix */
    const char *file, *message;        /* where and why the last test ended */
    int line;
};

/* Defined once, by GREATEST_MAIN_DEFS. */
extern struct greatest_run greatest_info;
int  greatest_wanted(const char *name);
void greatest_report(const char *name, enum greatest_test_res result);
void greatest_options(int argc, char **argv);
void greatest_run_suite(void (*suite)(void), const char *name);
enum greatest_test_res greatest_leave(enum greatest_test_res result, const char *file, int line, const char *message);
enum greatest_test_res greatest_leave_range(const char *file, int line, const char *message, double want, double got, double tolerance);
/* Names the case of a parametrised test: the next RUN_TEST or RUN_TESTp is reported and filtered as NAME_SUFFIX. */
void greatest_set_test_suffix(const char *suffix);

#define TEST static enum greatest_test_res
#define SUITE(NAME) void NAME(void); void NAME(void)
#define SUITE_EXTERN(NAME) void NAME(void)
#define RUN_SUITE(NAME) greatest_run_suite(NAME, #NAME)

#define RUN_TEST(NAME) \
    do { if (greatest_wanted(#NAME)) greatest_report(#NAME, NAME()); greatest_info.suffix[0] = 0; } while (0)
#define RUN_TESTp(NAME, ...) \
    do { if (greatest_wanted(#NAME)) greatest_report(#NAME, NAME(__VA_ARGS__)); greatest_info.suffix[0] = 0; } while (0)
#define RUN_TEST1(NAME, ARGUMENT) RUN_TESTp(NAME, ARGUMENT)

#define PASSm(MESSAGE) return greatest_leave(GREATEST_TEST_RES_PASS, __FILE__, __LINE__, MESSAGE)
#define SKIPm(MESSAGE) return greatest_leave(GREATEST_TEST_RES_SKIP, __FILE__, __LINE__, MESSAGE)
#define FAILm(MESSAGE) return greatest_leave(GREATEST_TEST_RES_FAIL, __FILE__, __LINE__, MESSAGE)
#define PASS() PASSm(NULL)
#define SKIP() SKIPm(NULL)
#define FAIL() FAILm(NULL)

#define CHECK_CALL(CALL) \
    do { enum greatest_test_res greatest_r = (CALL); if (greatest_r != GREATEST_TEST_RES_PASS) return greatest_r; } while (0)

#define ASSERTm(MESSAGE, CONDITION)            do { if (!(CONDITION)) FAILm(MESSAGE); } while (0)
#define ASSERT_FALSEm(MESSAGE, CONDITION)      do { if (CONDITION) FAILm(MESSAGE); } while (0)
#define ASSERT_EQm(MESSAGE, WANT, GOT)         do { if (!((WANT) == (GOT))) FAILm(MESSAGE); } while (0)
#define ASSERT_NEQm(MESSAGE, WANT, GOT)        do { if ((WANT) == (GOT)) FAILm(MESSAGE); } while (0)
#define ASSERT_GTm(MESSAGE, A, B)              do { if (!((A) > (B))) FAILm(MESSAGE); } while (0)
#define ASSERT_GTEm(MESSAGE, A, B)             do { if (!((A) >= (B))) FAILm(MESSAGE); } while (0)
#define ASSERT_LTm(MESSAGE, A, B)              do { if (!((A) < (B))) FAILm(MESSAGE); } while (0)
#define ASSERT_LTEm(MESSAGE, A, B)             do { if (!((A) <= (B))) FAILm(MESSAGE); } while (0)
#define ASSERT_STR_EQm(MESSAGE, WANT, GOT)     do { if (strcmp((WANT), (GOT)) != 0) FAILm(MESSAGE); } while (0)
#define ASSERT_STRN_EQm(MESSAGE, WANT, GOT, N) do { if (strncmp((WANT), (GOT), (N)) != 0) FAILm(MESSAGE); } while (0)
#define ASSERT_MEM_EQm(MESSAGE, WANT, GOT, N)  do { if (memcmp((WANT), (GOT), (N)) != 0) FAILm(MESSAGE); } while (0)
/* Both values in a printf format, for a failure one can read. */
#define ASSERT_EQ_FMTm(MESSAGE, WANT, GOT, FORMAT) \
    do { if (!((WANT) == (GOT))) { \
        printf("\n  expected " FORMAT ", got " FORMAT, (WANT), (GOT)); FAILm(MESSAGE); } } while (0)
/* |WANT - GOT| <= TOLERANCE, or equal infinities; false for NaN. */
#define ASSERT_IN_RANGEm(MESSAGE, WANT, GOT, TOLERANCE) \
    do { double greatest_w = (double)(WANT), greatest_g = (double)(GOT), greatest_t = (double)(TOLERANCE); \
         if (!(greatest_g == greatest_w || (greatest_g - greatest_w <= greatest_t && greatest_w - greatest_g <= greatest_t))) \
             return greatest_leave_range(__FILE__, __LINE__, MESSAGE, greatest_w, greatest_g, greatest_t); } while (0)

#define ASSERT(CONDITION)                ASSERTm(#CONDITION, CONDITION)
#define ASSERT_FALSE(CONDITION)          ASSERT_FALSEm("not: " #CONDITION, CONDITION)
#define ASSERT_EQ(WANT, GOT)             ASSERT_EQm(#WANT " == " #GOT, WANT, GOT)
#define ASSERT_NEQ(WANT, GOT)            ASSERT_NEQm(#WANT " != " #GOT, WANT, GOT)
#define ASSERT_GT(A, B)                  ASSERT_GTm(#A " > " #B, A, B)
#define ASSERT_GTE(A, B)                 ASSERT_GTEm(#A " >= " #B, A, B)
#define ASSERT_LT(A, B)                  ASSERT_LTm(#A " < " #B, A, B)
#define ASSERT_LTE(A, B)                 ASSERT_LTEm(#A " <= " #B, A, B)
#define ASSERT_STR_EQ(WANT, GOT)         ASSERT_STR_EQm(#WANT " equals " #GOT, WANT, GOT)
#define ASSERT_STRN_EQ(WANT, GOT, N)     ASSERT_STRN_EQm(#WANT " equals " #GOT, WANT, GOT, N)
#define ASSERT_MEM_EQ(WANT, GOT, N)      ASSERT_MEM_EQm(#WANT " equals " #GOT " byte for byte", WANT, GOT, N)
#define ASSERT_EQ_FMT(WANT, GOT, FORMAT) ASSERT_EQ_FMTm(#WANT " == " #GOT, WANT, GOT, FORMAT)
#define ASSERT_IN_RANGE(WANT, GOT, TOLERANCE) ASSERT_IN_RANGEm(#WANT " near " #GOT, WANT, GOT, TOLERANCE)

#define GREATEST_MAIN_BEGIN() greatest_options(argc, argv)
#define GREATEST_MAIN_END() \
    do { if (greatest_info.list_only) return EXIT_SUCCESS; \
         printf("\n%d passed, %d failed", greatest_info.passed, greatest_info.failed); \
         if (greatest_info.skipped > 0) printf(", %d skipped", greatest_info.skipped); \
         printf("\n"); \
         return greatest_info.failed > 0 ? EXIT_FAILURE : EXIT_SUCCESS; } while (0)

#define GREATEST_MAIN_DEFS() \
static void greatest_full_name(char *full, size_t size, const char *name) { \
    snprintf(full, size, "%s%s%s", name, greatest_info.suffix[0] ? "_" : "", greatest_info.suffix); \
} \
int greatest_wanted(const char *name) { \
    char full[256]; \
    greatest_full_name(full, sizeof full, name); \
    if (greatest_info.stop_at_first && greatest_info.failed > 0) return 0; \
    if (greatest_info.test_filter && !strstr(full, greatest_info.test_filter)) return 0; \
    if (greatest_info.list_only) { printf("  %s\n", full); return 0; } \
    return 1; \
} \
void greatest_report(const char *name, enum greatest_test_res result) { \
    char full[256]; \
    const char *message = greatest_info.message ? greatest_info.message : ""; \
    greatest_full_name(full, sizeof full, name); \
    if (result == GREATEST_TEST_RES_PASS) { \
        greatest_info.passed++; \
        if (greatest_info.verbose) printf("PASS %s %s\n", full, message); else printf("."); \
    } else if (result == GREATEST_TEST_RES_SKIP) { \
        greatest_info.skipped++; \
        if (greatest_info.verbose) printf("SKIP %s %s\n", full, message); else printf("s"); \
    } else { \
        greatest_info.failed++; \
        printf("\nFAIL %s: %s (%s:%d)\n", full, message, greatest_info.file, greatest_info.line); \
    } \
    fflush(stdout); \
} \
enum greatest_test_res greatest_leave(enum greatest_test_res result, const char *file, int line, const char *message) { \
    greatest_info.file = file; \
    greatest_info.line = line; \
    greatest_info.message = message; \
    return result; \
} \
enum greatest_test_res greatest_leave_range(const char *file, int line, const char *message, double want, double got, double tolerance) { \
    printf("\n  expected %.9g +- %.3g, got %.9g", want, tolerance, got); \
    return greatest_leave(GREATEST_TEST_RES_FAIL, file, line, message); \
} \
void greatest_set_test_suffix(const char *suffix) { \
    snprintf(greatest_info.suffix, sizeof greatest_info.suffix, "%s", suffix); \
} \
void greatest_run_suite(void (*suite)(void), const char *name) { \
    int before = greatest_info.passed + greatest_info.failed + greatest_info.skipped; \
    if (greatest_info.suite_filter && !strstr(name, greatest_info.suite_filter)) return; \
    greatest_info.suite = name; \
    printf("* %s%s", name, greatest_info.verbose || greatest_info.list_only ? "\n" : " "); \
    suite(); \
    if (!greatest_info.list_only) \
        printf(" %d tests\n", greatest_info.passed + greatest_info.failed + greatest_info.skipped - before); \
} \
static void greatest_usage(const char *program, FILE *to) { \
    fprintf(to, "usage: %s [-s SUITE] [-t TEST] [-f] [-l] [-v]\n" \
        "  -s SUITE  only suites whose name contains SUITE\n" \
        "  -t TEST   only tests whose name contains TEST\n" \
        "  -f        stop at the first failure\n" \
        "  -l        list the tests and run none\n" \
        "  -v        one line per test\n", program); \
} \
void greatest_options(int argc, char **argv) { \
    int i; \
    for (i = 1; i < argc; i++) { \
        if (!strcmp(argv[i], "-s") && i + 1 < argc) greatest_info.suite_filter = argv[++i]; \
        else if (!strcmp(argv[i], "-t") && i + 1 < argc) greatest_info.test_filter = argv[++i]; \
        else if (!strcmp(argv[i], "-f")) greatest_info.stop_at_first = 1; \
        else if (!strcmp(argv[i], "-l")) greatest_info.list_only = 1; \
        else if (!strcmp(argv[i], "-v")) greatest_info.verbose = 1; \
        else if (!strcmp(argv[i], "-h")) { greatest_usage(argv[0], stdout); exit(EXIT_SUCCESS); } \
        else { fprintf(stderr, "%s: unknown option %s\n", argv[0], argv[i]); greatest_usage(argv[0], stderr); exit(EXIT_FAILURE); } \
    } \
} \
struct greatest_run greatest_info /* the caller's semicolon ends it */

#endif /* HARNESS_H_INCLUDED */
