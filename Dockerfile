# The server as a container, with the packages at the versions of constraints.txt.
#
#   docker build -t stepweave .                                    # for CPUs
#   docker build -t stepweave:cuda --build-arg TORCH_INDEX_URL=https://pypi.org/simple .  # CUDA 13
#   docker build -t stepweave:compiler --build-arg WITH_COMPILER=1 .   # for STEPWEAVE_COMPILE

FROM debian:bookworm-slim AS build
# pip reads it; one with credentials belongs in pip.conf, which is a secret of the build
ARG PIP_INDEX_URL=
ARG TORCH_INDEX_URL=https://download.pytorch.org/whl/cpu
# of torch, if not that of constraints.txt
ARG TORCH_VERSION=
RUN apt-get update \
    && apt-get install --yes --no-install-recommends ca-certificates python3 python3-venv \
    && rm -rf /var/lib/apt/lists/*
WORKDIR /src
RUN python3 -m venv --without-pip /opt/stepweave && python3 -m venv /opt/pip
COPY constraints.txt .
RUN --mount=type=secret,id=pip.conf,target=/etc/pip.conf --mount=type=secret,id=pip-certificate \
    if [ -n "$TORCH_VERSION" ]; then sed -i "s/^torch==.*/torch==$TORCH_VERSION/" constraints.txt; fi \
    && /opt/pip/bin/pip --python /opt/stepweave install --no-cache-dir --progress-bar off \
        --extra-index-url "$TORCH_INDEX_URL" --constraint constraints.txt torch \
    && case "$TORCH_INDEX_URL" in */cpu) /opt/stepweave/bin/python3 -c \
        'import sys, torch; sys.exit(torch.version.cuda and "not a build for CPUs: is TORCH_INDEX_URL in reach?")' ;; esac
COPY pyproject.toml setup.py README.md LICENSE ./
COPY src src
COPY models models
RUN --mount=type=secret,id=pip.conf,target=/etc/pip.conf --mount=type=secret,id=pip-certificate \
    /opt/pip/bin/pip --python /opt/stepweave install --no-cache-dir --progress-bar off \
        --constraint constraints.txt .

FROM debian:bookworm-slim
# a C++ compiler and Python's headers, which torch.compile needs
ARG WITH_COMPILER=
RUN apt-get update \
    && apt-get install --yes --no-install-recommends ca-certificates python3 \
        ${WITH_COMPILER:+g++ libc6-dev python3-dev} \
    && rm -rf /var/lib/apt/lists/*
RUN groupadd --gid 1034 stepweave \
    && useradd --uid 1034 --gid 1034 --home-dir /tmp --no-create-home --shell /usr/sbin/nologin stepweave \
    && install --directory --owner 1034 --group 1034 --mode 0700 /var/lib/stepweave /var/cache/huggingface
COPY --from=build /opt/stepweave /opt/stepweave
ENV PATH=/opt/stepweave/bin:$PATH \
    HOME=/tmp \
    BENTOML_HOME=/tmp/bentoml \
    BENTOML_DO_NOT_TRACK=True \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1 \
    STEPWEAVE_STATE_DIR=/var/lib/stepweave
WORKDIR /tmp
USER 1034:1034
# the root file system may be read-only: these need to be writable
VOLUME ["/tmp", "/var/lib/stepweave", "/var/cache/huggingface"]
EXPOSE 3000
ENTRYPOINT ["stepweave"]
CMD ["serve", "--host", "0.0.0.0"]
