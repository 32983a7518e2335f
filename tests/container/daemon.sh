#!/usr/bin/env bash
# A Docker daemon for the container's tests, for a machine that has none: from Debian's packages, in a
# folder of its own, with a base image made here, so that no registry of images is needed.
#
#   eval "$(tests/container/daemon.sh up FOLDER)"      prints DOCKER_HOST and PATH for the shell
#   tests/container/daemon.sh down FOLDER
#
# Needs root and apt-get. What happens is told on stderr; exit status 1 where it cannot be.
set -euo pipefail
action=${1:?up or down} folder=$(mkdir -p "${2:?folder}" && cd "$2" && pwd)
base=python:3.11-slim-bookworm
socket=unix://$folder/docker.sock

tell() { echo "container daemon: $*" >&2; }
quietly() { "$@" >>"$folder/setup.log" 2>&1 || { tell "$1 failed; see $folder/setup.log"; exit 1; }; }

if [ "$action" = down ]; then
  if [ -s "$folder/docker.pid" ]; then kill "$(cat "$folder/docker.pid")"; fi
  exit 0
fi
[ "$(id -u)" = 0 ] || { tell "needs root"; exit 1; }
command -v apt-get >/dev/null || { tell "needs apt-get"; exit 1; }

cd "$folder"
export PATH="$folder/root/usr/sbin:$folder/root/usr/bin:$PATH" DOCKER_HOST=$socket
if [ ! -x root/usr/sbin/dockerd ]; then
  tell "unpacking Docker"
  quietly apt-get -qq update
  quietly apt-get -qq install --yes --no-install-recommends iptables mmdebstrap
  quietly apt-get -qq download docker.io containerd runc tini
  for package in ./*.deb; do dpkg -x "$package" root; done
fi
cat >daemon.json <<JSON
{"data-root": "$folder/data", "exec-root": "$folder/exec", "pidfile": "$folder/docker.pid",
 "hosts": ["$socket"]}
JSON
setsid dockerd --config-file daemon.json >daemon.log 2>&1 </dev/null &
for _ in $(seq 60); do docker info >/dev/null 2>&1 && break; sleep 0.5; done
docker info >/dev/null 2>&1 || { tell "it did not start; see $folder/daemon.log"; exit 1; }

if ! docker image inspect "$base" >/dev/null 2>&1; then
  tell "making the base image"
  # Like the slim image that it stands for, without documentation. What this machine trusts and how
  # it reaches packages, the image must, too.
  quietly mmdebstrap --quiet --variant=minbase \
    --dpkgopt=path-exclude=/usr/share/doc/* --dpkgopt=path-exclude=/usr/share/man/* \
    --dpkgopt=path-exclude=/usr/share/locale/* \
    --include=python3,python3-pip,python3-venv,ca-certificates bookworm base.tar
  mkdir -p base && tar -xf base.tar -C base
  cp /usr/local/share/ca-certificates/*.crt base/usr/local/share/ca-certificates/ 2>/dev/null || true
  if [ -e /etc/pip.conf ]; then cp /etc/pip.conf base/etc/; fi
  quietly chroot base update-ca-certificates
  tar -C base -c . | docker import --change 'ENV PIP_CERT=/etc/ssl/certs/ca-certificates.crt' \
    - "$base" >>setup.log
  rm -rf base base.tar
fi
tell "ready"
echo "export DOCKER_HOST='$DOCKER_HOST' PATH='$folder/root/usr/sbin:$folder/root/usr/bin':\"\$PATH\""
