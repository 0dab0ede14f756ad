#!/usr/bin/env bash
# One script from a bare machine (Python >= 3.10 with pip) to a running megadpo:
#
#   ./launch.sh quickstart                       install, then train a small model and check it
#   ./launch.sh test [pytest arguments]          install with the test tools, then run the tests
#   ./launch.sh train CONFIG [key=value …]       train in this process (or as a SLURM task)
#   ./launch.sh train --nproc 8 CONFIG …         … on 8 processes of this machine, through torchrun
#   ./launch.sh train --nnodes 2 --node-rank 0 --master HOST[:PORT] --nproc 8 CONFIG …   … on several machines
#   ./launch.sh train --launcher torchrun|deepspeed|mpirun|srun|megadpo [--hostfile FILE] [--port PORT] --nproc 8 CONFIG …
#   ./launch.sh install [dev]                    only make the environment
#   ./launch.sh exec COMMAND …                   run any command inside the environment
#   ./launch.sh COMMAND …                        any other megadpo command
#
# An active environment (virtualenv or conda) that has megadpo installed is used as it is; otherwise .venv is made here.
# MEGADPO_DRY_RUN=1 prints the command instead of running it. PYTHON chooses the Python that .venv is made with.
set -euo pipefail
ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"

die() { echo "launch.sh: error: $*" >&2; exit 2; }

run() {
    if [[ "${MEGADPO_DRY_RUN:-}" == 1 ]]; then
        printf '%q ' "$@"; echo
        exit 0
    fi
    exec "$@"
}

# has PYTHON MODULE…: true where that Python imports all of them (asked from /, where no source tree helps).
has() {
    local python="$1"
    shift
    (cd / && "$python" -c 'import importlib, sys; [importlib.import_module(name) for name in sys.argv[1:]]' "$@") >/dev/null 2>&1
}

find_python() {
    local candidate
    for candidate in ${PYTHON:-python3 python3.13 python3.12 python3.11 python3.10 python}; do
        if command -v "$candidate" >/dev/null && "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 10))'; then
            echo "$candidate"
            return
        fi
    done
    die "no Python >= 3.10 found; install one or name it: PYTHON=/path/to/python3 ./launch.sh …"
}

# What decides whether the environment is up to date: the requirements, the extra, and the Python.
stamp_of() { cat "$ROOT/setup.py" "$ROOT/pyproject.toml" "$ROOT/constraints.txt" | cksum; }

# make_environment EXTRA: sets BIN, the directory of the environment's programs. EXTRA is "" or "dev".
make_environment() {
    local extra="$1" stamp="$ROOT/.venv/.megadpo-stamp" wanted active
    active="${VIRTUAL_ENV:-${CONDA_PREFIX:-}}"
    if [[ -n "$active" && "$active" != "$ROOT/.venv" && -x "$active/bin/python" ]] && has "$active/bin/python" megadpo ${extra:+pytest xdist}; then
        BIN="$active/bin"
        return
    fi
    BIN="$ROOT/.venv/bin"
    wanted="$(stamp_of)"
    # The environment with the test tools also serves everything else.
    if [[ -x "$BIN/python" && -f "$stamp" ]] && grep -qxF -e "$wanted dev" -e "$wanted $extra" "$stamp"; then
        return
    fi
    [[ "${MEGADPO_DRY_RUN:-}" == 1 ]] && return
    # Many tasks at once would install into each other.
    [[ "$COMMAND" == install || -z "${SLURM_PROCID:-}" || "${SLURM_NTASKS:-1}" == 1 ]] ||
        die "the environment is missing or old; run ./launch.sh install once before the job"
    install_environment "$extra"
    echo "$wanted $extra" >"$stamp"
}

install_environment() {
    local extra="$1" constraints="$ROOT/constraints.txt" python
    if ! "$BIN/python" -m pip --version >/dev/null 2>&1; then
        python="$(find_python)"
        echo "launch.sh: making $ROOT/.venv with $("$python" --version)" >&2
        "$python" -m venv --clear "$ROOT/.venv" || die "$python -m venv failed; on Debian or Ubuntu install python3-venv"
    fi
    echo "launch.sh: installing packages (a few minutes the first time)" >&2
    "$BIN/python" -m pip install -q --upgrade pip 'setuptools>=68'
    # torch comes first and alone, so that nothing else chooses its build.
    if command -v nvidia-smi >/dev/null && nvidia-smi >/dev/null 2>&1; then
        constraints="$ROOT/.venv/constraints-gpu.txt"
        grep -v '^torch==' "$ROOT/constraints.txt" >"$constraints"
        "$BIN/python" -m pip install -q 'torch>=2.6'
    else
        install_cpu_torch
    fi
    PYTHONWARNINGS=ignore "$BIN/python" -m pip install -q -c "$constraints" -e "$ROOT${extra:+[$extra]}"
}

