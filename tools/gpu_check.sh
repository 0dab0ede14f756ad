#!/usr/bin/env bash
# What a CUDA card says of this code: tests/gpu, then a short benchmark, and one table last. Ends by itself.
#
#   bash tools/gpu_check.sh [--logs DIR] [--seconds N] [--benchmark N] [WHEELS]
#
# WHEELS       a folder of wheels, where there is no package index: they are put into a folder of their own for this run
# --logs       where everything that is printed is kept (default: gpu_check)
# --seconds    for all of it, at most (default: 470)
# --benchmark  of these, kept for the benchmark (default: 110); 0: no benchmark. Time that the tests leave is its too.
# Status: 0 all is well; 1 something failed or was not reached; 2 nothing was run.
set -u
cd "$(dirname "$0")/.."

logs=gpu_check seconds=470 benchmark=110 wheels=
while [ $# -gt 0 ]; do
    case "$1" in
        --logs | --seconds | --benchmark)
            [ $# -gt 1 ] || { echo "gpu_check: $1 needs a value" >&2; exit 2; }
            printf -v "${1#--}" %s "$2"
            shift 2 ;;
        -h | --help) sed -n '2,/^set/s/^# \{0,1\}//p' "$0"; exit 0 ;;
        -*) echo "gpu_check: there is no option $1; see --help" >&2; exit 2 ;;
        *) wheels=$1; shift ;;
    esac
done
for number in "$seconds" "$benchmark"; do
    case "$number" in '' | *[!0-9]*) echo "gpu_check: $number is no number of seconds" >&2; exit 2 ;; esac
done
if ! [ -e /dev/nvidiactl ] && ! nvidia-smi -L >/dev/null 2>&1; then
    echo "gpu_check: there is no CUDA card here; run it on a machine with one (tests/gpu are skipped elsewhere)" >&2
    exit 2
fi
if [ -n "$wheels" ] && ! ls "$wheels"/*.whl >/dev/null 2>&1; then
    echo "gpu_check: there is no wheel in $wheels; give a folder of *.whl files, or none" >&2
    exit 2
fi
mkdir -p "$logs" || exit 2
logs=$(cd "$logs" && pwd)
rm -f "$logs"/{about.json,tests.jsonl,benchmark.json}
python=$(command -v python || command -v python3)

left() { # seconds until $1 seconds before the end, 1 at least
    local rest=$((seconds - SECONDS - $1))
    echo $((rest > 1 ? rest : 1))
}
within() { # SECONDS LOG COMMAND …: ended with SIGINT, so that it says where it was, then killed
    local limit=$1 log=$2
    shift 2
    timeout -s INT -k 8 "$limit" "$@" >"$log" 2>&1
    local status=$?
    echo "$(basename "$log" .log): status $status, $SECONDS s since the start"
}

export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} PYTHONDONTWRITEBYTECODE=1
if [ -n "$wheels" ]; then
    site=$(mktemp -d)
    trap 'rm -rf "$site"' EXIT
    within "$(left 60)" "$logs/install.log" "$python" -m pip install --no-index --no-deps --target "$site" "$wheels"/*.whl
    export PYTHONPATH=$PYTHONPATH:$site
fi
"$python" -m tools.gpu_check about "$logs"

has() { "$python" -c "import importlib.util, sys; sys.exit(importlib.util.find_spec('$1') is None)"; }
options=(-o addopts= -ra --import-mode=importlib -p no:cacheprovider -p tools.gpu_check)
if has pytest_timeout; then options+=(-o timeout=150); fi
if has xdist; then options+=(-n 8 --dist loadgroup --no-loadscope-reorder); fi
MEGADPO_GPU_CHECK="$logs/tests.jsonl" within "$(left $((benchmark + 15)))" "$logs/tests.log" \
    "$python" -m pytest tests/gpu -v "${options[@]}"
if [ "$benchmark" -gt 0 ]; then
    within "$(left 15)" "$logs/benchmark.log" "$python" -m benchmarks gpu --rounds 3 --warm-up 2 --arms auto+auto \
        --sizes 1.7B --mixes UltraFeedback-like --seconds "$(left 17)" --json "$logs/benchmark.json"
fi
"$python" -m tools.gpu_check table "$logs" | tee "$logs/table.md"
exit "${PIPESTATUS[0]}"
