"""Several processes, one a GPU: how a stage starts them, and how they work as one.

This machine's accelerate configuration (`accelerate config` writes it) says how many; without one a stage is one
process. Every process loads the whole model. Training divides each batch's rows among them and averages the
gradients; generation divides its chunks. The first process alone writes what the stage makes. Processes on several hosts
need the repository's folder on a file system that all of them see, and each host's stage started there.
"""

import ctypes
import os
import signal
import sys
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from looper.params import Model
from looper.stage import leave

if TYPE_CHECKING:
    from torch import Tensor
    from torch.utils.data import DataLoader

# How long a process waits for the others: the slowest may be a chunk of answers behind. A process that dies ends the
# wait, because the launcher then stops all.
PATIENCE = timedelta(days=1)
PR_SET_PDEATHSIG = 1  # of Linux's prctl: the signal that a process gets when its parent ends


# ---- starting and ending ----


def start_processes(model: Model) -> None:
    """Called by a stage once its params are checked. A process that a launcher started joins the others; where the
    accelerate configuration asks for several, the stage is started as so many, and this process ends with them.

    model: a configuration for GPUs does not count for model.device cpu, nor one with use_cpu for cuda.
    Raises ValueError for a configuration that cannot be read, or that asks for more processes than the host has GPUs.
    """
    if "LOCAL_RANK" in os.environ:
        _join(model)
        return
    configuration = _configuration()
    if bool(configuration.get("use_cpu")) == (model.device == "cpu") and configuration.get("num_processes", 1) > 1:
        sys.exit(_launch(one_host=configuration.get("num_machines", 1) == 1))


def configuration_file() -> Path:
    """Where accelerate keeps this machine's configuration."""
    cache = os.environ.get("HF_HOME", os.path.join(os.environ.get("XDG_CACHE_HOME", "~/.cache"), "huggingface"))
    return Path(cache).expanduser() / "accelerate" / "default_config.yaml"


def _configuration() -> dict[str, Any]:
    """This machine's accelerate configuration; empty where there is none."""
    path = configuration_file()
    if not path.is_file():
        return {}
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ValueError(f"{path}: not YAML; write it anew: accelerate config; {error}") from None
    if not isinstance(content, dict) or not isinstance(content.get("num_processes", 1), int):
        raise ValueError(f"{path}: num_processes is not a number there; write the file anew: accelerate config")
    return content


def _launch(one_host: bool) -> int:
    """Runs this stage as `accelerate launch` does; returns the exit status of the first process that failed, or 0."""
    import logging

    from accelerate.commands.launch import launch_command, launch_command_parser
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    name = Path(sys.argv[0]).stem
    port = ["--main_process_port", "0"] if one_host else []  # any that is free
    # --multi_gpu: plain processes, whatever else the configuration says (FSDP would compute something else)
    arguments = ["--multi_gpu", *port, "--module", f"stages.{name}", *sys.argv[1:]]
    logging.disable()  # of the launcher: the process that failed has said why
    try:
        launch_command(launch_command_parser().parse_args(arguments))
    except ChildFailedError as error:
        if any(failure.exitcode == 2 for failure in error.failures.values()):
            return 2  # it has said why; others may have failed because it was gone
        number, failure = error.get_first_failure()
        if failure.exitcode > 0:
            return failure.exitcode
        print(f"{name}: process {number} was ended by signal {-failure.exitcode}; run the stage again: it goes on where "
              "it was", file=sys.stderr)
        return 128 - failure.exitcode
    return 0


def _join(model: Model) -> None:
    if sys.platform == "linux":  # else the processes of a launcher that was killed outright would write on, unseen
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.environ["RANK"] != "0":
        os.environ["TQDM_DISABLE"] = "1"  # before anything imports tqdm
        sys.stdout = open(os.devnull, "w")  # what a stage prints, the first process prints
    for name in [name for name in os.environ if name.startswith("ACCELERATE_")]:
        del os.environ[name]  # mixed precision and the like: what is computed is for params.yaml to say
    import torch

    backend, local = "gloo", int(os.environ["LOCAL_RANK"])
    if model.device == "cuda" and torch.cuda.is_available():
        if local >= torch.cuda.device_count():
            raise ValueError("the launcher started more processes than this host has GPUs "
                             f"({torch.cuda.device_count()}); lower num_processes: accelerate config")
        torch.cuda.set_device(local)
        backend = "cpu:gloo,cuda:nccl"  # gloo where the host waits: NCCL would keep the GPU busy with waiting
    torch.distributed.init_process_group(backend, timeout=PATIENCE)


