#!/usr/bin/env bash
# Train on a TPU slice of GKE: bash launch/gke_jobset.sh --help
# shellcheck disable=SC2154,SC2034 # every flag becomes a variable, and the template names variables
set -euo pipefail
# shellcheck source=launch/plan.sh
source "$(dirname "${BASH_SOURCE[0]}")/plan.sh"

about="usage: bash launch/gke_jobset.sh [flags] [-- flags of maskrl_jax.main]

Trains a config on a TPU slice (v5e, v6e, v5p, TPU7x) of the cluster of kubectl's current context, as a JobSet:
fills in launch/gke_jobset.yaml and gives it to kubectl apply; --dry_run prints it. Project, zone and cluster are those
of the context. --reward adds a reward server (docs/remote_rewards.md), and the run asks it."
flags=(
  'type|v6e|v5e, v6e, v5p or tpu7x'
  'topology|4x4|chips of the slice, as the node pool has it: 4x4 (v5e, v6e), 2x2x2 (v5p, tpu7x)'
  'chips_per_host|4|chips of a node'
  'bucket|!|bucket for checkpoints and metrics'
  'image|!|container image with this library, jax[tpu] and gcsfs; docs/launch.md says how to make one'
  'config|configs/speed_rl.py|config, with its argument if any'
  'name||name of the JobSet; by default from the config'
  'namespace|default|namespace of the JobSet'
  'workdir||workdir; by default gs://<bucket>/runs/<name>'
  'store||trained parents; by default gs://<bucket>/runs/stages'
  'service_account|default|Kubernetes account that may write to the bucket'
  'spot|false|nodes that may be preempted, for less money'
  'grace|90|seconds from SIGTERM to SIGKILL, at least 60'
  'max_restarts|100|times that the run is started again'
  'reward||reward of maskrl_jax.rewards.server to serve beside the run, such as strict'
  'reward_flags||more flags of the server, such as --folder=/weights'
  'reward_image||its container image; by default that of the run'
  'reward_cpu|4|its CPU cores'
  'reward_memory|16Gi|its memory'
)

read_flags "$@"
settle_run
count_hosts
case $type in
  v5e) accelerator=tpu-v5-lite-podslice ;;
  v6e) accelerator=tpu-v6e-slice ;;
  v5p) accelerator=tpu-v5p-slice ;;
  tpu7x) accelerator=tpu7x ;;
  *) fail "unknown type '$type'; use v5e, v6e, v5p or tpu7x" ;;
esac
[[ $grace =~ ^[0-9]+$ && $grace -ge 60 ]] || fail "grace '$grace' must be a number of seconds, at least 60"
[[ $max_restarts =~ ^[0-9]+$ ]] || fail "max_restarts '$max_restarts' is no number"
for word in "$image" "$reward_image" "$namespace" "$service_account" "$reward_cpu" "$reward_memory"; do
  [[ $word =~ ^[A-Za-z0-9@:/._-]*$ ]] || fail "'$word' is no name of an image, a namespace, an account or an amount"
done

reward_image=${reward_image:-$image}
read -ra more_reward_flags <<<"$reward_flags"
reward_command=(python -m maskrl_jax.rewards.server "--reward=$reward" --host=0.0.0.0 --port=8421
  ${more_reward_flags[@]+"${more_reward_flags[@]}"})
command=(python -m maskrl_jax.main --distributed "${run[@]}")
[ -z "$reward" ] || command+=("--config.service.url=http://$name-reward-0-0.$name:8421")

# The words of an array as items of a YAML list, double-quoted, each after the same indentation.
items() {
  local list="$2[@]" word
  for word in "${!list}"; do
    word=${word//\\/\\\\}
    printf '%s"%s"\n' "$1" "${word//\"/\\\"}"
  done
}

render() {
  local line key kept=true
  while IFS= read -r line; do
    case $line in
      *'# with reward') [ -n "$reward" ] || kept=false ;;
      *'# with spot') kept=$spot ;;
      *'# end') kept=true ;;
      *'- {{'*command'}}') $kept && key=${line##*\{\{} && items "${line%%\{\{*}" "${key%\}\}}" ;;
      *)
        if [[ $line == *'{{'*'}}'* && $line != '#'* ]]; then
          key=${line##*\{\{} key=${key%\}\}*}
          line=${line%%\{\{*}${!key}${line##*\}\}}
        fi
        ! $kept || printf '%s\n' "$line"
        ;;
    esac
  done < <(sed 1,2d launch/gke_jobset.yaml)
}

if $dry_run; then
  render
else
  render | kubectl apply -f -
fi
