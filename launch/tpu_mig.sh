#!/usr/bin/env bash
# Train on a TPU slice of Compute Engine: bash launch/tpu_mig.sh [create|recreate|delete] --help
# shellcheck disable=SC2154 # every flag becomes a variable
set -euo pipefail
# shellcheck source=launch/plan.sh
source "$(dirname "${BASH_SOURCE[0]}")/plan.sh"

about="usage: bash launch/tpu_mig.sh [create|recreate|delete] [flags] [-- flags of maskrl_jax.main]

Trains a config on a TPU slice (v5p, v6e, TPU7x) that is a managed instance group of Compute Engine: instance template,
HIGH_THROUGHPUT workload policy with the slice's topology, group. 'create' makes them, with a startup script that starts
the run on every machine, and resumes it; 'recreate' deletes them first, as after a preemption; 'delete' ends it.
The address of worker 0 is passed to every process, for it is not documented that these machines tell JAX."
verb=create bucket_default=! config_default=configs/speed_rl.py
case ${1:-} in create | recreate | delete) verb=$1 && shift ;; esac
[ "$verb" = create ] || config_default=''
[ "$verb" != delete ] || bucket_default=''
flags=(
  'project|!|Google Cloud project'
  'zone|!|zone, such as us-east5-b'
  'type|v6e|v5p, v6e or tpu7x'
  'topology||chips of the slice; by default 4x4 (v6e) or 2x2x4 (v5p, tpu7x)'
  "bucket|$bucket_default|bucket for code, checkpoints and metrics"
  "config|$config_default|config, with its argument if any"
  'name||name of group, template and policy; by default from the config'
  'workdir||workdir; by default gs://<bucket>/runs/<name>'
  'store||trained parents; by default gs://<bucket>/runs/stages'
  'machine||machine type; by default that of the type with 4 chips'
  'chips_per_host||chips of a machine; by default 4, or all of a smaller slice; 8 for a v6e slice of one machine'
  'service_account||account that the machines act as'
  'spot|false|machines that may be preempted, for less money'
)

read_flags "$@"
if [ "$verb" = delete ]; then settle_end; else settle_run archive; fi
check_cloud
[[ $type =~ ^(v5p|v6e|tpu7x)$ ]] || fail "unknown type '$type'; use v5p, v6e or tpu7x (v5e: launch/tpu_vm.sh)"
count_hosts
family=ubuntu-accel-2204-amd64-tpu-v5e-v5p-v6e
case $type in
  v5p) machine=${machine:-ct5p-hightpu-${chips_per_host}t} ;;
  v6e) machine=${machine:-ct6e-standard-${chips_per_host}t} ;;
  tpu7x) machine=${machine:-tpu7x-standard-${chips_per_host}t} family=ubuntu-accel-2404-amd64-tpu-tpu7x ;;
esac
[[ $machine =~ ^[a-z0-9-]+$ ]] || fail "'$machine' is no machine type"
place=("--project=$project" "--zone=$zone")

# Of a slice that was made in part only, what is not there is passed over; gcloud says so. The machines must be gone.
delete_all() {
  command_line gcloud compute instance-groups managed delete "$name" "${place[@]}" --quiet | or_not
  command_line gcloud compute instance-templates delete "$name" "--project=$project" --quiet | or_not
  command_line gcloud compute resource-policies delete "$name" "--project=$project" "--region=$region" --quiet | or_not
  printf 'left=%s' "\$("
  command_line gcloud compute instance-groups managed list "--project=$project" "--zones=$zone" "--filter=name=$name" \
    '--format=value(name)' | sed '$s/$/)/'
  echo "[ -z \"\$left\" ] || { echo 'error: the group $name is still there' >&2 && exit 1; }"
}

create_all() {
  set -- --maintenance-policy=TERMINATE --boot-disk-size=200GB
  [ "$type" != tpu7x ] || set -- "$@" --boot-disk-type=hyperdisk-balanced
  [ -z "$service_account" ] || set -- "$@" "--service-account=$service_account"
  ! $spot || set -- "$@" --provisioning-model=SPOT --instance-termination-action=STOP
  command_line gcloud compute instance-templates create "$name" "--project=$project" "--machine-type=$machine" \
    --image-project=ubuntu-os-accelerator-images "--image-family=$family" --scopes=cloud-platform \
    "--metadata-from-file=startup-script=$startup" "$@"
  set -- "--template=$name" "--size=$hosts" --default-action-on-vm-failure=do-nothing
  if [ "$hosts" -gt 1 ]; then
    command_line gcloud compute resource-policies create workload-policy "$name" "--project=$project" \
      "--region=$region" --type=HIGH_THROUGHPUT "--accelerator-topology=$topology"
    set -- "$@" --target-size-policy-mode=bulk \
      "--workload-policy=projects/$project/regions/$region/resourcePolicies/$name"
  fi
  command_line gcloud compute instance-groups managed create "$name" "${place[@]}" "$@"
}

plan() {
  case $verb in create | recreate) startup_and_code "$name" ;; esac
  case $verb in recreate | delete) delete_all ;; esac
  case $verb in create | recreate) create_all ;; esac
}

finish gcloud
