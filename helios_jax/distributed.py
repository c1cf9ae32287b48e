"""Training in many processes: how they find each other, agree to stop, and end when one of them is lost.

Every process runs the same program on its own devices. A coordinator inside the first process introduces them to each
other and listens for their heartbeats.
"""

from __future__ import annotations

import collections
import contextlib
import importlib.util
import os
import socket
import sys
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from helios_jax.errors import UserError

# A process that was silent for so long is lost, and all others end.
HEARTBEAT_SECONDS = 60
# How long processes wait for each other at the start (containers may start minutes apart) and at the end.
START_SECONDS = 600
END_SECONDS = 60


class ProcessLost(UserError):
    """Another process of the run ended. The runtime cannot go on or even shut down: :func:`leave`."""


def detect_cluster(environment: Mapping[str, str]) -> str | None:
    """The kind of cluster in which this process is one of several: 'tpu', 'slurm', or None for a process of its own.

    Args:
      environment: of the process. Slurm: a step of more than one task. TPU: a worker list of GKE, several slices, or
        the devices of a TPU machine.
    """
    if int(environment.get("SLURM_STEP_NUM_TASKS", "1")) > 1:
        return "slurm"
    workers = environment.get("TPU_WORKER_HOSTNAMES", "")
    several_workers = "," in workers and " " not in workers  # libtpu writes a sentence there where it knows no workers
    several_slices = int(environment.get("MEGASCALE_NUM_SLICES", "1")) > 1
    if several_workers or several_slices:
        return "tpu"
    on_tpu_machine = any(Path("/dev").glob("accel[0-9]*")) or any(Path("/dev/vfio").glob("[0-9]*"))
    return "tpu" if on_tpu_machine and importlib.util.find_spec("libtpu") is not None else None


def initialise(coordinator: str | None = None, num_processes: int | None = None, process_id: int | None = None) -> None:
    """Joins the other processes of the run, if there are any. To be called before anything asks for devices.

    Args:
      coordinator: host:port of the first process; default: ``JAX_COORDINATOR_ADDRESS``.
      num_processes: of the run; default: ``JAX_NUM_PROCESSES``.
      process_id: of this one, from 0; default: ``JAX_PROCESS_ID``.
        Without any of them the cluster tells (Cloud TPU, GKE with TPUs, Slurm); elsewhere the process stays alone.

    Raises:
      UserError: only some of the three are given, or they are wrong; the others did not come.
    """
    environment = os.environ
    coordinator = coordinator or environment.get("JAX_COORDINATOR_ADDRESS") or None
    num_processes = _number("num_processes", num_processes, environment.get("JAX_NUM_PROCESSES"))
    process_id = _number("process_id", process_id, environment.get("JAX_PROCESS_ID"))
    given = {"coordinator": coordinator, "num_processes": num_processes, "process_id": process_id}
    missing = [name for name, value in given.items() if value is None]
    if len(missing) == 3:
        cluster = detect_cluster(environment)
        if cluster is None:
            return
        arguments = {}
    else:
        if missing:
            raise UserError(f"--{missing[0]}: needed besides --"
                            f"{' and --'.join(name for name in given if name not in missing)}")
        if ":" not in coordinator:
            raise UserError(f"--coordinator: host:port expected, got {coordinator!r}")
        if num_processes < 1 or not 0 <= process_id < num_processes:
            raise UserError(f"--process_id: 0 to --num_processes - 1 allowed, got {process_id} of {num_processes}")
        cluster = "given"
        arguments = {"coordinator_address": coordinator, "num_processes": num_processes, "process_id": process_id,
                     "cluster_detection_method": "deactivate"}
    jax.config.update("jax_cpu_collectives_implementation", "gloo")  # without effect on accelerators
    try:
        jax.distributed.initialize(**arguments, initialization_timeout=START_SECONDS,
                                   heartbeat_timeout_seconds=HEARTBEAT_SECONDS, shutdown_timeout_seconds=END_SECONDS)
    except (RuntimeError, ValueError, OSError) as error:
        raise UserError(f"the processes ({cluster}: {coordinator or 'found by the cluster'}) did not come together: "
                        f"{_first_line(error)}") from error


def _number(name: str, value: int | None, text: str | None) -> int | None:
    if value is not None or text is None:
        return value
    try:
        return int(text)
    except ValueError:
        raise UserError(f"JAX_{name.upper()}: a number expected, got {text!r}") from None


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0][:300]


