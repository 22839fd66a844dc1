/* safetensors.h - reads .safetensors files and JSON - public domain or MIT, like dsa.h

   A safetensors file is: 8 bytes little-endian header length, a JSON header (name -> dtype, shape, data_offsets, and an
   optional __metadata__ object of strings), then the raw little-endian data of the tensors, without gaps.

       st_file f; char err[256];
       if (st_open("model.safetensors", &f, err, sizeof err) != 0) { fprintf(stderr, "%s\n", err); return 2; }
       const st_tensor *t = st_find(&f, "lm_head.weight");      (NULL if there is none)
       ...
       st_close(&f);

   The files are untrusted: everything is checked before it is used, and an error says which file, which tensor and what is
   wrong. Nothing here prints or exits. The host must be little-endian, as every machine that dsa.h runs on is. */
#ifndef SAFETENSORS_H_INCLUDED
#define SAFETENSORS_H_INCLUDED

#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

typedef struct js_value js_value;

typedef struct st_tensor {
    const char *name;
    char dtype[8];               /* "F32", "BF16", "F16", "F8_E4M3", "I32", "I64", "U8", ... */
    int32_t rank;
    int64_t shape[8];
    const void *data;            /* aligned to 16 bytes */
    size_t bytes;
    int64_t count;               /* product of shape; 1 for a scalar */
} st_tensor;

typedef struct st_file {         /* owns everything that its tensors point to */
    int32_t n_tensors;
    st_tensor *tensors;          /* sorted by name */
    js_value *header;
    unsigned char *data;
} st_file;

/* ---- JSON --------------------------------------------------------------------------------------------------------- */
typedef enum js_type { JS_NULL, JS_BOOL, JS_NUMBER, JS_STRING, JS_ARRAY, JS_OBJECT } js_type;

struct js_value {
    js_type type;
    int boolean;
    double number;
    char *key;                   /* name inside an object */
    char *string;
    js_value *items;             /* of an array in order; of an object sorted by key, so that js_get can halve its way */
    int32_t count;
};

#define JS_MAX_DEPTH 64          /* the parser recurses: hostile nesting must not reach the end of the stack */

typedef struct js__parser { const char *p, *begin, *end; char *err; size_t err_size; } js__parser;

/* Writes one line of error text; control bytes of hostile names do not reach the terminal. Always returns -1. */
static inline int st__fail(char *err, size_t err_size, const char *format, ...) {
    if (err != NULL && err_size > 0) {
        va_list list;
        va_start(list, format);
        vsnprintf(err, err_size, format, list);
        va_end(list);
        for (char *c = err; *c != '\0'; c++)
            if ((unsigned char)*c < 32 || *c == 127) *c = '?';
    }
    return -1;
}

static inline int js__fail(js__parser *s, const char *what) {
    return st__fail(s->err, s->err_size, "JSON, byte %lu: %s", (unsigned long)(s->p - s->begin), what);
}

static inline void js__space(js__parser *s) {
    while (s->p < s->end && (*s->p == ' ' || *s->p == '\t' || *s->p == '\n' || *s->p == '\r')) s->p++;
}

static inline int js__hex4(js__parser *s, unsigned *code) {
    *code = 0;
    for (int i = 0; i < 4; i++, s->p++) {
        char c = s->p < s->end ? *s->p : '\0';
        unsigned digit = c >= '0' && c <= '9' ? (unsigned)(c - '0') : c >= 'a' && c <= 'f' ? (unsigned)(c - 'a') + 10u
                       : c >= 'A' && c <= 'F' ? (unsigned)(c - 'A') + 10u : 16u;
        if (digit == 16u) return js__fail(s, "four hexadecimal digits must follow \\u");
        *code = *code * 16u + digit;
    }
    return 0;
}

