/* needle.h - the retrieval test that needle.c and demo.c share - public domain or MIT, like dsa.h

   A document is running text with facts ("The number of Tirzah is 48213.") hidden in its first 70 % and, later on, each
   fact asked twice ("What is the number of Tirzah? 48213."), in the form that the model was trained on
   (examples/README.md). The model reads it once, byte by byte; a question counts as right when each of the five digits of
   its answer was the likeliest next byte. */
#ifndef NEEDLE_H_INCLUDED
#define NEEDLE_H_INCLUDED

#include <time.h>
#include "engine.h"

enum { NEEDLE_MAX_FACTS = 20, NEEDLE_MIN_CONTEXT = 256, NEEDLE_CHUNK = 256 };

typedef struct needle_text {     /* what documents are made from */
    char *bytes;                 /* whitespace joined to single spaces */
    size_t size;
    char (*names)[8];            /* capitalised words of 3 to 7 letters, sorted, each once */
    int32_t n_names;
} needle_text;

typedef struct needle_document {
    int32_t *tokens;             /* one per byte */
    int32_t n;
    int32_t n_questions;
    int32_t answers[2 * NEEDLE_MAX_FACTS];   /* where the five digits start, ascending */
} needle_document;

typedef struct needle_result {
    int64_t asked, right;
    double bits;                 /* -log2 of the probability of every byte that belongs to no answer */
    int64_t n_bytes;             /* how many those are */
    double seconds;              /* wall time inside the engine */
    int64_t n_tokens;
    int64_t bytes_per_token;     /* cache bytes that the last token read */
} needle_result;

/* Called between chunks with the tokens done in this document; may print. */
typedef void (*needle_progress)(void *user, int32_t done, int32_t total, const needle_result *so_far);