@contextlib.contextmanager
def losses_reported() -> Iterator[None]:
    """Turns the failure of a computation or a save over several processes into :class:`ProcessLost`.

    When a process dies, the collectives of the others fail with whatever error their transport has. Exhausted memory
    is this process' own trouble and is passed on.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        is_runtime = isinstance(error, jax.errors.JaxRuntimeError) and "RESOURCE_EXHAUSTED" not in str(error)
        if jax.process_count() == 1 or not is_runtime:
            raise
        raise ProcessLost(_lost_message("another process", f" ({_first_line(error)})")) from error


def wait_for_all(name: str) -> None:
    """Returns when every process has called it; ``name`` must be new."""
    if jax.process_count() > 1:
        from jax.experimental import multihost_utils

        multihost_utils.sync_global_devices(name)


_LEAVING = threading.Lock()


def leave(message: str) -> None:
    """Prints one line and ends this process at once with code 3; an orderly end would wait for the lost one."""
    _LEAVING.acquire()  # for ever: whoever comes second has nothing to add
    print(f"error: {message}", file=sys.stderr, flush=True)
    os._exit(3)


def _lost_message(who: str, detail: str = "") -> str:
    return (f"process {jax.process_index()} of {jax.process_count()} ends, because {who} of the run was lost; the same "
            f"command resumes from the newest checkpoint{detail}")


@contextlib.contextmanager
def peers_watched() -> Iterator[None]:
    """Within it, the death of any process ends all of them at once with one line.

    The runtime notices a dead process only where it communicates with it, or after ``HEARTBEAT_SECONDS``, and then
    ends with pages of its own. So every process keeps a connection to the first one, which the operating system closes
    when either end dies. Who leaves the context in order says so first. Where the connection cannot be made (a
    firewall), the heartbeats remain.
    """
    if jax.process_count() == 1:
        yield
        return
    connections, ending = _connect(), threading.Event()
    for peer, connection in connections.items():
        threading.Thread(target=_watch, args=(peer, connection, ending), daemon=True).start()
    orderly = False
    try:
        yield
        orderly = True
    finally:  # an error here ends the others, too
        ending.set()
        for connection in connections.values():
            with contextlib.suppress(OSError):
                if orderly:
                    connection.sendall(_GOODBYE)
                else:
                    connection.shutdown(socket.SHUT_RDWR)


_GOODBYE = b"."
_CONNECT_SECONDS = 30


def _connect() -> dict[int, socket.socket]:
    """Process -> connection: the first process has one to each other, the others one to the first."""
    from jax.experimental import multihost_utils

    server = None
    address = np.zeros(256, np.uint8)
    if jax.process_index() == 0:
        server = socket.create_server(("", 0), backlog=jax.process_count())
        server.settimeout(_CONNECT_SECONDS)
        text = f"{_own_address()}:{server.getsockname()[1]}".encode()
        address[: len(text)] = np.frombuffer(text, np.uint8)
    address = np.asarray(multihost_utils.broadcast_one_to_all(address), np.uint8)
    connections: dict[int, socket.socket] = {}
    with contextlib.suppress(OSError, ValueError):  # without a connection the heartbeats remain
        if server is None:
            host, _, port = address.tobytes().rstrip(b"\0").decode().rpartition(":")
            connections[0] = _kept_alive(socket.create_connection((host, int(port)), _CONNECT_SECONDS))
            connections[0].sendall(jax.process_index().to_bytes(4, "big"))
        while server is not None and len(connections) < jax.process_count() - 1:
            connection = _kept_alive(server.accept()[0])
            connections[int.from_bytes(connection.recv(4, socket.MSG_WAITALL), "big")] = connection
    if server is not None:
        server.close()
    return connections


def _own_address() -> str:
    """An address of this machine under which the others reach it."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))  # nothing is sent: the system only chooses the outgoing interface
            return probe.getsockname()[0]
        except OSError:  # no network beyond this machine
            return "localhost"


def _kept_alive(connection: socket.socket) -> socket.socket:
    """A machine that vanishes without a word is noticed after 50 seconds."""
    connection.settimeout(None)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in (("TCP_KEEPIDLE", 20), ("TCP_KEEPINTVL", 10), ("TCP_KEEPCNT", 3)):
        if hasattr(socket, option):
            connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), value)
    return connection


def _watch(peer: int, connection: socket.socket, ending: threading.Event) -> None:
    try:
        said = connection.recv(1)
    except OSError:
        said = b""
    # A mistake that all processes find is reported by each: its own words come first.
    if said != _GOODBYE and not ending.wait(1.0):
        leave(_lost_message(f"process {peer}"))


class StopVote:
    """Whether the processes stop before the next step. All must ask at the same steps and get the same answer.

    A signal reaches processes at different times and steps. Their wishes are therefore combined on the devices, and
    the answer is read one step later, when it costs no waiting.

    Args:
      mesh: over all devices.
    """

    def __init__(self, mesh: Mesh):
        self._pending: collections.deque[jax.Array] = collections.deque()
        self._sharding = NamedSharding(mesh, PartitionSpec(mesh.axis_names))
        self._any = jax.jit(lambda wishes: wishes.any(), out_shardings=NamedSharding(mesh, PartitionSpec()))

    def __call__(self, wish: bool) -> bool:
        if jax.process_count() == 1:
            return wish
        wishes = jax.make_array_from_callback((self._sharding.mesh.size,), self._sharding,
                                              lambda index: np.full(1, wish))
        self._pending.append(self._any(wishes))
        return len(self._pending) > 1 and bool(self._pending.popleft())
