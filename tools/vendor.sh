#!/bin/sh
# Fetch the two scripts that show ipywidgets on the site (needs npm; only pages with widgets use them).
# MathJax does not come from here: the docs extra brings it, and tools/build_site.py takes it from there.
set -eu
cd "$(dirname "$0")/../docs/_static"
if [ -f vendor/embed-amd.js ] && [ -f vendor/require.js ]; then exit 0; fi
if ! command -v npm >/dev/null; then echo "vendor: no npm, so widgets stay out of the site" >&2; exit 0; fi
aside=$(mktemp -d)
trap 'rm -rf "$aside"' EXIT
(cd "$aside" && npm pack --silent @jupyter-widgets/html-manager@1.0.15 requirejs@2.3.8 >/dev/null \
    && for f in *.tgz; do tar xzf "$f" && mv package "${f%.tgz}"; done)
mkdir -p vendor
cp "$aside"/jupyter-widgets-html-manager-*/dist/embed-amd.js "$aside"/requirejs-*/require.js vendor/
cd vendor && grep -v tex-svg ../vendor.sha256 | sha256sum -c --quiet - || { rm -f embed-amd.js require.js; echo "vendor: wrong checksum, nothing kept" >&2; exit 1; }
