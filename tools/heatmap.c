/* heatmap - which earlier tokens does each layer of a model select?

   Build: cc -O3 -o build/heatmap tools/heatmap.c -lm -pthread        (or: make tools) */
#define _POSIX_C_SOURCE 200809L
#include <unistd.h>
#define DSA_IMPLEMENTATION
#include "engine.h"

static const char help[] =
    "usage: heatmap MODEL_DIR (--prompt TEXT | --text FILE [--context N]) [options]\n"
    "\n"
    "Reads a text with a byte-level model (for example examples/tiny-dsa) and shows what each layer's indexer selects: the\n"
    "text on the terminal, coloured by how often each byte was selected, and a map of tokens and queries as one SVG or HTML\n"
    "file that needs no other. A query that sees no more than K tokens selects them all.\n"
    "\n"
    "  --context N        the first N bytes of FILE (default 1024)\n"
    "  --layer L          this layer only (default: all)\n"
    "  --topk K           tokens selected by a query (default: the model's)\n"
    "  --svg FILE         the map: one panel per layer, x = token, y = query, dark = selected\n"
    "  --html FILE        the same map, and the coloured text of each layer\n"
    "  --counts           numbers instead of colours: layer, position, byte, queries that could select it, that did\n"
    "  --threads N        default 1\n"
    "  --isa NAME         auto (default), scalar, avx2, avx512, neon\n"
    "\n"
    "Exit status: 0 success, 2 bad usage or bad input.\n";

static int usage_error(const char *what, const char *detail) {
    fprintf(stderr, "heatmap: %s%s (heatmap --help explains)\n", what, detail);
    return 2;
}

typedef struct heatmap {
    const engine *e;
    const unsigned char *text;
    int32_t n, k, first, last;         /* bytes; list entries of a query; layers [first, last) */
    int32_t *const *lists;             /* [n_layers] of [n, k] */
    int32_t *count;                    /* [n] of one layer: queries that selected each token */
} heatmap;

/* A layer without an indexer attends over the list of the nearest earlier one that has one: those lists are its own as well. */
static void count_layer(const heatmap *h, int32_t layer) {
    memset(h->count, 0, (size_t)h->n * sizeof *h->count);
    for (int64_t i = 0; i < (int64_t)h->n * h->k; i++) {
        int32_t p = h->lists[layer][i];
        if (p >= 0 && p < h->n) h->count[p]++;
    }
}

/* The share of the queries at or after p that selected it: p is seen by n - p queries. */
static double share(const heatmap *h, int32_t p) { return (double)h->count[p] / (double)(h->n - p); }

static const char *const from[] = { "0 %", "5 %", "15 %", "30 %", "50 %", "80 %" };

/* Six steps, so that most text does not drown in colour: shares fall off quickly. */
static int step(double x) { return x >= 0.8 ? 5 : x >= 0.5 ? 4 : x >= 0.3 ? 3 : x >= 0.15 ? 2 : x >= 0.05 ? 1 : 0; }

static void print_text(const heatmap *h, int32_t layer) {
    static const char *const colour[] = { "\033[0m", "\033[48;5;230m\033[30m", "\033[48;5;222m\033[30m", "\033[48;5;215m\033[30m",
                                          "\033[48;5;208m\033[30m", "\033[48;5;196m\033[97m" };
    int at = 0;
    printf("layer %d: selected by  ", (int)layer);
    for (int i = 0; i < 6; i++) printf("%s %s \033[0m ", colour[i], i == 0 ? "< 5 %" : from[i]);
    printf("of the queries behind it");
    printf("\n\n");
    for (int32_t p = 0; p < h->n; p++) {
        int s = step(share(h, p));
        unsigned char c = h->text[p];
        if (s != at) fputs(colour[s], stdout);
        at = s;
        if (c == '\n' && at != 0) { fputs("\033[0m", stdout); at = 0; }      /* no coloured rest of a line */
        putchar(c == '\n' || (c >= 32 && c < 127) ? c : '.');
    }
    fputs("\033[0m\n\n", stdout);
}

