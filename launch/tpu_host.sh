#!/usr/bin/env bash
# What a TPU machine runs, as root, whenever it starts. tpu_vm.sh and tpu_mig.sh set in front of it: code, the archive
# in the bucket; run, the flags of maskrl_jax.main; group (empty: none), zone and hosts of a managed instance group.
# shellcheck disable=SC2154
set -euo pipefail

: "${code:?is the archive of the code; tpu_vm.sh and tpu_mig.sh set it in front of this script}"
export HOME="${HOME:-/root}"
mkdir -p "${MASKRL_HOME:=/opt/maskrl}"
cd "$MASKRL_HOME"
systemctl stop maskrl 2>/dev/null || true # the run of before saves first
gcloud storage cat "$code" | tar -xz

# The Python of these images is too old (3.10), so uv brings one; a machine that starts again keeps it.
if [ ! -x .venv/bin/python ]; then
  command -v uv >/dev/null || curl -LsSf https://astral.sh/uv/install.sh | env UV_INSTALL_DIR=/usr/local/bin sh
  uv venv --python 3.12 .venv
fi
uv pip install --quiet --python .venv/bin/python --editable '.[tpu,gcs]'

# The TPU VM service tells its machines about each other. It is not documented that a managed instance group does, so
# there the sorted names of its machines number the processes, and the first is the coordinator.
process=(--distributed)
if [ -n "$group" ]; then
  members() {
    gcloud compute instance-groups managed list-instances "$group" --zone="$zone" \
      --format='value(instance.basename())' | sort
  }
  until [ "$(members | wc -l)" -eq "$hosts" ]; do sleep 10; done
  mapfile -t names < <(members)
  own=$(curl -sSf -H 'Metadata-Flavor: Google' http://metadata.google.internal/computeMetadata/v1/instance/name)
  for id in "${!names[@]}"; do [ "${names[$id]}" != "$own" ] || break; done
  [ "${names[$id]}" = "$own" ] || { echo "error: $own is not in the group $group" >&2 && exit 1; }
  address=$(gcloud compute instances describe "${names[0]}" --zone="$zone" \
    --format='value(networkInterfaces[0].networkIP)')
  process+=("--coordinator_address=$address:8476" "--num_processes=$hosts" "--process_id=$id")
fi

# A unit of its own gets SIGTERM when the machine is preempted, while the network is still there: the run saves.
# Exit codes 1 and 2 are mistakes that starting again does not mend.
exec systemd-run --unit=maskrl --collect --property=WorkingDirectory="$MASKRL_HOME" \
  --property=After=network-online.target --property=KillMode=mixed --property=TimeoutStopSec=120 \
  --property=Restart=on-failure --property=RestartSec=30 --property="RestartPreventExitStatus=1 2" \
  --property="RestartForceExitStatus=42 143" --property=StartLimitIntervalSec=3600 --property=StartLimitBurst=20 \
  "$MASKRL_HOME/.venv/bin/python" -m maskrl_jax.main "${process[@]}" "${run[@]}"
