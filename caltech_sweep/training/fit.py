"""The training loop, an epoch at a time; who runs it reports, prunes and logs."""

from __future__ import annotations

import contextlib
import math
import time
import weakref
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from caltech_sweep import metrics
from caltech_sweep.config import TrialConfig
from caltech_sweep.data.images import LoadedData
from caltech_sweep.data.splits import SPLITS
from caltech_sweep.errors import DatasetError, DivergedError, NotFiniteError
from caltech_sweep.heartbeat import beat
from caltech_sweep.seeds import derive_seed
from caltech_sweep.training import augment
from caltech_sweep.training.cache import Cache
from caltech_sweep.training.device import numerics, uses_bfloat16, uses_channels_last, uses_graphs
from caltech_sweep.training.evaluate import Evaluation, evaluate
from caltech_sweep.training.features import FrozenFeatures, agrees, split_model
from caltech_sweep.training.graph import ReplayedPasses
from caltech_sweep.training.keys import may_train_together
from caltech_sweep.training.loss import class_weights, epoch_order, loss_share, mixed
from caltech_sweep.training.models import frozen_parameters, thaw, train_mode
from caltech_sweep.training.networks import mean_and_std, normalization, source_of
from caltech_sweep.training.optimizer import make_optimizer, parameter_groups, set_rate
from caltech_sweep.training.resident import resident_crops
from caltech_sweep.training.schedule import epoch_rates
from caltech_sweep.training.stopping import last_epoch

_CHECK_EVERY = 16  # steps between looks at the losses
_VAL_BATCH = 64  # at most; not test_batch_size, so that trials that differ only in their test share their training


@dataclass(frozen=True)
class EpochResult:
    """One finished epoch (1 is the first); accuracies are fractions, losses means over images."""

    epoch: int
    lr: float  # of its first step
    train_loss: float
    train_accuracy: float
    val: Evaluation
    seconds: float
    images: int  # trained in this epoch
    reused: bool = False  # trained by an earlier trial, or before this one was interrupted
    saving: int = 0  # of how many epochs, this one and those before, the states are still being saved

    def metrics(self) -> dict[str, float]:
        """Return the metrics of this epoch by their names in MLflow."""
        return {
            metrics.TRAIN_LOSS: self.train_loss,
            metrics.TRAIN_ACCURACY: self.train_accuracy,
            **metrics.all_logged("val", self.val.scores),
            metrics.LEARNING_RATE: self.lr,
            metrics.EPOCH_SECONDS: self.seconds,
            metrics.SPEED: self.images / self.seconds,
        }


@dataclass(frozen=True)
class EpochTrained:
    """What the steps of an epoch came to: the mean loss and the accuracy over the images that were trained."""

    loss: float
    accuracy: float
    images: int
    seconds: float


class EpochSteps:
    """The steps of one epoch: which images each trains at which rate, and what has come of them.

    Losses stay on the device and are looked at every few steps, since reading one waits for the GPU.
    """

    def __init__(
        self, epoch: int, batches: tuple[torch.Tensor, ...], rates: Sequence[float], draws: augment.Draws | None
    ) -> None:
        self.epoch, self.batches, self.rates, self.draws = epoch, batches, rates, draws
        self._start = time.perf_counter()
        self._sums: list[list[float]] = []
        self._fresh: list[torch.Tensor] = []

    def add(self, found: torch.Tensor) -> None:
        """Take (mean loss, correct predictions) of the next step; raise DivergedError for the first infinite loss."""
        self._fresh.append(found)
        number = len(self._sums) + len(self._fresh)
        if number % _CHECK_EVERY and number < len(self.batches):
            return
        for loss, correct in torch.stack(self._fresh).tolist():
            self._sums.append([loss * len(self.batches[len(self._sums)]), correct])
            if not math.isfinite(loss):
                raise DivergedError(self.epoch, len(self._sums), loss)
        self._fresh.clear()

    def result(self) -> EpochTrained:
        """Return what all of the steps came to."""
        images = sum(map(len, self.batches))
        loss, correct = (math.fsum(column) / images for column in zip(*self._sums, strict=True))
        return EpochTrained(loss, correct, images, time.perf_counter() - self._start)


