"""The training loop of one stage. Read `Trainer.train` and `Trainer.train_step` first.

Every draw belongs to a slot of a step: to an image's place among those of all processes and accumulated batches. So
two processes train as one with twice the batch does, and a resumed run goes on with the draws of one that was never
stopped.
"""

import math
from pathlib import Path
from typing import Any, Callable, Optional

import torch
from accelerate.utils import DistributedType
from diffusers.utils import logging
from tqdm.auto import tqdm

from ..models.unet_base import ConditionalUNet
from .checkpoints import Checkpoints, describe_run
from .checks import check_network, check_width
from .config import TrainingConfig
from .data import BatchStream, ValidationBatches, make_train_batches, make_validation_batches
from .devices import make_accelerator, whole_network
from .draws import StepDraws
from .ema import WeightAverages
from .export import make_repository, save_stage, upload_stage
from .interruption import Interruption, TrainingInterrupted
from .losses import UncertaintyWeighting, denoising_loss, to_device
from .monitor import ComputeClock, Monitor, Records, Stopwatch, describe_time, memory_used
from .network import choose_attention, prepare_network
from .objectives import make_objective
from .optimization import (
    apply_settings,
    clip_gradients,
    learning_rates,
    make_optimizer,
    settings_of,
    step_if_finite,
    trainable,
)
from .sampling import draw_samples, log_samples, read_prompts, write_samples
from .validation import ValidationLoss


logger = logging.get_logger(__name__)

Encode = Callable[[list[str]], tuple]


def train(config: TrainingConfig, unet: ConditionalUNet, encode: Optional[Encode] = None) -> dict[str, float]:
    """Trains a network and writes the stage to `config.output_dir`; returns the last losses.

    Args:
        config (`TrainingConfig`): The settings.
        unet (`ConditionalUNet`): The network, trained in place.
        encode (`Callable`, *optional*): Maps a list of captions to text states `(B, L, E)` and mask `(B, L)`. Without
            it, and without `config.embedding_cache`, the network has to be one without text.

    Raises:
        ValueError: If network, data, checkpoint and settings do not fit each other, before any step.
        FloatingPointError: If the gradient is not finite in many steps in a row.
        TrainingInterrupted: After SIGTERM or SIGINT, when the state is saved.
    """
    return Trainer(config, unet, encode).train()


