/* demo - watch a trained model find facts in a long text while it attends to 64 tokens out of thousands

   Build and run: make demo        (by hand: cc -O3 -o build/demo tools/demo.c -lm -pthread, then build/demo from the repository's root) */
#define _POSIX_C_SOURCE 200809L
#include <unistd.h>
#define DSA_IMPLEMENTATION
#include "needle.h"

#define MODEL "examples/tiny-dsa"
#define TEXT "examples/kjv-heldout.txt"

enum { TOP_K = 64, GENERATED = 200, CALIBRATION = 512, N_CONTEXTS = 3, N_MODES = 3 };

static const char help[] =
    "usage: demo [--threads N] [--isa NAME]        (from the root of the repository)\n"
    "\n"
    "Runs " MODEL ": prints a short generated text, then hides facts in texts of 2048, 4096 and 8192 bytes from\n"
    TEXT " and asks for them, with dense attention, with DSA over 64 tokens, and with the newest 64 tokens.\n"
    "\n"
    "  --threads N   default: the number of processors, at most 8\n"
    "  --isa NAME    auto (default), scalar, avx2, avx512, neon\n"
    DEVICE_HELP
    "\n"
    "Exit status: 0 success, 2 bad usage or bad input.\n";

static const int32_t contexts[N_CONTEXTS] = { 2048, 4096, 8192 };
static const struct { const char *name; dsa_layer_mode mode; } modes[N_MODES] = {
    { "dense", DSA_LAYER_DENSE }, { "DSA 64", DSA_LAYER_SPARSE }, { "window 64", DSA_LAYER_WINDOW } };

typedef struct demo {
    engine e;
    needle_text text;
    float *logits;               /* [NEEDLE_CHUNK, 256] */
    needle_document documents[N_CONTEXTS];
    needle_result results[N_CONTEXTS][N_MODES];
    const char *running;         /* for the progress line */
    int32_t context;
    double started, expected;
} demo;

static int engine_error(const demo *d) {
    fprintf(stderr, "demo: %s\n", d->e.error);
    return -1;
}

/* Seconds that the whole retrieval test will take: the first and the second 512 tokens of a document are timed in each mode.
   Reading n tokens takes a n + b n^2 seconds, b being the share of what grows with the context, so the two times give both. */
static int calibrate(demo *d, double *seconds) {
    const needle_document *doc = &d->documents[0];
    *seconds = 0;
    if (engine_forward(&d->e, doc->tokens, 64, d->logits, 64, NULL) != 0) return engine_error(d);   /* wakes pages, caches and clocks */
    for (int m = 0; m < N_MODES; m++) {
        double t[2] = { 0, 0 };
        if (engine_set_attention(&d->e, modes[m].mode, TOP_K) != 0 || engine_reset(&d->e) != 0) return engine_error(d);
        for (int32_t begin = 0; begin < 2 * CALIBRATION; begin += NEEDLE_CHUNK) {
            double start = needle_seconds();
            if (engine_forward(&d->e, doc->tokens + begin, NEEDLE_CHUNK, d->logits, NEEDLE_CHUNK, NULL) != 0) return engine_error(d);
            t[begin >= CALIBRATION] += needle_seconds() - start;
        }
        double n = CALIBRATION, growth = t[1] > t[0] ? (t[1] - t[0]) / 2 : 0;   /* b n^2 */
        for (int c = 0; c < N_CONTEXTS; c++) {
            double times = contexts[c] / n;
            *seconds += (t[0] - growth) * times + growth * times * times;
        }
    }
    return 0;
}

static int stream(demo *d) {
    const char *prompt = "And it came to pass, that ";
    int32_t tokens[64], n = (int32_t)strlen(prompt);
    for (int32_t i = 0; i < n; i++) tokens[i] = (unsigned char)prompt[i];
    if (engine_set_attention(&d->e, DSA_LAYER_SPARSE, TOP_K) != 0 || engine_reset(&d->e) != 0) return engine_error(d);
    printf("1. The model writes, one byte after the other, each attending to at most %d earlier ones:\n\n%s", TOP_K, prompt);
    for (int i = 0; i < GENERATED; i++) {
        if (engine_forward(&d->e, tokens, n, d->logits, 1, NULL) != 0) return engine_error(d);
        tokens[0] = engine_argmax(d->logits, 256);
        n = 1;
        putchar(tokens[0]);
        fflush(stdout);
    }
    printf("...\n\n");
    return 0;
}

/* One line that is rewritten on a terminal; elsewhere a line per document. */
static void print_progress(void *user, int32_t done, int32_t total, const needle_result *r) {
    const demo *d = (const demo *)user;
    int terminal = isatty(STDOUT_FILENO);
    if (!terminal && done < total) return;
    printf("%s   %4ld bytes, %-9s  read %4ld, %2lld of %2lld answers right  (%.0f s of about %.0f s)%s", terminal ? "\r" : "",
           (long)d->context, d->running, (long)done, (long long)r->right, (long long)r->asked, needle_seconds() - d->started, d->expected, terminal ? "  " : "\n");
    fflush(stdout);
}

