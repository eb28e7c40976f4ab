# A server of one trained run. Build: docker build -t openm6 .   Run: see compose.yaml.
FROM python:3.12-slim
# libsndfile comes with soundfile's wheel; the CPU build of PyTorch keeps the image small.
# For a GPU: --build-arg TORCH_INDEX=https://download.pytorch.org/whl/cu128
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
# On a GPU, Triton compiles a launcher in C at its first kernel; Python's headers are in the base image.
RUN case "${TORCH_INDEX}" in */cpu) ;; *) apt-get update && apt-get install -y --no-install-recommends gcc libc6-dev \
    && rm -rf /var/lib/apt/lists/* ;; esac
ENV TRITON_CACHE_DIR=/tmp/triton TORCHINDUCTOR_CACHE_DIR=/tmp/inductor
WORKDIR /app
RUN pip install --no-cache-dir "torch>=2.11,<2.16" --index-url ${TORCH_INDEX}
COPY pyproject.toml README.md LICENSE NOTICE ./
COPY openm6 openm6
RUN pip install --no-cache-dir ".[serve]" && useradd --create-home openm6
USER openm6
EXPOSE 8000
HEALTHCHECK --interval=10s --timeout=5s --start-period=60s \
    CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8000/ready')"]
# Within a container localhost is of no use; keys come from OPENM6_API_KEYS.
ENTRYPOINT ["openm6", "serve", "/run-folder", "--host", "0.0.0.0", "--port", "8000"]
