#!/bin/bash
# The stack of docker-compose.yml, for real: built, started, killed container by container, stopped, removed. As root:
#
#   KAFKA_HOME=/opt/kafka ops/compose-test.sh [FOLDER]
#
# An engine of its own runs in FOLDER (a new one, removed at the end, if none is named), so that no other containers,
# images and volumes are touched; none other may run on the machine meanwhile. The images of python, Redis, Kafka and
# Prometheus are stand-ins, made of Debian packages (ops/stand-ins/) and the jars in $KAFKA_HOME/libs; Grafana has none
# and is left out. TORCH_WHEELS names a folder with the CPU's wheel of torch, where PyTorch's index cannot be reached.
#
# What it needs: dockerd, `docker compose` 2.24 or newer, buildx, debootstrap, curl, python3; 30 GB of disk if the file
# system knows no overlays; the ports that the compose file publishes.
#
# IMAGES=official ops/compose-test.sh: with the engine that `docker` reaches, the official images, and Grafana.
#
# It prints what it did and how long that took, and ends with code 1 at the first thing that is not as it should be.
set -euo pipefail

here=$(cd "$(dirname "$0")" && pwd)
cd "$here/.."
. "$here/compose-test-engine.sh"

export COMPOSE_PROJECT_NAME=smes-compose-test COMPOSE_MENU=false
export IMPRESSIONS=${IMPRESSIONS:-150000} RATE=${RATE:-1000}
services=(kafka redis trainer scorer simulator console prometheus)
[ "${IMAGES:-}" = official ] && services+=(grafana)

# ---- what is said, what is waited for

began=$(date +%s%N)
seconds() { printf '%d.%d' $((($(date +%s%N) - $1) / 1000000000)) $((($(date +%s%N) - $1) / 100000000 % 10)); }
say() { printf '%7s s  %s\n' "$(seconds "$began")" "$*"; }
fail() {
    say "FAILED: $*"
    docker compose ps --all || true
    docker compose logs --tail 20 || true
    exit 1
}
# until_true SECONDS WHAT COMMAND…: wait until the command succeeds.
until_true() {
    local end=$((SECONDS + $1)) what=$2
    shift 2
    until "$@" > /dev/null 2>&1; do
        [ "$SECONDS" -lt "$end" ] || fail "not in time: $what"
        sleep 0.2
    done
}

container() { docker compose ps --all --quiet "$1"; }
inspect() { docker inspect --format "$2" "$(container "$1")"; }
health() { inspect "$1" '{{if .State.Health}}{{.State.Health.Status}}{{else}}{{.State.Status}}{{end}}'; }
is_well() { [[ $(health "$1") =~ ^(healthy|running)$ ]]; }
has_ended_well() { [ "$(inspect "$1" '{{.State.Status}} {{.State.ExitCode}}')" = "exited 0" ]; }
has_restarted() { [ "$(inspect "$1" '{{.RestartCount}}')" -gt "$2" ] && is_well "$1"; }
inside() { docker compose exec -T "$@"; }
logs() { docker compose logs --no-log-prefix "$@" 2> /dev/null | tr -d '\033' | sed 's/^\[2K//'; }
log_lines() { logs "$@" | wc -l; }
our_lines() { log_lines trainer scorer simulator console; }

# ---- scores: one request after the other in the background, one line each: code, lineage, version

answers=$(mktemp)
score() {
    curl --silent --max-time 5 --write-out '\n%{http_code}' http://127.0.0.1:8000/v1/score \
        --header 'content-type: application/json' \
        --data '{"user_id": 1, "context": {"tab": 0}, "items": [1, 2, 3]}' \
        | python3 -c 'import json, sys
*body, code = sys.stdin.read().splitlines() or ["000"]
said = json.loads(body[0]) if code == "200" else {}
print(code, said.get("lineage", "-"), said.get("version", "-"))'
}
is_answered() { [[ $(score) == 200* ]]; }
score_for_ever() {
    while :; do
        score >> "$answers" || true
        sleep 0.2
    done
}
answered() { tail -n "+$(($1 + 1))" "$answers" | awk '$1 == 200 {n++} END {print n + 0}'; }
unanswered() { tail -n "+$(($1 + 1))" "$answers" | awk '$1 != 200 {n++} END {print n + 0}'; }
served() { awk '$1 == 200 {last = $2 " " $3} END {print last}' "$answers"; }
# Versions never go back, and never mix lineages: one line for each lineage, in order.
lineages() { awk '$1 == 200 {print $2}' "$answers" | uniq; }
goes_back() {
    awk '$1 != 200 {next} $2 == lineage && $3 < version {found = 1} {lineage = $2; version = $3} END {exit !found}' \
        "$answers"
}

