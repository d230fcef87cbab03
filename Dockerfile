# Three images: gateway, worker-cpu, worker-cuda. What is in them and what is pinned: docs/containers.md.
#
#   docker build --target worker-cpu -t ghcr.io/millrace/millrace-worker-cpu:0.1.0 .
#
# A release names the base by digest: --build-arg PYTHON_IMAGE=docker.io/library/python@sha256:...
ARG PYTHON_IMAGE=docker.io/library/python:3.11-slim-bookworm

# ---- what builds; nothing of these stages runs ----

FROM ${PYTHON_IMAGE} AS build
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ROOT_USER_ACTION=ignore
WORKDIR /opt/millrace
COPY pyproject.toml README.md ./

# The compiler comes from pip, the version from pyproject.toml.
FROM build AS kernels
RUN pip install $(python -c "import tomllib; \
    print(*tomllib.load(open('pyproject.toml', 'rb'))['project']['optional-dependencies']['kernels'])")
COPY kernels kernels
RUN python -m kernels.build

FROM build AS code
COPY . .
# unchecked-hash: the root is read-only, so nobody could write a newer one; and nobody has to look.
RUN rm -r models kernels/native \
    && python -m compileall -q --invalidation-mode unchecked-hash .

# Packages go into an environment without pip. With no code beside pyproject.toml, `.` is the metadata and the command
# `millrace`; so a changed source line installs nothing again.
FROM build AS packages
RUN python -m venv --without-pip /opt/venv && mkdir /opt/sbom
ENV PIP_PYTHON=/opt/venv/bin/python

FROM packages AS gateway-packages
RUN pip install . && pip inspect > /opt/sbom/python.json

FROM packages AS worker-cpu-packages
RUN pip install '.[cpu,import]' && pip inspect > /opt/sbom/python.json

# Gigabytes: CUDA's libraries come from pip too. Of the machine it needs the driver alone.
FROM packages AS worker-cuda-packages
RUN pip install '.[cuda,import]' && pip inspect > /opt/sbom/python.json

# ---- what runs ----

FROM ${PYTHON_IMAGE} AS runtime
ARG VERSION=0.1.0
ARG REVISION=unknown
LABEL org.opencontainers.image.title="Millrace" \
      org.opencontainers.image.description="A serving platform for language models" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.source="https://github.com/millrace/millrace" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}"
# Volumes that are new take these directories' owner.
RUN groupadd --gid 10001 millrace \
    && useradd --uid 10001 --gid 10001 --no-create-home --home-dir /tmp --shell /usr/sbin/nologin millrace \
    && install -d -o 10001 -g 10001 /models /etc/millrace/keys
# 0.0.0.0 lets nobody in: without keys a gateway there refuses to start until it is told MILLRACE_OPEN_ACCESS=yes.
ENV PATH=/opt/venv/bin:$PATH \
    PYTHONPATH=/opt/millrace \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1 \
    HOME=/tmp \
    OPENBLAS_NUM_THREADS=1 \
    MILLRACE_STORE=/models \
    MILLRACE_HOST=0.0.0.0 \
    MILLRACE_PORT=8000 \
    MILLRACE_METRICS_PORT=9090
WORKDIR /opt/millrace
COPY LICENSE ./
COPY --from=code /opt/millrace ./
USER 10001:10001
EXPOSE 8000 9090
STOPSIGNAL SIGTERM
# Liveness, not readiness: a pause of Redis must not have anybody restart the fleet.
HEALTHCHECK --interval=10s --timeout=5s --start-period=120s --retries=3 CMD ["python", "-c", "import http.client, os, sys; \
link = http.client.HTTPConnection('127.0.0.1', int(os.environ['MILLRACE_PORT']), timeout=4); \
link.request('GET', '/livez'); sys.exit(link.getresponse().status != 200)"]
ENTRYPOINT ["millrace"]

FROM runtime AS worker-cuda
ENV NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility CUDA_CACHE_PATH=/tmp/cuda
COPY --from=worker-cuda-packages /opt/venv /opt/venv
COPY --from=worker-cuda-packages /opt/sbom /usr/share/sbom
COPY --from=kernels /opt/millrace/kernels/build kernels/build
CMD ["worker"]

FROM runtime AS worker-cpu
COPY --from=worker-cpu-packages /opt/venv /opt/venv
COPY --from=worker-cpu-packages /opt/sbom /usr/share/sbom
COPY --from=kernels /opt/millrace/kernels/build kernels/build
COPY models/millpond models/millpond
CMD ["worker"]

# No compiler, no ONNX Runtime, no checkpoint. The last one, so that a build without --target makes the smallest.
FROM runtime AS gateway
COPY --from=gateway-packages /opt/venv /opt/venv
COPY --from=gateway-packages /opt/sbom /usr/share/sbom
CMD ["gateway"]
