#!/usr/bin/env bash
# Check the project on a machine with one GPU, in 8 minutes:
#
#   bash benchmarks/gpu_check.sh BUNDLE OUT [--cpu] [--steps "1 2 3"]
#
# BUNDLE is the folder that `make gpu-bundle` made. OUT gets check.jsonl, with a line of JSON for each figure and each
# step as soon as there is one, and check.log. A step that fails or takes too long does not stop the next; only the
# setup must succeed. --cpu runs the steps at a small size without a GPU, to see that they work. PYTHON=python3.12
# selects the interpreter.
set -uo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
python=${PYTHON:-python3} mode=gpu steps='1 2 3 4 5 6 7' total_s=480
names=(setup tests modes ratios faults learning decode profile)
limits_s=(60 110 110 100 90 75 30 30)

stop() {
    printf 'gpu-check: %s\n' "$*" >&2
    exit 2
}

[ $# -ge 2 ] || stop "two folders are needed: bash benchmarks/gpu_check.sh BUNDLE OUT"
[ -d "$1/wheels" ] && [ -d "$1/data" ] || stop "$1 is no bundle of make gpu-bundle: it has no wheels/ or no data/"
mkdir -p "$2" || stop "$2 cannot be made"
bundle=$(cd "$1" && pwd) out=$(cd "$2" && pwd)
shift 2
while [ $# -gt 0 ]; do
    case $1 in
    # Kernels are compiled for one core or two, and nothing is fast.
    --cpu)
        mode=cpu total_s=3600 limits_s=(120 600 600 900 900 600 300 300)
        export OMP_NUM_THREADS=1 # more threads only wait for each other, at such sizes
        ;;
    --steps)
        [[ ${2:-} =~ ^[1-7\ ]+$ ]] || stop '--steps needs numbers from 1 to 7, such as "1 2"'
        steps=$2
        shift
        ;;
    *) stop "$1 is unknown; the options are --cpu and --steps" ;;
    esac
    shift
done

record=$out/check.jsonl log=$out/check.log
: >"$record"
: >"$log"
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
# Under one folder, so that nothing of the check remains, and a step finds what an earlier step has compiled.
export NUMBA_CACHE_DIR=${NUMBA_CACHE_DIR:-$scratch/numba}
export TORCHINDUCTOR_CACHE_DIR=${TORCHINDUCTOR_CACHE_DIR:-$scratch/inductor}
export TRITON_CACHE_DIR=${TRITON_CACHE_DIR:-$scratch/triton}
export PYTHONPATH=$scratch/site:$root PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1
cd "$root" || exit 1
end_s=$((SECONDS + total_s))

# Run one step within its limit, and record how it ended.
run_step() {
    local number=$1 limit_s=${limits_s[$1]} start_s=$SECONDS status=ok
    [ "$limit_s" -le $((end_s - SECONDS)) ] || limit_s=$((end_s - SECONDS))
    if [ "$limit_s" -lt 5 ]; then
        status='no time left'
    else
        printf '== step %s, %s\n' "$number" "${names[$number]}" | tee -a "$log"
        timeout -k 5 "$limit_s" "$python" benchmarks/gpu_check.py "${names[$number]}" --bundle "$bundle" \
            --out "$out" --scratch "$scratch" --device "$mode" >"$scratch/output" 2>&1
        case $? in
        0) ;;
        124 | 137) status="stopped at its limit of $limit_s s" ;;
        *) status=failed ;;
        esac
        cat "$scratch/output" >>"$log"
    fi
    "$python" - "$number" "${names[$number]}" "$status" $((SECONDS - start_s)) "$scratch/output" <<'END' | tee -a "$record"
import json, pathlib, sys

number, name, status, seconds, output = sys.argv[1:]
line = {"step": int(number), "name": name, "status": status, "seconds": int(seconds)}
if status == "failed":
    lines = pathlib.Path(output).read_text(errors="replace").strip().splitlines()
    line["error"] = lines[-1][:300] if lines else "it ended without a word"
print(json.dumps(line))
END
    [ "$status" = ok ]
}

"$python" -m pip --version >/dev/null 2>&1 || stop "$python has no pip"
if ! run_step 0; then
    printf 'gpu-check: without its setup, no step can run\n' >&2
    exit 1
fi
for step in $steps; do
    run_step "$step"
done
printf 'gpu-check: %s s, %s\n' "$SECONDS" "$record"
