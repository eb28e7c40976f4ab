"""The interface between the loop and a kind of training: a model, batches, a loss, and what to save."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from torch import Tensor, nn

from openm6.checkpoint.reader import CheckpointReader
from openm6.core.errors import ConfigError
from openm6.core.run_folder import RunFolder
from openm6.data.packing import Packer
from openm6.distributed.process_group import ProcessGroupContext
from openm6.energy.tracker import Work
from openm6.models.backbone import Backbone
from openm6.nn.moe import RouterStats


class Batch(Protocol):
    """One step's data; what else it holds is between the training task's `batches` and its `loss`."""

    @property
    def tokens(self) -> int:
        """The number of tokens (or positions) it trains on."""

    @property
    def cursor(self) -> dict[str, Any]:
        """JSON-able state of the data *after* this batch; `TrainingTask.restore` goes on from it."""


@dataclass(frozen=True)
class StepResult:
    """The result of one forward pass; on several ranks, or for parts of a batch, each a term of a sum.

    `metrics` are scalars such as `loss/text`; tensors stay on their device until the loop reads them. `loads` has one
    entry per sparse layer; `work` is what the joules are attributed by. All ranks have the same names in them.
    """

    loss: Tensor
    metrics: dict[str, float | Tensor] = field(default_factory=dict)
    loads: Sequence[RouterStats] = ()
    work: Work = field(default_factory=dict)


class TrainingTask:
    """Base class of every kind of training; `model`, `batches`, `restore` and `loss` must be supplied.

    The loop seeds torch, numpy and random again from (seed, step) before each `loss`, so random numbers there repeat
    exactly. `batches` runs in another process: it must not touch the model or a GPU, and where processes cannot be
    forked it runs in a thread, so it must use generators of its own (`core.seeds`), never the global ones.
    """

    model: nn.Module
    ranks: ProcessGroupContext = ProcessGroupContext()  # the processes that train the same model
    start_weights: CheckpointReader | None = None  # of a model that has not read those of its layers, to be offloaded
    packer: Packer | None = None  # that `batches` comes from; several processes may then make its examples
    stem_elements: int = 0  # that are kept of a patch of an image before the first layer, for the backward pass
    seconds_before: float = 0.0  # of `loop.minutes`, that were spent before the first step
    max_parts: int = 1  # into how many parts, each worth a process, a batch may be split
    # Whether `after_step` acts on nothing but `loads`, and not at all if they are zero, as those of a skipped step.
    after_step_needs_loads_alone: bool = False

    def batches(self) -> Iterator[Batch]:
        """Yield batches without end, from where `restore` set the data."""
        raise NotImplementedError

    def restore(self, cursor: dict[str, Any]) -> None:
        """Go on after the batch that had this cursor; called before `batches`."""
        raise NotImplementedError

    def merge_cursors(self, cursors: list[dict[str, Any]]) -> dict[str, Any]:
        """Return one cursor for all ranks, which any number of ranks can restore."""
        return cursors[0]

    def loss(self, batch: Any) -> StepResult:
        """Run the forward pass of one batch, on the model's device, under the loop's autocast."""
        raise NotImplementedError

    def split(self, batch: Any, parts: int) -> list[Any]:
        """Return the batch in parts, whose results add up to its own; the first keeps the cursor."""
        raise NotImplementedError

    def optional_parameters(self) -> list[nn.Parameter]:
        """Return those that a step may not use on any rank; in a sharded model they then have a gradient of zero."""
        return []

    @property
    def backbone(self) -> Backbone | None:
        """The backbone whose blocks may be offloaded, compiled or computed again, if there is one."""
        return None

    @property
    def tokens_per_step(self) -> int:
        """The maximum number of tokens of a batch; 0 if it is unknown."""
        return 0

    @property
    def stage(self) -> str:
        """`pseudo` while layers of the model share weights, else `real`."""
        return self.backbone.config.stage if self.backbone is not None else "real"

    def delink(self) -> dict[str, str]:
        """Copy the weights so that each layer has its own; return new parameter name -> the name of which it is one."""
        raise ConfigError("this kind of training has no stages: leave loop.stages out")

    def files(self, last: bool = True) -> dict[str, str | bytes]:
        """Return files to put beside the weights in each checkpoint, or in the last one: name -> content."""
        return {}

    def after_step(self, result: StepResult) -> None:
        """Act after an applied update (not after a skipped one): balance biases, averaged weights."""

    def state(self) -> dict[str, Any]:
        """Return what else must survive a restart: a flat mapping of names to tensors or JSON-able values."""
        return {}

    def load_state(self, state: dict[str, Any]) -> None:
        """Restore what `state` returned."""

    def evaluate(self, step: int) -> dict[str, float]:
        """Return scores of the model as it is now, called in evaluation mode without gradients; empty: none."""
        return {}

    def held_out_batches(self, count: int, choosing: bool = False) -> list[Any]:
        """Return batches never trained on, always the same; no test records if `choosing`; else ConfigError."""
        raise ConfigError("this kind of training has no held-out loss: leave loop.held_out out")

    def held_out_loss(self, batches: Sequence[Any]) -> dict[str, float]:
        """Return mean losses over `held_out_batches`, called in evaluation mode without gradients."""
        raise NotImplementedError

    def finish(self, run: RunFolder) -> None:
        """Export, evaluate, report, after the last checkpoint and again if resumed; on all ranks, of which 0 writes."""
