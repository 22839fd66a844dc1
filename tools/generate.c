/* generate - continues a text with a byte-level model

   Build: cc -O3 -o build/generate tools/generate.c -lm -pthread        (or: make tools) */
#define _POSIX_C_SOURCE 200809L
#include <unistd.h>
#define DSA_IMPLEMENTATION
#include "engine.h"

static const char help[] =
    "usage: generate MODEL_DIR --prompt TEXT --tokens N [options]\n"
    "\n"
    "Prints TEXT and the N bytes with which the model continues it. MODEL_DIR holds config.json and model.safetensors\n"
    "of a byte-level model (vocabulary of 256), for example examples/tiny-dsa.\n"
    "\n"
    "  --attention dsa|dense|window   what each token attends to: the K that the indexer selects (default), everything,\n"
    "                                 or the newest K\n"
    "  --topk K                       K (default: the model's)\n"
    "  --temperature T                0 takes the likeliest byte (default); above 0 bytes are drawn at that temperature\n"
    "  --seed S                       of the draw (default 0)\n"
    "  --dump-logits FILE             writes one row of f32 logits for each position fed, the prompt's first\n"
    "  --threads N                    default 1\n"
    "  --isa NAME                     auto (default), scalar, avx2, avx512, neon\n"
    DEVICE_HELP
    "\n"
    "Exit status: 0 success, 2 bad usage or bad input.\n";

static int usage_error(const char *what, const char *detail) {
    fprintf(stderr, "generate: %s%s (generate --help explains)\n", what, detail);
    return 2;
}

static int32_t pick(const float *logits, int32_t n, double temperature, uint64_t *seed) {
    int32_t best = engine_argmax(logits, n);
    double total = 0, u = (double)(engine_random(seed) >> 11) / 9007199254740992.0;
    if (temperature <= 0) return best;
    for (int32_t i = 0; i < n; i++) total += exp((double)(logits[i] - logits[best]) / temperature);
    u *= total;
    for (int32_t i = 0; i < n; i++) {
        u -= exp((double)(logits[i] - logits[best]) / temperature);
        if (u < 0) return i;
    }
    return best;
}

/* The prompt in one piece, then byte by byte. */
static int run(engine *e, const char *prompt, int32_t n_prompt, int64_t n_tokens, double temperature, uint64_t seed, FILE *dump) {
    int32_t n_vocab = e->model->n_vocab, n_rows = dump != NULL ? n_prompt : 1, n = n_prompt;
    int32_t *tokens = malloc((size_t)n_prompt * sizeof *tokens);
    float *logits = malloc((size_t)n_rows * (size_t)n_vocab * sizeof *logits);
    int status = 2;
    if (tokens == NULL || logits == NULL) {
        fprintf(stderr, "generate: out of memory\n");
        goto done;
    }
    for (int32_t i = 0; i < n_prompt; i++) tokens[i] = (unsigned char)prompt[i];
    fwrite(prompt, 1, (size_t)n_prompt, stdout);
    for (int64_t made = 0;; made++) {
        if (made > 0 && made == n_tokens) break;          /* the last byte is printed, not fed */
        if (engine_forward(e, tokens, n, logits, n_rows, NULL) != 0) {
            fprintf(stderr, "generate: %s\n", e->error);
            goto done;
        }
        if (dump != NULL && fwrite(logits, sizeof *logits, (size_t)n_rows * (size_t)n_vocab, dump) != (size_t)n_rows * (size_t)n_vocab) {
            fprintf(stderr, "generate: --dump-logits: cannot write\n");
            goto done;
        }
        if (n_tokens == 0) break;
        tokens[0] = pick(logits + (int64_t)(n_rows - 1) * n_vocab, n_vocab, temperature, &seed);
        n = n_rows = 1;
        putchar(tokens[0]);
        fflush(stdout);
    }
    if (isatty(STDOUT_FILENO)) putchar('\n');             /* a file or pipe gets the bytes and nothing else */
    status = fflush(stdout) == 0 && !ferror(stdout) ? 0 : 2;
    if (status != 0) fprintf(stderr, "generate: cannot write to standard output\n");
done:
    free(tokens);
    free(logits);
    return status;
}

