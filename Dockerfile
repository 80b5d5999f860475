# svdconvert with torch for CPUs, in the versions of constraints.txt.
#
#     docker build -t svdconvert .
#     docker run --rm -v "$PWD:/work" svdconvert decompose org/name -o pissa --rank 16
#
# The commands write into /work as user 1000; with another user of yours add --user "$(id -u):$(id -g)".
FROM python:3.11-slim-bookworm AS build

ENV PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_CACHE_DIR=1
RUN python -m venv /opt/svdconvert
ENV PATH=/opt/svdconvert/bin:$PATH

# The dependencies first: they change less often than the code. torch comes from PyTorch's index of CPU builds,
# because the one on PyPI brings several gigabytes of CUDA.
WORKDIR /source
COPY constraints.txt ./
RUN pip install --no-cache-dir -c constraints.txt --index-url https://download.pytorch.org/whl/cpu torch
COPY pyproject.toml README.md LICENSE ./
COPY svdconvert ./svdconvert
RUN pip install --no-cache-dir -c constraints.txt ".[peft,scores]"

FROM python:3.11-slim-bookworm

LABEL org.opencontainers.image.title="svdconvert" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.source="https://github.com/svdconvert/svdconvert"

# The home directory is open to every user, so that --user works: models of the Hub are cached in it.
RUN useradd --uid 1000 --create-home svdconvert && chmod 1777 /home/svdconvert
COPY --from=build /opt/svdconvert /opt/svdconvert
ENV PATH=/opt/svdconvert/bin:$PATH HOME=/home/svdconvert PYTHONUNBUFFERED=1

USER 1000
WORKDIR /work
ENTRYPOINT ["svdconvert"]
CMD ["--help"]
