/* fuzz.h - what the fuzz targets share: a reader of input bytes, and a main for compilers without libFuzzer.

   With clang:    clang -g -O1 -fsanitize=fuzzer,address,undefined -DFUZZ_LIBFUZZER tests/fuzz_calls.c -lm -pthread
   With any cc:   cc -g -O1 tests/fuzz_calls.c -lm -pthread
                  ./a.out FILE...        runs each file once: a crash that libFuzzer saved, or the corpus
                  ./a.out -n 100000 FILE...   then so many pseudo-random inputs, half of them changed copies of the files */
#ifndef FUZZ_H_INCLUDED
#define FUZZ_H_INCLUDED

#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

/* A broken promise is a crash: that is the language of fuzzers. */
#define REQUIRE(condition) \
    do { if (!(condition)) { fprintf(stderr, "%s:%d: not true: %s\n", __FILE__, __LINE__, #condition); abort(); } } while (0)

/* The input as a stream of decisions; zeros when it is used up, so that every input is a complete one. */
typedef struct fuzz_input { const uint8_t *p; size_t n; } fuzz_input;

static inline uint32_t fuzz_byte(fuzz_input *in)
{
    if (in->n == 0) return 0;
    in->n--;
    return *in->p++;
}

/* In [0, n), n <= 256. */
static inline int32_t fuzz_below(fuzz_input *in, int32_t n)
{
    return (int32_t)(fuzz_byte(in) % (uint32_t)n);
}

/* xorshift32: bulk data from a seed that the input holds. */
static inline uint32_t fuzz_random(uint32_t *state)
{
    *state ^= *state << 13;
    *state ^= *state >> 17;
    *state ^= *state << 5;
    return *state;
}

#ifndef FUZZ_LIBFUZZER
#define FUZZ_LONGEST 4096

static inline size_t fuzz_read(const char *path, uint8_t *bytes)
{
    FILE *file = fopen(path, "rb");
    size_t n;
    if (!file) {
        fprintf(stderr, "%s: cannot be opened\n", path);
        exit(EXIT_FAILURE);
    }
    n = fread(bytes, 1, FUZZ_LONGEST, file);
    fclose(file);
    return n;
}

/* The bytes are handed over in an allocation of their exact size, where a sanitizer sees the first one too far. */
static inline void fuzz_run(const uint8_t *bytes, size_t n)
{
    uint8_t *copy = (uint8_t *)malloc(n ? n : 1);
    REQUIRE(copy != NULL);
    memcpy(copy, bytes, n);
    LLVMFuzzerTestOneInput(copy, n);
    free(copy);
}

int main(int argc, char **argv)
{
    static uint8_t bytes[FUZZ_LONGEST];
    uint32_t state = 0x9E3779B9u;
    long runs = 0, i;
    int first = 1, file;
    if (argc > 2 && strcmp(argv[1], "-n") == 0) {
        runs = strtol(argv[2], NULL, 10);
        first = 3;
    }
    for (file = first; file < argc; file++) fuzz_run(bytes, fuzz_read(argv[file], bytes));
    for (i = 0; i < runs; i++) {
        size_t n = 0, changes;
        if (first < argc && fuzz_random(&state) % 2) {
            n = fuzz_read(argv[first + (int)(fuzz_random(&state) % (uint32_t)(argc - first))], bytes);
            for (changes = fuzz_random(&state) % 8; n > 0 && changes > 0; changes--) {
                bytes[fuzz_random(&state) % n] = (uint8_t)fuzz_random(&state);
            }
            if (n > 0 && fuzz_random(&state) % 8 == 0) n = fuzz_random(&state) % n;
        } else {
            n = fuzz_random(&state) % 512;
            for (changes = 0; changes < n; changes++) bytes[changes] = (uint8_t)(fuzz_random(&state) >> 8);
        }
        fuzz_run(bytes, n);
    }
    printf("%d files, %ld random inputs: no fault\n", argc - first, runs);
    return EXIT_SUCCESS;
}
#endif

#endif /* FUZZ_H_INCLUDED */