/* At the opening quote. An unescaped string is never longer than its source. */
static inline int js__string(js__parser *s, char **out) {
    if (s->p >= s->end || *s->p != '"') return js__fail(s, "a string must start here");
    const char *close = ++s->p;
    while (close < s->end && *close != '"') close += *close == '\\' ? 2 : 1;
    if (close >= s->end) return js__fail(s, "the string has no end");
    char *w = (char *)malloc((size_t)(close - s->p) + 1);
    if ((*out = w) == NULL) return js__fail(s, "out of memory");
    while (*s->p != '"') {
        unsigned char c = (unsigned char)*s->p++;
        if (c < 32) return js__fail(s, "control character in a string");
        if (c != '\\') { *w++ = (char)c; continue; }
        char e = *s->p++;
        const char *from = "\"\\/bfnrt", *to = "\"\\/\b\f\n\r\t", *at = e == '\0' ? NULL : strchr(from, e);
        if (at != NULL) { *w++ = to[at - from]; continue; }
        if (e != 'u') return js__fail(s, "unknown escape in a string");
        unsigned code, low;
        if (js__hex4(s, &code) != 0) return -1;
        if (code >= 0xD800u && code < 0xDC00u) {          /* a surrogate pair is one character */
            if (s->end - s->p < 2 || s->p[0] != '\\' || s->p[1] != 'u') return js__fail(s, "half a surrogate pair");
            s->p += 2;
            if (js__hex4(s, &low) != 0) return -1;
            if (low < 0xDC00u || low > 0xDFFFu) return js__fail(s, "half a surrogate pair");
            code = 0x10000u + ((code - 0xD800u) << 10) + (low - 0xDC00u);
        } else if ((code >= 0xDC00u && code <= 0xDFFFu) || code == 0) {
            return js__fail(s, "\\u names no usable character");
        }
        if (code < 0x80u) { *w++ = (char)code; continue; }
        if (code < 0x800u) *w++ = (char)(0xC0u | code >> 6);
        else if (code < 0x10000u) { *w++ = (char)(0xE0u | code >> 12); *w++ = (char)(0x80u | (code >> 6 & 63u)); }
        else { *w++ = (char)(0xF0u | code >> 18); *w++ = (char)(0x80u | (code >> 12 & 63u)); *w++ = (char)(0x80u | (code >> 6 & 63u)); }
        *w++ = (char)(0x80u | (code & 63u));
    }
    s->p++;
    *w = '\0';
    return 0;
}

static inline int js__number(js__parser *s, double *out) {
    char text[64];
    size_t n = 0, i = 0, digits;
    while (s->p + n < s->end && strchr("+-.eE0123456789", s->p[n]) != NULL && s->p[n] != '\0') n++;
    if (n == 0) return js__fail(s, "a value must start here");
    if (n >= sizeof text) return js__fail(s, "the number is too long");
    memcpy(text, s->p, n);
    text[n] = '\0';
    if (text[i] == '-') i++;                              /* strtod takes more than JSON allows: check the grammar first */
    digits = strspn(text + i, "0123456789");
    if (digits == 0 || (digits > 1 && text[i] == '0')) return js__fail(s, "this is no number");
    i += digits;
    if (text[i] == '.') {
        if ((digits = strspn(text + i + 1, "0123456789")) == 0) return js__fail(s, "this is no number");
        i += 1 + digits;
    }
    if (text[i] == 'e' || text[i] == 'E') {
        i++;
        if (text[i] == '+' || text[i] == '-') i++;
        if ((digits = strspn(text + i, "0123456789")) == 0) return js__fail(s, "this is no number");
        i += digits;
    }
    if (text[i] != '\0') return js__fail(s, "this is no number");
    *out = strtod(text, NULL);
    s->p += n;
    return 0;
}

static inline int js__by_key(const void *a, const void *b) { return strcmp(((const js_value *)a)->key, ((const js_value *)b)->key); }

static inline int js__value(js__parser *s, js_value *v, int depth);

