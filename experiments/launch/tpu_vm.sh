#!/usr/bin/env bash
# Runs one command on every host of a Cloud TPU VM (v4 to v6e), after bringing the same revision onto each of them.
# Its exit code is gcloud's. Run again, it goes on: the checkout is reused, and so is the run's workdir.
#
#   REPOSITORY=https://... REVISION=COMMIT tpu_vm.sh NAME ZONE train --distributed --workdir gs://... --gin_file ...
set -euo pipefail

if (($# < 3)); then
  echo "usage: REPOSITORY=URL REVISION=COMMIT $0 TPU-NAME ZONE COMMAND [ARGUMENT...]" >&2
  exit 2
fi
name=$1 zone=$2
shift 2
: "${REPOSITORY:?the address to clone from is missing}" "${REVISION:?the commit, tag or branch to run is missing}"

# Quoted once here, so that a remote shell sees the arguments as they were given.
printf -v command '%q ' "$@"
printf -v setup '%q ' "$REPOSITORY" "$REVISION"
remote="set -e -- $setup
  test -d coconut-run || git clone --quiet \"\$1\" coconut-run
  cd coconut-run && git fetch --quiet origin \"\$2\" && git checkout --quiet --detach FETCH_HEAD
  test -d .venv || python3 -m venv .venv
  .venv/bin/pip install --quiet --editable '.[tpu,gcs]'
  exec .venv/bin/coconut $command"

exec gcloud compute tpus tpu-vm ssh "$name" --zone="$zone" --worker=all --command="$remote"
