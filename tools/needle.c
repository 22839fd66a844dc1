/* needle - can the model find facts in a long text? The retrieval test of tiny-dsa as a command

   Build: cc -O3 -o build/needle tools/needle.c -lm -pthread        (or: make tools) */
#define _POSIX_C_SOURCE 200809L
#define DSA_IMPLEMENTATION
#include "needle.h"

static const char help[] =
    "usage: needle MODEL_DIR --text FILE --context N [options]\n"
    "\n"
    "Hides facts in running text (\"The number of Tirzah is 48213.\"), asks for each twice (\"What is the number of\n"
    "Tirzah? 48213.\"), and lets a byte-level model read the document. An answer is right when each of its five digits\n"
    "was the likeliest next byte. New documents are made until enough questions were asked.\n"
    "\n"
    "  --text FILE                    running text; the names come from it too (examples/kjv-heldout.txt)\n"
    "  --context N                    bytes in a document, at least 256\n"
    "  --queries N                    ask at least N questions (default 100)\n"
    "  --attention dsa|dense|window   what each token attends to: the K that the indexer selects (default), everything,\n"
    "                                 or the newest K\n"
    "  --topk K                       K (default: the model's)\n"
    "  --seed S                       of the documents (default 0)\n"
    "  --threads N                    default 1\n"
    "  --isa NAME                     auto (default), scalar, avx2, avx512, neon\n"
    DEVICE_HELP
    "  --json                         one JSON object instead of text; accuracy is right / asked\n"
    "\n"
    "Exit status: 0 success, 2 bad usage or bad input. Progress goes to standard error.\n";

static int usage_error(const char *what, const char *detail) {
    fprintf(stderr, "needle: %s%s (needle --help explains)\n", what, detail);
    return 2;
}

static void print_progress(void *user, int32_t done, int32_t total, const needle_result *r) {
    if (done == total) fprintf(stderr, "needle: %s: %lld of %lld right so far\n", (const char *)user, (long long)r->right, (long long)r->asked);
}

static int run(engine *e, const needle_text *text, int32_t context, int64_t queries, uint64_t seed, const char *attention, int json) {
    needle_result r;
    uint64_t state = seed;
    float *logits = malloc((size_t)NEEDLE_CHUNK * 256 * sizeof *logits);
    memset(&r, 0, sizeof r);
    if (logits == NULL) {
        fprintf(stderr, "needle: out of memory\n");
        return 2;
    }
    while (r.asked < queries) {
        needle_document d;
        char name[32];
        snprintf(name, sizeof name, "%s", attention);
        int failed = needle_document_make(&d, text, context, &state);
        if (failed != 0) fprintf(stderr, "needle: out of memory\n");
        else if ((failed = needle_read(e, &d, logits, &r, print_progress, name)) != 0) fprintf(stderr, "needle: %s\n", e->error);
        needle_document_free(&d);
        if (failed != 0) {
            free(logits);
            return 2;
        }
    }
    free(logits);
    double accuracy = (double)r.right / (double)r.asked, bits = r.bits / (double)r.n_bytes, ms = 1e3 * r.seconds / (double)r.n_tokens;
    if (json)
        printf("{\"context\": %ld, \"attention\": \"%s\", \"topk\": %ld, \"seed\": %llu, \"threads\": %ld, \"isa\": \"%s\", \"asked\": %lld, \"right\": %lld, "
               "\"accuracy\": %.6f, \"bits_per_byte\": %.6f, \"ms_per_token\": %.6f, \"bytes_per_token\": %lld}\n",
               (long)context, attention, (long)e->options.top_k, (unsigned long long)seed, (long)e->options.n_threads, dsa_isa_name(dsa_query_isa(&e->ctx)),
               (long long)r.asked, (long long)r.right, accuracy, bits, ms, (long long)r.bytes_per_token);
    else
        printf("context %ld, attention %s, top-k %ld, %s, threads %ld\n"
               "right            %lld of %lld (%.1f %%)\n"
               "bits per byte    %.3f\n"
               "ms per token     %.3f\n"
               "bytes per token  %lld (cache bytes read for the last token, all layers)\n",
               (long)context, attention, (long)e->options.top_k, dsa_isa_name(dsa_query_isa(&e->ctx)), (long)e->options.n_threads,
               (long long)r.right, (long long)r.asked, 100 * accuracy, bits, ms, (long long)r.bytes_per_token);
    if (fflush(stdout) == 0 && !ferror(stdout)) return 0;
    fprintf(stderr, "needle: cannot write to standard output\n");
    return 2;
}