/* At the bracket after '[' or '{' was eaten. Children hang in v at once, so that js_free finds them after an error. */
static inline int js__items(js__parser *s, js_value *v, int depth, char close) {
    int32_t room = 0;
    js__space(s);
    if (s->p < s->end && *s->p == close) { s->p++; return 0; }
    for (;;) {
        if (v->count == room) {
            if (room > INT32_MAX / 2) return js__fail(s, "too many items");
            room = room == 0 ? 4 : room * 2;
            js_value *more = (js_value *)realloc(v->items, (size_t)room * sizeof *more);
            if (more == NULL) return js__fail(s, "out of memory");
            v->items = more;
        }
        js_value *item = &v->items[v->count++];
        memset(item, 0, sizeof *item);
        if (close == '}') {
            js__space(s);
            if (js__string(s, &item->key) != 0) return -1;
            js__space(s);
            if (s->p >= s->end || *s->p++ != ':') return js__fail(s, "a ':' must follow the name");
        }
        if (js__value(s, item, depth + 1) != 0) return -1;
        js__space(s);
        if (s->p >= s->end || (*s->p != ',' && *s->p != close)) return js__fail(s, close == '}' ? "',' or '}' is missing" : "',' or ']' is missing");
        if (*s->p++ == close) break;
    }
    if (close == '}') {
        qsort(v->items, (size_t)v->count, sizeof *v->items, js__by_key);
        for (int32_t i = 1; i < v->count; i++)
            if (strcmp(v->items[i - 1].key, v->items[i].key) == 0)
                return st__fail(s->err, s->err_size, "JSON: the name '%.100s' appears twice in one object", v->items[i].key);
    }
    return 0;
}

static inline int js__value(js__parser *s, js_value *v, int depth) {
    static const struct { const char *text; js_type type; int boolean; } word[3] = {
        { "null", JS_NULL, 0 }, { "false", JS_BOOL, 0 }, { "true", JS_BOOL, 1 } };
    js__space(s);
    if (depth > JS_MAX_DEPTH) return js__fail(s, "nested too deeply");
    if (s->p >= s->end) return js__fail(s, "the text ends too early");
    if (*s->p == '"') { v->type = JS_STRING; return js__string(s, &v->string); }
    if (*s->p == '[') { v->type = JS_ARRAY; s->p++; return js__items(s, v, depth, ']'); }
    if (*s->p == '{') { v->type = JS_OBJECT; s->p++; return js__items(s, v, depth, '}'); }
    for (int i = 0; i < 3; i++) {
        size_t n = strlen(word[i].text);
        if ((size_t)(s->end - s->p) < n || memcmp(s->p, word[i].text, n) != 0) continue;
        v->type = word[i].type; v->boolean = word[i].boolean; s->p += n;
        return 0;
    }
    v->type = JS_NUMBER;
    return js__number(s, &v->number);
}

static inline void js__clear(js_value *v) {
    for (int32_t i = 0; i < v->count; i++) js__clear(&v->items[i]);
    free(v->items); free(v->key); free(v->string);
}
static inline void js_free(js_value *v) { if (v != NULL) { js__clear(v); free(v); } }

/* The value, to be freed with js_free, or NULL with the reason in err. Names may not repeat inside an object. */
static inline js_value *js_parse(const char *text, size_t n, char *err, size_t err_size) {
    js__parser s = { text, text, text + n, err, err_size };
    js_value *v = (js_value *)calloc(1, sizeof *v);
    if (v == NULL) { st__fail(err, err_size, "JSON: out of memory"); return NULL; }
    int failed = js__value(&s, v, 0);
    js__space(&s);
    if (failed == 0 && s.p < s.end) failed = js__fail(&s, "text follows the value");
    if (failed != 0) { js_free(v); return NULL; }
    return v;
}

