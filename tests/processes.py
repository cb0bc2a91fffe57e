"""Run functions in fresh processes that have already imported everything: crashes, exit codes, several ranks."""

import multiprocessing
import os
import socket
from collections.abc import Callable
from typing import Any

PRELOAD = ["lightning_itk", "lightning_itk.toy.world", "tiny"]
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(PRELOAD)


def enter(function: Callable[..., None], args: tuple[Any, ...], env: dict[str, str]) -> None:
    """Call a function in a process of CONTEXT, with these environment variables and one thread."""
    import torch

    os.environ.update(env)
    torch.set_num_threads(1)
    function(*args)


def run(function: Callable[..., None], *args: Any, timeout: float = 300, **env: str) -> int:
    """Exit code of a function in a process of its own; -9 when it was killed."""
    return _join([CONTEXT.Process(target=enter, args=(function, args, env))], timeout)[0]


def environments(ranks: int) -> list[dict[str, str]]:
    """What torchrun tells each rank of a new process group by environment variables; nothing where there is one."""
    if ranks == 1:
        return [{}]
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    common = {"WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks), "GROUP_RANK": "0", "TORCHELASTIC_RUN_ID": "t"}
    common |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    return [{**common, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(ranks)]


def run_ranks(function: Callable[..., None], *args: Any, ranks: int = 2, timeout: float = 300) -> None:
    """Run a function on several ranks of one process group, as torchrun would start them."""
    processes = [CONTEXT.Process(target=enter, args=(function, args, env)) for env in environments(ranks)]
    codes = _join(processes, timeout)
    assert codes == [0] * ranks, f"exit codes {codes}; the output above says why"


def _join(processes: list[Any], timeout: float) -> list[int]:
    for process in processes:
        process.start()
    for process in processes:
        process.join(timeout)
    for process in processes:
        if process.is_alive():
            process.kill()
            process.join()
    return [process.exitcode for process in processes]