static int retrieve(demo *d) {
    printf("2. Facts such as \"The number of Tirzah is 48213.\" are hidden in a text that the model has never seen, and each is asked for\n"
           "   twice. An answer counts if all five digits are right. The same documents are read with three kinds of attention:\n\n");
    d->started = needle_seconds();
    for (int c = 0; c < N_CONTEXTS; c++)
        for (int m = 0; m < N_MODES; m++) {
            d->running = modes[m].name;
            d->context = contexts[c];
            if (engine_set_attention(&d->e, modes[m].mode, TOP_K) != 0) return engine_error(d);
            if (needle_read(&d->e, &d->documents[c], d->logits, &d->results[c][m], print_progress, d) != 0) return engine_error(d);
        }
    if (isatty(STDOUT_FILENO)) printf("\r%79s\r", "");
    else printf("\n");
    printf("   context  attention   right/asked  bits/byte  ms/token  cache bytes touched per token\n");
    for (int c = 0; c < N_CONTEXTS; c++)
        for (int m = 0; m < N_MODES; m++) {
            const needle_result *r = &d->results[c][m];
            printf("   %7ld  %-10s  %5lld/%-5lld  %9.3f  %8.2f  %12lld\n", (long)contexts[c], modes[m].name, (long long)r->right, (long long)r->asked,
                   r->bits / (double)r->n_bytes, 1e3 * r->seconds / (double)r->n_tokens, (long long)r->bytes_per_token);
        }
    const needle_result *last = d->results[N_CONTEXTS - 1];
    printf("\nWhat you just saw: in a text of %ld bytes the model answered %lld of %lld questions with DSA, whose indexer picks %d tokens for each byte,\n"
           "against %lld with dense attention over everything and %lld with the newest %d tokens, and it touched %.1f times fewer bytes of cache than dense.\n",
           (long)contexts[N_CONTEXTS - 1], (long long)last[1].right, (long long)last[1].asked, TOP_K, (long long)last[0].right, (long long)last[2].right, TOP_K,
           (double)last[0].bytes_per_token / (double)last[1].bytes_per_token);
    return 0;
}

static int run(demo *d) {
    uint64_t seed = 1;
    double seconds;
    for (int c = 0; c < N_CONTEXTS; c++)
        if (needle_document_make(&d->documents[c], &d->text, contexts[c], &seed) != 0) {
            fprintf(stderr, "demo: out of memory\n");
            return -1;
        }
    printf("dsa.h %s: a model of 3.7 million parameters on %ld thread%s (%s). Measuring how quick this machine is ...\n", DSA_VERSION_STRING,
           (long)d->e.options.n_threads, d->e.options.n_threads == 1 ? "" : "s", dsa_isa_name(dsa_query_isa(&d->e.ctx)));
    fflush(stdout);
    if (calibrate(d, &seconds) != 0) return -1;
    d->expected = seconds;
    printf("The demo will take about %.0f seconds.\n\n", seconds + 1);
    return stream(d) == 0 ? retrieve(d) : -1;
}

static int usage_error(const char *what, const char *detail) {
    fprintf(stderr, "demo: %s%s (demo --help explains)\n", what, detail);
    return 2;
}

int main(int argc, char **argv) {
    static demo d;
    engine_model model;
    engine_options options;
    char error[512];
    long processors = sysconf(_SC_NPROCESSORS_ONLN);
    int64_t threads = processors < 1 ? 1 : processors > 8 ? 8 : processors;
    int status = 2;
    memset(&options, 0, sizeof options);
    for (int i = 1; i < argc; i += 2) {
        if (strcmp(argv[i], "--help") == 0) return fputs(help, stdout) == EOF || fflush(stdout) != 0 ? 2 : 0;
        if (i + 1 >= argc) return usage_error("unknown option, or its value is missing: ", argv[i]);
        if (strcmp(argv[i], "--threads") == 0) { if (engine_parse_int(argv[i + 1], 1, 256, &threads) != 0) return usage_error("--threads: out of range: ", argv[i + 1]); }
#ifdef DSA_CUDA
        else if (strcmp(argv[i], "--cuda") == 0) { if (device_open("demo", argv[i + 1], &options.cuda) != 0) return 2; }
#endif
        else if (strcmp(argv[i], "--isa") == 0) { if (engine_parse_isa(argv[i + 1], &options.isa) != 0) return usage_error("--isa: no such name: ", argv[i + 1]); }
        else return usage_error("unknown option: ", argv[i]);
    }
    options.gemm = ENGINE_GEMM;
    options.n_threads = (int32_t)threads;
    options.top_k = TOP_K;
    options.max_tokens = contexts[N_CONTEXTS - 1];
    if (needle_text_load(&d.text, TEXT, error, sizeof error) != 0) {
        fprintf(stderr, "demo: %s (run it from the root of the repository)\n", error);
        return 2;
    }
    d.logits = malloc((size_t)NEEDLE_CHUNK * 256 * sizeof *d.logits);
    if (d.logits == NULL) fprintf(stderr, "demo: out of memory\n");
    if (engine_load_dir(&model, MODEL, 0) != 0) fprintf(stderr, "demo: %s\n", model.error);
    else if (model.n_vocab != 256) fprintf(stderr, "demo: %s/config.json: 'vocab_size' must be 256\n", MODEL);
    else if (d.logits != NULL) {
        if (engine_open(&d.e, &model, &options) != 0) fprintf(stderr, "demo: %s\n", d.e.error);
        else {
            status = run(&d) == 0 ? 0 : 2;
            engine_close(&d.e);
        }
    }
    for (int c = 0; c < N_CONTEXTS; c++) needle_document_free(&d.documents[c]);
    free(d.logits);
    engine_unload(&model);
    device_close(options.cuda);
    needle_text_free(&d.text);
    if (fflush(stdout) != 0 || ferror(stdout)) status = 2;
    return status;
}