def steps_of(config: TrialConfig, images: int) -> int:
    """Return how many batches an epoch over so many images trains."""
    return images // config.batch_size if config.drop_last else -(-images // config.batch_size)


@dataclass(frozen=True)
class Head:
    """All that a training changes, where that is one linear layer, and what its loss is made with.

    Two of the same ``kind``, of trainings with the same images, train the same number of images in each step.
    """

    before: nn.Sequential  # what its inputs pass through, which is not trained
    linear: nn.Linear
    class_weights: torch.Tensor | None
    label_smoothing: float
    kind: Hashable


@dataclass
class Training:
    """A model in training: everything that the next epoch needs, and the best-on-val weights so far.

    ``store`` keeps the outputs of frozen layers; without it they are computed each time, with the same result.
    """

    config: TrialConfig
    data: LoadedData
    model: nn.Module
    device: torch.device
    store: Cache | None = None
    epoch: int = 0
    history: list[EpochResult] = field(default_factory=list)
    best: EpochResult | None = None
    best_weights: dict[str, torch.Tensor] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()  # sentences for the user
    average: dict[str, torch.Tensor] = field(default_factory=dict)  # of the weights over the steps, where it is kept
    thawed: bool = False  # whether layers that were frozen at first are trained by now
    ahead: EpochTrained | Exception | None = None  # what the next epoch came to, which was trained with those of others
    together: int = 1  # of how many trainings, at most, the steps were one product

    def __post_init__(self) -> None:
        config = self.config
        self._bfloat16 = uses_bfloat16(config, self.device)
        last = uses_channels_last(config, self.device)
        self._format = torch.channels_last if last else torch.contiguous_format
        self.model = self.model.to(self.device)
        for parameter in self.model.parameters():
            if parameter.dim() == 4:
                parameter.data = parameter.data.contiguous(memory_format=self._format)
        self.optimizer = make_optimizer(config, self.model)
        mean, std = mean_and_std(normalization(config))
        self._mean = torch.tensor(mean, device=self.device).view(1, 3, 1, 1)
        self._std = torch.tensor(std, device=self.device).view(1, 3, 1, 1)
        self._labels = self.data.labels("train")
        self._outputs = config.outputs or len(self.data.split.classes)
        weights = class_weights(config, self._labels, self._outputs)
        self._weights = None if weights is None else weights.to(self.device)
        if config.drop_last and len(self._labels) < config.batch_size:
            raise DatasetError(
                f"batch_size: {config.batch_size} is more than the {len(self._labels)} training images and drop_last "
                "is set, so no step would be trained; lower batch_size or set drop_last to false"
            )
        self._features = self._frozen_features()
        self._replayed = self._to_replay()

    def _to_replay(self) -> ReplayedPasses | None:
        """Return what replays the passes of a step, as long as these train the same layers; None where nothing does."""
        if not uses_graphs(self.config, self.device):
            return None
        return ReplayedPasses(self.model.parameters(), self.config.batch_size)

    def thaw(self) -> None:
        """Train the frozen layers, too, from the next epoch on."""
        if not self.thawed:
            for group in parameter_groups(self.config, self.model, thaw(self.model, self.config)):
                self.optimizer.add_param_group(group)
            self.keep_best(self.best_weights)
            self.thawed = True
            self._replayed = self._to_replay()

    def keep_best(self, state: Mapping[str, torch.Tensor]) -> None:
        """Keep weights by value; those of frozen layers, which do not change, are the network's own."""
        frozen = frozen_parameters(self.model)
        self.best_weights = {k: v.detach() if k in frozen else v.detach().clone() for k, v in state.items()}

    def _frozen_features(self) -> FrozenFeatures | None:
        """Return the frozen layers apart, where the images that they see are the same in every epoch."""
        config = self.config
        if config.freeze == "none" or not augment.all_fixed(config):
            return None
        train_mode(self.model, config)
        split = split_model(self.model, source_of(config.arch).tail(self.model))
        if split is None:
            return None
        if not agrees(self.model, split, self._images("train", torch.arange(1))):
            self.warnings = (
                f"{config.arch} computes more between its backbone and its classifier, so the outputs of its frozen "
                "layers cannot be kept: they are computed in every epoch",
            )
            return None
        known = {
            **numerics(config, self.device),
            "data": self.data.fingerprint,
            "crop": config.dataset.crop,
            "normalize": normalization(config),
            **source_of(config.arch).version(config.arch),
        }
        counts = {part: len(self.data.split.part(part)) for part in SPLITS}
        me = weakref.proxy(self)  # what keeps a training in a circle keeps its memory after its end
        images, autocast = (lambda *asked: me._images(*asked)), (lambda: me.autocast())
        return FrozenFeatures(split, images, counts, autocast, self.store, known)

    def _images(self, part: str, index: torch.Tensor, draws: augment.Draws | None = None) -> torch.Tensor:
        """Return normalised (n, 3, H, W) float crops on the device, augmented as ``draws`` says."""
        cuts = augment.cuts(draws) if draws is not None else None
        if cuts is None:
            return self._floats(self._crops(part, index), draws)
        return self._floats(self.data.resized_crops(part, self.config.dataset.crop, index.tolist(), cuts), draws)

    def _crops(self, part: str, index: torch.Tensor) -> torch.Tensor:
        """Return (n, 3, H, W) uint8 crops, out of the shared cache or, where they fit, of the GPU's memory."""
        crop = self.config.dataset.crop
        kept = resident_crops(self.data, part, crop, self.device)
        if kept is not None:
            return kept[index.to(self.device, non_blocking=True)]
        return self.data.center_crops(part, crop, index.tolist(), pinned=self.device.type == "cuda")

    def _floats(self, images: torch.Tensor, draws: augment.Draws | None = None) -> torch.Tensor:
        """Map (N, 3, H, W) uint8 to normalised float images on the device."""
        floats = images.to(self.device, non_blocking=True).float().div_(255)
        if draws is not None:
            floats = augment.apply(floats, draws)
        return floats.sub_(self._mean).div_(self._std).contiguous(memory_format=self._format)

    def _inputs(self, part: str, index: torch.Tensor, draws: augment.Draws | None = None) -> torch.Tensor:
        """Return what :meth:`_network` takes: images, or what the frozen layers made of them."""
        if self._features is not None and not self.thawed:
            return self._features.rows(part, index, draws)
        return self._images(part, index, draws)

    @property
    def _network(self) -> nn.Module:
        """The layers after the frozen ones, where these are apart; the whole model elsewhere."""
        return self._features.tail if self._features is not None and not self.thawed else self.model

    def evaluate(self, part: str, views: str = "center") -> Evaluation:
        """Evaluate the current weights on "val" or "test", by centre crops or TenCrop views."""
        config, ten = self.config, views == "tencrop"
        network, crop = self.model if ten else self._network, config.dataset.crop
        size = min(_VAL_BATCH, config.batch_size) if part == "val" else config.test_batch_size
        if self.device.type == "cpu":  # more take no less time, and memory that the training had no need for
            size = min(_VAL_BATCH, size)

        def inputs(index: torch.Tensor) -> torch.Tensor:
            if not ten:
                return self._inputs(part, index).unsqueeze(1)
            crops = torch.cat([self.data.ten_crops(part, i, crop) for i in index.tolist()])
            return self._floats(crops).unflatten(0, (len(index), -1))

        def forward(batch: torch.Tensor) -> torch.Tensor:
            with self.autocast():
                return network(batch)

        try:
            # Around all batches, so that the weights are cast once and not in each: what is cast is kept to the end.
            with torch.autocast(self.device.type, enabled=False):
                batch_size = max(1, size // 10) if ten else size
                return evaluate(self.model, self.data.labels(part), batch_size, inputs, forward)
        except NotFiniteError as error:
            raise NotFiniteError(f"{part} images: {error}") from error

    def _batches(self, epoch: int) -> tuple[torch.Tensor, ...]:
        return epoch_order(self.config, self._labels, epoch).split(self.config.batch_size)[: self.steps]

    @property
    def steps(self) -> int:
        """How many batches an epoch trains."""
        return steps_of(self.config, len(self._labels))

    def _seed(self, seed: int) -> None:
        """Seed what a network draws from; torch.manual_seed formats a traceback for each kind of GPU that is idle."""
        if self.device.type == "cpu":
            torch.default_generator.manual_seed(seed)
        else:
            torch.manual_seed(seed)

    def autocast(self) -> contextlib.AbstractContextManager[object]:
        """Return the precision that the network runs in."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self._bfloat16)

    @cached_property
    def head(self) -> Head | None:
        """All that is trained, where that is one linear layer at the end of the network."""
        if self._features is None or not may_train_together(self.config) or not len(self._features.tail):
            return None
        *before, last = self._features.tail
        trains = [p for layer in before for p in layer.parameters() if p.requires_grad]
        if type(last) is not nn.Linear or trains or not all(p.requires_grad for p in last.parameters()):
            return None
        kind = (
            *(self.device, self._bfloat16, last.weight.shape, last.bias is None),
            *(self.config.batch_size, self.steps, len(self._labels)),
            *(self.config.class_weights, self.config.label_smoothing),
        )
        return Head(nn.Sequential(*before), last, self._weights, self.config.label_smoothing, kind)

    def begin_epoch(self) -> EpochSteps:
        """Return the steps of the next epoch, with the model ready to train them."""
        epoch = self.epoch + 1
        draws = augment.draw(self.config, epoch, len(self._labels)) if self.config.augment else None
        train_mode(self.model, self.config)
        batches = self._batches(epoch)
        return EpochSteps(epoch, batches, epoch_rates(self.config, epoch, len(batches)), draws)

    def step_inputs(self, steps: EpochSteps, number: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return what step ``number``, from 1 on, trains and its labels (n,), with what a network draws from seeded."""
        beat()
        self._seed(derive_seed(self.config.seed, "dropout", steps.epoch, number))
        index = steps.batches[number - 1]
        # An image that is drawn twice is augmented in two ways: its place in the epoch counts, not its number.
        start = (number - 1) * self.config.batch_size
        places = index if self.config.sample_weights == "none" else torch.arange(start, start + len(index))
        inputs = self._inputs("train", index, steps.draws[places] if steps.draws else None)
        return inputs, self._labels[index].to(self.device, non_blocking=True)

    def end_step(self, steps: EpochSteps, number: int) -> None:
        """Change the weights by their gradients, at the rate of step ``number``."""
        if self.config.clip_grad_norm is not None:
            nn.utils.clip_grad_norm_(self.model.parameters(), self.config.clip_grad_norm)
        set_rate(self.optimizer, steps.rates[min(number, len(steps.rates)) - 1])
        self.optimizer.step()
        self._update_average()

    def _step(self, steps: EpochSteps, number: int) -> torch.Tensor:
        """Train one batch; return (mean loss, correct predictions) as a tensor of two on the device."""
        inputs, labels = self.step_inputs(steps, number)
        targets = labels
        if augment.mixes(self.config):
            inputs, targets = mixed(self.config, steps.epoch, number, inputs, labels, self._outputs)
        self.optimizer.zero_grad(set_to_none=True)
        if self._replayed is None:
            found = self._all_parts(inputs, labels, targets)
        else:
            found = self._replayed(self._all_parts, inputs, labels, targets)
        self.end_step(steps, number)
        return found

    @torch.no_grad()
    def _update_average(self) -> None:
        """Add the weights after a step, and the statistics of its layers, to their moving average."""
        decay = self.config.ema_decay
        if decay is None:
            return
        frozen = frozen_parameters(self.model)
        state = self.model.state_dict()
        own = {name: v for name, v in state.items() if v.is_floating_point() and name not in frozen}
        if not self.average:
            self.average = {name: value.clone() for name, value in own.items()}
            return
        get_ema_multi_avg_fn(decay)(list(self.average.values()), [own[name] for name in self.average], 1)

    @contextlib.contextmanager
    def _averaged(self) -> Iterator[None]:
        """Let the model have its averaged weights meanwhile, where these are kept."""
        state = self.model.state_dict()
        own = {name: state[name].clone() for name in self.average}
        for name, value in self.average.items():
            state[name].copy_(value)
        try:
            yield
        finally:
            for name, value in own.items():
                state[name].copy_(value)

    def _all_parts(self, inputs: torch.Tensor, labels: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Add the gradient of a batch, part by part; return its mean loss and its right predictions."""
        found = torch.zeros(2, dtype=torch.float64, device=self.device)
        parts = (given.chunk(self.config.accumulate) for given in (inputs, labels, targets))
        for some, right, chosen in zip(*parts, strict=True):
            found += self._accumulate(some, right, chosen, targets)
        return found

    def _accumulate(
        self, inputs: torch.Tensor, labels: torch.Tensor, chosen: torch.Tensor, targets: torch.Tensor
    ) -> torch.Tensor:
        """Add the gradient of a part of a batch whose ``targets`` are these; return its share of both."""
        with self.autocast():
            logits = self._network(inputs)
        smoothing = self.config.label_smoothing
        loss = F.cross_entropy(logits.float(), chosen, self._weights, label_smoothing=smoothing)
        if len(chosen) < len(targets):
            loss = loss * loss_share(targets, chosen, self._weights)
        loss.backward()
        correct = (logits.detach().argmax(1) == labels).sum()
        return torch.stack([loss.detach().double(), correct.double()])

    def train_epoch(self) -> EpochTrained:
        """Train the steps of the next epoch. Raises DivergedError naming the first one whose loss is not finite."""
        steps = self.begin_epoch()
        for number in range(1, len(steps.batches) + 1):
            steps.add(self._step(steps, number))
        return steps.result()

    @property
    def ended(self) -> bool:
        """Whether no epoch is left: all are trained, or the last ones gave nothing better (``patience``)."""
        goal = metrics.objective(self.config.objective).name
        return last_epoch(self.config, [epoch.val.scores[goal] for epoch in self.history]) is not None

    def run_epoch(self) -> EpochResult:
        """Train and validate the next epoch; keep its weights, by value, when they are the best so far."""
        epoch = self.epoch + 1
        if self.config.thaws(epoch):
            self.thaw()
        trained, self.ahead = self.ahead or self.train_epoch(), None
        if isinstance(trained, Exception):
            raise trained
        start = time.perf_counter()
        with self._averaged():
            try:
                val = self.evaluate("val")
            except NotFiniteError as error:
                raise NotFiniteError(f"epoch {epoch}, {error}") from error
            seconds = trained.seconds + time.perf_counter() - start
            lr = epoch_rates(self.config, epoch, self.steps)[0]
            result = EpochResult(epoch, lr, trained.loss, trained.accuracy, val, seconds, trained.images)
            goal = metrics.objective(self.config.objective)
            if self.best is None or goal.better(val.scores[goal.name], self.best.val.scores[goal.name]):
                self.best = result
                self.keep_best(self.model.state_dict())
        self.epoch = epoch
        self.history.append(result)
        return result
