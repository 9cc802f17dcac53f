#!/usr/bin/env bash
# Runs on a machine of a slice, from the unpacked checkout: what tpu_queued_resources.sh and gce_instance_group.sh do there.
set -euo pipefail
# shellcheck source=launch/shell.sh
source "$(dirname "${BASH_SOURCE[0]}")/shell.sh"

usage="Install avlm on this machine, and run it as a systemd unit, which outlives ssh and comes back after a reboot.

  launch/on_worker.sh install [--bucket BUCKET] [--extra tpu]
  launch/on_worker.sh start --name NAME --bucket BUCKET -- --config ... --workdir /mnt/avlm/...
  launch/on_worker.sh stop | logs

For Ubuntu 22.04 or newer on x86-64, with sudo. The bucket is mounted at /mnt/avlm by Cloud Storage FUSE.

actions:
  install     Python 3.11 by uv, .venv from the lock file with its hashes; with --bucket Cloud Storage FUSE as well
  start       write and start the unit avlm-train, which runs \`avlm train\` under supervise.sh
  stop        SIGTERM to the training, which saves a checkpoint; it does not come back at a reboot
  logs        follow the unit's log

options:
  --name NAME      of the run; its reports go to gs://BUCKET/launch/NAME
  --bucket BUCKET  what is mounted, without gs://
  --extra NAME     of setup.py: tpu (default) or gpu
  --dry-run        print the commands
  -h, --help       this text"

# shellcheck disable=SC2034 # name is read by require.
name="" bucket="" extra=tpu
parse_options "$@"
choose_action install start stop logs
cd "$root"

MOUNT=/mnt/avlm
UNIT=avlm-train
UV_VERSION=0.13.8 # As the Makefile's.
UV_WHEEL=uv-$UV_VERSION-py3-none-manylinux_2_17_x86_64.manylinux2014_x86_64.whl
UV_URL=https://files.pythonhosted.org/packages/c5/32/52ee34636aea1ab3f8baeeae1c3599461b8cddfb379862cc72ac61b8d91c/$UV_WHEEL
UV_SHA256=e18a57b8b352eb7c8feb317b9f6f533c8f0ad9673fd6cf34bbe3cf1a9f6a8984

# docs.cloud.google.com/storage/docs/cloud-storage-fuse/install
install_gcsfuse() {
  note "Cloud Storage FUSE, and the bucket at $MOUNT, also after a reboot."
  if [[ ! $dry_run ]] && command -v gcsfuse > /dev/null; then
    say "gcsfuse is there"
  else
    run sudo mkdir -p /usr/share/keyrings
    run sudo curl -fsSL --retry 5 -o /usr/share/keyrings/cloud.google.asc https://packages.cloud.google.com/apt/doc/apt-key.gpg
    # shellcheck disable=SC2016 # Expanded by the shell that bash -c starts.
    run bash -c 'echo "deb [signed-by=/usr/share/keyrings/cloud.google.asc] https://packages.cloud.google.com/apt gcsfuse-$(lsb_release -cs) main" | sudo tee /etc/apt/sources.list.d/gcsfuse.list'
    # A new machine may still be updating itself: wait for apt's lock.
    run sudo apt-get -o DPkg::Lock::Timeout=600 update
    run sudo apt-get -o DPkg::Lock::Timeout=600 install --yes gcsfuse
  fi
  # No metadata cache: what one machine writes, the others must find at once (the parent stage's result).
  local entry
  entry="$bucket $MOUNT gcsfuse rw,allow_other,_netdev,implicit_dirs,metadata_cache_ttl_secs=0,uid=$(user_id),gid=$(group_id)"
  run sudo mkdir -p "$MOUNT"
  # shellcheck disable=SC2016 # Expanded by the shell that bash -c starts.
  run bash -c 'grep -qxF -- "$1" /etc/fstab || echo "$1" | sudo tee -a /etc/fstab' fstab "$entry"
  run bash -c "mountpoint -q $MOUNT || sudo mount $MOUNT"
}

# Whoever runs this owns the mounted files; fixed under --dry-run, which prints what another machine would do.
user_id() { if [[ $dry_run ]]; then echo 1000; else id -u; fi; }
group_id() { if [[ $dry_run ]]; then echo 1000; else id -g; fi; }
user_name() { if [[ $dry_run ]]; then echo ubuntu; else id -un; fi; }

install_avlm() {
  note "uv, checked against its hash; with it Python 3.11, which Ubuntu 22.04 does not have; then avlm."
  run mkdir -p .cache/uv
  run curl -fsSL --retry 5 -o ".cache/uv/$UV_WHEEL" "$UV_URL"
  run bash -c "echo '$UV_SHA256  .cache/uv/$UV_WHEEL' | sha256sum --check --quiet"
  run python3 -m zipfile -e ".cache/uv/$UV_WHEEL" .cache/uv
  run chmod +x ".cache/uv/uv-$UV_VERSION.data/scripts/uv"
  run ".cache/uv/uv-$UV_VERSION.data/scripts/uv" python install --install-dir .cache/python 3.11
  # shellcheck disable=SC2016 # Expanded by the shell that bash -c starts.
  run bash -c '.cache/python/cpython-3.11*/bin/python3.11 requirements/install.py .venv --extra "$1" --extra gcp' install "$extra"
  run .venv/bin/avlm --version
  note "What configurations name from here, and by the same name at home."
  run ln -sfn $MOUNT/records records
  run ln -sfn $MOUNT/weights weights
}

start_unit() {
  note "The command, and the unit that keeps it running."
  write_file .cache/train.sh << END
#!/usr/bin/env bash
exec bash $(quote "$here")/launch/supervise.sh --report $MOUNT/launch/$name -- $(quote "$here")/.venv/bin/avlm train $(quote_all "${train[@]}")
END
  # TimeoutStopSec: \`avlm train\` needs up to 25 s to save after SIGTERM. KillMode=mixed: only supervise.sh gets the signal.
  write_file .cache/$UNIT.service << END
[Unit]
Description=avlm train ($name)
Wants=network-online.target
After=network-online.target remote-fs.target
RequiresMountsFor=$MOUNT

[Service]
User=$(user_name)
WorkingDirectory=$here
ExecStart=/bin/bash $here/.cache/train.sh
KillMode=mixed
TimeoutStopSec=60
Restart=no

[Install]
WantedBy=multi-user.target
END
  run sudo install -m 644 .cache/$UNIT.service /etc/systemd/system/$UNIT.service
  run sudo systemctl daemon-reload
  run sudo systemctl enable $UNIT
  run sudo systemctl restart $UNIT
}

here=$root
if [[ $dry_run ]]; then here=/home/ubuntu/avlm_jax; fi
case $action in
  install)
    if [[ $bucket ]]; then install_gcsfuse; fi
    install_avlm
    ;;
  start)
    require --name saven-2a --bucket my-bucket
    require_training_on_bucket
    start_unit
    ;;
  stop)
    run sudo systemctl disable --now $UNIT
    ;;
  logs)
    run journalctl --unit $UNIT --lines 100 --follow
    ;;
esac
