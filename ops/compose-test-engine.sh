# shellcheck shell=bash
# For ops/compose-test.sh: an engine of its own, with images made of Debian packages.

engine_pid='' wheels_pid='' engine_folder='' engine_is_new='' forward=''

# start_engine [FOLDER]
start_engine() {
    : "${KAFKA_HOME:?expected the folder of a Kafka distribution}"
    [ -n "${1:-}" ] || engine_is_new=yes
    engine_folder=$(realpath "${1:-$(mktemp --directory)}")
    mkdir -p "$engine_folder"
    export DOCKER_HOST="unix://$engine_folder/docker.sock"
    if ! docker info > /dev/null 2>&1; then
        forward=$(iptables -S FORWARD | head -n 1)
        dockerd --storage-driver "$(storage_driver)" --data-root "$engine_folder/data" \
            --exec-root "$engine_folder/exec" --host "$DOCKER_HOST" --pidfile "$engine_folder/docker.pid" \
            > "$engine_folder/dockerd.log" 2>&1 &
        engine_pid=$!
        until_true 60 "the engine of $engine_folder; see dockerd.log" docker info
    fi
    say "engine $(docker info --format '{{.ServerVersion}}, {{.Driver}}'), compose $(docker compose version --short)"
    make_stand_ins
}

storage_driver() {
    local tried="$engine_folder/overlay"
    mkdir -p "$tried"/{lower,upper,work,merged}
    if mount -t overlay none -o "lowerdir=$tried/lower,upperdir=$tried/upper,workdir=$tried/work" "$tried/merged" \
        2> /dev/null; then
        umount "$tried/merged"
        echo overlay2
    else
        echo vfs
    fi
}

# What is there already from an earlier run in the same folder is used.
make_stand_ins() {
    local step context="$engine_folder/stand-ins" bridge name image
    step=$(date +%s%N)
    if ! docker image inspect smes-stand-in/debian:12 > /dev/null 2>&1; then
        debootstrap --variant=minbase --include=ca-certificates bookworm "$engine_folder/debian" \
            > "$engine_folder/debootstrap.log"
        # With the certificates that this machine trusts.
        cp --dereference "${SSL_CERT_FILE:-/etc/ssl/certs/ca-certificates.crt}" \
            "$engine_folder/debian/etc/ssl/certs/ca-certificates.crt"
        tar -C "$engine_folder/debian" -c . | docker import - smes-stand-in/debian:12 > /dev/null
        rm -r "$engine_folder/debian"
    fi
    bridge=$(ip -4 -o address show docker0 | awk '{split($4, address, "/"); print address[1]}')
    mkdir -p "$context"
    cp "$here"/stand-ins/* "$context"
    cp -r "$KAFKA_HOME/libs" "$context"
    for name in python=python:3.11-slim redis=redis:8 kafka=apache/kafka:4.2.1 prometheus=prom/prometheus:v3.5.0; do
        image=${name#*=}
        docker image inspect "$image" > /dev/null 2>&1 || docker buildx build --quiet --tag "$image" \
            --build-arg "TORCH_HOST=$bridge" --file "$context/${name%%=*}.Dockerfile" "$context" > /dev/null
    done
    if [ -n "${TORCH_WHEELS:-}" ]; then
        mkdir -p "$engine_folder/index/torch"
        cp --no-clobber "$TORCH_WHEELS"/torch-*+cpu-*.whl "$engine_folder/index/torch"
        # On the bridge's own address: only containers reach it.
        python3 -m http.server --bind "$bridge" --directory "$engine_folder/index" 8899 \
            > "$engine_folder/index.log" 2>&1 &
        wheels_pid=$!
        export TORCH_INDEX="http://$bridge:8899"
    fi
    say "stand-ins made in $(seconds "$step") s: python 3.11, Redis 7.0, Kafka 4.2.1, Prometheus 2.42, all on Debian 12"
}

end_engine() {
    [ -z "$wheels_pid" ] || kill "$wheels_pid" 2> /dev/null || true
    if [ -n "$engine_pid" ]; then
        kill "$engine_pid" 2> /dev/null || true
        wait "$engine_pid" 2> /dev/null || true
        # It leaves its bridge and its rules behind, and forwarding closed.
        iptables-save | grep --invert-match --extended-regexp 'DOCKER|docker0' | iptables-restore
        [ -z "$forward" ] || iptables ${forward/-P/--policy}
        ip link delete docker0 2> /dev/null || true
    fi
    [ -z "$engine_is_new" ] || rm -rf "$engine_folder"
}
