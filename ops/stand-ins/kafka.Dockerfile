# In place of the official image apache/kafka:4.2.1: the same release's jars on Debian 12 and its Java 17. The user, the
# folders and the volumes are the official image's. What makes settings of the KAFKA_ variables is in the jars.
FROM smes-stand-in/debian:12
RUN useradd --uid 1000 --create-home appuser \
    && apt-get update \
    && apt-get install --yes --no-install-recommends openjdk-17-jre-headless procps \
    && rm -rf /var/lib/apt/lists/* \
    && install -d -o appuser -g appuser /opt/kafka/config /opt/kafka/logs /etc/kafka/secrets /mnt/shared/config \
        /var/lib/kafka/data
COPY libs /opt/kafka/libs
COPY kafka-run.sh kafka-server.properties kafka-log4j2.yaml /etc/kafka/docker/
RUN cd /etc/kafka/docker \
    && mv kafka-server.properties server.properties \
    && mv kafka-log4j2.yaml log4j2.yaml \
    && cp log4j2.yaml tools-log4j2.yaml
VOLUME ["/etc/kafka/secrets", "/mnt/shared/config", "/var/lib/kafka/data"]
USER appuser
CMD ["sh", "/etc/kafka/docker/kafka-run.sh"]
