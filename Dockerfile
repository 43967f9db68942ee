# Two images from one file, for CPU and CUDA:
#
#   docker build --target reward-server -t rlaif-reward-server .
#   docker build --target trainer       -t rlaif-trainer .
#   docker build --target trainer --build-arg BASE=nvidia/cuda:12.9.1-runtime-ubuntu24.04 --build-arg TORCH=torch .
#
# The server listens on loopback unless told otherwise, so here the trainer shares its network (deploy/ has more):
#
#   docker run --name reward -v "$PWD/rm:/data/rm:ro" rlaif-reward-server --model hf:/data/rm
#   docker run --network container:reward -v "$PWD/runs:/data/runs" rlaif-trainer ppo --reward_server 127.0.0.1:50051 ...

ARG BASE=python:3.12-slim-bookworm

FROM ${BASE} AS system
COPY docker/steps.sh /usr/local/bin/steps
RUN steps system

FROM system AS build
ARG TORCH=torch==2.13.0
WORKDIR /src
COPY pyproject.toml constraints.txt ./
RUN TORCH="${TORCH}" steps dependencies /opt/rlaif
COPY README.md LICENSE ./
COPY rlaif rlaif
COPY protos protos
COPY labeler labeler
COPY reward_server reward_server
COPY policy_trainer policy_trainer
COPY tinyworld tinyworld
RUN steps package /opt/rlaif && steps verify /opt/rlaif

FROM system AS runtime
COPY --from=build /opt/rlaif /opt/rlaif
ENV PATH=/opt/rlaif/bin:$PATH PYTHONUNBUFFERED=1
RUN install -d -o 10001 -g 10001 /data
USER 10001:10001
WORKDIR /data

FROM runtime AS reward-server
EXPOSE 50051
HEALTHCHECK --interval=10s --timeout=5s --start-period=120s --retries=3 \
  CMD ["python", "-m", "reward_server.healthcheck", "127.0.0.1:50051"]
STOPSIGNAL SIGTERM
ENTRYPOINT ["rlaif", "serve", "--port", "50051"]

FROM runtime AS trainer
HEALTHCHECK NONE
ENTRYPOINT ["rlaif", "train"]