/* All of these take NULL, so that look-ups chain: js_number(js_get(js_get(v, "a"), "b")). */
static inline int js_is_null(const js_value *v)   { return v != NULL && v->type == JS_NULL; }
static inline int js_is_bool(const js_value *v)   { return v != NULL && v->type == JS_BOOL; }
static inline int js_is_number(const js_value *v) { return v != NULL && v->type == JS_NUMBER; }
static inline int js_is_string(const js_value *v) { return v != NULL && v->type == JS_STRING; }
static inline int js_is_array(const js_value *v)  { return v != NULL && v->type == JS_ARRAY; }
static inline int js_is_object(const js_value *v) { return v != NULL && v->type == JS_OBJECT; }
static inline int js_bool(const js_value *v)      { return js_is_bool(v) ? v->boolean : 0; }
static inline double js_number(const js_value *v) { return js_is_number(v) ? v->number : 0; }
static inline const char *js_string(const js_value *v) { return js_is_string(v) ? v->string : NULL; }
static inline int32_t js_count(const js_value *v) { return v != NULL ? v->count : 0; }       /* items of an array or object */
static inline const js_value *js_at(const js_value *array, int32_t i) {
    return array != NULL && i >= 0 && i < array->count ? &array->items[i] : NULL;
}
static inline const js_value *js_get(const js_value *object, const char *key) {
    int32_t low = 0, high = js_is_object(object) ? object->count : 0;
    while (low < high) {
        int32_t mid = low + (high - low) / 2;
        int order = strcmp(object->items[mid].key, key);
        if (order == 0) return &object->items[mid];
        if (order < 0) low = mid + 1; else high = mid;
    }
    return NULL;
}

/* ---- safetensors -------------------------------------------------------------------------------------------------- */
static inline size_t st__element_bytes(const char *dtype) {
    static const struct { const char *name; size_t bytes; } type[] = {
        { "BOOL", 1 }, { "U8", 1 }, { "I8", 1 }, { "F8_E4M3", 1 }, { "F8_E5M2", 1 }, { "F8_E8M0", 1 }, { "U16", 2 }, { "I16", 2 },
        { "F16", 2 }, { "BF16", 2 }, { "U32", 4 }, { "I32", 4 }, { "F32", 4 }, { "U64", 8 }, { "I64", 8 }, { "F64", 8 } };
    for (size_t i = 0; i < sizeof type / sizeof type[0]; i++)
        if (strcmp(type[i].name, dtype) == 0) return type[i].bytes;
    return 0;
}

/* A size in the header: an integer that a double holds exactly. */
static inline int st__size(const js_value *v, int64_t *out) {
    double x = js_number(v);
    if (!js_is_number(v) || !(x >= 0 && x <= 9007199254740992.0) || x != (double)(int64_t)x) return -1;
    *out = (int64_t)x;
    return 0;
}

/* One entry of the header; `begin` is where its bytes start in the data section of n_data bytes. */
static inline int st__entry(const js_value *v, size_t n_data, st_tensor *t, int64_t *begin, const char *file, char *err, size_t err_size) {
    const js_value *shape = js_get(v, "shape"), *offsets = js_get(v, "data_offsets");
    const char *dtype = js_string(js_get(v, "dtype"));
    int64_t end;
    t->name = v->key;
    if (!js_is_object(v)) return st__fail(err, err_size, "%s: tensor '%.100s': its entry is no object", file, t->name);
    if (dtype == NULL) return st__fail(err, err_size, "%s: tensor '%.100s': dtype is missing or no string", file, t->name);
    size_t element = st__element_bytes(dtype);
    if (element == 0) return st__fail(err, err_size, "%s: tensor '%.100s': dtype '%.20s' is unknown", file, t->name, dtype);
    strcpy(t->dtype, dtype);                              /* every known name fits */
    if (!js_is_array(shape)) return st__fail(err, err_size, "%s: tensor '%.100s': shape is missing or no list", file, t->name);
    if (js_count(shape) > 8) return st__fail(err, err_size, "%s: tensor '%.100s': shape has %ld dimensions, at most 8 are supported", file, t->name, (long)js_count(shape));
    t->rank = js_count(shape);
    t->count = 1;
    for (int32_t i = 0; i < t->rank; i++) {
        if (st__size(js_at(shape, i), &t->shape[i]) != 0) return st__fail(err, err_size, "%s: tensor '%.100s': shape[%ld] is no size", file, t->name, (long)i);
        if (t->shape[i] != 0 && t->count > INT64_MAX / 8 / t->shape[i]) return st__fail(err, err_size, "%s: tensor '%.100s': shape overflows", file, t->name);
        t->count *= t->shape[i];
    }
    if (!js_is_array(offsets) || js_count(offsets) != 2 || st__size(js_at(offsets, 0), begin) != 0 || st__size(js_at(offsets, 1), &end) != 0)
        return st__fail(err, err_size, "%s: tensor '%.100s': data_offsets must be two sizes", file, t->name);
    if (*begin > end) return st__fail(err, err_size, "%s: tensor '%.100s': data_offsets end before they begin", file, t->name);
    if ((uint64_t)end > n_data)
        return st__fail(err, err_size, "%s: tensor '%.100s': data_offsets end at byte %lld, but the file holds %llu bytes of data (truncated?)", file, t->name, (long long)end, (unsigned long long)n_data);
    if (end - *begin != t->count * (int64_t)element)
        return st__fail(err, err_size, "%s: tensor '%.100s': shape and dtype need %lld bytes, data_offsets give %lld", file, t->name, (long long)(t->count * (int64_t)element), (long long)(end - *begin));
    t->bytes = (size_t)(end - *begin);
    return 0;
}

