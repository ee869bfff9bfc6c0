"""The training loop of one stage. Read `Trainer.train` and `Trainer.train_step` first.

Every draw belongs to a slot of a step: to an image's place among those of all processes and accumulated batches. So
two processes train as one with twice the batch does, and a resumed run goes on with the draws of one that was never
stopped.
"""

import math
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import DistributedType
from diffusers.utils import logging
from tqdm.auto import tqdm

from ..models.interface import StageNetwork
from ..text.cache import open_text
from ..text.source import TextSource
from ..utils.processes import on_main_process
from .checkpoints import Checkpoints, Found, Stateful
from .compatibility import check_modules, check_network, check_objective, check_text
from .config import TrainingConfig
from .data import BatchStream, make_train_batches, make_validation_batches
from .devices import describe_sharing, inner_network, make_accelerator, own_part, whole_network
from .ema.averages import WeightAverages
from .export import digest_stage, make_repository, public_settings, save_stage, upload_stage
from .interruption import Interruption, TrainingInterrupted
from .monitor import RECORDS, ComputeClock, Losses, Monitor, Records, Stopwatch, describe_time, memory_used, not_finite
from .network import check_finite, choose_attention, prepare_network, seeded_dropout
from .objective.losses import Conditioning, denoising_loss, to_device
from .objective.objectives import make_objective
from .objective.step_draws import StepDraws
from .optimization import clip_gradients, learning_rates, make_optimizer, step_if_finite, trainable
from .output_folder import OutputFolder
from .pretrained_stage import find_pretrained
from .run_identity import TEXT_ENCODER, describe_run, in_json
from .sampling import StagePipeline, draw_samples, read_prompts, show_samples, stage_pipeline
from .states import NetworkState, OptimizerState
from .validation.held_out_loss import ValidationLoss
from .validation.metric_settings import check_metrics
from .validation.picture_metrics import PictureMetrics


logger = logging.get_logger(__name__)


def train(config: TrainingConfig, unet: StageNetwork, text: TextSource | None = None) -> dict[str, float]:
    """Trains a network and writes the stage to `config.output_dir`; returns the last losses.

    Args:
        config (`TrainingConfig`): The settings.
        unet (`StageNetwork`): The network, trained in place.
        text (`TextSource`, *optional*): Makes the embeddings of captions and prompts; by default what `text_encoder`
            and `embedding_cache` of `config` name. Without any the network has to be one without text.

    Raises:
        ValueError: If network, data, checkpoint and settings do not fit each other, before any step; if another
            process has the folder, or it has a checkpoint or results of another run.
        FloatingPointError: If the gradient is not finite in many steps in a row, or a weight is not.
        TrainingInterrupted: After SIGTERM or SIGINT, when the state is saved.
    """
    return Trainer(config, unet, text).train()


