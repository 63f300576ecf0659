# Bulkhead. Every target makes what it needs, given Python 3.11 or newer with pip; `make` alone lists them.

.DEFAULT_GOAL := help
.ONESHELL:
.SHELLFLAGS := -ec
.PHONY: install up down reset test test-long packages browser monitoring node check docs bench bench-peers lock help anew image image-base image-test containers kubectl manifests

BIN := .venv/bin

# The first Python that is new enough and can make a venv; failing that, one that is only new enough, so
# that the message can say what it lacks. An interpreter is asked, not believed: a pyenv shim may be empty.
PYTHON ?= $(shell \
  for modules in 'sys, ensurepip' sys; do \
    for python in python3.13 python3.12 python3.11 python3; do \
      $$python -c "import $$modules; sys.exit(sys.version_info < (3, 11))" 2>/dev/null && { echo $$python; exit; }; \
    done; \
  done)

# A stamp is named after the pins that it stands for, so that a file time can never mislead.
stamp = .venv/pins-$(1)-$(firstword $(shell cat $(2) | sha256sum | cut -c1-16))
RUNTIME := $(call stamp,base,requirements/base.txt)
TOOLS := $(call stamp,dev,requirements/base.txt requirements/dev.txt requirements/corpora.txt)

# Wheels only: building from source would fetch build tools that nothing pins. The pins are complete, so that
# there is nothing to resolve.
PIP_INSTALL := -m pip install -qq --disable-pip-version-check --only-binary :all: --no-deps --require-hashes -r

GOAL := $(firstword $(MAKECMDGOALS) $(.DEFAULT_GOAL))

define choose_python
python='$(PYTHON)'
fail() { printf '%s\n' "$$@" >&2; exit 1; }
[ -n "$$python" ] || fail \
  'Bulkhead needs Python 3.11 or newer, and no python3.13, python3.12, python3.11 or python3 here is one.' \
  'Install it, or name it: make $(GOAL) PYTHON=/path/to/python3.11'
"$$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || fail \
  "Bulkhead needs Python 3.11 or newer, and $$python is not one." \
  'Name another: make $(GOAL) PYTHON=/path/to/python3.11'
