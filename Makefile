# dsa.h needs no build: it is one header. This builds its tools, tests and examples into build/.
# `make` alone prints the targets. A C compiler and make are enough for all of them except check and BLIS=1.

CC ?= cc
CFLAGS ?= -O3
WARN = -std=c99 -Wall -Wextra -pedantic -Wconversion
LIBS = -lm -pthread

# BLIS=1: the tools' dense projections through BLIS (Debian: libblis-dev) instead of the built-in GEMM.
BLIS_CFLAGS_1 = -DDSA_BLIS
BLIS_LIBS_1 = -lblis
BLIS_CFLAGS = $(BLIS_CFLAGS_$(BLIS))
BLIS_LIBS = $(BLIS_LIBS_$(BLIS))

# CUDA=1: tools that know --cuda, with build/dsa_cuda.o. nvcc comes from CUDA_HOME or PATH; CUDA_ARCHS are its architectures, and the
# first one goes in as PTX too, which newer devices than those named compile when they load it.
NVCC = $(if $(CUDA_HOME),$(CUDA_HOME)/bin/nvcc,nvcc)
CUDA_ARCHS = 80 90a 120
CUDA_FLAGS = -std=c++17 -O3 $(foreach a,$(CUDA_ARCHS),-gencode=arch=compute_$(a),code=sm_$(a)) \
	-gencode=arch=compute_$(firstword $(CUDA_ARCHS)),code=compute_$(firstword $(CUDA_ARCHS))
CUDA_ROOT = $(if $(CUDA_HOME),$(CUDA_HOME),$(patsubst %/bin/,%,$(dir $(shell command -v nvcc))))
CUDA_LINK = build/dsa_cuda.o -L$(CUDA_ROOT)/lib64 -lcudart_static -lstdc++ -ldl -lrt
CUDA_OBJECT_1 = build/dsa_cuda.o
CUDA_CFLAGS_1 = -DDSA_CUDA -isystem $(CUDA_ROOT)/include
CUDA_LIBS_1 = $(CUDA_LINK)

BUILD = $(CC) $(CFLAGS) $(WARN)
TOOLS = build/conformance build/generate build/needle build/demo build/bench build/quality build/heatmap
EXAMPLES = build/01_quick_start build/02_paged_attention build/03_decode_step build/04_layer build/05_sharded_attention
TEST_OBJECTS = build/impl.o build/main.o $(patsubst tests/%.c,build/%.o,$(filter-out %/test_cuda.c,$(sort $(wildcard tests/test_*.c))))
TEST_HEADERS = dsa.h tests/harness.h tests/brute.h tests/fixture.h tests/ref_layer.h examples/safetensors.h
TOOL_HEADERS = dsa.h tools/engine.h tools/needle.h tools/blis.h tools/conformance_kernels.h tools/conformance_model.h \
	tools/conformance_layers.h tools/conformance_report.h tools/bench.h tools/bench_data.h tools/device.h tools/bench_cuda.h examples/safetensors.h

help:
	@echo 'make tools        build/conformance build/generate build/needle build/demo build/bench build/quality build/heatmap'
	@echo 'make demo         a trained model finds facts in a long text (under 3 minutes)'
	@echo 'make train        train a small DSA model from nothing (2 to 10 minutes): build/recall'
	@echo 'make test         build and run the test suite (under 5 minutes)'
	@echo 'make check        compile matrix, sanitizers, qemu, fuzzing, examples, conformance (about 8 minutes)'
	@echo 'make bench        time the library beside what this machine can do (2 minutes)'
	@echo 'make bench-backward  each backward call beside its forward, 20 seconds'
	@echo 'make bench-sweep  one layer from 1K to 1M tokens, dense beside DSA: build/sweep.csv, build/sweep.png'
	@echo 'make bench-peers  the same work by the GEMMs of oneDNN, OpenBLAS and BLIS, where they are installed'
	@echo 'make examples     build the numbered examples'
	@echo 'make shared       build/libdsa.so, for tools/python'
	@echo 'make engine-ggml  build/engine_ggml, dsa.h as an operation of ggml (fetched from PyPI into build/ggml)'
	@echo 'make mpi          build/context_parallel_mpi, one sequence over MPI ranks (Debian: libopenmpi-dev, openmpi-bin)'
	@echo 'make conformance  compare the library with the reference vectors'
	@echo 'make cuda         build/dsa_cuda.o, the GPU part (nvcc on PATH or in CUDA_HOME)'
	@echo 'make test-cuda    compare the GPU with the CPU'
	@echo 'make clean        remove build/'
	@echo 'Settings: CC=cc CFLAGS=-O3, BLIS=1 for the tools with BLIS, CUDA=1 for the tools with --cuda, CUDA_ARCHS="80 90a 120"'

