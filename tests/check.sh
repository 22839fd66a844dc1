#!/bin/sh
# make check: what `make test` leaves out because it needs more than a C compiler or more time. Works in build/check.
# Each step prints one line; a step whose tool is missing is named as skipped. Ends with `N passed, N failed`.
#
# Settings: CC, FUZZ_SECONDS (10, per target). Two lanes of steps run side by side, for two cores.
cd "$(dirname "$0")/.." || exit 1
CC=${CC:-cc}
FUZZ_SECONDS=${FUZZ_SECONDS:-10}
STRICT='-Wall -Wextra -pedantic -Wconversion -Werror'
OUT=build/check
rm -rf $OUT
mkdir -p $OUT
: > $OUT/results

have() { command -v "$1" >/dev/null 2>&1; }

# step NAME COMMAND...: runs it with its output in a log, which is shown only if it fails.
step() {
    name=$1
    shift
    log=$OUT/$(echo "$name" | tr -c 'a-zA-Z0-9\n' _).log
    start=$(date +%s)
    if "$@" >"$log" 2>&1; then
        echo "ok    $name ($(($(date +%s) - start)) s)"
        echo passed >> $OUT/results
    else
        echo "FAIL  $name, the end of $log:"
        tail -n 25 "$log" | sed 's/^/      /'
        echo failed >> $OUT/results
    fi
}

# needs TOOL NAME: names a step that cannot run here.
needs() {
    have "$1" && return 0
    echo "skip  $2: $1 is missing"
    return 1
}

# ---- compile and link ----------------------------------------------------------------------------

# The implementation on its own, warnings as errors. -O2, since some warnings need the optimiser's view.
matrix() {
    cc=$1
    language=$2
    std=$3
    $cc -x "$language" -std="$std" -O2 $STRICT -c tests/compile/implementation.c -o $OUT/matrix_"$cc"_"$std".o &&
    $cc -x "$language" -std="$std" -O2 $STRICT -c tests/compile/declarations.c -o $OUT/uses_"$cc"_"$std".o &&
    $cc $OUT/matrix_"$cc"_"$std".o $OUT/uses_"$cc"_"$std".o -lm -pthread -o $OUT/linked_"$cc"_"$std" &&
    $OUT/linked_"$cc"_"$std"
}

# One option macro at a time, or the flags of another target.
option() {
    object=$OUT/option_$(echo "$*" | tr -c 'a-zA-Z0-9\n' _).o
    $CC -std=c99 -O1 $STRICT "$@" -c tests/compile/implementation.c -o "$object"
}

# Flags that would break the contracts are errors with a sentence, in the file with the implementation only.
refused() {
    for flag in "$@"; do
        if $CC -std=c99 -O1 "$flag" -c tests/compile/implementation.c -o $OUT/refused.o 2>$OUT/refused.txt; then
            echo "$flag was accepted"
            return 1
        fi
        grep -q 'without -ffast-math' $OUT/refused.txt && $CC -std=c99 -O1 "$flag" -c tests/compile/declarations.c -o $OUT/refused.o || return 1
    done
}

two_static_copies() {
    $CC -std=c99 -O1 $STRICT tests/compile/static_main.c tests/compile/static_other.c -lm -pthread -o $OUT/two_static && $OUT/two_static
}

# C calls a library built as C++, and C++ one built as C.
across_languages() {
    $CC -std=c99 -O1 -c tests/compile/declarations.c -o $OUT/across_c.o &&
    $CC -std=c99 -O1 -c tests/compile/implementation.c -o $OUT/across_impl_c.o &&
    c++ -x c++ -O1 -c tests/compile/declarations.c -o $OUT/across_cxx.o &&
    c++ -x c++ -O1 -c tests/compile/implementation.c -o $OUT/across_impl_cxx.o &&
    c++ $OUT/across_c.o $OUT/across_impl_cxx.o -lm -pthread -o $OUT/across_1 && $OUT/across_1 &&
    c++ $OUT/across_cxx.o $OUT/across_impl_c.o -lm -pthread -o $OUT/across_2 && $OUT/across_2
}

