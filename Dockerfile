# One image for trainer, scorer, simulator and console: the `smes` command and what it needs.
#
#   docker build -t smes-online .
#   docker build -t smes-online:cuda --build-arg TORCH_BUILD=cu130 .
#
# requirements.lock was made with this Python version. A tag can be moved; a digest cannot:
#
#   docker build --build-arg PYTHON_IMAGE=python:3.11-slim@sha256:… .
ARG PYTHON_IMAGE=python:3.11-slim
FROM ${PYTHON_IMAGE}

# Which build of torch: the version of the lock file with this suffix. PyPI's own build of that version brings gigabytes
# of CUDA; where this one cannot be had, building the image fails. TORCH_INDEX: where it is.
ARG TORCH_BUILD=cpu
ARG TORCH_INDEX=https://download.pytorch.org/whl/${TORCH_BUILD}

# Numba keeps compiled loops in its cache; the installed packages are not writable for the user that runs them.
ENV PYTHONUNBUFFERED=1 \
    PIP_DISABLE_PIP_VERSION_CHECK=1 \
    PIP_NO_CACHE_DIR=1 \
    NUMBA_CACHE_DIR=/var/cache/smes/numba

# The folders of the named volumes: a new volume takes over the content and the owner of the folder it is mounted on.
RUN useradd --uid 10001 --create-home smes \
    && install -d -o smes -g smes /app /data /log /synthetic /var/cache/smes/numba

WORKDIR /app

# The dependencies in a layer of their own, which a change of the code does not rebuild: what pyproject.toml asks for at
# run time, in the versions of the lock file (which also pins the tools of development).
COPY pyproject.toml requirements.lock ./
RUN python -P -c "import tomllib; project = tomllib.load(open('pyproject.toml', 'rb'))['project']; \
            print(*project['dependencies'], sep='\n')" > runtime.txt \
    && sed "s/^torch==.*/&+$TORCH_BUILD/" requirements.lock > pinned.lock \
    && pip install --extra-index-url "$TORCH_INDEX" --requirement runtime.txt --constraint pinned.lock

# The packages: .dockerignore lets nothing else through.
COPY . ./
RUN pip install --no-deps . \
    && install -m 755 ops/docker/stay-when-refused.sh /usr/local/bin/stay-when-refused

# A number, so that Kubernetes sees that it is not root.
USER 10001:10001

# The loops, compiled for the processor that builds. On one of another kind each container compiles them again, unless
# /var/cache/smes/numba is a volume: then the first one does.
RUN python -P -m smes_cli.compile_loops

WORKDIR /data
EXPOSE 8000
ENTRYPOINT ["smes"]
CMD ["--help"]
