# mooncake_hpc batch jobs, version 1
# shellcheck shell=bash
# What a job needs, whatever it runs. The batch scripts beside it check the line above, and the owner, before they source it.
# PROGRAM: the command of mooncake-hpc that the script runs, and its flags; unset where it runs something else.
# Arguments of the script: --etcd-members=1|3; all others are kept in ARGS.
# Variables that a user or a site may set before sbatch:
#   MOONCAKE_HPC_PYTHON  a Python that has mooncake_hpc [.venv of this checkout, else python3]
#   ETCD_ENDPOINTS       the site's etcd, host:port,host:port,…: then none is started (MOONCAKE_HPC_ETCD_* to log in)
#   ETCD_BIN             the etcd to start
#   MOONCAKE_HPC_LOCAL   a folder on a disk of each node, for compiled kernels [TMPDIR, else /tmp]
# Sets: RESULT, the JSON file in the submit folder; METADATA, for --metadata_server; functions `ranks`, `everywhere`.
set -euo pipefail

SLURM_FOLDER=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd -P)
CHECKOUT=${SLURM_FOLDER%/*}
NAME=${SLURM_JOB_NAME:-${0##*/}}
NAME=${NAME//[\/[:cntrl:]]/_}  # it becomes a file's
say() { echo "$NAME: $*" >&2; }
die() { say "$*"; exit 1; }
[ -n "${SLURM_JOB_ID:-}" ] || die "runs inside of a Slurm job only: sbatch $0"

# ---- the job's name for everything: tasks of an array apart, components of a heterogeneous job together
JOB=${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID}
JOB=${JOB:-$SLURM_JOB_ID}
FOLDER=${SLURM_SUBMIT_DIR:-$PWD}
RESULT=$FOLDER/$NAME-$JOB.json
[ -d "$FOLDER" ] && [ -w "$FOLDER" ] || die "cannot write the result into $FOLDER on $(uname -n): submit from a folder that all nodes share"
rm -f "$RESULT"  # of an earlier job, where numbers begin anew
# of an earlier run of this job, which was queued again, processes may be alive still, and keys for the time of a lease
export MC_METADATA_CLUSTER_ID=slurm-$JOB${SLURM_RESTART_COUNT:+-run$((SLURM_RESTART_COUNT + 1))}

# ---- steps get the whole environment, whatever sbatch --export was, and their words come here as they are
export SLURM_EXPORT_ENV=ALL
unset SLURM_LABELIO SLURM_STDINMODE SLURM_STDOUTMODE SLURM_STDERRMODE SRUN_INPUT SRUN_OUTPUT SRUN_ERROR SLURM_WORKING_DIR
[ -d "${TMPDIR:-/tmp}" ] && [ -w "${TMPDIR:-/tmp}" ] || { say "TMPDIR=$TMPDIR is no folder on $(uname -n): /tmp instead"; export TMPDIR=/tmp; }

# ---- arguments
ETCD_MEMBERS=1
ARGS=()
for argument in "$@"; do
    case $argument in
        --etcd-members=[13]) ETCD_MEMBERS=${argument#*=} ;;
        --etcd-members*) say "$argument: one member or three, --etcd-members=3"; exit 2 ;;
        *) ARGS+=("$argument") ;;
    esac
done

# ---- the program
PY=${MOONCAKE_HPC_PYTHON:-$CHECKOUT/.venv/bin/python}
[ -x "$PY" ] || PY=$(command -v "${MOONCAKE_HPC_PYTHON:-python3}") || die "no Python: set MOONCAKE_HPC_PYTHON"
"$PY" -c 'import sys; del sys.path[:1]; import importlib.util as u; sys.exit(not u.find_spec("mooncake_hpc"))' || die "$PY has no mooncake_hpc: run" \
    "'launch/bench --duration=1' in $CHECKOUT once, which makes .venv, or set MOONCAKE_HPC_PYTHON to a Python that has it"

# ---- a mistyped flag is told before anything is started
[ -z "${PROGRAM:-}" ] || "$PY" -P -m mooncake_hpc launch --check -- "${PROGRAM[@]}" --metadata_server=unknown "${ARGS[@]}" ||
    exit

# ---- the nodes: registered memory is locked memory, and compiled kernels belong on a node's own disk
ulimit -l unlimited 2>/dev/null || ulimit -l "$(ulimit -H -l)" || true
export NUMBA_NUM_THREADS=1 NUMBA_CACHE_DIR=${NUMBA_CACHE_DIR:-${MOONCAKE_HPC_LOCAL:-${TMPDIR:-/tmp}}/mooncake-hpc-$(id -u)/numba}

# MPICH's ranks leave memory in /dev/shm where they are killed in MPI_Init; what a rank that runs uses is mapped.
SWEEP='for file in /dev/shm/mpich_shm_*; do
    [ ! -O "$file" ] || grep -qsF "$file" /proc/[0-9]*/maps || rm -f "$file"
done'

