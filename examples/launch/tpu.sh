#!/usr/bin/env bash
# Trains on Cloud TPU, on one slice or several: what docs/tpu.md describes, step by step.
#
#   examples/launch/tpu.sh create           asks for the slices, and waits in the queue
#   examples/launch/tpu.sh status           says whether they are there
#   examples/launch/tpu.sh install          copies this checkout to every host, and installs it
#   examples/launch/tpu.sh run ARGUMENT...  starts `train_tpu.py ARGUMENT...` on every host
#   examples/launch/tpu.sh logs             shows the log of the first host until Ctrl-C
#   examples/launch/tpu.sh ends             shows the last lines of every host
#   examples/launch/tpu.sh stop             saves, and ends the run on all hosts
#   examples/launch/tpu.sh delete           gives the slices back
#
# Variables; the first two have no default:
#
#   NAME     of the slice, or the beginning of the slices' names
#   ZONE     such as us-west4-a
#   TYPE     of a slice (v5litepod-16)
#   RUNTIME  the image of the hosts that belongs to TYPE (v2-alpha-tpuv5-lite)
#   SLICES   how many slices (1)
#   MODE     options for `create`, such as --spot
set -euo pipefail
cd "$(dirname "$0")/../.."

usage() {
  sed -n '2,/^set/s/^# \{0,1\}//p' examples/launch/tpu.sh
  exit 2
}

[[ $# -gt 0 && $1 != --help ]] || usage
: "${NAME:?give the slice a name: NAME=...}" "${ZONE:?name a zone: ZONE=...}"
TYPE=${TYPE:-v5litepod-16}
RUNTIME=${RUNTIME:-v2-alpha-tpuv5-lite}
SLICES=${SLICES:-1}
FOLDER=flax-projector # on the hosts, in the home folder

slices() {
  if ((SLICES == 1)); then
    echo "$NAME"
  else
    seq -f "$NAME-%.0f" 0 $((SLICES - 1))
  fi
}

queue() {
  gcloud compute tpus queued-resources "$@" --zone "$ZONE"
}

# Runs a command on every host of every slice at once. Fails if it fails on any of them.
everywhere() {
  local slice job jobs=()
  while read -r slice; do
    gcloud compute tpus tpu-vm ssh "$slice" --zone "$ZONE" --worker=all --command "$1" &
    jobs+=($!)
  done < <(slices)
  for job in "${jobs[@]}"; do
    wait "$job"
  done
}

command=$1
shift
case $command in
  create)
    if ((SLICES == 1)); then
      nodes=(--node-id "$NAME")
    else
      nodes=(--node-prefix "$NAME" --node-count "$SLICES")
    fi
    # shellcheck disable=SC2086  # several options
    queue create "$NAME" "${nodes[@]}" --accelerator-type "$TYPE" --runtime-version "$RUNTIME" \
      --scopes https://www.googleapis.com/auth/cloud-platform ${MODE:-}
    ;;
  status)
    queue describe "$NAME" --format 'value(state.state)'
    ;;
  install)
    archive=$(mktemp --suffix .tar.gz)
    trap 'rm -f "$archive"' EXIT
    git ls-files -z | tar --null --files-from - -czf "$archive"
    while read -r slice; do
      gcloud compute tpus tpu-vm scp "$archive" "$slice:$FOLDER.tar.gz" \
        --zone "$ZONE" --worker=all
    done < <(slices)
    # The images have an older Python; uv brings one. The same versions on every host.
    everywhere "set -e
      mkdir -p $FOLDER && tar -xzf $FOLDER.tar.gz -C $FOLDER && cd $FOLDER
      command -v uv || curl -LsSf https://astral.sh/uv/install.sh | sh
      export PATH=\$HOME/.local/bin:\$PATH
      test -d .venv || uv venv --python 3.11
      uv pip install --constraint constraints.txt -e '.[tpu,gcs]'"
    ;;
  run)
    # Every host has its own log. The program goes on when the connection is gone.
    everywhere "cd $FOLDER
      if ! flock --nonblock train.lock true; then
        echo 'a run is going on: stop it first'
        exit 1
      fi
      setsid nohup flock --nonblock --no-fork train.lock \
        .venv/bin/python -u train_tpu.py $(printf '%q ' "$@") >> train.log 2>&1 < /dev/null &
      echo \$! > train.pid"
    ;;
  logs)
    slice=$(slices | head -n 1)
    gcloud compute tpus tpu-vm ssh "$slice" --zone "$ZONE" --worker=0 \
      --command "tail -n 100 -F $FOLDER/train.log"
    ;;
  ends)
    everywhere "hostname; tail -n 3 $FOLDER/train.log"
    ;;
  stop)
    everywhere "cd $FOLDER && (flock --nonblock train.lock true || kill -TERM \$(cat train.pid))"
    ;;
  delete)
    queue delete "$NAME" --force --quiet
    ;;
  *)
    usage
    ;;
esac