static void print_counts(const heatmap *h, int32_t layer) {
    for (int32_t p = 0; p < h->n; p++) printf("%d,%d,%d,%d,%d\n", (int)layer, (int)p, h->text[p], (int)(h->n - p), (int)h->count[p]);
}

/* 0, or 1 to 9 for what is not 0. */
static int shade_of(double x) { return (int)(9.0 * fmin(1.0, x) + 0.999); }

/* One panel: at most 512 cells a side, each the share of its (query, token) pairs that were selected. */
static void write_panel(const heatmap *h, FILE *f, int32_t layer, int x0, int y0, uint32_t *cells, int side) {
    memset(cells, 0, (size_t)side * (size_t)side * sizeof *cells);
    for (int64_t q = 0; q < h->n; q++)
        for (int32_t j = 0; j < h->k; j++) {
            int64_t p = h->lists[layer][q * h->k + j];
            if (p >= 0 && p < h->n) cells[q * side / h->n * side + p * side / h->n]++;
        }
    const double full = ((double)h->n / side) * ((double)h->n / side);
    fprintf(f, "<text x=\"%d\" y=\"%d\">layer %d%s</text>\n", x0, y0 - 6, (int)layer,
            h->e->model->blocks[layer].has_indexer ? "" : " (shared list)");
    fprintf(f, "<rect x=\"%d\" y=\"%d\" width=\"%d\" height=\"%d\" fill=\"#f4f4f4\"/>\n", x0, y0, side, side);
    fprintf(f, "<path d=\"M%d %dl%d %dv%dz\" fill=\"#ddd\"/>\n", x0, y0, side, side, -side);      /* after the query: never selected */
    for (int shade = 1; shade <= 9; shade++) {           /* one path of horizontal strokes a shade */
        fprintf(f, "<path class=\"s%d\" d=\"", shade);
        for (int y = 0; y < side; y++)
            for (int x = 0, w; x < side; x += w) {
                int is = shade_of(cells[y * side + x] / full);
                for (w = 1; x + w < side && shade_of(cells[y * side + x + w] / full) == is; w++) { }
                if (is == shade) fprintf(f, "M%d %dh%d", x0 + x, y0 + y, w);
            }
        fprintf(f, "\"/>\n");
    }
}

static int write_svg(const heatmap *h, FILE *f) {
    const int side = h->n < 512 ? h->n : 512, n = h->last - h->first, columns = n < 2 ? n : 2, lines = (n + columns - 1) / columns;
    const int gap = 30;
    uint32_t *cells = malloc((size_t)side * (size_t)side * sizeof *cells);
    if (cells == NULL) return -1;
    fprintf(f, "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"%d\" height=\"%d\" font-family=\"sans-serif\" font-size=\"12\" "
            "shape-rendering=\"crispEdges\">\n<style>", columns * (side + gap) + gap, lines * (side + gap) + gap + 16);
    for (int s = 1; s <= 9; s++) fprintf(f, ".s%d{stroke:rgb(%d,%d,%d)}", s, 215 - 24 * s, 228 - 21 * s, 245 - 12 * s);
    fprintf(f, "path{transform:translate(0,.5px)}</style>\n");
    for (int32_t i = 0; i < n; i++)
        write_panel(h, f, h->first + i, gap + i % columns * (side + gap), gap + i / columns * (side + gap), cells, side);
    fprintf(f, "<text x=\"%d\" y=\"%d\">x: token 0 to %d, y: query 0 to %d (downwards), dark: selected; %d of %d at most</text>\n</svg>\n",
            gap, lines * (side + gap) + gap + 4, (int)h->n - 1, (int)h->n - 1, (int)h->k, (int)h->n);
    free(cells);
    return 0;
}

