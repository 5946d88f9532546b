"""Measure what a plan needs: `python -m orchestrator.planning.calibrate`, with a run's configuration as JSON on stdin.

The measurement is written to `calibration.json` in the run folder. With `--probe JSON` the program only times the
networks and prints the result; this mode runs on islands. Every stage is timed with one thread per requested CPU.
"""

import argparse
import json
import os
import platform
import secrets
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
from pydantic import TypeAdapter

from data_partition.shards.shards import read_index
from ddm_core.artifacts import to_jsonable, write_record
from ddm_core.errors import DDMError
from experts.codecs.registry import CODECS
from experts.conditions.text_embedding import TextEmbedding
from experts.conditions.text_encoder import TextEncoder
from experts.conditions.text_files import read_text_shape
from experts.expert import expert_flops
from experts.training.flops import forward_flops, training_flops
from experts.training.latents.caption_costs import caption_flops
from experts.training.trainer import DeviceError
from orchestrator.config.compute import CONTROLLER, IslandConfig, ResourcesConfig
from orchestrator.config.schema import RunConfig, parse_config
from orchestrator.errors import IslandError
from orchestrator.islands.client import IslandClient
from orchestrator.pipeline.graph import build_graph
from orchestrator.pipeline.stage import Stage
from orchestrator.planning.calibration import RESULT_PREFIX, Calibration, Place, StageSpeed, calibration_fingerprint
from orchestrator.planning.cost_model import DatasetFacts, count_images, estimate_work
from orchestrator.planning.dry_run import DryRun, dry_run
from orchestrator.planning.microbenchmarks import NetworkProbe, Networks, build_networks, time_networks
from orchestrator.planning.synchronous_baseline import BYTES_PER_PARAMETER
from orchestrator.run.run_folder import RunFolder
from orchestrator.run.worker import limited_threads

PROBE_TIMEOUT_S = 300.0
POLL_S = 0.5


def probe_island(
    name: str, island: IslandConfig, probe: NetworkProbe, resources: ResourcesConfig, wheel: Path, grace_s: float
) -> Place:
    """Measure an island with an expert's resources; an island that fails is a place with a problem."""
    client, submission = IslandClient(name, island), f"ddm-probe-{secrets.token_hex(4)}"
    command = ["python", "-P", "-m", "orchestrator.planning.calibrate", "--probe", json.dumps(to_jsonable(probe))]
    started, resources = time.monotonic(), replace(resources, workers=1)
    try:
        client.check_reachable()
        client.submit(submission, command, wheel=wheel, resources=resources, grace_s=grace_s)
        if not _wait_for_end(client, submission):
            client.stop(submission)
            return Place(problem=f"its probe did not end within {PROBE_TIMEOUT_S:g} s")
        elapsed_s = time.monotonic() - started
        place = parse_place(client.fetch_log(submission))
        client.delete(submission)
    except IslandError as error:
        return Place(problem=str(error))
    return place if place.problem else replace(place, start_s=max(0.0, elapsed_s - place.start_s))


def parse_place(log: str) -> Place:
    """Parse a probe's output; without a result, the last line becomes the problem."""
    lines = log.strip().splitlines()
    result = next((line for line in lines if line.startswith(RESULT_PREFIX)), None)
    if result is None:
        return Place(problem=f"its probe failed: {lines[-1] if lines else 'it printed nothing'}")
    return TypeAdapter(Place).validate_json(result.removeprefix(RESULT_PREFIX))


