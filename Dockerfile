# mpp with its command, for devices of NVIDIA's (PyPI's torch brings CUDA's libraries) and for CPUs.
#
#   docker build -t mpp .
#   docker run --rm --gpus all --shm-size 8g -u "$(id -u):$(id -g)" -v "$PWD":/work mpp doctor
#   docker run --rm --gpus all --shm-size 8g -u "$(id -u):$(id -g)" -v "$PWD":/work mpp pretrain pretrain/vit_small data.shards=shards/photos out=runs/photos
#
# On CPUs leave --gpus out. Several devices: --entrypoint torchrun mpp --nproc_per_node 8 -m mpp pretrain ... For remote shards and
# published weights -v "$HOME/.cache/mpp":/tmp/mpp-cache keeps what was fetched. --init --stop-timeout 300: `docker stop` then
# leaves a run the time to save. --shm-size: loader workers hand images over in /dev/shm, of which docker gives 64 MB.
FROM python:3.12-slim

# compile=true wants a C++ compiler
RUN apt-get update && apt-get install -y --no-install-recommends g++ && rm -rf /var/lib/apt/lists/*

WORKDIR /opt/mpp
COPY pyproject.toml README.md LICENSE ./
COPY mpp ./mpp
COPY recipes ./recipes
RUN pip install --no-cache-dir '.[s3,gs,onnx,transformers,parquet,multichannel,dicom,map,lora,tensorboard]'

# any user may run it: caches lie where that user can write
ENV HOME=/tmp MPP_CACHE=/tmp/mpp-cache
WORKDIR /work
ENTRYPOINT ["mpp"]
CMD ["--help"]