def first_process_only() -> None:
    """All processes but the first end here; the first goes on alone."""
    if group := _group():
        group.destroy_process_group()
    if os.environ.get("RANK", "0") != "0":
        leave()


# ---- working as one: in a process that is alone, none of these costs or changes anything ----


def _group() -> Any:
    """torch.distributed, where this process has joined others."""
    torch = sys.modules.get("torch")
    joined = torch is not None and torch.distributed.is_available() and torch.distributed.is_initialized()
    return torch.distributed if joined else None


def rank() -> int:
    """This process's number, from 0."""
    group = _group()
    return group.get_rank() if group else 0


def world() -> int:
    """How many processes work together."""
    group = _group()
    return group.get_world_size() if group else 1


def share(items: Sequence) -> Sequence:
    """This process's part of `items`: every world-th. It may be empty."""
    return items[rank()::world()]


def dealt(items: Sequence, size: Callable[[Any], int]) -> list[Sequence]:
    """Every process's part of `items`: dealt by falling size, there and back, so that each has about as much to do as the
    others, who wait for it. A part may be empty; alone, a process has all in their order."""
    if world() == 1:
        return [items]
    order = sorted(items, key=size, reverse=True)
    return [[item for i, item in enumerate(order) if i % (2 * world()) in (number, 2 * world() - 1 - number)]
            for number in range(world())]


def total(values: "Tensor") -> "Tensor":
    """The sum of all processes' `values`, which have the same shape, in place; the same bits in each of them."""
    if group := _group():
        group.all_reduce(values)
    return values


def gathered(value: Any) -> list[Any]:
    """All processes' values, in the processes' order; pickle must take them."""
    values = [value] * world()
    if group := _group():
        group.all_gather_object(values, value)
    return values


def agreed(value: Any) -> Any:
    """The first process's value."""
    values = [value]
    if group := _group():
        group.broadcast_object_list(values)
    return values[0]


def barrier() -> None:
    """Returns when every process has come here."""
    gathered(None)


class AveragesGradients:
    """Of a Trainer in several processes, before its own class: gradients are averaged once an update, all of them in one.

    DistributedDataParallel, which accelerate wraps around the model, averages in hooks of the parameters while autograd
    goes back; a pass that is launched as a graph (looper.graphs) calls none of them. The Trainer clips in every update, as
    max_grad_norm is never 0 here.
    """

    def training_step(self, *given: Any, **named: Any) -> "Tensor":
        with self.accelerator.no_sync(self.model_wrapped):
            return super().training_step(*given, **named)

    def _clip_grad_norm(self, model: Any) -> "Tensor":
        trained = [each for group in self.optimizer.param_groups for each in group["params"]]
        average([each.grad for each in trained if each.grad is not None])
        return super()._clip_grad_norm(model)


def average(gradients: Sequence["Tensor"]) -> None:
    """Makes each of `gradients`, which have the same shapes in all processes, its mean over these, in place."""
    if world() == 1 or not gradients:
        return
    import torch

    means = total(torch.cat([each.flatten() for each in gradients])).div_(world())
    parts = means.split([each.numel() for each in gradients])
    torch._foreach_copy_(gradients, [mean.view_as(each) for each, mean in zip(gradients, parts, strict=True)])


def undivided(loader: "DataLoader") -> "DataLoader":
    """A Trainer's data loader, from which every process draws every batch.

    accelerate would give each process whole batches of its own, and the first rows again where they do not come out
    even. A trainer of ours takes its part of each batch instead (see `dealt`): the same batches, whatever the number of
    processes.
    """
    if world() > 1:
        divider = loader.batch_sampler  # accelerate's BatchSamplerShard: for one process it divides nothing
        divider.num_processes, divider.process_index, divider.even_batches = 1, 0, False
        loader._drop_last = True  # so that what is logged counts every process, at an epoch's last, smaller update too
    return loader
