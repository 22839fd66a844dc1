/* fuzz_loader.c - arbitrary bytes as a safetensors file and as JSON: the loader either refuses them with a text, or hands
   out tensors that lie wholly in memory, do not overlap, and are found under their names. See fuzz.h for how to run it. */
#include "fuzz.h"
#include "../examples/safetensors.h"

static unsigned checksum;   /* every byte that is handed out is read, for the sanitizers to see */

static void walk_json(const js_value *v)
{
    int32_t i;
    if (js_is_string(v)) checksum += (unsigned)strlen(js_string(v));
    REQUIRE(js_count(v) == 0 || js_is_array(v) || js_is_object(v));
    for (i = 0; i < js_count(v); i++) {
        const js_value *item = js_at(v, i);
        REQUIRE(item != NULL);
        if (js_is_object(v)) REQUIRE(js_get(v, item->key) == item);
        walk_json(item);
    }
    REQUIRE(js_at(v, js_count(v)) == NULL && js_at(v, -1) == NULL);
}

static void walk_tensors(const st_file *file, size_t size)
{
    size_t total = 0;
    int32_t i;
    for (i = 0; i < file->n_tensors; i++) {
        const st_tensor *t = &file->tensors[i];
        const unsigned char *bytes = (const unsigned char *)t->data;
        int64_t count = 1;
        int32_t d;
        size_t b;
        REQUIRE(st_find(file, t->name) == t);
        REQUIRE((uintptr_t)t->data % 16 == 0);
        REQUIRE(t->rank >= 0 && t->rank <= 8);
        for (d = 0; d < t->rank; d++) count *= t->shape[d];
        REQUIRE(count == t->count && count >= 0);
        REQUIRE(count == 0 ? t->bytes == 0 : t->bytes % (size_t)count == 0);
        for (b = 0; b < t->bytes; b++) checksum += bytes[b];
        total += t->bytes;
    }
    REQUIRE(total <= size);
    walk_json(file->header);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    st_file file;
    js_value *json;
    char err[80] = "";

    if (st_open_memory(data, size, "fuzz", &file, err, sizeof err) == 0) walk_tensors(&file, size);
    else REQUIRE(err[0] != '\0' && memchr(err, '\0', sizeof err) != NULL && file.tensors == NULL);
    st_close(&file);

    err[0] = '\0';
    json = js_parse((const char *)data, size, err, sizeof err);
    if (json != NULL) walk_json(json);
    else REQUIRE(err[0] != '\0' && memchr(err, '\0', sizeof err) != NULL);
    js_free(json);
    return 0;
}
