/* conformance.c - runs reference files through the library and compares every result they hold.

   A reference file (tests/vectors/README.md describes the format) tells what it is by its tensor names. Its operands go
   through every path of the library that computes them: all rows in one call, one row per call, ragged chunks; over
   contiguous memory and over shuffled pages. Bounds: tests/vectors/README.md and the tolerances that FlashMLA and
   DeepGEMM set in their own tests. */
#define _POSIX_C_SOURCE 200809L
#include <math.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define DSA_IMPLEMENTATION
#include "../dsa.h"
#include "../examples/safetensors.h"
#include "engine.h"

#include "conformance_report.h"
#include "conformance_kernels.h"
#include "conformance_model.h"
#include "conformance_layers.h"

static const char usage[] =
    "Usage: conformance [options] FILE...\n"
    "       conformance [options] --model DIR FILE...\n"
    "\n"
    "Runs reference files (.safetensors) through dsa.h and compares the results with the stored ones. A file may hold a\n"
    "small model with its inner results, attention layers of another model, a FlashMLA sparse forward, a FlashMLA FP8 cache\n"
    "or DeepGEMM MQA logits; its tensor names tell which. With --model, FILE holds the reference results of the model in the folder DIR.\n"
    "\n"
    "  --isa NAME     auto (default), scalar, avx2, avx512, avx512base or neon\n"
    "  --threads N    threads, 1 to 256 (default 1); no result depends on it\n"
    "  --model DIR    a folder with config.json and model.safetensors, in Hugging Face format\n"
    DEVICE_HELP
    "  --json         one JSON object per comparison\n"
    "  --help         this text\n"
    "\n"
    "Each comparison prints one line: name metric value bound ok|FAIL. A bound of - means that the value is only shown.\n"
    "Metrics: max_abs, the largest difference; sim, 1 - 2<a,b>/(|a|^2+|b|^2); tolerance, the used part of an absolute or\n"
    "relative tolerance; rows_differ, rows whose selected set is wrong (ties at the cut are right either way); recall, the\n"
    "part of the reference's set that was selected; bytes_differ, values_differ, inf_misplaced: counts.\n"
    "\n"
    "Exit status: 0 all comparisons hold, 1 one fails, 2 bad usage, a bad file, or a kind of file that is not supported.\n";

static int wrong_usage(const char *what, const char *argument)
{
    fprintf(stderr, "conformance: %s%s (conformance --help)\n", what, argument);
    return 2;
}

/* Kinds by tensor names, see the top. */
static int check_file(run *r, const char *model_dir)
{
    st_file file;
    char error[512];
    int result;
    if (st_open(r->path, &file, error, sizeof error) != 0) {
        fprintf(stderr, "conformance: %s\n", error);
        return FILE_BAD;
    }
    if (model_dir) result = check_model_folder(r, &file, model_dir);
    else if (st_find(&file, "v32_bytes")) result = check_fp8_cache(r, &file);
    else if (st_find(&file, "out_f32")) result = check_sparse_forward(r, &file);
    else if (st_find(&file, "k_scale")) result = check_mqa_logits(r, &file);
    else if (st_find(&file, "attn_in.0")) result = check_layers(r, &file);
    else if (st_find(&file, "input_ids") && st_find(&file, "w.model.embed_tokens.weight")) result = check_model(r, &file);
    else if (st_find(&file, "input_ids")) result = bad_file(r, "unsupported: reference of a model folder; pass it with --model DIR");
    else result = bad_file(r, "unsupported: its tensor names belong to no known kind of reference file");
    st_close(&file);
    return result;
}

static void set_stem(run *r, const char *path)
{
    const char *name = strrchr(path, '/');
    name = name ? name + 1 : path;
    const char *dot = strrchr(name, '.');
    size_t n = dot && dot != name ? (size_t)(dot - name) : strlen(name);
    if (n >= sizeof r->stem) n = sizeof r->stem - 1;
    memcpy(r->stem, name, n);
    r->stem[n] = '\0';
    r->path = path;
}

int main(int argc, char **argv)
{
    static char detail[256];
    run r = { 0 };
    const char *model_dir = NULL;
    int n_files = 0, bad = 0, i;
    dsa_pool *pool = NULL;
    dsa_ctx ctx;
    dsa_status status;

    r.base.n_threads = 1;
    r.base.detail = detail;
    r.base.detail_size = sizeof detail;
    for (i = 1; i < argc; i++) {
        const char *option = argv[i];
        if (option[0] != '-') {
            argv[n_files++] = argv[i];
            continue;
        }
        if (strcmp(option, "--help") == 0) return fputs(usage, stdout) == EOF || fflush(stdout) != 0 ? 2 : 0;
        if (strcmp(option, "--json") == 0) {
            r.json = 1;
            continue;
        }
#ifdef DSA_CUDA
        if (strcmp(option, "--cuda") == 0) {
            if (++i == argc) return wrong_usage("a value must follow ", option);
            device_close(r.base.cuda);
            if (device_open("conformance", argv[i], &r.base.cuda) != 0) return 2;
            continue;
        }
#endif
        if (strcmp(option, "--isa") != 0 && strcmp(option, "--threads") != 0 && strcmp(option, "--model") != 0)
            return wrong_usage("unknown option ", option);
        if (++i == argc) return wrong_usage("a value must follow ", option);
        if (strcmp(option, "--model") == 0) {
            model_dir = argv[i];
        } else if (strcmp(option, "--threads") == 0) {
            char *end;
            long n = strtol(argv[i], &end, 10);
            if (*end || end == argv[i] || n < 1 || n > 256) return wrong_usage("--threads wants 1 to 256, not ", argv[i]);
            r.base.n_threads = (int32_t)n;
        } else if (engine_parse_isa(argv[i], &r.base.isa) != 0) {
            return wrong_usage("unknown ISA ", argv[i]);
        }
    }
    if (n_files == 0) return wrong_usage("no file is given", "");
    if (r.base.n_threads > 1) {
        status = dsa_pool_create(NULL, r.base.n_threads, &pool);
        if (status != DSA_OK) return wrong_usage("--threads: ", dsa_status_text(status));
        r.base.parallel_for = dsa_pool_run;
        r.base.parallel_user = pool;
    }
    status = dsa_init(&ctx, &r.base);
    if (status != DSA_OK) {
        dsa_pool_destroy(pool);
        return wrong_usage("", detail[0] ? detail : dsa_status_text(status));
    }
    for (i = 0; i < n_files; i++) {
        set_stem(&r, argv[i]);
        bad |= check_file(&r, model_dir) == FILE_BAD;
    }
    dsa_pool_destroy(pool);
    device_close(r.base.cuda);
    fprintf(stderr, "conformance: %ld comparisons, %ld failed (ISA %s, %d thread%s)\n", r.checks, r.failed,
            dsa_isa_name(dsa_query_isa(&ctx)), (int)r.base.n_threads, r.base.n_threads == 1 ? "" : "s");
    if (fflush(stdout) != 0 || ferror(stdout)) {
        fprintf(stderr, "conformance: cannot write to standard output\n");
        bad = 1;
    }
    return r.failed ? 1 : bad ? 2 : 0;
}