class Trainer:
    """A run: what is trained, on what, and what is kept of it.

    It is made without any work but checks; `train` does the rest, or `prepare`, `start` and `train_step` one by one.

    A run of another kind overrides some of these, and nothing else:

    - `adapt(unet)`: changes the network in place, before anything is made for it, such as adds an adapter to it.
    - `describe()`: what a checkpoint must agree on with the run.
    - `make_batches()`: the training batches of this process.
    - `weigh(losses, log_snr)`: the numbers whose mean a step minimizes, of the losses of a batch.
    - `network_state()`: what a checkpoint has of the network.
    - `export(unet, done, results)`: writes what was trained.

    Args: as `train`.
    """

    def __init__(self, config: TrainingConfig, unet: StageNetwork, text: TextSource | None = None):
        self.config, self.unet, self.text = config, unet, text  # `read_data` opens the text that the settings name
        self.accelerator = make_accelerator(config)
        self.pretrained = find_pretrained(config)
        kept = self.pretrained.scheduler_for(config.preconditioning)
        if kept is not None:  # its noise levels are those of the objective
            check_objective(config)
        self.objective = make_objective(config, kept)
        self.folder = OutputFolder(config)
        self.losses = Losses(loss=math.nan)
        names_text = bool(config.text_encoder) or config.embedding_cache is not None
        check_network(config, unet, with_text=names_text or text is not None)
        check_metrics(config, unet)
        check_modules(config, self.accelerator, self.objective.trained_modules)
        choose_attention(unet, config)
        self.adapt(unet)
        check_finite(unet, config.pretrained_model_name_or_path)
        self.names = [name for name, parameter in unet.named_parameters() if parameter.requires_grad]
        self.parameters = trainable(unet)

    def train(self) -> dict[str, float]:
        """Runs to the last step."""
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
        """One optimizer step over all accumulated batches."""
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

    # ---- what another kind of run overrides

    def adapt(self, unet: StageNetwork) -> None:
        """Changes the network, in place, before anything is made for it; what needs no gradient then is not trained."""

    def describe(self) -> dict[str, Any]:
        """What a checkpoint must agree on with this run, but for the data."""
        accelerator = self.accelerator
        sharing = (accelerator.num_processes, describe_sharing(accelerator))
        return describe_run(self.config, self.unet, accelerator.mixed_precision, *sharing)

    def make_batches(self) -> BatchStream:
        """The training batches of this process."""
        return make_train_batches(self.config, self.text, *self.place)

    def weigh(self, losses: torch.Tensor, log_snr: torch.Tensor) -> torch.Tensor:
        """Losses `(B,)` at noise levels `(B,)` as the numbers whose mean the step takes."""
        return self.objective.minimized(losses, log_snr)

    def network_state(self) -> dict[str, NetworkState]:
        """What a checkpoint has of the network, by the name of its file."""
        return {"model": NetworkState(inner_network(self.accelerator, self.unet))}

    def export(self, unet: StageNetwork, done: int, results: dict[str, float]) -> None:
        """Writes what is trained, with its averaged weights."""
        save_stage(self.pipeline(unet), self.config, done, results)

    # ---- before the first step

    def prepare(self) -> None:
        """Looks at the folder, reads the data, and puts what is trained where it is trained."""
        modules, config, accelerator = self.objective.trained_modules, self.config, self.accelerator
        optimizer = make_optimizer(config, self.unet, modules, accelerator.num_processes)
        self.checkpoints = Checkpoints(accelerator, config, in_json(self.describe()))
        on_main_process(accelerator, self.look_ahead)
        self.read_data()

        unet = prepare_network(self.unet, config, accelerator.distributed_type)
        self.unet, self.optimizer, *self.objective.trained_modules = accelerator.prepare(unet, optimizer, *modules)
        self.objective.weighting.to(accelerator.device)  # one that is not trained was not moved
        self.parameters = trainable(self.unet)
        self.averages = WeightAverages(config, self.parameters)
        self.monitor, self.clock = Monitor(accelerator.device), ComputeClock(accelerator.device)
        stratified = config.stratified_noise
        self.draws = StepDraws(self.objective, config.seed, stratified=stratified, device=accelerator.device)
        self.register_states()

    def look_ahead(self) -> None:
        """Refuses, before there is any work, what `begin` would refuse."""
        self.folder.check_free()
        self.folder.plan(self.checkpoints.find(), self.checkpoints.run, partly=True)

    def read_data(self) -> None:
        """Opens what is trained and validated on; the text encoder leaves memory where it is not needed any more."""
        config = self.config
        if self.text is None:
            max_length = config.tokenizer_max_length or self.pretrained.max_length
            padding, cleans = self.unet.attends_padding, self.pretrained.clean_caption
            self.text = open_text(config.text_encoder, config.embedding_cache, max_length, padding, cleans)
        text = self.text
        check_text(self.unet, text)
        no_text = None
        if text is not None and text.keeps_padding:
            no_text = text.no_text(text.encode([""])).embeds.float().to(self.accelerator.device)
        self.conditioning = Conditioning.of(self.unet, config.crop_size is not None, no_text)
        self.prompts, self.metrics = read_prompts(config, text), None
        if config.validation_metrics is not None:
            self.metrics = PictureMetrics(config, text, self.pipeline(self.unet), self.accelerator)
        self.batches = self.make_batches()
        self.validation, needs_encoder = None, self.batches.needs_encoder
        needs_encoder |= self.metrics is not None and self.metrics.needs_encoder
        if config.validation_split:
            held_out = make_validation_batches(config, text, *self.place)
            self.validation = ValidationLoss(
                config, self.objective, held_out, self.accelerator.device, self.conditioning
            )
            needs_encoder |= held_out.needs_encoder
        identity = None if text is None else text.identity()
        self.checkpoints.run |= in_json({**(self.batches.content or {}), TEXT_ENCODER: identity})
        if text is not None and not needs_encoder:
            text.release()

    def register_states(self) -> None:
        """Tells the checkpoints what to save."""
        kind, checkpoints = self.accelerator.distributed_type, self.checkpoints
        states: dict[str, Stateful] = {}
        if kind == DistributedType.DEEPSPEED:
            checkpoints.engine = self.unet
        else:
            states = {**self.network_state(), "optimizer": OptimizerState(self.optimizer, self.accelerator.scaler)}
        states["averages"] = self.averages
        checkpoints.own |= {"data": self.batches, "monitor": self.monitor, "losses": self.losses}
        if kind == DistributedType.FSDP:
            checkpoints.own |= states  # each process has its part of them
        else:
            checkpoints.shared |= states
        for number, module in enumerate(self.objective.trained_modules, start=1):
            checkpoints.shared[f"model_{number}"] = NetworkState(inner_network(self.accelerator, module))
        if not self.objective.trained_modules and self.objective.weighting.state_dict():
            checkpoints.own["weighting"] = NetworkState(self.objective.weighting)  # each process saw its own losses

    @property
    def modules(self) -> list[torch.nn.Module]:
        """What has weights that are trained."""
        return [self.unet, *self.objective.trained_modules]

    @property
    def place(self) -> tuple[int, int]:
        """This process among all."""
        return self.accelerator.process_index, self.accelerator.num_processes

    @property
    def images_per_step(self) -> int:
        """Images of a step, over all processes and accumulated batches."""
        return self.batches.stride * self.config.gradient_accumulation_steps

    def start(self) -> int:
        """Takes the folder, and goes on from the checkpoint, if there is one; returns the first step."""
        accelerator, config = self.accelerator, self.config
        found = on_main_process(accelerator, self.begin)
        if found.folder is not None:
            self.checkpoints.load(found.folder)
            self.check_place(found)
        self.schedule = learning_rates(config, self.optimizer.optimizer, found.step)
        self.repository = on_main_process(accelerator, lambda: make_repository(config))
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
        """Holds the folder, chooses the checkpoint, and sets aside what is not of this run. In the main process."""
        self.folder.hold()
        found = self.checkpoints.find(thoroughly=True)
        plan = self.folder.plan(found, self.checkpoints.run)
        self.folder.carry_out(plan, found, self.checkpoints.run)
        return found

    def check_place(self, found: Found) -> None:
        """Checks that the state of a checkpoint is one of its step, and can be trained on.

        Raises:
            ValueError: If not.
        """
        seen = found.step * self.images_per_step
        if self.batches.images_seen != seen:
            raise ValueError(
                f"`resume_from_checkpoint`: {found.folder} says that {self.batches.images_seen!r} images were seen, but "
                f"{found.step} steps see {seen}."
            )
        if self.count_not_finite():
            raise ValueError(
                f"`resume_from_checkpoint`: {found.folder} has weights or averages that are not finite: go back to an "
                "earlier checkpoint."
            )

    def count_not_finite(self) -> int:
        """How many weights and averages, as tensors, have a value that is not finite, in all processes."""
        tensors = [*map(own_part, self.parameters), *self.averages.tensors()]
        return int(self.accelerator.reduce(not_finite(tensors).to(self.accelerator.device), "sum").item())

    def after_step(self, done: int, progress: tqdm, interruption: Interruption) -> None:
        """What there is to do between steps, of which `done` are done. The checkpoint comes last of what belongs to a
        step: a run that is killed before does all of it again, and one that is killed after has all of it."""
        config, last = self.config, done == self.config.max_train_steps
        looks = done % config.logging_steps == 0 or last
        if looks:
            self.log(done, progress)
        with self.stopwatch:
            saves = done % config.checkpointing_steps == 0 or last
            self.write_results(done, last)
            # processes agree where they meet anyway
            meets = looks or self.accelerator.num_processes == 1
            stops = meets and interruption.agreed(self.accelerator) and not last
            if saves or stops:
                self.save_checkpoint(done)
            if interruption.signum is not None and stops:
                self.close()
                raise TrainingInterrupted(interruption.signum, str(self.checkpoints.saved))

    def write_results(self, done: int, last: bool) -> None:
        """Writes what there is to see of a step, which is the last one or one of those that the settings name."""
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
        """Keeps weights that are not finite from being written over those that are.

        Raises:
            FloatingPointError: If one is not.
        """
        if self.count_not_finite():
            kept = self.checkpoints.saved
            raise FloatingPointError(
                f"The weights are not finite after step {done}, so that nothing of it was written: lower "
                "`learning_rate`, or look at the data with `diffusers-imagen doctor`. "
                + ("There is no checkpoint from before." if kept is None else f"The last checkpoint is {kept}.")
            )

    def save_checkpoint(self, done: int) -> None:
        """Writes all that the run needs to go on after a step."""
        self.check_weights(done)
        if self.accelerator.is_main_process:
            for records in self.records.values():
                records.sync()
        self.checkpoints.save(done)
        if self.accelerator.is_main_process:
            self.folder.note(has_checkpoint=True)

    def complete(self, done: int) -> None:
        """Writes what belongs to the last step and is not there: the checkpoint that the run goes on from was not
        written as that of a last step, or the stage is not what it was."""
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
        """Whether all that belongs to the last step is there, and whether its metrics are."""
        is_whole = self.folder.noted("completed") == self.completed(done)
        return is_whole, self.records["metrics"].last_step() >= done

    def completed(self, done: int) -> dict[str, Any]:
        """What run.json has of a last step whose results are written."""
        return {"step": done, "files": digest_stage(Path(self.config.output_dir))}

    def log(self, done: int, progress: tqdm | None = None) -> None:
        """Fetches what the last steps had to tell, and shows it."""
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
        """Adds a line to a file of the run."""
        if self.accelerator.is_main_process:
            self.records[name].append(done, record)

    def validate(self, done: int) -> None:
        """Loss on held-out rows, metrics of pictures and samples, with the averaged weights."""
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
        """Draws the validation prompts and writes a grid; the other processes wait where they meet next."""
        unet = whole_network(self.accelerator, self.unet)
        if self.accelerator.is_main_process and self.prompts is not None:
            images = draw_samples(self.pipeline(unet.eval()), self.prompts, self.config)
            unet.train()
            show_samples(self.accelerator, images, self.config, done)

    def pipeline(self, unet: StageNetwork) -> StagePipeline:
        """What draws with the network, as the exported stage does."""
        settings = self.pretrained.settings(self.config.preconditioning, self.objective.sampling, unet.takes_low_res)
        return stage_pipeline(unet, self.objective.scheduler(), self.config, settings)

    def save_snapshots(self, done: int) -> None:
        """Writes the power-function averages."""
        parameters = dict(zip(self.names, self.parameters))
        self.averages.save_snapshots(self.config.output_dir, parameters, done, self.accelerator.is_main_process)

    def save_results(self, done: int) -> None:
        """Writes the losses, and the averaged weights as a stage."""
        self.losses["loss"] = self.monitor.running_loss(self.accelerator)
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
        self.unet, *self.objective.trained_modules = map(self.accelerator.unwrap_model, self.modules)
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