def _wait_for_end(client: IslandClient, submission: str) -> bool:
    """Wait for the probe; return False if it takes too long."""
    deadline = time.monotonic() + PROBE_TIMEOUT_S
    while time.monotonic() < deadline:
        state = client.list_states().get(submission)
        if state is not None and state.has_ended:
            return True
        time.sleep(POLL_S)
    return False


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, and return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m orchestrator.planning.calibrate")
    parser.add_argument("--probe", help="what to time, as JSON")
    options = parser.parse_args(arguments)
    try:
        if options.probe:
            started = time.monotonic()
            probe = TypeAdapter(NetworkProbe).validate_json(options.probe)
            place = measure_place(build_networks(probe), probe)
            elapsed_s = time.monotonic() - started
            sys.stdout.write(RESULT_PREFIX + json.dumps(to_jsonable(replace(place, start_s=elapsed_s))) + "\n")
        else:
            calibrate(parse_config(json.load(sys.stdin)))
    except (DDMError, ValueError) as error:
        sys.stderr.write(" ".join(str(error).split()) + "\n")
        return 1
    return 0


def calibrate(config: RunConfig) -> None:
    """Measure here and on every island; write `calibration.json` into the run folder."""
    run = RunFolder(Path(config.folder).expanduser())
    graph = build_graph(config)
    with (
        tempfile.TemporaryDirectory(prefix="ddm-dry-run-") as folder,
        limited_threads(config.compute.stages.dataset.cpus),
    ):
        dry = dry_run(config, Path(folder))
    probe = build_probe(config, dry)
    networks = build_networks(probe)
    facts = _dataset_facts(config, run, graph, dry, networks)
    controller = measure_place(networks, probe)
    controller = replace(controller, start_s=_process_start_s(), speeds=dry.speeds | controller.speeds)
    calibration = Calibration(
        fingerprint=calibration_fingerprint(graph, config.compute),
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        work=estimate_work(graph, facts),
        bytes=_artifact_bytes(graph, facts, dry, networks.parameters),
        places={CONTROLLER: controller} | _measure_islands(config, probe),
        parameters=networks.parameters["expert"],
    )
    run.root.mkdir(parents=True, exist_ok=True)
    write_record(run.calibration, calibration)


def build_probe(config: RunConfig, dry: DryRun) -> NetworkProbe:
    """Return what is needed to time the networks anywhere."""
    stages = config.compute.stages
    return NetworkProbe(
        expert=config.expert,
        router=config.router,
        num_experts=config.partition.num_experts,
        latent_shape=dry.latent_shape,
        num_classes=dry.num_classes,
        text_shape=read_text_shape(config.text),
        cpus={kind: getattr(stages, kind).cpus for kind in ("expert", "router", "monolith", "score")},
        sampling_rows=config.ensemble.batch_size,
        sampling_device=config.ensemble.device,
    )


def measure_place(networks: Networks, probe: NetworkProbe) -> Place:
    """Measure this machine; without the configured device, return the problem instead of speeds."""
    versions = {name: version(name) for name in ("torch", "decentralized-diffusion") if _is_installed(name)}
    place = Place(machine=describe_machine(), versions={"python": platform.python_version()} | versions)
    try:
        speeds, checkpoint_s = time_networks(networks, probe)
    except DeviceError as error:
        return replace(place, problem=str(error))
    return replace(place, speeds=speeds, checkpoint_s=checkpoint_s, cpu_share=_cpu_share(speeds, probe))


def _cpu_share(speeds: Mapping[str, StageSpeed], probe: NetworkProbe) -> float:
    """Return the used share of CPU time in an expert's steps; 1 on an accelerator, where it is not measured."""
    if probe.expert.training.device != "cpu":
        return 1.0
    return min(1.0, speeds["expert"].cpu_s / (speeds["expert"].unit_s * probe.cpus["expert"]))


def describe_machine() -> str:
    """Return the accelerators, or the processor and the number of its usable cores."""
    if torch.cuda.is_available():
        return f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()}"
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    model = next((line.partition(": ")[2] for line in lines if line.startswith("model name")), platform.machine())
    return f"{len(os.sched_getaffinity(0))} x {model}"


def _is_installed(name: str) -> bool:
    try:
        version(name)
    except PackageNotFoundError:
        return False
    return True


def _process_start_s() -> float:
    """Return the time from the start of a new process until it could start a stage."""
    started = time.monotonic()
    subprocess.run([sys.executable, "-P", "-c", "import orchestrator.run.worker"], check=True)
    return time.monotonic() - started