# A library may not print, exit, or keep state: it defines dsa_ functions only, and calls nothing but this list.
symbols() {
    allowed='mem(cpy|set|move|cmp)|strlen|malloc|free|__stack_chk_fail|_GLOBAL_OFFSET_TABLE_'
    allowed="$allowed|v?snprintf|__v?snprintf_chk|__mem(cpy|set|move)_chk|pthread_[a-z_]+"
    allowed="$allowed|(exp|exp2|log|log2|sqrt|pow|sin|cos|sincos|ceil|floor|fabs|fma|ldexp|frexp|rint|nearbyint|lrint|isnan)f?"
    $CC -std=c99 -O2 -c tests/compile/implementation.c -o $OUT/symbols.o || return 1
    if nm -g --defined-only $OUT/symbols.o | awk '{ print $3 }' | grep -vE '^dsa_[a-z]'; then
        echo 'defined above, but not a public dsa_ function'
        return 1
    fi
    if nm -u $OUT/symbols.o | awk '{ print $2 }' | grep -vxE "$allowed"; then
        echo 'called above, but not on the list'
        return 1
    fi
    if nm $OUT/symbols.o | grep -E ' [BbDCc] '; then
        echo 'writable data above: global state'
        return 1
    fi
}

# The GPU part compiles for every architecture, and what uses it links.
cuda_compiles() {
    make -s cuda CUDA_ARCHS="80 90a 120" && make -s build/test_cuda build/06_cuda_decode
}

without_symbols() {
    $CC -std=c99 -O2 "$1" -c tests/compile/implementation.c -o $OUT/without.o || return 1
    ! nm -u $OUT/without.o | grep -E "$2"
}

# Builds the whole test program as $1 with the rest as compiler and flags.
build_tests() {
    program=$1
    shift
    "$@" -std=c99 -Wall -Wextra tests/impl.c tests/main.c $(ls tests/test_*.c | grep -v test_cuda) -lm -pthread -o "$program"
}

# ---- sanitizers, other machines, fuzzing ---------------------------------------------------------

sanitized() {
    build_tests $OUT/test_asan $CC -g -O1 -fno-omit-frame-pointer -fsanitize=address,undefined,float-cast-overflow \
        -fno-sanitize-recover=all && $OUT/test_asan
}

# A shorter run than -n 1000000, which takes a few minutes.
soak() {
    $CC -std=c99 -g -O1 -Wall -Wextra -fsanitize=address,undefined -fno-sanitize-recover=all tests/soak_pages.c -lm -pthread \
        -o $OUT/soak_pages && $OUT/soak_pages -n 10000
}

threads_sanitized() {
    build_tests $OUT/test_tsan $CC -g -O1 -fsanitize=thread && TSAN_OPTIONS=halt_on_error=1 $OUT/test_tsan -s threads &&
    TSAN_OPTIONS=halt_on_error=1 $OUT/test_tsan -s backward -t layer
}

# A 32-bit size_t finds sizes kept in too narrow or too wide a type.
on_32_bits() {
    build_tests $OUT/test_32 "$@" -O2 -static && $OUT/test_32
}

on_aarch64() {
    build_tests $OUT/test_arm64 aarch64-linux-gnu-gcc -O2 -static && DSA_TEST_ISA=neon qemu-aarch64 $OUT/test_arm64 &&
        grep -q '(neon)' "$log" && qemu-aarch64 -cpu cortex-a53 $OUT/test_arm64 -s score               # a CPU without the dot-product extension
}

