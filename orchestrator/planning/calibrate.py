"""Measure what a plan needs: `python -m orchestrator.planning.calibrate`, a run's configuration as JSON on its input.

Writes `calibration.json` into the run folder. With `--probe JSON` it times the networks alone and prints the result:
that is what runs on islands. One thread for every CPU that a stage asks for.
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

from data_partition.errors import DataError
from data_partition.shards.shards import read_index
from ddm_core.artifacts import ArtifactError, to_jsonable, write_json
from experts.architectures.conv_decoder import ConvDecoder
from experts.expert import expert_flops
from experts.training.flops import forward_flops, training_flops
from experts.training.trainer import DeviceError
from orchestrator.config.compute import CONTROLLER, IslandConfig, ResourcesConfig
from orchestrator.config.schema import RunConfig, parse_config
from orchestrator.errors import IslandError, OrchestratorError
from orchestrator.islands.client import IslandClient
from orchestrator.pipeline.graph import build_graph
from orchestrator.pipeline.stage import Stage
from orchestrator.planning.calibration import SAID, Calibration, Place, StageSpeed, identity
from orchestrator.planning.cost_model import DatasetFacts, count_images, estimate_work
from orchestrator.planning.dry_run import DryRun, dry_run
from orchestrator.planning.microbenchmarks import NetworkProbe, Networks, build_networks, time_networks
from orchestrator.planning.synchronous_baseline import BYTES_PER_PARAMETER
from orchestrator.run.run_folder import RunFolder
from orchestrator.run.worker import limited_threads

LONGEST_S = 300.0
LOOK_S = 0.5


def probe_island(
    name: str, island: IslandConfig, probe: NetworkProbe, resources: ResourcesConfig, wheel: Path, grace_s: float
) -> Place:
    """The island as an expert would find it; one that refuses or does not answer is a place with a problem."""
    client, submission = IslandClient(name, island), f"ddm-probe-{secrets.token_hex(4)}"
    command = ["python", "-m", "orchestrator.planning.calibrate", "--probe", json.dumps(to_jsonable(probe))]
    started, asked = time.monotonic(), replace(resources, workers=1)
    try:
        client.check_reachable()
        client.submit(submission, command, wheel=wheel, resources=asked, grace_s=grace_s)
        if not _ends(client, submission):
            client.stop(submission)
            return Place(problem=f"its probe did not end within {LONGEST_S:g} s")
        took_s = time.monotonic() - started
        measured = read_place(client.log(submission))
        client.delete(submission)
    except IslandError as error:
        return Place(problem=str(error))
    return measured if measured.problem else replace(measured, start_s=max(0.0, took_s - measured.start_s))


def read_place(log: str) -> Place:
    """What a probe has printed; if it has not come so far, its last line is the problem."""
    lines = log.strip().splitlines()
    said = next((line for line in lines if line.startswith(SAID)), None)
    if said is None:
        return Place(problem=f"its probe failed: {lines[-1] if lines else 'it printed nothing'}")
    return TypeAdapter(Place).validate_json(said.removeprefix(SAID))


def _ends(client: IslandClient, submission: str) -> bool:
    """Wait for the probe; False if it takes too long."""
    give_up = time.monotonic() + LONGEST_S
    while time.monotonic() < give_up:
        state = client.states().get(submission)
        if state is not None and state.has_ended:
            return True
        time.sleep(LOOK_S)
    return False


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, and return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m orchestrator.planning.calibrate")
    parser.add_argument("--probe", help="what to time, as JSON")
    given = parser.parse_args(arguments)
    try:
        if given.probe:
            began = time.monotonic()
            probe = TypeAdapter(NetworkProbe).validate_json(given.probe)
            place = measure_place(build_networks(probe), probe)
            took_s = time.monotonic() - began
            sys.stdout.write(SAID + json.dumps(to_jsonable(replace(place, start_s=took_s))) + "\n")
        else:
            calibrate(parse_config(json.load(sys.stdin)))
    except (OrchestratorError, ArtifactError, DataError, ValueError) as error:
        sys.stderr.write(" ".join(str(error).split()) + "\n")
        return 1
    return 0


def calibrate(config: RunConfig) -> None:
    """Measure here and on every island, and write `calibration.json` into the run folder."""
    run = RunFolder(Path(config.folder).expanduser())
    graph = build_graph(config)
    with (
        tempfile.TemporaryDirectory(prefix="ddm-rehearsal-") as folder,
        limited_threads(config.compute.stages.dataset.cpus),
    ):
        rehearsed = dry_run(config, Path(folder))
    probe = probe_of(config, rehearsed)
    networks = build_networks(probe)
    facts = _facts(config, run, graph, rehearsed, networks)
    home = measure_place(networks, probe)
    home = replace(home, start_s=_start_s(), speeds=rehearsed.speeds | home.speeds)
    calibration = Calibration(
        fingerprint=identity(graph, config.compute),
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        work=estimate_work(graph, facts),
        bytes=_sizes(graph, facts, rehearsed, networks.parameters),
        places={CONTROLLER: home} | _measure_islands(config, probe),
        parameters=networks.parameters["expert"],
    )
    run.root.mkdir(parents=True, exist_ok=True)
    write_json(run.calibration, calibration)


def probe_of(config: RunConfig, rehearsed: DryRun) -> NetworkProbe:
    """What has to be known to time the networks."""
    stages = config.compute.stages
    return NetworkProbe(
        expert=config.expert,
        router=config.router,
        num_experts=config.partition.num_experts,
        latent_shape=rehearsed.latent_shape,
        num_classes=rehearsed.num_classes,
        cpus={kind: getattr(stages, kind).cpus for kind in ("expert", "router", "monolith", "score")},
        sampling_rows=config.ensemble.batch_size,
        sampling_device=config.ensemble.device,
    )


def measure_place(networks: Networks, probe: NetworkProbe) -> Place:
    """How quick this machine is; without the device of the configuration only what is the matter."""
    versions = {name: version(name) for name in ("torch", "decentralized-diffusion") if _is_installed(name)}
    place = Place(machine=machine(), versions={"python": platform.python_version()} | versions)
    try:
        speeds, checkpoint_s = time_networks(networks, probe)
    except DeviceError as error:
        return replace(place, problem=str(error))
    return replace(place, speeds=speeds, checkpoint_s=checkpoint_s, cpu_share=_cpu_share(speeds, probe))


def _cpu_share(speeds: Mapping[str, StageSpeed], probe: NetworkProbe) -> float:
    """CPU time of the experts' steps over what their threads could have had; an accelerator's is not looked at."""
    if probe.expert.training.device != "cpu":
        return 1.0
    return min(1.0, speeds["expert"].cpu_s / (speeds["expert"].unit_s * probe.cpus["expert"]))


def machine() -> str:
    """The accelerator, or the processor and how many of its cores we may use."""
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


def _start_s() -> float:
    """How long a new process takes until it could begin with a stage."""
    began = time.monotonic()
    subprocess.run([sys.executable, "-c", "import orchestrator.run.worker"], check=True)
    return time.monotonic() - began


def _facts(
    config: RunConfig, run: RunFolder, graph: Sequence[Stage], rehearsed: DryRun, networks: Networks
) -> DatasetFacts:
    """The number of images is exact once the data set is finished."""
    images, held_out = count_images(config.data)
    dataset = next(stage for stage in graph if stage.kind == "dataset")
    if run.finished(dataset):
        images, held_out = (read_index(run.artifact(dataset) / part).count for part in ("train", "holdout"))
    return DatasetFacts(
        images=images,
        held_out=held_out,
        row_flops=networks.row_flops | _decoder_flops(config) | _different_experts(config, rehearsed),
        extractors=rehearsed.extractors,
        num_experts=config.partition.num_experts,
        partition=config.partition,
    )


def _different_experts(config: RunConfig, rehearsed: DryRun) -> dict[str, float]:
    shape, classes = rehearsed.latent_shape, rehearsed.num_classes
    return {
        f"expert_{k}": expert_flops(expert, shape, classes)
        / training_flops(1.0, expert.training.batch_size, expert.training.steps)
        for k, expert in config.experts.items()
    }


def _decoder_flops(config: RunConfig) -> dict[str, float]:
    if config.codec.kind != "pca_conv":
        return {}
    side, components = config.data.image_size, config.codec.components
    decoder = ConvDecoder(components, (side, side, config.data.channels), config.codec.decoder_width)
    return {"decoder": forward_flops(lambda: decoder(torch.zeros(1, components)))}


def _sizes(
    graph: Sequence[Stage], facts: DatasetFacts, rehearsed: DryRun, parameters: Mapping[str, int]
) -> dict[str, int]:
    """Bytes of what may have to be moved, as far as they can be told before."""
    sizes = {"codec": float(rehearsed.codec_bytes)}
    networks = {"expert": parameters["expert"], "monolith": parameters["expert"], "router": parameters["router"]}
    sizes |= {stage.name: BYTES_PER_PARAMETER * networks[stage.kind] for stage in graph if stage.kind in networks}
    if facts.images is None or facts.held_out is None:
        return {name: round(size) for name, size in sizes.items()}
    train, held_out = facts.images * rehearsed.image_bytes, facts.held_out * rehearsed.image_bytes
    sizes |= {"dataset/train": train, "dataset": train + held_out}
    sizes |= {"partition/clusters": train, "partition/holdout": held_out, "partition": train + held_out}
    sizes |= {f"partition/clusters/{k}": train / facts.num_experts for k in range(facts.num_experts)}
    sizes["features"] = facts.images * rehearsed.extractors["partition"].dimension * BYTES_PER_PARAMETER
    return {name: round(size) for name, size in sizes.items()}


def _measure_islands(config: RunConfig, probe: NetworkProbe) -> dict[str, Place]:
    """All islands at once."""
    compute = config.compute
    if not compute.islands:
        return {}
    from orchestrator.islands.wheel import build_wheel

    with tempfile.TemporaryDirectory(prefix="ddm-wheel-") as folder, ThreadPoolExecutor(len(compute.islands)) as pool:
        wheel = build_wheel(Path(folder))
        asked = {
            name: pool.submit(probe_island, name, island, probe, compute.stages.expert, wheel, compute.grace_s)
            for name, island in compute.islands.items()
        }
        return {name: answer.result() for name, answer in asked.items()}


if __name__ == "__main__":
    sys.exit(main())
