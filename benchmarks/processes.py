"""Several processes share a run: what they put on the wire, what sharing costs, and whether a bad network changes it.

    python benchmarks/processes.py bytes    # needs rights to make a network namespace (root, or unshare -r)
    python benchmarks/processes.py time
    python benchmarks/processes.py same     # 1, 2 and 4 processes, every way to train
    python benchmarks/processes.py network  # root: two namespaces, 50 ms and 1 % loss between them

`bytes` counts on the interface: a run of 25 steps minus one of 5, in a namespace of its own, so that nothing else is
counted. `network` joins two namespaces by packets that this program carries, late, and sometimes not at all.
"""

import argparse
import ctypes
import fcntl
import hashlib
import heapq
import json
import multiprocessing
import os
import random
import select
import socket
import statistics
import struct
import subprocess
import sys
import tempfile
import threading
import time
from multiprocessing.reduction import recv_handle, send_handle
from pathlib import Path
from typing import Any

TASK = "--task_name RottenTomatoes --num_train 400 --num_dev 0 --num_eval 32 --use_cpu true --disable_tqdm true"
STEP = "--save_strategy no --logging_steps 1 --zo_eps 1e-2 --learning_rate 1e-2"
DELAY, LOSS = 0.050, 0.01
STEPS, WARM = 26, 2
"""Of the timing: all, and those that are not counted."""
NEW_NETWORK = 0x40000000
TUNSETIFF, TUN_WITHOUT_INFO = 0x400454CA, 0x1001


def command(folder: Path, flags: str) -> list[str]:
    """A training run, as arguments of Python."""
    steps = "" if "boost" in flags else STEP
    return ["-m", "xgblora", "train", *TASK.split(), *steps.split(), *flags.split(), "--output_dir", str(folder)]


def free_port() -> int:
    """A port that nothing listens on."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port


def together(processes: int, arguments: list[str]) -> None:
    """Carry out a module in so many processes, of one thread each, placed as torchrun places them.

    Without torchrun itself, whose agent talks, too.
    """
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "OMP_NUM_THREADS": "1"}
    place["WORLD_SIZE"] = str(processes)
    started = [
        subprocess.Popen(
            [sys.executable, *arguments],
            env=os.environ | place | {"RANK": str(number), "LOCAL_RANK": str(number)},
            stdout=subprocess.DEVNULL,
        )
        for number in range(processes)
    ]
    if sum(process.wait() != 0 for process in started):
        raise SystemExit(f"{' '.join(arguments)} failed")


def seconds_per_step(folder: Path) -> float:
    """Median of a run."""
    value: float = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))["seconds_per_step"]
    return value


def loopback_bytes() -> int:
    """What went over this namespace's loopback interface so far."""
    line = next(line for line in Path("/proc/net/dev").read_text(encoding="ascii").splitlines() if "lo:" in line)
    return int(line.split(":")[1].split()[8])


REDUCE = """
import torch, sys
from torch import distributed
distributed.init_process_group("gloo")
gradient = torch.ones(int(sys.argv[1]))
for _ in range(int(sys.argv[2])):
    distributed.all_reduce(gradient)
distributed.destroy_process_group()
"""


def count_bytes(folder: Path, processes: int, batch: int) -> None:
    """What a step puts on the wire, in a namespace of its own."""
    if os.environ.get("XGBLORA_NAMESPACE") is None:
        again = ["unshare", "--net", sys.executable, *sys.argv]
        raise SystemExit(subprocess.run(again, env=os.environ | {"XGBLORA_NAMESPACE": "1"}, check=False).returncode)
    subprocess.run(["ip", "link", "set", "lo", "up"], check=True)

    def of(arguments: Any) -> float:
        counts = []
        for steps in (5, 25):
            before = loopback_bytes()
            together(processes, arguments(steps))
            counts.append(loopback_bytes() - before)
        return (counts[1] - counts[0]) / 20

    shared = of(lambda n: command(folder / f"{n}", f"--xgblora --max_steps {n} --per_device_train_batch_size {batch}"))
    size = json.loads((folder / "25" / "metrics.json").read_text(encoding="utf-8"))["trainable_parameters"]
    script = folder / "reduce.py"
    script.write_text(REDUCE, encoding="utf-8")
    reduced = of(lambda n: [str(script), str(size), str(n)])
    print(f"{processes} processes, {batch} examples a step, {size:,} trainable parameters")
    print(f"losses {8 * batch} bytes; on the wire a step, TCP and IP headers included: {shared:,.0f} bytes")
    print(f"an all-reduce of the gradient instead: {reduced:,.0f} bytes ({reduced / shared:,.0f} times as many)")


