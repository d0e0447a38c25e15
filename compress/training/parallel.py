"""One training in several processes: ``torchrun --nproc_per_node 2 -m compress train ...`` or ``accelerate launch``.

Every process has the whole network and computes its share of each batch; DistributedDataParallel averages the
gradients. A batch is decided by its step and has the same crops for any number of processes, and batch norm takes the
statistics of the whole batch, as terms that compare crops with each other take those of the whole batch. So a training
gives what it gives in one process, up to the rounding of sums, which a network at the start of its training makes
larger from step to step.

The processes are set up by Hugging Face Accelerate. It reads what ``torchrun`` leaves in the environment as it reads
what its own ``accelerate launch`` leaves, and takes networks and loops as they are. Lightning Fabric does the same, but
wants to own the optimizer and the loader, and brings a web client beside it.
"""

import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor, nn

from compress.errors import MachineError, SettingError

LONGEST_WAIT = timedelta(days=30)  # for the first process, which decodes all audio; the default is 10 to 30 minutes


class Processes:
    """The processes of a training; this class is one alone.

    Attributes:
        rank: Number of this process.
        count: How many there are.
    """

    rank: int = 0
    count: int = 1

    @property
    def writes(self) -> bool:
        """Whether this one writes files and tells what happens; only the first does."""
        return self.rank == 0

    def check(self, batch_size: int, accumulation: int) -> None:
        """Refuse a batch that cannot be shared out.

        Raises:
            SettingError: Naming the sizes.
        """
        if batch_size % (self.count * accumulation):
            raise SettingError(
                f"recipe: a batch of {batch_size} cannot be cut into equal parts for {self.count} processes with"
                f" accumulation {accumulation}. Make batch_size a multiple of {self.count * accumulation}."
            )

    def common(self, model: nn.Module) -> nn.Module:
        """Give a network whose batch norms take the statistics of all processes; parameters are the same ones."""
        return model

    def wrapped(self, module: nn.Module) -> nn.Module:
        """Give a module whose gradients are averaged over the processes; its forward must use all parameters."""
        return module

    def alone(self, module: nn.Module) -> AbstractContextManager[Any]:
        """While it is open, gradients of a wrapped module are added up here and not averaged."""
        return nullcontext()

    def mean(self, values: Tensor) -> Tensor:
        """The mean over the processes."""
        return values

    def gathered(self, values: Tensor) -> Tensor:
        """The values of each process, (processes, ...), through which gradients flow back to all."""
        return values[None]

    def one_has(self, happened: bool) -> bool:
        """Whether it happened to one process at least; all ask at the same place."""
        return happened

    @contextmanager
    def first_alone(self) -> Iterator[None]:
        """Let the first process do something before the others do, who then find it done."""
        yield


ALONE = Processes()


