#!/usr/bin/env bash
# One turn of one run: starts it, goes on with it, or finds it finished. What cron, systemd and Slurm call, as often as they like.
#   run.sh OUT NAME [options of `deepcluster-nb run`]          run.sh runs/cifar10 train --preset cifar10 -p seed=1
# Environment: DEEPCLUSTER_DATA (data root), OMP_NUM_THREADS, DEEPCLUSTER_LIMIT (longest turn, such as 8h; 0: no limit), DEEPCLUSTER_GRACE.
# Status: 0 finished · 75 another turn is at work · 124 the limit is over, 130 and 143 stopped: the next turn goes on · else failed.
# News goes to stdout, trouble to stderr: a schedule that drops stdout reports failures alone.
set -euo pipefail
say() { echo "run.sh: $*" >&2; }

[ $# -ge 2 ] || { say "expected OUT NAME [options], got '$*'"; exit 2; }
cd "$(dirname "${BASH_SOURCE[0]}")/../../.."                  # the clone: cron starts in the home folder
out=${1%/}; name=$2; shift 2
PATH="$PATH:$PWD/.venv/bin"                                   # cron's PATH is short; an activated environment goes first
for tool in deepcluster-nb flock timeout; do
  command -v "$tool" >/dev/null || { say "no $tool on PATH=$PATH"; exit 2; }
done
if [ -n "${DEEPCLUSTER_DATA:-}" ] && [ ! -d "$DEEPCLUSTER_DATA" ]; then
  say "DEEPCLUSTER_DATA: expected a folder, and there is none at '$DEEPCLUSTER_DATA'"; exit 2
fi

report=$(realpath -m "$out/report.html")
asked=$(LC_ALL=C printf '%q ' "$name" "$@")                   # more epochs are a new task
if [ -f "$out/metrics.json" ] && [ -f "$report" ] && grep -qsxF -- "$asked" "$out/finished"; then
  echo "$out is finished: $report"; exit 0
fi

mkdir -p "$(dirname "$out")"
exec 9>>"$out.lock"                                           # the system gives the lock back however the process ends
flock -n 9 || { echo "$out: another turn is at work"; exit 75; }

# The cores that were granted, shared by the processes of --nproc; another number of threads rounds otherwise: the run would not end in the same bits
ranks=1; before=
for a in "$@"; do
  case "$before $a" in "--nproc "*) ranks=$a;; *" --nproc="*) ranks=${a#*=};; esac
  before=$a
done
[[ $ranks =~ ^[1-9][0-9]*$ ]] || ranks=1                      # the command says what is wrong with it
cores=${SLURM_CPUS_PER_TASK:-$(nproc)}
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-$(( cores > ranks ? cores / ranks : 1 ))}"
log="$out.log"
note() { echo "== $(date '+%Y-%m-%d %H:%M:%S') $*" >>"$log"; }
note "start: $name $* ($OMP_NUM_THREADS threads, limit ${DEEPCLUSTER_LIMIT:-0}, process $$)"

# In the background, for a shell that waits for a command in front hears no signal before that has ended.
nice -n 10 timeout --signal=TERM --kill-after="${DEEPCLUSTER_GRACE:-120}" "${DEEPCLUSTER_LIMIT:-0}" \
  deepcluster-nb run "$name" "$@" --out "$out" </dev/null >>"$log" 2>&1 &
pid=$!
trap 'kill -TERM "$pid" 2>/dev/null || true' TERM INT HUP
status=0; wait "$pid" || status=$?
while kill -0 "$pid" 2>/dev/null; do status=0; wait "$pid" || status=$?; done    # a signal ends `wait`, not the run

note "end: status $status"
case $status in
  0) echo "$asked" >>"$out/finished"; echo "$out is finished: $report";;
  124|130|143) echo "$out: stopped (status $status); the next turn goes on";;
  *) say "$out: failed with status $status; the end of $log:"; tail -n 5 "$log" >&2;;
esac
exit "$status"
