# In place of the official image python:3.11-slim: Debian 12 with its Python, which is 3.11 too.
FROM smes-stand-in/debian:12
RUN apt-get update \
    && apt-get install --yes --no-install-recommends python3-pip \
    && rm -rf /var/lib/apt/lists/* /usr/lib/python3.11/EXTERNALLY-MANAGED \
    && ln -s /usr/bin/python3 /usr/local/bin/python
# pip as on the machine that builds: its certificates, and the folder with torch, which the script serves over HTTP.
ARG TORCH_HOST
RUN printf '[global]\ncert = /etc/ssl/certs/ca-certificates.crt\ntrusted-host = %s\n' "$TORCH_HOST" > /etc/pip.conf
