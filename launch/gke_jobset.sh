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
  'topology||chips of the slice, as the node pool has it; by default 4x4 (v5e, v6e) or 2x2x4 (v5p, tpu7x)'
  'chips_per_host||chips of a node; by default 4, or all of a smaller slice; 8 for a v5e or v6e slice of one node'
  'bucket|!|bucket for checkpoints and metrics'
  'image|!|container image of the last commit, made with launch/Dockerfile (docs/launch.md)'
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
  'reward_cpu||its CPU cores; by default 4'
  'reward_memory||its memory; by default 16Gi'
)

read_flags "$@"
settle_run elsewhere
case $type in
  v5e) accelerator=tpu-v5-lite-podslice ;;
  v6e) accelerator=tpu-v6e-slice ;;
  v5p) accelerator=tpu-v5p-slice ;;
  tpu7x) accelerator=tpu7x ;;
  *) fail "unknown type '$type'; use v5e, v6e, v5p or tpu7x" ;;
esac
count_hosts
is_number "$grace" && [ "$grace" -ge 60 ] || fail "grace '$grace' must be a number of seconds, at least 60"
is_number "$max_restarts" || fail "max_restarts '$max_restarts' is no number"

# An empty value passes where the flag may be left out.
check() { [[ ${!1} =~ $2 ]] || fail "$1 '${!1}' is not $3"; }
label='[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?'
check namespace "^$label$" "a name of a-z, 0-9 and -"
check service_account "^$label(\.$label)*$" "a name of a-z, 0-9, - and ."
image_name='[a-z0-9][a-z0-9:/._-]*(:[A-Za-z0-9._-]+)?(@sha256:[0-9a-f]+)?'
check image "^$image_name$" "a name of an image"
check reward_image "^($image_name)?$" "a name of an image"
check reward '^([a-z][a-z0-9_]*)?$' "a name of a reward; python -m maskrl_jax.rewards.server --help lists them"
check reward_cpu '^([0-9]+(\.[0-9]+|m)?)?$' "a number of cores, such as 4 or 500m"
check reward_memory '^([0-9]+(\.[0-9]+)?(Ki|k|[MGTPE]i?)?)?$' "an amount of memory, such as 16Gi"
[ -n "$reward" ] || [ -z "$reward_flags$reward_image$reward_cpu$reward_memory" ] ||
  fail "reward_flags, reward_image, reward_cpu and reward_memory go with --reward"
[[ $reward_flags != *[[:cntrl:]]* ]] || fail "reward_flags have a line break or another control character in them"

reward_image=${reward_image:-$image} reward_cpu=${reward_cpu:-4} reward_memory=${reward_memory:-16Gi}
read -ra more_reward_flags <<<"$reward_flags"
reward_command=(python -m maskrl_jax.rewards.server "--reward=$reward" --host=0.0.0.0 --port=8421
  ${more_reward_flags[@]+"${more_reward_flags[@]}"})
command=(python -m maskrl_jax.main --distributed "${run[@]}")
[ -z "$reward" ] || command+=("--config.service.url=http://$name-reward-0-0.$name:8421")

# The words of an array as items of a YAML list, double-quoted, each after the same indentation. Kubernetes puts the
# value of a variable for $(NAME), and $ for $$.
items() {
  local list="$2[@]" word
  for word in "${!list}"; do
    word=${word//\$/\$\$}
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

say_notes
if $dry_run; then
  render
else
  needs kubectl "see docs/launch.md, or look at --dry_run"
  render | kubectl apply -f -
fi
