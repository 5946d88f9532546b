"""The service (`make bench-serve`): every claim over real HTTP, on random experts of the demo's size with MiniLM.

1. Throughput of 16 clients, in turns with the sampler's own batches of 16 images on one thread, and with one client.
2. Overload: requests arrive at four times the capacity.
3. Faults: replicas are killed while they sample, clients leave, clients are slow, the file of an expert is damaged.
4. Equal bytes alone, in a batch of 16, on another replica and after a restart.
5. Requests that schemathesis makes of the OpenAPI description.
6. Memory of the processes over many requests, and of two experts of eight.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
import venv
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from signal import SIGKILL

import torch

from benchmarks.record import Claim, Listing, median_and_range, write_result
from benchmarks.testbed.served import PROMPTS, SCALE, Reply, ServedProcess, build_model, serve
from ddm_core.artifacts import read_json, to_json
from ensemble.config import SamplingConfig
from ensemble.pipeline import EnsemblePipeline
from ensemble.sampling.prompts import Prompts

CLIENTS, STEPS, QUEUE, EXPERTS = 16, 20, 64, 8


def main() -> None:
    """Measure, write docs/benchmarks/serve.json and print it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--images", type=int, default=96, help="images of a turn")
    parser.add_argument("--overload-s", type=float, default=120.0)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--requests", type=int, default=10_000, help="of the measurement of memory")
    parser.add_argument("--fuzz", type=int, default=5000, help="requests of schemathesis; 0 leaves them out")
    options = parser.parse_args()
    torch.set_num_threads(1)
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        pipeline = build_model(folder, EXPERTS, 512)
        with serve(folder, "--queue", str(QUEUE)) as service:
            first = determine(service)
            throughput, listing, capacity = measure_throughput(service, pipeline, options.turns, options.images)
            overload = measure_overload(service, capacity, options.overload_s)
            clients = [measure_gone(service), measure_slow(service)]
            memory = measure_memory(service, options.requests)
        with serve(folder, "--replicas", "2") as service:
            killed = measure_kills(service, options.kills)
            second = determine(service)
        with serve(folder, "--max-steps", "2", "--max-images", "2") as service:
            fuzzed = [measure_fuzz(service, folder, options.fuzz)] if options.fuzz else []
        damaged = measure_damage(folder)
        residency = measure_residency(folder / "large")
    equal = claim_equal(first, second)
    claims = [*throughput, *overload, killed, *clients, damaged, equal, *fuzzed, memory, *residency]
    notes = [f"Load of the machine at the end: {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores."]
    print(to_json(write_result("serve", time.monotonic() - started, claims, [listing], notes)))


def yes_no(name: str, bar: str, value: str, *, holds: bool, spread: str = "") -> Claim:
    """Return a claim."""
    return Claim(name=name, bar=bar, value=value, spread=spread, holds=holds)


