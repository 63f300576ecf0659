# One image for `bulkhead serve`, `worker`, `migrate`, `egress` and `doctor`: see docs/deploy/image.md.

# By digest: a tag may come to mean other bytes. How to renew it stands in docs/deploy/image.md.
ARG PYTHON_IMAGE=docker.io/library/python:3.13.15-slim-trixie@sha256:7c61056e61ac89e852de05f3dc6fa51a6dd2181797bceed46aa725dd7cb2cd3b

FROM ${PYTHON_IMAGE} AS system
# No versions: what is wanted here is the newest security update of each package. What came of it stands in the SBOM.
# hadolint ignore=DL3008
RUN apt-get update \
 && DEBIAN_FRONTEND=noninteractive apt-get upgrade --yes \
 && DEBIAN_FRONTEND=noninteractive apt-get install --yes --no-install-recommends ca-certificates libseccomp2 tzdata \
 && rm -rf /var/lib/apt/lists/*

FROM system AS packages
# `cloud` has the SDKs of AWS, Azure and Vault on top of `base`.
ARG REQUIREMENTS=cloud
WORKDIR /build
COPY requirements/base.txt requirements/cloud.txt ./
# The secrets are how the machine that builds reaches its package index, where that is not the usual way.
RUN --mount=type=secret,id=pip,target=/etc/pip.conf --mount=type=secret,id=authorities \
    python3 -m venv /opt/venv \
 && /opt/venv/bin/python -m pip install --quiet --disable-pip-version-check --no-cache-dir --no-compile \
      --only-binary :all: --no-deps --require-hashes --report report.json -r "${REQUIREMENTS}.txt" \
 # Compiled now, for later nothing can be written; the few templates that are no Python are passed over.
 && standard=$(python3 -c 'import sysconfig; print(sysconfig.get_path("stdlib"))') \
 && { python3 -m compileall -qq -j 0 --invalidation-mode unchecked-hash /opt/venv/lib "$standard" || :; }

# With pip: what builds the environments of the catalogue's servers (`bulkhead servers install`), and serves nobody.
FROM packages AS workshop
COPY app /opt/bulkhead/app
COPY docs/deploy/image/bulkhead /opt/venv/bin/bulkhead
ENV PATH=/opt/venv/bin:/usr/local/bin:/usr/bin:/bin BULKHEAD_DATA_DIR=/var/lib/bulkhead HOME=/tmp
WORKDIR /opt/bulkhead
USER 10001:10001
ENTRYPOINT ["bulkhead"]
CMD ["servers", "list"]

FROM packages AS trimmed
ARG VERSION=0.1.0
COPY docs/deploy/image /build/image
RUN /opt/venv/bin/python image/sbom.py report.json "${VERSION}" /usr/share/bulkhead
COPY LICENSE alembic.ini /opt/bulkhead/
# What `bulkhead doctor` compares with what is installed.
COPY requirements/base.txt requirements/cloud.txt /opt/bulkhead/requirements/
COPY migrations /opt/bulkhead/migrations
COPY app /opt/bulkhead/app
# In the form without a shell, since that is among what goes.
RUN ["/opt/venv/bin/python", "/build/image/trim.py"]

# From nothing, so that what has been taken away is in no layer below: the whole of it, then, links and all.
FROM scratch
# hadolint ignore=DL3067
COPY --from=trimmed / /
ARG VERSION=0.1.0
ARG REVISION=unknown
ARG CREATED=unknown
ARG PYTHON_IMAGE
LABEL org.opencontainers.image.title="Bulkhead" \
      org.opencontainers.image.description="Agents as a service: one watertight compartment a tenant" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}" \
      org.opencontainers.image.created="${CREATED}" \
      org.opencontainers.image.base.name="${PYTHON_IMAGE}"
# On all addresses, since a container's loopback is nobody's; `serve` then demands that TLS in front is declared. Whom
# `ssl=verify-full` of a database's URL trusts is said by PGSSLROOTCERT: the public authorities, or a file of yours.
ENV PATH=/opt/venv/bin \
    LANG=C.UTF-8 \
    HOME=/tmp \
    PYTHONDONTWRITEBYTECODE=1 \
    PGSSLROOTCERT=/etc/ssl/certs/ca-certificates.crt \
    BULKHEAD_HOST=0.0.0.0 \
    BULKHEAD_DATA_DIR=/var/lib/bulkhead
WORKDIR /opt/bulkhead
USER 10001:10001
EXPOSE 8000
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=15s --timeout=5s --start-period=60s --retries=3 CMD ["/opt/venv/bin/python", "-IS", "/opt/venv/bin/healthy"]
ENTRYPOINT ["bulkhead"]
CMD ["serve"]
