/* device.h - what --cuda means in the tools, which is nothing unless they are built with CUDA=1. */
#ifndef DEVICE_H
#define DEVICE_H

#include <stdlib.h>
#include <string.h>
#include "../dsa.h"

#ifdef DSA_CUDA
#include <cuda_runtime_api.h>

#define DEVICE_HELP \
    "  --cuda PATH    caches on the GPU; PATH is auto, reference, portable or hopper\n"

/* The device by a path's name. 0, or -1 after a message. */
static inline int device_open(const char *tool, const char *path, dsa_cuda **cuda)
{
    static const char *const names[] = { "auto", "reference", "portable", "hopper" };
    dsa_cuda_desc desc;
    int p = 0;
    memset(&desc, 0, sizeof desc);
    while (p < 4 && strcmp(path, names[p]) != 0) p++;
    if (p == 4) {
        fprintf(stderr, "%s: --cuda wants auto, reference, portable or hopper, not %s\n", tool, path);
        return -1;
    }
    desc.path = (dsa_cuda_path)p;
    dsa_status status = dsa_cuda_create(&desc, cuda);
    if (status != DSA_OK) fprintf(stderr, "%s: --cuda: %s\n", tool, dsa_status_text(status));
    return status == DSA_OK ? 0 : -1;
}

static inline void device_close(dsa_cuda *cuda) { dsa_cuda_destroy(cuda); }

/* Memory that the host and the device address alike; NULL on failure. */
static inline void *device_shared(size_t bytes)
{
    void *p = NULL;
    return cudaMallocManaged(&p, bytes ? bytes : 1, cudaMemAttachGlobal) == cudaSuccess ? p : NULL;
}
static inline void device_shared_free(void *p) { (void)cudaFree(p); }
#else
#define DEVICE_HELP ""
static inline void device_close(dsa_cuda *cuda) { (void)cuda; }
static inline void *device_shared(size_t bytes) { (void)bytes; return NULL; }      /* nobody has a device to ask for it */
static inline void device_shared_free(void *p) { (void)p; }
#endif

#endif
