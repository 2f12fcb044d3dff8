"""Several machines on this one: network namespaces, each with a name, an address and processes of its own.

Needs Linux, root and iproute2; `needed` skips a test elsewhere. All are on one bridge and see the same disk, as on a
network disk. A machine can die, its link can be cut or slowed down.
"""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import launch

NAMES = ("host1", "host2")
TAG = f"mini{os.getpid()}"  # what the system calls them begins so: two test runs do not meet


def ip(*words: str) -> str:
    """Run ip(8) with these words and return what it prints."""
    done = subprocess.run(["ip", *words], capture_output=True, text=True)
    assert done.returncode == 0, f"ip {' '.join(words)}: {done.stderr}"
    return done.stdout


def why_not() -> str:
    """What this system lacks for namespaces; "" if nothing."""
    if sys.platform != "linux" or os.geteuid() != 0:
        return "machines as network namespaces need Linux and root"
    if not shutil.which("ip") or not shutil.which("unshare"):
        return "machines as network namespaces need iproute2 and unshare"
    probe = subprocess.run(["ip", "netns", "add", f"{TAG}-probe"], capture_output=True, text=True)
    if probe.returncode:
        return f"no network namespaces here: {probe.stderr.strip()}"
    ip("netns", "del", f"{TAG}-probe")
    return ""


@contextlib.contextmanager
def started() -> Iterator[list["Machine"]]:
    """A context with two machines on one network; in the end nothing is left of them."""
    if reason := why_not():
        pytest.skip(reason)
    machines = [Machine(name, number) for number, name in enumerate(NAMES, 1)]
    try:
        ip("link", "add", TAG, "type", "bridge")
        ip("link", "set", TAG, "up")
        for machine in machines:
            machine.set_up({other.name: other.address for other in machines})
        yield machines
    finally:
        for machine in machines:
            machine.tear_down()
        with contextlib.suppress(AssertionError):
            ip("link", "del", TAG)


class Machine:
    """One namespace, with a link to the bridge."""

    def __init__(self, name: str, number: int):
        self.name = name
        self.address = f"10.77.0.{number}"
        self.namespace = f"{TAG}-{name}"
        self.link = f"{TAG}-{number}"  # its end on the bridge, at most 15 characters; the machine's own is called eth0
        self.hosts_file = Path("/etc/netns") / self.namespace / "hosts"
        self.output: Path | None = None

    def set_up(self, addresses: dict[str, str]) -> None:
        """addresses: of all machines, by name."""
        ip("netns", "add", self.namespace)
        ip("link", "add", self.link, "type", "veth", "peer", "name", "eth0", "netns", self.namespace)
        ip("link", "set", self.link, "master", TAG, "up")
        ip("-n", self.namespace, "addr", "add", f"{self.address}/24", "dev", "eth0")
        for device in ("lo", "eth0"):
            ip("-n", self.namespace, "link", "set", device, "up")
        # names: torchrun tells the others its machine's, and gloo talks from the address that its own has
        self.hosts_file.parent.mkdir(parents=True, exist_ok=True)
        lines = ["127.0.0.1 localhost", *(f"{address} {name}" for name, address in addresses.items())]
        self.hosts_file.write_text("\n".join(lines) + "\n")

    def tear_down(self) -> None:
        """End its processes and remove it, as far as it is there."""
        with contextlib.suppress(AssertionError):
            self.die()
            ip("netns", "del", self.namespace)
        with contextlib.suppress(AssertionError):
            ip("link", "del", self.link)
        shutil.rmtree(self.hosts_file.parent, ignore_errors=True)

    def torchrun(self, words: str, output: Path, machines: str = "2", per_machine: int = 1, **env: str) -> None:
        """Start torchrun here with these words after its own; host1 is where all meet."""
        options = f"--nnodes {machines} --nproc_per_node {per_machine} --rdzv_backend c10d --rdzv_endpoint host1:29500"
        torchrun = f"{sys.executable} -m torch.distributed.run {options} --rdzv_id job"
        command = f"hostname {self.name}; exec {torchrun} {words}"
        self.output = output
        with output.open("a") as stream:
            self.process = subprocess.Popen(
                ["ip", "netns", "exec", self.namespace, "unshare", "--uts", "sh", "-c", command],
                env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(launch.ROOT), **env},
                cwd=output.parent,
                stdout=stream,
                stderr=stream,
            )

    def wait(self, seconds: float = 120) -> int:
        """torchrun's exit status."""
        try:
            return self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"{self.name} did not end within {seconds} s:\n{self.text}") from None

    def wait_for(self, text: str, seconds: float = 120) -> None:
        """Return as soon as `text` has been printed."""
        until = time.monotonic() + seconds
        while text not in self.text:
            assert self.process.poll() is None and time.monotonic() < until, f"{text!r} not printed:\n{self.text}"
            time.sleep(0.05)

    def wait_for_checkpoint(self, run: Path, seconds: float = 120) -> None:
        """Return as soon as a checkpoint lies in the run's folder."""
        until = time.monotonic() + seconds
        while not launch.steps(run):
            assert self.process.poll() is None and time.monotonic() < until, f"no checkpoint:\n{self.text}"
            time.sleep(0.05)

    @property
    def text(self) -> str:
        return self.output.read_text() if self.output and self.output.exists() else ""

    def die(self) -> None:
        """Kill all its processes at once, torchrun's too, as when its power fails."""
        for pid in ip("netns", "pids", self.namespace).split():
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(pid), signal.SIGKILL)

    def cut(self) -> None:
        """Cut its link: what is sent gets lost, and nobody is told."""
        ip("link", "set", self.link, "down")

    def slow_down(self, mbit_s: int) -> None:
        """Let it send no more than so many Mbit/s. Skips the test where the system cannot."""
        queue = f"tc qdisc replace dev eth0 root tbf rate {mbit_s}mbit burst 64kb latency 50ms"
        done = subprocess.run(["ip", "netns", "exec", self.namespace, *queue.split()], capture_output=True, text=True)
        if done.returncode:
            pytest.skip(f"links cannot be slowed down here: {done.stderr.strip()}")