version=$$("$$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')
"$$python" -c 'import ensurepip' 2>/dev/null || fail \
  "$$python cannot make a virtual environment: its venv module is not installed." \
  "On Debian and Ubuntu: apt-get install python$$version-venv"
endef

# A venv that holds other pins, or whose Python has gone, is made anew; a half-made one is completed.
define install
exec 9<Makefile
flock 9  # two makes at once: the second finds the work done
if [ -e '$@' ] && [ -x $(BIN)/python ]; then exit 0; fi
others=$$(find .venv -maxdepth 1 -name 'pins-*' ! -path '$(RUNTIME)' ! -path '$(TOOLS)' 2>/dev/null) || :
if [ -n "$$others" ] || ! $(BIN)/python -c 'import pip, sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null
then
  $(choose_python)
  "$$python" -m venv --clear .venv
fi
count=$$(sed -n 's/^\([a-z0-9][^ =]*\)==.*/\1/p' requirements/$(1).txt | sort -u | wc -l)
echo "Installing the $$count packages of requirements/$(1).txt into .venv; once, about a minute."
$(BIN)/python $(PIP_INSTALL) requirements/$(1).txt $(if $(filter dev,$(1)),-r requirements/corpora.txt)
touch '$(RUNTIME)' '$@'
endef

# A stamp is worth nothing once the Python under the venv has gone.
$(RUNTIME) $(TOOLS): $(if $(shell [ -x $(BIN)/python ] && echo sound),,anew)
anew:

$(RUNTIME):
	@$(call install,base)

$(TOOLS):
	@$(call install,dev)

# The command from any folder; it works in the checkout, where .env and .bulkhead are.
$(BIN)/bulkhead: $(RUNTIME)
	@printf '%s\n' '#!/bin/sh' 'home="$$(dirname "$$(readlink -f "$$0")")/../.."' \
	  '# What it is given to read is where it was called; all else is in the checkout.' \
	  '[ "$$1" = policy ] || cd "$$home" || exit' \
	  'export PYTHONPATH="$$home"' \
	  'exec "$$home/$(BIN)/python" -m app.cli "$$@"' > $@
	chmod +x $@

install: $(BIN)/bulkhead  ## Make .venv/bin/bulkhead, and start nothing

up: $(BIN)/bulkhead  ## Start everything on this machine, with two demo tenants; Ctrl-C stops it
	@exec $(BIN)/python -m app.cli up

down: $(RUNTIME)  ## Stop what `make up` started
	@exec $(BIN)/python -m app.cli down

reset: $(RUNTIME)  ## Delete all data of this machine's Bulkhead; asks first, unless YES=1
	@exec $(BIN)/python -m app.cli reset $(if $(filter 1,$(YES)),--yes)

# Only a machine that is there for nothing else is changed; elsewhere the tests that need it are skipped, and say so.
BROWSER := --no-install-recommends chromium-headless-shell fonts-dejavu-core
browser:
	@if [ -x /usr/bin/chromium-headless-shell ]; then exit 0; fi
	if [ "$$CI" = true ] && [ "$$(id -u)" = 0 ] && apt-get update -qq && apt-get install -qq -y $(BROWSER) > /dev/null
	then exit 0; fi
	echo 'There is no headless browser here, so its tests are skipped. To run them: apt-get install $(BROWSER)'

# Unpacked into the checkout, since both would be started as daemons if they were installed. Debian's Alertmanager has
# the path of its templates built in, so these alone go where they belong.
MONITORING := prometheus prometheus-alertmanager
UNPACKED := .venv/debian
TEMPLATES := /usr/share/prometheus/alertmanager
monitoring:
	@export PATH="$$PATH:$(UNPACKED)/usr/bin"
	if command -v prometheus promtool prometheus-alertmanager > /dev/null && [ -e $(TEMPLATES)/default.tmpl ]; then exit 0; fi
	download() { apt-get download -qq -o APT::Sandbox::User=root $(MONITORING) 2> /dev/null; }
	if [ "$$CI" = true ] && [ "$$(id -u)" = 0 ] && rm -rf $(UNPACKED).new && mkdir -p $(UNPACKED).new && \
	  ( cd $(UNPACKED).new && { download || { apt-get update -qq && download; }; } )
	then
	  for package in $(UNPACKED).new/*.deb; do dpkg-deb -x "$$package" $(UNPACKED).new; done
	  rm -rf $(UNPACKED).new/*.deb $(UNPACKED) && mv $(UNPACKED).new $(UNPACKED)
	  mkdir -p $(TEMPLATES) && cp $(UNPACKED)$(TEMPLATES)/*.tmpl $(TEMPLATES)
	  exit 0
	fi
	echo 'There is no Prometheus here, so its tests are skipped. To run them: apt-get install $(MONITORING)'

node:
	@if command -v node > /dev/null; then exit 0; fi
	if [ "$$CI" = true ] && [ "$$(id -u)" = 0 ] && apt-get update -qq && apt-get install -qq -y --no-install-recommends nodejs > /dev/null
	then exit 0; fi
	echo 'There is no Node.js here, so the JavaScript of the documents is not run. To run it: apt-get install nodejs'

KUBERNETES := kubernetes-client
kubectl:
	@if command -v kubectl > /dev/null; then exit 0; fi
	if [ "$$CI" = true ] && [ "$$(id -u)" = 0 ] && apt-get update -qq && apt-get install -qq -y --no-install-recommends $(KUBERNETES) > /dev/null
	then exit 0; fi
	echo 'There is no kubectl here, so the manifests are not checked. To check them: apt-get install $(KUBERNETES)'

packages: browser monitoring node kubectl

# More workers than the two processors of a small machine, since much is waited for. What is compiled is kept, whatever
# the shell says: all of them, and hundreds of processes, start from it.
test: $(TOOLS) packages  ## Run the tests, with samples of the long ones
	@exec env PYTHONDONTWRITEBYTECODE= $(BIN)/python -m pytest -n 3 --no-loadscope-reorder -m 'not long'

# One test is one piece. What has passed for this seed and these sources is not run again.
SEED ?= $(shell date -u +%Y%m%d)
test-long: $(TOOLS)  ## Run the full counts, in pieces under ten minutes; resumes; SEED=n repeats one
	@sources=$$(find app migrations tests requirements pyproject.toml -type f ! -name '*.pyc' | \
	  LC_ALL=C sort | xargs cat | sha256sum | cut -c1-16)
	state=".pytest_cache/long/$(SEED)-$$sources"
	mkdir -p "$$state"
	$(BIN)/python -m pytest -m long --collect-only --quiet > "$$state/collected" || [ $$? = 5 ] || { cat "$$state/collected"; exit 1; }
	echo "seed $(SEED): $$(grep -c '::' "$$state/collected" || :) pieces, recorded in $$state"
	failed=0
	while IFS= read -r piece <&3; do
	  case $$piece in *::*) ;; *) continue ;; esac
	  passed="$$state/$$(printf %s "$$piece" | sha256sum | cut -c1-16)"
	  [ ! -e "$$passed" ] || { echo "passed before: $$piece"; continue; }
	  if TEST_SEED=$(SEED) timeout --foreground --kill-after=10 600 \
	    $(BIN)/python -m pytest --timeout=570 --hypothesis-seed=$(SEED) "$$piece"
	  then touch "$$passed"; else failed=1; echo "FAILED: $$piece"; fi
	done 3< "$$state/collected"
	exit $$failed

# The same commands, in the same order, as .pre-commit-config.yaml.
check: $(TOOLS)  ## Lint, format, types, import contracts, dependencies, dead code, secrets
	@set -x
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo
	$(BIN)/deptry app migrations
	$(BIN)/vulture
	$(BIN)/bandit --quiet --recursive --configfile pyproject.toml app migrations
	$(BIN)/zizmor --offline --quiet .
	bash -c 'git ls-files -z | xargs -0 $(BIN)/detect-secrets-hook --baseline .secrets.baseline'

# Nothing is fetched, neither a font nor a script. DOCS_REPOSITORY=.../blob/main links what lies outside of docs/.
docs: $(TOOLS)  ## Make a site of the documents, in .site; a link that leads nowhere fails
	@NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --config-file .mkdocs.yml

bench: $(TOOLS)  ## Run every command in benchmarks/
	@for file in $$(grep -l '__name__ == "__main__"' benchmarks/*.py 2>/dev/null); do
	  name=$$(basename "$$file" .py)
	  echo "== $$name"
	  $(BIN)/python -m "benchmarks.$$name"
	done

bench-peers: $(TOOLS)  ## Compare with other systems, in environments of their own; about half an hour
	@$(BIN)/python -m benchmarks.peers environments
	exec $(BIN)/python -m benchmarks.peers run

# --- The image: docs/deploy/image.md

# One place of the version is enough; the Dockerfile's default is compared with it by a test.
VERSION = $(shell sed -n 's/^version = "\(.*\)"$$/\1/p' pyproject.toml)
LOOKALIKE := localhost/bulkhead-base:lookalike
IMAGE ?= localhost/bulkhead:$(if $(filter lookalike,$(BASE)),lookalike,$(VERSION))
# Needs no right to make namespaces.
export BUILDAH_ISOLATION ?= chroot
CONTAINERS := buildah podman runc mmdebstrap
containers:
	@lacking=$$(for name in $(CONTAINERS); do command -v "$$name" > /dev/null || echo "$$name"; done)
	if [ -z "$$lacking" ] && [ "$$(id -u)" = 0 ]; then exit 0; fi
	if [ "$$CI" = true ] && [ "$$(id -u)" = 0 ] && apt-get update -qq && \
	  DEBIAN_FRONTEND=noninteractive apt-get install -qq -y --no-install-recommends $(CONTAINERS) > /dev/null
	then exit 0; fi
	echo 'The image is not built or run here, which takes root and: apt-get install $(CONTAINERS)' >&2
	exit 1

# Debian's own Python 3.13 where no registry of images can be reached. Not the official base: neither its contents nor
# its size. The mirrors are those that this machine's apt has.
image-base: containers  ## Make a look-alike of the base image, for machines that reach no registry of images
	@if buildah inspect --type image $(LOOKALIKE) > /dev/null 2>&1; then exit 0; fi
	work=$$(mktemp -d)
	trap 'rm -rf "$$work"' EXIT
	mirror() { apt-get indextargets --format '$$(LABEL) $$(REPO_URI)' | awk -v label="$$1" '$$1 == label { print $$2; exit }'; }
	main=$$(mirror Debian) security=$$(mirror Debian-Security)
	[ -n "$$main" ] && [ -n "$$security" ] || { echo 'This apt knows no mirror of Debian and its security updates.' >&2; exit 1; }
	apt-config dump Acquire::http Acquire::https > "$$work/apt.conf"
	echo 'Making $(LOOKALIKE) from the mirrors of this machine; some minutes.'
	mmdebstrap --quiet --variant=minbase --include=ca-certificates,netbase,tzdata,python3,python3-venv \
	  --aptopt="$$work/apt.conf" trixie "$$work/base.tar" \
	  "deb $$main trixie main" "deb $$main trixie-updates main" "deb $$security trixie-security main"
	made=$$(buildah from scratch)
	buildah add --quiet "$$made" "$$work/base.tar" / > /dev/null
	buildah config --cmd python3 --env PATH=/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin "$$made"
	buildah commit --quiet --rm --format docker "$$made" $(LOOKALIKE)

# BASE=name@sha256:... is another base than the Dockerfile's; REQUIREMENTS=base leaves the clouds' SDKs out.
image:  ## Build the image, with its SBOM and licences in dist/
	@$(choose_python)
	case '$(BASE)' in
	  ''|lookalike|*@sha256:*) ;;
	  *) fail 'A base is named with its digest: make image BASE=docker.io/library/python:3.13-slim@sha256:...' ;;
	esac
	if [ '$(BASE)' = lookalike ]; then $(MAKE) --no-print-directory image-base; engine=buildah
	elif docker info > /dev/null 2>&1; then engine=docker
	else engine=$$(basename "$$(command -v buildah || command -v podman || echo none)"); fi
	[ "$$engine" != none ] || fail 'Building the image takes docker, buildah or podman.'
	work=$$(mktemp -d)
	trap 'rm -rf "$$work"' EXIT
	set -- --build-arg VERSION=$(VERSION) --build-arg REQUIREMENTS=$(or $(REQUIREMENTS),cloud)
	set -- "$$@" --build-arg REVISION="$$(git describe --always --abbrev=40 --dirty --exclude '*' 2> /dev/null || echo unknown)"
	set -- "$$@" --build-arg CREATED="$$(git log -1 --format=%cI 2> /dev/null || echo unknown)"
	case '$(BASE)' in
	  '') ;;
	  lookalike) set -- "$$@" --pull-never --build-arg PYTHON_IMAGE=$(LOOKALIKE) ;;
	  *) set -- "$$@" --build-arg PYTHON_IMAGE='$(BASE)' ;;
	esac
	# How this machine reaches its package index; what names a place on it is of no use inside.
	printf '[global]\n' > "$$work/pip.conf"
	"$$python" -m pip config list | sed -n -E -e 's#file://[^ '"'"']*##g' \
	  -e "s/^[^.]*\.(index-url|extra-index-url|trusted-host|proxy|timeout|default-timeout)='(.*[^ ].*)'$$/\1 = \2/p" >> "$$work/pip.conf"
	set -- "$$@" --secret id=pip,src="$$work/pip.conf"
	if [ -r /etc/ssl/certs/ca-certificates.crt ]; then
	  echo 'cert = /run/secrets/authorities' >> "$$work/pip.conf"
	  set -- "$$@" --secret id=authorities,src=/etc/ssl/certs/ca-certificates.crt
	fi
	[ "$$engine" = docker ] || set -- "$$@" --format docker --layers
	"$$engine" build "$$@" --tag $(IMAGE) .
	mkdir -p dist
	if [ "$$engine" = buildah ]; then
	  made=$$(buildah from --pull-never $(IMAGE)); cp "$$(buildah mount "$$made")"/usr/share/bulkhead/* dist/
	else
	  made=$$($$engine create $(IMAGE)); "$$engine" cp "$$made":/usr/share/bulkhead/. dist/
	fi
	"$$engine" rm "$$made" > /dev/null
	echo "$(IMAGE) is built; dist/ has sbom.cdx.json and licenses.txt."

# Any image: make image-test IMAGE=name. Without one, on a look-alike base.
image-test: $(TOOLS) containers  ## Build the image and run it hardened, with queries, attacks and its end
	@if [ '$(origin IMAGE)' = file ]; then
	  $(MAKE) --no-print-directory image BASE=lookalike
	  image=localhost/bulkhead:lookalike
	else image='$(IMAGE)'; fi
	exec env IMAGE="$$image" $(BIN)/python -m pytest -n 0 tests/image/contents.py tests/image/hardened.py tests/image/walls.py

# jsonschema imports these wherever they are, and so does each process and each sandboxed server of a test: half a
# second. The service has none of them, and what asks for them (cyclonedx-bom) does without.
LEFT_OUT := arrow fqdn isoduration lark rfc3986-validator rfc3987-syntax uri-template webcolors
# --- The manifests: docs/deploy/kubernetes.md

# Apart from the other tools, since it holds old versions of what they use.
CHECKOV := .venv/deploy/pins-$(firstword $(shell sha256sum < requirements/deploy.txt | cut -c1-16))
$(CHECKOV): $(TOOLS)
	@$(choose_python)
	echo 'Installing requirements/deploy.txt into .venv/deploy; once, about a minute.'
	"$$python" -m venv --clear .venv/deploy
	.venv/deploy/bin/python $(PIP_INSTALL) requirements/deploy.txt
	touch '$@'

manifests: $(TOOLS) $(CHECKOV) kubectl  ## Render k8s/ and check it: schemas, checkov, our own checks, who reaches whom
	@command -v kubectl > /dev/null
	work=$$(mktemp -d)
	trap 'rm -rf "$$work"' EXIT
	$(BIN)/python -m tests.k8s.rendering "$$work"
	cd "$$work"
	$(CURDIR)/$(BIN)/kubernetes-validate --strict --quiet *.yaml
	$(CURDIR)/.venv/deploy/bin/checkov --directory . --framework kubernetes --compact --quiet --skip-download
	cd $(CURDIR)
	$(BIN)/python -m tests.k8s.check "$$work"/*.yaml
	$(BIN)/python -m pytest -q tests/k8s

# Of those that `make bench-peers` compares with; each has its own.
PEERS := benchmarks/peers
PIN := UV_PYTHON_DOWNLOADS=never UV_SYSTEM_CERTS=1 "$$work/venv/bin/uv" pip compile --quiet --universal \
  --generate-hashes --no-emit-index-url --no-header

lock:  ## Pin all requirements again, with hashes; what still fits stays, unless UPGRADE=1
	@$(choose_python)
	work=$$(mktemp -d)
	trap 'rm -rf "$$work"' EXIT
	"$$python" -m venv "$$work/venv"
	"$$work/venv/bin/python" $(PIP_INSTALL) requirements/uv.txt
	cp requirements/*.in requirements/*.txt "$$work"
	for name in base cloud dev corpora deploy uv; do
	  echo "Pinning requirements/$$name.txt"
	  ( cd "$$work" && $(PIN) --python venv/bin/python --python-version 3.11 \
	    $(addprefix --no-emit-package ,$(LEFT_OUT)) \
	    $(if $(filter 1,$(UPGRADE)),--upgrade) $$([ $$name != corpora ] || echo --no-deps) --output-file $$name.txt $$name.in )
	done
	mkdir "$$work/peers" && cp $(PEERS)/*.in $(PEERS)/*.txt "$$work/peers"
	for name in agno:3.11 litellm:3.11 aegra:3.12; do
	  echo "Pinning $(PEERS)/$${name%:*}.txt"
	  ( cd "$$work/peers" && $(PIN) --python ../venv/bin/python --python-version "$${name#*:}" \
	    $(if $(filter 1,$(UPGRADE)),--upgrade) --output-file "$${name%:*}.txt" "$${name%:*}.in" )
	done
	! grep -Hn '://' "$$work"/*.txt "$$work"/peers/*.txt || fail 'These lines carry an address; nothing was written.'
	cp "$$work"/*.txt requirements/
	cp "$$work"/peers/*.txt $(PEERS)/
	git --no-pager diff --stat -- requirements $(PEERS)
	git --no-pager diff --unified=0 -- requirements $(PEERS) | sed -n 's/^\([-+][a-z0-9][^ ]*==[^ ]*\).*/\1/p' | sort -u -k1.2

help:  ## Show this
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-11s %s\n", $$1, $$2 }' Makefile