# ---- children, and their end on every path: SIGTERM comes from scancel and, by --signal, before the time limit
CHILDREN=()
clean_up() {
    local code=$?
    trap '' TERM INT
    [ ${#CHILDREN[@]} = 0 ] || kill -TERM "${CHILDREN[@]}" 2>/dev/null || true
    [ -z "${ETCD_PID:-}" ] || eval "exec ${ETCD[1]}>&-" || true
    wait
    [ "$code" = 0 ] || DEADLINE=20 everywhere bash -c "$SWEEP" || true
    exit "$code"
}
trap clean_up EXIT
trap 'say "stopped by a signal"; exit 143' TERM INT

# foreground WORDS…: run them, and stay open to signals meanwhile.
foreground() {
    local code=0
    "$@" &
    CHILDREN+=($!)
    wait $! || code=$?
    unset 'CHILDREN[-1]'
    return $code
}

# everywhere WORDS…: once on each node, without MPI, for DEADLINE seconds at most [0: for ever]; in a heterogeneous job on those of one component after the other.
everywhere() {
    local component count
    for ((component = 0; component < ${SLURM_HET_SIZE:-1}; component++)); do
        count=SLURM_JOB_NUM_NODES${SLURM_HET_SIZE:+_HET_GROUP_$component}
        foreground timeout "${DEADLINE:-0}" srun ${SLURM_HET_SIZE:+--het-group=$component} --overlap --mem=0 --nodes="${!count}" \
            --ntasks="${!count}" --ntasks-per-node=1 --mpi=none --kill-on-bad-exit=1 "$@"
    done
}

# ranks WORDS…: all tasks of the job as one MPI world; WORDS are a command of mooncake-hpc or a program.
ranks() { foreground "$PY" -P -m mooncake_hpc launch "${LAUNCH[@]}" -- "$@"; }
LAUNCH=()

# address HOST: where other nodes reach it; a name that its own /etc/hosts gives to loopback will not do.
address() {
    local found
    found=$(getent ahosts "$1" | awk '{print $1; exit}') || true
    case $found in '' | 127.* | ::1) echo 0.0.0.0 ;; *) echo "$found" ;; esac
}

# etcd ends when its input does, and so with this script, however that ends. A signal to members, which are a step, would
# reach all processes of the step, and none could remove its data.
MEMBER='exec "$@" --member="$SLURM_PROCID"'

# ---- etcd: the site's, or the job's own behind a password, which starts while nodes compile
start_etcd() {
    local log words=() nodes=() first count
    [ -z "${ETCD_ENDPOINTS:-}" ] || return 0
    set +x  # a trace would show the password
    unset MOONCAKE_HPC_ETCD_PASSWORD_FILE
    export MOONCAKE_HPC_ETCD_USER=root MOONCAKE_HPC_ETCD_PASSWORD
    MOONCAKE_HPC_ETCD_PASSWORD=$(head -c 18 /dev/urandom | base64 | tr '+/' '-_')
    export FLAGS_password=$MOONCAKE_HPC_ETCD_PASSWORD  # not on a command line, where other users would see it
    mapfile -t nodes < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
    count=$ETCD_MEMBERS
    words=("$PY" -P -m mooncake_hpc etcd --until_eof --fromenv=password)
    if [ "$count" = 1 ]; then
        words+=(--listen="$(address "${SLURMD_NODENAME:-$(hostname)}")")
    else
        [ ${#nodes[@]} -ge "$count" ] || die "--etcd-members=$count needs $count nodes; the job has ${#nodes[@]}"
        first=$(IFS=,; echo "${nodes[*]:0:$count}")
        words=(srun --overlap --mem=0 --nodelist="$first" --nodes="$count" --ntasks="$count" --ntasks-per-node=1
            --mpi=none --input=all bash -c "$MEMBER" member
            "${words[@]}" --members="$first" --port="$((20000 + 2 * (SLURM_JOB_ID % 5000)))")
    fi
    log=$(mktemp)
    exec {ETCD_LOG}<>"$log"
    rm "$log"  # so that none is left, however this ends
    coproc ETCD { exec "${words[@]}" 2>&"$ETCD_LOG"; }
    exec {ETCD_OUTPUT}<&"${ETCD[0]}"  # bash forgets its own once etcd has ended
}

# Each member prints its endpoint once it serves.
await_etcd() {
    local i endpoint found=()
    if [ -n "${ETCD_ENDPOINTS:-}" ]; then
        METADATA=etcd://$ETCD_ENDPOINTS
        return
    fi
    for ((i = 0; i < ETCD_MEMBERS; i++)); do
        read -r -t 120 -u "$ETCD_OUTPUT" endpoint || { cat "/proc/$$/fd/$ETCD_LOG" >&2; die "etcd does not start"; }
        found+=("$endpoint")
    done
    METADATA=etcd://$(IFS=,; echo "${found[*]}")
}

start_etcd
everywhere "$PY" -P -m mooncake_hpc warm
await_etcd
say "job $JOB: ${SLURM_NTASKS:-?} tasks on $SLURM_JOB_NODELIST, metadata at $METADATA, result in $RESULT"
