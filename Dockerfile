# coat-deploy in containers.
#
#   docker build -t coat-deploy .                      serve-cpu: serves on onnxruntime, no PyTorch
#   docker build -t coat-deploy:gpu --target serve-gpu .
#   docker build -t coat-deploy:tools --target tools . exports and validates
#
#   docker run -p 8000:8000 -p 8001:8001 -v "$PWD/models:/models:ro" coat-deploy
#
# What the images hold is locked with hashes in docker/*.txt; docker/lock.sh writes them.

ARG PYTHON=python:3.11-slim-bookworm
ARG CUDA=nvidia/cuda:13.0.2-cudnn-runtime-ubuntu24.04

# ---- the wheel, alike for all --------------------------------------------------------------------
FROM ${PYTHON} AS wheel
WORKDIR /src
COPY pyproject.toml README.md LICENSE ./
COPY coat_deploy ./coat_deploy
COPY models ./models
RUN --mount=type=cache,target=/root/.cache/pip \
    pip wheel --no-deps --wheel-dir /wheels .

# ---- what serves on a CPU, as a virtual environment ----------------------------------------------
FROM ${PYTHON} AS cpu-packages
RUN python3 -m venv --without-pip /opt/venv
COPY docker/serve-cpu.txt /tmp/
RUN --mount=type=cache,target=/root/.cache/pip \
    pip --python /opt/venv/bin/python install --require-hashes --no-deps -r /tmp/serve-cpu.txt \
    && find /opt/venv -type d -name tests -prune -exec rm -r {} +
COPY --from=wheel /wheels /wheels
RUN pip --python /opt/venv/bin/python install --no-cache-dir --no-deps /wheels/*.whl

# ---- what serves on an NVIDIA GPU ----------------------------------------------------------------
# TensorRT's libraries come from NVIDIA, which its package finds by itself.
FROM ${CUDA} AS gpu-packages
ARG TENSORRT=10.16.*
# Point versions leave the mirrors.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends python3 python3-pip python3-venv \
    && rm -rf /var/lib/apt/lists/*
RUN python3 -m venv /opt/venv
COPY docker/serve-gpu.txt /tmp/
RUN --mount=type=cache,target=/root/.cache/pip \
    /opt/venv/bin/pip install --require-hashes --no-deps -r /tmp/serve-gpu.txt \
    && /opt/venv/bin/pip install "tensorrt-cu13==${TENSORRT}"
COPY --from=wheel /wheels /wheels
RUN /opt/venv/bin/pip install --no-deps /wheels/*.whl && /opt/venv/bin/pip uninstall --yes pip

# ---- export and validate -------------------------------------------------------------------------
# PyTorch's usual build brings CUDA; --build-arg TORCH_INDEX=URL names an index of builds for the CPU.
FROM ${PYTHON} AS tools
ARG TORCH_INDEX=
COPY constraints.txt /tmp/
COPY --from=wheel /wheels /wheels
RUN --mount=type=cache,target=/root/.cache/pip \
    python3 -m venv /opt/venv \
    && /opt/venv/bin/pip install ${TORCH_INDEX:+--index-url "$TORCH_INDEX"} \
    --constraint /tmp/constraints.txt torch \
    && /opt/venv/bin/pip install --constraint /tmp/constraints.txt \
    "$(echo /wheels/*.whl)[torch,cpu,openvino,plot]" \
    && useradd --uid 10001 --create-home coat \
    && install --directory --owner coat /models
ENV PATH=/opt/venv/bin:$PATH \
    COAT_MODELS=/models \
    PYTHONUNBUFFERED=1
USER 10001
WORKDIR /home/coat
VOLUME /models
LABEL org.opencontainers.image.title="coat-deploy tools" \
      org.opencontainers.image.description="Export CoaT image classifiers and prove them equal" \
      org.opencontainers.image.licenses="Apache-2.0"
ENTRYPOINT ["coat-deploy"]
CMD ["--help"]

# ---- serve on an NVIDIA GPU ----------------------------------------------------------------------
FROM ${CUDA} AS serve-gpu
# Point versions leave the mirrors.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends python3 \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --uid 10001 --no-create-home --shell /usr/sbin/nologin coat \
    && install --directory --owner coat /models
COPY --from=gpu-packages /opt/venv /opt/venv
ENV PATH=/opt/venv/bin:$PATH \
    COAT_MODELS=/models \
    COAT_CACHE=/tmp/coat \
    COAT_HEALTH=http://127.0.0.1:8000/v2/health/ready \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1
USER 10001
VOLUME /models
EXPOSE 8000 8001
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=5s --timeout=3s --start-period=120s \
    CMD ["python3", "-c", "import os, urllib.request as u; u.urlopen(os.environ['COAT_HEALTH'], timeout=2)"]
LABEL org.opencontainers.image.title="coat-deploy" \
      org.opencontainers.image.description="Serves CoaT image classifiers on NVIDIA GPUs" \
      org.opencontainers.image.licenses="Apache-2.0"
ENTRYPOINT ["coat-deploy"]
CMD ["serve", "--host", "0.0.0.0", "--device", "cuda"]

# ---- serve on a CPU: the default -----------------------------------------------------------------
FROM ${PYTHON} AS serve-cpu
RUN useradd --uid 10001 --no-create-home --shell /usr/sbin/nologin coat \
    && install --directory --owner coat /models
COPY --from=cpu-packages /opt/venv /opt/venv
ENV PATH=/opt/venv/bin:$PATH \
    COAT_MODELS=/models \
    COAT_CACHE=/tmp/coat \
    COAT_HEALTH=http://127.0.0.1:8000/v2/health/ready \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1
USER 10001
VOLUME /models
EXPOSE 8000 8001
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=5s --timeout=3s --start-period=60s \
    CMD ["python3", "-c", "import os, urllib.request as u; u.urlopen(os.environ['COAT_HEALTH'], timeout=2)"]
LABEL org.opencontainers.image.title="coat-deploy" \
      org.opencontainers.image.description="Serves CoaT image classifiers, without PyTorch" \
      org.opencontainers.image.licenses="Apache-2.0"
ENTRYPOINT ["coat-deploy"]
CMD ["serve", "--host", "0.0.0.0"]
