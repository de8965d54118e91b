# One image for trainer, scorer and simulator: the `smes` command and what it needs.
#
#   docker build -t smes-online .
#   docker build -t smes-online:cuda --build-arg TORCH_INDEX=https://download.pytorch.org/whl/cu130 .
#
# requirements.lock was made with this Python version.
FROM python:3.11-slim

# Where pip finds the build of torch that the lock file pins: 2.13.0+cpu here, 2.13.0+cu130 above. A build with such a
# suffix counts as newer than the same version without, so it is the one that pip takes.
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu

# Numba keeps compiled loops in its cache; the installed packages are not writable for the user that runs them.
ENV PYTHONUNBUFFERED=1 \
    PIP_DISABLE_PIP_VERSION_CHECK=1 \
    PIP_NO_CACHE_DIR=1 \
    NUMBA_CACHE_DIR=/var/cache/smes/numba

# The folders of the named volumes: a new volume takes over the owner of the folder it is mounted on.
RUN useradd --uid 10001 --create-home smes \
    && install -d -o smes -g smes /app /data /log /var/cache/smes/numba

WORKDIR /app

# The dependencies in a layer of their own, which a change of the code does not rebuild: what pyproject.toml asks for at
# run time, in the versions of the lock file (which also pins the tools of development).
COPY pyproject.toml requirements.lock ./
RUN python -P -c "import tomllib; project = tomllib.load(open('pyproject.toml', 'rb'))['project']; \
            print(*project['dependencies'], sep='\n')" > runtime.txt \
    && pip install --extra-index-url "$TORCH_INDEX" --requirement runtime.txt --constraint requirements.lock

COPY README.md LICENSE ./
COPY smes smes
COPY stream stream
COPY feature_store feature_store
COPY trainer trainer
COPY smes_io smes_io
COPY smes_scorer smes_scorer
COPY simulators simulators
COPY smes_client smes_client
COPY smes_console smes_console
COPY smes_cli smes_cli
RUN pip install --no-deps .

USER smes
WORKDIR /data
EXPOSE 8000
ENTRYPOINT ["smes"]
CMD ["--help"]
