/* fuzz_model.c - arbitrary bytes as a model: as a config.json beside no weights, and as one file that carries its config (see
   tools/engine.h). A model is refused with a text, or it loads and reads two tokens. See fuzz.h for how to run it. */
#include "fuzz.h"
#define DSA_STATIC
#define DSA_IMPLEMENTATION
#include "../tools/engine.h"

/* Models that claim to be large get no further than loading. */
static int is_small(const engine_model *m)
{
    const dsa_config *c = &m->dsa;
    return m->n_vocab <= 4096 && m->n_layers <= 8 && c->dim_hidden <= 256 && c->n_heads <= 64 && c->dim_latent <= 256 &&
        c->dim_rope <= 256 && c->n_index_heads <= 64 && c->dim_index <= 256 && c->top_k <= 4096 && c->dim_nope <= 256 &&
        c->dim_v <= 256 && c->dim_q_lora <= 256 &&
        m->dim_inter <= 4096 && m->dim_expert <= 4096 && m->n_experts <= 256;
}

static void read_two_tokens(const engine_model *m)
{
    engine e;
    engine_options options;
    int32_t tokens[2] = { 0, 0 };
    float *logits = (float *)malloc(2 * sizeof *logits * (size_t)m->n_vocab);
    REQUIRE(logits != NULL);
    memset(&options, 0, sizeof options);
    options.max_tokens = 4;
    tokens[1] = m->n_vocab - 1;
    if (engine_open(&e, m, &options) == 0) {
        if (engine_forward(&e, tokens, 2, logits, 2, NULL) == 0) REQUIRE(e.len == 2);
        else REQUIRE(e.error[0] != '\0');
    } else {
        REQUIRE(e.error[0] != '\0');
    }
    engine_close(&e);
    free(logits);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    static const char empty[] = "\2\0\0\0\0\0\0\0{}";
    static engine_model model;
    st_file file;
    js_value *config;
    char err[200] = "";

    if (st_open_memory(data, size, "fuzz", &file, err, sizeof err) == 0) {
        if (engine_load_file(&model, &file, "fuzz", 0) != 0) REQUIRE(model.error[0] != '\0');
        else if (is_small(&model)) read_two_tokens(&model);
        engine_unload(&model);
    }
    st_close(&file);

    config = js_parse((const char *)data, size, err, sizeof err);
    if (config != NULL && st_open_memory(empty, 10, "empty", &file, err, sizeof err) == 0) {
        memset(&model, 0, sizeof model);
        REQUIRE(engine__load(&model, &file, "empty", config, "config", 0) != 0 && model.error[0] != '\0');
        engine_unload(&model);
        st_close(&file);
    }
    js_free(config);
    return 0;
}
