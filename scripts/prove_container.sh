#!/usr/bin/env bash
# Builds the image of deploy/Dockerfile without a container engine, starts its server in the image's
# root, and checks that it edits, that its health check works, and that SIGTERM ends it.
#
#     sudo scripts/prove_container.sh [OPTION of buildah ...]
#
# It needs Linux, root, and Debian's packages buildah and debootstrap. Debian is installed into a
# folder and takes the place of the published base image, which is made in the same way. Options go
# to `buildah bud`: for example --volume and --env for a package index of your own.
set -euo pipefail
cd "$(dirname "$0")/.."

# Mounts of this script are not seen outside, and end with it.
[ -n "${OWN_MOUNTS:-}" ] || exec env OWN_MOUNTS=1 unshare --mount --propagation private "$0" "$@"

work=$(mktemp -d)
export BUILDAH_ISOLATION=chroot
buildah() { command buildah --root "$work/storage" --runroot "$work/run" "$@"; }
tidy() {
    [ -z "${server:-}" ] || kill -KILL "$server"
    umount --recursive --lazy "$work/tree" || true
    buildah umount --all > /dev/null || true
    rm -rf "$work"
}
trap tidy EXIT

echo "1. a base image like debian:bookworm-slim"
debootstrap --variant=minbase bookworm "$work/debian" > "$work/debootstrap.log"
base=$(buildah from scratch)
buildah copy --quiet "$base" "$work/debian" / > /dev/null
buildah commit --quiet "$base" base > /dev/null
buildah rm "$base" > /dev/null
rm -rf "$work/debian"

echo "2. deploy/Dockerfile, target cpu"
buildah bud --quiet --pull-never --file deploy/Dockerfile --target cpu --build-arg BASE=localhost/base \
    --tag server "$@" . > /dev/null
container=$(buildah from --pull-never server)
image=$(buildah mount "$container")
echo "   $(du -sm "$image" | cut -f1) MB"

echo "3. the server: a numeric user, no capabilities, a read-only root, /data and /tmp writable"
mkdir "$work/tree" "$work/data"
chown 10001:10001 "$work/data"
mount --bind --options ro "$image" "$work/tree"
mount --bind "$work/data" "$work/tree/data"
mount --types tmpfs tmpfs "$work/tree/tmp"
mount --types proc proc "$work/tree/proc"
mount --types tmpfs tmpfs "$work/tree/dev"
for device in null zero random urandom; do
    touch "$work/tree/dev/$device"
    mount --bind "/dev/$device" "$work/tree/dev/$device"
done
mkdir --mode 1777 "$work/tree/dev/shm"
server=
key=$(head --bytes 16 /dev/urandom | od -An -tx1 | tr -d ' \n')
mapfile -t environment < <(buildah inspect --format '{{range .OCIv1.Config.Env}}{{println .}}{{end}}' "$container")
inside=(
    chroot "$work/tree" env --ignore-environment "${environment[@]}" "API_KEY=$key" PORT=18000
    setpriv --reuid 10001 --regid 10001 --clear-groups --no-new-privs --bounding-set=-all
)
ready() { "${inside[@]}" python3 /opt/healthcheck.py; }

if "${inside[@]}" touch /opt/healthcheck.py 2> /dev/null; then
    echo "the root is not read-only" >&2
    exit 1
fi
"${inside[@]}" step1x-edit serve 2> "$work/server.log" &
server=$!
for _ in $(seq 120); do
    ready 2> /dev/null && break
    sleep 1
done
ready || { cat "$work/server.log" >&2; exit 1; }
echo "   ready"

echo "4. an edit over REST"
curl --silent --show-error --fail --header "Authorization: Bearer $key" --output "$work/night.png" \
    --form "file=@src/step1x_edit/interfaces/assets/coffee.jpg" --form "prompt=change to night scene" \
    --form size_level=512 --form num_steps=10 http://127.0.0.1:18000/api/edit
echo "   $(stat --format %s "$work/night.png") bytes; in /data: $(ls "$work/data" | tr '\n' ' ')"

echo "5. SIGTERM"
kill -TERM "$server"
status=0
wait "$server" || status=$?
server=
echo "   exit status $status"
if ready 2> /dev/null; then
    echo "the server still answers" >&2
    exit 1
fi
