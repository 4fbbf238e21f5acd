# Every process of the fleet: `docker run IMAGE story`. Build it in the root of the repository:
#   docker build -f deploy/docker/fleet.Dockerfile -t fleet:0.1.0 .
# For a build that can be repeated, name the base image by its digest:
#   --build-arg PYTHON_IMAGE=docker.io/library/python@sha256:...
ARG PYTHON_IMAGE=docker.io/library/python:3.11-slim-bookworm

FROM ${PYTHON_IMAGE} AS build
ARG UV_VERSION=0.13.9
RUN pip install --no-cache-dir "uv==${UV_VERSION}"
ENV UV_LINK_MODE=copy UV_COMPILE_BYTECODE=1 VIRTUAL_ENV=/opt/fleet
WORKDIR /src
# The packages change less often than the code, and are cached without it.
COPY deploy/local/requirements/fleet.lock deploy/local/requirements/none.lock ./
RUN uv venv --python /usr/local/bin/python3.11 "$VIRTUAL_ENV" \
 && uv pip sync --require-hashes fleet.lock
COPY . .
RUN uv pip install --no-deps --build-constraints none.lock .

FROM ${PYTHON_IMAGE}
# hadolint ignore=DL3008
RUN apt-get update \
 && apt-get install -y --no-install-recommends bubblewrap git openssh-client \
 && rm -rf /var/lib/apt/lists/* \
 && useradd --uid 10001 --no-create-home --shell /usr/sbin/nologin fleet
COPY --from=build /opt/fleet /opt/fleet
ENV PATH=/opt/fleet/bin:$PATH \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1 \
    FLEET_HOME=/tmp/fleet \
    HEALTH_PORT=8080
# The build id of Temporal's worker versioning, such as the version or the commit; empty: not versioned.
ARG WORKER_BUILD_ID=
ENV WORKER_BUILD_ID=$WORKER_BUILD_ID
USER 10001:10001
WORKDIR /tmp
EXPOSE 8080 8081 50051 50052 50053 50054 50055
# Kubernetes ignores it, and has probes of its own.
HEALTHCHECK --interval=30s --timeout=10s --start-period=60s --start-interval=2s CMD \
  ["python", "-c", "import os, urllib.request; urllib.request.urlopen(f'http://127.0.0.1:{os.environ[\"HEALTH_PORT\"]}/health', timeout=9)"]
ENTRYPOINT ["python", "-m", "workers"]
CMD ["all"]