int main(int argc, char **argv) {
    const char *dir = NULL, *prompt = NULL, *dump_path = NULL;
    int64_t n_tokens = -1, top_k = 0, threads = 1, seed = 0;
    double temperature = 0;
    engine_options options;
    memset(&options, 0, sizeof options);
    options.gemm = ENGINE_GEMM;
    for (int i = 1; i < argc; i++) {
        const char *name = argv[i], *value = i + 1 < argc ? argv[i + 1] : NULL;
        int bad = 0;
        if (strcmp(name, "--help") == 0) return fputs(help, stdout) == EOF || fflush(stdout) != 0 ? 2 : 0;
        if (name[0] != '-') {
            if (dir != NULL) return usage_error("more than one model folder: ", name);
            dir = name;
            continue;
        }
        if (value == NULL) return usage_error("unknown option, or its value is missing: ", name);
        if (strcmp(name, "--prompt") == 0) prompt = value;
        else if (strcmp(name, "--dump-logits") == 0) dump_path = value;
        else if (strcmp(name, "--tokens") == 0) bad = engine_parse_int(value, 0, INT32_MAX, &n_tokens);
        else if (strcmp(name, "--topk") == 0) bad = engine_parse_int(value, 1, 1 << 24, &top_k);
        else if (strcmp(name, "--threads") == 0) bad = engine_parse_int(value, 1, 256, &threads);
        else if (strcmp(name, "--seed") == 0) bad = engine_parse_int(value, 0, INT64_MAX, &seed);
        else if (strcmp(name, "--attention") == 0) bad = engine_parse_mode(value, &options.mode);
        else if (strcmp(name, "--isa") == 0) bad = engine_parse_isa(value, &options.isa);
#ifdef DSA_CUDA
        else if (strcmp(name, "--cuda") == 0) { if (device_open("generate", value, &options.cuda) != 0) return 2; }
#endif
        else if (strcmp(name, "--temperature") == 0) {
            char *end;
            temperature = strtod(value, &end);
            bad = end == value || *end != '\0' || !(temperature >= 0 && temperature <= 1000);
        } else return usage_error("unknown option: ", name);
        if (bad != 0) {
            fprintf(stderr, "generate: %s: '%s' is no valid value (generate --help explains)\n", name, value);
            return 2;
        }
        i++;
    }
    if (dir == NULL) return usage_error("which model? MODEL_DIR is missing", "");
    if (prompt == NULL || prompt[0] == '\0') return usage_error("--prompt is missing or empty", "");
    if (n_tokens < 0) return usage_error("--tokens is missing", "");

    engine_model model;
    engine e;
    FILE *dump = NULL;
    int status = 2;
    if (engine_load_dir(&model, dir, 0) != 0) {
        fprintf(stderr, "generate: %s\n", model.error);
        engine_unload(&model);
        return 2;
    }
    size_t n_prompt = strlen(prompt);
    if (model.n_vocab != 256) fprintf(stderr, "generate: %s/config.json: 'vocab_size' is %ld; this tool needs a byte-level model (256)\n", dir, (long)model.n_vocab);
    else if (n_prompt > (size_t)model.max_positions || n_tokens > model.max_positions - (int64_t)n_prompt)
        fprintf(stderr, "generate: prompt and --tokens are longer than the model's %lld positions\n", (long long)model.max_positions);
    else if (dump_path != NULL && (dump = fopen(dump_path, "wb")) == NULL) fprintf(stderr, "generate: --dump-logits: cannot create %s\n", dump_path);
    else {
        options.top_k = (int32_t)top_k;
        options.n_threads = (int32_t)threads;
        options.max_tokens = (int64_t)n_prompt + n_tokens;
        if (engine_open(&e, &model, &options) != 0) fprintf(stderr, "generate: %s\n", e.error);
        else {
            status = run(&e, prompt, (int32_t)n_prompt, n_tokens, temperature, (uint64_t)seed, dump);
            engine_close(&e);
        }
    }
    if (dump != NULL && fclose(dump) != 0) {
        fprintf(stderr, "generate: --dump-logits: cannot write %s\n", dump_path);
        status = 2;
    }
    engine_unload(&model);
    device_close(options.cuda);
    return status;
}