# The CPU wheel (2.13.0+cpu) spares gigabytes of CUDA libraries; without its index, the configured ones have to serve.
install_cpu_torch() {
    local index="https://download.pytorch.org/whl/cpu/" options=()
    if "$BIN/python" -c "import urllib.request as r; r.urlopen('${index}torch/', timeout=10)" 2>/dev/null; then
        options=(--extra-index-url "$index")
    fi
    "$BIN/python" -m pip install -q ${options[@]+"${options[@]}"} "$(grep '^torch==' "$ROOT/constraints.txt")"
}

# launch_train ARGUMENTS…: torchrun where the arguments describe processes, else one process (which may be a SLURM task).
launch_train() {
    local nproc="" nnodes="" node_rank="" master="" arguments=() argument
    for argument in "$@"; do
        case "$argument" in
            # These are megadpo's to understand: it becomes the launcher.
            --launcher | --launcher=* | --hostfile | --hostfile=* | --port | --port=*) run "$BIN/python" -m megadpo train "$@" ;;
        esac
    done
    while (($#)); do
        case "$1" in
            --nproc | --nnodes | --node-rank | --master) (($# > 1)) || die "$1 needs a value" ;;
        esac
        case "$1" in
            --nproc) nproc="$2"; shift 2 ;;
            --nproc=*) nproc="${1#*=}"; shift ;;
            --nnodes) nnodes="$2"; shift 2 ;;
            --nnodes=*) nnodes="${1#*=}"; shift ;;
            --node-rank) node_rank="$2"; shift 2 ;;
            --node-rank=*) node_rank="${1#*=}"; shift ;;
            --master) master="$2"; shift 2 ;;
            --master=*) master="${1#*=}"; shift ;;
            *) arguments+=("$1"); shift ;;
        esac
    done
    if [[ -z "$nproc$nnodes$node_rank$master" ]]; then
        run "$BIN/python" -m megadpo train ${arguments[@]+"${arguments[@]}"}
    fi
    [[ -z "$nproc" || "$nproc" =~ ^[1-9][0-9]*$ ]] || die "--nproc must be a whole number above 0, got $nproc"
    [[ -z "$nnodes" || "$nnodes" =~ ^[1-9][0-9]*$ ]] || die "--nnodes must be a whole number above 0, got $nnodes"
    if [[ "${nnodes:-1}" == 1 ]]; then
        [[ -z "$node_rank$master" || "${node_rank:-0}" == 0 ]] || die "--node-rank $node_rank needs --nnodes > 1"
        local torchrun=("$BIN/python" -m torch.distributed.run "--nproc-per-node=${nproc:-1}" --standalone)
        run "${torchrun[@]}" -m megadpo train ${arguments[@]+"${arguments[@]}"}
    else
        [[ -n "$master" ]] || die "--nnodes $nnodes needs --master HOST[:PORT], the first machine's address"
        [[ "$node_rank" =~ ^[0-9]+$ ]] || die "--nnodes $nnodes needs --node-rank, from 0 to $((nnodes - 1))"
        ((node_rank < nnodes)) || die "--node-rank $node_rank is not below --nnodes $nnodes"
        run "$BIN/python" -m megadpo train ${arguments[@]+"${arguments[@]}"} \
            --nproc "${nproc:-1}" --nnodes "$nnodes" --node-rank "$node_rank" --master "$master"
    fi
}

usage() { sed -n '2,/^set -/{/^#/s/^# \{0,1\}//p}' "$ROOT/launch.sh"; }

main() {
    COMMAND="${1:-help}"
    (($#)) && shift
    case "$COMMAND" in
        help | -h | --help) usage ;;
        install) make_environment "${1:-}"; echo "environment: ${BIN%/bin}" ;;
        exec) (($#)) || die "exec needs a command"; make_environment dev; PATH="$BIN:$PATH" run "$@" ;;
        test) make_environment dev; cd "$ROOT"; run "$BIN/python" -m pytest -q -n auto --dist loadfile --no-loadscope-reorder "$@" ;;
        quickstart) make_environment ""; run "$BIN/python" "$ROOT/examples/quickstart/run.py" "$@" ;;
        train) make_environment ""; launch_train "$@" ;;
        *) make_environment ""; run "$BIN/python" -m megadpo "$COMMAND" "$@" ;;
    esac
}

main "$@"