scoring=
end_all() {
    local code=$?
    trap - EXIT
    [ -n "$scoring" ] && kill "$scoring" 2> /dev/null
    rm -f "$answers"
    [ "$code" -eq 0 ] || docker compose down --volumes --timeout 5 > /dev/null 2>&1
    end_engine
    exit "$code"
}
trap end_all EXIT

# ---- built and started

[ "${IMAGES:-}" = official ] || start_engine "${1:-}"
step=$(date +%s%N)
docker compose build --quiet trainer
say "image built in $(seconds "$step") s: $(docker images --format '{{.Size}}' smes-online:latest)"

step=$(date +%s%N)
docker compose up --detach "${services[@]}" > /dev/null 2>&1 || fail "docker compose up"
say "up returned after $(seconds "$step") s"
until_true 300 "a first answer" is_answered
say "first answer $(seconds "$step") s after up: version $(score)"
for service in "${services[@]}"; do until_true 300 "$service is healthy" is_well "$service"; done
say "all healthy $(seconds "$step") s after up: ${services[*]}"
scrapes() {
    curl --silent http://127.0.0.1:9090/api/v1/targets | python3 -c 'import json, sys
targets = json.load(sys.stdin)["data"]["activeTargets"]
print(*sorted(target["labels"]["job"] + " " + target["health"] for target in targets), sep=", ")'
}
scrapes_both() { [ "$(scrapes)" = "smes-scorer up, smes-trainer up" ]; }
until_true 300 "Prometheus scrapes trainer and scorer" scrapes_both
say "Prometheus: $(scrapes)"
score_for_ever &
scoring=$!

# ---- killed, one container after the other

for service in scorer console prometheus redis trainer kafka simulator; do
    restarts=$(inspect "$service" '{{.RestartCount}}') step=$(date +%s%N)
    before=$(wc -l < "$answers") logged=$(our_lines)
    kill -KILL "$(inspect "$service" '{{.State.Pid}}')"
    until_true 300 "$service is back" has_restarted "$service" "$restarts"
    for other in trainer scorer; do until_true 300 "$other is well after $service" is_well "$other"; done
    is_answered || fail "no answer after $service was killed"
    say "$service killed: back after $(seconds "$step") s;" \
        "$(answered "$before") answers, $(unanswered "$before") not; $(($(our_lines) - logged)) lines logged by ours"
    [ "$service" = scorer ] || [ "$(unanswered "$before")" -eq 0 ] || fail "unanswered while $service was away"
done

step=$(date +%s%N)
before=$(wc -l < "$answers") logged=$(our_lines)
docker compose stop kafka > /dev/null 2>&1
sleep 40
docker compose start kafka > /dev/null 2>&1
until_true 300 "Kafka is back" is_well kafka
say "kafka stopped, started again 40 s later: $(answered "$before") answers, $(unanswered "$before") not;" \
    "$(($(our_lines) - logged)) lines logged by ours"

# ---- the replay's end, and what was read of it

