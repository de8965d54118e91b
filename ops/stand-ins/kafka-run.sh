# What the official image does at its start: settings from variables, storage formatted once, the broker.
set -eu
cd /opt/kafka
if said=$(java -XX:TieredStopAtLevel=1 -cp "libs/*" kafka.docker.KafkaDockerWrapper setup \
    --default-configs-dir /etc/kafka/docker --mounted-configs-dir /mnt/shared/config --final-configs-dir config 2>&1)
then
    echo "$said"
else
    case "$said" in
    *"already formatted"*) ;;
    *) echo "$said" >&2; exit 1 ;;
    esac
fi
# shellcheck disable=SC2086 # several options
exec java ${KAFKA_HEAP_OPTS:--Xms1g -Xmx1g} -XX:+UseSerialGC -XX:TieredStopAtLevel=1 \
    -Dlog4j2.configurationFile=config/log4j2.yaml ${KAFKA_OPTS:-} -cp "libs/*" kafka.Kafka config/server.properties
