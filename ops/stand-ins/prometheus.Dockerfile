# In place of the official image prom/prometheus:v3.5.0: Debian 12 with its Prometheus, which is 2.42. The user, the
# folder and the entry point are the official image's.
FROM smes-stand-in/debian:12
RUN apt-get update \
    && apt-get install --yes --no-install-recommends prometheus wget \
    && rm -rf /var/lib/apt/lists/* /etc/prometheus \
    && install -d -o nobody -g nogroup /prometheus /etc/prometheus
USER nobody
EXPOSE 9090
VOLUME /prometheus
WORKDIR /prometheus
ENTRYPOINT ["/bin/prometheus"]