def measure_throughput(
    service: ServedProcess, pipeline: EnsemblePipeline, turns: int, images: int
) -> tuple[list[Claim], Listing, float]:
    """Compare the images per second of the sampler, of 16 clients and of one; return those of a full queue too."""
    config = SamplingConfig(steps=STEPS, guidance_scale=SCALE, batch_size=CLIENTS)
    rows = []

    def sample(seeds: range) -> float:
        start_s = time.monotonic()
        for first in range(seeds.start, seeds.stop, CLIENTS):
            batch = range(first, min(first + CLIENTS, seeds.stop))
            pipeline(batch, config, Prompts.of_captions([PROMPTS[seed % len(PROMPTS)] for seed in batch]))
        return len(seeds) / (time.monotonic() - start_s)

    def cpu_ratio(seeds: range) -> float:
        """Return the CPU time of the sampler / of the busiest deployment, which other work does not change."""
        before = time.process_time(), service.cpu_s()
        sample(seeds)
        own = time.process_time() - before[0]
        request(seeds, CLIENTS)
        return own / (service.cpu_s() - before[1])

    def request(seeds: range, clients: int) -> float:
        return len(seeds) / service.send_all(seeds, clients, STEPS)[1]

    sample(range(CLIENTS)), request(range(4 * CLIENTS), CLIENTS)
    for turn in range(turns):
        seeds = range(turn * images, (turn + 1) * images)
        rows.append((sample(seeds), request(seeds, CLIENTS), request(seeds[: images // 6], 1), sample(seeds)))
    cpu = [cpu_ratio(range(turn * images, (turn + 1) * images)) for turn in range(turns)]
    own = [(before + after) / 2 for before, _, _, after in rows]
    against_own = [many / batch for (_, many, _, _), batch in zip(rows, own, strict=True)]
    against_one = [many / one for _, many, one, _ in rows]
    claims = []
    for name, ratios, bar in (
        (f"throughput of {CLIENTS} clients / of the sampler's batches of {CLIENTS}", against_own, 0.9),
        ("… by the CPU time of the sampler / of the busiest deployment", cpu, 0.9),
        ("… / of one client, one request at a time", against_one, 3.0),
    ):
        value, spread = median_and_range(ratios, 2)
        claims.append(yes_no(name, f"≥ {bar}", value, spread=spread, holds=float(value) >= bar))
    columns = ("sampler: images/s", f"{CLIENTS} clients", "one client", "sampler again")
    listing = Listing(title="Turns", columns=columns, rows=[tuple(f"{rate:.1f}" for rate in row) for row in rows])
    return claims, listing, request(range(3 * QUEUE), QUEUE)


def measure_overload(service: ServedProcess, capacity: float, seconds: float) -> list[Claim]:
    """Send four times the capacity, one image a request, each by a client of its own."""
    sent_before = service.read_metric("ddm_images_total")
    count = int(4 * capacity * seconds)
    with ThreadPoolExecutor(4 * QUEUE) as pool:
        start_s, futures = time.monotonic(), []
        for number in range(count):
            time.sleep(max(0.0, start_s + number / (4 * capacity) - time.monotonic()))
            futures.append(pool.submit(service.send, PROMPTS[number % len(PROMPTS)], number, steps=STEPS))
        replies = [future.result() for future in futures]
    statuses = Counter(reply.status for reply in replies)
    accepted = sorted(reply.seconds for reply in replies if reply.status == 200)
    sent = int(service.read_metric("ddm_images_total") - sent_before)
    p99, promise = accepted[int(0.99 * (len(accepted) - 1))], QUEUE / capacity
    return [
        yes_no(
            f"4 x capacity for {seconds:.0f} s: answers other than 200 and 429",
            "0",
            str(len(replies) - statuses[200] - statuses[429]),
            spread=f"{statuses[200]} x 200, {statuses[429]} x 429",
            holds=set(statuses) == {200, 429},
        ),
        yes_no(
            "… images that were sent / requests with 200", "1", f"{sent} / {statuses[200]}", holds=sent == statuses[200]
        ),
        yes_no(
            f"… p99 of the accepted / a queue of {QUEUE} at the capacity",
            "≤ 2",
            f"{p99 / promise:.2f}",
            spread=f"{p99:.1f} s",
            holds=p99 <= 2 * promise,
        ),
    ]


def measure_kills(service: ServedProcess, kills: int) -> Claim:
    """Kill a replica while 16 clients sample, so many times, each when all replicas of the last kill are back."""
    expected = {seed: service.send(PROMPTS[0], seed, steps=STEPS).files for seed in range(CLIENTS)}
    is_over = threading.Event()
    replies: list[tuple[int, Reply]] = []

    def work(seed: int) -> None:
        while not is_over.is_set():
            replies.append((seed, service.send(PROMPTS[0], seed, steps=STEPS)))

    with ThreadPoolExecutor(CLIENTS) as pool:
        futures = [pool.submit(work, seed) for seed in range(CLIENTS)]
        victims: set[int] = set()
        while len(victims) < kills:
            wait_until(partial(has_work, service, replies, len(replies) + 8, victims))
            victim = min(service.find_replicas("denoise"))
            os.kill(victim, SIGKILL)
            victims.add(victim)
        is_over.set()
        for future in futures:
            future.result()
    good = sum(reply.status == 200 and reply.files == expected[seed] for seed, reply in replies)
    return yes_no(
        f"a replica killed {kills} times under load: accepted requests with their image",
        "all",
        f"{good} of {len(replies)}",
        holds=good == len(replies),
    )


def has_work(service: ServedProcess, replies: list[tuple[int, Reply]], answered: int, dead: set[int]) -> bool:
    """Return whether two replicas live, and so many requests were answered."""
    return len(set(service.find_replicas("denoise")) - dead) == 2 and len(replies) >= answered


def wait_until(condition: Callable[[], bool], longest_s: float = 120.0) -> None:
    """Wait for a condition; raise `TimeoutError` after `longest_s`."""
    end_s = time.monotonic() + longest_s
    while not condition():
        if time.monotonic() > end_s:
            raise TimeoutError(f"nothing happened for {longest_s:.0f} s")
        time.sleep(0.05)


def measure_gone(service: ServedProcess) -> Claim:
    """Let clients leave while their images are sampled; the others' arrive, and nothing of the work is left."""
    connections = [service.open_request({"prompt": PROMPTS[0], "n": 2, "steps": 100}) for _ in range(CLIENTS)]
    wait_until(lambda: service.in_flight() > 0)
    for connection in connections:
        connection.close()
    replies = service.send_all(range(CLIENTS), CLIENTS, STEPS)[0]
    wait_until(lambda: service.in_flight() == 0)
    return claim_answered(
        f"{CLIENTS} clients leave while they wait for 2 images: the others' requests with 200", replies
    )


def measure_slow(service: ServedProcess) -> Claim:
    """Let clients send half a request and wait, or never read their answer, while others ask."""
    body = {"prompt": PROMPTS[0], "n": 1, "steps": STEPS}
    connections = [service.open_request(body, size) for size in [150] * CLIENTS + [None] * CLIENTS]
    replies = service.send_all(range(2 * CLIENTS), CLIENTS, STEPS)[0]
    for connection in connections:
        connection.close()
    return claim_answered(f"{2 * CLIENTS} clients stop in their request or do not read: the others' with 200", replies)


def claim_answered(name: str, replies: Sequence[Reply]) -> Claim:
    """Return the claim that all these requests were answered with an image."""
    good = sum(reply.status == 200 and len(reply.files) == 1 for reply in replies)
    return yes_no(name, "all", f"{good} of {len(replies)}", holds=good == len(replies))


def measure_damage(folder: Path) -> Claim:
    """Serve a model with half of one expert's weights: its requests name the folder, the others have images."""
    expert = Path(shutil.copytree(folder / "pipeline", folder / "damaged" / "pipeline")) / "expert_0"
    weights = max(expert.glob("*.safetensors"), key=lambda path: path.stat().st_size)
    os.truncate(weights, weights.stat().st_size // 2)
    with serve(folder / "damaged") as service:
        replies = [service.send(PROMPTS[0], seed, steps=1) for seed in range(4 * EXPERTS)]
    statuses = Counter(reply.status for reply in replies)
    clear = sum(reply.status == 500 and expert.name in reply.message for reply in replies)
    return yes_no(
        "weights of one expert cut in half: requests without an image / those that name the expert",
        "1",
        f"{len(replies) - statuses[200]} / {clear}",
        spread=f"{statuses[200]} x 200",
        holds=0 < clear == len(replies) - statuses[200] and statuses[200] > 0,
    )


def measure_fuzz(service: ServedProcess, folder: Path, count: int) -> Claim:
    """Send requests made from the OpenAPI description, by a schemathesis in an environment of its own."""
    venv.create(folder / "schemathesis", with_pip=True)
    binaries, report = folder / "schemathesis" / "bin", folder / "fuzz.json"
    subprocess.run([binaries / "pip", "install", "-q", "schemathesis>=4,<5"], check=True)
    options = ["--phases", "fuzzing", "-n", str(count), "-c", "not_a_server_error", "--suppress-health-check", "all"]
    options += [
        "--continue-on-failure",
        "--request-timeout",
        "120",
        "--report",
        "json",
        "--report-json-path",
        str(report),
    ]
    command = [str(binaries / "schemathesis"), "run", f"{service.url}/openapi.json", *options]
    subprocess.run(command, cwd=folder, stdout=subprocess.DEVNULL, check=False)
    cases = read_json(report)["test_cases"]
    bad = cases["with_failures"] + cases["errored"]
    return yes_no(
        "requests made from the OpenAPI description: answers with 5xx, or none",
        f"0 of {count}",
        f"{bad} of {cases['generated']}",
        holds=bad == 0 and cases["generated"] >= count,
    )


def determine(service: ServedProcess) -> list[bytes]:
    """Return sixteen images, each sampled alone and in one request; raise `ValueError` if they differ."""
    together = service.send(PROMPTS[0], *range(CLIENTS), steps=STEPS)
    alone: list[Reply] = [service.send(PROMPTS[0], seed, steps=STEPS) for seed in range(CLIENTS)]
    if [reply.files[0] for reply in alone] != list(together.files):
        raise ValueError("an image depends on the batch that it is sampled in")
    return list(together.files)


def claim_equal(first: list[bytes], second: list[bytes]) -> Claim:
    """Return the claim that two services gave the same bytes."""
    equal = sum(a == b for a, b in zip(first, second, strict=True))
    name = f"{CLIENTS} images alone, in one batch, after a restart and on two replicas: equal bytes"
    return yes_no(name, f"{len(first)} of {len(first)}", f"{equal} of {len(first)}", holds=equal == len(first))


def measure_memory(service: ServedProcess, count: int) -> Claim:
    """Compare the memory after a fifth of the requests with that at the end."""
    service.send_all(range(count // 5), CLIENTS, 1)
    before = service.memory_mb()
    service.send_all(range(count // 5, count), CLIENTS, 1)
    growth = service.memory_mb() / before - 1
    return yes_no(
        f"memory of all processes over {count} requests",
        "± 5 %",
        f"{100 * growth:+.1f} %",
        spread=f"{before:.0f} MB",
        holds=abs(growth) <= 0.05,
    )


def measure_residency(folder: Path) -> list[Claim]:
    """Compare two of eight larger experts in memory with all, in processes of their own."""
    build_model(folder, EXPERTS, 1536)
    results = {}
    for resident in ("2", "8"):
        command = [sys.executable, "-m", "benchmarks.testbed.residency", str(folder / "pipeline"), resident]
        environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": str(2**20)}
        output = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout
        results[resident] = [float(word) for word in output.split()]
    (peak, size, few), (_, _, all_resident) = results["2"], results["8"]
    return [
        yes_no(
            "2 of 8 experts in memory: peak / one expert",
            "≤ 2.3",
            f"{peak / size:.2f}",
            spread=f"{peak:.0f} / {size:.0f} MB",
            holds=peak <= 2.3 * size,
        ),
        yes_no("… images/s / those with all 8", "reported", f"{few / all_resident:.2f}", holds=True),
    ]


if __name__ == "__main__":
    main()