typedef struct st__extent { int64_t begin; st_tensor *tensor; } st__extent;
static inline int st__by_begin(const void *a, const void *b) {
    const st__extent *x = (const st__extent *)a, *y = (const st__extent *)b;
    if (x->begin != y->begin) return x->begin < y->begin ? -1 : 1;
    return x->tensor->bytes != y->tensor->bytes ? (x->tensor->bytes < y->tensor->bytes ? -1 : 1) : 0;   /* empty ones first */
}

static inline void st_close(st_file *f) {
    free(f->tensors); free(f->data); js_free(f->header);
    memset(f, 0, sizeof *f);
}

/* Fills f from the bytes of a file; what it has allocated after an error is st_close's. */
static inline int st__load(const unsigned char *bytes, size_t n, const char *file, st_file *f, st__extent **extents, char *err, size_t err_size) {
    uint64_t n_header = 0;
    char why[200];
    if (n < 8) return st__fail(err, err_size, "%s: the file is shorter than the 8 bytes of a header length", file);
    for (int i = 7; i >= 0; i--) n_header = n_header << 8 | bytes[i];
    if (n_header > n - 8) return st__fail(err, err_size, "%s: the header length %llu is beyond the end of the file", file, (unsigned long long)n_header);
    f->header = js_parse((const char *)bytes + 8, (size_t)n_header, why, sizeof why);
    if (f->header == NULL) return st__fail(err, err_size, "%s: header: %s", file, why);
    if (!js_is_object(f->header)) return st__fail(err, err_size, "%s: header: it must be an object", file);
    const unsigned char *data = bytes + 8 + n_header;
    size_t n_data = n - 8 - (size_t)n_header, slots = (size_t)js_count(f->header) + 1;   /* + 1: never zero bytes */
    f->tensors = (st_tensor *)calloc(slots, sizeof *f->tensors);
    *extents = (st__extent *)calloc(slots, sizeof **extents);
    f->data = (unsigned char *)malloc(n_data + 16 * slots);
    if (f->tensors == NULL || *extents == NULL || f->data == NULL) return st__fail(err, err_size, "%s: out of memory", file);
    for (int32_t i = 0; i < js_count(f->header); i++) {
        const js_value *v = js_at(f->header, i);
        if (strcmp(v->key, "__metadata__") == 0) {
            if (!js_is_object(v)) return st__fail(err, err_size, "%s: __metadata__ is no object", file);
            for (int32_t k = 0; k < js_count(v); k++)
                if (!js_is_string(js_at(v, k))) return st__fail(err, err_size, "%s: __metadata__: '%.100s' is no string", file, js_at(v, k)->key);
            continue;
        }
        st__extent *e = &(*extents)[f->n_tensors];
        e->tensor = &f->tensors[f->n_tensors];
        if (st__entry(v, n_data, e->tensor, &e->begin, file, err, err_size) != 0) return -1;
        f->n_tensors++;
    }
    /* The format allows neither overlaps nor gaps. Each tensor moves to an aligned place, whatever its offset in the file. */
    qsort(*extents, (size_t)f->n_tensors, sizeof **extents, st__by_begin);
    int64_t position = 0;
    size_t place = 0;
    for (int32_t i = 0; i < f->n_tensors; i++) {
        st_tensor *t = (*extents)[i].tensor;
        int64_t begin = (*extents)[i].begin;
        if (begin < position) return st__fail(err, err_size, "%s: tensor '%.100s': its data overlap those of '%.100s'", file, t->name, (*extents)[i - 1].tensor->name);
        if (begin > position) return st__fail(err, err_size, "%s: tensor '%.100s': unused bytes lie before its data", file, t->name);
        memcpy(f->data + place, data + begin, t->bytes);
        t->data = f->data + place;
        place += (t->bytes + 15) / 16 * 16;
        position += (int64_t)t->bytes;
    }
    if ((uint64_t)position != n_data) return st__fail(err, err_size, "%s: %llu bytes follow the last tensor", file, (unsigned long long)(n_data - (uint64_t)position));
    return 0;
}