static int write_html(const heatmap *h, FILE *f) {
    static const char *const colour[] = { "#fff", "#fff3cd", "#ffd98a", "#ffb84d", "#ff8c1a", "#e03131" };
    fprintf(f, "<!DOCTYPE html>\n<html lang=\"en\"><meta charset=\"utf-8\"><title>What each layer selects</title>\n<style>"
               "body{font-family:sans-serif;margin:2em}pre{font-size:14px;line-height:1.5;white-space:pre-wrap}");
    for (int i = 0; i < 6; i++) fprintf(f, ".c%d{background:%s}", i, colour[i]);
    fprintf(f, "</style>\n<h1>What each layer selects</h1>\n<p>A token's colour: the share of the queries behind it that selected it (");
    for (int i = 1; i < 6; i++) fprintf(f, "<span class=\"c%d\">from %s</span>%s", i, from[i], i < 5 ? ", " : "");
    fprintf(f, "). Point at a byte for its numbers.</p>\n");
    if (write_svg(h, f) != 0) return -1;
    for (int32_t layer = h->first; layer < h->last; layer++) {
        count_layer(h, layer);
        fprintf(f, "<h2>layer %d</h2>\n<pre>", (int)layer);
        for (int32_t p = 0; p < h->n; p++) {
            unsigned char c = h->text[p];
            fprintf(f, "<span class=\"c%d\" title=\"%d: %d of %d\">", step(share(h, p)), (int)p, (int)h->count[p], (int)(h->n - p));
            if (c == '<') fputs("&lt;", f);
            else if (c == '&') fputs("&amp;", f);
            else fputc(c == '\n' || (c >= 32 && c < 127) ? c : '.', f);
            fputs("</span>", f);
        }
        fprintf(f, "</pre>\n");
    }
    fprintf(f, "</html>\n");
    return 0;
}

static int write_file(const heatmap *h, const char *path, int (*write)(const heatmap *, FILE *)) {
    FILE *f = fopen(path, "w");
    int bad = f == NULL || write(h, f) != 0;
    if (f != NULL && fclose(f) != 0) bad = 1;
    if (bad) fprintf(stderr, "heatmap: %s: cannot be written\n", path);
    return bad;
}

static int run(engine *e, const unsigned char *text, int32_t n, int32_t first, int32_t last, const char *svg, const char *html,
               int counts) {
    const int32_t n_layers = e->model->n_layers, k = e->ctx.config.top_k;
    int32_t *tokens = malloc((size_t)n * sizeof *tokens), **lists = calloc((size_t)n_layers, sizeof *lists);
    int32_t *count = malloc((size_t)n * sizeof *count);
    int status = 2, bad = tokens == NULL || lists == NULL || count == NULL;
    for (int32_t i = 0; !bad && i < n_layers; i++) bad = (lists[i] = malloc((size_t)n * (size_t)k * sizeof **lists)) == NULL;
    if (bad) {
        fprintf(stderr, "heatmap: out of memory\n");
        goto done;
    }
    for (int32_t i = 0; i < n; i++) tokens[i] = text[i];
    engine_hooks hooks;
    memset(&hooks, 0, sizeof hooks);
    hooks.lists_out = lists;
    if (engine_forward(e, tokens, n, NULL, 0, &hooks) != 0) {
        fprintf(stderr, "heatmap: %s\n", e->error);
        goto done;
    }
    heatmap h = { e, text, n, k, first, last, lists, count };
    if (counts) printf("layer,position,byte,queries,selected\n");
    for (int32_t layer = first; layer < last; layer++) {
        count_layer(&h, layer);
        if (counts) print_counts(&h, layer);
        else print_text(&h, layer);
    }
    status = fflush(stdout) == 0 && !ferror(stdout) ? 0 : 2;
    if (status != 0) fprintf(stderr, "heatmap: cannot write to standard output\n");
    if (svg != NULL && write_file(&h, svg, write_svg) != 0) status = 2;
    if (html != NULL && write_file(&h, html, write_html) != 0) status = 2;
done:
    for (int32_t i = 0; lists != NULL && i < n_layers; i++) free(lists[i]);
    free(lists);
    free(tokens);
    free(count);
    return status;
}