int main(int argc, char **argv) {
    const char *dir = NULL, *text_path = NULL, *attention = "dsa";
    int64_t context = 0, queries = 100, top_k = 0, threads = 1, seed = 0;
    int json = 0;
    char error[512];
    engine_options options;
    memset(&options, 0, sizeof options);
    options.gemm = ENGINE_GEMM;
    for (int i = 1; i < argc; i++) {
        const char *name = argv[i], *value = i + 1 < argc ? argv[i + 1] : NULL;
        int bad = 0;
        if (strcmp(name, "--help") == 0) return fputs(help, stdout) == EOF || fflush(stdout) != 0 ? 2 : 0;
        if (strcmp(name, "--json") == 0) { json = 1; continue; }
        if (name[0] != '-') {
            if (dir != NULL) return usage_error("more than one model folder: ", name);
            dir = name;
            continue;
        }
        if (value == NULL) return usage_error("unknown option, or its value is missing: ", name);
        if (strcmp(name, "--text") == 0) text_path = value;
        else if (strcmp(name, "--context") == 0) bad = engine_parse_int(value, NEEDLE_MIN_CONTEXT, 1 << 24, &context);
        else if (strcmp(name, "--queries") == 0) bad = engine_parse_int(value, 1, 1 << 30, &queries);
        else if (strcmp(name, "--topk") == 0) bad = engine_parse_int(value, 1, 1 << 24, &top_k);
        else if (strcmp(name, "--threads") == 0) bad = engine_parse_int(value, 1, 256, &threads);
        else if (strcmp(name, "--seed") == 0) bad = engine_parse_int(value, 0, INT64_MAX, &seed);
        else if (strcmp(name, "--isa") == 0) bad = engine_parse_isa(value, &options.isa);
#ifdef DSA_CUDA
        else if (strcmp(name, "--cuda") == 0) { if (device_open("needle", value, &options.cuda) != 0) return 2; }
#endif
        else if (strcmp(name, "--attention") == 0) {
            bad = engine_parse_mode(value, &options.mode);
            attention = value;
        } else return usage_error("unknown option: ", name);
        if (bad != 0) {
            fprintf(stderr, "needle: %s: '%s' is no valid value (needle --help explains)\n", name, value);
            return 2;
        }
        i++;
    }
    if (dir == NULL) return usage_error("which model? MODEL_DIR is missing", "");
    if (text_path == NULL) return usage_error("--text is missing", "");
    if (context == 0) return usage_error("--context is missing", "");

    needle_text text;
    engine_model model;
    engine e;
    int status = 2;
    if (needle_text_load(&text, text_path, error, sizeof error) != 0) {
        fprintf(stderr, "needle: %s\n", error);
        return 2;
    }
    options.top_k = (int32_t)top_k;
    options.n_threads = (int32_t)threads;
    options.max_tokens = context;
    if (engine_load_dir(&model, dir, 0) != 0) fprintf(stderr, "needle: %s\n", model.error);
    else if (model.n_vocab != 256) fprintf(stderr, "needle: %s/config.json: 'vocab_size' is %ld; this tool needs a byte-level model (256)\n", dir, (long)model.n_vocab);
    else if (context > model.max_positions) fprintf(stderr, "needle: --context is more than the model's %lld positions\n", (long long)model.max_positions);
    else if (engine_open(&e, &model, &options) != 0) fprintf(stderr, "needle: %s\n", e.error);
    else {
        status = run(&e, &text, (int32_t)context, queries, (uint64_t)seed, attention, json);
        engine_close(&e);
    }
    engine_unload(&model);
    device_close(options.cuda);
    needle_text_free(&text);
    return status;
}
