# slotnb with the default build of torch, which uses a GPU where there is one (docker run --gpus all).
FROM python:3.11-slim
RUN apt-get update && apt-get install -y --no-install-recommends gcc g++ && rm -rf /var/lib/apt/lists/*
COPY . /slotnb
RUN pip install --no-cache-dir -c /slotnb/constraints.txt '/slotnb[video,wheel,movi]'
WORKDIR /data
ENV SLOTNB_CACHE=/data/.cache/slotnb
ENTRYPOINT ["slotnb"]
CMD ["--help"]
