#!/bin/bash
# Installs the Debian packages whose programs the interop tests and the demo use as peers.
# As root it installs them; otherwise it says the command. APT=0 opts out. It never calls sudo.
set -uo pipefail
declare -A programs=(
    [qemu-utils]="qemu-img" [libnbd-bin]="nbdinfo" [nbdkit]="nbdkit" [e2fsprogs]="/usr/sbin/mke2fs"
    [etcd-server]="etcd" [fio]="fio" [btrfs-progs]="/usr/sbin/mkfs.btrfs" [xfsprogs]="/usr/sbin/mkfs.xfs"
)
missing=()
for package in "${!programs[@]}"; do
    command -v "${programs[$package]}" >/dev/null || missing+=("$package")
done
echo "packages: interop tests want: ${!programs[*]}"
[ ${#missing[@]} = 0 ] && exit 0
if [ "${APT:-1}" = 0 ]; then
    echo "packages: APT=0, not installing ${missing[*]}: tests that need them are skipped"
elif [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
    echo "packages: installing ${missing[*]}"
    # A policy-rc.d that answers 101 keeps services that a package brings from being started.
    policy=/usr/sbin/policy-rc.d
    if [ ! -e $policy ]; then
        printf '#!/bin/sh\nexit 101\n' >$policy && chmod 755 $policy
        trap 'rm -f $policy' EXIT
    fi
    export DEBIAN_FRONTEND=noninteractive
    log=$(mktemp)
    if ! { apt-get update -qq && apt-get install -y -qq --no-install-recommends "${missing[@]}"; } >"$log" 2>&1
    then
        tail -n 3 "$log"
        echo "packages: could not install ${missing[*]}: tests that need them are skipped"
    fi
    rm -f "$log"
else
    echo "packages: as root say 'apt-get install --no-install-recommends ${missing[*]}';" \
         "until then tests that need them are skipped"
fi
exit 0
