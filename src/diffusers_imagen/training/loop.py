"""Training loop of one stage. Start reading at `Trainer.train` and `Trainer.train_step`.

Random numbers are determined by the slot of an image: its position in a step, over all processes and accumulated
batches. Two processes therefore train like one with twice the batch size, and a resumed run like an uninterrupted one.
"""

import math
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import DistributedType
from diffusers.utils import logging
from tqdm.auto import tqdm

from ..models.interface import StageNetwork
from ..text.opening import open_text
from ..text.source import TextSource
from ..utils.processes import check_shared, on_main_process
from .checkpoints import Checkpoints, Found, Stateful
from .compatibility import check_modules, check_network, check_objective, check_text
from .config import TrainingConfig
from .data import BatchStream, make_train_batches, make_validation_batches
from .devices import describe_sharing, inner_network, make_accelerator, own_part, whole_network
from .ema.averages import WeightAverages
from .export import digest_stage, make_repository, save_stage, upload_stage
from .interruption import Interruption, TrainingInterrupted
from .monitor import RECORDS, ComputeClock, Losses, Monitor, Records, Stopwatch, describe_time, memory_used, not_finite
from .network import check_finite, choose_attention, prepare_network, seeded_dropout
from .objective.losses import Conditioning, denoising_loss, to_device
from .objective.objectives import make_objective
from .objective.step_draws import StepDraws
from .optimization import clip_gradients, learning_rates, make_optimizer, step_if_finite, trainable
from .output_folder import OutputFolder
from .pretrained_stage import find_pretrained, use_own_text_encoder
from .run_identity import TEXT_ENCODER, describe_run, in_json
from .sampling import StagePipeline, draw_samples, read_prompts, show_samples, stage_pipeline
from .stage_card import public_settings
from .states import NetworkState, OptimizerState
from .validation.held_out_loss import ValidationLoss
from .validation.metric_settings import check_metrics
from .validation.picture_metrics import PictureMetrics


logger = logging.get_logger(__name__)


def train(config: TrainingConfig, unet: StageNetwork, text: TextSource | None = None) -> dict[str, float]:
    """Train a network and write the stage to `config.output_dir`; return the last losses.

    Args:
        config (`TrainingConfig`): The configuration.
        unet (`StageNetwork`): The network, trained in place.
        text (`TextSource`, *optional*):
            Source of the embeddings of captions and prompts; by default `text_encoder` and `embedding_cache` of
            `config`, else the text encoder of its pretrained stage, to which `config.text_encoder` is then set. Without
            any of them the network must not be conditioned on text.

    Raises:
        ValueError: Before any step: if network, data, checkpoint and settings do not fit each other, another process
            uses the folder, or it has a checkpoint or results of another run.
        FloatingPointError: If the gradient is not finite in many consecutive steps, or a weight is not.
        TrainingInterrupted: After SIGTERM or SIGINT, when the state is saved.
    """
    return Trainer(config, unet, text).train()