WAYS = {
    "per example, merges": "--xgblora --xgblora_steps_per_iteration 2 --max_steps 5",
    "shared": "--lora --lora_rank 1 --zo_directions shared --max_steps 5",
    "drawn from activations": "--xgblora --xgblora_init activations --xgblora_init_examples 64 --max_steps 5",
    "backpropagation": "--lora --lora_rank 1 --trainer regular --max_steps 5",
    "recipe boost": "--recipe boost --boost_boosters 2",
}
FILES = ("training_loss.jsonl", "adapter/adapter_model.safetensors", "adapter/ledger.json")


def same_bytes(folder: Path, dtype: str) -> None:
    """Runs of 1, 2 and 4 processes of the real model, file by file."""
    different = 0
    for way, flags in WAYS.items():
        digests = {}
        for processes in (1, 2, 4):
            run = folder / f"{way} {processes}"
            batch = "" if "boost" in way else "--per_device_train_batch_size 32"
            together(processes, command(run, f"{flags} --dtype {dtype} --forward_tokens 256 {batch}"))
            contents = b"".join((run / name).read_bytes() for name in FILES)
            digests[processes] = hashlib.sha256(contents).hexdigest()
        same = len(set(digests.values())) == 1
        different += not same
        print(f"{way}: {'the same bytes' if same else f'OTHER BYTES {digests}'} ({digests[1][:16]})", flush=True)
    raise SystemExit(different)