static inline double needle_seconds(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

static inline int needle__upper(char c) { return c >= 'A' && c <= 'Z'; }
static inline int needle__lower(char c) { return c >= 'a' && c <= 'z'; }

static inline int needle__by_name(const void *a, const void *b) { return strcmp((const char *)a, (const char *)b); }

static inline void needle_text_free(needle_text *t) {
    free(t->bytes); free(t->names);
    memset(t, 0, sizeof *t);
}

/* 0, or -1 with the reason in err. */
static inline int needle_text_load(needle_text *t, const char *path, char *err, size_t err_size) {
    size_t n = 0, end;
    memset(t, 0, sizeof *t);
    if ((t->bytes = st_read_file(path, &n, err, err_size)) == NULL) return -1;
    for (size_t i = 0; i < n; i++) {
        char c = t->bytes[i];
        int space = c == ' ' || (c >= '\t' && c <= '\r');
        if (!space) t->bytes[t->size++] = c;
        else if (t->size > 0 && t->bytes[t->size - 1] != ' ') t->bytes[t->size++] = ' ';
    }
    t->names = (char (*)[8])malloc((t->size / 4 + 1) * sizeof *t->names);   /* a name and what parts it from the next: 4 bytes at least */
    if (t->names == NULL) { st__fail(err, err_size, "%s: out of memory", path); needle_text_free(t); return -1; }
    for (size_t i = 0; i < t->size; i = end > i ? end : i + 1) {
        for (end = i; end < t->size && (needle__upper(t->bytes[end]) || needle__lower(t->bytes[end])); end++) {}
        size_t lower = 0;
        for (size_t k = i + 1; k < end; k++) lower += (size_t)needle__lower(t->bytes[k]);
        if (end - i < 3 || end - i > 7 || !needle__upper(t->bytes[i]) || lower != end - i - 1) continue;
        memset(t->names[t->n_names], 0, sizeof *t->names);
        memcpy(t->names[t->n_names++], t->bytes + i, end - i);
    }
    qsort(t->names, (size_t)t->n_names, sizeof *t->names, needle__by_name);
    int32_t kept = 0;
    for (int32_t i = 0; i < t->n_names; i++)
        if (i == 0 || strcmp(t->names[i], t->names[kept - 1]) != 0) memmove(t->names[kept++], t->names[i], sizeof *t->names);
    t->n_names = kept;
    if (t->size >= 1000 && t->n_names >= NEEDLE_MAX_FACTS) return 0;
    st__fail(err, err_size, "%s: too short: 1000 bytes of text and %d names (capitalised words of 3 to 7 letters) are needed", path, (int)NEEDLE_MAX_FACTS);
    needle_text_free(t);
    return -1;
}

static inline int64_t needle__below(uint64_t *seed, int64_t n) { return (int64_t)(engine_random(seed) % (uint64_t)n); }

/* As trained: 4, 10, 14, 20 facts in 512, 2048, 4096, 8192 bytes; in a straight line between, never more. */
static inline int32_t needle_facts(int32_t context) {
    static const int32_t at[5][2] = { { 0, 0 }, { 512, 4 }, { 2048, 10 }, { 4096, 14 }, { 8192, NEEDLE_MAX_FACTS } };
    for (int i = 1; i < 5; i++)
        if (context <= at[i][0]) return at[i - 1][1] + (at[i][1] - at[i - 1][1]) * (context - at[i - 1][0]) / (at[i][0] - at[i - 1][0]);
    return NEEDLE_MAX_FACTS;
}

typedef struct needle__line { double place; int32_t order; char text[48]; int is_question; } needle__line;

static inline int needle__by_place(const void *a, const void *b) {
    const needle__line *x = (const needle__line *)a, *y = (const needle__line *)b;
    if (x->place != y->place) return x->place < y->place ? -1 : 1;
    return x->order - y->order;
}

static inline void needle_document_free(needle_document *d) { free(d->tokens); d->tokens = NULL; }

/* A document of exactly `context` bytes. The seed moves on, so that the next call makes another one. -1: no memory. */
static inline int needle_document_make(needle_document *d, const needle_text *t, int32_t context, uint64_t *seed) {
    int32_t n_facts = needle_facts(context), chosen[NEEDLE_MAX_FACTS], n_lines = 0, *starts;
    needle__line inserted[3 * NEEDLE_MAX_FACTS];
    size_t at = (size_t)needle__below(seed, (int64_t)t->size);
    int64_t room = context;
    memset(d, 0, sizeof *d);
    d->tokens = (int32_t *)malloc((size_t)context * sizeof *d->tokens);
    starts = (int32_t *)malloc(((size_t)context + 1) * 2 * sizeof *starts);   /* of each line: where in the text, and its length */
    if (d->tokens == NULL || starts == NULL) { needle_document_free(d); free(starts); return -1; }

    for (int32_t i = 0; i < n_facts; i++) {
        int again;
        do {
            chosen[i] = (int32_t)needle__below(seed, t->n_names);
            again = 0;
            for (int32_t k = 0; k < i; k++) again |= chosen[k] == chosen[i];
        } while (again);
        long number = 10000 + (long)needle__below(seed, 90000);
        needle__line *fact = &inserted[3 * i];
        snprintf(fact->text, sizeof fact->text, "The number of %s is %ld.\n", t->names[chosen[i]], number);
        for (int q = 1; q <= 2; q++) snprintf(fact[q].text, sizeof fact[q].text, "What is the number of %s? %ld.\n", t->names[chosen[i]], number);
        for (int q = 0; q <= 2; q++) {
            fact[q].is_question = q > 0;
            fact[q].order = 3 * i + q;
            room -= (int64_t)strlen(fact[q].text);
        }
    }
    /* Running text from a random word on (the text is a circle): lines of 35 to 90 bytes, ended at a space; the last as the room is. */
    while (at > 0 && t->bytes[at - 1] != ' ') at--;
    while (room > 0) {
        int64_t want = 35 + needle__below(seed, 56), length = want;
        while (length > 34 && t->bytes[(at + (size_t)length) % t->size] != ' ') length--;
        if (length < 35) for (length = want; length < 90 && t->bytes[(at + (size_t)length) % t->size] != ' '; length++) {}
        if (length > room - 1) length = room - 1;
        starts[2 * n_lines] = (int32_t)at;
        starts[2 * n_lines + 1] = (int32_t)length;
        n_lines++;
        room -= length + 1;
        at = (at + (size_t)length + 1) % t->size;
    }
    /* Facts uniform over the first 70 % of the lines, each question uniform between its fact and the end. */
    for (int32_t i = 0; i < n_facts; i++) {
        inserted[3 * i].place = floor((double)needle__below(seed, 1 << 30) / (1 << 30) * 0.7 * n_lines);
        for (int q = 1; q <= 2; q++)
            inserted[3 * i + q].place = inserted[3 * i].place + floor((double)needle__below(seed, 1 << 30) / (1 << 30) * (n_lines - inserted[3 * i].place) + 1);
    }
    qsort(inserted, (size_t)(3 * n_facts), sizeof *inserted, needle__by_place);
    for (int32_t line = 0, next = 0; line <= n_lines; line++) {
        for (; next < 3 * n_facts && inserted[next].place <= line; next++) {
            if (inserted[next].is_question) d->answers[d->n_questions++] = d->n + (int32_t)(strchr(inserted[next].text, '?') + 2 - inserted[next].text);
            for (const char *c = inserted[next].text; *c != '\0'; c++) d->tokens[d->n++] = (unsigned char)*c;
        }
        if (line == n_lines) break;
        for (int32_t i = 0; i < starts[2 * line + 1]; i++) d->tokens[d->n++] = (unsigned char)t->bytes[((size_t)starts[2 * line] + (size_t)i) % t->size];
        d->tokens[d->n++] = '\n';
    }
    free(starts);
    return 0;
}

/* Reads the document with an empty cache and adds to *r. logits: scratch of [NEEDLE_CHUNK, 256]. 0, or -1: see e->error. */
static inline int needle_read(engine *e, const needle_document *d, float *logits, needle_result *r, needle_progress progress, void *user) {
    int32_t question = 0, digits_right = 0;
    if (engine_reset(e) != 0) return -1;
    for (int32_t begin = 0; begin < d->n; begin += NEEDLE_CHUNK) {
        int32_t rows = d->n - begin < NEEDLE_CHUNK ? d->n - begin : NEEDLE_CHUNK;
        double start = needle_seconds();
        if (engine_forward(e, d->tokens + begin, rows, logits, rows, NULL) != 0) return -1;
        r->seconds += needle_seconds() - start;
        for (int32_t i = 0; i < rows; i++) {
            const float *row = logits + (int64_t)i * 256;
            int32_t next = begin + i + 1, best = engine_argmax(row, 256);
            if (next >= d->n) break;
            if (question < d->n_questions && next >= d->answers[question]) {
                digits_right += best == d->tokens[next];
                if (next < d->answers[question] + 4) continue;
                r->asked++;
                r->right += digits_right == 5;
                digits_right = 0;
                question++;
                continue;
            }
            double total = 0;
            for (int32_t k = 0; k < 256; k++) total += exp((double)(row[k] - row[best]));
            r->bits += (log(total) - (double)(row[d->tokens[next]] - row[best])) / log(2.0);
            r->n_bytes++;
        }
        r->n_tokens += rows;
        if (progress != NULL) progress(user, begin + rows, d->n, r);
    }
    r->bytes_per_token = engine_bytes_per_token(e);
    return 0;
}

#endif /* NEEDLE_H_INCLUDED */