def _dataset_facts(
    config: RunConfig, run: RunFolder, graph: Sequence[Stage], dry: DryRun, networks: Networks
) -> DatasetFacts:
    """Collect the numbers for the cost model; the number of images is exact once the data set is finished."""
    images, held_out = count_images(config.data)
    dataset = next(stage for stage in graph if stage.kind == "dataset")
    if run.is_finished(dataset):
        images, held_out = (read_index(run.artifact(dataset) / part).count for part in ("train", "holdout"))
    text, text_shape = TextEncoder.from_config(config.text), read_text_shape(config.text)
    others = _decoder_flops(config)
    if text is not None:
        others["text"] = caption_flops(text)
    return DatasetFacts(
        images=images,
        held_out=held_out,
        row_flops=networks.row_flops | others | _row_flops_of_experts(config, dry),
        pooled_width=0 if text_shape is None else text_shape[2],
        num_classes=dry.num_classes,
        extractors=dry.extractors,
        num_experts=config.partition.num_experts,
        partition=config.partition,
    )


def _row_flops_of_experts(config: RunConfig, dry: DryRun) -> dict[str, float]:
    shape, classes, text_shape = dry.latent_shape, dry.num_classes, read_text_shape(config.text)
    null_text = None if text_shape is None else TextEmbedding.zeros(*text_shape)
    return {
        f"expert_{k}": expert_flops(expert, shape, classes, null_text)
        / training_flops(1.0, expert.training.batch_size, expert.training.steps)
        for k, expert in config.experts.items()
    }


def _decoder_flops(config: RunConfig) -> dict[str, float]:
    probe, side = CODECS[config.codec.kind].probe, config.data.image_size
    if probe is None:
        return {}
    return {"decoder": forward_flops(probe(config.codec, (side, side, config.data.channels))[1])}


def _artifact_bytes(
    graph: Sequence[Stage], facts: DatasetFacts, dry: DryRun, parameters: Mapping[str, int]
) -> dict[str, int]:
    """Return the sizes of transferred artifacts, as far as they are known before the run."""
    sizes = {"codec": float(dry.codec_bytes)}
    networks = {"expert": parameters["expert"], "monolith": parameters["expert"], "router": parameters["router"]}
    sizes |= {stage.name: BYTES_PER_PARAMETER * networks[stage.kind] for stage in graph if stage.kind in networks}
    if facts.images is None or facts.held_out is None:
        return {name: round(size) for name, size in sizes.items()}
    train, held_out = facts.images * dry.image_bytes, facts.held_out * dry.image_bytes
    latents, held_out_latents = facts.images * dry.latent_bytes, facts.held_out * dry.latent_bytes
    sizes |= {"dataset/train": train, "dataset": train + held_out, "latents": latents + held_out_latents}
    sizes |= {"partition/latents": latents, "partition/holdout_latents": held_out_latents}
    sizes |= {"partition": train + held_out + sizes["latents"]}
    for part, size in (("latents", latents), ("holdout_latents", held_out_latents)):
        sizes |= {f"partition/{part}/{k}": size / facts.num_experts for k in range(facts.num_experts)}
    sizes["features"] = facts.images * dry.extractors["partition"].dimension * BYTES_PER_PARAMETER
    return {name: round(size) for name, size in sizes.items()}


def _measure_islands(config: RunConfig, probe: NetworkProbe) -> dict[str, Place]:
    """Measure all islands in parallel."""
    compute = config.compute
    if not compute.islands:
        return {}
    from orchestrator.islands.wheel import build_wheel

    with tempfile.TemporaryDirectory(prefix="ddm-wheel-") as folder, ThreadPoolExecutor(len(compute.islands)) as pool:
        wheel = build_wheel(Path(folder))
        futures = {
            name: pool.submit(probe_island, name, island, probe, compute.stages.expert, wheel, compute.grace_s)
            for name, island in compute.islands.items()
        }
        return {name: future.result() for name, future in futures.items()}


if __name__ == "__main__":
    sys.exit(main())
