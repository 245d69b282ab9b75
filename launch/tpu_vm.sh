#!/usr/bin/env bash
# Train on TPU VMs of a queued resource: bash launch/tpu_vm.sh [create|recreate|run|delete] --help
# shellcheck disable=SC2154 # every flag becomes a variable
set -euo pipefail
# shellcheck source=launch/plan.sh
source "$(dirname "${BASH_SOURCE[0]}")/plan.sh"

about="usage: bash launch/tpu_vm.sh [create|recreate|run|delete] [flags] [-- flags of maskrl_jax.main]

Trains a config on a TPU slice (v5e, v6e, v5p) that the queued-resource API of Cloud TPU gives. 'create' asks for it,
with a startup script that starts the run on every worker, and resumes it; 'recreate' deletes the request first, as
after a preemption; 'run' sends this checkout and these flags to all workers of a slice that is there; 'delete' ends it.
Google no longer develops this API, and it has no TPU7x: launch/tpu_mig.sh and launch/gke_jobset.sh are what follows it."
verb=create bucket_default=! config_default=configs/speed_rl.py
case ${1:-} in create | recreate | run | delete) verb=$1 && shift ;; esac
[ "$verb" = create ] || config_default=''
[ "$verb" != delete ] || bucket_default=''
flags=(
  'project|!|Google Cloud project'
  'zone|!|zone, such as us-east5-b'
  'type|v6e-8|accelerator type, such as v5litepod-16 or v6e-16'
  "bucket|$bucket_default|bucket for code, checkpoints and metrics"
  "config|$config_default|config, with its argument if any"
  'name||name of node and request; by default from the config'
  'workdir||workdir; by default gs://<bucket>/runs/<name>'
  'store||trained parents; by default gs://<bucket>/runs/stages'
  'runtime||software version; by default that of the type'
  'service_account||account that the machines act as'
  'spot|false|machines that may be preempted, for less money'
)

read_flags "$@"
if [ "$verb" = delete ]; then settle_end; else settle_run archive; fi
check_cloud
size=${type#*-} sizes='(1|4|8|16|32|64|128|256)'
if [[ $type =~ ^(v5litepod|v5e)-$sizes$ ]]; then
  type=v5litepod-$size default=v2-alpha-tpuv5-lite
elif [[ $type =~ ^v6e-$sizes$ ]]; then
  default=v2-alpha-tpuv6e
elif [[ $type =~ ^v5p-(8|16|32|64)$ ]] ||
  { [[ $type =~ ^v5p-[1-9][0-9]{2,4}$ ]] && [ $((size % 128)) -eq 0 ] && [ "$size" -le 12288 ]; }; then
  default=v2-alpha-tpuv5
elif [[ $type =~ ^(tpu7x|v7x|ironwood) ]]; then
  fail "queued resources have no TPU7x; use launch/tpu_mig.sh or launch/gke_jobset.sh"
else
  fail "unknown type '$type'; use v5litepod-<chips> or v6e-<chips> (1, 4, 8, 16, ... 256), or v5p-<cores> (8, 16, ...)"
fi
runtime=${runtime:-$default}
[[ $runtime =~ ^[a-z0-9.-]+$ ]] || fail "'$runtime' is no software version"
[ "$verb" = delete ] ||
  notes+=("Google no longer develops this API; launch/tpu_mig.sh and launch/gke_jobset.sh are what follows it")
place=("--project=$project" "--zone=$zone")

plan() {
  case $verb in create | recreate | run) startup_and_code '' ;; esac
  set -- gcloud compute tpus queued-resources delete "$name" "${place[@]}" --force --quiet
  case $verb in
    delete) command_line "$@" ;;
    recreate) command_line "$@" | or_not ;;
  esac
  case $verb in
    create | recreate)
      set -- "--metadata-from-file=startup-script=$startup" --scopes=https://www.googleapis.com/auth/cloud-platform
      [ -z "$service_account" ] || set -- "$@" "--service-account=$service_account"
      ! $spot || set -- "$@" --spot
      command_line gcloud compute tpus queued-resources create "$name" "--node-id=$name" "${place[@]}" \
        "--accelerator-type=$type" "--runtime-version=$runtime" "$@"
      ;;
    run)
      command_line gcloud compute tpus tpu-vm scp "$startup" "$name:startup.sh" "${place[@]}" --worker=all
      command_line gcloud compute tpus tpu-vm ssh "$name" "${place[@]}" --worker=all '--command=sudo bash startup.sh'
      ;;
  esac
}

finish gcloud
