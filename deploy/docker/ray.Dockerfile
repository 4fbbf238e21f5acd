# Ray with vLLM and the Serve app of the fleet, for KubeRay and for compose.yaml. Two variants:
#   docker build -f deploy/docker/ray.Dockerfile --target gpu -t fleet-ray:0.1.0-gpu .
#   docker build -f deploy/docker/ray.Dockerfile --target cpu --build-arg VARIANT=cpu -t fleet-ray:0.1.0-cpu .
# The first takes its model from a hub or a volume, the second has a small one in it. CUDA's libraries
# come with the packages; the node needs only NVIDIA's driver and container toolkit.
ARG PYTHON_IMAGE=docker.io/library/python:3.11-slim-bookworm

FROM ${PYTHON_IMAGE} AS build
ARG UV_VERSION=0.13.9
ARG VARIANT=gpu
RUN pip install --no-cache-dir "uv==${UV_VERSION}"
ENV UV_LINK_MODE=copy VIRTUAL_ENV=/opt/fleet
WORKDIR /src
COPY deploy/local/requirements/ ./
RUN uv venv --python /usr/local/bin/python3.11 "$VIRTUAL_ENV" \
 && uv pip sync --no-cache --require-hashes "${VARIANT}.lock"
COPY . .
RUN uv pip install --no-deps --build-constraints none.lock .

FROM build AS model
RUN /opt/fleet/bin/python -m deploy.local.model /opt/models/smollm2-135m-instruct

FROM ${PYTHON_IMAGE} AS gpu
SHELL ["/bin/bash", "-o", "pipefail", "-c"]
# A compiler for Triton's kernels, libnuma for vLLM on the CPU, wget for KubeRay's probes.
# hadolint ignore=DL3008,SC2016
RUN apt-get update \
 && apt-get install -y --no-install-recommends gcc libc6-dev libnuma1 wget \
 && rm -rf /var/lib/apt/lists/* \
 && useradd --uid 1000 --create-home ray \
 && echo 'PATH=/opt/fleet/bin:$PATH' > /etc/profile.d/fleet.sh
COPY --from=build /opt/fleet /opt/fleet
ENV PATH=/opt/fleet/bin:$PATH \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1
USER 1000:1000
WORKDIR /tmp
EXPOSE 6379 8000 8265 10001
HEALTHCHECK --interval=30s --timeout=10s --start-period=600s CMD \
  ["wget", "-q", "-T", "9", "-O", "/dev/null", "http://127.0.0.1:8000/-/healthz"]
CMD ["python", "-m", "workers.serve"]

FROM gpu AS cpu
COPY --from=model /opt/models /opt/models
ENV VLLM_MODEL=smollm2-135m-instruct \
    VLLM_MODEL_SOURCE=/opt/models/smollm2-135m-instruct \
    VLLM_DEVICE=cpu \
    HF_HUB_OFFLINE=1
