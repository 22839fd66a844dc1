#!/bin/sh
# Builds build/bench_peers with those of oneDNN, OpenBLAS and BLIS that a test program can be linked with; names the others.
# Debian: apt-get install libdnnl-dev libopenblas-dev libblis-dev. Settings: CC, CFLAGS, and in $1 the flags that CC gets besides.
cd "$(dirname "$0")/.." || exit 1
CC=${CC:-cc}
CFLAGS=${CFLAGS:--O3}
mkdir -p build
defines=
libraries=

# probe NAME MACRO 'INCLUDES AND A CALL' LIBRARIES
probe() {
    printf '%s\n' "$3" > build/probe.c
    if $CC -o build/probe build/probe.c $4 -lm >build/probe.log 2>&1; then
        echo "bench_peers: $1 found"
        defines="$defines -D$2"
        libraries="$libraries $4"
    else
        echo "bench_peers: $1 is missing, skipped ($(head -n 1 build/probe.log))"
    fi
    rm -f build/probe build/probe.c build/probe.log
}

# OpenBLAS before BLIS: both have cblas_sgemm, and BLIS is called by its own names.
probe oneDNN HAVE_ONEDNN '#include <dnnl.h>
void omp_set_num_threads(int n);
int main(void) { omp_set_num_threads(1); return dnnl_version()->major != 2; }' '-ldnnl -l:libgomp.so.1'
probe OpenBLAS HAVE_OPENBLAS '#include <cblas-openblas.h>
int main(void) { openblas_set_num_threads(1); return 0; }' -lopenblas
probe BLIS HAVE_BLIS '#include <blis.h>
int main(void) { bli_thread_set_num_threads(1); return 0; }' -lblis

set -x
$CC $CFLAGS $1 $defines -DDSA_BUILD="\"$CC $CFLAGS $1\"" -o build/bench_peers tools/bench_peers.c $libraries -lm -pthread
