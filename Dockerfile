# The project on NVIDIA's PyTorch image:  make image
#
# Release 26.01: Ubuntu 24.04, Python 3.12, CUDA 13.1, torch 2.10.0a0 (the last month before 2.10),
# Transformer Engine 2.11, DALI. It is the newest whose Transformer Engine Megatron-Core 0.16 allows
# (below 2.12; release 26.02 brings 2.12 and torch 2.11.0a0). apex is used if it is there; what an
# image really holds is printed at the end of the build. All this is as published: not built yet on
# a machine of ours.
#
# A tag can be moved. To pin what was pulled once, build with its digest:
#     docker pull nvcr.io/nvidia/pytorch:26.01-py3     (prints `Digest: sha256:...`)
#     make image BASE=nvcr.io/nvidia/pytorch@sha256:...
ARG BASE=nvcr.io/nvidia/pytorch:26.01-py3
FROM ${BASE}

SHELL ["/bin/bash", "-euo", "pipefail", "-c"]
WORKDIR /opt/geneformer_mcore

# By themselves, so that a change of our code leaves this layer, the large one, as it is. Releases
# differ in what their own PIP_CONSTRAINT holds, from all to nothing: ours stands in its place.
COPY requirements.lock setup.py ./
COPY image/ image/
RUN python image/packages.py image/lists \
    && PIP_CONSTRAINT="" python -m pip install --no-cache-dir \
        --constraint image/lists/constraints.txt \
        --requirement image/lists/needed.txt \
    && python image/packages.py --check image/lists

# Others can read it, whatever the umask was where it was checked out.
COPY . .
RUN python -m pip install --no-cache-dir --no-deps --no-build-isolation --editable . \
    && python image/packages.py --check image/lists \
    && chmod -R a+rX . \
    && python -c "from geneformer_mcore import backends; print(backends.describe())"

ARG REVISION=unknown
LABEL org.opencontainers.image.title="geneformer_mcore" \
      org.opencontainers.image.description="Pretraining of Geneformer on Megatron-Core" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.revision="${REVISION}"

# Ubuntu's own first user, who has a home for caches. Pyxis and `docker run --user` put another one in
# its place: nothing here needs to be written to. Runs and stores lie on mounted folders.
USER 1000:1000

# The base image's entry point prints a page of text before every command.
ENTRYPOINT []
CMD ["bash"]