class Group(Processes):
    """Several processes.

    Args:
        device: ``cpu`` or ``cuda``; each process takes a GPU of its own.

    Raises:
        MachineError: If accelerate is not installed.
    """

    def __init__(self, device: str) -> None:
        try:
            from accelerate import Accelerator, InitProcessGroupKwargs
        except ImportError:
            raise MachineError(
                "several processes need accelerate, and it is not installed. pip install speech-compress[parallel]"
            ) from None
        waiting = InitProcessGroupKwargs(timeout=LONGEST_WAIT)
        self.accelerator = Accelerator(cpu=device == "cpu", kwargs_handlers=[waiting])
        self.rank, self.count = self.accelerator.process_index, self.accelerator.num_processes

    def common(self, model: nn.Module) -> nn.Module:
        """Give a network whose batch norms take the statistics of all processes; parameters are the same ones."""
        if self.accelerator.device.type == "cuda":
            converted: nn.Module = nn.SyncBatchNorm.convert_sync_batchnorm(model)  # type: ignore[no-untyped-call]
            return converted
        for name, module in list(model.named_modules()):
            if type(module) in (nn.BatchNorm1d, nn.BatchNorm2d):
                model.set_submodule(name, CommonBatchNorm(module, self))
        return model

    def wrapped(self, module: nn.Module) -> nn.Module:
        """Give a module whose gradients are averaged over the processes."""
        found: nn.Module = self.accelerator.prepare_model(module)
        return found

    def alone(self, module: nn.Module) -> AbstractContextManager[Any]:
        """While it is open, gradients of a wrapped module are added up here and not averaged."""
        found: AbstractContextManager[Any] = self.accelerator.no_sync(module)
        return found

    def mean(self, values: Tensor) -> Tensor:
        """The mean over the processes."""
        found: Tensor = self.accelerator.reduce(values, "mean")
        return found

    def gathered(self, values: Tensor) -> Tensor:
        """The values of each process, (processes, ...), through which gradients flow back to all."""
        mine = torch.zeros(self.count, dtype=values.dtype, device=values.device)
        mine[self.rank] = 1.0
        found: Tensor = Sum.apply(mine.view(-1, *[1] * values.dim()) * values)  # type: ignore[no-untyped-call]
        return found

    def one_has(self, happened: bool) -> bool:
        """Whether it happened to one process at least; all ask at the same place."""
        counted: Tensor = self.accelerator.reduce(torch.tensor(float(happened), device=self.accelerator.device), "sum")
        return counted.item() > 0

    @contextmanager
    def first_alone(self) -> Iterator[None]:
        """Let the first process do something before the others do, who then find it done."""
        with self.accelerator.main_process_first():
            yield


class CommonBatchNorm(nn.modules.batchnorm._BatchNorm):
    """Batch norm over the crops of all processes, which all have as many; PyTorch's own is for GPUs alone.

    Args:
        norm: Whose parameters and running statistics it takes over.
        processes: That take part.
    """

    def __init__(self, norm: nn.BatchNorm1d | nn.BatchNorm2d, processes: Processes) -> None:
        super().__init__(norm.num_features, norm.eps, norm.momentum, norm.affine, norm.track_running_stats)
        self.weight, self.bias = norm.weight, norm.bias
        self.running_mean, self.running_var = norm.running_mean, norm.running_var
        self.num_batches_tracked = norm.num_batches_tracked
        self.processes = processes
        self.train(norm.training)

    def _check_input_dim(self, input: Tensor) -> None:
        """Take any number of dimensions."""

    def forward(self, input: Tensor) -> Tensor:
        """Normalise (batch, channels, ...), and move the running statistics towards the batch's."""
        if not self.training or self.momentum is None or not self.track_running_stats:
            return super().forward(input)
        x = input.double() if input.dtype == torch.float64 else input.float()
        others = [axis for axis in range(x.dim()) if axis != 1]
        variance, mean = torch.var_mean(x, others, correction=0)
        means, variances = self.processes.gathered(torch.stack([mean, variance])).unbind(1)
        mean = means.mean(0)
        variance = variances.mean(0) + (means - mean).square().mean(0)
        count = self.processes.count * x.numel() // x.shape[1]
        with torch.no_grad():
            assert self.running_mean is not None
            assert self.running_var is not None
            assert self.num_batches_tracked is not None
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(variance * (count / (count - 1)), self.momentum)
            self.num_batches_tracked += 1
        shape = [-1 if axis == 1 else 1 for axis in range(x.dim())]
        scale = torch.rsqrt(variance + self.eps) * (self.weight if self.affine else 1.0)
        shift = (self.bias if self.affine else 0.0) - mean * scale
        return (x * scale.view(shape) + shift.view(shape)).to(input.dtype)


class Sum(torch.autograd.Function):
    """The sum over the processes, whose gradient is the sum of theirs."""

    @staticmethod
    def forward(ctx: Any, values: Tensor) -> Tensor:
        """Add up."""
        total = values.clone(memory_format=torch.contiguous_format)
        torch.distributed.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        """Add up, too: every process's loss depends on the sum."""
        return Sum.forward(ctx, gradients[0])


def join_processes(device: str) -> Processes:
    """Find out from the environment which of how many processes this one is.

    Raises:
        MachineError: If there are several and accelerate is not installed.
    """
    return Group(device) if int(os.environ.get("WORLD_SIZE", "1")) > 1 else ALONE
