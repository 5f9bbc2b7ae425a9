#!/usr/bin/env bash
# A README that a metadata hook supplies is missing from the source distribution.
#
# One would guess: hatchling puts the README of a project into the sdist, whatever else `include` lists.
# What happens: it does so for a static `readme` alone. Where `readme` is dynamic and comes from hatch-fancy-pypi-readme,
# the fragment's own file is left out of the sdist. Nothing warns: a wheel that is built from that sdist still has the
# right description, for hatchling then takes it from PKG-INFO.
# What helps: name the file in `include`.
#
# Versions: hatchling 1.33.0, hatch-fancy-pypi-readme 25.1.0, build 1.4.0.
# Sources: hatchling/builders/sdist.py, where the README of `metadata.core.readme_path` alone is forced into the archive;
# hatchling/metadata/core.py, which takes dynamic fields from a PKG-INFO that is there.
#
# Output seen:
#   static readme:  README in the sdist: yes; description of the wheel: found
#   dynamic readme: README in the sdist: no; description of the wheel: found
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv env
env/bin/python -m pip install --quiet hatchling==1.33.0 hatch-fancy-pypi-readme==25.1.0 build==1.4.0

project() {
    mkdir -p "$1/src/sample"
    echo 'The words of the README.' > "$1/README.md"
    touch "$1/src/sample/__init__.py"
    cat > "$1/pyproject.toml" <<TOML
[build-system]
requires = ["hatchling", "hatch-fancy-pypi-readme"]
build-backend = "hatchling.build"

[project]
name = "sample-$1"
version = "1"
$2

[tool.hatch.build.targets.sdist]
include = ["/src"]

[tool.hatch.build.targets.wheel]
packages = ["src/sample"]
TOML
}

project static 'readme = "README.md"'
project dynamic 'dynamic = ["readme"]'
cat >> dynamic/pyproject.toml <<'TOML'

[tool.hatch.metadata.hooks.fancy-pypi-readme]
content-type = "text/markdown"
fragments = [{ path = "README.md" }]
TOML

seen=$(for kind in static dynamic; do
    (cd "$kind" && ../env/bin/python -m build --no-isolation . > build.log 2>&1)
    holds=no
    tar -tzf "$kind"/dist/*.tar.gz | grep -q '/README.md$' && holds=yes
    found=missing
    env/bin/python -m zipfile -e "$kind"/dist/*.whl "$kind/unpacked"
    grep -q 'The words of the README' "$kind"/unpacked/*.dist-info/METADATA && found=found
    printf '%-15s README in the sdist: %s; description of the wheel: %s\n' "$kind readme:" "$holds" "$found"
done)
echo "$seen"
expected='static readme:  README in the sdist: yes; description of the wheel: found
dynamic readme: README in the sdist: no; description of the wheel: found'
[ "$seen" = "$expected" ] || { echo "this has changed; expected:"; echo "$expected"; exit 1; }
