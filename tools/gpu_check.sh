#!/bin/sh
# gpu_check.sh - everything that needs a GPU, in one go: builds, compares the GPU with the CPU, runs the reference files and the tiny model there,
# compute-sanitizer on small shapes, then times the device-level calls. Writes tools/results/CARD.csv (h100.csv on an H100).
#
# Settings: CUDA_ARCHS (default: the device's own), OUT (build/gpu: logs), SKIP_BUILD=1 (build/ is there already).
cd "$(dirname "$0")/.." || exit 1
OUT=${OUT:-build/gpu}
mkdir -p "$OUT" tools/results
failed=0

# step NAME COMMAND...: one line, the log's end if it fails.
step() {
    name=$1
    shift
    log=$OUT/$(echo "$name" | tr -c 'a-zA-Z0-9\n' _).log
    start=$(date +%s)
    if "$@" >"$log" 2>&1; then
        echo "ok    $name ($(($(date +%s) - start)) s)"
    else
        echo "FAIL  $name"
        tail -n 20 "$log" | sed 's/^/      /'
        failed=1
    fi
}

device=$(nvidia-smi --query-gpu=name --format=csv,noheader | head -n 1)
[ -n "$device" ] || { echo 'gpu_check: nvidia-smi names no device'; exit 1; }
arch=$(nvidia-smi --query-gpu=compute_cap --format=csv,noheader | head -n 1 | tr -d .)
[ "$arch" = 90 ] && arch=90a
paths='reference portable'
[ "$arch" = 90a ] && paths="$paths hopper"
echo "$device, compute capability $arch"

[ -n "$SKIP_BUILD" ] || step build make CUDA=1 CUDA_ARCHS="${CUDA_ARCHS:-$arch}" build/test_cuda build/conformance build/generate build/needle build/bench build/06_cuda_decode

greedy() {
    build/generate examples/tiny-dsa --prompt 'And it came to pass, that ' --tokens 200 --threads 4 --cuda "$1" | cmp - "$OUT/greedy"
}
python3 - > "$OUT/greedy" <<'END'
import json, struct, sys
data = open('examples/tiny-dsa/reference.safetensors', 'rb').read()
n = struct.unpack('<Q', data[:8])[0]
t = json.loads(data[8:8 + n])['greedy']
begin, end = (8 + n + x for x in t['data_offsets'])
sys.stdout.buffer.write(bytes(struct.unpack('<%d%s' % (t['shape'][1], {'I32': 'i', 'I64': 'q'}[t['dtype']]), data[begin:end])))
END

# 20 questions at 2048 bytes: as many right as on the CPU.
needles() {
    for where in "--cuda $1" ''; do
        build/needle examples/tiny-dsa --text examples/kjv-heldout.txt --context 2048 --queries 20 --threads 4 $where | grep '^right'
    done | tee /dev/stderr | uniq | wc -l | grep -qx 1
}

sanitized() {
    tool=$1
    path=$2
    shift 2
    for test in "$@"; do
        compute-sanitizer --tool "$tool" --error-exitcode 9 build/test_cuda -s "$path" -t "$test" || return 1
    done
}

for path in $paths; do
    step "tests, $path" build/test_cuda -s "$path" -v
    step "reference files, $path" build/conformance --cuda "$path" --threads 4 tests/vectors/*.safetensors
    step "tiny model, $path" build/conformance --cuda "$path" --threads 4 --model examples/tiny-dsa examples/tiny-dsa/reference.safetensors
    step "200 greedy bytes, $path" greedy "$path"
    step "needle, $path" needles "$path"
    if command -v compute-sanitizer >/dev/null; then
        step "memcheck, $path" sanitized memcheck "$path" device_scores_v32_fp8 device_attends_v32_fp8 device_attends_r0_fp8 device_steps_glm \
            device_steps_tiny_fp8 device_holes_v32_bf16 device_rows_of_many device_selects steps_odd
        # few launches: racecheck takes some thousand times as long
        step "racecheck, $path" sanitized racecheck "$path" device_rows_alone_tiny_fp8 device_rows_alone_v32_fp8 device_rows_alone_v32_bf16 \
            device_rows_alone_r0_fp8
    fi
done
step 'example' build/06_cuda_decode

card=$(echo "$device" | tr 'A-Z' 'a-z' | grep -oE 'h100|h200|a100|b200|l40s?|rtx ?[0-9]+' | head -n 1 | tr -d ' ')
csv=tools/results/${card:-gpu}.csv
echo 'date,device,path,case,us,must us,goal us,rate,unit,verdict' > "$csv"
for path in $paths; do
    [ "$path" = reference ] || step "bench, $path" build/bench --cuda "$path" --csv "$csv"
done
cut -d, -f3-7,10 "$csv" | sed 's/,/  /g'
exit $failed