tools: $(TOOLS)

demo: build/demo
	build/demo $(if $(CUDA),--cuda auto)

# Stopped by Ctrl-C, it goes on at the next make train; rm -r build/recall begins anew.
train: build/train_dsa
	build/train_dsa --out build/recall --log build/recall.csv `test ! -f build/recall/state.safetensors || echo --resume`

test: build/test
	build/test

check: build/test $(TOOLS)
	CC='$(CC)' sh tests/check.sh

bench: build/bench
	build/bench

bench-backward: build/bench_backward
	build/bench_backward

bench-sweep: build/bench
	build/bench --sweep build/sweep.csv
	python3 tools/plot.py build/sweep.csv build/sweep.png

bench-peers:
	CC='$(CC)' CFLAGS='$(CFLAGS)' sh tools/bench_peers.sh '$(WARN)'
	build/bench_peers

examples: $(EXAMPLES)

shared: build/libdsa.so

build/libdsa.so: tools/python/dsa_shared.c dsa.h build/flags
	$(BUILD) -shared -fPIC -o $@ $< $(LIBS)

# ggml's headers and libraries from the package libggml-python, whose version is the one that the example was written for.
engine-ggml:
	@mkdir -p build
	[ -d build/ggml/libggml ] || python3 -m pip install -q --no-deps --target build/ggml libggml-python==0.20.2.post1
	$(BUILD) -isystem build/ggml/libggml/include -o build/engine_ggml examples/engine_ggml.c \
		-Lbuild/ggml/libggml/lib64 -lggml -lggml-cpu -lggml-base -Wl,-rpath,'$$ORIGIN/ggml/libggml/lib64' $(LIBS)

mpi:
	@mkdir -p build
	OMPI_CC='$(CC)' mpicc $(CFLAGS) $(WARN) -o build/context_parallel_mpi examples/context_parallel_mpi.c $(LIBS)

conformance: build/conformance
	build/conformance tests/vectors/*.safetensors tests/vectors/models/*.safetensors
	build/conformance --model examples/tiny-dsa examples/tiny-dsa/reference.safetensors

cuda: build/dsa_cuda.o

test-cuda: build/test_cuda
	build/test_cuda

build/dsa_cuda.o: dsa_cuda.cu dsa.h build/cuda_flags
	$(NVCC) $(CUDA_FLAGS) -c -o $@ $<

build/test_cuda: tests/test_cuda.c build/impl.o build/dsa_cuda.o $(TEST_HEADERS)
	$(BUILD) -isystem $(CUDA_ROOT)/include -o $@ $< build/impl.o $(CUDA_LINK) $(LIBS)

build/06_cuda_decode: examples/06_cuda_decode.c dsa.h build/dsa_cuda.o build/flags
	$(BUILD) -DDSA_CUDA -o $@ $< $(CUDA_LINK) $(LIBS)

clean:
	rm -rf build

# Rewritten when the compiler or its flags change, so that nothing built with other ones is kept.
build/flags: always
	@mkdir -p build
	@echo '$(BUILD) $(BLIS_CFLAGS) $(CUDA)' | cmp -s - $@ || echo '$(BUILD) $(BLIS_CFLAGS) $(CUDA)' > $@
build/cuda_flags: always
	@mkdir -p build
	@echo '$(NVCC) $(CUDA_FLAGS)' | cmp -s - $@ || echo '$(NVCC) $(CUDA_FLAGS)' > $@
always:

build/test: $(TEST_OBJECTS)
	$(CC) $(CFLAGS) -o $@ $(TEST_OBJECTS) $(LIBS)

$(TEST_OBJECTS): build/%.o: tests/%.c $(TEST_HEADERS) build/flags
	$(BUILD) -c -o $@ $<

$(TOOLS): build/%: tools/%.c $(TOOL_HEADERS) build/flags $(CUDA_OBJECT_$(CUDA))
	$(BUILD) $(BLIS_CFLAGS) $(CUDA_CFLAGS_$(CUDA)) -DDSA_BUILD='"$(BUILD)"' -o $@ $< $(BLIS_LIBS) $(CUDA_LIBS_$(CUDA)) $(LIBS)

build/bench_backward: tools/bench_backward.c dsa.h build/flags
	$(BUILD) -o $@ $< $(LIBS)

build/train_dsa: examples/train_dsa.c $(TOOL_HEADERS) build/flags
	$(BUILD) -o $@ $< $(LIBS)

$(EXAMPLES): build/%: examples/%.c dsa.h examples/safetensors.h build/flags
	$(BUILD) -o $@ $< $(LIBS)

.PHONY: help tools demo train test check bench bench-backward bench-sweep bench-peers examples mpi shared engine-ggml conformance cuda test-cuda clean always