class Trainer:
    """A training run: the network, the data, and the results.

    Its creation only checks arguments; `train` does the rest, or `prepare`, `start` and `train_step` one by one.

    Other kinds of training override only some of these methods:

    - `adapt(unet)`: change the network in place before it is used, for example add an adapter.
    - `describe()`: return a description of the run that a checkpoint must match.
    - `make_batches()`: return the training batches of this process.
    - `weigh(losses, log_snr)`: return the values whose mean a step minimizes, from the losses of a batch.
    - `network_state()`: return the state of the network for a checkpoint.
    - `export(unet, done, results)`: write the trained weights.

    Args: see `train`.
    """

    def __init__(self, config: TrainingConfig, unet: StageNetwork, text: TextSource | None = None):
        self.config, self.unet, self.text = config, unet, text  # without text, `read_data` opens that of the settings
        self.accelerator = make_accelerator(config)
        self.pretrained = find_pretrained(config)
        if text is None:
            use_own_text_encoder(config, unet, self.pretrained)
        kept = self.pretrained.scheduler_for(config.preconditioning)
        if kept is not None:  # its noise levels are those of the objective
            check_objective(config)
        self.objective = make_objective(config, kept)
        self.folder = OutputFolder(config)
        self.losses = Losses(loss=math.nan)
        check_network(config, unet, with_text=config.names_text or text is not None)
        check_metrics(config, unet)
        check_modules(config, self.accelerator, self.objective.trained_modules)
        choose_attention(unet, config)
        self.adapt(unet)
        check_finite(unet, config.pretrained_model_name_or_path)
        self.names = [name for name, parameter in unet.named_parameters() if parameter.requires_grad]
        self.parameters = trainable(unet)

    def train(self) -> dict[str, float]:
        """Train up to the last step."""
        self.prepare()
        try:
            first_step = self.start()
            if first_step == self.config.max_train_steps:
                self.complete(first_step)
            with Interruption() as interruption, self.progress_bar(first_step) as progress:
                for step in range(first_step, self.config.max_train_steps):
                    self.train_step(step)
                    progress.update()
                    self.after_step(step + 1, progress, interruption)
            return self.finish(first_step)
        finally:
            self.folder.release()

    def train_step(self, step: int) -> None:
        """Perform one optimizer step over all accumulated batches."""
        accumulated = self.config.gradient_accumulation_steps
        self.draws.begin(step, self.batches.images_seen, self.images_per_step)
        for part in range(accumulated):
            first_slot = self.batches.first_slot
            device, channels_last = self.accelerator.device, self.config.channels_last
            batch = to_device(next(self.batches), device, channels_last, self.conditioning)
            draws = self.draws(first_slot, batch)
            dropout = seeded_dropout(self.unet, self.config.seed, step, part, self.accelerator.process_index)

            with self.clock, self.accelerator.accumulate(*self.modules):
                with self.accelerator.autocast(), dropout:
                    losses = denoising_loss(self.unet, batch, draws, self.objective, self.config, self.conditioning)
                self.accelerator.backward(self.weigh(losses, draws.log_snr).mean())
                if self.accelerator.sync_gradients:
                    grad_norm = clip_gradients(self.accelerator, self.parameters, self.config.max_grad_norm)
                    step_if_finite(self.optimizer, grad_norm)
                    self.optimizer.zero_grad()
            self.monitor.add(losses.detach(), draws.sigma, share=1 / accumulated)
        self.schedule.step()
        self.averages.step(self.parameters)
        self.monitor.end_step(grad_norm)

    # ---- overridden by other kinds of training

    def adapt(self, unet: StageNetwork) -> None:
        """Change the network in place before it is used; parameters without gradient are then not trained."""

    def describe(self) -> dict[str, Any]:
        """Return a description of the run that a checkpoint must match, except the data."""
        accelerator = self.accelerator
        sharing = (accelerator.num_processes, describe_sharing(accelerator))
        return describe_run(self.config, self.unet, accelerator.mixed_precision, *sharing)

    def make_batches(self) -> BatchStream:
        """Return the training batches of this process."""
        return make_train_batches(self.config, self.text, *self.place)

    def weigh(self, losses: torch.Tensor, log_snr: torch.Tensor) -> torch.Tensor:
        """Convert losses `(B,)` at noise levels `(B,)` to the values whose mean the step minimizes."""
        return self.objective.minimized(losses, log_snr)

    def network_state(self) -> dict[str, NetworkState]:
        """Return the state of the network for a checkpoint, by file name."""
        return {"model": NetworkState(inner_network(self.accelerator, self.unet))}

    def export(self, unet: StageNetwork, done: int, results: dict[str, float]) -> None:
        """Write the stage, with its averaged weights."""
        save_stage(self.pipeline(unet), self.config, done, results, self.pretrained, self.encoder)

    # ---- before the first step

    def prepare(self) -> None:
        """Check the folder, read the data, and move modules to their devices."""
        modules, config, accelerator = self.objective.trained_modules, self.config, self.accelerator
        optimizer = make_optimizer(config, self.unet, modules, accelerator.num_processes)
        self.checkpoints = Checkpoints(accelerator, config, in_json(self.describe()))
        on_main_process(accelerator, self.look_ahead)
        self.read_data()

        unet = prepare_network(self.unet, config, accelerator.distributed_type)
        self.unet, self.optimizer, *self.objective.trained_modules = accelerator.prepare(unet, optimizer, *modules)
        self.objective.weighting.to(accelerator.device)  # not moved by `prepare` if it is not trained
        self.parameters = trainable(self.unet)
        self.averages = WeightAverages(config, self.parameters)
        self.monitor, self.clock = Monitor(accelerator.device), ComputeClock(accelerator.device)
        stratified = config.stratified_noise
        self.draws = StepDraws(self.objective, config.seed, stratified=stratified, device=accelerator.device)
        self.register_states()

    def look_ahead(self) -> None:
        """Raise the errors of `begin` early, before other work."""
        self.folder.check_free()
        self.folder.plan(self.checkpoints.find(), self.checkpoints.run, partly=True)

    def read_data(self) -> None:
        """Open the training and validation data; the text encoder is freed when it is not needed any more."""
        config = self.config
        if self.text is None:
            max_length = config.tokenizer_max_length or self.pretrained.max_length
            padding, cleans = self.unet.attends_padding, self.pretrained.clean_caption
            options = config.hub_options(config.text_encoder or "")
            self.text = open_text(config.text_encoder, config.embedding_cache, max_length, padding, cleans, **options)
        text = self.text
        check_text(self.unet, text)
        no_text = None
        if text is not None and text.keeps_padding:
            no_text = text.encode([""]).embeds.float().to(self.accelerator.device)  # repeated by `TextSource.no_text`
        self.conditioning = Conditioning.of(self.unet, config.crop_size is not None, no_text)
        self.prompts, self.metrics = read_prompts(config, text), None
        if config.validation_metrics is not None:
            self.metrics = PictureMetrics(config, text, self.pipeline(self.unet), self.accelerator)
        self.batches = self.make_batches()
        images = self.batches.epoch
        config.set_epoch(None if images is None else math.ceil(images / self.images_per_step))
        self.validation, needs_encoder = None, self.batches.needs_encoder
        needs_encoder |= self.metrics is not None and self.metrics.needs_encoder
        if config.validation_split:
            held_out = make_validation_batches(config, text, *self.place)
            self.validation = ValidationLoss(
                config, self.objective, held_out, self.accelerator.device, self.conditioning
            )
            needs_encoder |= held_out.needs_encoder
        identity = None if text is None else text.identity()
        self.encoder = None if text is None else text.parts()
        self.checkpoints.run |= in_json({**(self.batches.content or {}), TEXT_ENCODER: identity})
        if text is not None and not needs_encoder:
            text.release()

    def register_states(self) -> None:
        """Register the states that checkpoints save."""
        kind, checkpoints = self.accelerator.distributed_type, self.checkpoints
        states: dict[str, Stateful] = {}
        if kind == DistributedType.DEEPSPEED:
            checkpoints.engine = self.unet
        else:
            states = {**self.network_state(), "optimizer": OptimizerState(self.optimizer, self.accelerator.scaler)}
        states["averages"] = self.averages
        checkpoints.own |= {"data": self.batches, "monitor": self.monitor, "losses": self.losses}
        if kind == DistributedType.FSDP:
            checkpoints.own |= states  # each process has a part of them
        else:
            checkpoints.shared |= states
        for number, module in enumerate(self.objective.trained_modules, start=1):
            checkpoints.shared[f"model_{number}"] = NetworkState(inner_network(self.accelerator, module))
        if not self.objective.trained_modules and self.objective.weighting.state_dict():
            checkpoints.own["weighting"] = NetworkState(self.objective.weighting)  # each process has its own losses

    @property
    def modules(self) -> list[torch.nn.Module]:
        """Modules with trained weights."""
        return [self.unet, *self.objective.trained_modules]

    @property
    def place(self) -> tuple[int, int, torch.device]:
        """Index of this process, number of processes, and device."""
        return self.accelerator.process_index, self.accelerator.num_processes, self.accelerator.device

    @property
    def images_per_step(self) -> int:
        """Number of images per step, over all processes and accumulated batches."""
        return self.batches.stride * self.config.gradient_accumulation_steps

    def start(self) -> int:
        """Lock the folder, and resume from the checkpoint, if there is one; return the first step."""
        accelerator, config = self.accelerator, self.config
        found = on_main_process(accelerator, self.begin)
        check_shared(accelerator, Path(config.output_dir), "output_dir")
        if found.folder is not None:
            self.checkpoints.load(found.folder)
            self.check_place(found)
        self.schedule = learning_rates(config, self.optimizer.optimizer, found.step)
        self.repository = on_main_process(accelerator, lambda: make_repository(config))
        config.hub_model_id = (
            self.repository or config.hub_model_id
        )  # with the user name, which the example in the model card needs
        self.records = {name: Records(Path(config.output_dir) / f"{name}.jsonl") for name in RECORDS}
        self.losses["loss"] = self.monitor.running_loss(accelerator)
        if self.metrics is not None:
            self.metrics.prepare()
        if config.report_to:
            settings = {name: str(value) for name, value in public_settings(config).items()}
            accelerator.init_trackers("diffusers-imagen", settings)
        self.stopwatch, self.seen = Stopwatch(), (0.0, found.step)
        return found.step

    def begin(self) -> Found:
        """Lock the folder, choose the checkpoint, and move files of other runs aside. In the main process."""
        self.folder.hold()
        found = self.checkpoints.find(thoroughly=True)
        plan = self.folder.plan(found, self.checkpoints.run)
        self.folder.carry_out(plan, found, self.checkpoints.run)
        return found

    def check_place(self, found: Found) -> None:
        """Check that the state of a checkpoint belongs to its step, and is finite.

        Raises:
            ValueError: If not.
        """
        seen = found.step * self.images_per_step
        if self.batches.images_seen != seen:
            raise ValueError(
                f"`resume_from_checkpoint`: {found.folder} has seen {self.batches.images_seen!r} images, but "
                f"should have seen {seen} after {found.step} steps."
            )
        if self.count_not_finite():
            raise ValueError(
                f"`resume_from_checkpoint`: {found.folder} has weights or averages that are not finite: resume from "
                "an earlier checkpoint."
            )

    def count_not_finite(self) -> int:
        """Return the number of weights and averages, as tensors, with values that are not finite, in all processes."""
        tensors = [*map(own_part, self.parameters), *self.averages.tensors()]
        return int(self.accelerator.reduce(not_finite(tensors).to(self.accelerator.device), "sum").item())

    def after_step(self, done: int, progress: tqdm, interruption: Interruption) -> None:
        """Log, validate and save after `done` steps. The checkpoint of a step is written last: a run killed before
        repeats all of it, and a run killed after has all of it."""
        config, last = self.config, done == self.config.max_train_steps
        looks = done % config.logging_steps == 0 or last
        if looks:
            self.log(done, progress)
        with self.stopwatch:
            saves = done % config.checkpointing_steps == 0 or last
            self.write_results(done, last)
            # processes agree only when they synchronize anyway
            meets = looks or self.accelerator.num_processes == 1
            stops = meets and interruption.agreed(self.accelerator) and not last
            if saves or stops:
                self.save_checkpoint(done)
            if interruption.signum is not None and stops:
                self.close()
                raise TrainingInterrupted(interruption.signum, str(self.checkpoints.saved))

    def write_results(self, done: int, last: bool) -> None:
        """Write the results of a step, if it is the last one or one of the configured steps."""
        config = self.config
        saves = done % config.checkpointing_steps == 0 or last
        validates = done % (config.validation_steps or config.checkpointing_steps) == 0 or last
        takes = done % (config.ema_snapshot_steps or config.checkpointing_steps) == 0 or last
        if saves or validates or takes:
            self.check_weights(done)
        if validates:
            self.validate(done)
        if takes and config.ema_type == "power":
            self.save_snapshots(done)
        if saves:
            self.save_results(done)
        if last and self.accelerator.is_main_process:
            self.folder.note(completed=self.completed(done))

    def check_weights(self, done: int) -> None:
        """Raise an error for weights that are not finite, before they replace earlier results.

        Raises:
            FloatingPointError: If a weight is not finite.
        """
        if self.count_not_finite():
            kept = self.checkpoints.saved
            raise FloatingPointError(
                f"The weights are not finite after step {done}, which was not saved: lower `learning_rate`, or check "
                "the data with `diffusers-imagen doctor`. "
                + ("There is no earlier checkpoint." if kept is None else f"The last checkpoint is {kept}.")
            )

    def save_checkpoint(self, done: int) -> None:
        """Write the state after a step, from which the run can be resumed."""
        self.check_weights(done)
        if self.accelerator.is_main_process:
            for records in self.records.values():
                records.sync()
        self.checkpoints.save(done)
        if self.accelerator.is_main_process:
            self.folder.note(has_checkpoint=True)

    def complete(self, done: int) -> None:
        """Write missing results of the last step: the checkpoint that the run resumes from was not written as that of
        a last step, or the stage was changed."""
        is_whole, is_logged = on_main_process(self.accelerator, lambda: self.look_back(done))
        if is_whole:
            return
        if not is_logged:
            self.log(done)
        if self.accelerator.is_main_process:
            for name in ("losses", "validation"):
                self.records[name].cut(done - 1)
        self.write_results(done, last=True)

    def look_back(self, done: int) -> tuple[bool, bool]:
        """Return whether all results of the last step exist, and whether its metrics do."""
        is_whole = self.folder.noted("completed") == self.completed(done)
        return is_whole, self.records["metrics"].last_step() >= done

    def completed(self, done: int) -> dict[str, Any]:
        """Return the entry in run.json for a last step with complete results."""
        return {"step": done, "files": digest_stage(Path(self.config.output_dir))}

    def log(self, done: int, progress: tqdm | None = None) -> None:
        """Fetch the metrics of the last steps, and log them."""
        record = self.monitor.fetch(self.accelerator)
        seconds, before = self.stopwatch.seconds(), self.seen
        self.seen = (seconds, done)
        rate = (done - before[1]) * self.images_per_step / (seconds - before[0])
        self.losses["loss"] = record["loss_average"]
        if progress is not None:
            progress.set_postfix(loss=f"{record['loss_average']:.4f}", images_per_s=f"{rate:.1f}", refresh=False)
        record["lr"] = float(self.schedule.get_last_lr()[0])
        self.record("metrics", done, record)
        speed = {"images_per_second": rate, "memory_gib": memory_used(self.accelerator.device)}
        self.accelerator.log({**record, **speed}, step=done)

    def record(self, name: str, done: int, record: dict[str, Any]) -> None:
        """Append a line to a file of the run."""
        if self.accelerator.is_main_process:
            self.records[name].append(done, record)

    def validate(self, done: int) -> None:
        """Compute the loss on held-out rows, metrics and samples, with the averaged weights."""
        found: dict[str, float] = {}
        with self.averages.applied(self.parameters):
            if self.validation is not None:
                found |= self.validation(self.accelerator, self.unet)
            if self.metrics is not None:
                pipe = self.pipeline(whole_network(self.accelerator, self.unet))
                found |= self.metrics(pipe, done, self.records["validation"])
            if self.prompts is not None:
                self.sample(done)
        self.losses.take_validation(found)
        if found:
            self.accelerator.log(found, step=done)

    def sample(self, done: int) -> None:
        """Generate images for the validation prompts and write a grid; other processes wait at the next barrier."""
        unet = whole_network(self.accelerator, self.unet)
        if self.accelerator.is_main_process and self.prompts is not None:
            images = draw_samples(self.pipeline(unet.eval()), self.prompts, self.config)
            unet.train()
            show_samples(self.accelerator, images, self.config, done)

    def pipeline(self, unet: StageNetwork) -> StagePipeline:
        """Return the pipeline of the network, with the settings of the exported stage."""
        settings = self.pretrained.settings(self.config.preconditioning, self.objective.sampling, unet.takes_low_res)
        return stage_pipeline(unet, self.objective.scheduler_for(unet), self.config, settings)

    def save_snapshots(self, done: int) -> None:
        """Write the power function averages."""
        parameters = dict(zip(self.names, self.parameters))
        self.averages.save_snapshots(self.config.output_dir, parameters, done, self.accelerator.is_main_process)

    def save_results(self, done: int) -> None:
        """Write the losses, and the averaged weights as a stage."""
        self.losses["loss"] = self.monitor.running_loss(self.accelerator)
        self.record("losses", done, self.losses)
        with self.averages.applied(self.parameters):
            unet = whole_network(self.accelerator, self.unet)
            if self.accelerator.is_main_process:
                results = {**self.losses, "images_per_step": self.images_per_step}
                self.export(unet, done, results)
        self.accelerator.wait_for_everyone()

    def finish(self, first_step: int) -> dict[str, float]:
        """Log the time spent, and upload the stage."""
        steps = max(0, self.config.max_train_steps - first_step)
        seconds, compute = self.stopwatch.seconds(), self.clock.seconds()
        if self.accelerator.is_main_process:
            logger.info(describe_time(steps, steps * self.images_per_step, seconds, compute, self.stopwatch.between))
            if self.batches.skipped:
                logger.info(f"{len(self.batches.skipped)} images were skipped, as logged above.")
            if self.repository is not None:
                upload_stage(self.repository, self.config, self.config.max_train_steps, self.encoder)
        self.close()
        return self.losses | ({"overhead": 1 - compute / seconds} if steps else {})

    def close(self) -> None:
        """
        Close batches, networks and trackers.

        The wrappers of the networks are freed before the process group. Otherwise its destructor, called with the last
        reference, would wait for gloo's threads while holding the interpreter lock, which these threads may need.
        """
        self.batches.close()
        self.unet, *self.objective.trained_modules = map(self.accelerator.unwrap_model, self.modules)
        self.accelerator.free_memory()
        self.accelerator.end_training()

    def progress_bar(self, first_step: int) -> tqdm:
        """Return the progress bar for the steps of the whole run."""
        return tqdm(
            initial=first_step,
            total=self.config.max_train_steps,
            desc="Training",
            disable=not self.accelerator.is_local_main_process,
            mininterval=10,
        )