until_true 900 "the replay's end" has_ended_well simulator
say "replay ended: $(logs simulator | tail -n 1)"
status() { inside trainer smes status --url http://scorer:8000; }
is_read() { [[ $(status) == *"unread impressions 0 "*"unread feedback 0"*"no alarm"* ]]; }
until_true 300 "everything is read, and there is no alarm" is_read
say "status:" && status
docker compose stop trainer > /dev/null 2>&1
has_ended_well trainer || fail "the trainer's exit code: $(inspect trainer '{{.State.ExitCode}}')"
audited=$(docker compose run --rm --no-deps -T --entrypoint smes trainer audit 2>&1) || fail "audit: $audited"
say "audit: $(tail -n 1 <<< "$audited")"

# ---- stopped, removed, started again: the same lineage goes on

read -r lineage version <<< "$(served)"
kill "$scoring"
scoring=
goes_back && fail "a version older than the one before was served"
say "served: $(wc -l < "$answers") requests, $(answered 0) answered; lineages: $(lineages | tr '\n' ' ')"
step=$(date +%s%N)
docker compose stop > /dev/null 2>&1
for service in redis scorer console prometheus; do
    has_ended_well "$service" || fail "$service ended with $(inspect "$service" '{{.State.ExitCode}}')"
done
[ "$(inspect kafka '{{.State.ExitCode}}')" = 143 ] || fail "kafka ended with $(inspect kafka '{{.State.ExitCode}}')"
docker compose down > /dev/null 2>&1
say "stopped and removed in $(seconds "$step") s, volumes kept"
docker compose up --detach "${services[@]}" > /dev/null 2>&1 || fail "docker compose up, again"
until_true 300 "an answer after the second up" is_answered
goes_on() { read -r _ now newest <<< "$(score)"; [ "$now" = "$lineage" ] && [ "$newest" -ge "$version" ]; }
goes_on || fail "lineage $lineage, version $version before; now $(score)"
until_true 300 "the simulator has ended" has_ended_well simulator
[[ $(logs simulator) == *"nothing is left to append"* ]] || fail "replayed twice"
say "second up: $(score), before $lineage $version; the simulator replayed nothing twice"

# ---- another schema on these volumes: refused once, not again and again

docker compose down > /dev/null 2>&1
SMES_SCHEMA=kuairand docker compose up --detach kafka redis trainer > /dev/null 2>&1
is_refused() { [[ $(logs trainer) == *"refused (exit code 2)"* ]]; }
until_true 300 "another schema is refused" is_refused
sleep 15
[ "$(inspect trainer '{{.RestartCount}}')" -eq 0 ] || fail "the trainer was started again"
say "another schema: $(logs trainer | grep '^smes: ' | tail -n 1)"
say "restarts of it: $(inspect trainer '{{.RestartCount}}'); lines logged: $(log_lines trainer)"

# ---- nothing is left, also where a log of the caller's was mounted

nothing_is_left() {
    local left
    left=$(docker ps --all --quiet --filter label=com.docker.compose.project=$COMPOSE_PROJECT_NAME
        docker volume ls --quiet --filter label=com.docker.compose.project=$COMPOSE_PROJECT_NAME
        docker volume ls --quiet --filter dangling=true
        docker network ls --quiet --filter label=com.docker.compose.project=$COMPOSE_PROJECT_NAME)
    [ -z "$left" ] || fail "left behind: $left"
}
LOG_DIR=$here docker compose down --volumes > /dev/null 2>&1
[ "${IMAGES:-}" = official ] || nothing_is_left
say "down --volumes: no container, no volume, no network is left"

# ---- with passwords

random() { python3 -c 'import secrets; print(secrets.token_hex(16))'; }
KAFKA_PASSWORD=$(random) REDIS_PASSWORD=$(random) SCORER_REDIS_PASSWORD=$(random)
export KAFKA_PASSWORD REDIS_PASSWORD SCORER_REDIS_PASSWORD IMPRESSIONS=20000
export COMPOSE_FILE=docker-compose.yml:ops/docker/passwords.yml
docker compose up --detach "${services[@]}" > /dev/null 2>&1 || fail "docker compose up, with passwords"
until_true 300 "an answer, with passwords" is_answered
until_true 300 "the replay's end, with passwords" has_ended_well simulator
redis_says() { inside -e REDISCLI_AUTH= redis redis-cli "$@" 2>&1; }
[[ $(redis_says GET x) == *NOAUTH* ]] || fail "Redis answers without a password"
as_scorer=$(redis_says --user scorer --pass "$SCORER_REDIS_PASSWORD" SET '{smes}:x' 1)
[[ $as_scorer == *NOPERM* ]] || fail "the scorer's user may write: $as_scorer"
without=$(docker compose run --rm --no-deps -T --entrypoint smes -e KAFKA_PASSWORD=wrong trainer audit 2>&1) &&
    fail "Kafka takes a wrong password"
say "with passwords: scored, replayed; without, Redis says NOAUTH; the scorer's user may not write; by a wrong one:"
say "$(grep '^smes: ' <<< "$without" | tail -n 1)"
docker compose down --volumes > /dev/null 2>&1
[ "${IMAGES:-}" = official ] || nothing_is_left
say "all is as it should be"