int main(int argc, char **argv) {
    const char *dir = NULL, *prompt = NULL, *path = NULL, *svg = NULL, *html = NULL;
    int64_t context = 1024, layer = -1, top_k = 0, threads = 1;
    int counts = 0;
    engine_options options;
    memset(&options, 0, sizeof options);
    options.gemm = ENGINE_GEMM;
    for (int i = 1; i < argc; i++) {
        const char *name = argv[i], *value = i + 1 < argc ? argv[i + 1] : NULL;
        int bad = 0;
        if (strcmp(name, "--help") == 0) {
            fputs(help, stdout);
            return fflush(stdout) == 0 && !ferror(stdout) ? 0 : 2;
        }
        if (strcmp(name, "--counts") == 0) { counts = 1; continue; }
        if (name[0] != '-') {
            if (dir != NULL) return usage_error("one model folder, not also ", name);
            dir = name;
            continue;
        }
        if (value == NULL) return usage_error("a value is missing after ", name);
        if (strcmp(name, "--prompt") == 0) prompt = value;
        else if (strcmp(name, "--text") == 0) path = value;
        else if (strcmp(name, "--svg") == 0) svg = value;
        else if (strcmp(name, "--html") == 0) html = value;
        else if (strcmp(name, "--context") == 0) bad = engine_parse_int(value, 1, 65536, &context);
        else if (strcmp(name, "--layer") == 0) bad = engine_parse_int(value, 0, 9999, &layer);
        else if (strcmp(name, "--topk") == 0) bad = engine_parse_int(value, 1, 65536, &top_k);
        else if (strcmp(name, "--threads") == 0) bad = engine_parse_int(value, 1, 1024, &threads);
        else if (strcmp(name, "--isa") == 0) bad = engine_parse_isa(value, &options.isa);
        else return usage_error("unknown option ", name);
        if (bad) return usage_error("bad value for ", name);
        i++;
    }
    if (dir == NULL) return usage_error("a model folder is missing", "");
    if ((prompt == NULL) == (path == NULL)) return usage_error("one of --prompt and --text", "");

    static engine_model model;
    static engine e;
    char error[300] = "", *text = NULL;
    size_t n = prompt != NULL ? strlen(prompt) : 0;
    int status = 2;
    if (path != NULL && (text = st_read_file(path, &n, error, sizeof error)) == NULL) {
        fprintf(stderr, "heatmap: %s\n", error);
        return 2;
    }
    if (path != NULL && n > (size_t)context) n = (size_t)context;
    if (n == 0 || n > 65536) {
        free(text);
        return usage_error("the text must have 1 to 65536 bytes", "");
    }
    options.n_threads = (int32_t)threads;
    options.top_k = (int32_t)top_k;
    options.max_tokens = (int64_t)n;
    if (engine_load_dir(&model, dir, 0) != 0) {
        fprintf(stderr, "heatmap: %s\n", model.error);
    } else if (model.n_vocab != 256) {
        fprintf(stderr, "heatmap: %s: unsupported: a vocabulary of %d, not of 256 bytes\n", dir, (int)model.n_vocab);
    } else if (layer >= model.n_layers) {
        fprintf(stderr, "heatmap: --layer %lld: the model has %d layers\n", (long long)layer, (int)model.n_layers);
    } else if (engine_open(&e, &model, &options) != 0) {
        fprintf(stderr, "heatmap: %s\n", e.error);
    } else {
        status = run(&e, (const unsigned char *)(text != NULL ? text : prompt), (int32_t)n, layer < 0 ? 0 : (int32_t)layer,
                     layer < 0 ? model.n_layers : (int32_t)layer + 1, svg, html, counts);
        engine_close(&e);
    }
    engine_unload(&model);
    free(text);
    return status;
}
