# The image of controllers, islands, pools and services. `docker build -t ddm .` installs the CPU build of torch,
# `docker build -t ddm --build-arg TORCH=cuda .` the one for NVIDIA GPUs. It holds no secret: tokens are mounted as files.
FROM python:3.11-slim AS wheel
WORKDIR /source
COPY . .
RUN pip install --no-cache-dir build && python -m build --wheel --outdir /wheels .

FROM python:3.11-slim
ARG TORCH=cpu
COPY --from=wheel /wheels /wheels
COPY constraints.txt /wheels/
RUN index=; if [ "$TORCH" = cpu ]; then index="--extra-index-url https://download.pytorch.org/whl/cpu"; fi; \
    pip install --no-cache-dir -c /wheels/constraints.txt $index "$(ls /wheels/*.whl)[cloud,lora,serve,text,ui,workers]"
RUN useradd --create-home ddm && install --directory --owner ddm /runs
USER ddm
WORKDIR /runs
EXPOSE 8000 8265
ENTRYPOINT ["ddm"]
CMD ["--help"]