class Trainer:
    """A run: what is trained, on what, and what is kept of it.

    A fine-tuning run that differs overrides `adapt`, `describe`, `make_batches`, `weigh` or `export`.

    Args: as `train`.
    """

    def __init__(self, config: TrainingConfig, unet: ConditionalUNet, encode: Optional[Encode] = None):
        self.config = config
        self.accelerator = accelerator = make_accelerator(config)
        check_network(config, unet, with_text=encode is not None or config.embedding_cache is not None)
        choose_attention(unet, config)
        self.objective = make_objective(config)
        self.adapt(unet)
        weighting = UncertaintyWeighting(config.seed) if config.uncertainty_weighting else None
        optimizer = make_optimizer(config, unet, weighting, accelerator.num_processes)
        self.checkpoints = Checkpoints(accelerator, config, self.describe(unet))
        self.found = self.checkpoints.find(config.resume_from_checkpoint)
        self.prompts = read_prompts(config, encode)
        self.repository = make_repository(config) if accelerator.is_main_process else None

        place = (accelerator.process_index, accelerator.num_processes)
        self.batches = self.make_batches(unet, encode, *place)
        held_out = make_validation_batches(config, encode, *place) if config.validation_split else None
        check_width(unet, self.batches.text_width)
        release_encoder(encode, self.batches, held_out)
        self.validation = (
            None if held_out is None else ValidationLoss(config, self.objective, held_out, accelerator.device)
        )

        self.names = [name for name, parameter in unet.named_parameters() if parameter.requires_grad]
        unet = prepare_network(unet, config, accelerator.distributed_type)
        self.unet, self.optimizer, self.weighting = accelerator.prepare(unet, optimizer, weighting)
        self.parameters = trainable(self.unet)
        self.averages = WeightAverages(config, self.parameters)
        self.monitor = Monitor(accelerator.device)
        self.states = {"data": self.batches, "monitor": self.monitor}  # of which each process has its own
        if accelerator.distributed_type == DistributedType.FSDP:
            self.states["averages"] = self.averages  # each process has its shards
        else:
            accelerator.register_for_checkpointing(self.averages)

        self.draws = StepDraws(
            self.objective, config.seed, stratified=config.stratified_noise, device=accelerator.device
        )
        self.clock, self.stopwatch = ComputeClock(accelerator.device), Stopwatch()
        self.losses = {"loss": math.nan}

    def adapt(self, unet: ConditionalUNet) -> None:
        """Changes the network, in place, before anything is made for it; what needs no gradient then is not trained."""

    def describe(self, unet: ConditionalUNet) -> dict[str, Any]:
        """What a checkpoint must agree on with this run."""
        return describe_run(self.config, unet, self.accelerator.mixed_precision)

    def make_batches(
        self, unet: ConditionalUNet, encode: Optional[Encode], process_index: int, num_processes: int
    ) -> BatchStream:
        """The training batches of this process."""
        return make_train_batches(self.config, encode, process_index, num_processes)

    def weigh(self, losses: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        """Losses `(B,)` at noise levels `(B,)` as the numbers whose mean the step takes."""
        return losses if self.weighting is None else self.weighting(losses, sigma)

    def export(self, unet: ConditionalUNet, done: int, results: dict[str, float]) -> None:
        """Writes what is trained, with its averaged weights."""
        save_stage(unet, self.objective.scheduler(), self.config, done, results)

    @property
    def images_per_step(self) -> int:
        """Images of a step, over all processes and accumulated batches."""
        return self.batches.stride * self.config.gradient_accumulation_steps

    def train(self) -> dict[str, float]:
        """Runs to the last step."""
        first_step = self.start()
        with Interruption() as interruption, self.progress_bar(first_step) as progress:
            for step in range(first_step, self.config.max_train_steps):
                self.train_step(step)
                progress.update()
                self.after_step(step + 1, progress, interruption)
        return self.finish(first_step)

    def train_step(self, step: int) -> None:
        """One optimizer step over all accumulated batches."""
        accumulated = self.config.gradient_accumulation_steps
        modules = [self.unet] if self.weighting is None else [self.unet, self.weighting]
        self.draws.begin(step, self.batches.images_seen, self.images_per_step)
        for _ in range(accumulated):
            first_slot = self.batches.first_slot
            batch = to_device(next(self.batches), self.accelerator.device, self.config.channels_last)
            draws = self.draws(first_slot, batch)
            sigma = self.objective.sigma(draws.level)

            with self.clock, self.accelerator.accumulate(*modules):
                with self.accelerator.autocast():
                    losses = denoising_loss(self.unet, batch, draws, self.objective, self.config)
                self.accelerator.backward(self.weigh(losses, sigma).mean())
                if self.accelerator.sync_gradients:
                    grad_norm = clip_gradients(self.accelerator, self.parameters, self.config.max_grad_norm)
                    step_if_finite(self.optimizer, grad_norm)
                    self.optimizer.zero_grad()
            self.monitor.add(losses.detach(), sigma, share=1 / accumulated)
        self.schedule.step()
        self.averages.step(self.parameters)
        self.monitor.end_step(grad_norm)

    def start(self) -> int:
        """Goes on from the checkpoint, if there is one; returns the first step."""
        optimizer, first_step = self.optimizer.optimizer, 0
        if self.found is not None:
            settings = settings_of(optimizer)
            first_step = self.checkpoints.load(self.found, self.states)
            apply_settings(optimizer, settings)
        self.schedule = learning_rates(self.config, optimizer, first_step)
        output_dir = Path(self.config.output_dir)
        self.records = {name: Records(output_dir / f"{name}.jsonl") for name in ("metrics", "losses")}
        if self.accelerator.is_main_process:
            output_dir.mkdir(parents=True, exist_ok=True)
            self.records["metrics"].cut(first_step)
            self.losses |= self.records["losses"].cut(first_step)
        self.losses["loss"] = self.monitor.running_loss(self.accelerator)
        if self.config.report_to:
            settings = {name: str(value) for name, value in vars(self.config).items() if name != "hub_token"}
            self.accelerator.init_trackers("diffusers-imagen", settings)
        self.stopwatch, self.seen = Stopwatch(), (0.0, first_step)
        return first_step

    def after_step(self, done: int, progress: tqdm, interruption: Interruption) -> None:
        """What there is to do between steps, of which `done` are done."""
        config, last = self.config, done == self.config.max_train_steps
        looks = done % config.logging_steps == 0 or last
        if looks:
            self.log(done, progress)
        saves = done % config.checkpointing_steps == 0 or last
        validates = done % (config.validation_steps or config.checkpointing_steps) == 0 or last
        with self.stopwatch:
            if validates:
                self.validate(done)
            if config.ema_type == "power" and (
                done % (config.ema_snapshot_steps or config.checkpointing_steps) == 0 or last
            ):
                self.save_snapshots(done)
            if saves:
                self.save(done)
            # processes agree where they meet anyway
            if (looks or self.accelerator.num_processes == 1) and interruption.agreed(self.accelerator) and not last:
                if self.checkpoints.saved != done:
                    self.checkpoints.save(done, self.states)
                self.close()
                folder = f"{config.output_dir}/checkpoint-{done}"
                raise TrainingInterrupted(interruption.signum, folder)

    def log(self, done: int, progress: tqdm) -> None:
        """Fetches what the last steps had to tell, and shows it."""
        record = self.monitor.fetch(self.accelerator)
        seconds, before = self.stopwatch.seconds(), self.seen
        self.seen = (seconds, done)
        rate = (done - before[1]) * self.images_per_step / (seconds - before[0])
        self.losses["loss"] = record["loss_average"]
        progress.set_postfix(loss=f"{record['loss_average']:.4f}", images_per_s=f"{rate:.1f}", refresh=False)
        record["lr"] = self.schedule.get_last_lr()[0]
        self.record("metrics", done, record)
        speed = {"images_per_second": rate, "memory_gib": memory_used(self.accelerator.device)}
        self.accelerator.log({**record, **speed}, step=done)

    def record(self, name: str, done: int, record: dict[str, float]) -> None:
        """Adds a line to a file of the run."""
        if self.accelerator.is_main_process:
            self.records[name].append(done, record)

    def validate(self, done: int) -> None:
        """Loss on held-out rows and samples, with the averaged weights."""
        with self.averages.applied(self.parameters):
            if self.validation is not None:
                self.losses |= self.validation(self.accelerator, self.unet)
                held_out = {name: value for name, value in self.losses.items() if name.startswith("validation")}
                self.accelerator.log(held_out, step=done)
            if self.prompts is not None:
                self.sample(done)

    def sample(self, done: int) -> None:
        """Draws the validation prompts and writes a grid; the other processes wait where they meet next."""
        unet = whole_network(self.accelerator, self.unet)
        if not self.accelerator.is_main_process:
            return
        images = draw_samples(unet.eval(), self.objective.scheduler(), self.prompts, self.config)
        unet.train()
        write_samples(images, self.config.output_dir, done)
        log_samples(self.accelerator, images, self.config.validation_prompts, done)

    def save_snapshots(self, done: int) -> None:
        """Writes the power-function averages."""
        parameters = dict(zip(self.names, self.parameters))
        self.averages.save_snapshots(self.config.output_dir, parameters, done, self.accelerator.is_main_process)

    def save(self, done: int) -> None:
        """Writes a checkpoint, and the averaged weights as a stage."""
        self.losses["loss"] = self.monitor.running_loss(self.accelerator)
        self.checkpoints.save(done, self.states)
        self.record("losses", done, self.losses)
        with self.averages.applied(self.parameters):
            unet = whole_network(self.accelerator, self.unet)
            if self.accelerator.is_main_process:
                results = {**self.losses, "images_per_step": self.images_per_step}
                self.export(unet, done, results)
        self.accelerator.wait_for_everyone()

    def finish(self, first_step: int) -> dict[str, float]:
        """Says where the time went, and uploads the stage."""
        steps = max(0, self.config.max_train_steps - first_step)
        seconds, compute = self.stopwatch.seconds(), self.clock.seconds()
        if self.accelerator.is_main_process:
            logger.info(describe_time(steps, steps * self.images_per_step, seconds, compute, self.stopwatch.between))
            if self.batches.skipped:
                logger.info(f"{len(self.batches.skipped)} images were skipped, each named above.")
            if self.repository is not None:
                upload_stage(self.repository, self.config, self.config.max_train_steps)
        self.close()
        return self.losses | ({"overhead": 1 - compute / seconds} if steps else {})

    def close(self) -> None:
        """
        Ends what runs beside the loop.

        The wrappers of the networks go before the process group. If they held it last, its destructor would wait for
        gloo's threads without giving up the interpreter's lock, which those threads may need for their last tensors.
        """
        self.batches.close()
        self.unet = self.accelerator.unwrap_model(self.unet)
        if self.weighting is not None:
            self.weighting = self.accelerator.unwrap_model(self.weighting)
        self.accelerator.free_memory()
        self.accelerator.end_training()

    def progress_bar(self, first_step: int) -> tqdm:
        """Of the steps of the whole run."""
        return tqdm(
            initial=first_step,
            total=self.config.max_train_steps,
            desc="Training",
            disable=not self.accelerator.is_local_main_process,
            mininterval=10,
        )


def release_encoder(encode: Optional[Encode], *streams: Optional[BatchStream | ValidationBatches]) -> None:
    """Takes the text encoder out of memory where no stream needs it while batches are drawn."""
    if hasattr(encode, "release") and not any(stream is not None and stream.needs_encoder for stream in streams):
        encode.release()
