#!/bin/bash
# Trains digits. Nodes: 64, ranks on each: 4. Site profile: cray-ex.
# Written by: slowmo job my.toml --site cray-ex
# Submit it with: sbatch JOB.sh
# This script belongs to one run, in the folder named below: submitted once more, it goes on with that run.
#
#SBATCH --job-name=digits
#SBATCH --nodes=64
#SBATCH --ntasks=256
#SBATCH --ntasks-per-node=4
#SBATCH --cpus-per-task=16
# One GPU for each rank; srun shows each only its own (--gpu-bind=none in launcher_options shows them all).
#SBATCH --gpus-per-task=1
#SBATCH --time=01:00:00
# The warning before the time limit goes to the ranks.
#SBATCH --signal=USR1@120
# Slurm starts the job again by itself when it has lost a node or preempted it.
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log
#SBATCH --constraint=gpu
#SBATCH --qos=regular

set -euo pipefail
warned=''
trap 'warned=1' USR1 USR2 # the warning; it may come while software is loaded

workdir=/home/me # where slowmo job was called: relative paths of the configuration start here
folder=/scratch/me/runs/digits-job-20261123-101500 # of this job: its attempts, what doctor found, the run folder
config=/home/me/my.toml
job=${SLURM_JOB_ID:?this is a script for sbatch}
alive() { [[ $(squeue --noheader --jobs="$1" --states=RUNNING,COMPLETING,SUSPENDED --format=%i 2>/dev/null) ]]; }
say() { printf 'job %s: %s\n' "$job" "$*" >&2 || true; } # a full disk must not end the job here

settings=()
mkdir -p "$folder"
if [[ -f ${BASH_SOURCE[0]:-} ]]; then # what ran can be read later, and submitted again
  cp "${BASH_SOURCE[0]}" "$folder/job.sh.new"
  mv "$folder/job.sh.new" "$folder/job.sh"
fi
settings+=(--set "run.folder=$folder") # so that --resume auto sees this job's run and no other
cd "$workdir"

# ---- Software ---------------------------------------------------------------------------------------------------------
set +u # modules and activate scripts read variables that are not set
type module >/dev/null 2>&1 || source /etc/profile || true # a batch shell may come without the command
module load PrgEnv-gnu cudatoolkit craype-accel-nvidia80 cray-mpich cray-hdf5-parallel
source /home/me/.venv/bin/activate
set -u
export MPICH_GPU_SUPPORT_ENABLED=1
export MPICH_OFI_NIC_POLICY=GPU
export FI_CXI_RX_MATCH_MODE=hybrid
export FI_CXI_DEFAULT_CQ_SIZE=131072
export FI_MR_CACHE_MONITOR=userfaultfd
export HDF5_USE_FILE_LOCKING=FALSE
slowmo=(slowmo)

# ---- Ranks ------------------------------------------------------------------------------------------------------------
export OMP_NUM_THREADS=16 # torch's threads: a rank has so many cores
export SRUN_CPUS_PER_TASK=16 # since Slurm 22.05 srun does not take --cpus-per-task over from sbatch
# With the wrong --mpi each rank believes itself alone, and slowmo doctor says so; `srun --mpi=list` names what there is.
launch=(srun --mpi=cray_shasta --kill-on-bad-exit=1 --cpu-bind=cores)
launch+=(--gpu-bind=none)

# ---- Where the run stands ---------------------------------------------------------------------------------------------
log=$folder/job.jsonl # a line for each beginning and end; `slowmo job status` reads it
touch "$log"

shopt -s dotglob # a run's name may begin with a dot
newest() { # the step of the newest checkpoint, 0 where there is none
  local path step=0
  for path in "$folder"/*/checkpoints/step-*.h5; do
    if [[ $path =~ /step-0*([0-9]+)\.h5$ ]] && ((BASH_REMATCH[1] > step)); then step=${BASH_REMATCH[1]}; fi
  done
  echo "$step"
}
count() { grep -c "$1" "$log" || true; }
record() { printf '{"attempt": %d, "job": "%s", %s, "time": "%s"}\n' "$attempt" "$job" "$1" "$(date +%FT%T%z)" >>"$log"; }

finished() { grep -qs '^  "result": "done"' "$folder"/*/manifest.json; }