/* 0, or -1 with one line in err that names the file; then *f is empty. The bytes are copied. */
static inline int st_open_memory(const void *bytes, size_t n, const char *name, st_file *f, char *err, size_t err_size) {
    st__extent *extents = NULL;
    memset(f, 0, sizeof *f);
    int failed = st__load((const unsigned char *)bytes, n, name, f, &extents, err, err_size);
    free(extents);
    if (failed != 0) st_close(f);
    return failed;
}

/* A whole file in memory, with a zero behind it; NULL with the reason in err. free() it. */
static inline char *st_read_file(const char *path, size_t *n, char *err, size_t err_size) {
    FILE *in = fopen(path, "rb");
    char *bytes = NULL, *more;
    size_t room = 0, got = 0;
    if (in == NULL) { st__fail(err, err_size, "%s: cannot open the file", path); return NULL; }
    do {                                                  /* doubling instead of ftell: pipes work, and sizes beyond long */
        room = room == 0 ? 65536 : room * 2;
        more = room < got ? NULL : (char *)realloc(bytes, room);
        if (more == NULL) { st__fail(err, err_size, "%s: out of memory", path); free(bytes); fclose(in); return NULL; }
        bytes = more;
        got += fread(bytes + got, 1, room - 1 - got, in);
    } while (got == room - 1);
    if (ferror(in)) { st__fail(err, err_size, "%s: cannot read the file", path); free(bytes); fclose(in); return NULL; }
    fclose(in);
    bytes[got] = '\0';
    *n = got;
    return bytes;
}

static inline int st_open(const char *path, st_file *f, char *err, size_t err_size) {
    size_t n;
    memset(f, 0, sizeof *f);
    char *bytes = st_read_file(path, &n, err, err_size);
    if (bytes == NULL) return -1;
    int failed = st_open_memory(bytes, n, path, f, err, err_size);
    free(bytes);
    return failed;
}

static inline const st_tensor *st_find(const st_file *f, const char *name) {
    int32_t low = 0, high = f->n_tensors;
    while (low < high) {
        int32_t mid = low + (high - low) / 2;
        int order = strcmp(f->tensors[mid].name, name);
        if (order == 0) return &f->tensors[mid];
        if (order < 0) low = mid + 1; else high = mid;
    }
    return NULL;
}

static inline const char *st_metadata(const st_file *f, const char *key) {
    return js_string(js_get(js_get(f->header, "__metadata__"), key));
}

#endif /* SAFETENSORS_H_INCLUDED */