fuzzed() {
    target=$1
    corpus=$2
    mkdir -p $OUT/corpus_"$target"
    clang -g -O1 -DFUZZ_LIBFUZZER -fsanitize=fuzzer,address,undefined,float-cast-overflow -fno-sanitize-recover=all \
        tests/"$target".c -lm -pthread -o $OUT/"$target" &&
    $OUT/"$target" -max_total_time="$FUZZ_SECONDS" -timeout=20 -artifact_prefix=$OUT/ $OUT/corpus_"$target" "$corpus"
}

# Without libFuzzer: the same targets on the corpus and on pseudo-random inputs.
fuzzed_plainly() {
    $CC -std=c99 -g -O1 -fsanitize=address,undefined -fno-sanitize-recover=all tests/"$1".c -lm -pthread -o $OUT/"$1"_plain &&
    $OUT/"$1"_plain -n 20000 "$2"/*
}

# ---- what users run ------------------------------------------------------------------------------

# The very line that the head comment gives, in a folder that looks like the repository's root.
example() {
    mkdir -p $OUT/root && ln -sfn "$PWD/examples" $OUT/root/examples && ln -sfn "$PWD/dsa.h" $OUT/root/dsa.h &&
    line=$(sed -n 's/^ *\(cc -O2 .*\)$/\1/p' examples/"$1".c | head -n 1) && [ -n "$line" ] &&
    (cd $OUT/root && sh -c "$line") && [ "$(wc -l < examples/"$1".c)" -lt 150 ]
}

# One sequence over 1 to 8 MPI ranks: the same lists whatever the number (the program compares outputs itself), also where ranks hold
# nothing; and a rank that dies ends the run with an error, not with a hang.
mpi() {
    run="mpirun --oversubscribe"
    [ "$(id -u)" != 0 ] || run="$run --allow-run-as-root"
    mpicc -std=c99 -O2 $STRICT examples/context_parallel_mpi.c -lm -pthread -o $OUT/context_parallel || return 1
    for rows in 4000 3; do
        for ranks in 1 2 3 4 8; do
            timeout 100 $run -n $ranks $OUT/context_parallel --rows $rows > $OUT/mpi.txt || { cat $OUT/mpi.txt; return 1; }
            grep '^hash' $OUT/mpi.txt >> $OUT/mpi_hashes_$rows.txt || return 1
        done
        [ "$(sort -u $OUT/mpi_hashes_$rows.txt | wc -l)" = 1 ] || { echo 'the lists depend on the number of ranks'; return 1; }
    done
    for rank in 0 2; do
        timeout 60 $run -n 3 $OUT/context_parallel --rows 4000 --die $rank
        ended=$?
        [ $ended != 0 ] && [ $ended != 124 ] || { echo "rank $rank died, and mpirun's status is $ended"; return 1; }
    done
}

# The calls of FlashMLA and DeepGEMM through the shared library, against NumPy.
peers_in_python() {
    $CC -std=c99 -O3 $STRICT -shared -fPIC tools/python/dsa_shared.c -lm -pthread -o $OUT/libdsa.so &&
    DSA_LIBRARY=$OUT/libdsa.so PYTHONDONTWRITEBYTECODE=1 python3 tools/python/test_peers.py
}

# dsa.h as an operation of ggml, against ggml's own attention.
in_ggml() {
    make engine-ggml CC="$CC" && build/engine_ggml
}

conformance() {
    "$@" tests/vectors/*.safetensors tests/vectors/models/*.safetensors && "$@" --model examples/tiny-dsa examples/tiny-dsa/reference.safetensors
}

with_blis() {
    $CC -std=c99 -O2 $STRICT -DDSA_BLIS tools/conformance.c -lblis -lm -pthread -o $OUT/conformance_blis &&
    conformance $OUT/conformance_blis
}

# The README's quick start is that of the first example, and its table names every public function.
readme() {
    sed -n '/The quick start: describe/,/workspace_size = sizeof workspace/p' examples/01_quick_start.c | sed 's/^    //' > $OUT/quick_start
    sed -n '/^```c$/,/^```$/p' README.md | sed '1d;$d' | cmp - $OUT/quick_start && [ -s $OUT/quick_start ] || return 1
    for call in $(grep '^DSA_API ' dsa.h | grep -oE '\bdsa_[a-z0-9][a-z0-9_]*\(' | tr -d '(' | sort -u); do
        grep -q "\`$call\`" README.md || { echo "README.md does not name $call"; return 1; }
    done
}

# The tool itself, not only its engine, continues the reference's prompt with the reference's bytes.
greedy() {
    python3 - > $OUT/greedy <<'END'
import json, struct, sys
data = open('examples/tiny-dsa/reference.safetensors', 'rb').read()
n = struct.unpack('<Q', data[:8])[0]
t = json.loads(data[8:8 + n])['greedy']
begin, end = (8 + n + x for x in t['data_offsets'])
sys.stdout.buffer.write(bytes(struct.unpack('<%d%s' % (t['shape'][1], {'I32': 'i', 'I64': 'q'}[t['dtype']]), data[begin:end])))
END
    build/generate examples/tiny-dsa --prompt 'And it came to pass, that ' --tokens 200 --threads 2 | cmp - $OUT/greedy
}

# exits STATUS COMMAND...: with that status, and, where it is 2, one line on standard error that names the culprit in $culprit.
exits() {
    want=$1
    shift
    "$@" >$OUT/stdout 2>$OUT/stderr
    got=$?
    [ $got = "$want" ] || { echo "status $got instead of $want: $*"; return 1; }
    [ "$want" != 2 ] || grep -q -- "$culprit" $OUT/stderr || { echo "no '$culprit' on standard error: $*"; return 1; }
}

# Every query selects min(k, what it sees): 200 queries with k = 64 make 10784 a layer, no token more often than queries see it. The files
# are well formed.
heatmap() {
    build/heatmap examples/tiny-dsa --text examples/kjv-heldout.txt --context 200 --svg $OUT/map.svg --html $OUT/map.html --counts \
        > $OUT/counts.csv &&
    awk -F, 'NR > 1 { sum[$1] += $5; if ($5 > $4) bad = 1; n++ } END { for (l in sum) if (sum[l] != 10784) bad = 1; exit bad || n != 800 }' \
        $OUT/counts.csv && build/heatmap examples/tiny-dsa --prompt 'In the beginning' --layer 2 | grep -q 'layer 2' &&
    grep -q '<svg' $OUT/map.html && python3 -c "import xml.dom.minidom; xml.dom.minidom.parse('$OUT/map.svg')"
}

# The cost model has the shape of the published curves; its CSV is one that plot.py reads, and that it can be compared with: itself, ratio 1.
costs() {
    python3 tools/cost.py --check && python3 tools/cost.py --config glm-5 --price 16 > /dev/null &&
    python3 tools/cost.py --layer --config tiny --hardware 'test,0.2,30' --chunk 32 --csv $OUT/cost.csv > /dev/null &&
    python3 tools/plot.py $OUT/cost.csv $OUT/cost.png && python3 tools/cost.py --layer --config tiny --hardware 'test,0.2,30' \
        --measured $OUT/cost.csv | awk 'NR > 1 { n++; if ($7 != "1.00") bad = 1 } END { exit bad || n != 32 }' || return 1
    culprit=nonsense exits 2 python3 tools/cost.py --config nonsense
}

# Statuses of the tools, and what they say of broken files. tests/fuzz_loader.c has the hostile ones.
statuses() {
    rm -rf $OUT/model && mkdir -p $OUT/model && cp examples/tiny-dsa/config.json $OUT/model
    for tool in conformance generate needle demo quality heatmap; do
        exits 0 build/$tool --help && culprit=--nonsense exits 2 build/$tool --nonsense 1 || return 1
        ! build/$tool --help >/dev/full 2>/dev/null || { echo "$tool does not notice that its output is lost"; return 1; }
    done
    culprit=model.safetensors exits 2 build/generate $OUT/model --prompt x --tokens 1 || return 1
    head -c 7000000 examples/tiny-dsa/model.safetensors > $OUT/model/model.safetensors
    culprit=truncated exits 2 build/generate $OUT/model --prompt x --tokens 1 &&
    culprit=truncated exits 2 build/conformance --model $OUT/model examples/tiny-dsa/reference.safetensors || return 1
    cp examples/tiny-dsa/model.safetensors $OUT/model
    sed 's/"kv_lora_rank": 128/"kv_lora_rank": 64/' examples/tiny-dsa/config.json > $OUT/model/config.json
    culprit=kv_a exits 2 build/generate $OUT/model --prompt x --tokens 1 || return 1
    sed 's/"deepseek_v32"/"llama"/' examples/tiny-dsa/config.json > $OUT/model/config.json
    culprit=unsupported exits 2 build/needle $OUT/model --text examples/kjv-heldout.txt --context 512 &&
    culprit=unsupported exits 2 build/conformance examples/tiny-dsa/model.safetensors
}

# The tensors of two models that differ, by name: what a stage has trained.
differing() {
    python3 - $1/model.safetensors $2/model.safetensors <<'END'
import json, struct, sys
def tensors(path):
    data = open(path, 'rb').read()
    n = struct.unpack('<Q', data[:8])[0]
    header = json.loads(data[8:8 + n])
    return {k: data[8 + n + v['data_offsets'][0]:8 + n + v['data_offsets'][1]] for k, v in header.items() if k != '__metadata__'}
a, b = map(tensors, sys.argv[1:])
assert a.keys() == b.keys()
print('\n'.join(sorted(k for k in a if a[k] != b[k])))
END
}

# A few steps of each stage under sanitizers: the same bits whether it was stopped or not and whatever the threads; the warm-up trains all
# of the indexers and nothing else, the dense stage all but them, the sparse stage everything; the result loads; what is broken or occupied
# is refused; where nothing can be written, and when it is killed while it saves, what was there before stays whole.
trains() {
    rm -rf $OUT/run && mkdir -p $OUT/run &&
    $CC -std=c99 -g -O1 $STRICT -fsanitize=address,undefined -fno-sanitize-recover=all examples/train_dsa.c -lm -pthread \
        -o $OUT/train || return 1
    train="$OUT/train --eval 0 --out $OUT/run"
    small='--context 64 --batch 256 --topk 8'
    $train/whole --threads 1 --steps 4,3,3 --eval 2 $small && $train/none --steps 0,0,0 $small &&
    exits 1 $train/parts --threads 2 --stop 3 --steps 4,3,3 $small &&
    exits 1 $train/parts --resume --stop 5 --log $OUT/run/log.csv || return 1
    # a disk that is full: status 2, the old files, no rest of new ones; and then a run that is killed again and again while it saves
    cp -r $OUT/run/parts $OUT/run/kept &&
    (trap '' XFSZ && ulimit -f 100 && culprit='still whole' exits 2 $train/parts --resume) &&
    diff -r $OUT/run/parts $OUT/run/kept || return 1
    for delay in 0.31 0.43 0.55; do
        timeout -s KILL $delay $train/kept --resume --save 0 >/dev/null 2>&1
        build/generate $OUT/run/kept --prompt abc --tokens 1 >/dev/null || { echo 'a killed run left a broken model'; return 1; }
    done
    for run in parts kept; do
        $train/$run --resume --threads 3 && cmp $OUT/run/whole/state.safetensors $OUT/run/$run/state.safetensors &&
        cmp $OUT/run/whole/model.safetensors $OUT/run/$run/model.safetensors || return 1
    done
    # who learns when
    $train/dense --steps 4,0,0 $small && $train/warm --steps 4,3,0 $small || return 1
    all=$(differing $OUT/run/none $OUT/run/whole) && dense=$(differing $OUT/run/none $OUT/run/dense) &&
    warm=$(differing $OUT/run/dense $OUT/run/warm) || return 1
    [ "$(echo "$all" | wc -l)" = 37 ] && [ "$dense" = "$(echo "$all" | grep -v indexer)" ] &&
        [ "$warm" = "$(echo "$all" | grep indexer)" ] ||
        { echo "a stage trains what it should not, or not all that it should:"; echo "dense: $dense"; echo "warm-up: $warm"; return 1; }
    $train/text --text examples/kjv-heldout.txt --model examples/tiny-dsa --reset-indexer --steps 0,1,1 --context 256 --batch 256 &&
    build/generate $OUT/run/text --prompt abc --tokens 3 >/dev/null || return 1
    # refused: another folder's model, another run, other text, broken states
    culprit='is there already' exits 2 $train/whole $small && culprit=--topk exits 2 $train/whole --resume --topk 4 &&
    culprit='needed again' exits 2 $train/text --resume && culprit='another text' exits 2 $train/text --resume --text README.md || return 1
    head -c 100000 $OUT/run/whole/state.safetensors > $OUT/run/parts/state.safetensors
    culprit=truncated exits 2 $train/parts --resume &&
    cp $OUT/run/whole/model.safetensors $OUT/run/parts/state.safetensors && culprit='no state' exits 2 $train/parts --resume &&
    culprit=--nonsense exits 2 $OUT/train --nonsense 1 && culprit=--out exits 2 $OUT/train && exits 0 $OUT/train --help
}

# Every test that the table of faults names is there.
faults() {
    build/test -l | sed 's/ *$//' > $OUT/tests.txt
    sed -n '2,/^$/d; /^ *[0-9]\{1,2\} /p; /^SUITE/q' tests/test_faults.c | sed -E 's/.{29}//' | grep -oE '\b[a-z0-9]+(_[a-z0-9]+){2,}\b' | sort -u > $OUT/named.txt
    [ "$(sed -n '/^ *[0-9]\{1,2\} [a-zA-Z0-9]/p' tests/test_faults.c | head -n 25 | wc -l)" = 25 ] && [ "$(wc -l < $OUT/named.txt)" -gt 40 ] || return 1
    while read -r wanted; do
        grep -q "^  $wanted" $OUT/tests.txt || { echo "no test is called $wanted"; return 1; }
    done < $OUT/named.txt
}

sections() {
    python3 tools/sections.py dsa.h --split $OUT/split && $CC -std=c99 -O1 $STRICT -c $OUT/split/dsa.c -o $OUT/split/dsa.o
}

# ---- the steps, in two lanes ---------------------------------------------------------------------

lane_1() {
    for cc in gcc clang; do
        needs $cc "compile matrix, $cc" || continue
        for std in c99 c11 c17; do step "$cc -std=$std" matrix $cc c $std; done
    done
    for cc in g++ clang++; do
        needs $cc "compile matrix, $cc" && step "$cc -std=c++17" matrix $cc c++ c++17
    done
    for macro in $(grep -oE '\bDSA_NO_[A-Z]+\b' dsa.h | sort -u) DSA_STATIC; do step "-D$macro" option -D"$macro"; done
    step '-DDSA_ASSERT=assert' option -include assert.h -DDSA_ASSERT=assert
    step 'no -ffast-math' refused -ffast-math -ffinite-math-only -Ofast
    step '-O0' option -O0
    step '-O3 -march=native' option -O3 -march=native
    step 'two DSA_STATIC copies' two_static_copies
    if have nvcc || [ -n "$CUDA_HOME" ]; then step 'dsa_cuda.cu for sm_80, sm_90a, sm_120' cuda_compiles; fi
    step '-DDSA_CUDA' option -DDSA_CUDA
    needs c++ 'C and C++ linked' && step 'C and C++ linked' across_languages
    needs nm 'exported symbols' && {
        step 'exported symbols' symbols
        step 'DSA_NO_MALLOC calls no malloc' without_symbols -DDSA_NO_MALLOC 'malloc|calloc|realloc|free'
        step 'DSA_NO_THREADS calls no pthread' without_symbols -DDSA_NO_THREADS pthread
    }
    needs python3 'sections of dsa.h' && step 'sections of dsa.h' sections
    for source in examples/[0-9]*.c; do
        case $source in *_cuda_*) continue ;; esac               # needs a GPU: tools/gpu_check.sh
        step "example $(basename "$source" .c)" example "$(basename "$source" .c)"
    done
    if have python3 && python3 -c 'import numpy' 2>/dev/null; then
        step 'FlashMLA and DeepGEMM calls in Python' peers_in_python
    else
        echo 'skip  FlashMLA and DeepGEMM calls in Python: python3 or numpy is missing'
    fi
    if [ -d build/ggml/libggml ]; then
        step 'inside ggml' in_ggml
    else
        echo 'skip  inside ggml: build/ggml is missing (make engine-ggml fetches it)'
    fi
    needs mpicc 'context parallelism over MPI' && needs mpirun 'context parallelism over MPI' && step 'context parallelism over MPI' mpi
    step 'README' readme
    step 'statuses of the tools' statuses
    if have python3 && python3 -c 'import matplotlib' 2>/dev/null; then
        step 'costs' costs
    else
        echo 'skip  costs: python3 or matplotlib is missing'
    fi
    needs python3 'heatmap' && step 'heatmap' heatmap
    needs python3 'generate, greedy bytes' && step 'generate, greedy bytes' greedy
    step 'tests of the 25 faults' faults
    step 'conformance' conformance build/conformance
    if [ -e /usr/include/blis.h ] || [ -e "/usr/include/$(uname -m)-linux-gnu/blis.h" ]; then
        step 'conformance with BLIS' with_blis
    else
        echo 'skip  conformance with BLIS: blis.h is missing'
    fi
    if have clang && echo 'int LLVMFuzzerTestOneInput(void); int LLVMFuzzerTestOneInput(void) { return 0; }' |
            clang -x c -fsanitize=fuzzer - -o $OUT/probe 2>/dev/null; then
        step 'fuzz the loader' fuzzed fuzz_loader tests/corpus/loader
        step 'fuzz the calls' fuzzed fuzz_calls tests/corpus/calls
        step 'fuzz the models' fuzzed fuzz_model tests/corpus/model
    else
        echo 'skip  libFuzzer: clang or its runtime is missing; the targets run as plain programs'
        step 'fuzz the loader, plainly' fuzzed_plainly fuzz_loader tests/corpus/loader
        step 'fuzz the calls, plainly' fuzzed_plainly fuzz_calls tests/corpus/calls
        step 'fuzz the models, plainly' fuzzed_plainly fuzz_model tests/corpus/model
    fi
    needs python3 'train_dsa under ASan and UBSan' && step 'train_dsa under ASan and UBSan' trains
    step 'soak the pages' soak
}

lane_2() {
    step 'tests under ASan and UBSan' sanitized
    step 'threads under TSan' threads_sanitized
    needs aarch64-linux-gnu-gcc 'tests on AArch64' && needs qemu-aarch64 'tests on AArch64' &&
        step 'tests on AArch64 under qemu' on_aarch64
    if have i686-linux-gnu-gcc; then
        step 'tests on 32 bits' on_32_bits i686-linux-gnu-gcc
    elif echo 'int main(void) { return 0; }' | $CC -m32 -x c - -o $OUT/probe_32 2>/dev/null; then
        step 'tests on 32 bits' on_32_bits $CC -m32
    else
        echo 'skip  tests on 32 bits: i686-linux-gnu-gcc or cc -m32 is missing'
    fi
}

lane_1 &
lane_2
wait

passed=$(grep -c passed $OUT/results)
failed=$(grep -c failed $OUT/results)
echo "$passed passed, $failed failed"
[ "$failed" = 0 ]