if finished; then
  say "the run in $folder is done already"
  exit 0
fi
if other=$(cat "$folder/running" 2>/dev/null) && [[ $other && $other != "$job" ]] && alive "$other"; then
  say "job $other is at work in $folder; two would overwrite each other's checkpoints"
  exit 2
fi
trap 'rm -f "$folder/running"' EXIT
echo "$job" >"$folder/running"

attempt=$(($(count '"event": "started"') + 1))
from=$(newest)
record "\"event\": \"started\", \"step\": $from, \"scheduler\": \"slurm\", \"host\": \"${HOSTNAME//[^A-Za-z0-9.-]/}\""
say "attempt $attempt, from step $from, in $folder"

# ---- Train ------------------------------------------------------------------------------------------------------------
# A warning comes as SIGUSR1: the ranks stop together, with a checkpoint, and end with code 75. SIGTERM does the same,
# but it means that somebody wants the job to end, and so it is not started again.
child='' interrupted='' ended=''
# shellcheck disable=SC2317,SC2329 # traps call it
hand_on() {
  interrupted=1 warned=1
  if [[ $child ]]; then kill -USR1 "$child" 2>/dev/null || true; fi
}
trap hand_on USR1 USR2
trap 'ended=1; hand_on' TERM
trap 'ended=1 interrupted=1' INT # a terminal sends it to the ranks' launcher too
run() { # a command in the background, so that signals are taken at once
  local rc
  if [[ $warned ]]; then return 75; fi # by a signal that has come already
  "$@" &
  child=$!
  while :; do
    interrupted='' rc=0
    wait "$child" || rc=$?
    if [[ ! $interrupted ]]; then break; fi
  done
  child=''
  return "$rc"
}

rc=0
if [[ ! -e $folder/doctor.txt ]]; then # an attempt that goes on need not ask again
  run "${launch[@]}" "${slowmo[@]}" doctor >"$folder/doctor.new" || rc=$?
  cat "$folder/doctor.new" >&2
  if ((rc == 0)); then mv "$folder/doctor.new" "$folder/doctor.txt"; fi
  if ((rc == 3)); then say "slowmo doctor found a fault (above, and in $folder/doctor.new); nothing was trained"; fi
fi
if [[ $warned ]]; then rc=75; fi # while doctor was at work
if ((rc == 0)); then
  run "${launch[@]}" "${slowmo[@]}" train "$config" "${settings[@]}" --resume auto || rc=$?
  # The run folder knows better: some launchers end with 0 when they have lost a node, and what comes after the end is
  # no failure.
  if finished; then rc=0; elif ((rc == 0)); then rc=1; fi
fi
if ((rc == 138)); then rc=75; fi # SIGUSR1 killed them: the warning came before the ranks listened to it

# ---- Again? -----------------------------------------------------------------------------------------------------------
# Stopped early (75): again, unless 3 attempts in a row came no further than this step.
# Failed or killed: a lost node ends so too; again only if this attempt came further, so that an error comes once more
# at most. Wrong usage (2), a fault that doctor found (3), Ctrl-C (130): no.
step=$(newest)
stuck=$(count "\"event\": \"started\", \"step\": $step,")
again=''
if ((rc == 0)); then
  next="done"
elif [[ $ended ]]; then
  next="ended by a signal; submitted again, it goes on from step $step"
elif ((rc == 75 && stuck >= 3)); then
  next="gave up: $stuck attempts came no further than step $step; is the time limit too short for one checkpoint?"
elif ((rc == 75 || (step > from && rc != 2 && rc != 3 && rc != 130))); then
  again=1
  next="goes on from step $step"
else
  next="failed with exit code $rc"
fi
record "\"event\": \"ended\", \"step\": $step, \"exit_code\": $rc, \"next\": \"$next\"" || say "$log cannot be written"
say "step $step, exit code $rc: $next"
if [[ ! $again ]]; then
  if [[ $next == gave* ]]; then rc=1; fi
  exit "$rc"
fi
rm -f "$folder/running"
trap - EXIT # the next one may have begun, and put its own mark there
# The same job, from the top of this script; Slurm lets two minutes or so go by before it starts it.
scontrol requeue "$job" || say "the job was not requeued; type: cd ${folder@Q} && sbatch job.sh"
exit "$rc"