def contender(place: dict[str, str], half: int | None, batch: int, dtype: str, pipe: Any) -> None:
    """Take a zeroth-order step of a batch whenever told to: one's share of it, or a half of it alone."""
    os.environ.update(place)
    import torch

    import xgblora
    from xgblora.learn.estimators import Key, TwoSided

    torch.set_num_threads(1)
    xgblora.join()
    model, tokenizer = xgblora.load_model("SmolLM2-135M-Instruct", getattr(torch, dtype))
    task = xgblora.get_task("RottenTomatoes")
    rows = xgblora.encode(
        task, xgblora.sample(xgblora.load_splits(task), num_train=batch * STEPS).train, tokenizer, 2048
    )
    adapters, estimate, loss = xgblora.attach(model, 1, 16, xgblora=True), TwoSided(1e-2), xgblora.OptionLoss()
    with adapters.base.without_gradients():
        for step in range(STEPS):
            chosen = rows[step * batch : (step + 1) * batch]
            if half is not None:
                chosen = chosen[half * batch // 2 : (half + 1) * batch // 2]
            examples = adapters.base.batch(chosen)
            pipe.recv()
            begun = time.perf_counter()
            estimate(adapters, loss, examples, Key(0, step))
            pipe.send(time.perf_counter() - begun)


def measure_time(batch: int, dtype: str) -> None:
    """What two processes need for a step, beside what each half of its batch takes alone, on one core each.

    Steps of both pairs alternate, so that drift of the machine hits them alike. Halves run at once, too, and each is
    timed by itself: a shared step has to wait for the slower one.
    """
    context, port = multiprocessing.get_context("spawn"), free_port()
    pipes: dict[str, list[Any]] = {"shared": [], "alone": []}
    for number in range(2):
        place = {"RANK": str(number), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        for name, arguments in (("shared", (place, None)), ("alone", ({}, number))):
            here, there = context.Pipe()
            context.Process(target=contender, args=(*arguments, batch, dtype, there), daemon=True).start()
            pipes[name].append(here)
    ratios: dict[str, list[float]] = {"the mean half": [], "the slower half": []}
    for step in range(STEPS):
        times: dict[str, list[float]] = {}
        for name in ("shared", "alone") if step % 2 else ("alone", "shared"):
            for pipe in pipes[name]:
                pipe.send("go")
            times[name] = [pipe.recv() for pipe in pipes[name]]
        if step >= WARM:
            ratios["the mean half"].append(max(times["shared"]) / statistics.mean(times["alone"]))
            ratios["the slower half"].append(max(times["shared"]) / max(times["alone"]))
        print(f"step {step + 1}: shared {max(times['shared']):.2f} s, halves {times['alone']}", flush=True)
    for name, values in ratios.items():
        low, _, high = statistics.quantiles(values, n=4)
        print(
            f"shared / {name}: {statistics.median(values):.3f} (quartiles {low:.3f} to {high:.3f}, {len(values)} steps)"
        )


def open_tun(address: str) -> int:
    """A network interface of this namespace whose packets this program carries."""
    tun = os.open("/dev/net/tun", os.O_RDWR)
    fcntl.ioctl(tun, TUNSETIFF, struct.pack("16sH22x", b"far0", TUN_WITHOUT_INFO))
    for arguments in (f"addr add {address}/24 dev far0", "link set far0 up", "link set lo up"):
        subprocess.run(["ip", *arguments.split()], check=True)
    return tun


def far_process(number: int, arguments: list[str], channel: Any, log: str) -> None:
    """One process in a namespace of its own, which can reach the other one alone."""
    if ctypes.CDLL(None, use_errno=True).unshare(NEW_NETWORK):
        raise SystemExit("making a network namespace needs root")
    send_handle(channel, open_tun(f"10.77.0.{number + 1}"), os.getppid())
    channel.recv()
    place = {"RANK": str(number), "WORLD_SIZE": "2", "LOCAL_RANK": "0", "OMP_NUM_THREADS": "1"}
    place |= {"MASTER_ADDR": "10.77.0.1", "MASTER_PORT": "29500", "GLOO_SOCKET_IFNAME": "far0"}
    with Path(log).open("w", encoding="utf-8") as file:
        done = subprocess.run(
            [sys.executable, *arguments], env=os.environ | place, stdout=file, stderr=file, check=False
        )
    channel.send(done.returncode)


def carry(tuns: list[int], stopped: threading.Event, carried: dict[str, int]) -> None:
    """Take packets from each interface to the other, half of DELAY later, all but LOSS of them."""
    waiting: list[tuple[float, int, int, bytes]] = []
    draw, count = random.Random(0), 0
    while not stopped.is_set():
        ready, _, _ = select.select(tuns, [], [], 0.001)
        for tun in ready:
            packet = os.read(tun, 65536)
            count += 1
            lost = draw.random() < LOSS
            carried["lost" if lost else "carried"] += 1
            if not lost:
                heapq.heappush(waiting, (time.monotonic() + DELAY / 2, count, tuns[1 - tuns.index(tun)], packet))
        while waiting and waiting[0][0] <= time.monotonic():
            _, _, tun, packet = heapq.heappop(waiting)
            os.write(tun, packet)


def over_network(folder: Path, batch: int) -> None:
    """A run of two processes with a bad network between them leaves the bytes of one process."""
    flags = "--xgblora --xgblora_steps_per_iteration 10 --max_steps 40 --dtype float32 --forward_tokens 256"
    flags += f" --per_device_train_batch_size {batch}"
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, *command(folder / "one", flags)], env=environment, check=True, capture_output=True)
    context = multiprocessing.get_context("fork")
    channels: list[Any] = []
    tuns: list[int] = []
    for number in range(2):
        here, there = context.Pipe()
        arguments = command(folder / "two", flags)
        process = context.Process(target=far_process, args=(number, arguments, there, str(folder / f"{number}.log")))
        process.start()
        tuns.append(recv_handle(here))
        channels.append(here)
    stopped, carried = threading.Event(), {"carried": 0, "lost": 0}
    carrier = threading.Thread(target=carry, args=(tuns, stopped, carried))
    carrier.start()
    begun = time.monotonic()
    for channel in channels:
        channel.send("go")
    codes = [channel.recv() for channel in channels]
    stopped.set()
    carrier.join()
    if any(codes):
        raise SystemExit("".join((folder / f"{number}.log").read_text(encoding="utf-8")[-2000:] for number in range(2)))
    same = True
    for name in FILES:
        one, two = (hashlib.sha256((folder / run / name).read_bytes()).hexdigest() for run in ("one", "two"))
        same &= one == two
        print(f"{name}: {'the same bytes' if one == two else 'OTHER BYTES'} ({two[:16]})")
    print(f"{DELAY * 1000:.0f} ms, {carried['lost']} of {sum(carried.values()):,} packets lost; ", end="")
    print(f"{time.monotonic() - begun:.0f} s in all, {seconds_per_step(folder / 'two'):.2f} s a step, ", end="")
    print(f"one process {seconds_per_step(folder / 'one'):.2f} s")
    raise SystemExit(not same)


def main() -> None:
    """Measure what is asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["bytes", "time", "same", "network"])
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--dtype", default="float32")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if given.what == "bytes":
            count_bytes(folder, given.processes, given.batch)
        elif given.what == "time":
            measure_time(given.batch, given.dtype)
        elif given.what == "same":
            same_bytes(folder, given.dtype)
        else:
            over_network(folder, given.batch)


if __name__ == "__main__":
    main()
