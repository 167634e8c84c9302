# The service and its model, without torch or a compiler. Builds with the classic builder and BuildKit.
#   docker build -t bn-lenet .                          on the CPU
#   docker build -t bn-lenet --build-arg RUNTIME=gpu .  with CUDA and cuDNN from their wheels
ARG BASE_IMAGE=python:3.11-slim-bookworm

FROM ${BASE_IMAGE} AS build
ARG RUNTIME=cpu
WORKDIR /app
# Packages are pinned by version and digest (`make lock`); none is built here. pip and the test suites
# of the packages are removed: the service does not need them.
COPY deploy/image/${RUNTIME}.txt /tmp/packages.txt
RUN python -m venv /opt/venv \
 && /opt/venv/bin/python -m pip install --no-cache-dir --require-hashes --only-binary :all: --requirement /tmp/packages.txt \
 && /opt/venv/bin/python -m pip uninstall --yes --quiet setuptools pip \
 && find /opt/venv -type d -name tests -prune -exec rm -rf {} +
COPY service service
COPY models models
# Compiled here because the file system is read-only at run time. "Unchecked" because sources do not
# change in an image.
RUN python -m compileall -q --invalidation-mode unchecked-hash service

FROM ${BASE_IMAGE}
LABEL org.opencontainers.image.title="bn-lenet" \
      org.opencontainers.image.description="Classifies Fashion-MNIST images over HTTP" \
      org.opencontainers.image.licenses="MIT"
# Without ORT_DISABLE_TELEMETRY, ONNX Runtime sends telemetry.
ENV PATH=/opt/venv/bin:$PATH \
    ORT_DISABLE_TELEMETRY=1 \
    BNLENET_HOST=:: \
    BNLENET_PORT=8000 \
    BNLENET_LOG_FORMAT=json
COPY --from=build /opt/venv /opt/venv
COPY --from=build /app /app
WORKDIR /app
# A number, so that Kubernetes can check that the user is not root.
USER 10001:10001
EXPOSE 8000
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=5s --timeout=3s --start-period=10s --retries=3 \
  CMD ["python", "-c", "import http.client, os; c = http.client.HTTPConnection('127.0.0.1', int(os.environ['BNLENET_PORT']), timeout=2); c.request('GET', '/readyz'); raise SystemExit(c.getresponse().status != 200)"]
CMD ["python", "-m", "service"]
