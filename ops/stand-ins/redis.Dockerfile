# In place of the official image redis:8: Debian 12 with its Redis, which is 7.0. The user, the volume and what happens
# to a command are the official image's.
FROM smes-stand-in/debian:12
RUN groupadd --system --gid 999 redis \
    && useradd --system --gid redis --uid 999 redis \
    && apt-get update \
    && apt-get install --yes --no-install-recommends redis-server \
    && rm -rf /var/lib/apt/lists/* \
    && install -d -o redis -g redis /data
VOLUME /data
WORKDIR /data
# The official server is built without protected mode, so that other containers reach it.
ENTRYPOINT ["sh", "-c", "exec \"$@\" --protected-mode no", "sh"]
CMD ["redis-server"]
